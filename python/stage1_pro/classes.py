"""Names of classes: how they are spelled, which ones there may be, and which is the positive one, chosen by name."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence

from stage1_pro.errors import InputError, nearest, printable

MOST_CLASSES, LONGEST_NAME = 10_000, 200

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
        found = known_as(positive, classes)
        if found is None:
            shown = printable(positive, 80)
            raise InputError(f"{said} must be one of {', '.join(classes)}, got '{shown}'{nearest(positive, classes)}")
        return found
    if len(classes) == 2:
        others = [other for name, other in (classes, classes[::-1]) if _means_none(name, other)]
        if len(others) == 1:
            return others[0]
    raise InputError(f"{said} must name the class to be found, got none; classes: {', '.join(classes)}")


def index_of(classes: Sequence[str], positive: str | None) -> int | None:
    """Index of the positive class among the classes; None where no class is the positive one."""
    return None if positive is None else classes.index(positive)


def need_positive(positive: str | None, what: str) -> str:
    """The positive class, for what cannot do without one.

    Raises:
        InputError: no class is the positive one; ``what`` is what asks for it.
    """
    if positive is None:
        raise InputError(
            f"{what} must have a positive class, got none; name it where the photos are split (stage1 split --positive "
            "NAME), and train again"
        )
    return positive


def _means_none(name: str, other: str) -> bool:
    plain, positive = (re.sub(r"[\s_-]+", "", text.casefold()) for text in (name, other))
    return plain in NEGATIVE_NAMES or plain in {f"{no}{positive}" for no in ("no", "not", "non")}


def spelled(label: str) -> str:
    """A label as every reader of tables takes it: composed (NFC), without blanks around, and 1.0 as 1.

    Spreadsheets and data frames write whole numbers with a point.
    """
    text = unicodedata.normalize("NFC", label).strip()
    whole = re.fullmatch(r"([+-]?[0-9]+)\.0*", text)
    return text if whole is None else whole[1]


def known_as(label: str, classes: Collection[str]) -> str | None:
    """The class that a label means: the one of this very name, else the only one that is spelled so; None of none."""
    if label in classes:
        return label
    found = [name for name in classes if spelled(name) == spelled(label)]
    return found[0] if len(found) == 1 else None


def check_names(classes: Sequence[str], what: str = "classes", *, stated: bool = False, stored: bool = False) -> None:
    """Refuse names of classes that no bundle may hold, that no set of classes can list, or that nobody tells apart.

    Args:
        classes: the names.
        what: what they are called in a message.
        stated: the user has listed them, so names that differ in case, blanks or zeros before a number are meant so.
        stored: they are of a bundle, which may be of a time when ``|`` was allowed.

    Raises:
        InputError: more than 10,000 classes, one name twice, an empty one, one of more than 200 characters, one with
            characters that do not print or turn text around, one with ``|``, or two that are spelled alike.
    """
    if len(classes) > MOST_CLASSES:
        raise InputError(f"{what} must be at most {MOST_CLASSES:,}, got {len(classes):,}; is the label a name or id?")
    seen: dict[str, int] = {}
    for place, name in enumerate(classes):
        shown, wrong = printable(name, 80), ""
        if not name.strip():
            wrong = "an empty one"
        elif len(name) > LONGEST_NAME:
            wrong = f"'{shown}' with {len(name)}"
        elif not name.isprintable():
            wrong = f"'{shown}', which does not print as it is"
        elif "|" in name and not stored:
            wrong = f"'{shown}', whose | stands between the classes of a set"
        if wrong:
            raise InputError(
                f"{what} must have plain names of 1 to {LONGEST_NAME} characters, got {wrong}; rename the class"
            )
        first = seen.setdefault(name if stated or stored else _alike(name), place)
        if first != place and classes[first] == name:
            raise InputError(f"{what} must be different names, got '{shown}' twice")
        if first != place:
            raise InputError(
                f"{what} must be spelled one way each, got '{printable(classes[first], 80)}' and '{shown}'; write them "
                "alike, or name both with --classes if they are two"
            )


def _alike(name: str) -> str:
    """What is left of a name without what people overlook: case, blanks, width, zeros and a plus before a number."""
    text = "".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold()).split())
    number = re.fullmatch(r"([+-]?)0*([0-9]+)(\.0*)?", text)
    return text if number is None else f"{number[1].replace('+', '')}{number[2]}"
