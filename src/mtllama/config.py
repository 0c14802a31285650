"""YAML and `key=value` words -> frozen dataclasses. An unknown key is an error that names the nearest one."""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mtllama.errors import UserError

Config = TypeVar("Config")


def load_config(kind: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file `path` into the dataclass `kind`, `overrides` (`section.key=value`) winning over the file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"recipe {path} does not exist; give a YAML file, or the name of a shipped one, such as quickstart") from error
    except (yaml.YAMLError, ValueError, OSError) as error:  # ValueError: not UTF-8, or a date such as 2026-13-01
        raise UserError(f"recipe {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} is not a mapping of keys to values")
    return override(kind, values, str(path), overrides)


def override(kind: type[Config], values: dict[str, Any], where: str, words: Sequence[str]) -> Config:
    """Make the dataclass `kind` of `values`, the words (`section.key=value`) winning over them."""
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"'{word}' is not key=value, as in train.lr=1e-5")
        _set(values, key.split("."), _parse(text, word), word)
    return build(kind, values, where)


def build(kind: type[Config], values: dict[str, Any], where: str, prefix: str = "") -> Config:
    """Make the dataclass `kind` of `values`, checking names and types; `where` names the source in errors."""
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = _hints(kind)  # type: ignore[arg-type]
    arguments = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.4)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise UserError(f"{where}: unknown key {prefix}{key}; {hint}")
        arguments[key] = _convert(hints[key], value, where, prefix + str(key))
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise UserError(f"{where}: the key {prefix}{name} is missing")
    try:
        return kind(**arguments)
    except (ValueError, UserError) as error:
        raise UserError(f"{where}: {error}") from error


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """Field -> type of a dataclass; kept, since a catalogue asks for those of a few kinds a thousand times."""
    return typing.get_type_hints(kind)


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    """`value` as the type `hint`; numbers written as text (1e-5 is text in YAML 1.1) become numbers."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        kinds = [a for a in args if a is not type(None)]
        for kind in kinds:
            try:
                return _convert(kind, value, where, key)
            except UserError:
                if kind is kinds[-1] or (typing.get_origin(kind) is dict and isinstance(value, dict)):
                    raise
    if origin is typing.Literal:
        if value in args:
            return value
        raise UserError(f"{where}: {key} is {value!r}; choose one of {', '.join(map(str, args))}")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, dict):
            return build(hint, value, where, key + ".")
        raise UserError(f"{where}: {key} is {value!r}; a mapping is needed")
    if origin is dict and isinstance(value, dict):
        return {_convert(args[0], k, where, key): _convert(args[1], v, where, f"{key}.{k}") for k, v in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_convert(args[0], v, where, key) for v in value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif (hint is int and isinstance(value, int) and not isinstance(value, bool)) or (hint in (bool, str) and isinstance(value, hint)):
        return value
    elif hint is Path and isinstance(value, str):
        return Path(value).expanduser()
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    raise UserError(f"{where}: {key} is {value!r}; {'a number' if hint is float else name} is needed")


def _parse(text: str, word: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"the value of '{word}' is not valid YAML") from error


def _set(values: dict[str, Any], keys: list[str], value: Any, word: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise UserError(f"'{word}': {key} is not a section of the recipe")
    values[keys[-1]] = value


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, for manifests."""
    return {key: _plain(value) for key, value in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value
