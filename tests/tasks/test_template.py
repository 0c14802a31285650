"""A template makes one example of a row, or declines it, or says what is wrong; it can do nothing else."""

import copy
import functools
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama.errors import UserError
from mtllama.tasks.sandbox import Chance
from mtllama.tasks.template import STAND_IN, Example, Metadata, Template

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


@pytest.mark.parametrize("jinja", ["", "\n \t", "{% if label == 0 %}{{ text }} ||| yes{% endif %}", "{{ '' }}"])
def test_a_blank_rendering_declines_the_row(jinja: str) -> None:
    assert render(jinja) is None
    assert refusal(jinja + "x") == "its rendering has 0 separators '|||'; exactly one is needed"


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
        ("{% include 'other' %} ||| a", "the tag 'include' is not allowed (line 1)"),
    ],
)
def test_a_template_that_is_broken_is_refused(jinja: str, part: str) -> None:
    assert part.lower() in refusal(jinja).lower()


def test_broken_choices_are_refused_like_a_broken_prompt() -> None:
    assert "No filter named 'shout'" in refusal("{{ text }} ||| a", choices="{{ text | shout }}")


def test_a_column_may_have_any_name() -> None:
    row = {"self": 1, "args": 2, "context": 3, "answer_choices": 4, "text": 5}
    assert rendered("{{ args }}{{ context }}{{ text }} ||| x", row).inputs == "235"


def test_the_separator_in_a_rows_text_separates_no_choices() -> None:
    row = {"text": "a", "first": "x ||| y", "rest": ["p|||q", "r"], "more": {"deep": [{"text": "s|||t"}]}}
    choices = "{{ first }} ||| {{ rest | join('|||') }} ||| {{ more.deep[0].text }}"
    example = rendered("{{ text }}: {{ answer_choices | join(' or ') }} ||| {{ answer_choices[3] }}", row, choices)
    assert example.choices == ("x ||| y", "p|||q", "r", "s|||t")
    assert (example.inputs, example.targets) == ("a: x ||| y or p|||q or r or s|||t", "s|||t")
    assert row["first"] == "x ||| y" and row["rest"] == ["p|||q", "r"]


def test_choices_may_be_split_from_a_text_with_bars() -> None:
    row = {"text": "Which?", "options": "sun|moon|stars"}
    example = rendered("{{ text }} ||| {{ options.split('|')[1] }}", row, "{{ options.split('|') | join('|||') }}")
    assert (example.targets, example.choices) == ("moon", ("sun", "moon", "stars"))


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
    ("jinja", "fault"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}endless {% endfor %}{% endfor %} ||| x", "the template does too much"),
        ("{{ 'a' * 1000001 }} ||| x", "a value of the template is longer than 1,000,000 characters"),
        ("{% for i in range(60000) %}{{ text }}{{ text }}{% endfor %} ||| x", "the rendering is longer than 1,000,000 characters"),
    ],
)
def test_a_rendering_that_is_too_long_is_refused(jinja: str, fault: str) -> None:
    assert refusal(jinja).startswith(fault)


def test_a_range_of_more_than_the_sandbox_allows_is_refused() -> None:
    assert "Range too big" in refusal("{{ range(100001) | list | length }} ||| x")


def test_a_long_text_below_the_bound_is_rendered_whole() -> None:
    assert len(rendered("{{ text }} ||| x", {"text": "ab" * 400_000}).inputs) == 800_000


def test_the_metadata_default_to_those_of_an_english_original_task() -> None:
    assert Template("ask", "").metadata == Metadata(original_task=True, choices_in_prompt=False, metrics=(), languages=("en",))


LENIENT_ROW = {"text": "Rain fell.", "label": 1, "long": "word " * 1000, "blank": " "}


def lenient(jinja: str, row: dict[str, Any] | None = None, choices: str | None = None, truncate: int | None = 2048) -> Example | None:
    template = Template("ask", jinja, choices, truncate=truncate, lenient=True)
    return template.render(LENIENT_ROW if row is None else row, task="weather")


def test_a_lenient_template_prints_nothing_for_what_a_row_does_not_have() -> None:
    assert lenient("{{ text }}{{ txet }}{{ text.nope }} ||| {{ label }}") == Example("Rain fell.", "1", None, "weather", "ask")
    with pytest.raises(UserError, match="'txet' is undefined; columns of the row: text, label, long, blank"):
        lenient("{{ txet.more }} ||| x")


@pytest.mark.parametrize("jinja", ["{{ text }}", "{{ text }} ||| a ||| b", "{{ text }} ||| {{ blank }}", "{{ blank }} ||| a", "", "|||"])
def test_a_lenient_template_declines_what_is_not_one_input_and_one_target(jinja: str) -> None:
    assert lenient(jinja) is None
    assert lenient("{{ text }} ||| a") is not None


def test_a_lenient_template_keeps_its_choices_where_the_target_is_among_them() -> None:
    example = lenient("{{ text }} ||| {{ answer_choices[label] }}", choices="No ||| Yes")
    assert example is not None and (example.targets, example.choices) == ("Yes", ("No", "Yes"))
    example = lenient("{{ text }} ||| perhaps", choices="No ||| Yes")
    assert example is not None and (example.targets, example.choices) == ("perhaps", None)
    assert lenient("{{ answer_choices }} ||| a", row={"answer_choices": 1}) == Example("None", "a", None, "weather", "ask")


def test_long_values_are_cut_as_jinja_cuts_them_and_choices_are_not() -> None:
    example = lenient("{{ long }} {{ long | upper }} ||| {{ text }}")
    assert example is not None
    cut = ("word " * 1000)[:2045].rsplit(" ", 1)[0] + "..."
    assert example.inputs == cut + " " + cut.upper()
    row = {"text": "a" * 2053, "longer": "a" * 2054}
    example = lenient("{{ text }} ||| {{ longer }}", row)
    assert example is not None and example.inputs == row["text"] and example.targets == "a" * 2045 + "..."
    example = lenient("{{ text }} ||| {{ longer }}", row, truncate=None)
    assert example is not None and example.targets == row["longer"]
    example = lenient("{{ text[:5] }} ||| {{ answer_choices[0][:9] }}", row, "{{ longer }} ||| {{ text[:9] }}")
    assert example is not None and example.choices == ("a" * 2054, "a" * 9), "a choice is whole; the target is among them"
    assert Template("ask", "{{ text }} ||| {{ longer }}", truncate=2048).render(row, task="t") == Example(
        row["text"], "a" * 2045 + "...", None, "t", "ask"
    )


def test_the_cut_stands_behind_every_expression_whatever_it_binds_to() -> None:
    example = lenient("{{ 'a' ~ long }}{{ long if label else long }} ||| x", truncate=10)
    assert example is not None and example.inputs == "a" + "word..." + "word " * 999 + "word", "the filter belongs to the last value"
    with pytest.raises(UserError, match="int - str"):
        lenient("{{ label - 1 }} ||| x")


def test_a_template_of_promptsource_may_split_at_its_stand_in_for_separators() -> None:
    jinja = '{% set docs = document.split("3ed2dface8203c4c9dfb1a5dc58e41e0||") | reject("equalto", "") | list %}'
    jinja += "{% for doc in docs %}* {{doc}}\n{% endfor %}||| {{ summary }}"
    row = {"document": "One.|||||Two.|||||", "summary": "One|Two ||| three", "id": 7}
    assert lenient(jinja, row) == Example("* One.\n* Two.", "One|Two ||| three", None, "weather", "ask")
    assert STAND_IN in jinja


@pytest.mark.parametrize("depth", [101, 700, 5000])
def test_a_row_that_is_nested_too_deep_is_refused(depth: int) -> None:
    value: Any = "a"
    for level in range(depth):
        value = [value] if level % 2 else {"in": value}
    row = {"question": "Which?", "choices": value}
    choices = "{{ choices | join(' ||| ') }}"
    assert "nested more than 100 deep" in refusal("{{ question }} ||| a", row, choices)
    with pytest.raises(UserError, match="template 'ask' of weather: a value of the row is nested more than 100 deep"):
        Template("ask", "{{ question }}", choices).ask(row, task="weather")


@pytest.mark.parametrize(
    "bars", [{"text": "a|", "answer": "|b"}, {"text": "a|||b", "answer": "c"}, {"text": ["a|||", "b"], "answer": {"x": "|||"}}]
)
@pytest.mark.parametrize("strict", [False, True])
def test_bars_of_a_row_stay_where_they_are(bars: dict[str, Any], strict: bool) -> None:
    example = Template("ask", "{{ text }}|||{{ answer }}", lenient=not strict).render(bars, task="t")
    assert example == Example(str(bars["text"]), str(bars["answer"]), None, "t", "ask")


@pytest.mark.parametrize(
    ("jinja", "conditional"),
    [
        ("{{ text }} ||| {{ label }}", False),
        ("{{ text }} ||| yes", False),
        ("{{ text }} |||", False),
        ("{{ text }}", False),
        ("{% if label %}{{ text }}{% endif %} ||| yes", False),
        ("{{ text }} ||| {% if label %}{{ text }}{% endif %}", True),
        ("{{ text }} ||| {% if label %}{{ text }}{% else %}{% endif %}", True),
        ("{{ text }} ||| {% if label %}{{ text }}{% else %}no{% endif %}", False),
        ("{{ text }} ||| {% if label == 0 %}a{% elif label == 1 %}b{% endif %}", True),
        ("{{ text }} ||| {% if label == 0 %}a{% elif label == 1 %}b{% else %}c{% endif %}", False),
        ("{{ text }} ||| {% if label %}very {% endif %}{{ text }}", False),
        ("{{ text }} ||| The answer: {% if label %}{{ text }}{% endif %}", False),
        ("{% if label %}{{ text }} ||| yes{% endif %}", True),
        ("{% if label %}{{ text }} ||| yes{% else %}{{ text }} ||| no{% endif %}", False),
        ("{% if label %}{{ text }} |||{% endif %} yes", True),
        ("{{ text }} {% if label %}|||{% endif %} {{ label }}", True),
        ("{{ text }} ||| {% for word in words %}{{ word }}{% endfor %}", False),
        ("{{ text }} ||| {% for word in words %}{% if word %}{{ word }}{% endif %}{% endfor %}", True),
        ("{% for word in words %}{% if word %}{{ text }} ||| {{ word }}{% endif %}{% endfor %}", True),
        ("{{ text }} ||| {{ text if label }}", False),
        ("{{ text }} ||| {% set x %}{% if label %}a{% endif %}{% endset %}{{ x }}", False),
        ("{{ text }} ||| {% with x = 1 %}{% if label %}a{% endif %}{% endwith %}", True),
    ],
)
def test_a_template_tells_whether_an_if_decides_that_it_applies(jinja: str, conditional: bool) -> None:
    assert Template("ask", jinja).conditional is conditional
    assert Template("ask", jinja, truncate=2048, lenient=True).conditional is conditional


def test_a_template_tells_which_columns_it_needs() -> None:
    template = Template(
        "ask", "{% set x = a %}{{ x }}{{ answer_choices[b] }}{% for i in range(c) %}{{ i }}{% endfor %} ||| {{ d }}", "{{ e }} ||| no"
    )
    assert template.variables == {"a", "b", "c", "d", "e"}
    assert Template("ask", "{{ text }} ||| x", "no ||| yes", lenient=True, truncate=2048).variables == {"text"}


@pytest.mark.parametrize("ask", ["variables", "conditional"])
def test_asking_a_broken_template_names_it_and_the_line(ask: str) -> None:
    with pytest.raises(UserError, match=r"^template 'ask': No filter named 'shout' \(line 2\)$"):
        getattr(Template("ask", "a\n{{ text | shout }} ||| b"), ask)


def test_a_template_that_has_rendered_can_be_sent_to_another_process() -> None:
    template = Template("ask", "{{ text | choice }} ||| {{ text }}", "{{ text }}|||no")
    example = template.render(ROW, task="weather")
    assert example is not None and template.conditional is False and template.variables == {"text"}
    copied = pickle.loads(pickle.dumps(template))
    assert copied == template and copied.render(ROW, task="weather") == example


# What promptsource 0.1.0 makes of its templates, written here a second time, without a sandbox; its dice are ours.

SETS = {
    "adversarial_qa": ("adversarial_qa/dbert", "adversarial_qa/dbidaf", "adversarial_qa/droberta", "adversarial_qa/adversarialQA"),
    "cnn_dailymail": ("cnn_dailymail/3.0.0",),
    "commonsense_qa": ("cos_e/v1.11",),
    "duorc": ("duorc/SelfRC", "duorc/ParaphraseRC"),
    "glue_mrpc": ("glue/mrpc",),
    "glue_qqp": ("glue/qqp",),
    "kilt_tasks_hotpotqa": ("kilt_tasks/hotpotqa",),
    "mnli": ("glue/mnli",),
    "openbookqa": ("openbookqa/main",),
    "paws_labeled_final": ("paws/labeled_final",),
    "pawsx": ("paws-x/en",),
    "squad": ("squad", "squad_v2"),
    "sst2": ("glue/sst2",),
    "winogrande": ("winogrande/winogrande_xl",),
    "xnli": ("xnli/en",),
}
"""Folder of rows -> folders of promptsource's templates, where they are not called the same."""


class PromptsourceLoader(yaml.SafeLoader):
    """Reads promptsource's two tags as plain mappings."""


for tag in ("!Template", "!TemplateMetadata"):
    PromptsourceLoader.add_constructor(tag, lambda loader, node: loader.construct_mapping(node, deep=True))  # type: ignore[arg-type]


@functools.cache
def plain(source: str) -> jinja2.Template:
    environment = jinja2.Environment()
    environment.globals["zip"] = zip
    environment.filters["choice"] = jinja2.pass_context(lambda context, options: context["pick"](options))
    environment.filters["most_frequent"] = lambda items: [
        item for item, count in Counter(items).most_common() if count == Counter(items).most_common()[0][1]
    ]
    return environment.from_string(source)


def theirs(jinja: str, answer_choices: str | None, row: dict[str, Any], chance: Chance) -> tuple[str, str, tuple[str, ...] | None] | None:
    def parts(source: str, **more: Any) -> list[str]:
        columns = {key: value.replace("|||", STAND_IN) if isinstance(value, str) else value for key, value in row.items()}
        return [
            part.strip().replace(STAND_IN, "|||") for part in plain(source).render({**columns, **more, "pick": chance.pick}).split("|||")
        ]

    choices = parts(answer_choices) if answer_choices else None
    made = parts(jinja.replace("}}", " | string | truncate(2048) }}"), answer_choices=choices)
    if len(made) != 2 or not all(made):
        return None
    return made[0], made[1], tuple(choices) if choices and made[1] in choices else None


def test_promptsources_templates_render_as_promptsource_renders_them(shared_data: Path) -> None:
    folder = shared_data.parent / "promptsource-0.1.0" / "templates"
    if not folder.is_dir():
        pytest.skip("the templates of promptsource 0.1.0 are not beside this checkout")
    counts: Counter[str] = Counter()
    wrong, seen = [], set()
    for file in sorted((*shared_data.glob("train/**/*.jsonl"), *shared_data.glob("eval/**/*.jsonl"))):
        name = file.relative_to(shared_data).parts[1]
        templates = (f"super_glue/{file.name.split('.validation')[0]}",) if name == "super_glue" else SETS.get(name, (name,))
        with file.open(encoding="utf-8") as lines:
            numbered = list(lines)
        rows = [json.loads(line) for line in numbered[:: max(1, len(numbered) // 20)][:20]]
        for yaml_file in (folder / each / "templates.yaml" for each in templates if (folder / each).is_dir()):
            for entry in yaml.load(yaml_file.read_text(encoding="utf-8"), PromptsourceLoader)["templates"].values():
                seen.add(f"{yaml_file.parent}/{entry['name']}")
                template = Template(entry["name"], entry["jinja"], entry["answer_choices"], truncate=2048, lenient=True)
                for row in rows:
                    try:
                        expected: Any = theirs(entry["jinja"], entry["answer_choices"], row, Chance(0, name, entry["name"], "5"))
                    except Exception:
                        expected = "an error"
                    try:
                        example = template.render(row, task=name, row_id="5")
                        ours: Any = example and (example.inputs, example.targets, example.choices)
                    except UserError:
                        ours = "an error"
                    counts["error" if ours == "an error" else "declined" if ours is None else "rendered"] += 1
                    if ours != expected:
                        wrong.append((name, entry["name"], expected, ours))
    assert wrong == []
    assert len(seen) > 400 and counts["rendered"] > 13_000 and counts["declined"] > 1_000
    assert counts["error"] < 0.02 * counts.total(), "of templates whose column is missing"


def test_every_template_of_promptsource_can_be_compiled(shared_data: Path) -> None:
    folder = shared_data.parent / "promptsource-0.1.0" / "templates"
    if not folder.is_dir():
        pytest.skip("the templates of promptsource 0.1.0 are not beside this checkout")
    num = 0
    for file in sorted(folder.glob("**/templates.yaml")):
        for entry in yaml.load(file.read_text(encoding="utf-8"), PromptsourceLoader)["templates"].values():
            template = Template(entry["name"], entry["jinja"], entry["answer_choices"], truncate=2048, lenient=True)
            assert template.variables and isinstance(template.conditional, bool)
            num += 1
    assert num > 500
