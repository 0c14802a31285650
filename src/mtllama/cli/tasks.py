"""The commands for the catalogue of data sets and their prompts."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mtllama.cli.options import AsJson, DataDir, group, print_json, print_table
from mtllama.errors import UserError

tasks = group("The catalogue of data sets and their prompts.")


@tasks.command("list")
def tasks_list(
    family: Annotated[str | None, typer.Option("--family", help="Only this family.")] = None,
    role: Annotated[str | None, typer.Option("--role", help="Only this role: train, unseen data set, unseen task.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the data sets of the catalogue. Example: mtllama tasks list --role train"""
    from mtllama.progress import say
    from mtllama.tasks.catalog import catalog

    known = catalog().values()
    for kind, value, values in (("family", family, {t.family for t in known}), ("role", role, {t.role for t in known})):
        if value is not None and value.lower() not in {str(v).lower() for v in values}:
            raise UserError(f"unknown {kind} {value!r}; choose one of {', '.join(sorted(values))}")
    found = [
        t for t in known if (family is None or t.family.lower() == family.lower()) and (role is None or t.role.lower() == role.lower())
    ]
    if as_json:
        print_json(
            [
                {
                    "name": t.name,
                    "family": t.family,
                    "role": t.role,
                    "metrics": t.metrics,
                    "languages": t.languages,
                    "hub_id": t.location.hub_id,
                    "config": t.location.config,
                    "revision": t.location.revision,
                    "splits": t.splits,
                    "prompts": [p.name for p in t.prompts],
                }
                for t in found
            ]
        )
        return
    pairs = [t.name for t in found if len(t.languages) == 2]
    print_table(
        ("task", "family", "role", "metric", "prompts"),
        [(t.name, t.family, t.role, t.metric, ", ".join(p.name for p in t.prompts)) for t in found if t.name not in pairs],
    )
    if pairs:
        say(f"and {len(pairs)} that ask about a context in another language, such as {pairs[0]} (context, question); --json lists them")


@tasks.command("show")
def tasks_show(name: Annotated[str, typer.Argument(metavar="TASK")], as_json: AsJson = False) -> None:
    """Show a data set: where it is, how it is judged, its prompts. Example: mtllama tasks show copa"""
    from mtllama import config

    task = _one_task(name)
    if as_json:
        print_json(config.to_dict(task))
        return
    where = " ".join(filter(None, (task.location.hub_id, task.location.config, task.location.revision)))
    print(
        f"{task.name}: {task.title}\n{task.family}, {task.role}; metrics {', '.join(task.metrics)}; split {task.split}; licence {task.licence}"
    )
    sizes = ", ".join(f"{split} {size:,}" for split, size in task.splits.items())
    print(f"hub: {where}\nrows: {sizes}\ncolumns: {', '.join(task.columns)}")
    for template in task.prompts:
        print(f"\n[{template.name}]{'' if template.metadata.original_task else ' (not the original task)'}\n{template.jinja}")
        if template.answer_choices:
            print(f"choices: {template.answer_choices}")


def _one_task(name: str) -> Any:
    """A data set by its own name."""
    from mtllama.tasks.catalog import GROUPS, find_tasks

    if name in GROUPS:
        raise UserError(f"{name} is a group of data sets; name one of them (see: mtllama tasks list)")
    (task,) = find_tasks([name])
    return task


@tasks.command("render")
def tasks_render(
    name: Annotated[str, typer.Argument(metavar="TASK")],
    template: Annotated[str | None, typer.Option("--template", metavar="NAME", help="One prompt; default: all.")] = None,
    index: Annotated[int, typer.Option("--index", metavar="I", help="Row number.")] = 0,
    promptsource: Annotated[
        Path | None, typer.Option("--promptsource", metavar="DIR", help="Templates of a promptsource checkout in place of the catalogue's.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", metavar="S", help="Default: the protocol's own, else validation, else test.")
    ] = None,
    data_dir: DataDir = Path("sampler"),
    as_json: AsJson = False,
) -> None:
    """Render a row with its prompts. Example: mtllama tasks render copa --index 3"""
    from mtllama import config
    from mtllama.tasks.catalog import data_folder, find_template, load_rows
    from mtllama.tasks.promptsource import read_templates

    task = _one_task(name)
    templates = task.prompts if promptsource is None else read_templates(promptsource, task.promptsource or "")
    if not templates:
        raise UserError(f"{promptsource} has no templates for {name}")
    rows = load_rows(task, data_folder(data_dir), split)
    if not 0 <= index < len(rows.rows):
        raise UserError(f"--index is {index}; {rows.origin} has the rows 0 to {len(rows.rows) - 1}")
    chosen = [find_template(task, templates, template)] if template else templates
    examples = [(each, rows.render(index, each)) for each in chosen]
    if as_json:
        print_json([config.to_dict(example) if example else {"template": each.name, "applies": False} for each, example in examples])
        return
    for each, example in examples:
        print(f"[{each.name}]")
        if example is None:
            print("does not apply to this row\n")
            continue
        print(f"{example.inputs}\n-> {example.targets}")
        if example.choices:
            print(f"choices: {' | '.join(example.choices)}")
        print()
