"""Shared data and quiet threads for every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def find_shared(name: str) -> Path:
    """Return ``shared/<name>``, looked for beside the repository or where STAGE1_SHARED says; skip when absent."""
    folder = Path(os.environ.get("STAGE1_SHARED", REPOSITORY.parent / "shared"))
    path = folder / name
    if not path.exists():
        pytest.skip(f"shared/{name} is not beside the repository; set STAGE1_SHARED to the folder that holds {name}")
    return path


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """The function ``shared(name) -> Path`` to real photos and weights, such as ``shared("data/roadwork_signs")``."""
    return find_shared


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout the tests lie in."""
    return REPOSITORY


@pytest.fixture(scope="session", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the ledger of built engines, keys and caches of tests out of the user's own folders."""
    os.environ["STAGE1_CONFIG"] = str(tmp_path_factory.mktemp("config"))
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _same_torch_threads() -> None:
    """Give every test two torch threads, whatever the one before it set; never import torch for that."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(2)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what the default selection left out."""
    left_out = len(terminalreporter.stats.get("deselected", []))
    if left_out and config.option.markexpr == "not slow":
        terminalreporter.write_line(f"{left_out} slow tests were left out; run them with: pytest -m slow")
