"""Which class is the positive one: chosen by name, never assumed to be the second."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stage1_pro.errors import InputError, nearest

NEGATIVE_NAMES = frozenset(
    [
        "none",
        "no",
        "n",
        "negative",
        "neg",
        "0",
        "false",
        "background",
        "normal",
        "clear",
        "clean",
        "ok",
        "other",
        "nothing",
        "absent",
        "empty",
    ]
)


def choose_positive(classes: Sequence[str], positive: str | None = None, *, said: str = "--positive") -> str:
    """Give the positive class: the one named, or of two classes the one beside a negative name.

    Negative names are ``none, no, negative, 0, false, background, …`` and the other class's name with ``no``,
    ``not`` or ``non`` before it, in any case and with any of space, ``_`` and ``-``. ``said`` is where it is named.

    Raises:
        InputError: the name is not a class, or none is given and the names do not tell.
    """
    if positive is not None:
        if positive not in classes:
            raise InputError(
                f"{said} must be one of {', '.join(classes)}, got '{positive}'{nearest(positive, classes)}"
            )
        return positive
    if len(classes) == 2:
        others = [other for name, other in (classes, classes[::-1]) if _means_none(name, other)]
        if len(others) == 1:
            return others[0]
    raise InputError(f"{said} must name the class to be found, got none; classes: {', '.join(classes)}")


def _means_none(name: str, other: str) -> bool:
    plain, positive = (re.sub(r"[\s_-]+", "", text.casefold()) for text in (name, other))
    return plain in NEGATIVE_NAMES or plain in {f"{no}{positive}" for no in ("no", "not", "non")}
