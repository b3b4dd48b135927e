"""Commands: one light file each. This is their list, so that root help imports none of them.

A summary is the first line of its command's docstring. Commands from elsewhere are entry points of the group
``stage1_pro.commands``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stage1_pro.command import Command

GROUP = "stage1_pro.commands"
# Name on the command line: module:class here, and its summary. The order is that of root help.
COMMANDS: dict[str, tuple[str, str]] = {
    "split": ("split:Split", "cut labelled images into train, val_select, val_calib and val_test"),
    "merge": ("merge:Merge", "write the plain backbone that an adapter makes of its base"),
    "plan": ("plan:Plan", "say how many calibration rows a promise takes, and what rows you have can promise"),
    "doctor": ("doctor:Doctor", "print versions, devices, compiled modules, builders, and what is missing"),
}
# Commands of commands: the word before theirs, and its summary.
FAMILIES: dict[str, tuple[str, str]] = {}


def load(home: str) -> type[Command]:
    """The command at ``module:class``, of this folder where the module has no dot."""
    module, _, name = home.partition(":")
    found: Any = getattr(importlib.import_module(module if "." in module else f"{__name__}.{module}"), name)
    return found  # type: ignore[no-any-return]


def outside() -> dict[str, str]:
    """Names and homes of commands that other installed packages bring."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=GROUP) if point.name not in COMMANDS}
