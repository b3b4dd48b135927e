"""``Shown``: how a result looks in a notebook, and how it leaves it as plain Python or as a pandas table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stage1_pro.errors import DependencyError

if TYPE_CHECKING:
    from pandas import DataFrame

# Rows of a table that a notebook shows from either end.
_SHOWN = 5
_LONGEST = 60


class Shown:
    """Base of results: one short line as text, a small table in a notebook, ``to_dict`` and ``to_pandas``.

    For records and dataclasses; a field of a dataclass that its repr leaves out is left out here.
    """

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Fields as plain Python: numbers (also NaN), text, lists and mappings."""
        return {name: _plain(value) for name, value in self._fields().items()}

    def to_pandas(self) -> DataFrame:
        """A pandas table: a row for each element of its arrays, or of its list of records, else one row of its fields.

        What is no column is in ``attrs``.

        Raises:
            DependencyError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise DependencyError("pandas must be installed for a table, but it is not; pip install pandas") from None
        columns, rest = self._table()
        frame = pd.DataFrame(columns)
        frame.attrs.update({name: _plain(value) for name, value in rest.items()})
        return frame

    def __repr__(self) -> str:
        told = {name: _short(value) for name, value in self._fields().items() if not _says_nothing(value)}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in told.items())})"

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        import html

        columns, rest = self._table()
        told = ", ".join(f"{name} {_short(value)}" for name, value in rest.items() if not _says_nothing(value))
        n = max((len(column) for column in columns.values()), default=0)
        rows = list(range(n)) if n <= 2 * _SHOWN else [*range(_SHOWN), -1, *range(n - _SHOWN, n)]
        cells = [["…" if row < 0 else _short(column[row]) for column in columns.values()] for row in rows]
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in line)}</tr>" for line in cells)
        caption = html.escape(f"{type(self).__name__}{': ' if told else ''}{told}")
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def __dir__(self) -> list[str]:
        # Without pydantic's own methods, of which there are more than fields.
        kinds = [kind for kind in type(self).__mro__ if kind.__module__.partition(".")[0] != "pydantic"]
        found = {name for kind in kinds for name in vars(kind)} | set(vars(self))
        return sorted(name for name in found if not name.startswith("_") and name != "model_config")

    def _fields(self) -> dict[str, Any]:
        """What it holds, by name."""
        kind: Any = type(self)
        if dataclasses.is_dataclass(kind):
            return {one.name: getattr(self, one.name) for one in dataclasses.fields(kind) if one.repr}
        return {name: getattr(self, name) for name in kind.model_fields}

    def _table(self) -> tuple[dict[str, Sequence[Any]], dict[str, Any]]:
        """Columns of one length, and what is none."""
        fields = self._fields()
        columns: dict[str, Sequence[Any]] = {n: v for n, v in fields.items() if len(getattr(v, "shape", ())) == 1}
        if not columns:
            listed = next((name for name, value in fields.items() if _are_records(value)), None)
            if listed is not None:
                rows = [one._fields() for one in fields[listed]]
                columns = {name: [_plain(row[name]) for row in rows] for name in rows[0]}
                return columns, {name: value for name, value in fields.items() if name != listed}
            columns = {name: [_plain(value)] for name, value in fields.items()}
        return columns, {name: value for name, value in fields.items() if name not in columns}


def _are_records(value: Any) -> bool:
    if not isinstance(value, list | tuple) or not value or not isinstance(value[0], Shown):
        return False
    return all(type(one) is type(value[0]) for one in value)


def _plain(value: Any) -> Any:
    if isinstance(value, Shown):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in value]
    # Arrays and NumPy's scalars know how.
    return value.tolist() if hasattr(value, "tolist") else value


def _short(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return value if len(value) <= _LONGEST else f"{value[: _LONGEST - 1]}…"
    shape = getattr(value, "shape", None)
    if shape == ():
        return _short(value.item())
    if shape is not None:
        ends = f" {_short(value[0].item())} … {_short(value[-1].item())}" if len(shape) == 1 and shape[0] else ""
        return f"{list(shape)}{ends}"
    if isinstance(value, Shown):
        return f"{type(value).__name__}(…)"
    if isinstance(value, list | tuple | Mapping | set | frozenset):
        if isinstance(value, Mapping | set | frozenset) or len(value) > 3:
            return f"{type(value).__name__} of {len(value)}"
        return f"[{', '.join(map(_short, value))}]"
    return _short(str(value))


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value) or (isinstance(value, float) and math.isnan(value))
