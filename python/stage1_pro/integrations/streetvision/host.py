"""The subnet's own miner, with our detector in its registry: registered first, then started; nothing is patched."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from PIL import Image

from stage1_pro.errors import DependencyError, InputError
from stage1_pro.integrations.streetvision.answering import Settings, StreetVision
from stage1_pro.progress import say

Layout = Literal["auto", "base_miner", "natix"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
# Where a layout has DETECTOR_REGISTRY and FeatureDetector; older code first.
_MODULES = {
    "base_miner": ("base_miner.registry", "base_miner.detectors"),
    "natix": ("natix.miner.registry", "natix.miner.detectors"),
}
NAME = "STAGE1"
ENTRY = "neurons/miner.py"
_DETECTOR, _CONFIG = "--neuron.image_detector", "--neuron.image_detector_config"


def register(layout: Layout = "auto", repo: Path | str | None = None, *, name: str = NAME) -> list[type]:
    """Put a detector that answers with a bundle into the miner's registry.

    Args:
        layout: whose modules to import; auto: every one that ``repo``, or Python's path, has.
        repo: checkout of the miner, put first on Python's path; None: it can be imported already.
        name: what ``--neuron.image_detector`` calls it.

    Returns:
        The classes, one a layout; built as ``cls(config_name=YAML, device=…)``, called with a PIL image.

    Raises:
        InputError: no such layout or checkout.
        DependencyError: the miner's code cannot be imported, or is of no layout known here.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, got '{layout}'")
    if repo is not None:
        folder = Path(repo).resolve()
        if not folder.is_dir():
            raise InputError(f"repo must be the miner's checkout, got {repo}, which is no folder")
        _put_first(folder)
    wanted = [layout] if layout != "auto" else [one for one in _MODULES if _is_there(_MODULES[one][0])]
    if not wanted:
        raise DependencyError(
            f"no miner code is on Python's path (neither {' nor '.join(m[0] for m in _MODULES.values())}); "
            "give its checkout with --repo"
        )
    return [_register(one, name) for one in wanted]


def _register(layout: str, name: str) -> type:
    registry, detectors = (_import(module) for module in _MODULES[layout])
    try:
        registered, base = registry.DETECTOR_REGISTRY, detectors.FeatureDetector
    except AttributeError as error:
        raise DependencyError(f"the miner's code is of no layout known here: {error}") from None
    made = _make_detector(base, name)
    registered.register_module(module_name=name)(made)
    return made


def _make_detector(base: Any, name: str) -> type:
    """A subclass of the miner's ``FeatureDetector`` that answers with the bundle its YAML names."""

    class Stage1Detector(base):  # type: ignore[misc]
        """Answers with a stage1_pro bundle; every key of ``Settings`` becomes an attribute, as the base reads YAML."""

        def __init__(self, model_name: str = name, config_name: str | None = None, device: str = "cpu") -> None:
            # Known before the base reads the file: a relative bundle is relative to it.
            self._yaml = config_name
            super().__init__(model_name, config_name, device)

        def load_model_config(self) -> None:
            """Nothing: the base would ask a hub for a configuration of its own."""

        def load_model(self) -> None:
            """Start the bundle."""
            given = vars(self)
            known = list(Settings.model_fields)
            for key in given:
                # Other keys are somebody else's, but not one that was surely meant to be ours.
                meant = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
                if meant and key not in known:
                    raise InputError(f"{self._yaml} must have keys that exist, got '{key}'; did you mean '{meant[0]}'?")
            values = {key: given[key] for key in Settings.model_fields if key in given}
            file = Path(self._yaml) if self._yaml else None
            folder = file.resolve().parent if file is not None and file.exists() else None
            self._answers = StreetVision(Settings.of(values, str(self._yaml), folder))

        def __call__(self, image: Image.Image) -> float:
            return self._answers.answer(image)

    return Stage1Detector


def launch(
    repo: Path | str,
    arguments: Sequence[str] = (),
    *,
    layout: Layout = "auto",
    settings: Path | str | None = None,
    entry: str = ENTRY,
    name: str = NAME,
) -> None:
    """Register, then run the miner's own entry point in this process; returns when it does.

    Args:
        repo: the miner's checkout; its files stay as they are, so it may update itself.
        arguments: the miner's own.
        layout: as for ``register``.
        settings: YAML for the detector, checked first; adds ``--neuron.image_detector`` and its ``_config``.
        entry: the miner's script, within ``repo``.
        name: what the detector is registered as.

    Raises:
        InputError: no such checkout or entry, or settings that are wrong or given twice.
        DependencyError: the miner's code cannot be imported.
    """
    script = Path(repo).resolve() / entry
    if not script.is_file():
        raise InputError(
            f"repo must hold the miner's {entry}, got {repo}, which does not; name the script with --entry"
        )
    given = list(arguments)
    if settings is not None:
        twice = [one for one in given if one.partition("=")[0] in (_DETECTOR, _CONFIG)]
        if twice:
            raise InputError(f"the detector must be named once, got --settings and {twice[0]}; leave one out")
        path = Path(settings).resolve()
        Settings.read(path)
        given += [_DETECTOR, name, _CONFIG, str(path)]
    register(layout, repo, name=name)
    say(f"registered {name}; starting {script}")
    # As `python neurons/miner.py` has it, with the checkout itself beside it.
    _put_first(script.parent)
    _put_first(Path(repo).resolve())
    sys.argv = [str(script), *given]
    runpy.run_path(str(script), run_name="__main__")


def _put_first(folder: Path) -> None:
    text = str(folder)
    if text in sys.path:
        sys.path.remove(text)
    sys.path.insert(0, text)
    importlib.invalidate_caches()


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _import(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"the miner's {module} cannot be imported: {error}; run this in the environment its own instructions make, "
            "and install stage1_pro there (it needs no torch)"
        ) from None
