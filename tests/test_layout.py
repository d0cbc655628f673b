from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dlzo.scoring.layout import grow_trees, pack_trees, pad_rows

# Few tokens, so that prefixes are shared often.
SEQUENCES = st.sets(st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple), min_size=1)


@given(SEQUENCES, st.integers(1, 200))
def test_a_token_attends_to_its_own_sequences_past(sequences, hidden_size):
    for tree in grow_trees(sequences, hidden_size):
        for sequence, path in tree.paths.items():
            assert [tree.tokens[i] for i in path] == list(sequence)
            for n, i in enumerate(path.tolist()):
                assert tree.depths[i] == n
                assert tree.ancestors[i].nonzero().flatten().tolist() == path[: n + 1].tolist()
                within = tree.ancestors_within(3)[i].nonzero().flatten().tolist()
                assert within == path[max(0, n - 2) : n + 1].tolist()
        assert tree.height == max(map(len, tree.paths))
        lower = torch.ones(len(tree.tokens), len(tree.tokens), dtype=torch.bool).tril()
        assert tree.is_chain == torch.equal(tree.ancestors, lower)


@given(SEQUENCES, st.integers(1, 200))
def test_no_sequence_is_lost_and_no_token_kept_twice(sequences, hidden_size):
    trees = grow_trees(sequences, hidden_size)
    assert sorted(s for tree in trees for s in tree.paths) == sorted(sequences)
    for tree in trees:
        prefixes = {s[:n] for s in tree.paths for n in range(1, len(s) + 1)}
        assert len(tree.tokens) == len(prefixes)


def test_prefixes_are_shared_where_that_saves_work():
    prompt = tuple(range(300))
    options = [(*prompt, 400 + i, 500) for i in range(3)]
    (tree,) = grow_trees(options, hidden_size=576)
    assert len(tree.tokens) == 300 + 3 * 2
    # One common first token is not worth attention over pairs of long texts.
    texts = [(0, *range(1000 * i, 1000 * i + 100)) for i in (1, 2)]
    assert len(grow_trees(texts, hidden_size=576)) == 2


@given(SEQUENCES, st.integers(1, 40), st.integers(1, 9))
def test_packs_are_filled_up_by_a_tree_of_their_own(sequences, row_tokens, multiple):
    trees = grow_trees(sequences, 64)
    plain = list(pack_trees(trees, row_tokens))
    for pack, filled in zip(plain, pack_trees(trees, row_tokens, multiple), strict=True):
        assert 0 <= filled.positions - pack.positions < multiple
        assert filled.positions % multiple == 0
        assert filled.places.keys() == pack.places.keys()
        assert filled.trees[: len(pack.trees)] == pack.trees
        for tree in filled.trees[len(pack.trees) :]:
            assert tree.is_chain and not tree.paths
            assert len(tree.tokens) == filled.positions - pack.positions


@given(SEQUENCES, st.integers(1, 40))
def test_packs_hold_every_token_at_its_place(sequences, row_tokens):
    for packs in (pack_trees(grow_trees(sequences, 64), row_tokens), pad_rows(sequences, 8)):
        found = []
        for pack in packs:
            found += pack.places
            for sequence, (row, columns) in pack.places.items():
                assert pack.inputs["input_ids"][row, columns].tolist() == list(sequence)
                if pack.trees is not None:
                    places = pack.inputs["position_ids"][row, columns].tolist()
                    assert places == list(range(len(sequence)))
        assert sorted(found) == sorted(sequences)


@given(SEQUENCES, st.integers(1, 40))
def test_packs_are_no_larger_than_they_may_be(sequences, row_tokens):
    for pack in pack_trees(grow_trees(sequences, 64), row_tokens):
        assert pack.positions <= row_tokens or len(pack.trees) == 1
    for pack in pad_rows(sequences, row_tokens):
        assert pack.positions <= row_tokens or len(pack.places) == 1
