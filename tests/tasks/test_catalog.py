"""The catalogue: every entry is whole, and the training sets are T0's."""

import csv
import difflib
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from mtllama.errors import MissingDataError, UserError
from mtllama.tasks import catalog as catalog_module
from mtllama.tasks.catalog import Rows, Task, catalog, data_folder, find_tasks, load_rows, sampler_dir

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


def sampler_rows(name: str) -> Rows:
    return load_rows(catalog()[name], sampler_dir())


def training_sets() -> list[Task]:
    return [task for task in catalog().values() if task.role == "train"]


def test_every_file_of_the_catalogue_is_an_entry_of_the_same_name() -> None:
    files = sorted(Path(catalog_module.__file__).with_name("catalog").glob("*.yaml"))
    entries = 0
    for file in files:
        written = yaml.safe_load(file.read_text(encoding="utf-8"))
        languages = tuple(written.get("languages", ()))
        names = [f"{file.stem}-{language}" for language in languages] or [file.stem]
        if "pairs" in written:
            names += [f"{file.stem}-{context}-{question}" for context, question in itertools.permutations(languages, 2)]
        for name in names:
            assert catalog()[name].name == name
            assert [prompt["name"] for prompt in written["prompts"]] == [prompt.name for prompt in catalog()[name].prompts]
        entries += len(names)
    assert entries == len(catalog()) > len(files) >= 27


VALIDATED = {"wiki_bio": "val"}
"""Training sets whose publisher calls the validation split otherwise."""
WITHOUT_VALIDATION = {
    "ag_news", "amazon_polarity", "app_reviews", "dbpedia_14", "imdb", "trec", "yelp_polarity", "yelp_review_full",
}  # fmt: skip
"""Training sets that were published without one."""


def test_a_training_sets_validation_split_is_a_published_one_and_never_its_test_split() -> None:
    found = {task.name: task.validation for task in training_sets()}
    assert {name for name, split in found.items() if split is None} == WITHOUT_VALIDATION
    for task in training_sets():
        if task.name not in WITHOUT_VALIDATION:
            assert task.validation == VALIDATED.get(task.name, "validation") and task.splits[task.validation] > 0, task.name
    others = {"mnli": "validation_matched", "anli_r2": "dev_r2", "xstorycloze-en": "eval", "xwinograd-en": None, "mlqa-de": "validation"}
    assert {name: catalog()[name].validation for name in others} == others


@pytest.mark.parametrize("file", ["wiki_bio/val.jsonl", "wiki_bio/validation.jsonl"])
def test_validation_rows_are_found_under_the_publishers_name_of_the_split_and_under_ours(tmp_path: Path, file: str) -> None:
    (source,) = (sampler_dir() / "sst2").glob("validation.jsonl")  # any rows: columns are added
    row = json.loads(source.read_text(encoding="utf-8").splitlines()[0]) | dict.fromkeys(catalog()["wiki_bio"].columns, "x")
    (tmp_path / "wiki_bio").mkdir()
    (tmp_path / file).write_text(json.dumps(row) + "\n", encoding="utf-8")
    rows = load_rows(catalog()["wiki_bio"], tmp_path, "validation")
    assert rows.split == Path(file).stem and len(rows.rows) == 1


def test_a_set_that_was_published_without_a_validation_split_is_missing_there_not_replaced_by_its_test_split(tmp_path: Path) -> None:
    (tmp_path / "imdb").mkdir()
    (tmp_path / "imdb" / "test.jsonl").write_text('{"text": "x", "label": 0}\n', encoding="utf-8")
    with pytest.raises(MissingDataError, match="imdb: its publisher has no validation split; pass --data-dir with a file imdb/valid"):
        load_rows(catalog()["imdb"], None, "validation")
    with pytest.raises(MissingDataError, match="imdb: no file for the split validation in"):
        load_rows(catalog()["imdb"], tmp_path, "validation")
    assert load_rows(catalog()["imdb"], tmp_path).split == "test"


NOT_HERE = {"multi_news", "quarel", "wiki_hop_original", "wiqa"}
"""Training sets that are not among the real ones."""


def test_the_validation_rows_that_are_there_render_and_can_be_judged(shared_data: Path) -> None:
    found, judged = set(), Counter[str]()
    for task in training_sets():
        try:
            rows = load_rows(task, shared_data / "train", "validation")
        except MissingDataError:
            continue
        found.add(task.name)
        made = [example for index in range(min(50, len(rows.rows))) if (example := rows.render(index, task.prompts[0]))]
        assert len(made) > 20, task.name
        assert all(bool(example.choices) == (task.metric == "accuracy") for example in made), task.name
        judged[task.metric] += len(made)
    assert found == {task.name for task in training_sets()} - NOT_HERE
    assert set(judged) == {"accuracy", "f1", "rougeL"} and judged.total() > 1500


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
    ours = {task.name: str(task.splits["train"]) for task in training_sets()}
    shared = ours.keys() & theirs.keys()
    assert ours.keys() - shared == {"yelp_polarity"}
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
