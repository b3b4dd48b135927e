"""What commands print: lines and tables of one width, the same on every terminal, and notes marked by number."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


class Sheet:
    """Lines and tables, as text of at most ``width`` columns; no colour, and brackets are brackets."""

    def __init__(self, width: int = 118) -> None:
        from rich.console import Console

        self._buffer = io.StringIO()
        self._console = Console(file=self._buffer, width=width, color_system=None, highlight=False, markup=False)

    def add(self, *parts: str | Table) -> None:
        """Add lines, which are wrapped, and tables."""
        for part in parts:
            self._console.print(part)

    def text(self) -> str:
        """Everything that was added."""
        return self._buffer.getvalue().rstrip()


class Notes:
    """Notes to figures: each is written once, and its number stands at the figures that it speaks of."""

    def __init__(self) -> None:
        self._notes: list[str] = []

    def mark(self, note: str) -> str:
        """Give " (1)" for the first note, and so on; nothing for an empty one."""
        if not note:
            return ""
        if note not in self._notes:
            self._notes.append(note)
        return f" ({self._notes.index(note) + 1})"

    def lines(self) -> list[str]:
        """The notes with their numbers."""
        return [f"({number}) {note}" for number, note in enumerate(self._notes, 1)]


def grid(
    names: Sequence[str],
    *,
    left: Collection[str] = (),
    no_wrap: Collection[str] | None = None,
    title: str | None = None,
) -> Table:
    """A table without lines between its rows; columns stand on the right unless ``left`` names them.

    Those of ``no_wrap`` are never wrapped; None = all.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="left" if name in left else "right", no_wrap=no_wrap is None or name in no_wrap)
    return table


def interval(value: float | None, low: float | None, high: float | None, *, digits: int = 4) -> str:
    """A figure with its interval as text: "0.1234 [0.1000, 0.2000]", "0.1234 (<= 0.2000)" or "-"."""
    if value is None:
        return "-"
    if high is None:
        return f"{value:.{digits}f}"
    if low is None:
        return f"{value:.{digits}f} (<= {high:.{digits}f})"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
