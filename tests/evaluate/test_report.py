"""The report: its numbers are those of the records, its text is safe, and it refuses what cannot be compared."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from mtllama.errors import UserError
from mtllama.evaluate import protocols, stats
from mtllama.evaluate.report import compare, table, write_report
from mtllama.evaluate.runner import _summary, read_run

SST2_BASE, SST2_TUNED = "0001010011" * 4, "1101111011" * 4
COPA_BASE, COPA_TUNED = "0110" * 10, "1010" * 10
SQUAD_BASE, SQUAD_TUNED = [0.0, 0.5, 0.0, 1.0] * 10, [1.0, 0.5, 0.25, 1.0] * 10
EVIL = "<script>alert('x')</script> a|b `c`\n<img src=x onerror=alert(1)>"


def choice_record(task: str, protocol: str, i: int, right: int, *, prediction: str | None = None) -> dict[str, Any]:
    choices, gold = ["No", "Yes"], i % 2
    picked = gold if right else 1 - gold
    unparsed = protocol == "generate" and not right
    return {
        "task": task,
        "template": "mt-llama",
        "protocol": protocol,
        "item_id": str(i),
        "prompt": f"prompt {i}",
        "prompt_ids": [1],
        "cut": False,
        "choices": choices,
        "choice_ids": None,
        "scores": [-1.0 - (picked == 1), -1.0 - (picked == 0)] if protocol == "rank" else None,
        "prediction": prediction or choices[picked],
        "predicted_index": picked,
        "gold": choices[gold],
        "gold_index": gold,
        "correct": bool(right),
        "unparsed": unparsed,
    }


def text_record(i: int, f1: float, *, prediction: str = "an answer") -> dict[str, Any]:
    return {
        "task": "squad",
        "template": "mt-llama",
        "protocol": "generate",
        "item_id": f"q{i}",
        "prompt": "context " * 5,
        "prompt_ids": [1],
        "cut": False,
        "choices": None,
        "choice_ids": None,
        "scores": None,
        "prediction": prediction,
        "gold": ["the answer", "answer"],
        "correct": f1 == 1.0,
        "f1": f1,
        "em": float(f1 == 1.0),
        "unparsed": False,
    }


def records_of(sst2: str, copa: str, squad: list[float], prediction: str = "an answer") -> list[dict[str, Any]]:
    return [
        *(choice_record("sst2", "rank", i, int(c)) for i, c in enumerate(sst2)),
        *(choice_record("sst2", "generate", i, int(c), prediction=prediction) for i, c in enumerate(sst2)),
        *(choice_record("copa", "rank", i, int(c)) for i, c in enumerate(copa)),
        *(text_record(i, f1, prediction=prediction) for i, f1 in enumerate(squad)),
    ]


def save_run(folder: Path, records: list[dict[str, Any]], name: str, **settings: Any) -> Path:
    jobs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    tasks: dict[str, Any] = {}
    for record in records:
        jobs.setdefault((record["task"], record["protocol"]), []).append(record)
    for (task, protocol), group in jobs.items():
        facts = {"split": "validation", "note": "", "data": f"{task}.jsonl", "skipped": 0, "templates": {}}
        tasks.setdefault(task, {})[protocol] = _summary("f1" if task == "squad" else "accuracy", group) | facts
    model = {"name": name, "folder": str(folder / "model"), "delta": None, "parameters": 1000, "weights_sha256": name, "recipe": None}
    results = {"schema": 1, "model": model, "format": "mtllama", "dtype": "float32", "suite": "sampler", "seed": 0, "limit": None}
    results |= {"versions": {"mtllama": "0"}, "missing": {}, "tasks": tasks} | settings
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_run(tmp_path / "base", records_of(SST2_BASE, COPA_BASE, SQUAD_BASE), "Pico")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return save_run(tmp_path / "tuned", records_of(SST2_TUNED, COPA_TUNED, SQUAD_TUNED, EVIL), "Pico + $tuned$")


def differences(before: Sequence[Any], after: Sequence[Any]) -> list[float]:
    return [float(b) - float(a) for a, b in zip(before, after, strict=True)]


def test_a_difference_its_interval_and_its_p_are_those_of_the_paired_items(base: Path, tuned: Path) -> None:
    comparison = compare(read_run(base), read_run(tuned))
    found = {(row.task, row.protocol): row for row in comparison.tasks}
    paired = {("sst2", "rank"): differences(SST2_BASE, SST2_TUNED), ("squad", "generate"): differences(SQUAD_BASE, SQUAD_TUNED)}
    for job, values in paired.items():
        row, draws = found[job], np.random.default_rng(7).choice(values, (20_000, len(values))).mean(axis=1)
        assert row.num_items == 40 and row.tuned - row.base == row.difference
        assert row.difference == pytest.approx(100 * sum(values) / 40)
        assert row.ci95 == pytest.approx(tuple(100 * np.quantile(draws, (0.025, 0.975))), abs=1.5)
    sst2 = paired["sst2", "rank"]
    mcnemar = binomtest(sst2.count(1.0), sst2.count(1.0) + sst2.count(-1.0)).pvalue
    assert found["sst2", "rank"].p == pytest.approx(mcnemar, abs=0.01)
    assert found["copa", "rank"].p > 0.9 and found["copa", "rank"].difference == 0


def test_a_mean_takes_each_task_by_its_primary_protocol_and_all_its_items(base: Path, tuned: Path) -> None:
    data_sets, unseen_tasks = compare(read_run(base), read_run(tuned)).means
    every = [differences(SST2_BASE, SST2_TUNED), differences(SQUAD_BASE, SQUAD_TUNED)]
    assert set(zip(data_sets.tasks, data_sets.protocols, strict=True)) == {("sst2", "rank"), ("squad", "generate")}
    assert data_sets.num_items == 80
    assert data_sets.difference == pytest.approx(100 * sum(sum(each) / 40 for each in every) / 2)
    assert data_sets.p == pytest.approx(stats.paired_p(every), abs=0.002)
    assert (unseen_tasks.tasks, unseen_tasks.difference) == (("copa",), 0)


def test_the_order_of_the_records_does_not_matter(base: Path) -> None:
    results, records = read_run(base)
    assert all(row.difference == 0 and row.p == 1 for row in compare((results, records), (results, records[::-1])).tasks)


def test_holm_equals_the_example_by_hand() -> None:
    # 4 x 0.005, 3 x 0.01, then 2 x 0.03 = 0.06, which the larger p of 0.04 may not undercut.
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
    assert stats.holm([]) == []


def test_p_is_adjusted_over_the_tasks_of_its_protocol(base: Path, tuned: Path) -> None:
    rows = compare(read_run(base), read_run(tuned)).tasks
    for protocol in protocols.PROTOCOLS:
        same = [row for row in rows if row.protocol == protocol]
        assert [row.p_holm for row in same] == pytest.approx(stats.holm([row.p for row in same]))


def test_runs_over_different_items_are_refused_by_the_name_of_the_task(base: Path, tmp_path: Path) -> None:
    fewer = save_run(tmp_path / "fewer", records_of(SST2_TUNED, COPA_TUNED[:-1], SQUAD_TUNED), "fewer")
    with pytest.raises(UserError, match=r"copa \(rank\): the runs hold different items \(40 and 39; 39 is in one only\)"):
        write_report([base, fewer], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_items_of_one_id_but_another_answer_are_refused(base: Path) -> None:
    results, records = read_run(base)
    other = [record | {"gold": "Maybe"} if record["task"] == "copa" and record["item_id"] == "3" else record for record in records]
    with pytest.raises(UserError, match=r"copa .*item 3"):
        compare((results, records), (results, other))


def test_runs_with_nothing_in_common_are_refused(base: Path, tmp_path: Path) -> None:
    other = save_run(tmp_path / "other", [choice_record("wic", "rank", 0, 1)], "other")
    with pytest.raises(UserError, match="no task and protocol in common"):
        compare(read_run(base), read_run(other))


def test_records_that_do_not_fit_their_results_are_refused(base: Path, tmp_path: Path) -> None:
    file = base / "records.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="39 records of squad"):
        write_report([base], tmp_path / "out")


class Tags(HTMLParser):
    """Collects what a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, Any]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_the_html_is_one_file_in_which_a_models_text_stays_text(base: Path, tuned: Path, tmp_path: Path) -> None:
    write_report([base, tuned], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Tags(text)
    assert "&lt;script&gt;alert(" in text, "the answer is not shown, so nothing was proved"
    assert "script" not in page.tags and not [name for name, _ in page.attributes if name.startswith("on")]
    sources = [value for name, value in page.attributes if name == "src"]
    assert len(sources) == 2 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert "link" not in page.tags and not re.search(r"url\(|@import", text)
    assert page.tags.count("th") == len([name for name, _ in page.attributes if name == "scope"])
    assert page.tags.count("img") == len([value for name, value in page.attributes if name == "alt" and value])


def test_the_markdown_keeps_a_models_text_out_of_its_tables_and_tags(base: Path, tuned: Path, tmp_path: Path) -> None:
    write_report([base, tuned], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "a\\|b \\`c\\`" in text and "<script" not in text and "<img" not in text
    blocks = [[line for line in block.splitlines() if line.startswith("|")] for block in text.split("\n\n")]
    for rows in filter(None, blocks):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, rows
    assert text.count("<details>") == text.count("</details>") == 12


def test_the_headline_says_what_was_shown_and_what_was_not(base: Path, tuned: Path, tmp_path: Path) -> None:
    write_report([base, tuned], tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    data_sets, unseen_tasks, above = numbers["headline"]
    assert data_sets.startswith("Unseen data sets (2): mean 38.8 → 74.4 from base to tuned, difference +35.6 points")
    assert data_sets.endswith("p < 0.001: tuned is better.")
    assert unseen_tasks.startswith("Unseen tasks (1): mean 50.0 → 50.0") and unseen_tasks.endswith("no difference shown.")
    assert above == "Above both chance and the most frequent answer by its whole interval (ranking): base on 0 of 2, tuned on 1 of 2 tasks."
    assert numbers["comparisons"][0]["means"][0]["difference"] == pytest.approx(35.625)
    for name in ("report.md", "report.html"):
        assert "mean 38.8 → 74.4" in (tmp_path / "out" / name).read_text()


def test_the_published_numbers_are_shown_as_another_models_with_a_warning(base: Path, tuned: Path, tmp_path: Path) -> None:
    write_report([base, tuned], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| squad | 29.4 EM 11.5 | 85.9 EM 77.6 |" in text and "DAMO-NLP-SG/MT-LLaMA" in text
    assert "Not comparable: our columns are on the embedded sampler data" in text


def test_real_data_carries_no_sampler_warning_and_unlike_settings_are_named(tmp_path: Path) -> None:
    records = records_of(SST2_BASE, COPA_BASE, SQUAD_BASE)
    base = save_run(tmp_path / "base", records, "Pico", suite="mt-llama", missing={"rte": "rte: no file for the split validation"})
    plain = save_run(tmp_path / "plain", records, "Pico", suite="mt-llama", format="plain", dtype="bfloat16")
    write_report([base, plain], tmp_path / "out")
    notes = json.loads((tmp_path / "out" / "comparison.json").read_text())["notes"]
    assert (
        'The runs differ in format: base "mtllama"; tuned "plain".' in notes
        and 'The runs differ in dtype: base "float32"; tuned "bfloat16".' in notes
    )
    assert "Missing in base: rte: no file for the split validation." in notes and "All runs measured the same weights." in notes
    assert "sampler" not in (tmp_path / "out" / "report.md").read_text()


def test_a_protocol_that_one_run_lacks_is_left_out_and_said(base: Path, tmp_path: Path) -> None:
    records = [
        record for record in records_of(SST2_TUNED, COPA_TUNED, SQUAD_TUNED) if (record["task"], record["protocol"]) != ("sst2", "rank")
    ]
    tuned = save_run(tmp_path / "tuned", records, "Pico + tuned")
    write_report([base, tuned], tmp_path / "out")
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "Not compared, because only one of base and tuned has it: sst2 (rank)." in numbers["notes"]
    assert numbers["comparisons"][0]["means"][0]["protocols"] == ["generate", "generate"]


def test_one_run_alone_and_three_runs_work(base: Path, tuned: Path, tmp_path: Path) -> None:
    files = write_report([base], tmp_path / "one")
    assert {file.relative_to(tmp_path / "one").as_posix() for file in files} == {
        "report.md",
        "report.html",
        "comparison.json",
        "figures/results.png",
        "figures/generated.png",
    }
    assert all(file.is_file() and file.stat().st_size > 0 for file in files)
    assert json.loads((tmp_path / "one" / "comparison.json").read_text())["comparisons"] == []
    write_report([base, tuned, base], tmp_path / "three")
    assert "difference, run 3" in (tmp_path / "three" / "report.md").read_text()


def test_a_report_is_the_same_every_time(base: Path, tuned: Path, tmp_path: Path) -> None:
    first, second = (write_report([base, tuned], tmp_path / name) for name in ("first", "second"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_an_existing_folder_and_the_runs_themselves_are_not_overwritten(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="--overwrite"):
        write_report([base], tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
    for holder in (base, base.parent):
        with pytest.raises(UserError, match="would replace"):
            write_report([base], holder, overwrite=True)
    assert (base / "records.jsonl").is_file()
    write_report([base], tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_the_training_loss_is_shown_when_its_log_is_that_of_the_model_measured(base: Path, tuned: Path, tmp_path: Path) -> None:
    folder = tuned / "model"
    folder.mkdir()
    lines = [
        {"step": 1, "loss": 3.0, "targets": 10, "families": {"Sentiment": {"loss": 3.0, "targets": 10}}},
        {"step": 2, "loss": 2.0, "targets": 30, "families": {"Topic": {"loss": 2.0, "targets": 20}}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tmp_path / "out/figures/loss-tuned.png" in write_report([base, tuned], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| all | 30 | 3.000 | 2.000 |" in text and "| Topic | 20 | 2.000 | 2.000 |" in text
    (folder / "mtllama.json").write_text(json.dumps({"recipe": {"name": "another"}}))
    assert tmp_path / "again/figures/loss-tuned.png" not in write_report([base, tuned], tmp_path / "again")


def test_the_table_groups_tasks_and_shows_interval_exact_match_and_unparsed(base: Path, tuned: Path) -> None:
    lines = table([read_run(base)[0], read_run(tuned)[0]]).splitlines()
    assert lines[0] == "base: Pico (mtllama, float32, suite sampler)"
    groups = [line for line in lines if line.startswith("Unseen")]
    assert groups == ["Unseen data sets", "Unseen tasks"]
    by_job = {tuple(line.split()[:2]): line for line in lines}
    assert re.search(r"f1 +40 +– +– +37\.5 \[.*\] EM 25\.0 +68\.8 \[.*\] EM 50\.0$", by_job["squad", "generate"])
    assert re.search(r"accuracy +40 +50\.0 +50\.0 +40\.0 \[.*\] 24 unparsed", by_job["sst2", "generate"])
    assert "unparsed" not in by_job["sst2", "rank"] and lines.index(by_job["copa", "rank"]) > lines.index("Unseen tasks")
