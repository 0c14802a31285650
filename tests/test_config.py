"""A recipe is read strictly: what is not understood is an error that names the file, the key and the way out."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtllama.config import build, load_config, to_dict
from mtllama.errors import UserError
from mtllama.tasks.catalog import Task, catalog
from mtllama.train.recipe import Recipe


@dataclass(frozen=True)
class Oven:
    heat: float
    fan: bool = False
    mode: Literal["top", "bottom"] = "top"
    minutes: int = 10

    def __post_init__(self) -> None:
        if self.heat < 0:
            raise ValueError(f"oven.heat is {self.heat}; it must not be negative")
        if self.heat > 400:
            raise UserError(f"oven.heat is {self.heat}; that is a fire")


@dataclass(frozen=True)
class Cake:
    name: str
    oven: Oven
    tin: Path | None = None
    parts: dict[str, float] | tuple[str, ...] | None = None
    layers: tuple[str, ...] = ("dough",)
    ovens: tuple[Oven, ...] = ()
    spare: Oven = field(default_factory=lambda: Oven(100.0))


GOOD: dict[str, Any] = {"name": "Sacher", "oven": {"heat": 180}}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "cake.yaml"
    path.write_text("name: Sacher\noven:\n  heat: 180\n  fan: true\nlayers: [dough, jam]\n", encoding="utf-8")
    return path


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as raised:
        build(Cake, values, "cake.yaml")
    message = str(raised.value)
    assert message.startswith("cake.yaml: ") and "\n" not in message
    return message.removeprefix("cake.yaml: ")


def test_a_file_becomes_frozen_dataclasses_and_what_it_leaves_out_the_defaults(recipe: Path) -> None:
    assert load_config(Cake, recipe) == Cake("Sacher", Oven(180.0, fan=True), None, None, ("dough", "jam"), (), Oven(100.0))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**GOOD, "nmae": "x"}, "unknown key nmae; did you mean name?"),
        ({**GOOD, "oven": {"heat": 1, "minuets": 2}}, "unknown key oven.minuets; did you mean oven.minutes?"),
        ({**GOOD, "spare": {"haet": 1}}, "unknown key spare.haet; did you mean spare.heat?"),
        ({**GOOD, "oven": {"heat": 1, "xyzzy": 2}}, "unknown key oven.xyzzy; known keys: heat, fan, mode, minutes"),
        ({**GOOD, "7": 1}, "unknown key 7; known keys: name, oven, tin, parts, layers, ovens, spare"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest_with_its_section(values: dict[str, Any], message: str) -> None:
    assert refusal(values) == message


def test_a_missing_key_is_named_with_its_section() -> None:
    assert refusal({"oven": {"heat": 1}}) == "the key name is missing"
    assert refusal({"name": "Sacher"}) == "the key oven is missing"
    assert refusal({"name": "Sacher", "oven": {}}) == "the key oven.heat is missing"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": 3}, "name is 3; str is needed"),
        ({"name": None}, "name is None; str is needed"),
        ({"oven": 180}, "oven is 180; a mapping is needed"),
        ({"oven": None}, "oven is None; a mapping is needed"),
        ({"oven": {"heat": "hot"}}, "oven.heat is 'hot'; a number is needed"),
        ({"oven": {"heat": True}}, "oven.heat is True; a number is needed"),
        ({"oven": {"heat": [1]}}, "oven.heat is [1]; a number is needed"),
        ({"oven": {"heat": 1, "fan": 1}}, "oven.fan is 1; bool is needed"),
        ({"oven": {"heat": 1, "fan": "yes"}}, "oven.fan is 'yes'; bool is needed"),
        ({"oven": {"heat": 1, "minutes": 1.5}}, "oven.minutes is 1.5; int is needed"),
        ({"oven": {"heat": 1, "minutes": True}}, "oven.minutes is True; int is needed"),
        ({"oven": {"heat": 1, "minutes": "9"}}, "oven.minutes is '9'; int is needed"),
        ({"oven": {"heat": 1, "mode": "left"}}, "oven.mode is 'left'; choose one of top, bottom"),
        ({"oven": {"heat": 1, "mode": ["top"]}}, "oven.mode is ['top']; choose one of top, bottom"),
        ({"tin": 5}, "tin is 5; Path is needed"),
        ({"layers": "jam"}, "layers is 'jam'; tuple[str, ...] is needed"),
        ({"layers": ["jam", 1]}, "layers is 1; str is needed"),
        ({"parts": "flour"}, "parts is 'flour'; tuple[str, ...] is needed"),
        ({"parts": {"flour": "much"}}, "parts.flour is 'much'; a number is needed"),
        ({"parts": ["flour", 2]}, "parts is 2; str is needed"),
        ({"ovens": [{"heat": 1}, {"heta": 1}]}, "unknown key ovens.heta; did you mean ovens.heat?"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_key(values: dict[str, Any], message: str) -> None:
    assert refusal({**GOOD, **values}) == message


@pytest.mark.parametrize("heat", [-1, 500])
def test_what_a_dataclass_itself_refuses_is_named_with_the_file(heat: int) -> None:
    assert refusal({**GOOD, "oven": {"heat": heat}}).startswith(f"oven.heat is {float(heat)}; ")


def test_every_kind_of_value_is_accepted_where_it_belongs() -> None:
    cake = build(
        Cake,
        {**GOOD, "tin": "tins/round", "parts": {"flour": 2, "sugar": "1e-1"}, "ovens": [{"heat": "1e2", "mode": "bottom"}], "layers": []},
        "cake.yaml",
    )
    assert cake == Cake("Sacher", Oven(180.0), Path("tins/round"), {"flour": 2.0, "sugar": 0.1}, (), (Oven(100.0, mode="bottom"),))
    assert build(Cake, {**GOOD, "parts": ["flour", "eggs"]}, "x").parts == ("flour", "eggs")
    assert build(Cake, {**GOOD, "parts": None}, "x").parts is None


@pytest.mark.parametrize(("text", "number"), [("1e-5", 1e-5), ("2E3", 2000.0), ("1.0e-4", 1e-4), ("3", 3.0), ("-.5", -0.5)])
def test_numbers_that_yaml_takes_for_text_become_numbers(recipe: Path, text: str, number: float) -> None:
    recipe.write_text(f"name: n\noven: {{heat: 1}}\nparts: {{flour: {text}}}\n", encoding="utf-8")
    assert load_config(Cake, recipe).parts == {"flour": number}
    assert load_config(Cake, recipe, [f"parts.flour={text}"]).parts == {"flour": number}


def test_a_tilde_in_a_path_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build(Cake, {**GOOD, "tin": "~/tins"}, "x").tin == tmp_path / "tins"
    assert build(Cake, {**GOOD, "tin": "a/~b"}, "x").tin == Path("a/~b")


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(recipe: Path) -> None:
    overrides = ["oven.heat=200", "name=Linzer", "spare.heat=1e1", "layers=[nuts, jam]", "oven.heat=210", "tin=", "oven.mode=bottom"]
    assert load_config(Cake, recipe, overrides) == Cake(
        "Linzer", Oven(210.0, fan=True, mode="bottom"), None, None, ("nuts", "jam"), (), Oven(10.0)
    )


def test_an_override_may_hold_an_equals_sign_and_a_mapping(recipe: Path) -> None:
    cake = load_config(Cake, recipe, ["name=a=b", "parts={flour: 1, sugar: 2}", "parts.sugar=3"])
    assert cake.name == "a=b"
    assert cake.parts == {"flour": 1.0, "sugar": 3.0}


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("oven.heat", "'oven.heat' is not key=value"),
        ("=5", "'=5' is not key=value"),
        ("", "'' is not key=value"),
        ("name=[1, 2", "the value of 'name=[1, 2' is not valid YAML"),
        ("name=2026-13-01", "the value of 'name=2026-13-01' is not valid YAML"),
        ("name.first=x", "'name.first=x': name is not a section of the recipe"),
        ("oven.heat.low=1", "heat is not a section of the recipe"),
        ("oven.haet=1", "unknown key oven.haet; did you mean oven.heat?"),
        ("ovne.heat=1", "unknown key ovne; did you mean oven?"),
        ("oven..heat=1", "unknown key oven.;"),
        ("oven=5", "oven is 5; a mapping is needed"),
    ],
)
def test_an_override_that_is_not_understood_is_an_error_that_names_it(recipe: Path, override: str, part: str) -> None:
    with pytest.raises(UserError) as raised:
        load_config(Cake, recipe, ["oven.fan=false", override])
    assert part in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [b"name: [unclosed\n", b"a: b: c\n", b"\tname: x\n", b"name: \xff\xfe\n", b"!!python/object:os.system {}\n", b"name: 2026-13-01\n"],
)
def test_a_file_that_is_not_yaml_is_an_error_that_names_it(recipe: Path, content: bytes) -> None:
    recipe.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_config(Cake, recipe)
    assert str(raised.value).startswith(f"recipe {recipe} cannot be read: ") and "\n" not in str(raised.value)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text\n", "# only a comment\n"])
def test_a_file_that_is_no_mapping_is_an_error_that_names_it(recipe: Path, content: str) -> None:
    recipe.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"recipe .*cake\.yaml is not a mapping of keys to values"):
        load_config(Cake, recipe)


def test_a_file_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipe .*nothing\.yaml does not exist"):
        load_config(Cake, tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(Cake, tmp_path)


def test_errors_inside_a_file_name_the_file(recipe: Path) -> None:
    recipe.write_text("name: x\noven: {heat: 1, colour: red}\n", encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load_config(Cake, recipe)
    assert str(raised.value).startswith(f"{recipe}: unknown key oven.colour; ")


NUMBERS = st.floats(0, 400, allow_nan=False)
OVENS = st.builds(Oven, NUMBERS, st.booleans(), st.sampled_from(["top", "bottom"]), st.integers())
WORDS = st.text(max_size=8)
CAKES = st.builds(
    Cake,
    WORDS,
    OVENS,
    st.none() | st.sampled_from([Path("tin"), Path("/a/b c")]),
    st.none() | st.dictionaries(WORDS, NUMBERS, max_size=3) | st.lists(WORDS, max_size=3).map(tuple),
    st.lists(WORDS, max_size=3).map(tuple),
    st.lists(OVENS, max_size=2).map(tuple),
    OVENS,
)


@given(cake=CAKES)
@settings(deadline=None, max_examples=60)
def test_a_config_survives_the_way_through_json(cake: Cake) -> None:
    plain = json.loads(json.dumps(to_dict(cake)))
    assert build(Cake, plain, "manifest") == cake


def test_the_configs_of_the_package_survive_the_way_through_json() -> None:
    values = {"out": "runs/x", "train": {"examples": 32, "lr": "1e-5"}, "mixture": {"dir": "sampler", "tasks": ["trec", "samsum"]}}
    recipe = build(Recipe, values, "recipe")
    assert recipe.train.lr == 1e-5 and recipe.mixture.tasks == ("trec", "samsum")
    assert build(Recipe, json.loads(json.dumps(to_dict(recipe))), "manifest") == recipe
    for task in catalog().values():
        assert build(Task, json.loads(json.dumps(to_dict(task))), task.name) == task
    assert len(catalog()) > 20
