"""The evaluation sets: MT-LLaMA's prompts to the letter, prompts of our own that mean the same, hidden labels declined."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtllama.errors import MissingDataError, UserError
from mtllama.tasks.catalog import Rows, Task, catalog, find_tasks, load_rows, sampler_dir
from mtllama.tasks.promptsource import read_templates
from mtllama.tasks.source import Row, find_file

MT_LLAMA = "mt-llama"
LANGUAGES = {
    "xquad": "ar de el en es hi ro ru th tr vi zh",
    "mlqa": "ar de en es hi vi zh",
    "tydiqa": "ar bn en fi id ko ru sw te",
    "xnli": "ar bg de el en es fr hi ru sw th tr ur vi zh",
    "xcopa": "et ht id it qu sw ta th tr vi zh",
    "xwinograd": "en fr jp pt ru zh",
    "xstorycloze": "ar en es eu hi id my ru sw te zh",
    "pawsx": "de en es fr ja ko zh",
    "marc": "de en es fr ja zh",
}
ENGLISH = {"squad", "sst2", "openbookqa", "copa", "winogrande", "wic", "mnli", "rte"}
"""Sets of one language that MT-LLaMA is evaluated on."""
HELD_OUT = {"cb", "anli_r1", "anli_r2", "anli_r3", "wsc", "hellaswag", "story_cloze"}
"""What T0 holds out beyond them."""
IN_SQUAD_FORM = {"squad", "xquad", "tydiqa", "mlqa"}


def family_of(task: Task) -> str:
    """The set without its language: `xnli-de` is of `xnli`."""
    return task.name.split("-")[0]


def evaluation_tasks() -> list[Task]:
    """The evaluation sets of one language."""
    return [task for task in catalog().values() if task.role != "train" and len(task.languages) == 1]


def pairs() -> list[Task]:
    """Those that ask about a context in another language."""
    return [task for task in catalog().values() if len(task.languages) == 2]


# What MT-LLaMA asks, written here a second time.


def qa(row: Row) -> str:
    context = " ".join(row["context"].split())
    return f"Answer the question according to the context. Question: {row['question']}. Context: {context}. Answer:"


def copa(row: Row) -> str:
    relation = "This happened because..." if row["question"] == "cause" else "As a consequence..."
    first, second = row["choice1"].strip(), row["choice2"].strip()
    return f"{row['premise'].strip()} {relation} Help me pick the more plausible option: - {first}. - {second}"


def xstorycloze(row: Row) -> str:
    story = " ".join(row[f"input_sentence_{n}"].strip() for n in (1, 2, 3, 4))
    first, second = row["sentence_quiz1"].strip(), row["sentence_quiz2"].strip()
    return f"{story} As a consequence... Help me pick the more plausible option: - {first} - {second}"


def openbookqa(row: Row) -> str:
    a, b, c, d = row["choices"]["text"]
    return f"{row['question_stem'].strip()} Which is the correct answer? - (A) {a} - (B) {b} - (C) {c} - (D) {d}"


def winogrande(row: Row) -> str:
    return f"{row['sentence'].strip()} In the previous sentence, does _ refer to {row['option1']} or {row['option2']}?"


def mnli(row: Row) -> str:
    return (
        f"{row['premise'].strip()} Question: Does this imply that {row['hypothesis'].strip()}? "
        "Please response with 'Yes', 'No', or 'Maybe'."
    )


PROMPTS: dict[str, Callable[[Row], str]] = {
    **dict.fromkeys(IN_SQUAD_FORM, qa),
    **dict.fromkeys(("copa", "xcopa"), copa),
    **dict.fromkeys(("winogrande", "xwinograd"), winogrande),
    **dict.fromkeys(("mnli", "xnli"), mnli),
    "xstorycloze": xstorycloze,
    "openbookqa": openbookqa,
    "sst2": lambda row: f"{row['sentence'].strip()} Based on this review, would the user recommend this product? No or Yes?",
    "wic": lambda row: (
        f'Does the word "{row["word"]}" have the same meaning in these two sentences? Yes, No? '
        f"{row['sentence1'].strip()} {row['sentence2'].strip()}"
    ),
    "rte": lambda row: f'Given {row["premise"].strip()} Is it guaranteed true that "{row["hypothesis"].strip()}"? Yes or no?',
    "pawsx": lambda row: (
        f"Sentence 1: {row['sentence1'].strip()} Sentence 2: {row['sentence2'].strip()} "
        "Question: Does Sentence 1 paraphrase Sentence 2? Yes or No?"
    ),
    "marc": lambda row: (
        f"Title: {row['review_title'].strip()} Product Review: {row['review_body'].strip()} "
        "Based on this review, would the user recommend this product? No or Yes?"
    ),
}
WORDS = {
    "sst2": ["No", "Yes"],
    "wic": ["No", "Yes"],
    "pawsx": ["No", "Yes"],
    "mnli": ["Yes", "Maybe", "No"],
    "xnli": ["Yes", "Maybe", "No"],
    "rte": ["Yes", "no"],
}
"""Its answers, in the order of the labels."""
OPTIONS: dict[str, Callable[[Row], tuple[list[str], int]]] = {
    "openbookqa": lambda row: (row["choices"]["text"], "ABCD".index(row["answerKey"])),
    "copa": lambda row: ([row["choice1"], row["choice2"]], row["label"]),
    "winogrande": lambda row: ([row["option1"], row["option2"]], int(row["answer"]) - 1),
    "hellaswag": lambda row: (row["endings"], int(row["label"])),
    "story_cloze": lambda row: ([row["sentence_quiz1"], row["sentence_quiz2"]], row["answer_right_ending"] - 1),
}
"""Options and the right one, of sets whose answers are the texts of the options."""
OPTIONS |= {"xcopa": OPTIONS["copa"], "xwinograd": OPTIONS["winogrande"], "xstorycloze": OPTIONS["story_cloze"]}

# What our own answers say, and which of it the label of a row says.
SAYS = {
    "holds": "true, yes, Yes, supports it, proven, enough",
    "open": "unclear, maybe, Maybe, leaves it open",
    "fails": "false, no, No, contradicts it",
    "not shown": "no, not proven, not enough",
    "liked": "Yes, yes, praise, good, satisfied, positive",
    "disliked": "No, no, criticism, bad, dissatisfied, negative",
    "alike": "Yes, yes, same, kept, one sense, right",
    "unlike": "No, no, different, changed, two different senses, wrong, something else",
}
MEANING = {
    "mnli": ["holds", "open", "fails"],
    "xnli": ["holds", "open", "fails"],
    "anli_r1": ["holds", "open", "fails"],
    "anli_r2": ["holds", "open", "fails"],
    "anli_r3": ["holds", "open", "fails"],
    "cb": ["holds", "fails", "open"],
    "rte": ["holds", "not shown"],
    "sst2": ["disliked", "liked"],
    "wic": ["unlike", "alike"],
    "wsc": ["unlike", "alike"],
    "pawsx": ["unlike", "alike"],
}

NLI = {"premise": "It rained all day. ", "hypothesis": "The street was wet.", "label": 0}
STORY = {
    **{f"input_sentence_{n}": f"Sentence {n} . " for n in (1, 2, 3, 4)},
    "sentence_quiz1": "He slept.",
    "sentence_quiz2": " He ran. ",
    "answer_right_ending": 2,
}
CHOICE = {"premise": "The lake froze. ", "question": "cause", "choice1": "It was cold.", "choice2": "It was hot.", "label": 0}
QUESTION = {"context": "A  cat\n\nsat.", "question": "Who sat?", "answers": {"text": ["A  cat", "cat"], "answer_start": [0, 3]}}
GAP = {"sentence": "The cup does not fit the case, for _ is too big.", "option1": "the cup", "option2": "the case", "answer": "1"}
PAIR = {"sentence1": "He left on Monday.", "sentence2": "On Monday he left.", "label": 1}
EXAMPLES: dict[str, Row] = {
    **dict.fromkeys(IN_SQUAD_FORM, QUESTION),
    **dict.fromkeys(("mnli", "xnli", "anli_r1", "anli_r2", "anli_r3", "cb", "rte"), NLI),
    **dict.fromkeys(("copa", "xcopa"), CHOICE),
    **dict.fromkeys(("winogrande", "xwinograd"), GAP),
    **dict.fromkeys(("story_cloze", "xstorycloze"), STORY),
    "pawsx": PAIR,
    "wic": {**PAIR, "word": "left"},
    "wsc": {"text": "Ann saw that she was late.", "span1_text": "Ann", "span2_text": "she", "label": 1},
    "sst2": {"sentence": "a joy . ", "label": 1},
    "openbookqa": {
        "question_stem": "Ice is",
        "choices": {"text": ["hot", "cold", "dry", "soft"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
    "hellaswag": {"ctx": "He takes the ball and", "endings": ["eats it.", "throws it.", "reads it.", "paints it."], "label": "1"},
    "marc": {"review_title": "Broke ", "review_body": " After a week.", "stars": 1},
}
"""A made-up row of every set."""
LABEL_COLUMN = {
    **dict.fromkeys(EXAMPLES, "label"),
    **dict.fromkeys(("winogrande", "xwinograd"), "answer"),
    **dict.fromkeys(("story_cloze", "xstorycloze"), "answer_right_ending"),
    "openbookqa": "answerKey",
    "marc": "stars",
}


def gold(name: str, row: Row) -> tuple[list[str] | None, str]:
    """Choices and right answer of a row under MT-LLaMA's prompt."""
    if name == "marc":
        return ["No", "Yes"], "Yes" if int(row["stars"]) > 3 else "No"
    if name in WORDS:
        return WORDS[name], WORDS[name][row["label"]]
    if name in OPTIONS:
        options, right = OPTIONS[name](row)
        return options, options[right]
    return None, row["answers"]["text"][0]


def check_mt_llama(rows: Rows, limit: int | None = None) -> Counter[str]:
    """Compare every row's example with what is written above; answers counted."""
    name, template = family_of(rows.task), rows.task.template(MT_LLAMA)
    answers: Counter[str] = Counter()
    for index in range(len(rows.rows) if limit is None else min(limit, len(rows.rows))):
        row = rows.rows[index]
        example = rows.render(index, template)
        assert example is not None, (rows.task.name, index)
        choices, answer = gold(name, row)
        assert example.inputs == PROMPTS[name](row).strip(), (rows.task.name, index)
        assert example.targets == answer.strip(), (rows.task.name, index)
        assert example.choices == (tuple(choice.strip() for choice in choices) if choices else None), (rows.task.name, index)
        references = rows.task.row_references(row, example)
        assert references == (tuple(dict.fromkeys(row["answers"]["text"])) if choices is None else (example.targets,))
        answers[example.targets] += 1
    return answers


def made_up(task: Task) -> Rows:
    return Rows(task, [EXAMPLES[family_of(task)]], task.split, "", "here")


def real_rows(task: Task, shared_data: Path) -> Rows | None:
    """Rows of the real files, where there are any."""
    try:
        return load_rows(task, shared_data / "eval")
    except UserError as error:
        assert "no file for the split" in str(error)
        return None


def write(file: Path, *rows: Row) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_the_evaluation_sets_are_those_of_mt_llama_in_all_languages_and_those_that_t0_holds_out() -> None:
    multilingual = {f"{name}-{language}" for name, languages in LANGUAGES.items() for language in languages.split()}
    assert len(multilingual) == 84
    assert {task.name for task in evaluation_tasks()} == multilingual | ENGLISH | HELD_OUT


def test_mt_llamas_prompt_comes_first_and_two_or_more_of_our_own_follow() -> None:
    for task in evaluation_tasks():
        names = [prompt.name for prompt in task.prompts]
        theirs = [] if task.name in HELD_OUT else [MT_LLAMA, "mt-llama-5"] if family_of(task) == "marc" else [MT_LLAMA]
        ours = names[len(theirs) :]
        assert names[: len(theirs)] == theirs
        assert all(name.startswith("ours_") for name in ours), task.name
        assert len(ours) >= (2 if theirs else 3), task.name
        assert all(prompt.metadata.original_task for prompt in task.prompts), task.name


def test_the_prompts_of_a_set_differ_in_name_and_in_what_they_ask() -> None:
    for task in evaluation_tasks():
        rows = made_up(task)
        asked = [example.inputs for prompt in task.prompts if (example := rows.render(0, prompt))]
        assert len(asked) == len(set(asked)) == len({prompt.name for prompt in task.prompts}), task.name


def test_a_set_is_judged_by_accuracy_exactly_where_all_its_prompts_offer_choices() -> None:
    judged: Counter[str] = Counter()
    for task in evaluation_tasks():
        offers = {bool(prompt.answer_choices) for prompt in task.prompts}
        assert offers == {task.metric == "accuracy"}, task.name
        assert (task.references is None) == (task.metric == "accuracy"), task.name
        judged[", ".join(task.metrics)] += 1
    mlqa = {f"mlqa-f1-{language}, mlqa-em-{language}": 1 for language in LANGUAGES["mlqa"].split()}
    assert judged == {"accuracy": 69, "accuracy, macro-f1": 1, "f1, em": 22, **mlqa}
    assert catalog()["cb"].metrics == ("accuracy", "macro-f1")


def test_prompts_that_claim_to_show_the_choices_show_them() -> None:
    shown: Counter[bool] = Counter()
    for task in evaluation_tasks():
        rows = made_up(task)
        for prompt in task.prompts:
            example = rows.render(0, prompt)
            assert example is not None
            if example.choices:
                asked = example.inputs.lower().replace("from 1 to 5", "1 2 3 4 5")
                visible = all(choice.lower() in asked for choice in example.choices)
                assert visible == prompt.metadata.choices_in_prompt, (task.name, prompt.name)
                shown[visible] += 1
    assert min(shown.values()) > 20


@pytest.mark.parametrize("name", sorted(ENGLISH))
def test_the_english_prompts_are_the_originals_to_the_letter(name: str) -> None:
    rows = load_rows(catalog()[name], sampler_dir())
    answers = check_mt_llama(rows)
    assert answers.total() == len(rows.rows) == 80
    if name in WORDS:
        assert set(answers) == set(WORDS[name]), "every label occurred"


@pytest.mark.parametrize("name", sorted(LANGUAGES))
def test_the_multilingual_prompts_are_the_originals_to_the_letter(name: str) -> None:
    for language in LANGUAGES[name].split():
        assert check_mt_llama(made_up(catalog()[f"{name}-{language}"])).total() == 1


def test_the_prompts_are_the_originals_on_the_rows_of_the_real_files(shared_data: Path) -> None:
    counted: Counter[str] = Counter()
    for task in evaluation_tasks():
        rows = None if task.name in HELD_OUT else real_rows(task, shared_data)
        if rows is not None:
            counted[family_of(task)] += check_mt_llama(rows, limit=2000).total()
    assert ENGLISH | {"xquad", "xnli", "xcopa", "xwinograd", "pawsx"} <= set(counted)
    assert counted.total() > 30000


def test_all_prompts_render_the_real_rows_and_every_label_occurs(shared_data: Path) -> None:
    rendered: Counter[str] = Counter()
    for task in evaluation_tasks():
        rows = real_rows(task, shared_data)
        for prompt in task.prompts if rows is not None else ():
            assert rows is not None
            number = min(300, len(rows.rows))
            made = [example for index in range(number) if (example := rows.render(index, prompt))]
            assert len(made) == number, (task.name, prompt.name)
            if prompt.answer_choices and "{" not in prompt.answer_choices:
                assert {example.targets for example in made} == set(made[0].choices or ()), (task.name, prompt.name)
            rendered[family_of(task)] += number
    assert {"cb", "wsc", "hellaswag", *ENGLISH} <= set(rendered)
    assert rendered.total() > 30000


@pytest.mark.parametrize(
    ("name", "row", "inputs"),
    [
        ("copa", CHOICE, "The lake froze. This happened because... Help me pick the more plausible option: - It was cold.. - It was hot."),
        (
            "xcopa-it",
            {**CHOICE, "question": "effect", "choice1": "Venne l'inverno", "choice2": "Era caldo."},
            "The lake froze. As a consequence... Help me pick the more plausible option: - Venne l'inverno. - Era caldo.",
        ),
        (
            "xstorycloze-es",
            STORY,
            "Sentence 1 . Sentence 2 . Sentence 3 . Sentence 4 . As a consequence... "
            "Help me pick the more plausible option: - He slept. - He ran.",
        ),
        ("squad", QUESTION, "Answer the question according to the context. Question: Who sat?. Context: A cat sat.. Answer:"),
        ("tydiqa-ko", QUESTION, "Answer the question according to the context. Question: Who sat?. Context: A cat sat.. Answer:"),
        (
            "wic",
            {"word": "bank", "sentence1": "By the bank.", "sentence2": "Bank it.", "label": 0},
            'Does the word "bank" have the same meaning in these two sentences? Yes, No? By the bank. Bank it.',
        ),
        (
            "xnli-sw",
            NLI,
            "It rained all day. Question: Does this imply that The street was wet.? Please response with 'Yes', 'No', or 'Maybe'.",
        ),
        (
            "xwinograd-jp",
            GAP,
            "The cup does not fit the case, for _ is too big. In the previous sentence, does _ refer to the cup or the case?",
        ),
        (
            "pawsx-de",
            PAIR,
            "Sentence 1: He left on Monday. Sentence 2: On Monday he left. Question: Does Sentence 1 paraphrase Sentence 2? Yes or No?",
        ),
        (
            "marc-fr",
            EXAMPLES["marc"],
            "Title: Broke Product Review: After a week. Based on this review, would the user recommend this product? No or Yes?",
        ),
    ],
)
def test_what_the_original_sends_spelt_out(name: str, row: Row, inputs: str) -> None:
    example = catalog()[name].template(None).render(row, task=name, row_id="0")
    assert example is not None and example.inputs == inputs


@pytest.mark.parametrize("name", sorted(MEANING))
def test_every_prompts_answers_mean_what_the_label_says(name: str) -> None:
    task = next(task for task in evaluation_tasks() if family_of(task) == name)
    for prompt in task.prompts:
        for label, meaning in enumerate(MEANING[name]):
            row = {**EXAMPLES[name], "label": label}
            example = prompt.render(row, task=name)
            allowed = {*SAYS[meaning].split(", "), row.get("span1_text", "")}
            assert example is not None and example.targets in allowed, (prompt.name, label)
            assert example.choices is not None and len(example.choices) == len(MEANING[name])


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_prompts_answer_is_the_right_option_itself(name: str) -> None:
    row, column = EXAMPLES[name], LABEL_COLUMN[name]
    labels = {"openbookqa": "ABCD", "hellaswag": "0123", "copa": (0, 1), "xcopa": (0, 1)}.get(name)
    if labels is None:
        labels = ("1", "2") if column == "answer" else (1, 2)
    for task in (task for task in evaluation_tasks() if family_of(task) == name):
        for prompt in task.prompts:
            told = []
            for label in labels:
                options, right = OPTIONS[name]({**row, column: label})
                example = prompt.render({**row, column: label}, task=name)
                assert example is not None and example.targets == options[right].strip()
                told.append(example.targets)
            assert len(set(told)) == len(labels)


@pytest.mark.parametrize("hidden", [-1, "", None])
def test_no_prompt_answers_a_row_whose_label_is_hidden(hidden: Any) -> None:
    declined: Counter[str] = Counter()
    for task in evaluation_tasks():
        name = family_of(task)
        if name in IN_SQUAD_FORM or (name == "openbookqa" and hidden == -1):
            continue
        for prompt in task.prompts:
            assert prompt.render(EXAMPLES[name], task=task.name) is not None, (task.name, prompt.name)
            row = {**EXAMPLES[name], LABEL_COLUMN[name]: hidden}
            if name in ("winogrande", "xwinograd") and hidden == -1:
                continue
            assert prompt.render(row, task=task.name) is None, (task.name, prompt.name)
            declined[name] += 1
    assert declined.total() > 200


def test_marc_drops_three_stars_in_its_two_class_form_and_keeps_them_in_its_five_class_form() -> None:
    task, row = catalog()["marc-en"], EXAMPLES["marc"]
    two, five = task.template("mt-llama"), task.template("mt-llama-5")

    def answers(template: Any, form: Callable[[int], Any]) -> list[str | None]:
        made = [template.render({**row, "stars": form(stars)}, task="marc-en") for stars in range(1, 6)]
        return [example.targets if example else None for example in made]

    for form in (int, str):  # the publisher's files spell stars as text
        assert answers(two, form) == ["No", "No", None, "Yes", "Yes"]
        assert answers(five, form) == ["Not at all", "No", "Maybe", "Yes", "Definitely"]
        assert answers(task.template("ours_labelled"), form) == ["negative", "negative", None, "positive", "positive"]
        assert answers(task.template("ours_stars"), form) == ["1", "2", "3", "4", "5"]
    example = five.render(row, task="marc-en")
    assert example is not None and example.inputs == (
        "Title: Broke Product Review: After a week. Based on this review, would the user recommend this product? "
        "Not at all, No, Maybe, Yes, or Definitely?"
    )


def test_marc_reads_the_copy_that_has_title_and_body_in_one_column(tmp_path: Path) -> None:
    write(
        tmp_path / "marc" / "de.test.jsonl",
        {"id": "de_1", "text": "Kaputt\n\nNach einer Woche.\n\nNie wieder.", "label": 0, "label_text": "0"},
        {"id": "de_2", "text": "Gut\n\nHält.", "label": 4, "label_text": "4"},
    )
    rows = load_rows(catalog()["marc-de"], tmp_path)
    assert [rows.rows[0][column] for column in rows.task.columns] == ["Kaputt", "Nach einer Woche.\n\nNie wieder.", 1]
    assert [example.targets for index in range(2) if (example := rows.render(index, rows.task.template(None)))] == ["No", "Yes"]


def test_tydiqa_takes_the_rows_of_its_language_out_of_a_file_of_all(tmp_path: Path) -> None:
    write(tmp_path / "tydiqa" / "validation.jsonl", *({**QUESTION, "id": f"{word}-1-2"} for word in ("english", "finnish", "korean")))
    for language, word in (("en", "english"), ("fi", "finnish"), ("ko", "korean")):
        rows = load_rows(catalog()[f"tydiqa-{language}"], tmp_path)
        assert [row["id"] for row in rows.rows] == [f"{word}-1-2"]


@pytest.mark.parametrize(
    ("name", "file", "split", "others"),
    [
        ("xquad-de", "xquad/xquad.de.jsonl", "validation", ["xquad/xquad.en.jsonl", "xquad/xquad.el.jsonl"]),
        ("mlqa-hi", "mlqa/mlqa.hi.hi.test.jsonl", "test", ["mlqa/mlqa.hi.en.test.jsonl", "mlqa/mlqa.en.hi.test.jsonl"]),
        (
            "tydiqa-sw",
            "tydiqa/secondary_task.swahili.validation.jsonl",
            "validation",
            ["tydiqa/secondary_task.english.validation.jsonl"],
        ),
        ("xnli-ar", "xnli/ar.test.subset1002.jsonl", "test", ["xnli/en.test.jsonl"]),
        ("xcopa-et", "xcopa/et.test.jsonl", "test", ["xcopa/it.test.jsonl"]),
        ("xwinograd-jp", "xwinograd/jp.test.jsonl", "test", ["xwinograd/pt.test.jsonl"]),
        ("xstorycloze-my", "xstorycloze/my.eval.jsonl", "eval", ["xstorycloze/en.eval.jsonl", "xstorycloze/my.train.jsonl"]),
        ("pawsx-ko", "pawsx/ko.validation.jsonl", "validation", ["pawsx/ja.test.jsonl"]),
        ("marc-ja", "marc/ja.test.jsonl", "test", ["marc/en.test.jsonl", "marc/ja.train.jsonl"]),
        ("cb", "super_glue/cb.validation.jsonl", "validation", ["super_glue/copa.validation.jsonl"]),
        ("wsc", "super_glue/wsc.fixed.validation.jsonl", "validation", ["super_glue/wsc.validation.jsonl"]),
        ("anli_r2", "anli/dev_r2.jsonl", "dev_r2", ["anli/dev_r1.jsonl", "anli/test_r2.jsonl"]),
        ("hellaswag", "hellaswag/validation.subset1000.jsonl", "validation", []),
        ("story_cloze", "story_cloze/2016.validation.jsonl", "validation", ["story_cloze/2018.validation.jsonl"]),
    ],
)
def test_the_sets_lie_where_their_publishers_names_put_them(tmp_path: Path, name: str, file: str, split: str, others: list[str]) -> None:
    task = catalog()[name]
    splits = tuple(dict.fromkeys((task.split, "validation", "test")))
    for other in others:
        write(tmp_path / other, {})
    assert find_file(name, task.location, tmp_path, (task.split,)) is None, "a file of another set"
    write(tmp_path / file, {})
    found = find_file(name, task.location, tmp_path, splits)
    assert found is not None and (found.path, found.split) == (tmp_path / file, split)


def test_the_three_rounds_of_anli_are_asked_alike() -> None:
    first, second, third = (catalog()[f"anli_r{k}"] for k in (1, 2, 3))
    assert first.prompts == second.prompts == third.prompts
    assert [task.split for task in (first, second, third)] == ["dev_r1", "dev_r2", "dev_r3"]


def test_the_protocols_split_is_a_published_one_and_passages_are_columns() -> None:
    known = 0
    for task in evaluation_tasks():
        assert not task.splits or task.split in task.splits, task.name
        assert {passage.split(".")[0] for passage in task.passages} <= set(task.columns), task.name
        assert set(task.columns) <= set(EXAMPLES[family_of(task)]), task.name
        known += bool(task.splits)
    assert known >= 70


ORIGINAL_TEMPLATES = {
    "rte": 10,
    "cb": 15,
    "anli_r1": 15,
    "anli_r2": 15,
    "anli_r3": 15,
    "wsc": 10,
    "winogrande": 5,
    "story_cloze": 5,
    "wic": 10,
    "hellaswag": 4,
    "copa": 12,
}
"""Templates that T0 is evaluated with."""


def test_promptsource_has_the_templates_that_t0_is_evaluated_with(shared_data: Path) -> None:
    folder, counted = promptsource(shared_data), {}
    for task in evaluation_tasks():
        if task.promptsource is None:
            assert task.name not in ORIGINAL_TEMPLATES
            continue
        templates = read_templates(folder, task.promptsource)
        assert templates, f"{task.name}: no folder {task.promptsource}"
        if task.name in ORIGINAL_TEMPLATES:
            counted[task.name] = sum(template.metadata.original_task for template in templates)
    assert counted == ORIGINAL_TEMPLATES


def promptsource(shared_data: Path) -> Path:
    folder = next(shared_data.parent.glob("promptsource-*"), None)
    if folder is None:
        pytest.skip("promptsource's templates are not beside this checkout")
    return folder


@pytest.mark.parametrize("name", ORIGINAL_TEMPLATES)
def test_every_template_that_t0_is_evaluated_with_asks_for_one_of_its_choices(shared_data: Path, name: str) -> None:
    task, folder = catalog()[name], promptsource(shared_data)
    rows = real_rows(task, shared_data)
    if rows is None:  # not among the real files: rows of the published columns
        first = EXAMPLES[name] | {"uid": "0", "reason": ""}
        rows = Rows(task, [first], task.split, "", "here")
    templates = [t for t in read_templates(folder, str(task.promptsource)) if t.metadata.original_task]
    assert len(templates) == ORIGINAL_TEMPLATES[name]
    for template in templates:
        made = [example for index in range(min(100, len(rows.rows))) if (example := rows.render(index, template))]
        assert made, f"{template.name} declines every row"
        assert all(example.choices and example.targets in example.choices for example in made), template.name
        if name != "copa":  # some of its templates are for causes only, or for effects
            assert len(made) == min(100, len(rows.rows)), template.name


# The files

REAL = {
    "squad": 4000, "sst2": 436, "openbookqa": 500, "copa": 50, "cb": 56, "rte": 139, "wic": 319, "wsc": 104, "winogrande": 634,
    "mnli": 3000, "hellaswag": 1000, "xnli-en": 5010, "xwinograd-en": 2325, "xwinograd-fr": 83, "xwinograd-pt": 263,
    **dict.fromkeys(("xquad-ar", "xquad-de", "xquad-es", "xquad-zh"), 1190),
    **dict.fromkeys((f"xcopa-{language}" for language in LANGUAGES["xcopa"].split()), 500),
    **dict.fromkeys(("xnli-ar", "xnli-de", "xnli-fr", "xnli-hi", "xnli-sw"), 1002),
    **dict.fromkeys(("pawsx-de", "pawsx-en", "pawsx-zh"), 2000),
}  # fmt: skip
"""Rows of the real files."""
NOTES = {"hellaswag": "subset1000", **dict.fromkeys(("xnli-ar", "xnli-de", "xnli-fr", "xnli-hi", "xnli-sw"), "subset1002")}


@pytest.mark.parametrize("name", REAL)
def test_a_set_that_is_there_is_found_whole_and_every_prompt_asks_its_first_and_last_rows(shared_data: Path, name: str) -> None:
    rows = load_rows(catalog()[name], shared_data / "eval")
    assert (len(rows.rows), rows.note) == (REAL[name], NOTES.get(name, ""))
    assert rows.split == ("validation" if name.startswith("pawsx") else rows.task.split)
    for prompt in rows.task.prompts:
        for index in (*range(20), *range(len(rows.rows) - 20, len(rows.rows))):
            example = rows.render(index, prompt)
            assert example is not None and example.inputs and example.targets
            assert rows.task.row_references(rows.rows[index], example)


def test_every_real_file_is_of_a_set(shared_data: Path) -> None:
    files = {path for path in (shared_data / "eval").rglob("*") if path.is_file() and path.suffix != ".md"}
    found = {Path(load_rows(catalog()[name], shared_data / "eval").origin) for name in REAL}
    mismatched = load_rows(catalog()["mnli"], shared_data / "eval", "validation_mismatched")
    assert mismatched.note == "tokenized1000"
    assert files == found | {Path(mismatched.origin)}


# A context in one language, asked about in another


def test_the_pairs_are_all_of_two_different_languages_of_xquad_and_mlqa() -> None:
    expected = {
        f"{name}-{context}-{question}"
        for name in ("xquad", "mlqa")
        for context in LANGUAGES[name].split()
        for question in LANGUAGES[name].split()
        if context != question
    }
    assert {task.name for task in pairs()} == {task.name for task in find_tasks(["cross-lingual"])} == expected
    assert len(expected) == 12 * 11 + 7 * 6
    for task in pairs():
        own = catalog()[f"{family_of(task)}-{task.languages[0]}"]
        assert task.name == f"{own.name}-{task.languages[1]}"
        assert (task.prompts, task.metrics, task.split, task.references) == (own.prompts, own.metrics, own.split, own.references)
        assert (task.joined is None) == task.name.startswith("mlqa")
        assert task.splits.keys() == own.splits.keys()
    assert catalog()["xquad-de-ar"].title == "XQuAD (German, asked in Arabic)"
    assert catalog()["mlqa-zh-en"].metrics == ("mlqa-f1-zh", "mlqa-em-zh"), "the answer is in the language of the context"


def test_mlqas_pairs_are_as_many_in_both_directions_and_no_more_than_either_language_has() -> None:
    for task in (task for task in pairs() if task.name.startswith("mlqa")):
        context, question = task.languages
        assert task.splits == catalog()[f"mlqa-{question}-{context}"].splits
        assert task.location.config == f"mlqa.{context}.{question}"
        for split, size in task.splits.items():
            both = [catalog()[f"mlqa-{language}"].splits[split] for language in task.languages]
            assert size == min(both) if "en" in task.languages else size < min(both) / 2


def test_mlqas_pairs_lie_in_files_of_their_own(tmp_path: Path) -> None:
    asked = {"de.de": "Wer?", "de.en": "Who?", "en.de": "Wer sass?"}
    for languages, question in asked.items():
        write(tmp_path / "mlqa" / f"mlqa.{languages}.test.jsonl", {**QUESTION, "id": "1", "question": question})
    for name, languages in (("mlqa-de", "de.de"), ("mlqa-de-en", "de.en"), ("mlqa-en-de", "en.de")):
        rows = load_rows(catalog()[name], tmp_path)
        assert [row["question"] for row in rows.rows] == [asked[languages]]
    with pytest.raises(MissingDataError, match="mlqa-en-zh: no file for the split test"):
        load_rows(catalog()["mlqa-en-zh"], tmp_path)


def xquad(folder: Path, language: str, *rows: tuple[str, str]) -> None:
    made = [{**QUESTION, "context": f"{language} {row_id}", "id": row_id, "question": question} for row_id, question in rows]
    write(folder / "xquad" / f"xquad.{language}.jsonl", *made)


def test_xquads_pairs_take_the_question_of_the_same_id_out_of_the_other_languages_file(tmp_path: Path) -> None:
    xquad(tmp_path, "de", ("b", "Wo?"), ("a", "Wer?"))
    xquad(tmp_path, "en", ("a", "Who?"), ("b", "Where?"), ("c", "When?"))
    rows = load_rows(catalog()["xquad-de-en"], tmp_path)
    assert [(row["id"], row["context"], row["question"]) for row in rows.rows] == [("b", "de b", "Where?"), ("a", "de a", "Who?")]
    assert [Path(path).name for path in (rows.origin, *rows.sources)] == ["xquad.de.jsonl", "xquad.en.jsonl"]
    assert rows.row_id(1) == "a" and rows.split == "validation"
    example = rows.render(1, rows.task.template(None))
    assert example is not None and example.task == "xquad-de-en"
    assert example.inputs == "Answer the question according to the context. Question: Who?. Context: de a. Answer:"


def test_xquads_pairs_name_what_cannot_be_joined(tmp_path: Path) -> None:
    task = catalog()["xquad-de-en"]
    xquad(tmp_path, "de", ("a", "Wer?"), ("b", "Wo?"))
    with pytest.raises(MissingDataError, match="xquad-en: no file for the split validation"):
        load_rows(task, tmp_path)
    xquad(tmp_path, "en", ("a", "Who?"))
    with pytest.raises(UserError, match=r"xquad\.de\.jsonl, row 1: its id 'b' is not in .*xquad\.en\.jsonl; both need the same rows"):
        load_rows(task, tmp_path)
    xquad(tmp_path, "en", ("a", "Who?"), ("b", "Where?"), ("a", "Who?"))
    with pytest.raises(UserError, match=r"xquad\.en\.jsonl, row 2: it has the id 'a' of row 0; rows are joined by their ids"):
        load_rows(task, tmp_path)
    write(tmp_path / "xquad" / "xquad.en.jsonl", QUESTION)
    with pytest.raises(UserError, match=r"xquad\.en\.jsonl, row 0: it has no id; rows are joined by their ids"):
        load_rows(task, tmp_path)


@pytest.mark.parametrize("name", ["xquad-de-zh", "xquad-zh-ar"])
def test_xquads_pairs_are_made_of_the_real_files(shared_data: Path, name: str) -> None:
    rows = load_rows(catalog()[name], shared_data / "eval")
    context, question = (load_rows(catalog()[f"xquad-{language}"], shared_data / "eval") for language in rows.task.languages)
    assert len(rows.rows) == 1190
    for index in range(0, 1190, 50):
        row = rows.rows[index]
        assert (row["context"], row["answers"]) == (context.rows[index]["context"], context.rows[index]["answers"])
        assert row["question"] == next(other for other in question.rows if other["id"] == row["id"])["question"]
        assert row["question"] != context.rows[index]["question"]
        assert row["answers"]["text"][0] in row["context"]
