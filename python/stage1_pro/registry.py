"""``Registry``: names to things of one kind, built in, registered in code, or brought by other packages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

from stage1_pro.errors import InputError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """What a name of the configuration stands for; another package adds to it by an entry point.

    Args:
        key: configuration key or argument that names one, for messages.
        group: entry-point group; an entry is loaded when its name is asked for.
        known: what is built in; a text ``module:name`` is imported when it is asked for.
    """

    def __init__(self, key: str, group: str, known: Mapping[str, T | str]) -> None:
        self._key, self._group, self._known = key, group, dict(known)

    def register(self, name: str, thing: T) -> None:
        """Add one, for this process; an entry point adds it for all."""
        self._known[name] = thing

    def __iter__(self) -> Iterator[str]:
        """Names, those of entry points last."""
        yield from dict.fromkeys([*self._known, *(one.name for one in entry_points(group=self._group))])

    def find(self, name: str) -> T:
        """What a name stands for.

        Raises:
            InputError: nothing of this name.
        """
        if name not in self._known:
            for one in entry_points(group=self._group, name=name):
                self._known[name] = cast("T", one.load())
        if name not in self._known:
            raise InputError(f"{self._key} must be one of {', '.join(self)}, got '{name}'{nearest(name, self)}")
        thing = self._known[name]
        if isinstance(thing, str):
            module, _, attribute = thing.partition(":")
            thing = self._known[name] = cast("T", getattr(import_module(module), attribute))
        return thing
