"""Writes noise_v1.json from the numpy reference: `python tests/vectors/make.py`.

The Philox part is Random123's published vectors (kat_vectors, philox4x32 with 10 rounds); the rest
may change only with the version of the noise.
"""

import json
from pathlib import Path

import numpy as np

from dlzo_kernels import reference

PHILOX = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip

RUNS = [  # seed, stream, query, first element: counters on both sides of 2^32, every lane
    (0, 0, 0, 0),
    (1, 2, 3, 5),
    (0x0123456789ABCDEF, 8, 0, (1 << 34) - 6),
    (0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, (1 << 40) + 3),
    (1 << 63, 1, 1 << 31, (1 << 64) - 20),
]


def main() -> None:
    runs = []
    for seed, stream, query, first in RUNS:
        index = np.arange(first, first + 20, dtype=np.uint64)
        runs.append(
            {
                "seed": seed,
                "stream": stream,
                "query": query,
                "first": first,
                "words": [
                    [f"{word:08x}" for word in pair]
                    for pair in reference.words(index, seed, stream, query).tolist()
                ],
                "z": [
                    f"{bits:08x}"
                    for bits in reference.gaussian(index, seed, stream, query).view(np.uint32)
                ],
            }
        )
    philox = [dict(zip(("counter", "key", "words"), row, strict=True)) for row in PHILOX]
    text = json.dumps({"noise_version": 1, "philox4x32_10": philox, "runs": runs}, indent=1)
    Path(__file__).with_name("noise_v1.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
