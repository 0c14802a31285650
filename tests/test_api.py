"""The package as Python sees it: generate, score, run a task."""

import shutil
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
import torch

import mtllama
from mtllama.api import Model
from mtllama.errors import UserError
from mtllama.tasks.catalog import catalog, load_rows, sampler_dir
from mtllama.tasks.template import Template


@pytest.fixture(scope="module")
def model(pico: Path) -> Model:
    return mtllama.load_model(str(pico), dtype="float32")


def test_answers_come_alone_together_and_in_pieces(model: Model) -> None:
    prompts = ["Is fog wet?", "One", "Name a colour."]
    together = model.generate(prompts, max_new_tokens=12)
    assert together == [model.generate(prompt, max_new_tokens=12) for prompt in prompts] and len(set(together)) > 1
    assert "".join(model.stream("One", max_new_tokens=12)).rstrip() == together[1]
    drawn = model.generate(prompts, max_new_tokens=12, temperature=1.0, seed=3)
    assert drawn == model.generate(prompts, max_new_tokens=12, temperature=1.0, seed=3) != together
    assert drawn[1] == model.generate("One", max_new_tokens=12, temperature=1.0, seed=4)


def test_a_raw_prompt_is_put_into_no_format(model: Model) -> None:
    engine = model.engine
    text = model.generate("Is fog wet?", max_new_tokens=6, raw=True)
    assert text == engine.tokenizer.decode(engine.continue_ids([engine.encoder.raw_ids("Is fog wet?")], max_new_tokens=6)[0])
    assert model.generate(["Is fog wet?"], max_new_tokens=6, raw=True) == [text] != [model.generate("Is fog wet?", max_new_tokens=6)]


def test_a_lone_stop_string_is_one_and_not_its_letters(model: Model) -> None:
    whole = model.generate("Is fog wet?", max_new_tokens=20, raw=True)
    stop = whole[8:12]
    assert whole.index(stop[0]) < whole.index(stop)  # by its letters it would end sooner
    for prompt in ("Is fog wet?", ["Is fog wet?"]):
        told = model.generate(prompt, max_new_tokens=20, raw=True, stop=stop)
        assert told == model.generate(prompt, max_new_tokens=20, raw=True, stop=[stop])
    assert told == [whole[: whole.index(stop)]]
    assert model.generate(["One"], max_new_tokens=12, stop="e e") == model.generate(["One"], max_new_tokens=12, stop=["e e"])


def test_type_checkers_are_told_that_the_package_has_types() -> None:
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert (files("mtllama") / "py.typed").is_file()
    assert "py.typed" in settings["tool"]["setuptools"]["package-data"]["mtllama"]  # else it stays out of the wheel


def test_scores_are_sums_over_the_answer_and_its_end_marker(model: Model) -> None:
    choices = ["Yes", "No", "It depends", ""]
    found, encoder = model.score("Is fog wet?", choices), model.engine.encoder
    prompt = encoder.whole_prompt_ids("Is fog wet?")
    for choice, text in zip(found.choices, choices, strict=True):
        assert list(choice.token_ids) == encoder.answer_ids(text)
        ids = torch.tensor([prompt + list(choice.token_ids)])
        logits = model.engine.model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)  # one whole pass each, as a reference
        theirs = logits[range(len(choice.token_ids)), list(choice.token_ids)].tolist()
        assert list(choice.logprobs) == pytest.approx(theirs, abs=1e-4)
        assert choice.sum == sum(choice.logprobs) and choice.mean == choice.sum / len(choice.token_ids)
        assert choice.per_char == choice.sum / max(1, len(text))
    assert found.best.sum == max(choice.sum for choice in found.choices)
    assert sum(found.probabilities) == pytest.approx(1) and max(found.probabilities) == found.probabilities[found.best.index]
    accent = model.score("x", ["é"]).choices[0]
    assert accent.per_char == 2 * accent.per_byte


def test_a_task_is_asked_as_evaluation_asks_it(model: Model) -> None:
    rows = load_rows(catalog()["copa"], sampler_dir())
    row, template = rows.rows[0], catalog()["copa"].template(None)
    example = rows.render(0, template)
    assert example is not None
    fields = {name: row[name] for name in template.fields}
    answer = model.run_task("copa", **fields)
    assert answer.prompt == model.engine.encoder.prompt_text(example.inputs) and answer.scores is not None
    assert tuple(choice.text for choice in answer.scores.choices) == example.choices and answer.answer in (example.choices or ())
    asked = model.run_task("squad", context="Paris is in France.", question="Where is Paris?", template="ours_labelled")
    assert asked.scores is None and asked.template == "ours_labelled" and "Where is Paris?" in asked.prompt


def test_every_prompt_of_the_catalogue_asks_the_same_with_and_without_its_answer() -> None:
    asked = 0
    for task in catalog().values():
        try:
            rows = load_rows(task, sampler_dir())
        except UserError:
            continue
        for template in task.prompts:
            for index in range(min(3, len(rows.rows))):
                example = rows.render(index, template)
                if example is None or (example.choices and len(set(example.choices)) < 2):
                    continue
                row = {name: rows.rows[index][name] for name in template.fields}
                question = template.ask(row, task=task.name)
                if "choice" not in template.jinja.replace("answer_choices", ""):  # random picks hang on the row
                    assert question.inputs == example.inputs and question.choices == example.choices
                    asked += 1
    assert asked > 150


def test_a_template_may_hold_longer_rows_of_bars() -> None:
    template = Template("t", "{{ text.split('|||||') | join(' and ') }} ||| {{ label }}")
    assert template.fields == ("text",) and template.ask({"text": "a|||||b"}, task="x").inputs == "a and b"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.generate("x", max_new_tokens=0), "max_new_tokens is 0"),
        (lambda m: m.generate("x", temperature=-1.0), "temperature is -1"),
        (lambda m: m.generate("x", top_p=0.0), "top_p is 0"),
        (lambda m: m.generate("x", stop=[""]), "a stop string is empty"),
        (lambda m: m.generate("word " * 600), "the model reads 512 in all"),
        (lambda m: m.score("x", []), "0 choices"),
        (lambda m: m.score("x", "Yes"), "the choices are one text, 'Yes'; give a list"),
        (lambda m: m.score("x", [""], raw=True), "choice 0 is no token"),
        (lambda m: m.run_task("copa"), "premise, question, choice1, choice2 missing"),
        (lambda m: m.run_task("copa", wrong=1), "missing"),
        (lambda m: m.run_task("nothing"), "nothing"),
        (lambda m: m.run_task("t0-train"), "is a group of data sets"),
        (lambda m: m.run_task("squad", context="", question="", extra=1), "no field extra"),
    ],
)
def test_a_bad_call_is_one_clear_line(model: Model, call: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        call(model)  # type: ignore[operator]


def test_a_model_is_talked_to_in_its_own_format_or_its_chat_template_s(pico: Path, tmp_path: Path) -> None:
    folder = tmp_path / "talking"
    shutil.copytree(pico, folder)
    assert mtllama.load_model(str(folder)).engine.encoder.format.name == "mtllama"
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[answer]\n")
    assert mtllama.load_model(str(folder)).engine.encoder.prompt_text("Hi") == "[user] Hi\n[answer]"
    assert mtllama.load_model(str(folder), format="plain").engine.encoder.format.name == "plain"
