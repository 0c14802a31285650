"""Suites and templates: which tasks, asked how."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mtllama.errors import UserError
from mtllama.evaluate import runner, stats
from mtllama.evaluate.items import EvalConfig, load_items
from mtllama.evaluate.suites import SUITES, pick_templates, suite_tasks
from mtllama.model.engine import Engine
from mtllama.model.find import find_model
from mtllama.model.load import load_model
from mtllama.tasks.catalog import catalog

T0 = {"rte": 10, "cb": 15, "anli_r1": 15, "anli_r2": 15, "anli_r3": 15, "wsc": 10, "winogrande": 5, "wic": 10}
T0 |= {"hellaswag": 4, "copa": 12, "story_cloze": 5}


@pytest.fixture(scope="module")
def promptsource(shared_data: Path) -> str:
    folder = shared_data.parent / "promptsource-0.1.0"
    if not folder.is_dir():
        pytest.skip("no promptsource checkout beside the data")
    return f"promptsource:{folder}"


def names(suite: str) -> list[str]:
    return [task.name for task in suite_tasks(suite)]


def test_the_suites_have_the_tasks_that_they_promise() -> None:
    assert len(names("mt-llama")) == 11 and len(names("sampler")) == 8 and names("t0") == list(T0)
    many = names("mt-llama-multilingual")
    assert {"xquad-zh", "mlqa-hi", "tydiqa-sw", "pawsx-ja", "xnli-ur", "xcopa-qu", "xstorycloze-te", "xwinograd-jp", "marc-de"} <= set(many)
    assert len(many) == len(set(many)) >= 83
    pairs = names("cross-lingual")
    assert {"xquad-de-ar", "mlqa-zh-en"} <= set(pairs) and len(pairs) == 12 * 11 + 7 * 6 and not set(pairs) & set(many)
    chosen_on = names("train-validation")
    assert {"sciq", "glue_mrpc", "wiki_bio", "ag_news"} <= set(chosen_on) and "rte" not in chosen_on
    assert all(catalog()[name].role == "train" for name in chosen_on)


def test_t0s_suite_asks_through_every_original_task_template(promptsource: str) -> None:
    assert {task.name: len(pick_templates(promptsource, task)) for task in suite_tasks("t0")} == T0


def test_templates_are_picked_by_kind_and_by_name() -> None:
    rte = catalog()["rte"]
    assert [template.name for template in pick_templates("mt-llama", rte)] == ["mt-llama"]
    own = [template.name for template in pick_templates("own", rte)]
    assert own == ["ours_question_first", "ours_labelled", "ours_text_first"]
    assert [template.name for template in pick_templates("all", rte)] == ["mt-llama", *own]
    assert [template.name for template in pick_templates("ours_labelled,mt-llama", rte)] == ["ours_labelled", "mt-llama"]
    assert [template.name for template in pick_templates("mt-llama", catalog()["cb"])] == ["ours_question_first"]
    with pytest.raises(UserError, match="rte has no template 'ours'; it has: mt-llama, ours_question_first"):
        pick_templates("ours", rte)


def test_prompts_that_ask_something_else_are_not_taken() -> None:
    others = {(task.name, t.name) for task in catalog().values() for t in task.prompts[1:] if not t.metadata.original_task}
    taken = {(task.name, template.name) for task in catalog().values() for template in pick_templates("all", task)}
    assert len(others) >= 3 and not others & taken


def test_t0_without_a_promptsource_folder_says_what_to_pass(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pass --templates promptsource:PATH"):
        load_items(EvalConfig(suite="t0", data_dir=tmp_path))
    with pytest.raises(UserError, match="holds no promptsource templates"):
        load_items(EvalConfig(suite="t0", data_dir=tmp_path, templates=f"promptsource:{tmp_path}"))


def test_a_suite_on_real_data_says_what_to_fetch_for_what_is_missing(shared_data: Path, promptsource: str) -> None:
    found, missing = load_items(EvalConfig(suite="t0", data_dir=shared_data / "eval", templates=promptsource, limit=2))
    assert {each.task.name for each in found} == {"rte", "cb", "wsc", "winogrande", "wic", "hellaswag", "copa"}
    assert set(missing) == {"anli_r1", "anli_r2", "anli_r3", "story_cloze"}
    assert "anli_r1: no file for the split dev_r1" in missing["anli_r1"] and "such as anli_r1/dev_r1.jsonl" in missing["anli_r1"]
    for each in found:
        asked = {item.template for item in each.items}
        # HellaSwag and COPA have templates for some rows only.
        assert len(asked) == T0[each.task.name] or each.skipped, each.task.name
        assert all(item.choices and item.target in item.choices for item in each.items)


def rendering(template: str, row: int, right: bool) -> dict[str, Any]:
    choices = {"choices": ["a", "b"], "gold_index": 0, "gold": "a", "references": ["a"], "unconditional": None, "cut": False}
    where = {"task": "rte", "template": template, "row": row, "kind": "score", "metrics": ["accuracy"]}
    return where | choices | {"logprobs": [[-1.0], [-2.0]] if right else [[-2.0], [-1.0]]}


def test_several_templates_give_mean_median_quartiles_and_spread() -> None:
    rights = {"a": 1, "b": 2, "c": 2, "d": 4, "e": 8}  # of 8 rows
    records = [rendering(template, row, row < right) for row in range(8) for template, right in rights.items()]
    result = runner.summarize(records, "rank")
    assert {name: template["value"] for name, template in result["templates"].items()} == {t: 12.5 * right for t, right in rights.items()}
    quartiles = {"median": 25.0, "q1": 25.0, "q3": 50.0, "min": 12.5, "max": 100.0, "spread": 87.5}
    assert result["over_templates"] == {"templates": 5, "mean": pytest.approx(42.5)} | quartiles
    assert result["value"] == result["accuracy"] == pytest.approx(42.5) and (result["n"], result["rows"]) == (40, 8)


def asked(template: str, picked: Sequence[int], golds: Sequence[int] = (0, 0, 1, 1)) -> list[dict[str, Any]]:
    """Rows that are judged by their whole set, too, and what was picked."""
    return [
        rendering(template, row, True)
        | {"metrics": ["accuracy", "macro-f1"], "gold_index": gold, "gold": "ab"[gold]}
        | {"logprobs": [[-1.0 - pick], [-2.0 + pick]]}
        for row, (pick, gold) in enumerate(zip(picked, golds, strict=True))
    ]


def test_metrics_of_a_whole_set_are_computed_template_by_template() -> None:
    result = runner.summarize([*asked("one", (0, 0, 1, 1)), *asked("two", (0, 0, 0, 1))], "rank")
    two = 100 * (2 * 2 / 5 + 2 * 1 / 3) / 2  # F1 of the first class 4/5, of the second 2/3
    assert result["templates"]["two"]["macro-f1"] == pytest.approx(two) and result["templates"]["two"]["accuracy"] == 75.0
    assert result["macro-f1"] == pytest.approx((100 + two) / 2) and result["metric"] == "accuracy" and result["value"] == 87.5


def test_metrics_of_a_whole_set_have_intervals_of_their_own_overall_and_for_each_template() -> None:
    golds = [row % 2 for row in range(40)]
    mostly = [gold if row % 4 else 0 for row, gold in enumerate(golds)]
    result = runner.summarize([*asked("all", golds, golds), *asked("most", mostly, golds), *asked("none", [0] * 40, golds)], "rank")
    by_template = {name: template["set_ci95"]["macro-f1"] for name, template in result["templates"].items()}
    assert by_template["all"] == [100.0, 100.0]
    low, high = by_template["none"]  # always the first class: half of an F1 of about 2/3
    assert 25 < low < 100 / 3 < high < 42
    low, high = result["set_ci95"]["macro-f1"]
    assert low < result["macro-f1"] < high and [low, high] not in by_template.values() and [low, high] != result["ci95"]
    assert set(result["set_ci95"]) == {"macro-f1"}


def test_a_template_without_choices_says_nothing_about_macro_f1_and_the_others_do() -> None:
    golds = [row % 2 for row in range(12)]
    answers = asked("choices", [0] * 12, golds)
    texts = [
        record | {"template": "text", "choices": None, "gold_index": None, "references": [record["gold"]], "kind": "generate", "text": "a"}
        for record in answers
    ]
    chosen = [record | {"kind": "generate", "text": "a"} for record in answers]
    result = runner.summarize([*texts, *chosen], "generate")
    assert "macro-f1" not in result["templates"]["text"] and result["templates"]["text"]["set_ci95"] == {}
    assert result["macro-f1"] == result["templates"]["choices"]["macro-f1"] == pytest.approx(100 / 3)
    assert result["set_ci95"] == result["templates"]["choices"]["set_ci95"] != {}
    assert result["accuracy"] == 50.0 and result["n"] == 24


def test_the_interval_over_templates_is_over_rows_not_over_their_renderings() -> None:
    # All ten templates get the same rows right: asking ten times says no more than asking once.
    many = runner.summarize([rendering(str(template), row, row < 5) for row in range(8) for template in range(10)], "rank")
    once = runner.summarize([rendering("0", row, row < 5) for row in range(8)], "rank")
    assert many["ci95"] == once["ci95"] == [100 * end for end in stats.exact_interval(5, 8)]
    assert many["n"] == 80 and many["rows"] == 8


def test_value_and_interval_are_of_the_mean_over_templates_where_one_asks_some_rows_only() -> None:
    result = runner.summarize(
        [*(rendering("all", row, True) for row in range(100)), *(rendering("few", row, False) for row in range(10))], "rank"
    )
    assert result["value"] == result["over_templates"]["mean"] == 50.0 and (result["n"], result["rows"]) == (110, 100)
    assert result["ci95"] == [50.0, 50.0], "every row drawn is right through the one, and wrong through the other"
    assert result["stderr"]["accuracy"] == pytest.approx(0.0, abs=1e-9)


def test_a_run_through_promptsources_templates_has_a_result_for_each(
    pico: Path, shared_data: Path, promptsource: str, tmp_path: Path
) -> None:
    engine = Engine(load_model(find_model(str(pico)), dtype="float32"))
    config = EvalConfig("t0", ("rte", "copa"), shared_data / "eval", templates=promptsource, limit=6)
    results = runner.evaluate(engine, config, tmp_path / "out")
    rte, copa = (results["tasks"][task]["rank"] for task in ("rte", "copa"))
    assert len(rte["templates"]) == 10 and (rte["n"], rte["rows"]) == (60, 6)
    assert len(copa["templates"]) == 12 and copa["skipped"] > 0
    assert copa["n"] == sum(template["n"] for template in copa["templates"].values()) == 72 - copa["skipped"]
    assert results["templates"] == promptsource and set(results["tasks"]["rte"]) == set(SUITES["t0"].protocols)


def test_train_validation_reads_validation_splits_of_training_sets(tmp_path: Path) -> None:
    (tmp_path / "sciq").mkdir()
    row = '{"question": "q", "distractor1": "a", "distractor2": "b", "distractor3": "c", "correct_answer": "d", "support": "s"}\n'
    (tmp_path / "sciq" / "train.jsonl").write_text(row * 3, encoding="utf-8")
    (tmp_path / "sciq" / "validation.jsonl").write_text(row * 2, encoding="utf-8")
    (tmp_path / "qasc").mkdir()
    (tmp_path / "qasc" / "test.jsonl").write_text("{}\n", encoding="utf-8")
    found, missing = load_items(EvalConfig(suite="train-validation", data_dir=tmp_path))
    assert [(each.task.name, each.rows.split, len(each.items), each.protocols) for each in found] == [("sciq", "validation", 2, ("rank",))]
    assert "no file for the split validation" in missing["qasc"]
