"""Evaluation items in training rows: what is found, what is not, and what is told apart as boilerplate."""

import json
import random
import string
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama.data import contamination
from mtllama.data.contamination import EXACT, GRAM, RULES, SENTENCE, Overlap, Passages, Report, check, passages
from mtllama.errors import UserError

NAMES = """amber basket candle dagger ember falcon garnet hollow ivory jacket kernel lantern marble nectar orchid pebble quartz
ribbon saddle timber umber velvet walnut yellow zephyr"""
WORDS = NAMES.split()
"""None is a part of another, and none makes `n't`."""


def texts(name: str, *rows: str | Sequence[str]) -> Passages:
    """A set of rows, each of one text or of several fields."""
    fields = [
        (number, f"c{place}", text) for number, row in enumerate(rows) for place, text in enumerate([row] if isinstance(row, str) else row)
    ]
    return Passages(name, fields)


def compare(train: Iterable[str | Sequence[str]], evaluation: Iterable[str | Sequence[str]]) -> Report:
    return check([texts("train", *train)], [texts("eval", *evaluation)])


def counts(report: Report) -> dict[str, tuple[int, int]]:
    """(items, rows) found by each rule between two sets."""
    return {each.rule: (each.eval_items, each.train_rows) for each in report.overlaps if each.eval_items}


def boilerplate(report: Report) -> dict[str, tuple[int, int]]:
    return {each.rule: (each.boilerplate_items, each.boilerplate_rows) for each in report.overlaps if each.boilerplate_items}


def overlap(report: Report, train_set: str, eval_set: str, rule: str) -> Overlap:
    return next(each for each in report.overlaps if (each.train_set, each.eval_set, each.rule) == (train_set, eval_set, rule))


@pytest.mark.parametrize(
    "other",
    [
        "the falcon isn't in the amber basket",
        "THE FALCON ISN'T IN THE AMBER BASKET!!!",
        "  The falcon,\tisn't -- in the\n(amber) “basket”.",
        "the falcon is n't in the amber basket .",
        "the falcon isn ’ t in the amber basket",
        "the fal\u00adcon isnt in the amber basket",
        "Ｔｈｅ ｆａｌｃｏｎ isn’t in the\u00a0amber\u3000basket",
        "the falcon isn't -LRB- in the -RRB- amber<br />basket",
        "the falcon isn't in the amber basket\\n",
        "_the_falcon_isn't_in_the_amber_basket_",
    ],
)
def test_a_field_is_found_whatever_its_case_punctuation_and_spacing(other: str) -> None:
    text = "The falcon isn't in the amber basket."
    for train, evaluation in ((text, other), (other, text)):
        report = compare(["nothing of it", train], ["quite another thing", "and one more thing", evaluation])
        assert counts(report)[EXACT] == (1, 1)
        assert report.rows("train") == {1} and report.items("eval") == {2}


def test_an_accent_and_a_word_more_are_no_equal_field() -> None:
    assert not compare(["résumé of the amber basket"], ["resume of the amber basket"]).overlaps
    assert EXACT not in counts(compare(["the amber basket of a falcon"], ["the amber basket of a falcons"]))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("amber candle", False),
        ("an ember", False),
        ("so it isnt", False),
        ("so it is no", False),
        ("so it is not", True),
        ("in it is amber", True),
    ],
)
def test_a_field_counts_from_three_words_and_twelve_characters(text: str, found: bool) -> None:
    assert (EXACT in counts(compare([text], [text]))) == found


FULL, SHORT = "blue heron eats tiny frog", "blue heron eat tiny frog"


def test_a_sentence_counts_from_25_characters() -> None:
    assert (len(FULL), len(SHORT)) == (25, 24)
    for sentence, found in ((FULL, {SENTENCE: (1, 1)}), (SHORT, {})):
        one = f"First of all. {sentence.title()}! Then more."
        other = f"They say {sentence} every day of summer"
        assert counts(compare([other], [one])) == found
        assert counts(compare([one], [other])) == found


@pytest.mark.parametrize(
    "text", ["{} from May to June", "In May, {}", "In May, {} until June", "In May?\n{}\nUntil June", "In May... {}... Until June"]
)
def test_a_sentence_is_found_at_the_start_at_the_end_and_within(text: str) -> None:
    report = compare([text.format(FULL)], [f"Look. {FULL}. Done."])
    assert counts(report) == {SENTENCE: (1, 1)}
    assert report.overlaps[0].findings[0].passage == FULL


def test_a_sentence_is_found_from_word_to_word_only() -> None:
    assert counts(compare([f"in May {FULL} too"], [f"Look. {FULL}."]))
    assert not compare([f"in May {FULL}s too"], [f"Look. {FULL}."]).overlaps
    assert not compare([f"in May navy{FULL} too"], [f"Look. {FULL}."]).overlaps


@pytest.mark.parametrize("verb", ["didn't", "did n't", "didn’t", "did nt", "DIDN'T", "did n ' t"])
def test_a_clitic_is_a_word_however_it_is_written(verb: str) -> None:
    for one, other in ((verb, "didn't"), ("didn't", verb)):
        report = compare([f"It {one} open in the amber lantern for long."], [f"Well. It {other} open in the amber lantern. No."])
        assert counts(report) == {SENTENCE: (1, 1)}
        assert report.overlaps[0].findings[0].passage == "it did nt open in the amber lantern"


def test_a_sentence_does_not_end_at_a_title_or_an_initial() -> None:
    one = "Yesterday all the others went to see {} Walnut of the amber house."
    other = "Yesterday all the others went to see {} Pebble and the basket."
    for title in ("Dr.", "Mr .", "J. R.", "J . R ."):
        assert not compare([other.format(title)], [one.format(title)]).overlaps
    assert counts(compare([other.format("it.")], [one.format("it.")])) == {SENTENCE: (1, 1)}


def test_a_sentence_over_two_fields_is_not_found() -> None:
    long = " ".join(WORDS[:14])
    assert counts(compare([long], [long]))
    first, second = " ".join(WORDS[:7]), " ".join(WORDS[7:14])
    for split in ([first, second], [second, first]):
        assert counts(compare([split], [long])) == {SENTENCE: (1, 1)}  # each half is a sentence of its own
        assert not compare([[f"nickel {first}", f"{second} copper"]], [long]).overlaps
        assert not compare([long], [[f"nickel {first}", f"{second} copper"]]).overlaps
    assert not compare([f"nickel {first}", f"{second} copper"], [long]).overlaps


@pytest.mark.parametrize("before", ["", "one two "])
@pytest.mark.parametrize("after", ["", " three four"])
def test_thirteen_words_in_common_are_found_and_twelve_are_not(before: str, after: str) -> None:
    for number, found in ((13, {GRAM: (1, 1)}), (12, {})):
        common = " ".join(WORDS[:number])
        # Neither text is a sentence of the other: each has a word of its own around what is in common.
        report = compare([f"{before}{common}{after} five"], [f"six {common} seven"])
        assert counts(report) == found
        if found:
            assert report.overlaps[0].findings[0].passage == common


def test_what_is_shown_of_a_13_gram_is_all_that_is_in_common() -> None:
    report = compare([f"One two: {' '.join(WORDS[:20])} three."], [f"Four. {' '.join(WORDS[:20]).upper()}; five"])
    assert counts(report) == {GRAM: (1, 1)}
    (overlap,) = report.overlaps
    (finding,) = overlap.findings
    assert finding.passage == " ".join(WORDS[:20])
    assert finding.train_text == f"One two: {' '.join(WORDS[:20])} three."
    assert finding.eval_text == f"Four. {' '.join(WORDS[:20]).upper()}; five"
    assert (finding.train_row, finding.train_column, finding.eval_row, finding.eval_column) == (0, "c0", 0, "c0")


CHINESE = "黑豹队的防守只丢了三百分在联赛中排名第六"
HINDI = ["हालांकि", "मैं", "इसके", "बारे", "में", "सोच", "भी", "नहीं", "रहा", "था", "लेकिन", "मुझे", "वापस"]
THAI = "สิ่งของถูกห่อไว้ในพลาสติกกันกระแทกอย่างดี"


def test_characters_stand_for_words_where_a_script_has_no_blanks() -> None:
    assert len(set(CHINESE)) == len(CHINESE) == 20
    for number, found in ((13, {GRAM: (1, 1)}), (12, {})):
        assert counts(compare([f"他{CHINESE[:number]}我"], [f"她{CHINESE[:number]}你"])) == found
    assert counts(compare([f"他。{CHINESE[:13]}。我"], [f"在，{CHINESE[:13]}你"]))[SENTENCE] == (1, 1)
    assert SENTENCE not in counts(compare([f"他。{CHINESE[:12]}。我"], [f"在，{CHINESE[:12]}你"]))
    assert not compare([f"他2008年{CHINESE[:9]}我"], [f"她2009年{CHINESE[:9]}你"]).overlaps


def test_marks_belong_to_their_letters() -> None:
    assert contamination._tokens(" ".join(HINDI)) == HINDI
    assert len(HINDI) == 13
    assert counts(compare([f"एक {' '.join(HINDI)} दो"], [f"तीन {' '.join(HINDI)} चार"])) == {GRAM: (1, 1)}
    assert not compare([f"एक {' '.join(HINDI[1:])} दो"], [f"तीन {' '.join(HINDI[1:])} चार"]).overlaps
    clusters = contamination._tokens(THAI)
    assert "".join(clusters) == THAI and 13 <= len(clusters) < len(THAI) * 2 / 3


def test_instructions_in_many_texts_are_boilerplate() -> None:
    instruction = "Choose of the amber and the velvet baskets the one that the falcon would not have taken home"
    items = [f"{instruction} in winter."]
    for number, found in ((contamination.MANY_TEXTS, True), (contamination.MANY_TEXTS + 1, False)):
        rows = [f"Row {each} goes: {instruction} on day {each * 7}." for each in range(number)]
        for report in (compare(rows, items), compare(items, rows)):
            assert (GRAM in counts(report)) == found
            assert (GRAM in boilerplate(report)) != found
            (overlap,) = report.overlaps
            assert bool(overlap.findings) == found and bool(overlap.boilerplate) != found
            assert all(not finding.boilerplate for finding in overlap.findings)
            if not found:
                assert f"in {number} texts of" in overlap.boilerplate[0].boilerplate
                assert not report.rows("train") and not report.items("eval")
    # An item with more than that is found, and not counted as boilerplate alone.
    rest = " ".join(WORDS[10:24])
    report = compare([*rows, f"Copper {rest} nickel."], [*items, f"Now {instruction}, and silver {rest} gold"])
    assert counts(report)[GRAM] == (1, 1) and boilerplate(report)[GRAM] == (1, len(rows))
    assert report.items("eval") == {1}


def test_the_same_instructions_with_another_word_are_boilerplate_too() -> None:
    instruction = "a species of amber snail and a velvet gastropod mollusk in the family of orchids"
    rows = [f"{word}{each} is {instruction}" for each, word in enumerate(WORDS[: contamination.MANY_TEXTS + 1])]
    changed = instruction.replace("amber snail", "amber sea snail")
    assert len(changed.split()) == 16
    alone = compare([f"timber is {changed}"], [f"velvet was {changed} too"])
    assert counts(alone)[GRAM] == (1, 1)
    known = f"marble and {instruction}"
    report = compare([*rows, f"timber is {changed}"], [f"velvet was {changed} too", known])
    assert not counts(report) and boilerplate(report)[GRAM] == (2, 12)
    # What is not boilerplate in a text is still found.
    more = f"{changed} {' '.join(WORDS[10:24])}"
    assert counts(compare([*rows, f"timber is {more}"], [f"velvet was {more} too", known]))[GRAM] == (1, 1)


def test_a_question_to_many_contexts_is_boilerplate_and_a_context_with_many_questions_is_not() -> None:
    question = "Who of the orchids had the velvet basket?"
    context = "There was a candle that had no ember, and nobody knew about the lantern of the {}."
    for number, found in ((contamination.MANY_ROWS, True), (contamination.MANY_ROWS + 1, False)):
        rows = [(question, context.format(each)) for each in range(number)]
        for asked in (rows, [(question.replace("orchids", "or-chids"), context) for question, context in rows]):
            report = compare(asked, [question])
            assert (counts(report).get(EXACT) == (1, number)) == found
            assert (boilerplate(report).get(EXACT) == (1, number)) != found
    one = context.format("marble")
    rows = [(f"What about number {each}?", one) for each in range(40)]
    report = compare(rows, [one, *(f"Nothing of {each}" for each in range(9))])
    assert counts(report)[EXACT] == (1, 40) and not boilerplate(report)


def test_a_common_phrase_is_boilerplate_unless_it_is_all_that_an_item_says() -> None:
    phrase = "Which of the following is true?"
    words = ["which", "is", "the", "true", "of", "following"]
    rows = [" ".join(words * 100) + f" {number}" for number in range(300)]
    report = compare([*rows, f"Tell me: {phrase} Or not?"], [f"{phrase} {FULL} today?"])
    assert boilerplate(report) == {SENTENCE: (1, 1)}
    assert all(finding.boilerplate == "a common phrase" for overlap in report.overlaps for finding in overlap.boilerplate)
    assert report.items("eval") == set()
    assert counts(compare([*rows, f"Tell me: {phrase} Or not?"], [phrase])) == {SENTENCE: (1, 1)}
    assert counts(compare([*rows, phrase], [phrase])) == {EXACT: (1, 1), SENTENCE: (1, 1)}
    short = "Is the following true?"
    assert boilerplate(compare([*rows, short], [short])) == {EXACT: (1, 1)}, "under 25 characters"


def test_counts_are_exact_while_few_findings_are_shown() -> None:
    copies = [f"Basket {number} of the amber and velvet falcon was sold at noon" for number in range(12)]
    report = check(
        [texts("one", *copies, *copies, "and nothing"), texts("two", "nothing here", copies[3])],
        [texts("a", "Nothing at all", *copies[:10]), texts("b", (copies[3], copies[4]), "Nothing else")],
    )
    found = {(each.train_set, each.eval_set): (each.eval_items, each.train_rows) for each in report.overlaps if each.rule == EXACT}
    assert found == {("one", "a"): (10, 20), ("one", "b"): (1, 4), ("two", "a"): (1, 1), ("two", "b"): (1, 1)}
    assert report.rows("one") == {*range(10), *range(12, 22)} and report.rows("two") == {1}
    assert report.items("a") == set(range(1, 11)) and report.items("b") == {0}
    assert report.train_sizes == {"one": 25, "two": 2} and report.eval_sizes == {"a": 11, "b": 2}
    (first,) = (each for each in report.overlaps if (each.train_set, each.eval_set, each.rule) == ("one", "a", EXACT))
    assert [(each.eval_row, each.train_row) for each in first.findings] == [(row, row - 1) for row in range(1, 1 + contamination.SHOWN)]


def test_sets_without_texts_have_no_findings() -> None:
    for train, evaluation in (([], []), (["a text of some words"], []), ([], ["a text of some words"]), (["", "?!"], ["", "."])):
        report = compare(train, evaluation)
        assert not report.overlaps and not report.rows("train") and not report.items("eval")
    assert check([], []).lines() == ["0 of 0 evaluation items found in 0 of 0 training rows"]


def test_two_sets_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two sets of one name: a, a, b"):
        check([texts("a", "x"), texts("b", "x"), texts("a", "x")], [])


def corpus(seed: int, number: int) -> list[str]:
    """Texts that share sentences and runs of words with those of other seeds."""
    random_ = random.Random(seed)
    stock = [" ".join(random.Random(each).choices(WORDS, k=5 + each % 20)) for each in range(30)]
    return [". ".join([*random_.sample(stock, 2), " ".join(random_.choices(WORDS, k=9))]) for _ in range(number)]


def test_the_same_texts_give_the_same_report_in_parts_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> Report:
        asked = [("Who had the velvet basket?", f"{text} in the context number {number}") for number, text in enumerate(corpus(8, 30))]
        train = [texts("a", *corpus(1, 40)), texts("b", *corpus(2, 30)), texts("asked", *asked)]
        return check(train, [texts("c", *corpus(3, 20), "Who had the velvet basket?"), texts("d", *corpus(4, 20))])

    expected = run()
    assert len(expected.overlaps) > 6
    assert overlap(expected, "asked", "c", EXACT).boilerplate_rows == 30
    assert run() == expected
    monkeypatch.setattr(contamination, "_BATCH_CHARACTERS", 0)
    monkeypatch.setattr(contamination, "_TOGETHER", 7)
    assert run() == expected


def test_words_decide_where_all_hashes_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    train, evaluation = [*corpus(5, 8), f"They say {FULL} every day"], [*corpus(6, 8), f"{FULL}. {FULL} and fly. {FULL} and fly."]
    expected = compare(train, evaluation)
    assert {SENTENCE, GRAM} <= counts(expected).keys()
    called = []

    def collide(ids: np.ndarray) -> np.ndarray:
        called.append(len(ids))
        return np.zeros(len(ids), np.uint64)

    monkeypatch.setattr(contamination, "_scramble", collide)
    found = compare(train, evaluation)
    assert called
    assert found == expected


def test_a_span_is_of_another_kind_than_one_that_begins_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "_scramble", lambda ids: np.zeros(len(ids), np.uint64))
    words = np.array([5, 6, 7, 5, 6, 7, 5, 6], np.int32)
    first, kind = contamination._distinct(words, np.array([0, 3, 6]), np.array([3, 3, 2]))
    assert (first.tolist(), kind.tolist()) == ([0, 2], [0, 0, 1])


def contains(words: list[str], part: list[str]) -> bool:
    return any(words[at : at + len(part)] == part for at in range(len(words) - len(part) + 1))


def slow(rule: str, train: list[list[str]], evaluation: list[list[str]]) -> tuple[set[int], set[int]]:
    """(items, rows) by the plain meaning of a rule; texts are lists of sentences."""
    items, rows = set(), set()
    for row, one in enumerate(train):
        for item, other in enumerate(evaluation):
            words, other_words = " ".join(one).split(), " ".join(other).split()
            if rule == EXACT:
                hit = words == other_words and len(words) >= 3 and len(" ".join(words)) >= 12
            elif rule == SENTENCE:
                hit = any(len(each) >= 25 and contains(other_words, each.split()) for each in one) or any(
                    len(each) >= 25 and contains(words, each.split()) for each in other
                )
            else:
                hit = any(contains(other_words, words[at : at + 13]) for at in range(len(words) - 12))
            if hit:
                items.add(item)
                rows.add(row)
    return items, rows


SENTENCES = st.lists(st.sampled_from(["amber", "basket", "ember", "so"]), min_size=1, max_size=16).map(" ".join)
PLAIN = st.lists(st.lists(SENTENCES, min_size=1, max_size=3), min_size=1, max_size=4)


@given(train=PLAIN, evaluation=PLAIN, data=st.data())
@settings(max_examples=150)
def test_the_rules_mean_what_a_slow_search_finds(train: list[list[str]], evaluation: list[list[str]], data: st.DataObject) -> None:
    if data.draw(st.booleans()):  # chance alone would seldom bring long runs together
        evaluation[0][0] = " ".join(" ".join(train[0]).split()[:16])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contamination, "EXACT_BITS", 0.0)
        patch.setattr(contamination, "SENTENCE_BITS", 0.0)
        report = compare([". ".join(each) for each in train], [". ".join(each) for each in evaluation])
    for rule in RULES:
        items, rows = slow(rule, train, evaluation)
        assert counts(report).get(rule, (0, 0)) == (len(items), len(rows)), rule


NOISE = st.text(st.sampled_from(' \t\n,;:-()[]"“”*/|'), max_size=3)


@given(words=st.lists(st.sampled_from(WORDS), min_size=13, max_size=40, unique=True), data=st.data())
def test_a_planted_text_is_found_under_any_case_and_punctuation(words: list[str], data: st.DataObject) -> None:
    words = words[:25]
    planted = "".join(
        data.draw(NOISE) + " " + (word.upper() if data.draw(st.booleans()) else word.title()) + data.draw(NOISE) for word in words
    )
    report = compare(["It was copper.", f"They said: {planted} and that was all"], [f"So it began {' '.join(words)} or not"])
    assert report.rows("train") == {1} and report.items("eval") == {0}
    (finding,) = next(each for each in report.overlaps if each.rule == GRAM).findings
    assert finding.passage == " ".join(words)
    assert compare([planted], [" ".join(words)]).overlaps[0].rule == EXACT


@given(one=st.lists(st.text(max_size=80), max_size=4), other=st.lists(st.text(max_size=80), max_size=4))
def test_texts_without_a_common_word_have_no_finding(one: list[str], other: list[str]) -> None:
    latin = str.maketrans(dict.fromkeys(string.ascii_letters + string.digits, " "))
    words = {word for text in one for word in contamination._tokens(text)}
    apart = [text for text in other if not words & set(contamination._tokens(text)) - set(contamination._ENDS)]
    report = compare(one, [text.translate(latin) for text in apart] + apart)
    assert all(each.rule == EXACT for each in report.overlaps)  # equal but for blanks
    assert not {each.rule for each in compare([*one, " ".join(WORDS)], ["copper nickel silver " * 9]).overlaps}


@given(text=st.text(max_size=120) | st.text(st.sampled_from("aZ é’'n t.!?。你สิ่ง\u0301ß İŉ-_<br/>\\n"), max_size=60))
def test_what_is_shown_has_the_words_that_are_compared(text: str) -> None:
    compared = [word.replace("ʼ", "") for word in contamination._tokens(text) if word not in contamination._ENDS]
    clean, spans = contamination._spans(text)
    assert [word for word, _, _ in spans] == compared
    assert all(clean[start:end] for _, start, end in spans)


def test_columns_may_be_paths_and_hold_several_texts() -> None:
    rows = [
        {"question": "who", "answers": {"text": ["he", "she"], "start": [1, 2]}, "turns": [{"say": "yes"}, {"say": None}]},
        {"question": None, "answers": {"text": []}, "turns": []},
        {"question": "what", "answers": None, "turns": [{"say": "no"}, {}]},
    ]
    assert list(passages(rows, ["question", "answers.text", "turns.say"])) == [
        (0, "question", "who"),
        (0, "answers.text", "he"),
        (0, "answers.text", "she"),
        (0, "turns.say", "yes"),
        (2, "question", "what"),
        (2, "turns.say", "no"),
    ]
    assert list(passages([], ["question"])) == []
    with pytest.raises(UserError, match=r"no row has the column 'answers.txt'; the first one has: question, answers, turns"):
        list(passages(rows, ["question", "answers.txt"]))


def test_the_report_is_written_as_text_and_as_json() -> None:
    report = check([texts("books", f"Here {FULL} again", "nothing")], [texts("exam", ("no", "no"), ("ah", f"{FULL}."))])
    assert report.lines() == [
        "books (2 rows) / exam (2 items)",
        "  sentence  1 item in 1 row",
        f"    row 0, c0: Here {FULL} again",
        f"    item 1, c1: {FULL}.",
        "1 of 2 evaluation items found in 1 of 2 training rows",
    ]
    loaded = json.loads(json.dumps(report.to_dict()))
    assert loaded["train"] == {"books": {"rows": 2, "drop": [0]}}
    assert loaded["evaluation"] == {"exam": {"items": 2, "found": [1]}}
    assert loaded["overlaps"][0]["findings"][0]["passage"] == FULL
    rows = [f"{word}: {' '.join(WORDS[:14])} {number}" for number, word in enumerate(WORDS[:11])]
    assert check([texts("books", *rows)], [texts("exam", f"so {' '.join(WORDS[:14])}")]).lines() == [
        "Boilerplate alone, which is not counted:",
        f"  books / exam, 13-gram: 1 item in 11 rows: {' '.join(WORDS[:13])} (in 11 texts of books)",
        "0 of 1 evaluation item found in 0 of 11 training rows",
    ]


def test_a_long_passage_is_cut_in_the_middle() -> None:
    long = " ".join(f"word{number}" for number in range(200))
    (finding,) = check([texts("a", "x " * 80 + long)], [texts("b", long)]).overlaps[0].findings
    assert finding.eval_text.startswith("word0 word1 ") and " … " in finding.eval_text and finding.eval_text.endswith(" word199")
    assert finding.train_text.startswith("…x x") and len(finding.train_text) < 400
    assert finding.passage == long


# The real sets


def real(folder: Path, name: str, file: str, *columns: str) -> tuple[Passages, list[dict[str, str]]]:
    rows = [json.loads(line) for line in (folder / file).read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 400
    return Passages(name, passages(rows, columns)), rows


def test_the_known_overlaps_of_the_real_sets_are_found_and_others_are_not(shared_data: Path) -> None:
    train, pairs = zip(
        real(shared_data, "rotten_tomatoes", "train/rotten_tomatoes/train.jsonl", "text"),
        real(shared_data, "paws", "train/paws_labeled_final/train.jsonl", "sentence1", "sentence2"),
        real(shared_data, "trec", "train/trec/train.jsonl", "text"),
        real(shared_data, "qqp", "train/glue_qqp/train.jsonl", "question1", "question2"),
        strict=True,
    )
    evaluation, held = zip(
        real(shared_data, "sst2", "eval/sst2/validation.jsonl", "sentence"),
        *(
            real(shared_data, f"pawsx-{each}", f"eval/pawsx/{each}.validation.jsonl", "sentence1", "sentence2")
            for each in ("en", "de", "zh")
        ),
        real(shared_data, "openbookqa", "eval/openbookqa/validation.jsonl", "question_stem"),
        strict=True,
    )
    report = check(train, evaluation)

    sst2 = overlap(report, "rotten_tomatoes", "sst2", EXACT)
    assert (sst2.eval_items, sst2.train_rows) == (178, 178)
    assert 0.4 < sst2.eval_items / report.eval_sizes["sst2"] < 0.42
    assert 178 < len(report.items("sst2")) < 230  # parts of reviews beyond those

    def key(row: dict[str, str]) -> frozenset[str]:
        return frozenset("".join(contamination._tokens(row[column])) for column in ("sentence1", "sentence2"))

    known = {key(row) for row in pairs[1]}
    whole = {number for number, row in enumerate(held[1]) if key(row) in known}
    assert 0.45 < len(whole) / 2000 < 0.55
    assert whole <= report.items("pawsx-en")
    assert overlap(report, "paws", "pawsx-en", EXACT).eval_items > 1800
    assert len(report.items("pawsx-de")) <= 1 and not report.items("pawsx-zh")  # one line of names and figures

    for train_set, eval_set in (
        ("trec", "openbookqa"),
        ("qqp", "openbookqa"),
        ("trec", "sst2"),
        ("paws", "openbookqa"),
        ("qqp", "pawsx-en"),
    ):
        assert not [each for each in report.overlaps if (each.train_set, each.eval_set) == (train_set, eval_set) and each.eval_items]
    assert not report.rows("qqp") and not report.rows("trec")
    assert not report.items("openbookqa")


def test_a_long_field_is_found_however_often_it_was_leaked() -> None:
    premise = "The candle of the orchids had a velvet basket, and nobody in the harbour knew about the amber lantern or the falcon."
    rows = [f"Row {number} tells: {premise} And more of {number}." for number in range(3 * contamination.MANY_TEXTS)]
    report = compare(rows, [premise])
    assert counts(report)[SENTENCE] == (1, len(rows))
    assert report.rows("train") == set(range(len(rows)))
