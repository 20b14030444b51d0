"""What a person sees while work goes on: progress with rate and time left, tables, lines."""

import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.cells import cell_len
from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

_FILE_COLUMNS = 140


def is_main_process() -> bool:
    """Return whether this process speaks and writes: the first that a launcher began, or alone."""
    return os.environ.get("RANK", "0") in ("", "0")


class Advance(Protocol):
    """Moves a progress bar and says how things stand."""

    def __call__(self, amount: float = 1, note: str = "") -> None:
        """Add `amount` to what is done."""
        ...


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s")


class _Terminal(RichConsole):
    """A terminal whose reader may go away, which must not stop work that is under way."""

    def on_broken_pipe(self) -> None:
        """Print no more."""
        self.quiet = True
        discard_output()


def discard_output() -> None:
    """Let standard output lead nowhere: whoever read it has gone."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class Console:
    """Writes to the terminal; a quiet one shows results but no progress.

    >>> console = Console(quiet=True)
    >>> with console.track("reading", total=3) as advance:
    ...     advance(3, "done")
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._rich = _Terminal(highlight=False, soft_wrap=True, emoji=False)
        if not self._rich.is_terminal and "COLUMNS" not in os.environ:
            # a file or a pipe is as wide as a table needs
            self._rich.width = _FILE_COLUMNS

    @contextmanager
    def track(self, description: str, total: float | None) -> Iterator[Advance]:
        """Show a progress bar while the block runs."""
        if self.quiet:
            yield lambda amount=1, note="": None
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._rich) as progress:
            task = progress.add_task(description, total=total, note="")

            def advance(amount: float = 1, note: str = "") -> None:
                progress.update(task, advance=amount, note=note)

            yield advance

    def say(self, text: str) -> None:
        """Print a line of progress; a quiet console leaves it out."""
        if not self.quiet:
            self.show(text)

    def show(self, text: str) -> None:
        """Print a line of the result."""
        self._rich.print(text, markup=False)

    def write(self, text: str) -> None:
        """Print a piece of a line at once."""
        self._rich.print(text, markup=False, end="")
        self._rich.file.flush()

    def aside(self, text: str) -> None:
        """Print a line that is about the result, dimmed."""
        self._rich.print(text, markup=False, style="dim")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table of the result; turned, some rows after others, where it is too wide."""
        lines = [list(columns), *([format_cell(value) for value in row] for row in rows)]
        if _width(lines) <= self._rich.width or len(columns) < 3 or not rows:
            self._rich.print(_table(title, lines))
            return
        head, left, part = lines[0], lines[1:], 0
        while left:
            count = len(left)
            while count > 1 and _width(_turned([head, *left[:count]]), 0) > self._rich.width:
                count -= 1
            part += 1
            more = part > 1 or count < len(left)
            named = f"{title} ({part})" if more else title
            self._rich.print(_table(named, _turned([head, *left[:count]]), 0))
            left = left[count:]


def _turned(lines: list[list[str]]) -> list[list[str]]:
    """Return columns as lines."""
    return [list(line) for line in zip(*lines, strict=True)]


def _width(lines: list[list[str]], breaking: int = 1) -> int:
    """Return the columns of a terminal that a table takes, whose first may break its lines."""
    columns = _turned(lines)
    words = [[word for cell in column for word in cell.split()] for column in columns[:breaking]]
    widest = (max(map(cell_len, [*column, ""])) for column in (*words, *columns[breaking:]))
    return sum(width + 3 for width in widest) + 1


def _table(title: str, lines: list[list[str]], breaking: int = 1) -> Table:
    """Return a table for a terminal, the first line its head; so many columns may break lines."""
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(lines[0]):
        side = "left" if number == 0 else "right"
        table.add_column(name, justify=side, no_wrap=number >= breaking)
    for line in lines[1:]:
        table.add_row(*line)
    return table


def printable(text: str) -> str:
    r"""Return text without what would move or colour a terminal.

    >>> printable("a\x1b[31m\nb\x00")
    'a\ufffd[31m\nb\ufffd'
    """
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in text)


def format_cell(value: object) -> str:
    """Return a table cell: numbers to four significant digits, None as a dash.

    >>> format_cell(0.123456), format_cell(None), format_cell(3), format_cell(True)
    ('0.1235', '-', '3', 'yes')
    """
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
