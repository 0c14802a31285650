"""The catalogue: every entry is whole, and the evaluation prompts are the original's to the letter."""

import csv
import difflib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mtllama.errors import UserError
from mtllama.tasks import catalog as catalog_module
from mtllama.tasks.catalog import Rows, Task, catalog, data_folder, find_tasks, load_rows, sampler_dir
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


def qa(row: Row) -> str:
    context = " ".join(row["context"].split())
    return f"Answer the question according to the context. Question: {row['question']}. Context: {context}. Answer:"


def copa(row: Row) -> str:
    relation = "This happened because..." if row["question"] == "cause" else "As a consequence..."
    first, second = row["choice1"].strip(), row["choice2"].strip()
    return f"{row['premise'].strip()} {relation} Help me pick the more plausible option: - {first}. - {second}"


def openbookqa(row: Row) -> str:
    a, b, c, d = row["choices"]["text"]
    return f"{row['question_stem'].strip()} Which is the correct answer? - (A) {a} - (B) {b} - (C) {c} - (D) {d}"


PROMPTS: dict[str, Callable[[Row], str]] = {
    "xquad-en": qa,
    "tydiqa-en": qa,
    "mlqa-en": qa,
    "squad": qa,
    "sst2": lambda row: f"{row['sentence'].strip()} Based on this review, would the user recommend this product? No or Yes?",
    "openbookqa": openbookqa,
    "copa": copa,
    "winogrande": lambda row: f"{row['sentence'].strip()} In the previous sentence, does _ refer to {row['option1']} or {row['option2']}?",
    "wic": lambda row: (
        f'Does the word "{row["word"]}" have the same meaning in these two sentences? Yes, No? '
        f"{row['sentence1'].strip()} {row['sentence2'].strip()}"
    ),
    "mnli": lambda row: (
        f"{row['premise'].strip()} Question: Does this imply that {row['hypothesis'].strip()}? "
        "Please response with 'Yes', 'No', or 'Maybe'."
    ),
    "rte": lambda row: f'Given {row["premise"].strip()} Is it guaranteed true that "{row["hypothesis"].strip()}"? Yes or no?',
}
"""What MT-LLaMA asks, written here a second time."""

WORDS = {"sst2": ["No", "Yes"], "wic": ["No", "Yes"], "mnli": ["Yes", "Maybe", "No"], "rte": ["Yes", "no"]}
OPTIONS: dict[str, Callable[[Row], tuple[list[str], int]]] = {
    "openbookqa": lambda row: (row["choices"]["text"], "ABCD".index(row["answerKey"])),
    "copa": lambda row: ([row["choice1"], row["choice2"]], row["label"]),
    "winogrande": lambda row: ([row["option1"], row["option2"]], int(row["answer"]) - 1),
}


def gold(name: str, row: Row) -> tuple[list[str] | None, str]:
    """Choices and right answer of a row."""
    if name in WORDS:
        return WORDS[name], WORDS[name][row["label"]]
    if name in OPTIONS:
        options, right = OPTIONS[name](row)
        return options, options[right]
    return None, row["answers"]["text"][0]


def check_prompts(name: str, rows: Rows) -> Counter[str]:
    """Compare every row's example with what is written above; answers counted."""
    answers: Counter[str] = Counter()
    for index, row in enumerate(rows.rows):
        example = rows.render(index, rows.task.template(None))
        assert example is not None, (name, index)
        choices, answer = gold(name, row)
        assert example.inputs == PROMPTS[name](row).strip(), (name, index)
        assert example.targets == answer.strip(), (name, index)
        assert example.choices == (tuple(choice.strip() for choice in choices) if choices else None), (name, index)
        references = rows.task.row_references(row, example)
        assert references == (tuple(dict.fromkeys(row["answers"]["text"])) if choices is None else (example.targets,))
        answers[example.targets] += 1
    return answers


def sampler_rows(name: str) -> Rows:
    """Rows of an evaluation set; the sets in SQuAD's columns that the sampler does not hold borrow SQuAD's."""
    stand_in = "squad" if name in ("xquad-en", "tydiqa-en", "mlqa-en") else name
    found = load_rows(catalog()[stand_in], sampler_dir())
    return Rows(catalog()[name], found.rows, found.split, found.note, found.origin)


def training_sets() -> list[Task]:
    return [task for task in catalog().values() if task.role == "train"]


def test_every_file_of_the_catalogue_is_an_entry_of_the_same_name() -> None:
    files = sorted(Path(catalog_module.__file__).with_name("catalog").glob("*.yaml"))
    assert len(files) == len(catalog()) >= 27
    for file in files:
        assert catalog()[file.stem].name == file.stem
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert [prompt["name"] for prompt in written["prompts"]] == [prompt.name for prompt in catalog()[file.stem].prompts]


def test_the_eleven_evaluation_sets_are_those_of_mt_llama() -> None:
    assert {task.name for task in catalog().values() if task.role != "train"} == set(PROMPTS)


def test_the_training_sets_cover_the_eight_families_and_nothing_else() -> None:
    assert {task.family for task in training_sets()} == FAMILIES


def test_every_training_set_has_three_prompts_or_more_and_original_task_ones_first() -> None:
    assert len(training_sets()) >= 16
    for task in training_sets():
        originals = [prompt.metadata.original_task for prompt in task.prompts]
        assert len(originals) >= 3, task.name
        assert originals[0] and originals == sorted(originals, reverse=True), task.name


def test_the_prompts_of_a_set_have_different_names_and_texts() -> None:
    for task in catalog().values():
        assert len({prompt.name for prompt in task.prompts}) == len(task.prompts), task.name
        assert len({prompt.jinja for prompt in task.prompts}) == len(task.prompts), task.name


def test_a_set_is_judged_by_accuracy_exactly_where_all_its_original_prompts_offer_choices() -> None:
    judged: Counter[str] = Counter()
    for task in catalog().values():
        if task.role != "train":
            offers = all(prompt.answer_choices for prompt in task.prompts)
            assert (task.metric == "accuracy") == offers, task.name
            assert (task.references is None) == offers, task.name
            judged[task.metric] += 1
    assert judged == {"accuracy": 7, "f1": 4}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_evaluation_prompts_are_the_originals_to_the_letter(name: str) -> None:
    rows = sampler_rows(name)
    answers = check_prompts(name, rows)
    assert answers.total() == len(rows.rows) == 80
    if name in WORDS:
        assert set(answers) == set(WORDS[name]), "every label occurred"


def test_the_evaluation_prompts_are_the_originals_on_every_row_of_the_real_files(shared_data: Path) -> None:
    counted = {}
    for name in PROMPTS:
        try:
            rows = load_rows(catalog()[name], shared_data / "eval")
        except UserError as error:
            assert "no file for the split" in str(error)
            continue
        counted[name] = check_prompts(name, rows).total()
        assert counted[name] == len(rows.rows)
    assert {"squad", "sst2", "openbookqa", "copa", "winogrande", "wic", "mnli", "rte"} <= set(counted)
    assert sum(counted.values()) > 5000


@pytest.mark.parametrize(
    ("name", "row", "inputs"),
    [
        (
            "copa",
            {"premise": "The lake froze. ", "question": "cause", "choice1": "It was cold.", "choice2": "It was hot.", "label": 0},
            "The lake froze. This happened because... Help me pick the more plausible option: - It was cold.. - It was hot.",
        ),
        (
            "squad",
            {"context": "A  cat\n\nsat.", "question": "Who sat?", "answers": {"text": ["A  cat", "cat"]}},
            "Answer the question according to the context. Question: Who sat?. Context: A cat sat.. Answer:",
        ),
        (
            "wic",
            {"word": "bank", "sentence1": "By the bank.", "sentence2": "Bank it.", "label": 0},
            'Does the word "bank" have the same meaning in these two sentences? Yes, No? By the bank. Bank it.',
        ),
    ],
)
def test_the_slips_of_the_original_are_kept(name: str, row: Row, inputs: str) -> None:
    example = catalog()[name].template(None).render(row, task=name, row_id="0")
    assert example is not None and example.inputs == inputs


@pytest.mark.parametrize("name", ["sst2", "copa", "wic", "mnli", "rte", "winogrande"])
def test_a_row_whose_label_is_withheld_is_declined(name: str) -> None:
    rows = sampler_rows(name)
    column, withheld = ("answer", "") if name == "winogrande" else ("label", -1)
    template = rows.task.template(None)
    assert template.render({**rows.rows[0], column: withheld}, task=name) is None
    assert template.render(rows.rows[0], task=name) is not None


def test_tydiqa_takes_the_english_rows_of_the_nine_languages() -> None:
    task = catalog()["tydiqa-en"]
    row = sampler_rows("tydiqa-en").rows[0]
    taken = {
        language: task.template(None).render({**row, "id": f"{language}-1-2"}, task=task.name)
        for language in ("english", "finnish", "korean")
    }
    assert [language for language, example in taken.items() if example] == ["english"]


def test_every_training_set_that_is_there_renders_its_first_rows_with_every_prompt(shared_data: Path) -> None:
    folder, rendered = shared_data / "train", Counter[str]()
    for task in training_sets():
        if not (folder / task.name).is_dir():
            continue
        rows = load_rows(task, folder, "train")
        for template in task.prompts:
            made = [rows.render(index, template) for index in range(min(200, len(rows.rows)))]
            kept = [example for example in made if example]
            assert kept, f"{task.name}/{template.name} declines every row"
            assert all(len(example.inputs) > len(example.targets) / 4 for example in kept)
            rendered[task.name] += len(kept)
    assert len(rendered) >= 12, rendered
    assert rendered.total() > 5000


def test_published_sizes_are_those_of_the_t0_table(shared_data: Path) -> None:
    table = shared_data.parent / "t0" / "t0_mixture.csv"
    if not table.is_file():
        pytest.skip("the T0 table is not beside this checkout")
    with open(table, encoding="utf-8", newline="") as handle:
        theirs = {"_".join(filter(None, (row["dataset"], row["subset"]))): row["train_size"] for row in csv.DictReader(handle)}
    ours = {task.name: str(task.num_train) for task in training_sets()}
    shared = ours.keys() & theirs.keys()
    assert ours.keys() - shared == {"adversarial_qa", "commonsense_qa"}, "three sets in one, and cos_e in T0"
    assert {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


def test_an_unknown_task_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown task 'winogrand'; did you mean winogrande\?"):
        find_tasks(["copa", "winogrand"])
    assert not difflib.get_close_matches("zzzz", catalog())
    with pytest.raises(UserError, match="unknown task 'zzzz'; see: mtllama tasks list"):
        find_tasks(["zzzz"])
    assert [task.name for task in find_tasks(["wic", "copa"])] == ["wic", "copa"]


def test_an_unknown_template_is_an_error_that_names_the_known_ones() -> None:
    trec = catalog()["trec"]
    with pytest.raises(UserError, match=r"trec has no template 'nope'; it has: sort_of_thing, labelled_categories"):
        trec.template("nope")
    assert trec.template("expected_reply") is trec.prompts[2]
    assert trec.template(None) is trec.prompts[0]


def test_an_error_of_a_template_names_file_and_row() -> None:
    rows = sampler_rows("sst2")
    broken = Rows(rows.task, [*rows.rows[:3], {"sentence": "no label"}], rows.split, "", rows.origin)
    with pytest.raises(UserError) as raised:
        broken.render(3, rows.task.template(None))
    assert str(raised.value).startswith(f"{rows.origin}: template 'mt-llama' of sst2, row 3: 'label' is undefined")


def test_a_row_goes_by_its_own_id_or_else_its_number() -> None:
    rows = Rows(catalog()["sst2"], [{"id": "q-1"}, {"idx": 7}, {"text": "x"}, {"id": None}, {"id": ["a"]}], "validation", "", "here")
    assert [rows.row_id(i) for i in range(5)] == ["q-1", "7", "2", "3", "4"]


def test_references_are_all_the_accepted_answers_of_a_row_once() -> None:
    task = catalog()["squad"]
    row = {"context": "c", "question": "q", "answers": {"text": ["one", "two", "one"]}}
    example = task.template(None).render(row, task="squad")
    assert example is not None
    assert task.row_references(row, example) == ("one", "two")


def test_the_word_sampler_stands_for_the_embedded_data(tmp_path: Path) -> None:
    assert data_folder(Path("sampler")) == sampler_dir()
    assert data_folder(tmp_path / "sampler") == tmp_path / "sampler"
    assert data_folder(None) is None


def test_each_prompt_of_a_set_asks_in_its_own_words() -> None:
    compared = 0
    for task in training_sets():
        if (sampler_dir() / task.name).is_dir():
            rows = load_rows(task, sampler_dir(), "train")
            made = [example.inputs for template in task.prompts if (example := rows.render(0, template))]
            assert len(set(made)) == len(made), task.name
            compared += len(made)
    assert compared >= 3 * 14
