"""Sets of the catalogue with something of their own: TREC's two numberings, tables, joined articles, withheld labels."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mtllama.tasks.catalog import Rows, catalog, load_rows
from mtllama.tasks.promptsource import read_templates
from mtllama.tasks.template import Example

COARSE = ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]
"""TREC's coarse labels as the hub numbers them today."""
FINE = {
    "ABBR": "abb exp",
    "ENTY": "animal body color cremat currency dismed event food instru lang letter other plant product religion sport substance "
    "symbol techmeth termeq veh word",
    "DESC": "def desc manner reason",
    "HUM": "gr ind title desc",
    "LOC": "city country mount other state",
    "NUM": "code count date dist money ord other period perc speed temp volsize weight",
}
"""TREC's fine labels as the hub numbers them today, one coarse label after the other."""
OLD_COARSE = ["DESC", "ENTY", "ABBR", "HUM", "NUM", "LOC"]
OLD_FINE = (
    "manner cremat animal exp ind gr title def date reason event state desc count other letter religion food country color termeq "
    "city body dismed mount money product period substance sport plant techmeth volsize instru abb speed word lang perc code dist "
    "temp symbol ord veh weight currency"
)
"""The numbering that promptsource's templates know: fine labels of one name were one label."""


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> Rows:
    """Rows as they come out of a file."""
    (folder / name).mkdir()
    (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_rows(catalog()[name], folder, "train")


def render_all(rows: Rows, index: int = 0) -> dict[str, Example]:
    """Every prompt that applies to a row."""
    examples = {template.name: rows.render(index, template) for template in rows.task.prompts}
    return {name: example for name, example in examples.items() if example}


def test_trecs_labels_are_renumbered_by_name_for_promptsources_templates(tmp_path: Path) -> None:
    names = [(coarse, fine) for coarse in COARSE for fine in FINE[coarse].split()]
    assert len(names) == 50 and len(OLD_FINE.split()) == 47
    today = [
        {"text": f"{coarse}:{fine} ?", "coarse_label": COARSE.index(coarse), "fine_label": number}
        for number, (coarse, fine) in enumerate(names)
    ]
    rows = written(tmp_path, "trec", today)
    for index, (coarse, fine) in enumerate(names):
        row = rows.rows[index]
        assert row["text"] == f"{coarse}:{fine} ?"
        assert (OLD_COARSE[row["label_coarse"]], OLD_FINE.split()[row["label_fine"]]) == (coarse, fine)
    assert {row["label_fine"] for row in rows.rows} == set(range(47))


def test_trec_rows_that_have_the_old_labels_keep_them(tmp_path: Path) -> None:
    row = {"text": "Who ?", "coarse_label": 3, "fine_label": 29, "label_coarse": 5, "label_fine": 46}
    assert written(tmp_path, "trec", [row]).rows[0] == row


def test_trec_rows_without_fine_labels_can_be_asked_for_the_coarse_one(tmp_path: Path) -> None:
    rows = written(tmp_path, "trec", [{"text": "How many legs has a spider ?", "coarse_label": 5}])
    assert rows.rows[0]["label_coarse"] == OLD_COARSE.index("NUM") and "label_fine" not in rows.rows[0]
    assert {example.targets for example in render_all(rows).values()} == {"number", "Numeric value", "a number or date", "Number"}


REAL: dict[str, tuple[str, str, float]] = {
    "How many ": ("Quantity", "Count", 0.95),
    "How much does ": ("Quantity", "Price", 0.6),
    "How far ": ("Quantity", "Distance", 0.9),
    "How fast ": ("Quantity", "Speed", 0.8),
    "How long did ": ("Quantity", "Period", 0.9),
    "When ": ("Quantity", "Date", 0.95),
    "What year ": ("Quantity", "Date", 0.95),
    "Why ": ("Description", "Reason", 0.95),
    "How do ": ("Description", "Manner", 0.9),
    "What does the abbreviation ": ("Abbreviation", "Expression abbreviated", 0.95),
    "Who was ": ("Person", "Individual", 0.7),
    "Who wrote ": ("Person", "Individual", 0.95),
    "What company ": ("Person", "Group", 0.9),
    "What city ": ("Location", "City", 0.9),
    "What country ": ("Location", "Country", 0.9),
    "What state ": ("Location", "State", 0.8),
    "What book ": ("Entity", "Creative Piece", 0.8),
    "What disease ": ("Entity", "Disease or medicine", 0.9),
    "What animal ": ("Entity", "Animal", 0.9),
    "What color ": ("Entity", "Color", 0.9),
    "What sport ": ("Entity", "Sport", 0.9),
    "What language ": ("Entity", "Language", 0.9),
}
"""How a question begins -> the kinds of answer it asks for, coarse and fine, and the least share of such questions that do."""


def test_promptsources_answers_about_trec_are_true_of_real_questions(shared_data: Path) -> None:
    templates = {template.name: template for template in read_templates(shared_data.parent / "promptsource-0.1.0", "trec")}
    assert set(catalog()["trec"].p3_templates) <= set(templates)
    rows = load_rows(catalog()["trec"], shared_data / "train", "train")
    asked, right = Counter[str](), Counter[str]()
    for index, row in enumerate(rows.rows):
        for start, (coarse, fine, _) in REAL.items():
            if row["text"].startswith(start):
                answers = [rows.render(index, templates[name]) for name in ("trec1", "fine_grained_open")]
                asked[start] += 1
                right[start] += [answer.targets for answer in answers if answer] == [coarse, fine]
    assert len(asked) == len(REAL) and asked.total() > 700
    short = {start: right[start] / asked[start] for start, (_, _, share) in REAL.items() if right[start] < share * asked[start]}
    assert not short


def test_articles_of_multi_news_are_separated_and_the_dash_of_the_summary_goes(tmp_path: Path) -> None:
    row = {"document": "One paper | page 2. \n ||||| Another paper. ||||| ", "summary": "– Two papers agree – for once."}
    made = render_all(written(tmp_path, "multi_news", [row]))
    assert len(made) == 3
    for example in made.values():
        assert example.targets == "Two papers agree – for once."
        assert "|||" not in example.inputs and "–" not in example.inputs
        assert example.inputs.index("One paper | page 2.") < example.inputs.index("Another paper.")
    assert "* One paper | page 2.\n\n* Another paper.\n" in made["press_review"].inputs
    assert made["press_review"].inputs.count("*") == 2, "nothing for the end of the document, which is no article"


def test_tables_of_wiki_bio_are_told_with_fields_and_values_in_their_order(tmp_path: Path) -> None:
    table = {"column_header": ["name", "birth_place", "article_title"], "row_number": [1, 1, 1]}
    table["content"] = ["ada lovelace", "london -lrb- england -rrb-", "ada lovelace"]
    row = {"input_text": {"table": table, "context": "ada lovelace\n"}, "target_text": "ada lovelace -lrb- 1815 -rrb- was a writer .\n"}
    made = render_all(written(tmp_path, "wiki_bio", [row]))
    sentence = "ada lovelace (1815) was a writer ."
    assert made.pop("whose_life").targets == "ada lovelace"
    assert len(made) == 3 and {example.targets for example in made.values()} == {sentence}
    assert all("london (england)" in example.inputs and sentence not in example.inputs for example in made.values())
    assert "Fields: name; birth place; article title\nValues: ada lovelace; london (england); ada" in made["table_rows"].inputs


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("glue_qqp", {"question1": "Why?", "question2": "How so?", "label": 1}),
        ("imdb", {"text": "A film.<br /><br />A good one.", "label": 1}),
    ],
)
def test_a_row_whose_label_is_withheld_gets_no_target(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    rows = written(tmp_path, name, [row, {**row, "label": -1}])
    assert len(render_all(rows, 0)) == 4
    assert render_all(rows, 1) == {}


def test_marks_of_other_formats_in_reviews_become_what_they_stand_for(tmp_path: Path) -> None:
    imdb = render_all(written(tmp_path, "imdb", [{"text": "A film.<br /><br />A good one.", "label": 1}]))
    yelp = [{"text": r"Open late.\n\nThe \"chef\" sang.", "label": 4}]
    full = render_all(written(tmp_path, "yelp_review_full", yelp))
    polarity = render_all(written(tmp_path, "yelp_polarity", [{**yelp[0], "label": 1}]))
    assert (len(imdb), len(full), len(polarity)) == (4, 4, 3)
    assert all("A film.\n\nA good one." in example.inputs for example in imdb.values())
    assert all('Open late.\n\nThe "chef" sang.' in example.inputs for example in (*full.values(), *polarity.values()))


def test_the_best_review_of_an_app_is_five_stars_and_the_worst_one(tmp_path: Path) -> None:
    rows = written(tmp_path, "app_reviews", [{"review": "Fine.", "star": star, "package_name": "org.example"} for star in range(1, 6)])
    targets = [[example.targets for example in render_all(rows, index).values()] for index in range(5)]
    assert targets[0] == ["1", "very low", "hates it", "one star"]
    assert targets[4] == ["5", "very high", "loves it", "five stars"]
