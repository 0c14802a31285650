"""The embedded data keeps what its card promises: `pytest tests/data/test_sampler.py`."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mtllama.tasks.catalog import Rows, Task, catalog, load_rows, sampler_dir
from mtllama.tasks.source import Row

FAMILIES = {
    "Closed-book QA",
    "Extractive QA",
    "Multi-choice QA",
    "Paraphrase",
    "Sentiment",
    "Structure-to-text",
    "Summarization",
    "Topic",
}
HELD_OUT = {"copa", "mnli", "openbookqa", "rte", "squad", "sst2", "wic", "winogrande"}
LABELS = ("label", "coarse_label", "answerKey", "answer")
NOT_TEXT = {"id", "context_id", "label", "answerKey"}
"""Keys whose strings nobody wrote: ids, option letters."""


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            if key not in NOT_TEXT:
                yield from texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts(part)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def grams(row: Row, n: int) -> list[str]:
    """Runs of n words inside one string each: a run across two columns was never written."""
    return [" ".join(run[i : i + n]) for run in map(words, texts(row)) for i in range(len(run) - n + 1)]


def sentences(row: Row) -> set[str]:
    """Sentences of four words or more; shorter ones ("Who did it?") may well be written twice."""
    found = (words(sentence) for text in texts(row) for sentence in re.split(r"(?<=[.!?])\s+", text))
    return {" ".join(sentence) for sentence in found if len(sentence) >= 4}


def distinct_share(rows: Iterable[Row]) -> float:
    every = [gram for row in rows for gram in grams(row, 4)]
    return len(set(every)) / len(every)


def repeated_runs(rows: list[Row]) -> set[str]:
    """Six-word runs in more than 2% of the rows, and in two rows at least."""
    counts = Counter(gram for row in rows for gram in set(grams(row, 6)))
    return {gram for gram, count in counts.items() if count > max(1, 0.02 * len(rows))}


def leaks(held_out: Iterable[Row], training: Iterable[Row]) -> set[str]:
    def marks(rows: Iterable[Row]) -> set[str]:
        return {mark for row in rows for mark in (*grams(row, 8), *sentences(row))}

    return marks(held_out) & marks(training)


def label_counts(rows: list[Row]) -> Counter[Any] | None:
    """How often each label or answer position occurs; None where the answer is free text."""
    for column in LABELS:
        if column in rows[0]:
            return Counter(row[column] for row in rows)
    return None


def path_of(rows: Rows) -> Path:
    return Path(rows.origin).relative_to(sampler_dir())


@pytest.fixture(scope="module")
def files() -> list[Rows]:
    """Every file of the sampler, found the way training and evaluation find it."""
    found = []
    for task in catalog().values():
        if (sampler_dir() / task.name).is_dir() or task.name in HELD_OUT:
            splits = ("train", "validation") if task.role == "train" else (task.split,)
            found += [load_rows(task, sampler_dir(), split) for split in splits]
    return found


@pytest.fixture(scope="module")
def training(files: list[Rows]) -> list[Rows]:
    return [part for part in files if part.task.role == "train"]


@pytest.fixture(scope="module")
def held_out(files: list[Rows]) -> list[Rows]:
    return [part for part in files if part.task.role != "train"]


def test_the_catalogue_finds_every_file_of_the_sampler(files: list[Rows]) -> None:
    stored = {path.relative_to(sampler_dir()) for path in sampler_dir().rglob("*.jsonl")}
    assert {path_of(part) for part in files} == stored
    assert len(files) == len(stored) == 36


def test_there_are_a_thousand_training_rows_and_a_hundred_of_each_of_eight_families(training: list[Rows]) -> None:
    per_family: Counter[str] = Counter()
    for part in training:
        if part.split == "train":
            per_family[part.task.family] += len(part.rows)
    assert set(per_family) == FAMILIES
    assert min(per_family.values()) >= 100
    assert per_family.total() >= 1000


def test_each_of_the_eight_held_out_sets_has_eighty_rows(held_out: list[Rows]) -> None:
    assert {part.task.name: len(part.rows) for part in held_out} == dict.fromkeys(HELD_OUT, 80)


def test_labels_and_answer_positions_are_balanced_in_every_file(files: list[Rows]) -> None:
    counted = {part.origin: counts for part in files if (counts := label_counts(part.rows))}
    assert len(counted) == 7 * 2 + 7
    for origin, counts in counted.items():
        assert len(counts) >= 2, origin
        assert max(counts.values()) - min(counts.values()) <= 1, (origin, counts)


def test_extractive_answers_stand_at_their_offsets_and_all_over_the_passage(files: list[Rows]) -> None:
    quarters: dict[str, Counter[int]] = defaultdict(Counter)
    for part in files:
        if part.task.family != "Extractive QA":
            continue
        for row in part.rows:
            answers = row["answers"]
            assert len(answers["text"]) == len(answers["answer_start"]) > 0, row["id"]
            for text, start in zip(answers["text"], answers["answer_start"], strict=True):
                assert row["context"][start : start + len(text)] == text, row["id"]
            quarters[part.task.name][4 * answers["answer_start"][0] // len(row["context"])] += 1
    assert {name: counts.total() for name, counts in quarters.items()} == {"adversarial_qa_dbert": 180, "quoref": 110, "squad": 80}
    for name, counts in quarters.items():
        assert min(counts[quarter] for quarter in range(4)) >= 0.15 * counts.total(), (name, counts)


def test_wic_words_stand_at_their_offsets(held_out: list[Rows]) -> None:
    rows = next(part.rows for part in held_out if part.task.name == "wic")
    for row in rows:
        for n in ("1", "2"):
            sentence, start, end = row[f"sentence{n}"], row[f"start{n}"], row[f"end{n}"]
            assert re.search(rf"\b{sentence[start:end]}\b", sentence), row
            assert sentence[start] in (row["word"][0], row["word"][0].upper()), row
    assert len({row["word"] for row in rows}) == 80


def test_three_quarters_of_the_four_word_runs_of_every_file_are_distinct(files: list[Rows]) -> None:
    shares = {part.origin: distinct_share(part.rows) for part in files}
    assert len(shares) == 36
    assert min(shares.values()) >= 0.75, shares


def test_no_six_word_run_stands_in_more_than_two_percent_of_the_rows_of_a_file(files: list[Rows]) -> None:
    assert sum(len(grams(row, 6)) for part in files for row in part.rows) > 50_000
    assert {part.origin: runs for part in files if (runs := repeated_runs(part.rows))} == {}


def test_no_held_out_row_shares_a_sentence_or_eight_words_with_a_training_row(training: list[Rows], held_out: list[Rows]) -> None:
    seen = [row for part in training for row in part.rows]
    unseen = [row for part in held_out for row in part.rows]
    assert len(seen) > 1000 and len(unseen) == 640
    assert leaks(unseen, seen) == set()


def test_every_row_renders_with_every_prompt_of_its_catalogue_entry(files: list[Rows]) -> None:
    rendered: Counter[str] = Counter()
    for part in files:
        for index in range(len(part.rows)):
            examples = [part.render(index, template) for template in part.task.prompts]
            assert any(examples), f"{part.origin}, row {index}: every prompt declines it"
            rendered[part.origin] += sum(example is not None for example in examples)
    assert len(rendered) == 36
    assert rendered.total() > sum(len(part.rows) for part in files)


def test_the_card_counts_what_the_files_hold(files: list[Rows]) -> None:
    def numbers(task: Task) -> tuple[str, ...]:
        parts = [part for part in files if part.task.name == task.name]
        rows = [row for part in parts for row in part.rows]
        num = {("train" if part.split == "train" else "validation"): len(part.rows) for part in parts}
        num_words = sum(len(words(text)) for row in rows for text in texts(row))
        share = f"{distinct_share(rows):.3f}"
        return (task.family, str(num.get("train", "-")), str(num["validation"]), f"{num_words:,}", share)

    card = (sampler_dir() / "README.md").read_text(encoding="utf-8")
    table = {}
    for line in re.findall(r"^\| `.*$", card, re.MULTILINE):
        name, *cells = (cell.strip(" `") for cell in line.strip("|").split("|"))
        table[name] = tuple(cells)
    tasks = {part.task.name: part.task for part in files}
    assert len(table) == 22
    assert table == {name: numbers(task) for name, task in tasks.items()}
    total = re.search(r"([\d,]+) training rows, ([\d,]+) validation rows .* ([\d,]+) held-out rows", card)
    assert total, "the card states its totals"
    counted: Counter[str] = Counter()
    for part in files:
        counted[part.split if part.task.role == "train" else "held out"] += len(part.rows)
    stated = [int(number.replace(",", "")) for number in total.groups()]
    assert stated == [counted["train"], counted["validation"], counted["held out"]]


def test_the_leak_check_finds_an_eight_word_run_and_a_short_sentence() -> None:
    seen = [{"text": "Nobody knew why the old grey heron stood there. It was late."}, {"text": "Rain fell on Lima."}]
    copied_run = {"premise": "They asked why the old grey heron stood there."}
    longer_run = {"premise": "I knew why the old grey heron stood there too."}
    copied_sentence = {"choices": {"text": ["rain fell on LIMA!"], "label": ["A"]}}
    assert leaks([longer_run], seen) == {"knew why the old grey heron stood there"}
    assert leaks([copied_sentence], seen) == {"rain fell on lima"}
    assert leaks([copied_run, {"text": "It was late."}], seen) == set()


def test_the_repetition_checks_find_a_recurring_six_word_run() -> None:
    filler = [{"text": " ".join(f"w{row}x{i}" for i in range(9))} for row in range(98)]
    bad = {"text": "I would buy this again at once"}
    assert repeated_runs([*filler, bad]) == set()
    assert repeated_runs([*filler, bad, bad]) == set()
    assert "i would buy this again at" in repeated_runs([*filler, bad, bad, bad])
    assert "i would buy this again at" in repeated_runs([bad, bad])
    assert distinct_share(filler) == 1.0
    assert distinct_share([bad, bad]) == 0.5


def test_labels_are_counted_only_where_a_column_holds_one() -> None:
    assert label_counts([{"label": 1}, {"label": 1}, {"label": 0}]) == {1: 2, 0: 1}
    assert label_counts([{"summary": "No label here."}]) is None
    assert list(texts(json.loads('{"id": "a-1", "choices": {"label": ["A"], "text": ["ham"]}, "label": 1}'))) == ["ham"]
