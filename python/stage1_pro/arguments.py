"""What a user gives to a public function: arrays, names and numbers, checked by name; and comparisons in their dtype.

Arrays may be lists, NumPy arrays, pandas columns and tables, or torch tensors (with a gradient, on a device, in
bfloat16): neither pandas nor torch is imported. Masked entries are refused, never read.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stage1_pro.errors import InputError, nearest, printable

Grid = Literal["bfloat16", "float16", "float32", "float64", "integer"]
_PLAIN = {bool, int, float, str, bytes, type(None), np.float64, np.float32, np.int64, np.bool_}


# -------------------------------------------------------------------------------- arrays


def array(name: str, given: object) -> NDArray[Any]:
    """Give numbers as an array of any shape, in the dtype they came in (bfloat16 as float32); None and NA are NaN.

    Raises:
        InputError: anything but real numbers, such as text, rows of unlike length, or a masked entry.
    """
    if type(given) is np.ndarray and given.dtype.kind in "biuf":
        return given
    values = _to_numpy(name, given)
    if values.dtype.kind == "O":
        values = _of_objects(name, values)
    if values.dtype.kind not in "biuf":
        what = "text" if values.dtype.kind in "US" else f"an array of {values.dtype}"
        raise InputError(f"{name} must be numbers, got {what}; convert it first")
    return values


def floats(name: str, given: object) -> NDArray[np.float64]:
    """Give ``array`` in float64, which holds every number of a narrower dtype exactly.

    Raises:
        InputError: as ``array``; or whole numbers beyond 2^53, some of which are one in float64.
    """
    values = array(name, given)
    listed = given if isinstance(given, list | tuple) else ()
    wide = values.dtype.kind in "iu" and values.dtype.itemsize == 8 and values.size
    if (wide and (values.max() > 2**53 or values.min() < -(2**53))) or any(
        isinstance(one, int) and abs(one) > 2**53 for one in listed
    ):
        raise InputError(f"{name} must be whole numbers up to 2^53, got a larger one; subtract the smallest first")
    return np.asarray(values, dtype=np.float64)


def binary(name: str, given: object, shape: tuple[int, ...] | None = None) -> NDArray[np.bool_]:
    """Give booleans, or numbers that are all 0 or 1, as bool of that shape; of any without one.

    Raises:
        InputError: another shape, or another value, named by its row.
    """
    values = array(name, given)
    if shape is not None and values.shape != shape:
        raise InputError(f"{name} must have shape {list(shape)}, got {list(values.shape)}; give one per row")
    if values.dtype == np.bool_:
        return values
    other = np.flatnonzero(~np.isin(values, (0, 1)))
    if other.size:
        raise InputError(f"{name} must be booleans or 0/1, got {values.flat[other[0]]:g} at row {other[0]}")
    return values.astype(np.bool_)


def indices(
    name: str, given: object, n: int | None = None, n_classes: int | None = None, *, like: str = "scores"
) -> NDArray[np.int64]:
    """Give class indices [N], as int64; floats are taken where they are whole; ``like`` what has N rows.

    Raises:
        InputError: another shape, or what is no index of a class, named by its row.
    """
    advice = "number the classes in the order of the columns"
    values = _to_numpy(name, given)
    if values.dtype.kind in "US":
        raise InputError(f"{name} must be class indices, got text; {advice}")
    values = array(name, values)
    if values.ndim != 1 or (n is not None and values.size != n):
        asked = "[N]" if n is None else f"[{n}] as {like}"
        raise InputError(f"{name} must have shape {asked}, got {list(values.shape)}; give one per row")
    wrong = values != np.floor(values) if values.dtype.kind == "f" else np.zeros(values.shape, dtype=bool)
    if values.dtype != np.bool_:
        wrong |= (values < (0 if n_classes else -(2**62))) | (values >= (n_classes or 2**62))
    if wrong.any():
        row = int(wrong.argmax())
        which = "class indices" if n_classes is None else f"class indices 0 to {n_classes - 1}"
        raise InputError(f"{name} must be {which}, got {values[row]} at row {row}; {advice}")
    return values.astype(np.int64)


def names(name: str, given: object, n: int, *, like: str = "scores") -> NDArray[Any]:
    """Give a name or number for every row, [n] as ``like`` has; NaN, None and NA are no names.

    Raises:
        InputError: another shape, a row without a name, a masked one, names mixed with numbers, or with a NUL at the
            end, which NumPy drops.
    """
    if isinstance(given, list | tuple):
        # NumPy makes text of a gap among names.
        plain = [one.item() if isinstance(one, np.ndarray) and one.ndim == 0 else one for one in _plain(name, given)]
        given = np.empty(len(plain), dtype=object)
        given[:] = plain
    values = _to_numpy(name, given)
    if values.shape != (n,):
        got = list(values.shape) if values.shape else shown(given)
        raise InputError(f"{name} must have shape [{n}] as {like}, got {got}; give one name for each")
    if values.dtype.kind not in "fOMm":
        return values
    listed = values.tolist()
    row = next((row for row, one in enumerate(listed) if _missing(one)), None)
    if row is not None:
        raise InputError(f"{name} must name one for every row, got {values[row]} at row {row}; name it or drop it")
    if values.dtype.kind != "O":
        return values
    kinds = {str if isinstance(one, str) else float if isinstance(one, numbers.Real) else type(one) for one in listed}
    if kinds <= {str}:
        row = next((row for row, one in enumerate(listed) if one.endswith("\0")), None)
        if row is not None:
            raise InputError(f"{name} must be names without a NUL at the end, got {values[row]!r} at row {row}")
        return np.asarray(listed)
    if kinds <= {float}:
        made = np.asarray(listed)
        if made.dtype.kind not in "fO" or all(
            abs(int(one)) <= 2**53 for one in listed if isinstance(one, numbers.Integral)
        ):
            return made
        # Beyond 2^53 float64 merges whole numbers; objects are compared as they are.
        values[:] = [int(one) if one == one // 1 else one for one in listed]
        return values
    try:
        np.unique(values)  # other things, such as dates, have to be comparable
    except (TypeError, ValueError):
        kinds = {str, float}
    if len(kinds) > 1:
        raise InputError(f"{name} must be all names or all numbers, got a mix; convert them to strings")
    return values


# -------------------------------------------------------------------------------- single values


def number(name: str, value: object) -> float:
    """Give one number as it is.

    Raises:
        InputError: text, an array, a boolean, or nothing.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise InputError(f"{name} must be one number, got {shown(value)}; give a plain number")
    if isinstance(value, int) and abs(value) > 2**1000:
        raise InputError(f"{name} must be a number that float64 can hold, got a larger one")
    return value  # type: ignore[return-value]


def check_share(name: str, value: object, *, least: bool = False, most: bool = False) -> float:
    """Give a number inside (0, 1), with 0 where ``least`` says so, and with 1 where ``most`` does.

    Raises:
        InputError: anything else.
    """
    given = number(name, value)
    if not (0 < given < 1 or (least and given == 0) or (most and given == 1)):
        asked = f"in {'[' if least else '('}0, 1{']' if most else ')'}" if least or most else "inside (0, 1)"
        raise InputError(f"{name} must be {asked}, got {given}; it is a share")
    return given


def whole(name: str, value: object, least: int = 0, most: int | None = None, what: str = "a whole number") -> int:
    """Give a whole number from ``least`` to ``most`` as int; ``what`` it is called in a message.

    Raises:
        InputError: anything else.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise InputError(f"{name} must be {what}, got {shown(value)}; give a plain integer")
    if value < least or (most is not None and value > most):
        asked = ("0 or more" if least == 0 else f"at least {least}") if most is None else f"from {least} to {most}"
        if what != "a whole number":
            asked = f"{what} from {least}" if most is None else f"{what} {least} to {most}"
        raise InputError(f"{name} must be {asked}, got {value}")
    return int(value)


def flag(name: str, value: object) -> bool:
    """Give True or False.

    Raises:
        InputError: anything else.
    """
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def choice(name: str, value: object, options: Sequence[str]) -> str:
    """Give one of some words.

    Raises:
        InputError: another one; the nearest is named.
    """
    if not isinstance(value, str) or value not in options:
        raise InputError(
            f"{name} must be one of {', '.join(options)}, got {shown(value)}{nearest(str(value)[:40], options)}"
        )
    return value


def shown(value: object) -> str:
    """A value for a message, in one line."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and not isinstance(value, np.generic):
        return f"{type(value).__name__} of shape {list(shape)}"
    return printable(" ".join((f"'{value}'" if isinstance(value, str) else repr(value)).split()), 80)


# -------------------------------------------------------------------------------- comparisons


def grid_of(given: object) -> Grid:
    """The dtype that scores came in: what lies on it is compared by hand in it without rounding."""
    narrow: dict[str, Grid] = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
    first = given[0] if isinstance(given, list | tuple) and given else given
    # Also "torch.float32", and "Float32" of a table, which has gaps and becomes float64 here.
    name = str(getattr(first, "dtype", "")).rpartition(".")[2].lower()
    if name in narrow:
        return narrow[name]
    dtype = array("scores", given).dtype
    return "integer" if dtype.kind in "biu" else narrow.get(dtype.name, "float64")


def sum_slack(probs: object) -> float:
    """How far rows of probabilities may sum from 1 by rounding: of float16, of four decimals, or of bfloat16."""
    return 4e-3 if grid_of(probs) == "bfloat16" else 1e-3


def on_grid(thresholds: ArrayLike, grid: Grid) -> NDArray[np.float64]:
    """The smallest numbers of a dtype that are at or above thresholds, of the same shape.

    A score of that dtype is at or above such a number iff it is at or above the threshold, also where the comparison
    rounds the threshold to that dtype, as NumPy and torch do with a Python number.
    """
    values = np.asarray(thresholds, dtype=np.float64)
    if grid == "float64":
        return values
    if grid == "integer":
        return np.ceil(values)
    kind = np.float16 if grid == "float16" else np.float32
    with np.errstate(over="ignore"):
        near = np.asarray(values.astype(kind))
        near = np.where(near < values, np.nextafter(near, kind(np.inf)), near)
    if grid == "bfloat16":
        # The upper half of a float32, rounded up.
        bits = near.view(np.uint32)
        near = (np.where(near > 0, bits + np.uint32(0xFFFF), bits) & np.uint32(0xFFFF0000)).view(np.float32)
    return near.astype(np.float64)


def at_or_above(name: str, scores: ArrayLike, threshold: float) -> NDArray[np.bool_]:
    """Which scores are accepted at a threshold, of their shape: both compared as float64; NaN never is."""
    return np.asarray(floats(name, scores) >= threshold)


# -------------------------------------------------------------------------------- what arrays are made of


def _to_numpy(name: str, given: object) -> NDArray[Any]:
    try:
        values = np.asarray(_plain(name, given))
    except (ValueError, TypeError, RuntimeError, OverflowError):
        raise InputError(f"{name} must be an array of numbers, in rows of one length, got {shown(given)}") from None
    if values.dtype.kind == "V" and "float" in values.dtype.name:
        return values.astype(np.float32)  # of ml_dtypes, such as bfloat16
    return values


def _plain(name: str, given: object) -> Any:
    """What NumPy can read: without a mask, and off the device and the graph."""
    if isinstance(given, np.ma.MaskedArray):
        masked = np.ma.getmaskarray(given)
        if masked.any():
            row = int(np.argwhere(masked)[0][0]) if masked.ndim else 0
            raise InputError(f"{name} must have no masked entry, got one in row {row}; fill it or drop the row")
        return np.asarray(given)
    if isinstance(given, list | tuple):
        kinds = set(map(type, given))
        return given if kinds <= _PLAIN else [_plain(name, one) for one in given]
    if any(one.__module__.partition(".")[0] == "torch" for one in type(given).__mro__):
        tensor: Any = given
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        return (tensor.float() if "float8" in str(tensor.dtype) or "bfloat16" in str(tensor.dtype) else tensor).numpy()
    return given


def _of_objects(name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Numbers of an array of objects: of booleans or integers where all are, else float64."""
    listed = values.ravel().tolist()
    found: list[Any] = []
    for row, one in enumerate(listed):
        if _missing(one):
            found.append(math.nan)
        elif isinstance(one, numbers.Real | Decimal | np.bool_):
            found.append(one)
        else:
            raise InputError(f"{name} must be numbers, got {shown(one)} at place {row}; convert it first")
    try:
        whole_ones = all(isinstance(one, int | np.integer | np.bool_) for one in found)
        made = np.array(found if whole_ones else [float(one) for one in found])
        return (made if made.dtype.kind in "biuf" else made.astype(np.float64)).reshape(values.shape)
    except OverflowError:
        raise InputError(f"{name} must be numbers that float64 can hold, got a larger one; scale them") from None


def _missing(one: Any) -> bool:
    """Whether it is no value: None, NaN, NaT, or the NA of tables."""
    try:
        return one is None or bool(one != one)  # noqa: PLR0124
    except (TypeError, ValueError):
        return True
