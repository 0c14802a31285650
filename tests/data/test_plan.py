"""The plan: T0's rates to the digit, and what a recipe will draw."""

import csv
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from mtllama.data import plan
from mtllama.data.mixture import Mixture, MixtureConfig
from mtllama.data.prompt import FORMATS, PromptEncoder

T0 = ("t0-train",)


@pytest.fixture(scope="module")
def t0(shared_data: Path) -> dict[str, list[dict[str, str]]]:
    folder = shared_data.parent / "t0"
    found = {}
    for name in ("mixture", "tasks"):
        with open(folder / f"t0_{name}.csv", encoding="utf-8") as handle:
            found[name] = [line for line in csv.DictReader(handle) if line["first_mixture"] == "T0"]
    return found


def published(rule: Any) -> dict[str, Any]:
    return plan.published(T0, MixtureConfig(tasks=T0, rule=rule), 20_000_000)


def test_without_any_data_the_plan_of_t0_adds_up_to_its_published_total() -> None:
    ours = published("t0-code")
    assert (ours["sets"], ours["tasks"], ours["total_rate"]) == (38, 313, 17_277_798)
    assert sum(row["rate"] for row in ours["rows"]) == 17_277_798
    assert len({row["task"] for row in ours["rows"]}) == 313
    assert sum(row["draws"] for row in ours["rows"]) == pytest.approx(20_000_000)
    assert json.loads(json.dumps(ours)) == ours


def test_the_plan_agrees_with_the_published_tables_to_the_digit(t0: dict[str, list[dict[str, str]]]) -> None:
    ours = published("t0-code")
    assert {row["task"]: row["rate"] for row in ours["rows"]} == {line["p3_config"]: int(line["rate_t0code"]) for line in t0["tasks"]}
    for row, line in zip(ours["rows"], t0["tasks"], strict=False):
        assert row["rows"] > 0 and line["p3_config"]
    theirs = {
        "_".join(filter(None, (line["dataset"], line["subset"]))): (int(line["weight_t0code"]), float(line["share_t0code"]))
        for line in t0["mixture"]
    }
    assert len(theirs) == 38
    assert {row["set"]: row["rate"] for row in ours["by_set"]} == {name: rate for name, (rate, _) in theirs.items()}
    assert {row["set"]: row["share"] for row in ours["by_set"]} == pytest.approx(
        {name: share for name, (_, share) in theirs.items()}, abs=1e-6
    )


@pytest.mark.parametrize(("rule", "column"), [("t0-readme", "share_dataset_literal"), ("min-size", "share_min500k")])
def test_the_other_two_readings_of_the_rule_agree_too(t0: dict[str, list[dict[str, str]]], rule: str, column: str) -> None:
    theirs = {"_".join(filter(None, (line["dataset"], line["subset"]))): float(line[column]) for line in t0["mixture"]}
    assert {row["set"]: row["share"] for row in published(rule)["by_set"]} == pytest.approx(theirs, abs=1e-6)


def test_the_22_oversampled_tasks_are_those_of_the_tables(t0: dict[str, list[dict[str, str]]]) -> None:
    theirs = {line["p3_config"]: int(line["p3_train_rows"]) for line in t0["tasks"] if line["p3_train_rows"]}
    ours = published("t0-code")
    assert {row["task"]: row["rows"] for row in ours["rows"] if row["task"] in theirs} == theirs
    assert len(ours["oversampled"]) == 22
    assert set(ours["oversampled"]) == {
        line["p3_config"] for line in t0["tasks"] if float(line["oversampling_rate_over_rows"] or 0) > plan.OVERSAMPLED
    }
    (warning,) = ours["warnings"]
    assert "trec_fine_grained_ABBR" in warning and "63.4 x" in warning


def test_the_family_shares_are_those_of_the_facts() -> None:
    shares = {rule: {row["family"]: row["share"] for row in published(rule)["by_family"]} for rule in ("t0-code", "t0-readme", "min-size")}
    assert [round(100 * shares[rule]["Summarization"], 1) for rule in shares] == [31.8, 23.5, 25.6] or [
        round(100 * shares[rule]["Summarization"], 1) for rule in shares
    ] == [31.8, 25.6, 23.5]
    assert all(len(each) == 8 for each in shares.values())


def test_the_plan_of_a_recipe_counts_what_will_be_drawn(bpe_tokenizer: Any) -> None:
    mixture = Mixture(MixtureConfig(dir=Path("sampler"), tasks={"trec": 2, "samsum": 1}, rule="weights"))
    encoder = PromptEncoder(bpe_tokenizer, FORMATS["mtllama"], 512)
    ours = plan.plan(mixture, 900, encoder)
    assert [(row["set"], row["rate"], row["draws"]) for row in ours["by_set"]] == [("trec", 2, 600), ("samsum", 1, 300)]
    assert [row["rate"] for row in ours["rows"] if row["set"] == "trec"] == [0.5] * 4
    lengths = [len(e.ids) for i in range(900) if (x := mixture[i]) and (e := encoder.encode(x.inputs, x.targets))]
    assert ours["tokens"] == pytest.approx(sum(lengths), rel=0.2), "an estimate from a sample"
    assert plan.plan(mixture, 900)["tokens"] is None
    assert sum((part.rate for part in mixture.parts), Fraction(0)) == ours["total_rate"]


def test_what_is_missing_and_what_is_held_out_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "trec").mkdir()
    (tmp_path / "trec" / "train.jsonl").write_text('{"text": "Who?", "coarse_label": 3}\n')
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.jsonl").write_text('{"sentence": "fine", "label": 1}\n')
    warnings = plan.plan(Mixture(MixtureConfig(dir=tmp_path, tasks=T0)), 10)["warnings"]
    assert sum("no file for the split train" in warning for warning in warnings) == 37
    held = Mixture(MixtureConfig(dir=tmp_path, tasks=("trec", "sst2"), allow_held_out=True))
    assert any("sst2 is held out for evaluation (unseen data set), and is trained on" in each for each in plan.plan(held, 10)["warnings"])
