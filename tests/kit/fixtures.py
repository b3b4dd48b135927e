"""What takes seconds to make is made once for all workers, and copied by whoever changes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from kit.browser import Browser

Make = Callable[[Path], object]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Make], Path]:
    """The function ``once(name, make)``: a folder of this session, which the first of all workers makes.

    Nobody writes into it; ``kit.tiny.copy_run`` and ``shutil.copytree`` give a copy of one's own.
    """
    base = tmp_path_factory.getbasetemp()
    kit = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kit"

    def call(name: str, make: Make) -> Path:
        kit.mkdir(exist_ok=True)
        with FileLock(kit / f"{name}.lock"):
            if not (kit / f"{name}.made").exists():
                make(kit / name)
                (kit / f"{name}.made").touch()
        return kit / name

    return call


@pytest.fixture(scope="session")
def tiny(once: Callable[[str, Make], Path]) -> Path:
    """A run of the tiny model, calibrated without a training, and its bundle in ``bundle``."""
    pytest.importorskip("torch", reason="bundles are exported with [train]")
    from kit.tiny import make_model, make_run
    from stage1_pro.deploy.exporting import export

    return once("tiny", lambda folder: export(make_run(folder, make_model())))


@pytest.fixture(scope="session")
def bright_run(once: Callable[[str, Make], Path]) -> Path:
    """A run whose heads know nothing of its bright and dark photos, which are easily learned, with its bundle."""
    pytest.importorskip("torch", reason="bundles are exported with [train]")
    from kit.tiny import make_bright_run
    from stage1_pro.deploy.exporting import export

    return once("bright_run", lambda folder: export(make_bright_run(folder)))


@pytest.fixture(scope="session")
def tiny_engines(once: Callable[[str, Make], Path], tiny: Path) -> Path:
    """The bundle of ``tiny`` with engines; skipped where their builder is not installed."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx cannot be imported: no engine can be built here")
    from stage1_pro.deploy.exporting import build

    return once("tiny_engines", lambda folder: build(tiny / "bundle", folder))


@pytest.fixture(scope="session")
def streets(once: Callable[[str, Make], Path]) -> Path:
    """120 rendered scenes of 48 pixels, with ``labels.csv``."""
    from stage1_pro.data.synthetic import render_pool

    return once("streets", lambda folder: render_pool(folder, 120, seed=1, size=48))


@pytest.fixture(scope="session")
def streets_run(once: Callable[[str, Make], Path], streets: Path) -> Path:
    """A run with splits of ``streets`` and nothing else."""
    pytest.importorskip("torch")
    import stage1_pro

    return once("streets_run", lambda folder: stage1_pro.split(streets / "labels.csv", folder, seed=0))


@pytest.fixture(scope="session")
def world(once: Callable[[str, Make], Path]) -> Path:
    """What the manual's pages speak of; see ``kit.world``."""
    pytest.importorskip("torch")
    from kit.world import make_world

    return once("world", make_world)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium, where there is one."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH to review in")
    browser = Browser(found, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
