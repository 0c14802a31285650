"""Question answering sets with columns of an awkward shape: each prompt asks what its row asks and answers as it answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtllama.errors import UserError
from mtllama.tasks.catalog import catalog, find_tasks, load_rows
from mtllama.tasks.source import Row
from mtllama.tasks.template import Example

Load = Callable[..., list[list[Example]]]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Examples of `rows`, a list of one per prompt for each row; `folder` is the place of their file."""

    def examples(name: str, *rows: Row, folder: str | None = None, split: str = "train") -> list[list[Example]]:
        file = tmp_path / (folder or name) / f"{split}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (task,) = find_tasks([name])
        loaded = load_rows(task, tmp_path, split)
        found = [[loaded.render(index, prompt) for prompt in task.prompts] for index in range(len(loaded.rows))]
        return [[example for example in row if example is not None] for row in found]

    return examples


def answers(examples: list[Example]) -> set[str]:
    """What the prompts of one row are answered by, letters taken back to the options that they stand for."""
    options = next(example.choices for example in examples if example.choices and example.choices[0] != "A")
    letters = tuple("ABCDEFGH"[: len(options)])
    return {options[letters.index(e.targets)] if e.choices == letters else e.targets for e in examples}


def quarel(answer_index: int, question: str, world1: str, world2: str) -> Row:
    return {
        "id": "QuaRel_0",
        "answer_index": answer_index,
        "logical_forms": ["(infer (speed higher world1) (friction higher world1) (friction lower world1))"],
        "logical_form_pretty": "qrel(speed, higher, world1) -> qrel(friction, lower, world1)",
        "world_literals": {"world1": [world1], "world2": [world2]},
        "question": question,
    }


def test_quarel_is_answered_by_the_option_of_its_question_not_by_the_world_of_that_number(load: Load) -> None:
    crossed = quarel(
        0, "A crate slides far on wet tiles and stops soon on gravel. Rougher: (A) gravel (B) wet tiles", "wet tiles", "gravel"
    )
    other = quarel(1, "A crate slides far on wet tiles, not on gravel. The tiles have (A) more grip (B) less grip", "wet tiles", "gravel")
    first, second = load("quarel", crossed, other)
    assert len(first) == len(second) == len(catalog()["quarel"].prompts) >= 3
    assert answers(first) == {"gravel"}
    assert answers(second) == {"less grip"}
    for example in (*first, *second):
        assert all(option in example.inputs for option in (("gravel", "wet tiles") if example in first else ("more grip", "less grip")))


def test_a_quarel_question_without_its_options_is_an_error_with_its_row(load: Load) -> None:
    with pytest.raises(UserError, match="row 0"):
        load("quarel", quarel(0, "Which of the two is rougher?", "tiles", "gravel"))


WIKI_HOP: dict[str, Any] = {
    "id": "WH_train_0",
    "answer": "republic of lund",
    "candidates": ["lund", "republic of lund", "vesterby, north"],
    "supports": ["Ada Holm was born in Vesterby.", "Vesterby is a town in the Republic of Lund. "],
}


@pytest.mark.parametrize("column", ["question", "query"])
@pytest.mark.parametrize("folder", ["wiki_hop_original", "wiki_hop/original", "wiki_hop", "qangaroo/wikihop"])
def test_wiki_hop_asks_for_the_relation_of_its_subject_under_either_name_of_the_column(load: Load, column: str, folder: str) -> None:
    (examples,) = load("wiki_hop_original", WIKI_HOP | {column: "country_of_citizenship ada  holm"}, folder=folder)
    assert len(examples) >= 3
    for example in examples:
        assert example.targets == "republic of lund"
        assert example.choices == tuple(WIKI_HOP["candidates"])
        for part in ("country of citizenship", "ada  holm", "was born in Vesterby", "Republic of Lund", *WIKI_HOP["candidates"]):
            assert part in example.inputs
        assert "country_of_citizenship" not in example.inputs


def test_wiki_hop_without_a_question_names_the_missing_column(load: Load) -> None:
    with pytest.raises(UserError, match="'question' is missing"):
        load("wiki_hop_original", WIKI_HOP)


@pytest.mark.parametrize(("label", "answer"), [("more", "more"), ("less", "less"), ("no_effect", "no effect")])
def test_wiqa_answers_in_words_and_lists_the_steps_without_the_empty_last_one(load: Load, label: str, answer: str) -> None:
    row: Row = {
        "question_stem": "suppose the kettle is bigger happens, how will it affect MORE tea.",
        "question_para_step": ["Water is poured in", "The water boils", "Tea is made", ""],
        "answer_label": label,
        "answer_label_as_choice": {"more": "A", "less": "B", "no_effect": "C"}[label],
        "choices": {"text": ["more", "less", "no effect"], "label": ["A", "B", "C"]},
        "metadata_question_type": "INPARA_EFFECT",
    }
    (examples,) = load("wiqa", row)
    assert len(examples) >= 3
    assert answers(examples) == {answer}
    for example in examples:
        assert "the kettle is bigger" in example.inputs and "Tea is made" in example.inputs
        assert "-\n" not in example.inputs and "- \n" not in example.inputs


def test_commonsense_qa_is_read_in_its_own_columns_and_in_those_of_cos_e(load: Load) -> None:
    texts = ["attic", "river", "shop", "cloud", "drawer"]
    common: Row = {"id": "0", "question": "Where is bread bought?", "question_concept": "bread"}
    own = common | {"choices": {"label": list("ABCDE"), "text": texts}, "answerKey": "C"}
    cos_e = common | {"choices": texts, "answer": "shop", "abstractive_explanation": "It sells.", "extractive_explanation": "bread"}
    (first,) = load("cos_e_v1.11", own, folder="commonsense_qa")
    (second,) = load("cos_e_v1.11", cos_e, folder="cos_e/v1.11", split="validation")
    assert answers(first) == {"shop"}
    assert first == second and len(first) >= 3


def test_a_hidden_answer_is_no_answer(load: Load) -> None:
    letters = {"label": list("ABCDEFGH"), "text": list("stuvwxyz")}
    span = {"id": "0", "context": "A text.", "question": "What?", "answers": {"text": [], "answer_start": []}}
    hidden: dict[str, Row] = {
        "cos_e_v1.11": {"question": "Where?", "choices": {"label": list("ABCDE"), "text": list("vwxyz")}, "answerKey": ""},
        "cosmos_qa": {"context": "A text.", "question": "Why?", "label": -1} | {f"answer{i}": f"because {i}" for i in range(4)},
        "qasc": {"question": "What?", "choices": letters, "answerKey": "", "fact1": "", "fact2": ""},
        "adversarial_qa_dbert": span,
        "ropes": {"background": "A rule.", "situation": "A case.", "question": "What?", "answers": {"text": []}},
        "kilt_tasks_hotpotqa": {"id": "0", "input": "Who?", "output": []},
    }
    for name, row in hidden.items():
        assert load(name, row, split="test") == [[]], name


def test_a_plot_that_does_not_say_is_answered_so(load: Load) -> None:
    film: Row = {"plot_id": "1", "plot": "A dog finds a hat.", "title": "Hat", "question_id": "x", "question": "Who finds it?"}
    told, untold = load("duorc_SelfRC", film | {"answers": ["A dog", "the dog"]}, film | {"answers": [], "no_answer": True})
    assert {example.targets for example in told} == {"A dog"}
    assert {example.targets for example in untold} == {"no answer"}
    assert all("no answer" in example.inputs for example in untold) and len(untold) >= 3


@pytest.mark.parametrize("label", ["2", 2, "2\n"])
def test_social_i_qa_counts_its_label_from_one(load: Load, label: str | int) -> None:
    row: Row = {"context": "Ann fell.", "question": "What next?", "answerA": "sing", "answerB": "get up", "answerC": "eat", "label": label}
    (examples,) = load("social_i_qa", row)
    assert answers(examples) == {"get up"} and len(examples) >= 3


@pytest.mark.parametrize(
    ("names", "column", "folder"),
    [
        (("adversarial_qa_dbidaf", "adversarial_qa_dbert", "adversarial_qa_droberta"), "id", "adversarial_qa"),
        (("duorc_SelfRC", "duorc_ParaphraseRC"), "question_id", "duorc"),
    ],
)
def test_the_sub_sets_share_one_real_file_without_a_row_in_common(
    names: tuple[str, ...], column: str, folder: str, shared_data: Path
) -> None:
    with open(shared_data / "train" / folder / "train.jsonl", encoding="utf-8") as lines:
        every = [json.loads(line)[column] for line in lines]
    parts = [[row[column] for row in load_rows(task, shared_data / "train", "train").rows] for task in find_tasks(names)]
    assert all(parts) and sorted(every) == sorted(identity for part in parts for identity in part)
