"""Progress with the time left on everything that takes longer than a moment; a rare plain line when nobody watches."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
"""Everything that is not a result goes to standard error through this console."""

Advance = Callable[..., None]
PLAIN_SECONDS = 30.0
"""Where standard error is not a terminal, a line is printed this often instead of a bar."""


@contextlib.contextmanager
def progress(description: str, total: int, *, done: int = 0) -> Iterator[Advance]:
    """Show a bar with count, note, elapsed time and time left while the block runs.

    Yields `advance(num=1, note="")`.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(description, total=total, completed=done, note="")
        began = said = time.monotonic()
        count = done

        def advance(num: int = 1, note: str = "") -> None:
            nonlocal count, said
            count += num
            bar.update(task, advance=num, note=note)
            now = time.monotonic()
            if bar.disable and now - said > PLAIN_SECONDS and count < total:
                said = now
                left = (now - began) / max(1, count - done) * (total - count)
                say(f"{description}: {count}/{total} {note} about {left:.0f} s left")

        yield advance


def say(text: str) -> None:
    """One line for the person at the terminal, on standard error."""
    console.print(text, markup=False, soft_wrap=True)
