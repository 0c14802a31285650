"""The mixture is a function of its settings and an index, fair to rows, to templates and to rates."""

import json
import os
import pickle
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama.config import build
from mtllama.data import contamination
from mtllama.data.mixture import Mixture, MixtureConfig, held_out, passages, training_passages
from mtllama.data.plan import plan
from mtllama.errors import UserError
from mtllama.tasks.catalog import Rows, catalog
from mtllama.tasks.promptsource import read_templates
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


EVEN: dict[str, Any] = {"tasks": {name: float(size) for name, size in SIZES.items()}, "rule": "weights"}
"""Every set by its rows, so that all are covered several times in few draws."""


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
    drawn = draws(mixed(folder, **EVEN), 1500)
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
    drawn = draws(mixed(folder, **EVEN), 3000)
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


def check_shares(mixture: Mixture, start: int, num: int) -> None:
    """Of any `num` draws in a row each set has its share, up to the depth of the tree of rates."""
    counted = Counter(mixture.draw(index).task for index in range(start, start + num))
    assert counted.total() == num
    for part in mixture.parts:
        assert abs(counted[part.task] - num * part.rate / mixture.total_rate) <= 2 * len(mixture.streams), (part.task, counted)


@pytest.mark.parametrize("rule", ["t0-code", "t0-readme", "min-size"])
def test_the_rate_of_a_set_is_the_rules_number_for_its_published_size(folder: Path, rule: Any) -> None:
    mixture = mixed(folder, rule=rule)
    sizes = {"trec": 5452, "rotten_tomatoes": 8530, "common_gen": 67389}
    expected = {name: size * (len(catalog()[name].prompts) if rule == "t0-code" else 1) for name, size in sizes.items()}
    assert {part.task: part.rate for part in mixture.parts} == expected
    assert mixture.total_rate == sum(expected.values())
    assert mixture.num_rows == sum(SIZES.values())
    check_shares(mixture, 0, 2000)


@pytest.mark.parametrize(("rule", "rates"), [("t0-code", 55_555 * 9), ("t0-readme", 55_555), ("min-size", 500_000)])
def test_a_set_of_over_half_a_million_rows_is_capped_as_the_rule_reads(rule: Any, rates: int) -> None:
    config = MixtureConfig(dir=Path("sampler"), rule=rule)
    assert config.set_rate(catalog()["amazon_polarity"], 3_600_000, 9) == rates
    assert config.set_rate(catalog()["amazon_polarity"], 500_000, 9) == 500_000 * (9 if rule == "t0-code" else 1)


def test_by_the_rule_of_weights_the_given_weights_are_the_shares(folder: Path) -> None:
    mixture = mixed(folder, tasks={"trec": 1.0, "common_gen": 6.5, "rotten_tomatoes": 0.3}, rule="weights")
    assert [(part.task, float(part.rate)) for part in mixture.parts] == [("trec", 1.0), ("common_gen", 6.5), ("rotten_tomatoes", 0.3)]
    counted = Counter(mixture.draw(index).task for index in range(mixture.interleave.period))
    assert counted == {task: counted["trec"] * weight for task, weight in (("trec", 1), ("common_gen", 6.5), ("rotten_tomatoes", 0.3))}


def test_the_shares_hold_in_every_stretch_of_the_stream(folder: Path) -> None:
    mixture = mixed(folder)
    for start in (0, 1_000_000, 19_999_000):
        check_shares(mixture, start, 500)


def test_another_seed_gives_another_order_of_the_same_rows(folder: Path) -> None:
    one, two = draws(mixed(folder, seed=0, **EVEN), 420), draws(mixed(folder, seed=1, **EVEN), 420)
    for name, size in SIZES.items():
        first = [[row for row, _ in drawn[name]][:size] for drawn in (one, two)]
        assert first[0] != first[1]
        assert sorted(first[0]) == sorted(first[1]) == list(range(size))
    assert draws(mixed(folder, seed=1, **EVEN), 420) == two


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
    assert {part.task for part in mixed(folder).parts} == set(SIZES)


def test_names_choose_the_sets_and_their_order(folder: Path) -> None:
    mixture = mixed(folder, tasks=("trec", "common_gen"))
    assert [part.task for part in mixture.parts] == ["trec", "common_gen"]
    assert set(draws(mixture, 100)) == {"trec", "common_gen"}
    assert mixture.draw(0).family in ("Topic", "Structure-to-text")


def test_a_set_that_is_broken_is_an_error_and_not_left_out(folder: Path) -> None:
    (folder / "samsum").mkdir()
    (folder / "samsum" / "train.jsonl").write_text('{"dialogue": "a"', encoding="utf-8")
    with pytest.raises(UserError, match=r"samsum.*line 1"):
        mixed(folder)


def test_a_held_out_set_is_refused(folder: Path) -> None:
    write(folder, "sst2", [{"sentence": "held out", "label": 1}])
    with pytest.raises(UserError, match=r"sst2 is held out for evaluation \(unseen data set\); take it out of mixture.tasks, or set"):
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
    assert message.startswith("recipe.yaml: mixture.tasks.samsum is ") and message.endswith("; a positive number is needed")


def test_settings_that_contradict_each_other_are_refused() -> None:
    assert "mixture.rule=weights needs mixture.tasks as a mapping" in refusal(rule="weights")
    assert "mixture.rule=weights needs mixture.tasks as a mapping" in refusal(rule="weights", tasks=["trec"])
    assert "mixture.tasks gives weights, which mixture.rule=t0-code does not use" in refusal(tasks={"trec": 2})
    assert "mixture.tasks is empty" in refusal(tasks=[])
    assert "mixture.tasks is empty" in refusal(tasks={}, rule="weights")
    assert "mixture.seed is -1; 0 or more is needed" in refusal(seed=-1)
    assert "rule is 'fair'; choose one of t0-code, t0-readme, min-size, weights" in refusal(rule="fair")
    assert build(MixtureConfig, {"tasks": {"trec": 2}, "rule": "weights"}, "x").tasks == {"trec": 2.0}


def test_a_row_that_every_template_declines_is_none_and_keeps_its_place(tmp_path: Path) -> None:
    rows = [{"dialogue": f"<{i}>: hi", "summary": "" if i == 2 else "They greet."} for i in range(5)]
    write(tmp_path, "samsum", rows)
    mixture = mixed(tmp_path)
    elements = [mixture[index] for index in range(10)]
    assert [sum(element is None for element in elements[start : start + 5]) for start in (0, 5)] == [1, 1]
    others = [int(element.inputs.split("<")[1][0]) for element in elements[:5] if element]
    assert sorted(others) == [0, 1, 3, 4]


def judged(folder: Path) -> Path:
    """A set whose every third row is a positive: promptsource's `films` asks about those alone in one of its templates."""
    write(folder / "data", "rotten_tomatoes", [{"text": f"film <{i}>", "label": int(i % 3 == 0)} for i in range(30)])
    source = folder / "ps" / "rotten_tomatoes" / "templates.yaml"
    source.parent.mkdir(parents=True)
    entry = "  {0}: !Template\n    name: {0}\n    jinja: '{1}'\n    answer_choices: null\n"
    jinja = {
        "any": "Good? {{ text }} ||| {{ label }}",
        "some": "{% if label == 1 %}Why? {{ text }} ||| Because.{% endif %}",
        "other": "Bad? {{ text }} ||| {{ label }}",
        "absent": "{{ title }} ||| {{ label }}",
    }
    source.write_text("templates:\n" + "".join(entry.format(name, text) for name, text in jinja.items()), encoding="utf-8")
    return folder


def test_a_prompt_for_some_rows_keeps_its_rate_over_those_rows(tmp_path: Path) -> None:
    folder = judged(tmp_path)
    mixture = mixed(folder / "data", templates=f"promptsource:{folder / 'ps'}")
    drawn = draws(mixture, 900)["rotten_tomatoes"]
    assert Counter(template for _, template in drawn) == {"any": 300, "other": 300, "some": 300}
    asked = [row for row, template in drawn if template == "some"]
    for start in range(0, 300, 10):
        assert sorted(asked[start : start + 10]) == list(range(0, 30, 3)), "each of its rows once in a pass"
    rest = [row for row, template in drawn if template != "some"]
    for start in range(0, 600, 30):
        assert sorted(rest[start : start + 30]) == list(range(30))
    assert mixture.total_rate == 3 * 8530, "a template that does not fit the columns takes its rate with it"
    assert "needs the column 'title'" in mixture.missing["rotten_tomatoes/absent"]


def test_a_prompt_that_asks_none_of_the_rows_has_its_draws_skipped(tmp_path: Path) -> None:
    folder = judged(tmp_path)
    write(folder / "data", "rotten_tomatoes", [{"text": f"film <{i}>", "label": 0} for i in range(6)])
    mixture = mixed(folder / "data", templates=f"promptsource:{folder / 'ps'}")
    drawn = [mixture.draw(index) for index in range(30)]
    assert Counter(draw.template for draw in drawn if draw.example is None) == {"some": 10}
    (warning,) = [each for each in plan(mixture, 30)["warnings"] if "asks none" in each]
    assert warning == "rotten_tomatoes_some asks none of its rows: its draws are skipped"


def test_a_folder_without_templates_for_any_set_is_refused(tmp_path: Path) -> None:
    folder = judged(tmp_path)
    write(folder / "more", "trec", [{"text": "Who?", "coarse_label": 3, "fine_label": 29}])
    with pytest.raises(UserError, match=r"no template fits any of the data sets; trec: .* has no templates for it"):
        mixed(folder / "more", templates=f"promptsource:{folder / 'ps'}")
    with pytest.raises(UserError, match="holds no promptsource templates"):
        mixed(folder / "data", templates=f"promptsource:{folder / 'data'}")
    assert "mixture.templates is 'theirs'; choose own, p3, or promptsource:PATH" in refusal(templates="theirs")


def p3_folder(folder: Path) -> Path:
    for config, num in (("trec_trec1", 6), ("trec_which_category_best_describes", 9), ("super_glue_rte_GPT_3_style", 4), ("my_own", 5)):
        write(folder, config, [{"inputs": f"<{i}> {config}", "targets": f"t{i}"} for i in range(num)])
    return folder


def test_rendered_rows_are_mixed_under_the_rates_of_their_tasks(tmp_path: Path) -> None:
    mixture = mixed(p3_folder(tmp_path), templates="p3")
    assert {(part.task, part.family, part.rate) for part in mixture.parts} == {("trec", "Topic", 2 * 5452), ("my_own", "Other", 5)}
    drawn = [mixture.draw(index) for index in range(2 * 5452 + 5)]
    assert Counter((draw.task, draw.template) for draw in drawn) == {
        ("trec", "trec1"): 5452,
        ("trec", "which_category_best_describes"): 5452,
        ("my_own", "my_own"): 5,
    }
    first = [draw.example for draw in drawn if draw.template == "trec1"][:6]
    assert sorted(example.targets for example in first if example) == [f"t{i}" for i in range(6)], "each once in a pass"
    assert all(example and example.task == "trec" for example in first)


def test_p3_rows_of_a_set_that_was_named_must_be_there(tmp_path: Path) -> None:
    p3_folder(tmp_path)
    with pytest.raises(UserError, match="samsum: no P3 rows"):
        mixed(tmp_path, templates="p3", tasks=("trec", "samsum"))
    assert set(mixed(tmp_path, templates="p3", tasks=("t0-train",)).missing) == {
        task.name for task in catalog().values() if task.p3_templates and task.name != "trec"
    }
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no P3 rows of the split train"):
        mixed(tmp_path / "empty", templates="p3")


def test_a_held_out_set_is_trained_on_only_when_told_so(folder: Path) -> None:
    write(folder, "sst2", [{"sentence": "<0> held out", "label": 1}])
    assert {part.task for part in mixed(folder, tasks=("trec", "sst2"), allow_held_out=True).parts} == {"trec", "sst2"}


LEAK = "The old lighthouse keeper counted the ships each night until the harbour froze over completely."


def test_rows_that_share_text_with_an_evaluation_set_are_dropped_and_counted(folder: Path) -> None:
    write(folder, "rotten_tomatoes", [{"text": LEAK.upper() if i == 7 else f"film <{i}> is number {i}", "label": 0} for i in range(20)])
    (folder / "sst2").mkdir()
    (folder / "sst2" / "validation.jsonl").write_text(json.dumps({"sentence": LEAK, "label": 1}) + "\n", encoding="utf-8")
    whole, clean = mixed(folder), mixed(folder, decontaminate=True)
    assert {part.task: (part.num_rows, part.dropped) for part in clean.parts} == {
        "trec": (90, 0),
        "rotten_tomatoes": (19, 1),
        "common_gen": (60, 0),
    }
    drawn = {draw.row for draw in (clean.draw(i) for i in range(2000)) if draw.task == "rotten_tomatoes"}
    assert drawn == set(range(20)) - {7}
    assert 7 in {draw.row for draw in (whole.draw(i) for i in range(2000)) if draw.task == "rotten_tomatoes"}
    assert any("rotten_tomatoes: 1 rows share text with an evaluation set" in each for each in plan(clean, 10)["warnings"])


def test_without_evaluation_sets_there_is_nothing_to_keep_apart_from(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match=r"no evaluation set in .*; set mixture.eval_dir"):
        mixed(folder, decontaminate=True)
    held = tmp_path_factory.mktemp("held")
    (held / "sst2").mkdir()
    (held / "sst2" / "validation.jsonl").write_text(json.dumps({"sentence": LEAK, "label": 1}) + "\n", encoding="utf-8")
    assert all(part.dropped == 0 for part in mixed(folder, decontaminate=True, eval_dir=held).parts)


def test_the_order_is_the_same_however_the_draws_are_shared_out(folder: Path) -> None:
    """Ranks and workers take every n-th index; a mixture that went through a pickle is the same one."""
    mixture = mixed(folder)
    whole = [mixture.draw(index) for index in range(240)]
    other = pickle.loads(pickle.dumps(mixture))
    for ranks in (2, 3, 8):
        shared = [[other.draw(index) for index in range(rank, 240, ranks)] for rank in range(ranks)]
        assert [shared[index % ranks][index // ranks] for index in range(240)] == whole


def test_a_row_that_the_prompt_of_its_turn_does_not_ask_is_skipped_and_rates_stay_exact(tmp_path: Path) -> None:
    write(tmp_path, "rotten_tomatoes", [{"text": f"<{i}>", "label": i % 2 if i else -1} for i in range(8)])
    mixture = mixed(tmp_path)
    drawn = [mixture.draw(index) for index in range(32)]
    names = [prompt.name for prompt in catalog()["rotten_tomatoes"].prompts]
    assert Counter(draw.template for draw in drawn) == dict.fromkeys(names, 8)
    assert Counter(draw.row for draw in drawn if draw.example is None) == {0: 4}, "a hidden label is not taken for the last choice"


def test_rows_of_a_shared_file_are_called_by_their_number_in_it(tmp_path: Path) -> None:
    ids = ["dbert-1", "dbidaf-1", "dbert-2", "droberta-1", "dbidaf-2"]
    answers = {"text": ["here"], "answer_start": [0]}
    write(tmp_path, "adversarial_qa", [{"id": i, "context": "here", "question": f"<{n}>?", "answers": answers} for n, i in enumerate(ids)])
    mixture = mixed(tmp_path)
    assert {(draw.task, draw.row) for draw in (mixture.draw(index) for index in range(200))} == {
        ("adversarial_qa_dbert", 0),
        ("adversarial_qa_dbert", 2),
        ("adversarial_qa_dbidaf", 1),
        ("adversarial_qa_dbidaf", 4),
        ("adversarial_qa_droberta", 3),
    }


HELD_OUT_CONFIGS = [
    "copa_best_option",
    "sst2_x",
    "glue_rte_x",
    "super_glue_cb_x",
    "winogrande_winogrande_debiased_Replace",
    "squad_v2_x",
    "anli_GPT_3_style_r1",
    "hellaswag_x",
    "tydiqa_secondary_task_x",
    "mlqa_x",
    "xquad_x",
    "openbookqa_main_x",
    "story_cloze_2016_x",
]


def test_rendered_rows_of_evaluation_sets_are_left_out_under_all_their_names(tmp_path: Path) -> None:
    p3_folder(tmp_path)
    for config in HELD_OUT_CONFIGS:
        write(tmp_path, config, [{"inputs": "a", "targets": "b"}])
    assert {part.task for part in mixed(tmp_path, templates="p3").parts} == {"trec", "my_own"}


def test_rendered_rows_are_checked_by_their_inputs(tmp_path: Path) -> None:
    write(tmp_path / "p3", "trec_trec1", [{"inputs": f"Ask: {LEAK if i == 2 else i}", "targets": "t"} for i in range(4)])
    (tmp_path / "eval" / "sst2").mkdir(parents=True)
    (tmp_path / "eval" / "sst2" / "validation.jsonl").write_text(json.dumps({"sentence": LEAK, "label": 1}) + "\n", encoding="utf-8")
    config = MixtureConfig(dir=tmp_path / "p3", templates="p3", eval_dir=tmp_path / "eval")
    report = contamination.check(training_passages(config), [passages(rows) for rows in held_out(config)])
    assert report.rows("trec_trec1") == {2} and report.items("sst2") == {0}


def beside(tmp_path: Path, **config: Any) -> Mixture:
    """6 rows of TREC, and 9 that P3 rendered of two of its prompts; 4 rendered rows of a set without rows of its own."""
    write(tmp_path / "rows", "trec", [{"text": f"Where is {i} ?", "coarse_label": 4, "fine_label": 33} for i in range(6)])
    for name, num in (
        ("trec_trec1", 3),
        ("trec_what_category_best_describe", 6),
        ("wiqa_what_is_the_final_step_of_the_following_process", 4),
    ):
        write(tmp_path / "p3", name, [{"inputs": f"{name} <{i}> {LEAK if i == 2 else ''}", "targets": f"t{i}"} for i in range(num)])
    return mixed(tmp_path / "rows", p3=tmp_path / "p3", **config)


def test_rendered_rows_stand_beside_the_rows_of_a_set_and_share_its_rate_by_their_numbers(tmp_path: Path) -> None:
    mixture = beside(tmp_path, tasks={"trec": 5, "wiqa": 1}, rule="weights")
    assert [(part.name, part.num_rows, part.rate) for part in mixture.parts] == [("trec", 6, 2), ("trec (P3)", 9, 3), ("wiqa (P3)", 4, 1)]
    assert mixture.missing == {} and set(mixture.data()) == {"trec", "trec (P3)", "wiqa (P3)"}
    drawn = [mixture.draw(index) for index in range(600)]
    counted = Counter((draw.task, draw.template) for draw in drawn)
    assert counted["trec", "trec1"] == 100 and counted["trec", "what_category_best_describe"] == 200
    assert sum(draw.task == "wiqa" for draw in drawn) == 100 and sum(draw.task == "trec" for draw in drawn) == 500
    seen = {(draw.template, draw.row) for draw in drawn if draw.example and "<" in draw.example.inputs}
    assert len(seen) == 3 + 6 + 4, "every rendered row comes up"
    assert plan(mixture, 600)["by_set"][0]["rows"] == 15


def changed(path: Path, old: str, new: str) -> None:
    """Another text of the same length."""
    text = path.read_text(encoding="utf-8")
    assert old in text and len(old) == len(new)
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def others(mixture: Mixture, before: dict[str, str]) -> set[str]:
    return {name for name, mark in mixture.data().items() if before.get(name) != mark}


def test_an_edit_of_equal_length_is_other_data_and_a_new_date_is_not(folder: Path) -> None:
    before = mixed(folder).data()
    assert set(before) == set(SIZES) and before["trec"].startswith("90 rows, ") and json.loads(json.dumps(before)) == before
    for file in folder.glob("*/train.jsonl"):
        os.utime(file, (1, 1))
    assert others(mixed(folder), before) == set()
    changed(folder / "trec" / "train.jsonl", "<7> is what?", "<7> is that?")
    assert others(mixed(folder), before) == {"trec"}


def test_every_file_of_rendered_rows_counts(tmp_path: Path) -> None:
    before = beside(tmp_path).data()
    changed(tmp_path / "p3" / "trec_what_category_best_describe" / "train.jsonl", "<5>", "<6>")  # the second of two files
    assert others(mixed(tmp_path / "rows", p3=tmp_path / "p3"), before) == {"trec (P3)"}
    alone = mixed(tmp_path / "p3", templates="p3").data()
    changed(tmp_path / "p3" / "trec_what_category_best_describe" / "train.jsonl", "<4>", "<6>")
    assert others(mixed(tmp_path / "p3", templates="p3"), alone) == {"trec"}


@pytest.mark.parametrize(
    ("old", "new"), [("Good? {{ text }}", "Fine? {{ text }}"), ("name: absent", "name: abroad"), ("{{ title }}", "{{  text }}")]
)
def test_other_templates_are_other_data(tmp_path: Path, old: str, new: str) -> None:
    folder = judged(tmp_path)

    def found() -> Mixture:
        read_templates.cache_clear()  # as in another process
        return mixed(folder / "data", templates=f"promptsource:{folder / 'ps'}")

    before, own = found().data(), mixed(folder / "data").data()
    assert set(before) == set(own) == {"rotten_tomatoes"} and before != own
    changed(folder / "ps" / "rotten_tomatoes" / "templates.yaml", old, new)
    assert others(found(), before) == (set() if "absent" in old else {"rotten_tomatoes"})  # that one fits no row, whatever its name


def test_evaluation_sets_that_leave_out_other_rows_make_other_data(folder: Path) -> None:
    write(folder, "rotten_tomatoes", [{"text": LEAK if i == 3 else LEAK[::-1] if i == 4 else f"film <{i}>", "label": 0} for i in range(20)])
    (folder / "sst2").mkdir()
    held, before = folder / "sst2" / "validation.jsonl", {}
    for leak, expected in ((LEAK, set(SIZES)), (LEAK[::-1], {"rotten_tomatoes"})):  # row 3 is left out, then row 4
        held.write_text(json.dumps({"sentence": leak, "label": 1}) + "\n", encoding="utf-8")
        mixture = mixed(folder, decontaminate=True)
        assert others(mixture, before) == expected and "19 rows" in mixture.data()["rotten_tomatoes"]
        before = mixture.data()


def test_rendered_rows_that_share_text_with_an_evaluation_set_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "eval" / "sst2").mkdir(parents=True)
    (tmp_path / "eval" / "sst2" / "validation.jsonl").write_text(json.dumps({"sentence": LEAK, "label": 1}) + "\n", encoding="utf-8")
    mixture = beside(tmp_path, tasks=("trec", "wiqa"), decontaminate=True, eval_dir=tmp_path / "eval")
    assert {part.name: (part.num_rows, part.dropped) for part in mixture.parts} == {
        "trec": (6, 0),
        "trec (P3)": (7, 2),
        "wiqa (P3)": (3, 1),
    }
    drawn = [mixture.draw(index) for index in range(500)]
    assert not any(draw.example and LEAK in draw.example.inputs for draw in drawn)
    assert {draw.row for draw in drawn if draw.task == "wiqa"} == {0, 1, 3}


def test_the_share_of_a_prompt_whose_rendered_rows_are_all_left_out_goes_to_the_other_rows(tmp_path: Path) -> None:
    (tmp_path / "eval" / "sst2").mkdir(parents=True)
    (tmp_path / "eval" / "sst2" / "validation.jsonl").write_text(json.dumps({"sentence": LEAK, "label": 1}) + "\n", encoding="utf-8")
    write(tmp_path / "rows", "trec", [{"text": f"Where is {i} ?", "coarse_label": 4, "fine_label": 33} for i in range(6)])
    write(tmp_path / "p3", "trec_trec1", [{"inputs": f"{i} {LEAK}", "targets": "t"} for i in range(3)])
    config = {"p3": tmp_path / "p3", "rule": "weights", "decontaminate": True, "eval_dir": tmp_path / "eval"}
    mixture = mixed(tmp_path / "rows", tasks={"trec": 5}, **config)
    assert [(part.name, part.num_rows, part.rate) for part in mixture.parts] == [("trec", 6, 5)]
    assert "trec (P3), trec1: every row shares text with an evaluation set" in mixture.remarks()
    write(tmp_path / "p3", "trec_what_category_best_describe", [{"inputs": f"<{i}>", "targets": "t"} for i in range(4)])
    mixture = mixed(tmp_path / "rows", tasks={"trec": 5}, **config)
    assert [(part.name, part.num_rows, part.rate) for part in mixture.parts] == [("trec", 6, 3), ("trec (P3)", 4, 2)]


def test_rendered_rows_beside_others_must_be_there_and_of_a_set_that_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no P3 rows of the split train of any data set that was asked for"):
        beside(tmp_path, tasks=("trec",)) and mixed(tmp_path / "rows", p3=tmp_path / "rows", tasks=("trec",))
    with pytest.raises(UserError, match="nowhere does not exist"):
        mixed(tmp_path / "rows", p3=tmp_path / "nowhere", tasks=("trec",))
    assert "with mixture.templates=p3, dir is that folder" in refusal(templates="p3", p3=str(tmp_path))
    with pytest.raises(UserError, match="qasc"):
        beside(tmp_path, tasks=("trec", "qasc"))


def test_a_dropped_row_of_a_shared_file_is_called_by_its_number_in_it(tmp_path: Path) -> None:
    answers = {"text": ["here"], "answer_start": [0]}
    rows = [{"id": f"{name}-1", "context": f"here {name}", "question": "Where?", "answers": answers} for name in ("dbidaf", "dbert")]
    write(tmp_path, "adversarial_qa", [*rows, {**rows[1], "id": "dbert-2", "context": LEAK}])
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "validation.jsonl").write_text(json.dumps({"sentence": LEAK, "label": 1}) + "\n", encoding="utf-8")
    config = MixtureConfig(dir=tmp_path, tasks=("adversarial_qa_dbert",), decontaminate=True)
    report = contamination.check(training_passages(config), [passages(each) for each in held_out(config)])
    assert report.rows("adversarial_qa_dbert") == {2}
    mixture = Mixture(config)
    assert {mixture.draw(index).row for index in range(20)} == {1} and mixture.parts[0].dropped == 1
