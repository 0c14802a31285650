"""The report: its numbers are those of the records, its text is safe, and it refuses what cannot be compared."""

import itertools
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
from mtllama.evaluate import protocols, sections, stats
from mtllama.evaluate.compare import Run, agreements, by_job, compare, differing, read
from mtllama.evaluate.figures import Bars, draw_bars
from mtllama.evaluate.report import table, write_report
from mtllama.evaluate.runner import SCHEMA, read_run, summarize

SST2_BASE, SST2_TUNED = "0001010011" * 4, "1101111011" * 4
COPA_BASE, COPA_TUNED = "0110" * 10, "1010" * 10
SQUAD_BASE, SQUAD_TUNED = [0.0, 0.5, 0.0, 1.0] * 10, [1.0, 0.5, 0.25, 1.0] * 10
EVIL = "<script>alert('x')</script> a|b `c`\n<img src=x onerror=alert(1)>"


def choice_record(
    task: str, kind: str, i: int, right: int, *, prediction: str | None = None, template: str = "mt-llama", mean_right: int | None = None
) -> dict[str, Any]:
    """A raw record that `rank` (or generation) judges right or not; `rank-mean` likewise, or as `mean_right` has it."""
    choices, gold = ["No", "Yes"], i % 2
    picked = gold if right else 1 - gold
    logprobs = [[-1.0 - (picked == 1)], [-1.0 - (picked == 0)]]
    if mean_right is not None and bool(mean_right) != bool(right):
        logprobs[1 - picked] = [-0.75, -0.75]  # less in sum, more a token
    ranked = {"logprobs": logprobs, "unconditional": None, "choice_ids": [[1], [2]]}
    text = {"text": choices[picked] if right else prediction or "neither"}
    return {
        "task": task,
        "template": template,
        "item_id": str(i),
        "row": i,
        "kind": kind,
        "sha256": "",
        "metrics": ["accuracy"],
        "prompt": f"prompt {i}",
        "prompt_ids": [1],
        "cut": False,
        "choices": choices,
        "gold": choices[gold],
        "gold_index": gold,
        "references": [choices[gold]],
    } | (ranked if kind == "score" else text)


def text_record(i: int, f1: float, *, prediction: str = "") -> dict[str, Any]:
    """The answer is one word; more words around it make the F1 smaller."""
    texts = {0.0: prediction or "wrong", 1.0: "an answer", 0.5: "answer x y", 0.25: "answer a1 b1 c1 d1 e1 f1"}
    return choice_record("squad", "generate", 0, 1) | {
        "item_id": f"q{i}",
        "row": i,
        "metrics": ["f1", "em"],
        "prompt": "context " * 5,
        "choices": None,
        "gold": "answer",
        "gold_index": None,
        "references": ["the answer", "answer"],
        "text": texts[f1],
    }


def records_of(sst2: str, copa: str, squad: list[float], prediction: str = "") -> list[dict[str, Any]]:
    return [
        *(choice_record("sst2", "score", i, int(c)) for i, c in enumerate(sst2)),
        *(choice_record("sst2", "generate", i, int(c), prediction=prediction) for i, c in enumerate(sst2)),
        *(choice_record("copa", "score", i, int(c)) for i, c in enumerate(copa)),
        *(text_record(i, f1, prediction=prediction) for i, f1 in enumerate(squad)),
    ]


def save_run(
    folder: Path, records: list[dict[str, Any]], name: str, *, ways: Sequence[str] = ("rank", "generate"), **settings: Any
) -> Path:
    tasks: dict[str, Any] = {}
    facts = {"split": "validation", "note": "", "skipped": 0}
    for task in dict.fromkeys(record["task"] for record in records):
        for way in ways:
            group = [record for record in records if record["task"] == task and way in protocols.of_record(record)]
            if group:
                tasks.setdefault(task, {})[way] = summarize(group, way) | facts | {"data": f"{task}.jsonl"}
    model = {"name": name, "folder": str(folder / "model"), "delta": None, "parameters": 1000, "weights_sha256": name, "recipe": None}
    results = {"schema": SCHEMA, "model": model, "format": "mtllama", "dtype": "float32", "suite": "sampler", "seed": 0, "limit": None}
    results |= {"versions": {"mtllama": "0"}, "missing": {}, "tasks": tasks} | settings
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def in_memory(folder: Path, records: list[dict[str, Any]]) -> Run:
    """A run with other records than those of its file."""
    results, _ = read_run(folder)
    return Run("other", folder, results, by_job(results, records))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_run(tmp_path / "base", records_of(SST2_BASE, COPA_BASE, SQUAD_BASE), "Pico")


@pytest.fixture
def tuned(tmp_path: Path) -> Path:
    return save_run(tmp_path / "tuned", records_of(SST2_TUNED, COPA_TUNED, SQUAD_TUNED, EVIL), "Pico + $tuned$")


def differences(before: Sequence[Any], after: Sequence[Any]) -> list[float]:
    return [float(b) - float(a) for a, b in zip(before, after, strict=True)]


def test_a_difference_its_interval_and_its_p_are_those_of_the_paired_items(base: Path, tuned: Path) -> None:
    comparison = compare(read(base, "base"), read(tuned, "tuned"))
    found = {(row.task, row.protocol): row for row in comparison.tasks}
    paired = {("sst2", "rank"): differences(SST2_BASE, SST2_TUNED), ("squad", "generate"): differences(SQUAD_BASE, SQUAD_TUNED)}
    for job, values in paired.items():
        row, draws = found[job], np.random.default_rng(7).choice(values, (20_000, len(values))).mean(axis=1)
        assert row.num_items == 40 and row.tuned - row.base == row.difference
        assert row.difference == pytest.approx(100 * sum(values) / 40)
        assert row.ci95 == pytest.approx(tuple(100 * np.quantile(draws, (0.025, 0.975))), abs=1.5)
    sst2 = paired["sst2", "rank"]
    mcnemar = binomtest(sst2.count(1.0), sst2.count(1.0) + sst2.count(-1.0)).pvalue
    assert found["sst2", "rank"].p == pytest.approx(mcnemar, rel=1e-9)
    assert (found["sst2", "rank"].better, found["sst2", "rank"].worse) == (sst2.count(1.0), sst2.count(-1.0))
    assert found["sst2", "rank"].detectable == pytest.approx(100 * (stats.detectable_effect(sst2) or 0))
    assert (found["sst2", "rank"].chance, found["sst2", "rank"].majority) == (50.0, 50.0)
    assert found["copa", "rank"].p > 0.9 and found["copa", "rank"].difference == 0


def test_a_mean_takes_each_task_by_its_primary_protocol_and_all_its_items(base: Path, tuned: Path) -> None:
    data_sets, unseen_tasks = compare(read(base, "base"), read(tuned, "tuned")).means
    every = [differences(SST2_BASE, SST2_TUNED), differences(SQUAD_BASE, SQUAD_TUNED)]
    assert set(zip(data_sets.tasks, data_sets.protocols, strict=True)) == {("sst2", "rank"), ("squad", "generate")}
    assert data_sets.num_items == 80
    assert data_sets.difference == pytest.approx(100 * sum(sum(each) / 40 for each in every) / 2)
    assert data_sets.p == pytest.approx(stats.paired_p(every), abs=0.002)
    assert (unseen_tasks.tasks, unseen_tasks.difference) == (("copa",), 0)


def test_the_order_of_the_records_does_not_matter(base: Path) -> None:
    _, records = read_run(base)
    rows = compare(read(base, "base"), in_memory(base, records[::-1])).tasks
    assert len(rows) == 4 and all(row.difference == 0 and row.p == 1 for row in rows)


def test_p_is_adjusted_over_all_tasks_that_the_headline_shows_and_over_those_of_each_other_protocol(base: Path, tuned: Path) -> None:
    rows = {(row.task, row.protocol): row for row in compare(read(base, "base"), read(tuned, "tuned")).tasks}
    headline = [rows["sst2", "rank"], rows["squad", "generate"], rows["copa", "rank"]]
    assert [row.p_holm for row in headline] == pytest.approx(stats.holm([row.p for row in headline]))
    assert rows["squad", "generate"].p_holm > rows["squad", "generate"].p, "it is not the only one of its kind"
    assert len(rows) == 4 and rows["sst2", "generate"].p_holm == rows["sst2", "generate"].p, "one task alone by that protocol"


def test_runs_over_different_items_are_refused_by_the_name_of_the_task(base: Path, tmp_path: Path) -> None:
    fewer = save_run(tmp_path / "fewer", records_of(SST2_TUNED, COPA_TUNED[:-1], SQUAD_TUNED), "fewer")
    with pytest.raises(UserError, match=r"copa \(rank\): the runs hold different items \(40 and 39; 39 is in one only\)"):
        write_report([base, fewer], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_items_of_one_id_but_another_answer_are_refused(base: Path) -> None:
    _, records = read_run(base)
    other = [record | {"gold": "Maybe"} if record["task"] == "copa" and record["item_id"] == "3" else record for record in records]
    with pytest.raises(UserError, match=r"copa .*item 3"):
        compare(read(base, "base"), in_memory(base, other))


def test_runs_with_nothing_in_common_are_refused(base: Path, tmp_path: Path) -> None:
    other = save_run(tmp_path / "other", [choice_record("wic", "score", 0, 1)], "other")
    with pytest.raises(UserError, match="no task and protocol in common"):
        compare(read(base, "base"), read(other, "other"))


def test_records_that_do_not_fit_their_results_are_refused(base: Path, tmp_path: Path) -> None:
    file = base / "records.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match="39 records of squad"):
        write_report([base], tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"kind": None}, "the record has no 'kind'"),
        ({"prompt": None}, "the record has no 'prompt'"),
        ({"logprobs": None}, "the record is damaged (KeyError: 'logprobs')"),
        ({"logprobs": [[-1.0], ["x"]]}, "the record is damaged (TypeError:"),
        ({"metrics": ["f0"]}, "the record is damaged (KeyError: 'f0')"),
        ({"logprobs": [[float("nan")], [-1.0]]}, "sst2/2: its log-probabilities are no numbers"),
    ],
)
def test_a_damaged_record_is_refused_by_file_and_line(base: Path, tmp_path: Path, damage: dict[str, Any], said: str) -> None:
    lines = (base / "records.jsonl").read_text().splitlines()
    record = {**json.loads(lines[2]), **damage}
    lines[2] = json.dumps({key: value for key, value in record.items() if value is not None or key not in damage})
    (base / "records.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=re.escape(f"{base / 'records.jsonl'}, line 3: {said}")) as refused:
        write_report([base], tmp_path / "out")
    assert "\n" not in str(refused.value)


def test_results_without_what_every_run_has_are_refused(base: Path, tmp_path: Path) -> None:
    results = json.loads((base / "results.json").read_text())
    del results["model"]
    (base / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"results.json has no 'model'; evaluate again"):
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
    assert page.tags.count("svg") == 3 and not {"link", "img", "iframe", "image"} & set(page.tags)
    links = [value for name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert links and all(link.startswith("#") for link in links), "something is fetched from outside"
    assert not re.search(r"url\((?!#)|@import", text)


def test_the_html_can_be_read_without_eyes_or_mouse(base: Path, tuned: Path, tmp_path: Path) -> None:
    write_report([base, tuned], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Tags(text)
    assert page.tags.count("th") == len([name for name, _ in page.attributes if name == "scope"]) > 100
    assert page.tags.count("table") == page.tags.count("caption") == text.count('role="region"')
    assert "<caption><span></span>" not in text
    assert page.tags.count("svg") == text.count('role="img"') == len(re.findall(r'role="img" aria-label="(?:Bars|Loss) [^"]{20,}"', text))
    headings = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(headings)), "a level of headings is left out"
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 10
    pointed = {value[1:] for name, value in page.attributes if name in ("href", "xlink:href")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert pointed <= set(ids) and "content" in pointed
    assert 'lang="en"' in text and text.index('class="skip"') < text.index("<header>")


def test_the_writing_has_contrast_in_light_and_in_dark() -> None:
    source = (Path(sections.__file__).parent / "report.html.jinja").read_text()
    themes = re.findall(r":root \{(.*?)\}", source, re.DOTALL)
    assert len(themes) == 2

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    def contrast(first: str, second: str) -> float:
        light, dark = sorted((luminance(first), luminance(second)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for theme in themes:
        colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", theme))
        grounds = [colours[name] for name in ("ground", "card", "note", "pre")]
        assert min(contrast(colours[name], ground) for name in ("ink",) for ground in grounds) >= 7
        assert min(contrast(colours[name], ground) for name in ("soft", "accent") for ground in grounds[:2]) >= 4.5
        assert min(contrast(colours[name], colours["card"]) for name in ("bar", "majority", "blue", "brown")) >= 3


def test_the_markdown_keeps_a_models_text_out_of_its_tables_and_tags(base: Path, tuned: Path, tmp_path: Path) -> None:
    write_report([base, tuned], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "a\\|b \\`c\\`" in text and "<script" not in text and "<img" not in text
    blocks = [[line for line in block.splitlines() if line.startswith("|")] for block in text.split("\n\n")]
    for rows in filter(None, blocks):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1, rows
    assert text.count("<details>") == text.count("</details>") > 12


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
    assert "| squad | 29.4 EM 11.5 | 85.9 EM 77.6 | – | – |" in text and "DAMO-NLP-SG/MT-LLaMA" in text
    assert "Not comparable: our columns are on the embedded sampler data" in text


def test_t0s_one_figure_of_anli_stands_beside_each_round_and_is_called_that(tmp_path: Path) -> None:
    records = [choice_record(f"anli_r{number}", "score", i, i % 2) for number in (1, 3) for i in range(4)]
    write_report([save_run(tmp_path / "run", records, "Pico", suite="t0")], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    shown = text[text.index("## Beside the published T0") :]
    for number in (1, 3):
        assert f"| anli\\_r{number} | 33.4 | 41.0 |" in shown
        assert f"About ANLI, round {number}: the published figure is one for all three rounds" in shown
    assert "round 2" not in shown


def test_real_data_carries_no_sampler_warning_and_unlike_settings_are_named(tmp_path: Path) -> None:
    records = records_of(SST2_BASE, COPA_BASE, SQUAD_BASE)
    base = save_run(tmp_path / "base", records, "Pico", suite="mt-llama", missing={"rte": "rte: no file for the split validation"})
    plain = save_run(
        tmp_path / "plain", records, "Pico", suite="mt-llama", format="plain", dtype="bfloat16", versions={"mtllama": "0", "torch": "2"}
    )
    write_report([base, plain], tmp_path / "out")
    notes = json.loads((tmp_path / "out" / "comparison.json").read_text())["notes"]
    assert (
        'The runs differ in format: base "mtllama"; tuned "plain".' in notes
        and 'The runs differ in dtype: base "float32"; tuned "bfloat16".' in notes
    )
    assert 'The runs differ in versions, torch: base null; tuned "2".' in notes and not any("versions, mtllama" in note for note in notes)
    assert "Missing in base: rte: no file for the split validation." in notes and "All runs measured the same weights." in notes
    assert "sampler" not in (tmp_path / "out" / "report.md").read_text()


def test_a_protocol_that_one_run_lacks_is_left_out_and_said(base: Path, tmp_path: Path) -> None:
    records = [
        record for record in records_of(SST2_TUNED, COPA_TUNED, SQUAD_TUNED) if (record["task"], record["kind"]) != ("sst2", "score")
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
        "differing.jsonl",
        *(f"figures/{name}.{kind}" for name in ("results", "families", "generated") for kind in ("png", "svg")),
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
        {"step": 3, "loss": None, "targets": 30, "families": {}},  # found nothing to train on
        {"step": 4, "loss": None, "targets": 45, "families": {"NLI": {"loss": None, "targets": 15}}},  # its loss was no number
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert tmp_path / "out/figures/loss-tuned.png" in write_report([base, tuned], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| all | 30 | 3.000 | 2.000 |" in text and "| Topic | 20 | 2.000 | 2.000 |" in text
    assert "| NLI |" not in text
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


def of_sets(right: str, task: str = "cb", *, ways: Sequence[str] = ("score",)) -> list[dict[str, Any]]:
    """A task that has a metric of its whole set; what is not right is called No."""
    records = []
    for i, c in enumerate(right):
        gold = i % 2
        picked = gold if int(c) else 0
        for kind in ways:
            record = choice_record(task, kind, i, int(picked == gold), prediction="neither")
            records.append(record | {"metrics": ["accuracy", "macro-f1"]})
    return records


def test_metrics_of_whole_sets_are_compared_in_the_report_and_its_numbers(tmp_path: Path) -> None:
    before, after = "1010" * 10, "1011" * 10
    others = records_of(SST2_BASE, COPA_BASE, SQUAD_BASE)
    kinds = ("score", "generate")
    base = save_run(tmp_path / "base", [*of_sets(before, ways=kinds), *of_sets(before, "rte"), *others], "Pico")
    tuned = save_run(tmp_path / "tuned", [*of_sets(after, ways=kinds), *of_sets(before, "rte"), *others], "Tuned")
    write_report([base, tuned], tmp_path / "out")
    (comparison,) = json.loads((tmp_path / "out" / "comparison.json").read_text())["comparisons"]
    rows = {(row["task"], row["protocol"]): row for row in comparison["sets"]}
    assert set(rows) == {("cb", "rank"), ("cb", "generate"), ("rte", "rank")} and len(comparison["tasks"]) == 7
    cb = rows["cb", "rank"]
    assert (cb["metric"], cb["num_items"], cb["role"]) == ("macro-f1", 40, "unseen task")
    assert cb["base"] == pytest.approx(100 / 3)  # always No: F1 of No 2/3, of Yes 0
    assert cb["tuned"] == pytest.approx(100 * (4 / 5 + 2 / 3) / 2)  # 20 and 10 right of 20 each
    assert cb["difference"] == cb["tuned"] - cb["base"] and cb["ci95"][0] < cb["difference"] < cb["ci95"][1]
    assert cb["p"] == pytest.approx(1 / 1001, abs=0.004) and cb["p_holm"] == pytest.approx(2 * cb["p"])
    assert (rows["rte", "rank"]["difference"], rows["rte", "rank"]["p"]) == (0, 1.0)
    assert rows["cb", "generate"]["p_holm"] == rows["cb", "generate"]["p"], "one task alone has nothing to be adjusted for"
    markdown, page = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    shown = markdown[markdown.index("**Metrics of whole sets**") :]
    assert re.search(r"\| cb \| rank \| macro-f1 \| 40 \| 33\.3 \| 73\.3 \| \*\*\+40\.0\*\* \[\+\d.*?\] \| [<0].*? Holm ", shown)
    assert re.search(r"\| rte \| rank \| macro-f1 \| 40 \| 33\.3 \| 33\.3 \| \+0\.0 \[\+0\.0, \+0\.0\] \| 1\.000 Holm 1\.000 \|", shown)
    assert markdown.count("**Metrics of whole sets**") == page.count("<span>Metrics of whole sets<") == 2  # and under the other protocols
    assert "| cb | generate | macro-f1 | 40 |" in markdown[markdown.index("Runs compared under the other protocols") :]
    assert "Macro-F1 and BLEU are of a whole set" in markdown and "Macro-F1 and BLEU are of a whole set" in page
    line = next(
        line for line in table([read_run(base)[0], read_run(tuned)[0]]).splitlines() if line.startswith("cb  ") and " rank " in line
    )
    assert re.search(r"50\.0 \[.*?\] macro-f1 33\.3 \[.*?\] +75\.0 \[.*?\] macro-f1 73\.3 \[.*?\]$", line)


def test_a_report_shows_that_one_answer_is_given_everywhere(tmp_path: Path) -> None:
    """The base says No to everything; the other run is always right."""
    own = [
        choice_record("copa", "score", i, 1) | {"choices": [f"a{i}", f"long {i}"], "gold": [f"a{i}", f"long {i}"][i % 2]} for i in range(10)
    ]
    runs = [
        save_run(tmp_path / name, [*(choice_record("sst2", "score", i, int(c)) for i, c in enumerate(right)), *own], "Pico")
        for name, right in (("base", "10" * 20), ("tuned", "11" * 20))
    ]
    write_report(runs, tmp_path / "out")
    text, page = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    shown = text[text.index("## Answers given") :]
    assert "| sst2 | base | 50.0 / 50.0 No / Yes | 100.0 / 0.0 No / Yes | 50.0 | 50.0 | 50.0 | 50.0 |" in shown
    assert "| sst2 | tuned | 50.0 / 50.0 No / Yes | 50.0 / 50.0 No / Yes | 100.0 | 100.0 | 100.0 | 100.0 |" in shown
    assert "| copa | base | 50.0 / 50.0 option 1 / option 2 | 50.0 / 50.0 option 1 / option 2 | 50.0 | 50.0 | 100.0 | 100.0 |" in shown
    assert "Places and lengths" in page and "batch calibration" in page


def test_a_report_without_metrics_of_whole_sets_does_not_speak_of_them(base: Path, tuned: Path, tmp_path: Path) -> None:
    write_report([base, tuned], tmp_path / "out")
    assert "whole set" not in (tmp_path / "out" / "report.md").read_text()
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["comparisons"][0]["sets"] == []


def test_metrics_of_whole_sets_are_compared_run_by_run(tmp_path: Path) -> None:
    folders = [save_run(tmp_path / right[:4], of_sets(right), "Pico") for right in ("1010" * 10, "1011" * 10, "1111" * 10)]
    write_report(folders, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"\*\*Metrics of whole sets, run 2\*\*\n\n.*\n.*\n\| cb \| rank \| macro-f1 \| 40 \| 33\.3 \| 73\.3 \|", text)
    assert re.search(r"\*\*Metrics of whole sets, run 3\*\*\n\n.*\n.*\n\| cb \| rank \| macro-f1 \| 40 \| 33\.3 \| 100\.0 \|", text)


RANKED, MEANED = "1101" * 5, "1011" * 5
"""Right answers of two protocols: of every four items they agree on the first and the last."""


@pytest.fixture
def both_ways(tmp_path: Path) -> Path:
    meaned = MEANED[:16] + "0000"
    records = [choice_record("sst2", "score", i, int(c), mean_right=int(m)) for i, (c, m) in enumerate(zip(RANKED, meaned, strict=True))]
    return save_run(tmp_path / "both", records, "Pico", ways=("rank", "rank-mean"))


def test_the_agreement_of_two_protocols_is_counted_by_what_they_chose(both_ways: Path) -> None:
    (pair,) = agreements(read(both_ways, "model"))
    assert (pair.task, pair.first, pair.second, pair.num_items) == ("sst2", "rank", "rank-mean", 20)
    # 2 of every 4 for the first 16 items; of the last four, rank is right on 1, 2 and 4 and so agrees on the third only.
    assert pair.agreement == pytest.approx(100 * 9 / 20)
    assert (pair.better, pair.worse) == (4, 7) and pair.p == pytest.approx(binomtest(4, 11).pvalue)
    assert (pair.before, pair.after) == (75.0, 60.0) and pair.difference == pytest.approx(-15.0)
    assert (pair.chance, pair.majority) == (50.0, 50.0)


def test_the_items_on_which_protocols_differ_are_all_listed(both_ways: Path, tmp_path: Path) -> None:
    odd = differing(read(both_ways, "model"), "sst2")
    assert [int(key[0]) for key, _ in odd] == [1, 2, 5, 6, 9, 10, 13, 14, 16, 17, 19]
    write_report([both_ways], tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "differing.jsonl").read_text().splitlines()]
    assert [int(line["item_id"]) for line in lines] == [int(key[0]) for key, _ in odd]
    first = lines[0]
    assert first["answers"] == {"rank": "Yes", "rank-mean": "No"} and first["right"] == ["rank"] and first["right_answer"] == "Yes"
    text = (tmp_path / "out" / "report.md").read_text()
    assert "sst2, model: the protocols differ on 11 of 20 items" in text and "| Item 1 | Yes | **✓ Yes** | No |" in text
    assert re.search(r"\| rank \| – \| 45\.0 \|", text), "the matrix of agreement"


def test_a_report_of_one_protocol_says_nothing_of_agreement(tmp_path: Path) -> None:
    records = [choice_record("sst2", "score", i, int(c)) for i, c in enumerate(RANKED)]
    run = save_run(tmp_path / "one", records, "Pico")
    write_report([run], tmp_path / "out")
    assert "## Protocols" not in (tmp_path / "out" / "report.md").read_text() and not (tmp_path / "out" / "differing.jsonl").exists()


def many_templates(right: str, num: int) -> list[dict[str, Any]]:
    return [choice_record("copa", "score", i, int(c), template=f"t{t}") for i, c in enumerate(right) for t in range(num)]


def test_templates_that_repeat_the_answers_change_neither_p_nor_interval(tmp_path: Path) -> None:
    rows = []
    for num in (1, 6):
        before = save_run(tmp_path / f"before{num}", many_templates(SST2_BASE, num), "before")
        after = save_run(tmp_path / f"after{num}", many_templates(SST2_TUNED, num), "after")
        rows += compare(read(before, "base"), read(after, "tuned")).tasks
    assert rows[0] == rows[1] and rows[0].num_items == 40 and rows[0].p == pytest.approx(2 / 2**16)  # 16 better, none worse


def test_a_difference_is_that_of_the_values_shown_where_a_template_asks_some_items_only(tmp_path: Path) -> None:
    def some(right: int) -> list[dict[str, Any]]:
        return [
            *(choice_record("copa", "score", i, 1, template="all") for i in range(40)),
            *(choice_record("copa", "score", i, right, template="few") for i in range(8)),
        ]

    before, after = (read(save_run(tmp_path / name, some(right), name), name) for name, right in (("base", 0), ("tuned", 1)))
    comparison = compare(before, after)
    (row,), (mean,) = comparison.tasks, comparison.means
    assert [run.results["tasks"]["copa"]["rank"]["value"] for run in (before, after)] == [50.0, 100.0]
    assert (row.base, row.tuned, row.difference) == (mean.base, mean.tuned, mean.difference) == pytest.approx((50.0, 100.0, 50.0))
    assert row.ci95 == mean.ci95 == pytest.approx((50.0, 50.0)) and (row.better, row.worse) == (8, 0)
    assert row.p == pytest.approx(binomtest(0, 8).pvalue, abs=0.003)


def test_two_protocols_are_compared_over_the_templates_that_both_judge(tmp_path: Path) -> None:
    yes: dict[str, Any] = {"choices": ["Yes", "No"], "gold": "Yes", "gold_index": 0, "references": ["Yes"]}
    right: dict[str, dict[str, Any]] = {"score": {"logprobs": [[-1.0], [-2.0]]}, "generate": {"text": "Yes"}}
    more: dict[str, Any] = {"choices": ["No", "Yes", "Perhaps", "Never"], "logprobs": [[-3.0], [-3.0], [-1.0], [-3.0]]}
    records = [
        record
        for i in range(20)
        for record in (
            *(choice_record("rte", kind, i, 1, template="mt-llama") | yes | said for kind, said in right.items()),
            *(choice_record("rte", "score", i, 0, template=name) | more for name in ("x1", "x2", "x3")),
        )
    ]
    run = read(save_run(tmp_path / "run", records, "Pico", ways=("rank", "mt-llama")), "model")
    assert run.results["tasks"]["rte"]["rank"]["value"] == 25.0 and run.results["tasks"]["rte"]["rank"]["chance"] == 31.25
    (pair,) = agreements(run)
    assert (pair.first, pair.second, pair.num_items) == ("rank", "mt-llama", 20)
    assert (pair.agreement, pair.before, pair.after, pair.difference, pair.p) == (100.0, 100.0, 100.0, 0.0, 1.0)
    assert (pair.chance, pair.majority) == (50.0, 100.0)


def test_the_spread_over_templates_is_a_table_and_a_figure(tmp_path: Path) -> None:
    records = [choice_record("copa", "score", i, int(i < 4 * t), template=f"t{t}") for t in (1, 2, 4) for i in range(20)]
    run = save_run(tmp_path / "run", records, "Pico")
    assert tmp_path / "out/figures/templates.svg" in write_report([run], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert re.search(
        r"\| copa \| model \| 3 \| 50\.0 \| 50\.0 \| 46\.7 \[.*?\] \| 40\.0 \| 30\.0 \| 60\.0 \| 20\.0 \| 80\.0 \| 60\.0 \|", text
    )
    assert re.search(r"\| t4 \| 80\.0 \[", text) and "Item 0, template t1" in text


def test_values_with_and_without_items_of_the_training_data_stand_side_by_side(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", records_of(SST2_BASE, COPA_BASE, SQUAD_BASE), "Pico", contamination={"recipe": "recipes/mine.yaml"})
    results = json.loads((run / "results.json").read_text())
    parts = {"found": {"value": 60.0, "ci95": [14.7, 94.7], "n": 5}, "clean": {"value": 37.1, "ci95": [21.5, 55.1], "n": 35}}
    results["tasks"]["sst2"]["rank"]["contamination"] = parts
    results["tasks"]["copa"]["rank"]["contamination"] = {"found": None, "clean": {"value": 50.0, "ci95": [33.8, 66.2], "n": 40}}
    (run / "results.json").write_text(json.dumps(results))
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Recipes: model: recipes/mine.yaml." in text
    line = next(line for line in text.splitlines() if line.startswith("| sst2 | rank | 40 | 5 12.5%"))
    assert "| 37.1 [21.5, 55.1] | 60.0 [14.7, 94.7] | −2.9 |" in line
    assert re.search(r"\| copa \| rank \| 40 \| 0 0\.0% \|.*\| – \| \+0\.0 \|", text)


def test_the_published_sst2_figure_that_no_count_reaches_is_remarked(base: Path, tmp_path: Path) -> None:
    write_report([base], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    remark = "92.6 is no k/872 (807 right are 92.5, 808 right are 92.7)"
    assert f"About SST-2: {remark}, so it is not of validation. It fits the 1,821 items of test." in text
    assert f"| sst2 | validation | 872 | 50.5 is 440 of 872; {remark} |" in text
    assert "92.6 is 1,686 to 1,687 of 1,821" in text and text.count("is no k/") == 2


def test_families_are_means_over_their_tasks(tmp_path: Path) -> None:
    records = [
        choice_record(task, "score", i, int(c)) for task, right in (("rte", "1110" * 5), ("cb", "1000" * 5)) for i, c in enumerate(right)
    ]
    run = save_run(tmp_path / "run", [*records, *(choice_record("copa", "score", i, 1) for i in range(20))], "Pico")
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"\| Natural language inference \| 2 \| rte, cb \| 50\.0 \| 50\.0 \[3\d\.\d, 6\d\.\d\] \|", text)


def test_twenty_items_a_task_are_shown_with_the_share_of_every_choice(tmp_path: Path) -> None:
    run = save_run(tmp_path / "run", [choice_record("sst2", "score", i, int(i % 3 > 0)) for i in range(50)], "Pico")
    write_report([run], tmp_path / "out")
    text, page = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert len(re.findall(r"<summary>Item \d+: (?:right|wrong)</summary>", text)) == 20
    assert len(re.findall(r"<summary>Item \d+: right</summary>", text)) == 10
    # exp(-1) against exp(-2): 73 and 27 in a hundred.
    assert len(re.findall(r"\*\*−1\.00\*\* 73%", text)) == len(re.findall(r"−2\.00 27%", text)) == 20
    assert page.count('style="--share: 73.1%"') == page.count('style="--share: 26.9%"') == 20


def test_a_figure_keeps_names_as_text_and_takes_the_colours_of_its_page() -> None:
    row = Bars("task", ((50.0, 40.0, 60.0), None), 25.0, 30.0)
    drawing = draw_bars([("Group", [row])], ["<script>x</script> & $tuned$", "other"], "percent")
    assert drawing.png.startswith(b"\x89PNG") and drawing.svg.startswith("<svg")
    assert "<script" not in drawing.svg and "&lt;script&gt;x&lt;/script&gt; &amp; $tuned$" in drawing.svg
    assert "var(--ink, #1c2733)" in drawing.svg and "<style" not in drawing.svg
    assert draw_bars([("Group", [row])], ["a", "b"], "percent") == draw_bars([("Group", [row])], ["a", "b"], "percent")
