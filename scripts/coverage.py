"""The coverage table of docs/mixture.md: what of the T0 training mixture was read and rendered from real files.

    python scripts/coverage.py DATA/train PROMPTSOURCE P3 [--write]

Prints the table; --write puts it into docs/mixture.md between its two markers.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mtllama.errors import UserError
from mtllama.folders import write_text
from mtllama.tasks import p3
from mtllama.tasks.catalog import Rows, Task, find_tasks, load_rows
from mtllama.tasks.promptsource import read_templates
from mtllama.tasks.template import Template

DOC = Path(__file__).resolve().parents[1] / "docs" / "mixture.md"
BEGIN, END = "<!-- coverage -->\n", "<!-- end of coverage -->\n"
ABSENT = "no rows"


def table(data: Path, promptsource: Path, p3_dir: Path) -> str:
    """The table as Markdown."""
    rendered = p3.find(p3_dir, "train")
    lines = ["| set | family | own prompts | promptsource templates | P3 tasks, rows |", "|---|---|---|---|---|"]
    totals = [0, 0, 0, 0, 0, 0]
    tasks = find_tasks(["t0-train"])
    for task in tasks:
        rows, templates = _rows(task, data), read_templates(promptsource, task.promptsource or "")
        own, theirs = _asked(rows, task.prompts), _asked(rows, templates)
        found = [rendered[name] for name in (p3.config_name(task.name, t) for t in task.p3_templates) if name in rendered]
        read = sum(1 for each in found for i in range(len(each)) if each.example(i))
        counts = (own or 0, len(task.prompts), theirs or 0, len(templates), len(found), read)
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        lines.append(
            f"| {task.name} | {task.family} | {_of(own, len(task.prompts))} | {_of(theirs, len(templates))} | "
            f"{f'{len(found)}/{len(task.p3_templates)}, {read:,}' if found else ABSENT} |"
        )
    own, of_own, theirs, of_theirs, configs, read = totals
    lines.append(f"| **{len(tasks)} sets** | | {own}/{of_own} | {theirs}/{of_theirs} | {configs}/313, {read:,} |")
    return "\n".join(lines) + "\n"


def _rows(task: Task, data: Path) -> Rows | None:
    try:
        return load_rows(task, data, "train")
    except UserError as error:
        if "no file for the split" in str(error):
            return None
        raise


def _asked(rows: Rows | None, templates: Sequence[Template]) -> int | None:
    """How many of the templates render some real row."""
    if rows is None:
        return None
    fit = [template for template in templates if not template.variables - rows.rows[0].keys()]
    return sum(any(rows.render(i, template) for i in range(len(rows.rows))) for template in fit)


def _of(count: int | None, total: int) -> str:
    return f"{total} written, {ABSENT}" if count is None else f"{count}/{total}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "promptsource", "p3"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args(argv)
    made = table(arguments.data, arguments.promptsource, arguments.p3)
    sys.stdout.write(made)
    if arguments.write:
        text = DOC.read_text(encoding="utf-8")
        write_text(DOC, text[: text.index(BEGIN) + len(BEGIN)] + made + text[text.index(END) :])


if __name__ == "__main__":
    main()
