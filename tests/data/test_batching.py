"""Packs hold every example once, whole and by itself: `pytest tests/data/test_batching.py`."""

import itertools
from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama.data.batching import Batch, deal, pack
from mtllama.data.prompt import Encoded


@st.composite
def encoded(draw: st.DrawFn) -> Encoded:
    """An example as the encoder makes it: a token of prompt or more, then a target or more."""
    ids = draw(st.lists(st.integers(0, 30), min_size=2, max_size=24))
    return Encoded(ids, draw(st.integers(1, len(ids) - 1)), cut=False)


EXAMPLES = st.lists(encoded(), max_size=12)


def segments(batch: Batch) -> list[range]:
    """Where each example of a pack stands."""
    starts = [sum(batch.segments[:i]) for i in range(len(batch.segments))]
    return [range(start, start + length) for start, length in zip(starts, batch.segments, strict=True)]


@given(examples=EXAMPLES, max_tokens=st.integers(1, 80))
@settings(deadline=None)
def test_every_target_of_every_example_is_predicted_once_from_the_place_before_it(examples: list[Encoded], max_tokens: int) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    num_before = 0
    for batch in pack(examples, max_tokens):
        row = batch.ids[0].tolist()
        places = segments(batch)
        for place, target, owner in zip(batch.predict.tolist(), batch.targets.tolist(), batch.owners.tolist(), strict=True):
            within = places[owner - num_before]
            assert place in within and place + 1 in within, "a target lies in the segment that it is predicted from"
            assert target == row[place + 1] == examples[owner].ids[place + 1 - within.start]
            seen[owner, place + 1 - within.start] += 1
        num_before += len(places)
    wanted = {(i, n) for i, example in enumerate(examples) for n in range(len(example.ids) - example.num_target, len(example.ids))}
    assert set(seen) == wanted
    assert all(count == 1 for count in seen.values())


@given(examples=EXAMPLES, max_tokens=st.integers(1, 80))
@settings(deadline=None)
def test_the_examples_stand_in_their_order_without_padding_between(examples: list[Encoded], max_tokens: int) -> None:
    batches = list(pack(examples, max_tokens))
    assert [i for batch in batches for i in batch.ids[0].tolist()] == [i for example in examples for i in example.ids]
    assert [length for batch in batches for length in batch.segments] == [len(example.ids) for example in examples]
    for batch in batches:
        assert batch.ids.shape == batch.positions.shape == (1, sum(batch.segments))
        assert batch.positions[0].tolist() == [n for length in batch.segments for n in range(length)]


@given(examples=EXAMPLES, max_tokens=st.integers(1, 80))
@settings(deadline=None)
def test_the_budget_is_kept_but_for_an_example_that_is_longer_and_then_alone(examples: list[Encoded], max_tokens: int) -> None:
    for batch in pack(examples, max_tokens):
        assert batch.ids.numel() <= max_tokens or len(batch.segments) == 1


@given(examples=EXAMPLES, max_tokens=st.integers(1, 80))
@settings(deadline=None)
def test_no_two_neighbouring_packs_would_have_fitted_into_one_by_an_example(examples: list[Encoded], max_tokens: int) -> None:
    batches = list(pack(examples, max_tokens))
    for first, second in itertools.pairwise(batches):
        assert sum(first.segments) + second.segments[0] > max_tokens


def test_the_losses_of_a_pack_are_those_of_each_example_alone() -> None:
    torch.manual_seed(0)
    table = torch.randn(31, 31)  # a model that sees the last token only
    examples = [
        Encoded(torch.randint(0, 31, (length,)).tolist(), num, cut=False) for length, num in ((9, 3), (2, 1), (14, 13), (5, 1), (30, 4))
    ]
    theirs = []
    for example in examples:
        ids = torch.tensor(example.ids)
        labels = ids.clone()
        labels[: len(ids) - example.num_target] = -100
        theirs.append(torch.nn.functional.cross_entropy(table[ids[:-1]], labels[1:], ignore_index=-100, reduction="sum"))
    ours = torch.zeros(len(examples))
    num_packs = 0
    for batch in pack(examples, 24):
        losses = torch.nn.functional.cross_entropy(table[batch.ids[0, batch.predict]], batch.targets, reduction="none")
        ours.index_add_(0, batch.owners, losses)
        num_packs += 1
    assert num_packs == 3
    torch.testing.assert_close(ours, torch.stack(theirs))


def test_whole_numbers_come_out_as_tensors_that_index() -> None:
    (batch,) = pack([Encoded([5, 6, 7], 1, cut=False), Encoded([8, 9], 1, cut=True)], 5)
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.segments == [3, 2]
    assert (batch.predict.tolist(), batch.targets.tolist(), batch.owners.tolist()) == ([1, 3], [7, 9], [0, 1])
    assert {tensor.dtype for tensor in (batch.ids, batch.positions, batch.predict, batch.targets, batch.owners)} == {torch.int64}


def test_no_examples_make_no_packs() -> None:
    assert list(pack([], 100)) == []


@given(lengths=st.lists(st.integers(2, 2048), max_size=40), size=st.integers(1, 9))
def test_every_example_is_dealt_to_one_rank_and_none_has_much_more_than_another(lengths: list[int], size: int) -> None:
    shares = deal(lengths, size)
    assert len(shares) == size and sorted(number for share in shares for number in share) == list(range(len(lengths)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(lengths[number] for number in share) for share in shares]
    fewest = min(loads)
    for share, load in zip(shares, loads, strict=True):
        assert not share or load - min(lengths[number] for number in share) <= fewest  # nobody is given one who had more already


def test_one_long_example_is_dealt_against_many_short_ones() -> None:
    assert deal([10, 1000, 400, 300, 200], 2) == [[1], [0, 2, 3, 4]]
    assert deal([3, 4], 1) == [[0, 1]] and deal([], 2) == [[], []]
