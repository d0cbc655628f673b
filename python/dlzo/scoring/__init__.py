"""Scoring runtime: the losses of a batch under several states of one layer, with nothing wasted.

No padding, no logits that nobody reads, shared prompts once, layers below the tuned one once for
all states, or taken from a cache. Everything is exact: the losses are those of a plain loop over
single texts, to rounding.

`encoding` makes tokens of examples, `layout` lays them out as trees of shared prefixes,
`attention` keeps the trees apart, `prefix` keeps the tuned layer's inputs, `runner` runs the model,
`trial` finds what the model allows, and `scorer` makes losses of it all.
"""

from dlzo.scoring.encoding import (
    MAX_LENGTH,
    EncodedExample,
    Option,
    check_ids,
    check_tokenizer,
    max_length,
    truncate,
)
from dlzo.scoring.forward import State
from dlzo.scoring.plan import Plan
from dlzo.scoring.prefix import PrefixCache
from dlzo.scoring.scorer import Scorer

__all__ = [
    "MAX_LENGTH",
    "EncodedExample",
    "Option",
    "Plan",
    "PrefixCache",
    "Scorer",
    "State",
    "check_ids",
    "check_tokenizer",
    "max_length",
    "truncate",
]
