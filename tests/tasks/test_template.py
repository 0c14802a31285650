"""A template makes one example of a row, or declines it, or says what is wrong; it can do nothing else."""

import copy
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama.errors import UserError
from mtllama.tasks import template as template_module
from mtllama.tasks.template import Example, Metadata, Template

ROW = {"text": "Rain fell.", "label": 1, "words": ["sun", "moon"], "answers": {"text": ["dry", "wet"]}, "none": None}


def render(
    jinja: str, row: dict[str, Any] | None = None, choices: str | None = None, *, row_id: str = "7", seed: int = 0
) -> Example | None:
    return Template("ask", jinja, choices).render(ROW if row is None else row, task="weather", row_id=row_id, seed=seed)


def rendered(jinja: str, row: dict[str, Any] | None = None, choices: str | None = None, *, row_id: str = "7", seed: int = 0) -> Example:
    example = render(jinja, row, choices, row_id=row_id, seed=seed)
    assert example is not None, "the template declined the row"
    return example


def refusal(jinja: str, row: dict[str, Any] | None = None, choices: str | None = None) -> str:
    """The message of the error that rendering ends in, after checking that it says where."""
    with pytest.raises(UserError) as raised:
        render(jinja, row, choices)
    message = str(raised.value)
    assert message.startswith("template 'ask' of weather, row 7: ")
    assert "\n" not in message
    return message.removeprefix("template 'ask' of weather, row 7: ")


def test_input_and_target_are_split_at_the_separator_and_stripped() -> None:
    example = rendered("\n  Say: {{ text }}\n\n|||\n {{ words[1] }} \n")
    assert example == Example("Say: Rain fell.", "moon", None, "weather", "ask")


def test_choices_are_stripped_and_at_the_templates_hand() -> None:
    example = rendered("Wet? {{ answer_choices | join(' or ') }} ||| {{ answer_choices[label] }}", choices="  No |||\n Yes  ")
    assert example.choices == ("No", "Yes")
    assert (example.inputs, example.targets) == ("Wet? No or Yes", "Yes")


def test_choices_may_be_joined_by_separators_inside_an_expression() -> None:
    assert rendered("Which? ||| {{ words[0] }}", choices="{{ words | join(' ||| ') }}").choices == ("sun", "moon")


@pytest.mark.parametrize("target", ["", "   \n ", "{% if label == 0 %}{{ text }}{% endif %}", "{{ '' }}"])
def test_an_empty_target_declines_the_row(target: str) -> None:
    assert render("{{ text }} |||" + target) is None
    assert render("{{ text }} |||" + target + " x") is not None, "the input was not at fault"


def test_a_target_that_is_not_among_the_choices_is_refused() -> None:
    assert refusal("{{ text }} ||| maybe", choices="No ||| Yes") == "the target 'maybe' is not among the choices ['No', 'Yes']"


def test_an_empty_input_is_refused() -> None:
    assert "the input renders to nothing" in refusal("{{ '' }} ||| yes")


@pytest.mark.parametrize(("jinja", "number"), [("{{ text }}", 0), ("{{ text }} ||| a ||| b", 2), ("{{ text }} |||||| b", 2)])
def test_any_number_of_separators_but_one_is_refused(jinja: str, number: int) -> None:
    assert refusal(jinja) == f"its rendering has {number} separators '|||'; exactly one is needed"


@pytest.mark.parametrize("expression", ["txet", "txet | trim", "answers.txet", "answers.txet[0]"])
def test_an_undefined_column_is_refused_and_the_known_ones_named(expression: str) -> None:
    message = refusal(f"{{{{ {expression} }}}} ||| a", choices="a ||| b")
    assert "txet" in message
    assert message.endswith("columns of the row: text, label, words, answers, none")


@pytest.mark.parametrize(
    ("jinja", "part"),
    [
        ("{{ text | shout }} ||| a", "No filter named 'shout'"),
        ("{% if label %} x ||| a", "Unexpected end of template"),
        ("{{ text ||| a", "expected token"),
        ("{{ 1 / (label - 1) }} ||| a", "division by zero"),
        ("{{ words | choice(3) }} ||| a", "argument"),
        ("{{ [] | choice }} ||| a", "empty"),
        ("{% include 'other' %} ||| a", "no loader"),
    ],
)
def test_a_template_that_is_broken_is_refused(jinja: str, part: str) -> None:
    assert part.lower() in refusal(jinja).lower()


def test_broken_choices_are_refused_like_a_broken_prompt() -> None:
    assert "No filter named 'shout'" in refusal("{{ text }} ||| a", choices="{{ text | shout }}")


def test_a_column_may_have_any_name() -> None:
    row = {"self": 1, "args": 2, "context": 3, "answer_choices": 4, "text": 5}
    assert rendered("{{ args }}{{ context }}{{ text }} ||| x", row).inputs == "235"


BARS = st.text(alphabet="|ab \n", max_size=12)


@given(first=BARS, second=BARS, target=BARS)
@settings(deadline=None)
def test_bars_in_a_rows_text_never_move_the_boundary(first: str, second: str, target: str) -> None:
    row = {"first": first, "second": second, "target": target, "all": [first, target]}
    example = render("In: {{ first }}{{ second }} {{ all }}|||{{ target }}", row)
    assert (example is None) == (not target.strip())
    if example is not None:
        assert example.inputs == f"In: {first}{second} {[first, target]}".strip()
        assert example.targets == target.strip()


def test_the_separator_in_a_rows_text_stays_text() -> None:
    example = rendered("{{ text }} ||| {{ words[0] }}", {"text": "a ||| b", "words": ["c|||d"]})
    assert (example.inputs, example.targets) == ("a ||| b", "c|||d")


CHANCE = "{{ ['heads', 'tails'] | choice }} ||| x"


def tosses(seed: int = 0, name: str = "ask", task: str = "weather", num: int = 64) -> list[str]:
    made = (Template(name, CHANCE).render(ROW, task=task, row_id=str(i), seed=seed) for i in range(num))
    return [example.inputs for example in made if example is not None]


def test_the_choice_filter_is_a_pure_function_of_seed_row_template_and_task() -> None:
    first = tosses()
    assert len(first) == 64
    assert 16 < first.count("heads") < 48, "it differs over the rows"
    assert tosses() == first
    assert tosses(seed=1) != first
    assert tosses(name="ask again") != first
    assert tosses(task="climate") != first


def test_the_choice_filter_gives_the_same_picks_on_every_machine_and_python() -> None:
    assert "".join(toss[0] for toss in tosses(num=24)) == "tthththtththtththhhhthhh"


def test_several_choices_in_one_template_are_drawn_one_after_the_other() -> None:
    picks = [rendered("{% for i in range(9) %}{{ 'ab' | choice }}{% endfor %} ||| x", row_id=str(i)).inputs for i in range(9)]
    assert len(set(picks)) > 3
    assert all(set(pick) == {"a", "b"} for pick in picks[:2])


def test_the_prompt_may_choose_after_the_choices_did() -> None:
    example = rendered("{{ 'ab' | choice }} ||| {{ answer_choices[0] }}", choices="{{ 'cd' | choice }}")
    assert example.inputs in ("a", "b") and example.targets in ("c", "d")


def test_jinjas_own_sources_of_chance_are_bound_to_the_seed_or_gone() -> None:
    def picks() -> list[str]:
        return [rendered("{{ range(100) | random }} ||| x", row_id=str(i)).inputs for i in range(5)]

    assert len(set(picks())) > 1
    assert picks() == picks()
    assert "'lipsum' is undefined" in refusal("{{ lipsum() }} ||| x")


@pytest.mark.parametrize(
    "expression",
    [
        "text.__class__",
        "text.__class__.__mro__[1].__subclasses__()",
        "text['__class__']",
        "text | attr('__class__')",
        "[text] | map(attribute='__class__') | first",
        "'{0.__class__}'.format(text)",
        "'{0.__class__}' | format_map(text)",
        "cycler.__init__.__globals__",
        "range.__globals__",
        "joiner.__globals__.os",
        "namespace.__init__",
        "config",
        "config.items()",
        "request",
        "__import__('os')",
        "__choose__.random.__class__",
        "__choose__.__call__.__func__",
        "dict.__base__",
        "words.append('stars')",
        "words.sort()",
        "words.clear()",
        "words.reverse()",
        "answers.pop('text')",
        "answers['pop']('text')",
        "answers.update({'text': []})",
        "answers.setdefault('more', 1)",
        "answers.text.insert(0, 'x')",
        "(answers | attr('clear'))()",
    ],
)
def test_the_sandbox_refuses_to_leave_the_row_or_to_change_it(expression: str) -> None:
    row = copy.deepcopy(ROW)
    refusal(f"{{{{ {expression} }}}} and {{{{ text }}}} ||| x", row)
    assert row == ROW
    assert rendered("{{ text }} ||| x", row).inputs == "Rain fell."


@pytest.mark.parametrize(
    "statement", ["{% set answers.text = 1 %}", "{% do words.append(1) %}", "{% set words[0] = 'x' %}", "{% import 'os' as os %}"]
)
def test_the_sandbox_refuses_statements_that_assign_or_import(statement: str) -> None:
    row = copy.deepcopy(ROW)
    refusal(statement + "{{ text }} ||| x", row)
    assert row == ROW


def test_a_name_set_in_a_template_stays_in_the_template() -> None:
    row = copy.deepcopy(ROW)
    assert rendered("{% set text = 'Snow fell.' %}{{ text }} ||| x", row).inputs == "Snow fell."
    assert row == ROW


@pytest.mark.parametrize(
    "jinja",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}endless {% endfor %}{% endfor %} ||| x",
        "{{ 'a' * 1000001 }} ||| x",
        "{% for i in range(60000) %}{{ text }}{{ text }}{% endfor %} ||| x",
    ],
)
def test_a_rendering_that_is_too_long_is_refused_in_bounded_time(jinja: str) -> None:
    start = time.monotonic()
    assert refusal(jinja) == "the rendering is longer than 1,000,000 characters"
    assert time.monotonic() - start < 20


def test_a_rendering_that_takes_too_long_is_refused_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_module, "MAX_SECONDS", 0.2)
    start = time.monotonic()
    message = refusal("{% for i in range(99999) %}{% for j in range(99999) %}{{ '' }}{% endfor %}{% endfor %} ||| x")
    assert message == "the rendering takes longer than 0.2 seconds"
    assert time.monotonic() - start < 20


def test_a_range_of_more_than_the_sandbox_allows_is_refused() -> None:
    assert "Range too big" in refusal("{{ range(100001) | list | length }} ||| x")


def test_a_long_text_below_the_bound_is_rendered_whole() -> None:
    assert len(rendered("{{ text }} ||| x", {"text": "ab" * 400_000}).inputs) == 800_000


def test_the_metadata_default_to_those_of_an_english_original_task() -> None:
    assert Template("ask", "").metadata == Metadata(original_task=True, choices_in_prompt=False, metrics=(), languages=("en",))
