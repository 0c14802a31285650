"""Templates of a promptsource checkout (Bach et al. 2022), as they are: any release, or a folder of `templates.yaml`.

A template renders as promptsource 0.1.0 renders it, with three differences that make it a function of its row: the
`choice` filter is seeded, Jinja runs in the sandbox, and the cut of long variables is an option.
"""

import functools
from pathlib import Path
from typing import Any

import yaml

from mtllama.errors import UserError
from mtllama.tasks.template import Metadata, Template

TRUNCATE = 2048
"""Characters at which promptsource cuts a variable by default."""
_FILE = "templates.yaml"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML without code: promptsource's two tags become plain mappings, any other tag is an error."""


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, lambda loader, node: loader.construct_mapping(node, deep=True))


def templates_folder(path: Path) -> Path:
    """The folder that holds a folder per data set: `path` itself, or the one inside a checkout or an installed package."""
    for folder in (path / "promptsource" / "templates", path / "templates", path):
        if folder.is_dir() and next(folder.glob(f"*/{_FILE}"), None):
            return folder
    raise UserError(f"{path} holds no promptsource templates (<data set>/{_FILE}); give a checkout, or its folder of templates")


@functools.lru_cache(maxsize=256)
def read_templates(path: Path, name: str, truncate: int | None = TRUNCATE) -> tuple[Template, ...]:
    """The templates of the set `name` (`<dataset>[/<subset>]`), by name; none if the checkout does not have the set.

    `truncate`: characters at which a variable is cut, None for no cut.
    """
    file = templates_folder(path) / name / _FILE
    if not file.is_file():
        return ()
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    entries = values.get("templates") if isinstance(values, dict) else None
    if not isinstance(entries, dict):
        raise UserError(f"{file}: the key templates is missing; it maps ids to templates")
    found: dict[str, Template] = {}
    for key, entry in entries.items():
        template = _template(entry, f"{file}, template {key}", truncate)
        if template.name in found:
            raise UserError(f"{file}: two templates are called {template.name!r}; rename one")
        found[template.name] = template
    return tuple(found[name] for name in sorted(found))


def _template(entry: Any, where: str, truncate: int | None) -> Template:
    if not isinstance(entry, dict):
        raise UserError(f"{where}: a !Template mapping is needed")
    name, jinja, choices = entry.get("name"), entry.get("jinja"), entry.get("answer_choices")
    for key, value in (("name", name), ("jinja", jinja)):
        if not isinstance(value, str) or not value:
            raise UserError(f"{where}: its {key} is missing")
    if choices is not None and not isinstance(choices, str):
        raise UserError(f"{where}: its answer_choices is not text")
    metadata = entry.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise UserError(f"{where}: its metadata is not a !TemplateMetadata mapping")
    for key in ("metrics", "languages"):
        if not isinstance(metadata.get(key) or [], list):
            raise UserError(f"{where}: {key} of its metadata is {metadata[key]!r}; a list is needed")
    return Template(
        name=str(name),
        jinja=str(jinja),
        answer_choices=choices,
        metadata=Metadata(
            original_task=bool(metadata.get("original_task")),
            choices_in_prompt=bool(metadata.get("choices_in_prompt")),
            metrics=tuple(metadata.get("metrics") or ()),
            languages=tuple(metadata.get("languages") or ("en",)),
        ),
        truncate=truncate,
        lenient=True,
    )
