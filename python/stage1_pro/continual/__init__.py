"""Continuous learning: what was served and judged, what watches it, what proposes better, and what may replace it."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# Modules that lay in this folder at first, by the folder that each lies in now.
_MOVED = {
    name: f"{__name__}.{folder}.{name}"
    for folder, names in {
        "learn": "mgrpo replay rewards rlvr",
        "ledger": "audit exchange guard labels review store",
        "loop": "executors registry rounds tasks world",
        "serving": "events live served",
        "watch": "alerts monitor outbox power srt status",
    }.items()
    for name in names.split()
}


class _Moved(MetaPathFinder, Loader):
    """Gives a module under its first name too, with a warning."""

    def find_spec(self, fullname: str, *_rest: Sequence[str] | ModuleType | None) -> ModuleSpec | None:
        parent, _, name = fullname.rpartition(".")
        return ModuleSpec(fullname, self) if parent == __name__ and name in _MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        home = _MOVED[spec.name.rpartition(".")[2]]
        warnings.warn(f"{spec.name} is {home} now", DeprecationWarning, stacklevel=2)
        found = importlib.import_module(home)
        self._own = found.__spec__
        return found

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own


sys.meta_path.append(_Moved())
