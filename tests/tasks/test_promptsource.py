"""Templates of a promptsource checkout are read as they are, without running any of their code."""

import csv
from pathlib import Path

import pytest

from mtllama.errors import UserError
from mtllama.tasks.catalog import GROUPS, catalog, load_rows
from mtllama.tasks.p3 import config_name
from mtllama.tasks.promptsource import TRUNCATE, read_templates, templates_folder

ONE = """dataset: films
templates:
  0f: !Template
    answer_choices: bad ||| good
    id: 0f
    jinja: "{{text}} Was it good? ||| {{ answer_choices[label] }}"
    metadata: !TemplateMetadata
      choices_in_prompt: false
      metrics:
      - Accuracy
      original_task: true
    name: was it good
    reference: ''
"""


@pytest.fixture(scope="module")
def checkout(shared_data: Path) -> Path:
    folder = shared_data.parent / "promptsource-0.1.0"
    if not folder.is_dir():
        pytest.skip("the templates of promptsource 0.1.0 are not beside this checkout")
    return folder


def put(folder: Path, name: str, text: str) -> Path:
    file = folder / name / "templates.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("inside", ["", "templates", "promptsource/templates"])
def test_a_template_is_read_with_all_that_is_recorded_of_it(tmp_path: Path, inside: str) -> None:
    put(tmp_path / inside, "films", ONE)
    (template,) = read_templates(tmp_path, "films")
    assert templates_folder(tmp_path) == tmp_path / inside
    assert (template.name, template.answer_choices) == ("was it good", "bad ||| good")
    assert template.metadata.original_task and not template.metadata.choices_in_prompt and template.metadata.metrics == ("Accuracy",)
    assert template.truncate == TRUNCATE == 2048 and template.lenient
    example = template.render({"text": "It sang.", "label": 1}, task="films")
    assert example is not None
    assert (example.inputs, example.targets, example.choices) == ("It sang. Was it good?", "good", ("bad", "good"))


def test_the_cut_of_long_variables_is_an_option(tmp_path: Path) -> None:
    put(tmp_path, "films", ONE)
    row = {"text": "so " * 2000, "label": 0}
    (cut,), (whole,) = read_templates(tmp_path, "films"), read_templates(tmp_path, "films", None)
    short, long = cut.render(row, task="films"), whole.render(row, task="films")
    assert short is not None and long is not None
    assert short.inputs == ("so " * 2000)[:2045].rsplit(" ", 1)[0] + "... Was it good?"
    assert long.inputs == ("so " * 2000) + " Was it good?"


def test_a_set_that_the_checkout_does_not_have_has_no_templates(tmp_path: Path) -> None:
    put(tmp_path, "films", ONE)
    assert read_templates(tmp_path, "songs") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("templates: [", "cannot be read"),
        (ONE.replace("!TemplateMetadata", "!!python/object/apply:os.system"), "cannot be read: could not determine a constructor"),
        ("a: 1", "the key templates is missing"),
        (ONE.replace("    name: was it good\n", ""), "template 0f: its name is missing"),
        (ONE.replace('    jinja: "{{text}} Was it good? ||| {{ answer_choices[label] }}"\n', ""), "template 0f: its jinja is missing"),
        (ONE.replace("bad ||| good", "[1]"), "template 0f: its answer_choices is not text"),
        (ONE + ONE.split("templates:\n")[1].replace("0f", "1f"), "two templates are called 'was it good'"),
    ],
)
def test_a_broken_file_is_one_line_that_names_it(tmp_path: Path, text: str, message: str) -> None:
    file = put(tmp_path, "films", text)
    with pytest.raises(UserError) as raised:
        read_templates(tmp_path, "films")
    assert str(raised.value).startswith(str(file)) and message in str(raised.value) and "\n" not in str(raised.value)


def test_a_folder_without_templates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no promptsource templates"):
        read_templates(tmp_path, "films")


def test_all_313_templates_of_the_t0_mixture_are_read_under_their_p3_names(checkout: Path) -> None:
    ours = {
        config_name(task.name, template.name): (template.metadata.original_task, bool(template.answer_choices))
        for task in catalog().values()
        if GROUPS["t0-train"](task)
        for template in read_templates(checkout, task.promptsource or "")
    }
    with open(checkout.parent / "t0" / "t0_tasks.csv", encoding="utf-8") as handle:
        theirs = {
            line["p3_config"]: (line["original_task"] == "1", line["has_answer_choices"] == "1")
            for line in csv.DictReader(handle)
            if line["first_mixture"] == "T0"
        }
    assert len(theirs) == 313
    assert ours == theirs


def test_every_template_that_fits_the_columns_asks_some_real_row(checkout: Path, shared_data: Path) -> None:
    """Without the 17 fine-grained labels and the columns that the local copies lack, all of them do."""
    asked, unfit = 0, []
    for task in catalog().values():
        try:
            rows = load_rows(task, shared_data / ("train" if task.role == "train" else "eval"), "train" if task.role == "train" else None)
        except UserError as error:
            assert "no file for the split" in str(error)
            continue
        for template in read_templates(checkout, task.promptsource or ""):
            if template.variables - rows.rows[0].keys():
                unfit.append((task.name, template.name))
                continue
            some = next((i for i in range(len(rows.rows)) if rows.render(i, template)), None)
            assert some is not None, f"{task.name}/{template.name} asks no row"
            asked += 1
    assert asked > 300
    assert all(name == "cos_e_v1.11" for name, _ in unfit), unfit
