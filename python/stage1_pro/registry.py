"""``Registry``: names to things of one kind, built in, registered in code, or brought by other packages."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from stage1_pro.errors import InputError, nearest

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


class Registry(Generic[T]):
    """What a name of the configuration stands for; another package adds to it by an entry point.

    Args:
        key: configuration key or argument that names one, for messages.
        group: entry-point group; entries are loaded when their name is asked for.
        known: what is built in; ``module:attribute`` is imported when its name is asked for.
    """

    def __init__(self, key: str, group: str, known: Mapping[str, T | str]) -> None:
        self._key, self._group, self._known = key, group, dict(known)

    def register(self, name: str, thing: T) -> None:
        """Add one, for this process; an entry point adds it for all."""
        self._known[name] = thing

    @property
    def built_in(self) -> tuple[str, ...]:
        """Names without those of entry points, which take a moment to look for."""
        return tuple(self._known)

    def __iter__(self) -> Iterator[str]:
        """Names, those of entry points last."""
        yield from dict.fromkeys([*self._known, *_brought(self._group, tuple(sys.path))])

    def check(self, name: str, *, also: Sequence[str] = ()) -> None:
        """Check a name, which may be one of ``also``, without importing anything; InputError names the nearest."""
        if name not in self._known and name not in also:
            names = [*also, *self]
            if name not in names:
                raise InputError(f"{self._key} must be one of {', '.join(names)}, got '{name}'{nearest(name, names)}")

    def find(self, name: str, *, also: Sequence[str] = ()) -> T:
        """What a name stands for; InputError where it is none, naming the ``also`` words of the argument too."""
        self.check(name, also=also)
        if name not in self._known:
            self._known[name] = cast("T", _brought(self._group, tuple(sys.path))[name].load())
        thing = self._known[name]
        if isinstance(thing, str):
            module, _, attribute = thing.partition(":")
            thing = self._known[name] = cast("T", getattr(importlib.import_module(module), attribute))
        return thing


@functools.lru_cache(maxsize=32)
def _brought(group: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Entry points by name; a look at every installed package, taken once for a search path."""
    from importlib.metadata import entry_points

    del path
    return {one.name: one for one in reversed(tuple(entry_points(group=group)))}
