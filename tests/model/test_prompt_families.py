"""Prompts that begin alike are found, and computed within the budget of a pass."""

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from mtllama.model.families import SHARED, Family, beyond, families, passes

COMMON = list(range(100, 140))


@st.composite
def prompts(draw: st.DrawFn) -> list[list[int]]:
    """Random prompts of which many go on from few beginnings."""
    beginnings = draw(st.lists(st.lists(st.integers(0, 2), max_size=40), min_size=1, max_size=3))
    rests = st.lists(st.integers(0, 2), min_size=1, max_size=30)
    return [beginnings[i % len(beginnings)] + rest for i, rest in enumerate(draw(st.lists(rests, max_size=25)))]


@given(prompts())
def test_every_prompt_is_in_one_family_and_begins_as_its_family_does(prompts: list[list[int]]) -> None:
    found = families(prompts)
    assert sorted(i for family in found for i in family.members) == list(range(len(prompts)))
    for family in found:
        assert len({tuple(prompts[i][: family.shared]) for i in family.members}) == 1
        assert all(len(prompts[i]) > family.shared for i in family.members), "the last token is a prompt's own"
        assert family.shared >= SHARED if len(family.members) > 1 else family.shared == 0
        lengths = [len(prompt) for prompt in prompts]
        assert family.tokens(lengths) <= sum(lengths[i] for i in family.members)


@given(prompts(), st.integers(1, 300))
def test_passes_hold_every_prompt_once_within_the_budget(prompts: list[list[int]], max_tokens: int) -> None:
    lengths = [len(prompt) + 3 for prompt in prompts]
    found = list(passes(families(prompts), lengths, max_tokens))
    assert sorted(i for group in found for family in group for i in family.members) == list(range(len(prompts)))
    for group in found:
        alone = len(group) == 1 and len(group[0].members) == 1
        assert alone or sum(family.tokens(lengths) for family in group) <= max_tokens
    largest = [group[0].tokens(lengths) for group in found]
    assert largest == sorted(largest, reverse=True), "what needs most memory comes first"


def test_questions_about_two_passages_are_two_families_in_any_order() -> None:
    one, other = COMMON, [1, *COMMON]
    asked = [[*one, 5], [*other, 6], [7] * 30, [*one, 8, 9], [*other, 6]]
    assert families(asked) == [Family((1, 4), 41), Family((2,), 0), Family((0, 3), 40)]
    order = random.Random(0).sample(range(5), 5)
    shuffled = families([asked[i] for i in order])
    assert [({order[i] for i in family.members}, family.shared) for family in shuffled] == [({1, 4}, 41), ({2}, 0), ({0, 3}, 40)]


def test_a_beginning_that_is_too_short_or_saves_less_is_not_shared() -> None:
    short = COMMON[: SHARED - 1]
    assert [family.shared for family in families([[*short, 1], [*short, 2]])] == [0, 0]
    long, joins = [*COMMON, *range(200, 260)], [*COMMON[:20], 7]
    assert families([[*long, 1], [*long, 2], joins]) == [Family((2,), 0), Family((0, 1), 100)], "20 for three save less than 100 for two"


@given(prompts())
def test_no_division_of_the_sorted_prompts_leaves_fewer_tokens(prompts: list[list[int]]) -> None:
    """Against every way to join three neighbours at most."""
    prompts = sorted(prompts[:8])
    lengths = [len(prompt) for prompt in prompts]

    def least(rest: list[list[int]]) -> int:
        ways = []
        for count in range(1, min(3, len(rest)) + 1):
            group = rest[:count]
            alike = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*group, strict=False))
            shared = min(min(len(prompt) - 1 for prompt in group), len(list(alike)))
            cost = sum(map(len, group)) - (count - 1) * (shared if shared >= SHARED else 0)
            ways.append(cost + least(rest[count:]))
        return min(ways, default=0)

    assert sum(family.tokens(lengths) for family in families(prompts)) <= least(prompts)


def test_a_family_over_the_budget_is_divided_and_each_division_reads_its_beginning() -> None:
    asked = [[*COMMON, i] for i in range(10)]
    lengths = [len(prompt) for prompt in asked]
    found = list(passes(families(asked), lengths, 45))
    assert [[(len(family.members), family.shared) for family in group] for group in found] == [[(5, 40)], [(5, 40)]]
    assert list(passes(families(asked), lengths, 1)) == [[Family((i,), 0)] for i in range(10)]


def test_what_a_prompt_adds_beside_its_neighbour() -> None:
    assert beyond([*COMMON, 1], [*COMMON, 2, 3]) == 2
    assert beyond([*COMMON, 1], [*COMMON, 1]) == 1
    assert beyond([1, 2, 3], [1, 2, 4]) == 3


def test_no_prompts_are_no_families() -> None:
    assert families([]) == [] and list(passes([], [], 10)) == []
