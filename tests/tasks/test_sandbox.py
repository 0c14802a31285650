"""A hostile template is refused, soon and small; a harmless one renders as Jinja renders it."""

import json
import random
import subprocess
import sys
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama.tasks import sandbox
from mtllama.tasks.sandbox import BAR, FILTERS, MAX_CHARACTERS, TESTS, Chance, Refused, load, parse, variables

ROW: dict[str, Any] = {
    "text": "Rain fell. It was 5 o'clock: half the town | slept.",
    "label": 1,
    "share": -2.75,
    "three": 3,
    "nothing": None,
    "yes": True,
    "words": ["sun", "Moon", "sun", "a|b"],
    "numbers": [3, 1, 2, 1],
    "answers": {"text": ["dry", "wet"], "start": [4, 11], "items": "a column"},
    "people": [{"name": "Ann", "age": 31}, {"name": "bob", "age": 7}, {"name": "Cy", "age": 31}],
}


def render(jinja: str, row: dict[str, Any] | None = None, *, lenient: bool = False, marked: bool = False, seed: int = 0) -> str:
    return load(jinja, lenient=lenient, marked=marked).render(ROW if row is None else row, Chance(seed))


def refusal(jinja: str, row: dict[str, Any] | None = None, *, lenient: bool = False) -> str:
    with pytest.raises(Refused) as raised:
        render(jinja, row, lenient=lenient)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 500
    return message


def shared(times: int, start: str = "[1]", pair: str = "[{0}, {0}]", name: str = "a") -> str:
    """A value that holds itself 2 ** times over, and takes no room."""
    sets = [f"{{% set {name}{i + 1} = {pair.format(f'{name}{i}')} %}}" for i in range(times)]
    return f"{{% set {name}0 = {start} %}}" + "".join(sets)


def grown(step: str, start: str = "'ab'", rounds: int = 99) -> str:
    return f"{{% set ns = namespace(s={start}) %}}{{% for i in range({rounds}) %}}{{% set ns.s = {step} %}}{{% endfor %}}"


LONG = "{% set s = 'ab' * 400000 %}"
MANY = "{% for i in range(99999) %}"
TUPLE = ("(1,)", "({0}, {0})")
HOSTILE = {
    # time
    "nested silent loops": MANY * 3 + "{% endfor %}" * 3,
    "nested loops that set": MANY * 2 + "{% set x = i %}" + "{% endfor %}" * 2,
    "loops over strings": LONG + "{% for a in s %}{% for b in s %}{% endfor %}{% endfor %}",
    "loop with a test": "{% for i in range(99999) if i in range(99999) and 0.5 in range(99999) %}{% endfor %}" * 9,
    "searching": LONG + MANY + "{% if ('a' * 9000 ~ 'b') in s %}{% endif %}{% endfor %}",
    "searching backwards": LONG + "{{ s.rfind('ab' ~ 'a' * 400000) }}",
    "splitting backwards": LONG + "{{ s.rsplit(sep='ab' ~ 'a' * 400000) }}",
    "stripping": LONG + "{{ s.strip('c' * 800000 ~ 'a') }}",
    "trimming": LONG + "{{ s | trim('c' * 800000 ~ 'a') }}",
    "sorting": MANY + "{% set x = range(99999) | sort %}{% endfor %}",
    "title bomb": MANY + "{{ ('a ' * 400000) | title | length }}{% endfor %}",
    "long attribute path": "{% set a = 'text.' * 100000 %}{{ range(99999) | map(attribute=a) }}",
    "keys that all have one hash": "{% set m = 2**61 - 1 %}{{ dict(zip(range(0, m * 90000, m), range(90000))) | length }}",
    "unique numbers that all have one hash": "{% set m = 2**61 - 1 %}{{ range(0, m * 90000, m) | unique | length }}",
    "counting numbers that all have one hash": "{% set m = 2**61 - 1 %}{{ range(0, m * 90000, m) | most_frequent | length }}",
    "macro recursion": "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(39) }}",
    "calls of callers": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call m() %}" * 30 + "x" + "{% endcall %}" * 30,
    "default of a macro that calls it": "{% macro m(a=range(99999) | list, b=m()) %}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for i in [words] recursive %}{{ loop([words]) }}{% endfor %}",
    # size of one value
    "repetition": "{{ 'a' * 10**10 }}",
    "repetition of a list": "{{ [1] * 10**10 }}",
    "power": "{{ 10**(10**10) }}",
    "power of a large number": "{% set x = 10**300 %}{{ x**x }}",
    "squares": grown("ns.s * ns.s", "2"),
    "doubling by ~": grown("ns.s ~ ns.s"),
    "doubling by +": grown("ns.s + ns.s"),
    "doubling a list": grown("ns.s + ns.s", "[1]"),
    "doubling by %": grown("'%s%s' % (ns.s, ns.s)"),
    "doubling by replace": grown("ns.s | replace('a', 'aa')"),
    "doubling by join": grown("ns.s | join(ns.s)"),
    "doubling by a captured block": "{% set x %}aaaa{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "captured loop": LONG + "{% set x %}" + MANY + "{{ s }}{% endfor %}{% endset %}",
    "replace": LONG + "{{ s | replace('a', s) }}",
    "replace of nothing": LONG + "{{ s.replace('', s) }}",
    "join": "{{ (['a'] * 900000) | join('b' * 900000) }}",
    "join of long texts": "{{ (['a' * 900000] * 900000) | join }}",
    "join method": "{{ ('b' * 900000).join(['a'] * 900000) }}",
    "format width": "{{ '%10000000000d' % 1 }}",
    "format width from an argument": "{{ '%*d' % (10000000000, 1) }}",
    "format precision": "{{ '%.1000000000f' | format(1.5) }}",
    "format behind a percent sign with a width": "{{ '%5%%9999999999d' % 1 }}",
    "format with a nested key": "{{ '%(a(b)9999999999)9999999999d' % {'a(b)9999999999': 1} }}",
    "format of one value many times": "{{ ('%(a)s' * 90000) % {'a': 'x' * 900000} }}",
    "format in a test": "{{ '%9999999999d' is odd }}",
    "str.format with a nested width": "{{ '{:{}}'.format(1, 10**9) }}",
    "str.format_map": "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**10) }}",
    "translate": "{{ text.translate({82: 'x' * 900000}) }}",
    "indent by much": "{{ 'a\nb' | indent(10**10) }}",
    "indent of many lines": "{{ ('\n' * 900000) | indent(900, true, true) }}",
    "range": "{{ range(10**10) | list }}",
    "range of large numbers": "{{ range(10**30) }}",
    "batch": "{{ [1] | batch(10**10, 0) }}",
    "slice": "{{ [1] | slice(10**10) }}",
    "sum of lists": "{{ ([[1] * 90] * 90) | sum(start=[]) }}",
    "round": "{{ 1 | round(-10**10) }}",
    "round upwards": "{{ 1.5 | round(10**10, 'ceil') }}",
    "bytes of a number": "{{ (1).to_bytes(10**10, 'big') }}",
    "number of many digits": "{{ " + "9" * 90_000 + " }}",
    "hexadecimal number": "{{ 0x" + "f" * 90_000 + " }}",
    # many values
    "lists in a loop": MANY + "{% set x = range(99999) | list %}{% endfor %}",
    "zips in a loop": MANY + "{% set x = zip(range(99999), range(99999)) %}{% endfor %}",
    "slices kept": LONG + grown("[ns.s, s[1:]]", "[]", 99999),
    "numbers kept": grown("[ns.s, 2**1000 + i]", "[]", 99999) * 9,
    "captured blocks kept": LONG + MANY + "{% set x %}{{ s }}x{% endset %}{% endfor %}",
    "printing": LONG + MANY + "{{ s }}{% endfor %}",
    "printing bars": "{% set s = 'a|b' * 300000 %}" + MANY + "{{ s }}{% endfor %}",
    # values that hold each other, or themselves
    "printing a value of 2**60 parts": shared(60) + "{{ a60 }}",
    "comparing such values": shared(60) + shared(60, name="b") + "{{ a60 == b60 }}",
    "sorting such values": shared(60) + shared(60, name="b") + "{{ [a60, b60] | sort }}",
    "such a key": shared(60, *TUPLE) + "{{ {a60: 1} }}",
    "such a subscript": shared(60) + "{{ words[a60] }}",
    "looking for such a key": shared(60, *TUPLE) + "{{ a60 in answers }}",
    "such a filter name": shared(60, *TUPLE) + "{{ words | map(a60) }}",
    "the error message of such a value": shared(60) + "{{ words.index(a60) }}",
    "such changes": shared(60) + "{% for i in words %}{{ loop.changed(a60) }}{% endfor %}",
    "deep nesting": grown("(ns.s,)", "()", 99999) + "{{ ns.s }}",
    "the hash of deep nesting": grown("(ns.s,)", "()", 99999) + "{{ dict([(ns.s, 1)]) }}",
    "a chain of maps": grown("ns.s | map('upper')", "words", 99999) + "{{ ns.s | list }}",
    "a namespace within itself": "{% set ns = namespace() %}{% set ns.a = [ns, ns] %}{{ [ns] }}",
    # escapes
    "class": "{{ text.__class__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class by subscript": "{{ text['__class__'] }}",
    "class by a name put together": "{{ text['__cla' ~ 'ss__'] }}",
    "class by attr": "{{ text | attr('__class__') }}",
    "class by map": "{{ [text] | map(attribute='__class__') | first }}",
    "class by sort": "{{ [text] | sort(attribute='__class__') }}",
    "class by groupby": "{{ [text] | groupby('__class__') }}",
    "class by selectattr": "{{ [text] | selectattr('__class__') }}",
    "class by str.format": "{{ '{0.__class__}'.format(text) }}",
    "class of what is undefined": "{{ nope.__class__ }}",
    "object behind what is undefined": "{{ nope._undefined_obj }}",
    "globals of cycler": "{{ cycler.__init__.__globals__ }}",
    "globals of lipsum": "{{ lipsum.__globals__ }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "globals of a caller": "{% macro m() %}{{ caller._func }}{% endmacro %}{% call m() %}{% endcall %}",
    "owner of a method": "{{ text.upper.owner }}",
    "inside of a function": "{{ range.run }}",
    "inside of a namespace": "{{ namespace(a=1)._Namespace__attrs }}",
    "inside of a loop": "{% for i in words %}{{ loop._iterator }}{% endfor %}",
    "setting an underscore attribute": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "self": "{{ self.__init__.__globals__ }}",
    "calling data": "{{ text() }}",
    "a filter of the sandbox's own": "{{ words | map('each of', 10**9) }}",
    "arguments from a list": "{{ zip(*[range(99999)] * 900000) }}",
    "arguments from a mapping": "{{ dict(**answers) }}",
    "an argument of Jinja's own": "{{ namespace(_loop_vars=1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "from import": "{% from 'os' import path %}",
    "extends": "{% extends 'a' %}",
    "block": "{% block a %}{% endblock %}",
    # compiling
    "deep parentheses": "{{ " + "(" * 40_000 + ")" * 40_000 + " }}",
    "deep lists": "{{ " + "[" * 40_000 + "]" * 40_000 + " }}",
    "many signs": "{{ " + "-" * 40_000 + "1 }}",
    "many attributes": "{{ text" + ".a" * 40_000 + " }}",
    "many filters": "{{ text" + " | trim" * 12_000 + " }}",
    "deep ifs": "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
    "deep loops": "{% for i in words %}" * 60 + "{% endfor %}" * 60,
    "many elifs": "{% if a %}" + "".join(f"{{% elif a{i} %}}" for i in range(4_500)) + "{% endif %}",
    "many expressions": "{{ text }}" * 10_000,
    "huge source": "x" * 100_001,
}

GUARD = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from mtllama.errors import UserError
from mtllama.tasks.template import Template
hostile, row = json.load(sys.stdin)
for name, jinja in hostile.items():
    try:
        rendered = Template(name, jinja + " ||| x", lenient=len(name) % 2 == 0).render(row, task="hostile")
        outcome = "rendered " + repr(rendered)[:200]
    except UserError as error:
        outcome = "refused" if "\\n" not in str(error) and len(str(error)) < 600 else "refused at length"
    except BaseException as error:
        outcome = "raised " + repr(error)[:200]
    print(json.dumps([name, outcome]), flush=True)
"""


def test_every_hostile_template_is_refused_in_bounded_time_and_memory() -> None:
    pytest.importorskip("resource")
    assert len(HOSTILE) > 100
    run = subprocess.run([sys.executable, "-c", GUARD], input=json.dumps([HOSTILE, ROW]), capture_output=True, text=True, timeout=120)
    outcomes = dict(json.loads(line) for line in run.stdout.splitlines())
    assert run.returncode == 0, f"after {list(outcomes)[-1:]}: {run.stderr[-500:]}"
    assert list(outcomes) == list(HOSTILE)
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "refused"} == {}


HARMLESS = r"""
{{ text | lower }} {{ text | upper | length }} {{ text.title() }} {{ text | title }} {{ text | capitalize }} {{ text.swapcase() }}
{{ text.split('. ') }} {{ text.split() | first }} {{ text.split(' ', 2) | last }} {{ text.rsplit(' ', 1)[1] }} {{ text.rsplit() }}
{{ text | replace('e', 'E') }} {{ text.replace('l', '', 1) }} {{ 'aaa' | replace('a', 'b', 2) }} {{ 'abc' | replace('', '-') }}
{{ text | trim }} {{ text.strip('.R') }} {{ text | trim('.') }} {{ text.lstrip('Ra') }} {{ text.rstrip() }} {{ '  x ' | trim }}
{{ text[0] }} {{ text[-1] }} {{ text[3:8] }} {{ text[::-1] }} {{ text | reverse }} {{ words[1:] }} {{ words[:-1] | join(', ') }}
{{ text | truncate(20) }} {{ text | truncate(20, true, '!', 0) }} {{ text | truncate }} {{ text | wordcount }} {{ text | string }}
{{ text.index('fell') }} {{ text.find('x') }} {{ text.count('l') }} {{ text.rfind('l') }} {{ text.partition('fell') }}
{{ text.startswith('Rain') }} {{ text.endswith(('x', '.')) }} {{ text.isdigit() }} {{ '5'.isdigit() }} {{ 'ab'.zfill(4) }}
{{ 'ab' | center(9) }}| {{ 'ab'.ljust(5, '.') }} {{ 'ab'.rjust(5) }} {{ 'a\nb' | indent }} {{ 'a\n\nb' | indent(2, true, true) }}
{{ 'ab'.removeprefix('a') }} {{ 'ab'.casefold() }} {{ 'a\nb'.splitlines() }} {{ ', '.join(words) }} {{ words | join }}
{{ words | join('; ') }} {{ numbers | join('-') }} {{ people | join(', ', attribute='name') }} {{ words | first }} {{ words | last }}
{{ words | length }} {{ words | count }} {{ words | sort }} {{ words | sort(reverse=true, case_sensitive=true) }} {{ words | unique | list }}
{{ people | sort(attribute='age,name') | map(attribute='name') | list }} {{ numbers | sum }} {{ people | sum(attribute='age') }}
{{ numbers | min }} {{ numbers | max }} {{ words | min }} {{ people | max(attribute='age') }} {{ numbers | sort | reverse | list }}
{{ words | map('upper') | list }} {{ words | map('replace', 'u', 'o') | join(' ') }} {{ people | map(attribute='x', default='?') | list }}
{{ words | select('equalto', 'sun') | list }} {{ words | reject('equalto', 'sun') | list }} {{ numbers | select('odd') | list }}
{{ people | selectattr('age', '>', 10) | map(attribute='name') | join }} {{ people | rejectattr('name', 'lower') | list }}
{{ people | groupby('age') }} {% for age, group in people | groupby('age') %}{{ age }}{{ group | length }}{% endfor %}
{% for group in people | groupby('age') %}{{ group.grouper }}: {{ group.list | length }} {% endfor %}
{{ numbers | batch(3) | list }} {{ numbers | batch(3, 0) | list }} {{ numbers | slice(3) | list }} {{ numbers | slice(3, 9) | list }}
{{ answers | dictsort }} {{ answers | items | list }} {{ answers.keys() | list }} {{ answers.values() | list }} {{ answers.get('x', 1) }}
{{ answers.text[0] }} {{ answers['text'] }} {{ answers.start | sum }} {{ people[0].name }} {{ people.0.age }} {{ answers.get('text') }}
{{ label + 1 }} {{ label - 3 }} {{ label * 2.5 }} {{ label / 4 }} {{ 7 // 2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ -share }} {{ +label }}
{{ share | abs }} {{ share | round }} {{ share | round(1) }} {{ share | round(1, 'ceil') }} {{ share | int }} {{ '42' | int }} {{ 'x' | int }}
{{ '0x1f' | int(0, 16) }} {{ '2.5' | float }} {{ 'x' | float(1.5) }} {{ '42.7' | int }} {{ nothing | int(3) }} {{ yes + 1 }}
{{ 'a' ~ 1 ~ none ~ [1] }} {{ 'a' + 'b' }} {{ 'ab' * 3 }} {{ 3 * 'ab' }} {{ [1] + [2] }} {{ [0] * 3 }} {{ (1, 2) + (3,) }}
{{ '%s is %d and %.2f%%' % ('it', 3, 1.5) }} {{ '%s' % label }} {{ '%5s|%-5s|%05d' | format('a', 'b', 7) }} {{ '%(a)s' | format(a=1) }} {{ '%x' % 255 }}
{{ label == 1 }} {{ label != 1 }} {{ label > 0 }} {{ 0 < label < 5 }} {{ 'sun' in words }} {{ 'x' not in words }} {{ 'Rain' in text }} {{ 'text' in answers }}
{{ label in [0, 1] }} {{ label in numbers }} {{ numbers == [3, 1, 2, 1] }} {{ words > ['a'] }} {{ 2 in range(5) }} {{ not label }} {{ label and 'b' }} {{ none or 'c' }}
{{ 'a' if label else 'b' }} {{ 'a' if not label else 'b' }} {{ nope | default('d') }} {{ none | default('d', true) }} {{ '' | d('e', boolean=true) }}
{{ label is odd }} {{ label is even }} {{ 9 is divisibleby 3 }} {{ label is number }} {{ text is string }} {{ words is iterable }} {{ words is sequence }}
{{ answers is mapping }} {{ nothing is none }} {{ nope is defined }} {{ nope is undefined }} {{ yes is true }} {{ yes is boolean }} {{ label is integer }}
{{ share is float }} {{ 'ab' is lower }} {{ 'ab' is upper }} {{ label is eq 1 }} {{ label is gt(0) }} {{ 'sun' is in words }} {{ nothing is sameas none }}
{{ [1, [2, 'x'], {'a': none}] }} {{ {'a': 1, label: 2}[1] }} {{ (1, 'b') }} {{ none }} {{ true }} {{ 1.5 }} {{ 'quoted "x"' }} {{ {'b': 1, 'a': [1.5, none]} | tojson }}
{% for w in words %}{{ loop.index }}/{{ loop.length }} {{ w }}{{ ', ' if not loop.last }}{% endfor %} {% for w in words if w != 'sun' %}{{ w }}{% else %}none{% endfor %}
{% for w in words %}{{ loop.cycle('odd', 'even') }}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.revindex0 }}{% endfor %} {% for c in 'abc' %}{{ c }}.{% endfor %}
{% for k, v in answers.items() %}{{ k }}={{ v }}{% endfor %} {% for k in answers %}{{ k }}{% endfor %} {% for a, b in zip(words, numbers) %}{{ a }}{{ b }}{% endfor %}
{% for i in range(1, 9, 3) %}{{ i }}{% for j in range(i) %}{{ loop.first }}{% endfor %}{% endfor %} {% for i in [] %}{% else %}empty{% endfor %}
{% set x = 5 %}{{ x }} {% set a, b = words[:2] %}{{ a }}{{ b }} {% set ns = namespace(n=0) %}{% for i in numbers %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}
{% set block %}<{{ text }}>{% endset %}{{ block | length }} {% set loud | upper %}{{ text }}{% endset %}{{ loud }} {% filter upper | replace('R', 'r') %}{{ text }}{% endfilter %}
{% with y = label + 1 %}{{ y }}{% endwith %} {% if label == 0 %}no{% elif label == 1 %}yes{% else %}?{% endif %} {% raw %}{{ raw }}{% endraw %} {# comment #}
{% macro greet(who, mark='!') %}Hi {{ who }}{{ mark }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ greet('you') }}{{ greet('you', '?', 1, x=2) }}{{ greet(who='me') }}
{% macro twice() %}{{ caller() }}{{ caller() }}{% endmacro %}{% call twice() %}{{ label }}{% endcall %} {% macro add(a) %}{{ a + label }}{% endmacro %}{{ add(2) | int + 1 }}
{% set turn = cycler('a', 'b') %}{{ turn.next() }}{{ turn.next() }}{{ turn.current }} {% set comma = joiner(';') %}{{ comma() }}{{ comma() }} {{ dict(a=1, b=label) }}
{% print label, text %} {{ text if nope is defined }} {{ (text, label) | list }} {{ 'x' | list }} {{ range(5) | list }} {{ range(3) | length }}{{ numbers.index(2) }}{{ words.count('sun') }}
"""


@pytest.mark.parametrize("jinja", [line for line in HARMLESS.splitlines() if line])
@pytest.mark.parametrize("lenient", [False, True])
def test_a_harmless_template_renders_as_jinja_renders_it(jinja: str, lenient: bool) -> None:
    environment = jinja2.Environment(undefined=jinja2.Undefined if lenient else jinja2.StrictUndefined)
    environment.globals["zip"] = zip
    if not lenient:
        jinja = jinja.replace("{{ loop.previtem }}{{ loop.nextitem }}", "")
    expected = environment.from_string(jinja).render(ROW)
    assert expected.strip(" |")
    assert render(jinja, lenient=lenient) == expected
    assert render(jinja, lenient=lenient, marked=True).replace(BAR, "|") == expected


@pytest.mark.parametrize(
    "jinja", ["{{ nope }}", "{{ nope.x }}", "{{ nope | upper }}", "{{ answers.nope }}", "{{ nope | join(',') }}", "{{ words[nope] }}"]
)
def test_what_is_undefined_is_as_in_jinja(jinja: str) -> None:
    assert "is undefined" in refusal(jinja) or "has no attribute 'nope'" in refusal(jinja)
    try:
        expected = jinja2.Environment().from_string(jinja).render(ROW)
    except jinja2.UndefinedError as error:
        assert refusal(jinja, lenient=True).startswith(str(error.message))
    else:
        assert render(jinja, lenient=True) == expected


OPERANDS = st.sampled_from(
    ["text", "label", "share", "words", "numbers", "answers", "nope", "nothing", "'ab'", "three", "[1, 'b']", "words[0]", "answers.text"]
)
SUFFIXES = st.one_of(
    st.sampled_from([" | length", " | first", " | last", " | upper", " | join('|')", " | int", " | string", " | sort", " | list"]),
    st.sampled_from([" | trim", " | replace('a', 'bb')", " | default('z')", " | reverse | list", " | sum", " | unique | list"]),
    st.sampled_from([" | truncate(9)", " is odd", " is string", " is in words", "[1]", ".split(' ')", ".text"]),
)
OPERATORS = st.sampled_from([" + ", " - ", " * ", " ~ ", " % ", " == ", " < ", " in ", " and ", " or "])
EXPRESSIONS = st.recursive(
    OPERANDS,
    lambda inner: st.one_of(st.builds("({}){}".format, inner, SUFFIXES), st.builds("({}{}{})".format, inner, OPERATORS, inner)),
    max_leaves=5,
)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # of Python, at `3[1]`
@given(expression=EXPRESSIONS, lenient=st.booleans())
@settings(max_examples=300)
def test_any_expression_renders_as_in_jinja_or_not_at_all(expression: str, lenient: bool) -> None:
    environment = jinja2.Environment(undefined=jinja2.Undefined if lenient else jinja2.StrictUndefined)
    jinja = "{{ " + expression + " }}"
    try:
        expected = environment.from_string(jinja).render(ROW)
    except Exception:
        refusal(jinja, lenient=lenient)
    else:
        assert render(jinja, lenient=lenient) == expected


@pytest.mark.parametrize("name", ["attr", "safe", "escape", "urlize", "pprint", "wordwrap", "xmlattr", "filesizeformat", "striptags"])
def test_a_filter_that_is_refused_is_named_with_its_line(name: str) -> None:
    assert refusal(f"\n{{{{ text | {name} }}}}") == f"The filter {name!r} is not allowed (line 2)"
    assert name in refusal(f"{{{{ words | map('{name}') | list }}}}")


def test_an_unknown_filter_or_test_is_named_even_where_it_is_not_reached() -> None:
    assert refusal("{% if false %}{{ text | shout }}{% endif %}") == "No filter named 'shout' (line 1)"
    assert refusal("{% if text is loud %}{% endif %}") == "No test named 'loud' (line 1)"
    assert refusal("{{ text is callable }}") == "The test 'callable' is not allowed (line 1)"
    assert "'shout'" in refusal("{{ words | map('shout') }}")


def test_what_is_allowed_is_jinjas_own_and_promptsources() -> None:
    assert set(FILTERS) - set(jinja2.filters.FILTERS) == {"choice", "most_frequent"}
    assert set(TESTS) <= set(jinja2.tests.TESTS)
    assert render("{{ ['a', 'b', 'a', 'b', 'c'] | most_frequent }} {{ [] | most_frequent }}") == "['a', 'b'] None"


def test_a_long_text_can_be_worked_on() -> None:
    row = {"text": "One sentence. Another | sentence!\n" * 25_000}
    assert len(row["text"]) > 800_000
    jinja = "{{ text | replace('One', 'Two') | trim }}{% if 'Another' in text %}{{ text[:100] | upper }}{% endif %}{{ text.split('\n') | length }}"
    assert render(jinja, row) == row["text"].replace("One", "Two").strip() + row["text"][:100].upper() + "25001"


def test_the_bounds_do_not_depend_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 1e9)
    loop = "{% for i in range(COUNT) %}{% for j in range(1000) %}{{ j }}{% endfor %}{% endfor %}"
    assert "the template does too much" in refusal(loop.replace("COUNT", "1000"))
    assert render(loop.replace("COUNT", "100")).startswith("0123")


def test_a_rendering_that_takes_long_for_what_it_pays_is_stopped_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.0)
    assert refusal("{% for i in range(90) %}{% set x = 'a' * 50000 %}{% endfor %}") == "the rendering takes longer than 0 seconds"
    assert render("{% for i in range(90) %}{{ i }}{% endfor %}").startswith("0123"), "it looks at the clock now and then only"


def test_a_rendering_and_each_value_are_bounded() -> None:
    assert len(render("{{ 'ab' * 500000 }}")) == MAX_CHARACTERS
    assert refusal("{{ 'a' * 1000001 }}") == "a value of the template is longer than 1,000,000 characters"
    assert refusal("{{ 'a' * 600000 }}{{ 'a' * 600000 }}") == "the rendering is longer than 1,000,000 characters"


def test_nothing_of_a_template_is_computed_while_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(sandbox._Rendering, "make", lambda self, size, unit=1: made.append(size))
    monkeypatch.setitem(sandbox.FILTERS, "upper", lambda context, value: made.append(1))
    program = sandbox.Program(
        "{{ 'a' * 7 }}{{ 'a' ~ 'b' }}{{ 'a' | center(9) }}{{ 'b' | upper }}{{ 'x'[0:1] }}", lenient=False, marked=True
    )
    assert not made
    program.render({}, Chance())
    assert made


def test_chance_is_a_stream_that_its_seed_decides_and_costs_nothing_until_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def picks(*seed: object) -> list[int]:
        chance = Chance(*seed)
        return [chance.pick(range(1000)) for _ in range(5)]

    assert picks(0, "task") == picks(0, "task") != picks(1, "task")
    assert len(set(picks(0, "task"))) > 1

    def unwanted(*_: object) -> None:
        raise AssertionError("no chance was asked for")

    monkeypatch.setattr(random, "Random", unwanted)
    assert render("{{ label }}") == "1"
    assert "no chance was asked for" in refusal("{{ words | choice }}")


def test_the_bars_of_values_are_marked_and_those_of_the_template_are_not() -> None:
    jinja = "a|b{{ words[3] }}{{ '|' }}{% for w in words %}{{ w }}|{% endfor %}{% set x %}|{{ words[3] }}{% endset %}{{ x.split('|') | length }}{{ x }}"
    assert render(jinja, marked=True) == f"a|ba{BAR}b{BAR}sun|Moon|sun|a{BAR}b|3{BAR}a{BAR}b"
    assert render("{% macro m() %}{{ words[3] }}|{% endmacro %}{{ m() }}", marked=True) == f"a{BAR}b{BAR}"
    assert render("{% filter upper %}{{ words[3] }}|{% endfilter %}", marked=True) == f"A{BAR}B|"
    assert render(jinja) == render(jinja, marked=True).replace(BAR, "|")


def test_a_template_without_jinja_is_known_to_be_constant() -> None:
    assert load("No ||| Yes").constant == "No ||| Yes"
    assert load("{# a comment #}{% raw %}{{ x }}{% endraw %}").constant == "{{ x }}"
    assert load("{{ 'No' }}").constant is None


def test_the_names_that_a_template_needs_are_known() -> None:
    jinja = "{% set a = b %}{{ a }}{{ c.d[e] | join(f) }}{% for g in range(h) %}{{ g }}{{ loop.index }}{% endfor %}{% macro m(i) %}{{ i }}{{ j }}{% endmacro %}"
    assert variables(parse(jinja)) == {"b", "c", "e", "f", "h", "j"}
    assert variables(parse("{{ zip(a, b) | choice }}")) == {"a", "b"}


def test_compiling_is_done_once() -> None:
    assert load("{{ text }}!") is load("{{ text }}!")
    assert load("{{ text }}!") is not load("{{ text }}!", lenient=True)


@pytest.mark.parametrize(
    "jinja", ["{{ text.upper }}", "{{ range }}", "{{ namespace() }}", "{{ [range] }}", "{% macro m() %}{% endmacro %}{{ m }}"]
)
def test_what_has_an_address_is_not_printed(jinja: str) -> None:
    assert "cannot be printed" in refusal(jinja)


@pytest.mark.parametrize(
    ("jinja", "fault"),
    [
        ("a\n{{ text", "unexpected end of template, expected 'end of print statement'. (line 2)"),
        ("a\n\n{% if label %}", "Unexpected end of template. Jinja was looking for the following tags: 'elif' or 'else' or 'endif'."),
        ("\n{% shout %}", "Encountered unknown tag 'shout'. (line 2)"),
        ("\n{% block a %}{% endblock %}", "the tag 'block' is not allowed (line 2)"),
        ("{% autoescape true %}{% endautoescape %}", "the tag 'autoescape' is not allowed"),
        ("{{ 1 + }}", "unexpected 'end of print statement' (line 1)"),
    ],
)
def test_broken_jinja_is_named_with_its_line(jinja: str, fault: str) -> None:
    assert refusal(jinja).startswith(fault)
