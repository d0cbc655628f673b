"""The machine code of both columns: no spills, few instructions, nothing fused, complete."""

from __future__ import annotations

import re

import pytest

from dlzo_kernels import _C
from ptx.compile import CSRC, EXACT, missing, nvcc_ptx
from ptx.lint import fused, inexact, missing_floats, missing_words
from scripts import load_benchmark

CMAKE = CSRC.parent / "CMakeLists.txt"
NOISE_OPS = ("gaussian", "perturb", "accumulate")
# Of noise v1, scaled by the powers of two that noise.cuh folds into them.
WORDS = (0xD2511F53, 0xCD9E8D57)
FLOATS = (
    *map(float.fromhex, ("-0x1.62e430p-23", "0x1.0e2994p-12", "0x1.1df3acp-11")),
    *map(float.fromhex, ("0x1.f03c90p-11", "0x1.1ef186p-9", "0x1.55b7e4p-8", "0x1.99ce44p-7")),
    *map(float.fromhex, ("0x1.fffe5ep-6", "0x1.55550cp-4", "-0x1.2d9bb8p-15", "0x1.465ec6p-9")),
    *map(float.fromhex, ("-0x1.4abbbap-4", "0x1.921fb6p-1", "0x1.d9f7bap-19", "-0x1.55c664p-12")),
    *map(float.fromhex, ("0x1.03c1dep-6", "-0x1.3bd3ccp-2")),
)


gpu_static = load_benchmark("gpu_static")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, object]]:
    reason = missing("nvdisasm", "cuobjdump")
    if reason or not hasattr(_C, "cuda"):
        pytest.skip(reason or "this build has no CUDA kernels")
    return list(gpu_static.cuda_rows())


def test_every_kernel_is_there_for_every_architecture(rows):
    sources = [path.read_text() for path in CSRC.glob("*.cu")]
    count = sum(len(re.findall(r"^\s*DLZO_KERNEL\(", source, flags=re.M)) for source in sources)
    architectures = {int(name) for name in _C.cuda.ARCHITECTURES.split(", ")}
    assert {row["architecture"] for row in rows} == architectures
    # The kernels of perturb stand in a macro that is used twice.
    assert len(rows) == len(architectures) * (count + 5)


def test_no_limit_is_exceeded(rows):
    assert [problem for row in rows for problem in gpu_static.problems(row)] == []


# The others differ by a type; benchmarks/gpu_static.py compiles all of them.
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize(
    "kernel",
    ["perturb_bfloat16_bfloat16", "accumulate_float32_into_bfloat16", "sum_runs_bfloat16"],
)
def test_triton_exceeds_no_limit(architecture, kernel):
    pytest.importorskip("triton", minversion="3.7")  # the limits are of its code
    if reason := missing("nvdisasm", "cuobjdump"):
        pytest.skip(reason)
    row = gpu_static.triton_row(architecture, kernel)
    assert [*gpu_static.problems(row)] == []
    assert row["per_element"] > 10  # the loop was found


def test_what_exceeds_a_limit_is_named():
    row = {
        "column": "cuda",
        "architecture": 90,
        "kernel": "perturb_float32",
        "registers": 99,
        "spills": 4,
    }
    row |= {"per_element": 70.0, "fused": 9, "roots": 4}
    assert list(gpu_static.problems(row)) == [
        "perturb_float32 on sm_90, cuda, spills in 4 instructions",
        "perturb_float32 on sm_90, cuda, takes 99 registers, above 48",
        "perturb_float32 on sm_90, cuda, takes 70.0 instructions an element, above 51.0",
        "perturb_float32 on sm_90, cuda, has 9 fused operations for 4 roots",
    ]


def test_the_hot_path_is_the_shortest_round_with_all_that_is_asked():
    lines = [
        ("MOV", False, None),
        ("LDG.E.128", False, None),  # the loop begins
        ("BRA", True, 5),
        ("CALL", False, None),  # a slow way that never comes back
        ("FADD", False, None),
        ("FMUL", False, None),
        ("BRA", True, 8),
        ("MUFU.RSQ", False, None),
        ("BRA", True, 1),
    ]
    code = [gpu_static.Instruction(*line) for line in lines]
    short = gpu_static.hot_path(code, {"LDG.E.128": 1})
    assert [x.opcode for x in short] == ["LDG.E.128", "BRA", "FMUL", "BRA", "BRA"]
    rooted = gpu_static.hot_path(code, {"MUFU.RSQ": 1})
    assert [x.opcode for x in rooted] == ["LDG.E.128", "BRA", "FMUL", "BRA", "MUFU.RSQ", "BRA"]
    with pytest.raises(ValueError, match="no loop has"):
        gpu_static.hot_path(code, {"CALL": 1, "FADD": 1})


@pytest.mark.skipif(missing("nvcc") is not None, reason=str(missing("nvcc")))
def test_the_build_undoes_fast_math():
    source = CSRC / "gaussian.cu"
    assert nvcc_ptx(source, 90, ("--use_fast_math",)) == nvcc_ptx(source, 90)
    assert f"target_compile_options(gpu PRIVATE {' '.join(EXACT)})" in CMAKE.read_text()


@pytest.mark.parametrize("op", NOISE_OPS)
@pytest.mark.parametrize("architecture", [80, 90, 120])
def test_the_ptx_of_noise_is_exact(op, architecture):
    if reason := missing("nvcc"):
        pytest.skip(reason)
    ptx = nvcc_ptx(CSRC / f"{op}.cu", architecture)
    for entry in re.findall(r"\.entry (\w+)", ptx):
        assert inexact(ptx, entry) == []
        assert fused(ptx, entry) == []
        assert missing_words(ptx, WORDS, entry) == []
        assert missing_floats(ptx, FLOATS, entry) == []
