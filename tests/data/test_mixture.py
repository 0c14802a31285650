"""The mixture is a function of its settings and an index, fair to rows, to templates and to rates."""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama.config import build
from mtllama.data import mixture as mixture_module
from mtllama.data.mixture import Mixture, MixtureConfig
from mtllama.errors import UserError
from mtllama.tasks.catalog import Rows, catalog
from mtllama.tasks.template import Example, Template

SIZES = {"trec": 90, "rotten_tomatoes": 210, "common_gen": 60}


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three small sets whose inputs tell the number of their row."""
    write(tmp_path, "trec", [{"text": f"<{i}> is what?", "coarse_label": i % 6} for i in range(SIZES["trec"])])
    write(tmp_path, "rotten_tomatoes", [{"text": f"film <{i}> is fine", "label": i % 2} for i in range(SIZES["rotten_tomatoes"])])
    write(tmp_path, "common_gen", [{"concepts": [f"<{i}>", "dog"], "target": "A dog."} for i in range(SIZES["common_gen"])])
    return tmp_path


def mixed(folder: Path | None, **settings: Any) -> Mixture:
    return Mixture(MixtureConfig(dir=folder, **settings))


def draws(mixture: Mixture, num: int) -> dict[str, list[tuple[int, str]]]:
    """Row number and template of the first `num` draws, by data set, in their order."""
    drawn: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for index in range(num):
        example = mixture[index]
        assert example is not None
        drawn[example.task].append((int(example.inputs.split("<")[1].split(">")[0]), example.template))
    return drawn


def passes(drawn: list[tuple[int, str]], size: int) -> Iterator[list[tuple[int, str]]]:
    """The complete passes over a set."""
    for start in range(0, len(drawn) - size + 1, size):
        yield drawn[start : start + size]


def refusal(**settings: Any) -> str:
    with pytest.raises(UserError) as raised:
        build(MixtureConfig, settings, "recipe.yaml")
    return str(raised.value)


@pytest.fixture(scope="module")
def sampler() -> tuple[Mixture, Mixture]:
    """The same mixture twice."""
    return mixed(Path("sampler"), seed=3), mixed(Path("sampler"), seed=3)


@given(index=st.integers(0, 20_000_000) | st.just(19_999_999) | st.integers(0, 2_000))
@settings(deadline=None, max_examples=200)
def test_two_instances_agree_at_every_index_near_or_far(sampler: tuple[Mixture, Mixture], index: int) -> None:
    ours, theirs = sampler[0][index], sampler[1][index]
    assert isinstance(ours, Example)
    assert ours == theirs


def test_an_element_depends_on_its_index_and_not_on_what_was_drawn_before(sampler: tuple[Mixture, Mixture]) -> None:
    indices = [*range(60), *range(19_999_940, 20_000_000)]
    in_order = {index: sampler[0][index] for index in indices}
    shuffled = random.Random(0).sample(indices, len(indices))
    assert {index: sampler[1][index] for index in shuffled} == in_order
    assert len({(example.task, example.inputs) for example in in_order.values() if example}) > 100, "the draws differ"


def test_every_row_of_a_set_is_drawn_once_before_any_is_drawn_again(folder: Path) -> None:
    drawn = draws(mixed(folder), 1500)
    num_passes: Counter[str] = Counter()
    orders = defaultdict(set)
    for name, size in SIZES.items():
        for one in passes(drawn[name], size):
            assert sorted(row for row, _ in one) == list(range(size))
            orders[name].add(tuple(row for row, _ in one))
            num_passes[name] += 1
    assert min(num_passes[name] for name in SIZES) >= 3
    assert all(len(orders[name]) > num_passes[name] / 2 for name in SIZES), "every pass has an order of its own"


def test_the_templates_of_a_set_take_equal_turns_over_its_passes(folder: Path) -> None:
    drawn = draws(mixed(folder), 3000)
    rounds = 0
    for name, size in SIZES.items():
        templates = [template.name for template in catalog()[name].prompts]
        num = size * len(templates)
        for one in passes(drawn[name], num):
            assert Counter(one) == Counter({(row, template): 1 for row in range(size) for template in templates})
            rounds += 1
        per_pass = [Counter(template for _, template in one) for one in passes(drawn[name], size)]
        assert all(max(counts.values()) - min(counts[template] for template in templates) <= 1 for counts in per_pass)
    assert rounds >= 6


def check_shares(mixture: Mixture, num: int) -> None:
    """Of `num` draws each set has its share: Grain rounds the smallest rate's to one in a hundred of itself."""
    counted: Counter[str] = Counter(example.task for index in range(num) if (example := mixture[index]))
    assert counted.total() == num
    for part in mixture.rates:
        expected = part.share * num
        assert abs(counted[part.rows.task.name] - expected) <= 0.011 * expected + len(mixture.rates), (part.rows.task.name, counted)


def test_by_t0s_rule_the_rate_of_a_set_is_its_rows_times_its_templates(folder: Path) -> None:
    mixture = mixed(folder)
    expected = {name: float(size * len(catalog()[name].prompts)) for name, size in SIZES.items()}
    assert {part.rows.task.name: part.rate for part in mixture.rates} == expected
    assert {part.rows.task.name: part.share for part in mixture.rates} == pytest.approx(
        {name: rate / sum(expected.values()) for name, rate in expected.items()}
    )
    assert mixture.num_rows == sum(SIZES.values())
    check_shares(mixture, 2000)


def test_by_t0s_rule_a_large_set_counts_the_cap_divided_among_its_templates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert mixture_module.T0_CAP == 500_000
    assert 500_000 // 9 == 55_555, "amazon_polarity, of nine templates in T0"
    monkeypatch.setattr(mixture_module, "T0_CAP", 90)
    num = {name: len(catalog()[name].prompts) for name in SIZES}
    mixture = mixed(folder)
    assert {part.rows.task.name: part.rate for part in mixture.rates} == {
        "trec": 90.0 * num["trec"],  # as large as the cap, not larger
        "rotten_tomatoes": float(90 // num["rotten_tomatoes"] * num["rotten_tomatoes"]),
        "common_gen": 60.0 * num["common_gen"],
    }
    assert 90 % num["rotten_tomatoes"], "the division leaves a rest"
    check_shares(mixture, 1500)


def test_by_the_rule_of_weights_the_given_weights_are_the_shares(folder: Path) -> None:
    mixture = mixed(folder, tasks={"trec": 1.0, "common_gen": 6.5, "rotten_tomatoes": 0.3}, rule="weights")
    assert [(part.rows.task.name, part.rate) for part in mixture.rates] == [("trec", 1.0), ("common_gen", 6.5), ("rotten_tomatoes", 0.3)]
    assert sum(part.share for part in mixture.rates) == pytest.approx(1.0)
    check_shares(mixture, 1500)


def test_the_shares_hold_in_every_stretch_of_the_stream(folder: Path) -> None:
    mixture = mixed(folder)
    for start in (0, 1_000_000, 19_999_000):
        counted = Counter(example.task for index in range(start, start + 500) if (example := mixture[index]))
        for part in mixture.rates:
            assert abs(counted[part.rows.task.name] - 500 * part.share) <= 0.011 * 500 * part.share + len(mixture.rates)


def test_another_seed_gives_another_order_of_the_same_rows(folder: Path) -> None:
    one, two = draws(mixed(folder, seed=0), 420), draws(mixed(folder, seed=1), 420)
    for name, size in SIZES.items():
        first = [[row for row, _ in drawn[name]][:size] for drawn in (one, two)]
        assert first[0] != first[1]
        assert sorted(first[0]) == sorted(first[1]) == list(range(size))
    assert draws(mixed(folder, seed=1), 420) == two


def test_the_seed_reaches_the_random_choices_of_templates(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    render = Rows.render

    def listening(rows: Rows, index: int, template: Template, *, seed: int = 0) -> Example | None:
        seeds.append(seed)
        return render(rows, index, template, seed=seed)

    monkeypatch.setattr(Rows, "render", listening)
    assert mixed(folder, seed=41)[0] is not None
    assert seeds == [41]


def test_without_names_every_training_set_that_is_there_is_mixed_and_no_other(folder: Path) -> None:
    write(folder, "sst2", [{"sentence": "held out", "label": 1}])
    write(folder, "stranger", [{"text": "unknown"}])
    (folder / "samsum").mkdir()
    assert {part.rows.task.name for part in mixed(folder).rates} == set(SIZES)


def test_names_choose_the_sets_and_their_order(folder: Path) -> None:
    mixture = mixed(folder, tasks=("trec", "common_gen"))
    assert [part.rows.task.name for part in mixture.rates] == ["trec", "common_gen"]
    assert set(draws(mixture, 100)) == {"trec", "common_gen"}
    assert mixture.family("trec") == "Topic"


def test_a_set_that_is_broken_is_an_error_and_not_left_out(folder: Path) -> None:
    (folder / "samsum").mkdir()
    (folder / "samsum" / "train.jsonl").write_text('{"dialogue": "a"', encoding="utf-8")
    with pytest.raises(UserError, match=r"samsum.*line 1"):
        mixed(folder)


def test_a_held_out_set_is_refused(folder: Path) -> None:
    write(folder, "sst2", [{"sentence": "held out", "label": 1}])
    with pytest.raises(UserError, match=r"sst2 is held out for evaluation \(unseen data set\); take it out of data.tasks"):
        mixed(folder, tasks=("trec", "sst2"))
    with pytest.raises(UserError, match="copa is held out"):
        mixed(folder, tasks={"copa": 1.0}, rule="weights")


def test_a_set_that_is_unknown_or_not_there_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"unknown task 'treck'; did you mean trec\?"):
        mixed(folder, tasks=("treck",))
    with pytest.raises(UserError, match="samsum: no file for the split train"):
        mixed(folder, tasks=("samsum",))


def test_a_folder_without_a_training_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no training set with a split train"):
        mixed(tmp_path)
    with pytest.raises(UserError, match="name the data sets to fetch from the hub"):
        mixed(None)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_not_a_positive_number_is_refused(weight: float) -> None:
    message = refusal(tasks={"trec": 1.0, "samsum": weight}, rule="weights")
    assert message.startswith("recipe.yaml: data.tasks.samsum is ") and message.endswith("; a positive number is needed")


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert "data.rule=weights needs data.tasks as a mapping" in refusal(rule="weights")
    assert "data.rule=weights needs data.tasks as a mapping" in refusal(rule="weights", tasks=["trec"])
    assert "data.tasks gives weights, which data.rule=t0-code does not use" in refusal(tasks={"trec": 2})
    assert "data.tasks is empty" in refusal(tasks=[])
    assert "data.tasks is empty" in refusal(tasks={}, rule="weights")
    assert "data.seed is -1; 0 or more is needed" in refusal(seed=-1)
    assert "rule is 'fair'; choose one of t0-code, weights" in refusal(rule="fair")
    assert build(MixtureConfig, {"tasks": {"trec": 2}, "rule": "weights"}, "x").tasks == {"trec": 2.0}


def test_a_row_that_a_template_declines_goes_to_the_next_one_that_takes_it(tmp_path: Path) -> None:
    names = [template.name for template in catalog()["wiki_qa"].prompts]
    write(tmp_path, "wiki_qa", [{"question": f"<{i}>?", "answer": "It is.", "label": i % 2} for i in range(6)])
    taken = defaultdict(set)
    for row, template in draws(mixed(tmp_path), 6 * len(names))["wiki_qa"]:
        taken[row % 2].add(template)
    assert taken[1] == set(names)
    assert taken[0] == {name for name in names if name.startswith("judge")} and len(taken[0]) < len(names)


def test_a_row_that_every_template_declines_is_none_and_keeps_its_place(tmp_path: Path) -> None:
    rows = [{"dialogue": f"<{i}>: hi", "summary": "" if i == 2 else "They greet."} for i in range(5)]
    write(tmp_path, "samsum", rows)
    mixture = mixed(tmp_path)
    elements = [mixture[index] for index in range(10)]
    assert [sum(element is None for element in elements[start : start + 5]) for start in (0, 5)] == [1, 1]
    others = [int(element.inputs.split("<")[1][0]) for element in elements[:5] if element]
    assert sorted(others) == [0, 1, 3, 4]
