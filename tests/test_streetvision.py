"""StreetVision: the answers, both layouts of the miner's code, the validator's protocols, the reward and the tuner."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fitting import fit_softmax_policy
from PIL import Image, JpegImagePlugin
from scipy import ndimage
from scipy.optimize import brentq
from scipy.special import expit, logit
from sklearn.metrics import matthews_corrcoef

import stage1_pro
from stage1_pro import cli
from stage1_pro.commands.streetvision import Tune
from stage1_pro.continual.serving.events import EventLog, ReviewPlan
from stage1_pro.continual.serving.served import identify
from stage1_pro.data import protocols
from stage1_pro.data.images import ImageError, read_image, read_opened
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Merging, Row, Splits
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.errors import ArtifactError, DependencyError, InputError
from stage1_pro.files import sha256_file
from stage1_pro.integrations.streetvision import Settings, StreetVision, register, tuning
from stage1_pro.integrations.streetvision.answering import guard
from stage1_pro.integrations.streetvision.reward import (
    PLAIN,
    Rates,
    Setting,
    Simulator,
    _rewards,
    best_setting,
    outcomes,
    prior_shift,
    rates_of,
    shifted,
)
from stage1_pro.integrations.streetvision.tuning import MinerTuning, yaml_of
from stage1_pro.policies.softmax import softmax
from stage1_pro.training.robustness import ProtocolEvaluation, evaluate_protocol

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibrated run with a model that has only its starting weights."""
    from kit.tiny import untrained_run

    from stage1_pro.training.inference import save_calibration

    folder = tmp_path_factory.mktemp("streetvision")
    run = folder / "run"
    fractions = {"train": 0.3, "val_select": 0.1, "val_calib": 0.3, "val_test": 0.3}
    save_calibration(run, untrained_run(run, folder / "pool", fractions, 64))
    stage1_pro.calibrate(run, guarantee="none", target_fnr=0.99)
    return run


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    return Path(stage1_pro.export(run))


@pytest.fixture(scope="module")
def photo(run: Path) -> bytes:
    """A JPEG as the validator sends it."""
    splits = Splits.read(run / "splits.json")
    return protocols.challenge(read_image(splits.path(splits.of("val_test")[0])), "crop224", 0, seed=0, row=0)


# --------------------------------------------------------------------------------------------
# Answers


def test_bytes_base64_and_pil_give_one_answer(bundle: Path, photo: bytes) -> None:
    miner = StreetVision(bundle)
    expected = Cascade.load(bundle).predict([photo]).prob[0]
    assert 0 < expected < 1
    assert miner.answer(photo) == pytest.approx(expected, abs=1e-12)
    text = base64.b64encode(photo).decode()
    for same in (text, f"data:image/jpeg;base64,{text}", text[:40] + "\n" + text[40:], Image.open(io.BytesIO(photo))):
        assert miner.answer(same) == miner.answer(photo)


def test_a_turned_photo_is_turned_once(bundle: Path, photo: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(io.BytesIO(photo)).resize((60, 40))
    png, turned = io.BytesIO(), io.BytesIO()
    upright.save(png, "PNG")
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, "PNG", exif=exif)
    miner = StreetVision(bundle)
    assert miner.answer(turned.getvalue()) == miner.answer(png.getvalue()) == miner.answer(Image.open(turned))


def test_threshold_lands_on_a_half_and_the_prior_moves_logits(bundle: Path, photo: bytes) -> None:
    raw = StreetVision(bundle).answer(photo)
    assert prior_shift(0.8, 0.5) == pytest.approx(-1.386, abs=1e-3)
    moved = StreetVision(bundle, train_prior=0.8, serve_prior=0.5).answer(photo)
    assert logit(moved) == pytest.approx(logit(raw) - np.log(4))
    assert StreetVision(bundle, threshold=raw).answer(photo) == pytest.approx(0.5, abs=1e-12)
    assert (
        StreetVision(bundle, threshold=raw * 0.9).answer(photo)
        > 0.5
        > StreetVision(bundle, threshold=raw * 1.1).answer(photo)
    )
    # A bundle knows the share of positives it was trained with.
    counts = Cascade.load(bundle).bundle.splits.counts["train"]  # type: ignore[union-attr]
    share = counts["roadwork"] / sum(counts.values())
    assert logit(StreetVision(bundle, serve_prior=0.5).answer(photo)) == pytest.approx(logit(raw) - logit(share))


def test_where_it_would_not_answer_it_answers_or_says_minus_one(bundle: Path, photo: bytes) -> None:
    raw = StreetVision(bundle).answer(photo)
    sure = max(raw, 1 - raw)
    assert StreetVision(bundle, answer_above=sure + 1e-6).answer(photo) == raw
    assert StreetVision(bundle, answer_above=sure + 1e-6, on_abstain="minus_one").answer(photo) == -1
    assert StreetVision(bundle, answer_above=sure - 1e-6, on_abstain="minus_one").answer(photo) == raw


def test_a_policy_that_accepts_nothing_abstains(bundle: Path, photo: bytes, monkeypatch: pytest.MonkeyPatch) -> None:

    decide = Cascade.decide

    def refuse(self: Cascade, pixels: Any, **options: Any) -> Any:
        found = decide(self, pixels, **options)
        return replace(found, accepted=np.zeros(len(found), dtype=bool))

    raw = StreetVision(bundle).answer(photo)
    monkeypatch.setattr(Cascade, "decide", refuse)
    assert StreetVision(bundle).answer(photo) == raw
    assert StreetVision(bundle, on_abstain="minus_one").answer(photo) == -1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((0, 0), (1, 1), (0.25, 0.25), (np.float32(0.5), 0.5), (1.0000001, -1), (-1e-9, -1), (np.nan, -1)),
        *((np.inf, -1), (-np.inf, -1), (None, -1), ("x", -1), ([], -1), (10**400, -1), (-1, -1)),
    ],
)
def test_guard(value: object, expected: float) -> None:
    assert guard(value) == expected


def test_nan_a_crash_and_a_slow_photo_become_minus_one(
    bundle: Path, photo: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    miner = StreetVision(bundle, timeout_s=0.3)
    real = miner._answering.runtime.run

    def nan(stage: Any, inputs: Any) -> Any:
        return {name: np.full_like(value, np.nan) for name, value in real(stage, inputs).items()}

    def crash(stage: Any, inputs: Any) -> Any:
        raise RuntimeError("out of memory")

    def slow(stage: Any, inputs: Any) -> Any:
        time.sleep(1)
        return real(stage, inputs)

    for broken in (nan, crash, slow):
        monkeypatch.setattr(miner._answering.runtime, "run", broken)
        began = time.perf_counter()
        assert miner.answer(photo) == -1, broken
        assert time.perf_counter() - began < 0.9
    # The next one waits for the slow one, within its own limit; then all is well again.
    assert miner.answer(photo) == -1
    monkeypatch.setattr(miner._answering.runtime, "run", real)
    time.sleep(1)
    assert 0 <= miner.answer(photo) <= 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "bundle of settings must be valid, got nothing"),
        ({"bundle": "b", "serve_piror": 0.5}, "'serve_piror'; did you mean 'serve_prior'"),
        ({"bundle": "b", "timeout_s": 0}, "settings: timeout_s must be greater than 0, got 0"),
        ({"bundle": "b", "on_abstain": "maybe"}, "settings: on_abstain must be one of answer, minus_one, got 'maybe'"),
        ({"bundle": "b", "train_prior": 0.8}, "serve_prior of settings must be set beside train_prior"),
        ({"bundle": "b", "threshold": 1}, "settings: threshold must be less than 1, got 1"),
        ({"bundle": "b", "runtime": "cuda"}, "runtime must be one of auto, onnxruntime"),
        ({"bundle": "b", "loop": "l"}, "bundle of settings must be left out beside loop"),
        ({"bundle": "b", "runtime": "torch", "log": "l"}, "runtime of settings must not be torch beside log"),
        ({"loop": "l", "runtime": "torch"}, "runtime of settings must not be torch beside loop"),
        ({"loop": "l", "serve_prior": 0.5}, "train_prior of settings must be set beside serve_prior and loop"),
    ],
)
def test_wrong_settings_are_told(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Settings.of(values)


def test_settings_files(tmp_path: Path, bundle: Path) -> None:
    file = tmp_path / "miner.yaml"
    for text, message in (("[1]", "must hold keys and values, got list"), ("a: [", "must be a readable YAML file")):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            Settings.read(file)
    with pytest.raises(InputError, match=r"none\.yaml must exist"):
        Settings.read(tmp_path / "none.yaml")
    file.write_text(f"bundle: {os.path.relpath(bundle, tmp_path)}\n")
    assert Path(Settings.read(file).bundle).resolve() == bundle.resolve()
    with pytest.raises(ArtifactError, match="bundle must be a folder"):
        StreetVision(tmp_path / "none")
    taken = {"device", "config", "model_name", "load_model", "config_name", "load_model_config", "preprocess"}
    assert not taken & set(Settings.model_fields)


# --------------------------------------------------------------------------------------------
# Decisions that are logged


def test_a_miners_decisions_are_events(bundle: Path, photo: bytes, tmp_path: Path) -> None:
    plain, log = StreetVision(bundle, serve_prior=0.5), tmp_path / "log"
    miner = StreetVision(bundle, serve_prior=0.5, log=str(log))
    picture = Image.open(io.BytesIO(photo))
    asked = (photo, base64.b64encode(photo).decode(), picture)
    assert [miner.answer(one) for one in asked] == [plain.answer(photo)] * 3
    assert miner.answer(b"no photo") == -1
    events = list(EventLog(log))
    assert [one.image_sha256 for one in events] == [identify(photo), identify(photo), identify(picture)]
    assert len({one.id for one in events}) == 3 and min(one.propensity for one in events) >= ReviewPlan().floor
    assert all(one.selected == ReviewPlan().selects(one.id, one.propensity) for one in events)
    assert all((one.image_sha256 in EventLog(log).images) >= one.selected for one in events)
    # What is logged is what the bundle said, before anything that the subnet alone asks for.
    assert events[0].prob_a == pytest.approx(Cascade.load(bundle).predict([photo]).prob[0]) or events[0].prob_b


def test_a_log_that_cannot_be_written_costs_no_answer(
    bundle: Path, photo: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected, log = StreetVision(bundle).answer(photo), tmp_path / "log"
    miner = StreetVision(bundle, log=str(log))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("append", "describe"):
        monkeypatch.setattr(EventLog, name, full)
        caplog.clear()
        assert miner.answer(photo) == expected and "not logged: OSError" in caplog.text
        # So does one that starts now.
        assert StreetVision(bundle, log=str(log)).answer(photo) == expected
    monkeypatch.undo()
    assert miner.answer(photo) == expected and len(list(EventLog(log))) == 1
    (tmp_path / "file").write_text("")
    caplog.clear()
    assert StreetVision(bundle, log=str(tmp_path / "file")).answer(photo) == expected
    assert "not logged: FileExistsError" in caplog.text
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "log.json").write_text("{")
    assert StreetVision(bundle, log=str(tmp_path / "damaged")).answer(photo) == expected


def test_a_loops_champion_mines(bundle: Path, photo: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlalchemy", reason="the loop needs [continual]")
    from kit.loop_parts import promote

    from stage1_pro.continual.ledger.store import Store
    from stage1_pro.continual.loop.registry import Registry

    root = tmp_path / "loop"
    registry = Registry(root, Store(root / "loop.db"))
    name = registry.add(bundle)
    promote(registry, name, expected=0, now=1.0, by="ada")
    ReviewPlan(floor=0.5).write(root / "plan.json")
    file = tmp_path / "miner.yaml"
    file.write_text("loop: loop\nlog: loop/log\ntrain_prior: 0.8\nserve_prior: 0.5\n")
    miner = StreetVision(Settings.read(file))
    expected = StreetVision(bundle, train_prior=0.8, serve_prior=0.5).answer(photo)
    assert miner.answer(photo) == pytest.approx(expected, abs=1e-12)
    assert miner.answer(Image.open(io.BytesIO(photo))) == pytest.approx(expected, abs=1e-12)
    assert [one.bundle for one in EventLog(root / "log")] == [name] * 2
    assert min(one.propensity for one in EventLog(root / "log")) >= 0.5
    # The loop asks for more audits, and a new champion comes: without a restart.
    copy = Path(shutil.copytree(bundle, tmp_path / "other"))
    policy = json.loads((copy / "thresholds.json").read_text())
    (copy / "thresholds.json").write_text(json.dumps({**policy, "exit_threshold": 1.0}))
    manifest = json.loads((copy / "bundle.json").read_text())
    entry = {"sha256": sha256_file(copy / "thresholds.json"), "size": (copy / "thresholds.json").stat().st_size}
    manifest["files"]["thresholds.json"] |= entry
    (copy / "bundle.json").write_text(json.dumps(manifest))
    other = registry.add(copy)
    with registry.store.write() as connection:
        registry.audit_at(connection, 0.9, now=2.0)
    promote(registry, other, expected=1, now=2.0, by="ada")
    assert miner.answer(photo) > 0
    last = list(EventLog(root / "log"))[-1]
    assert last.bundle == other and last.propensity >= 0.9 and last.action != "exit"
    monkeypatch.setattr(EventLog, "append", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    assert 0 < miner.answer(photo) < 1
    assert miner.answer(b"no photo") == -1
    registry.store.close()
    with pytest.raises(ArtifactError, match=r"must hold champion\.json"):
        StreetVision(Settings.of({"loop": str(tmp_path / "none")}))


def test_a_run_answers_in_torch(run: Path, bundle: Path, photo: bytes) -> None:
    assert StreetVision(run, runtime="torch").answer(photo) == pytest.approx(
        StreetVision(bundle).answer(photo), abs=1e-4
    )


def test_opened_images_are_checked_before_they_are_decoded() -> None:
    class Untouched(Image.Image):
        def load(self) -> Any:
            raise AssertionError("decoded")

    image = Untouched()
    image._size, image._mode = (9000, 9000), "RGB"
    with pytest.raises(ImageError, match="oversized"):
        read_opened(image)
    image._size = (10, 10)
    image.format = "EPS"  # type: ignore[misc]
    with pytest.raises(ImageError, match="unsupported: the format EPS"):
        read_opened(image)
    image._size, image.format = (20000, 1), "PNG"  # type: ignore[misc]
    with pytest.raises(ImageError, match="a strip"):
        read_opened(image)


def hostile(bundle: Path, count: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, HERE / "kit" / "hostile_requests.py", bundle, str(count), "0"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    answers = found["answers"]
    assert sum(map(len, answers.values())) == count
    assert all(0 <= value <= 1 or value == -1 for values in answers.values() for value in values)
    assert found["heavy"] == []
    for name in ("ordinary", "base64", "1x1", "cmyk", "animated", "palette with transparency", "16 bits", "one bit"):
        assert min(answers[name]) >= 0, name
    for name in ("wrong base64", "base64 of nothing", "decompression bomb", "opened bomb", "large", "opened large"):
        assert set(answers[name]) == {-1.0}, name
    for name in ("strip", "floats", "nothing", "postscript", "not even an image", "short of its claim"):
        assert set(answers[name]) == {-1.0}, name
    return found


def test_hostile_requests(bundle: Path) -> None:
    hostile(bundle, 240)


@pytest.mark.slow
def test_two_thousand_hostile_requests_leave_memory_flat(bundle: Path) -> None:
    memory = hostile(bundle, 2000)["memory"]
    growth = (memory[-1] - memory[1]) / 2**20
    print(f"resident after 400 requests {memory[1] / 2**20:.1f} MiB, after 2000 {growth:+.1f}")
    assert growth < 16
    assert max(memory) - memory[1] < 64 * 2**20


# --------------------------------------------------------------------------------------------
# The miner's code, by stand-ins of our own

REGISTRY = """
class Registry:
    def __init__(self):
        self.found = {}
    def register_module(self, module_name=None):
        def put(cls):
            self.found[module_name or cls.__name__] = cls
            return cls
        return put
    def __getitem__(self, name):
        return self.found[name]
DETECTOR_REGISTRY = Registry()
"""
DETECTORS = """
from abc import ABC, abstractmethod
from pathlib import Path
import yaml
class FeatureDetector(ABC):
    def __init__(self, model_name, config_name=None, device="cpu"):
        self.model_name = model_name
        self.device = "cuda" if device == "cuda" else "cpu"
        if config_name:
            self.set_class_attrs(config_name)
            self.load_model_config()
        self.load_model()
    @abstractmethod
    def load_model(self): ...
    @abstractmethod
    def __call__(self, image): ...
    def set_class_attrs(self, name):
        path = Path(name) if Path(name).exists() else Path(__file__).parent / "configs" / name
        for key, value in yaml.safe_load(path.read_text()).items():
            setattr(self, key, value)
    def load_model_config(self):
        raise ConnectionError("asked a hub")
"""
MINER = """
import argparse, base64, io, json, sys
from PIL import Image
from {package}.registry import DETECTOR_REGISTRY
import {package}.detectors
parser = argparse.ArgumentParser()
parser.add_argument("--neuron.image_detector", dest="detector")
parser.add_argument("--neuron.image_detector_config", dest="config")
parser.add_argument("--netuid", type=int)
parser.add_argument("--photo")
given = parser.parse_args()
if __name__ == "__main__":
    if given.netuid == 13:
        raise OSError("the chain is gone")
    detector = DETECTOR_REGISTRY[given.detector](config_name=given.config, device="cuda:0")
    image = Image.open(io.BytesIO(base64.b64decode(open(given.photo).read())))
    print(json.dumps({{"prediction": detector(image), "netuid": given.netuid, "argv": sys.argv[0]}}))
"""
LAYOUTS = {"base_miner": "base_miner", "natix": "natix.miner"}


def make_miner(folder: Path, layout: str) -> Path:
    """A checkout like the subnet's: registry, base class and entry point of one layout."""
    package = folder.joinpath(*LAYOUTS[layout].split("."))
    (package / "detectors" / "configs").mkdir(parents=True)
    for parent in [package, *package.parents][: len(LAYOUTS[layout].split("."))]:
        (parent / "__init__.py").write_text("")
    (package / "registry.py").write_text(REGISTRY)
    (package / "detectors" / "__init__.py").write_text(
        f"from {LAYOUTS[layout]}.detectors.base import FeatureDetector\n"
    )
    (package / "detectors" / "base.py").write_text(DETECTORS)
    (folder / "neurons").mkdir()
    (folder / "neurons" / "miner.py").write_text(MINER.format(package=LAYOUTS[layout]))
    return folder


@pytest.fixture(params=list(LAYOUTS))
def miner(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of either layout; what a test imports of it is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield make_miner(tmp_path / "checkout", request.param)
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("base_miner", "natix"):
            del sys.modules[name]


def launched(*arguments: object, module: bool = False, **options: Any) -> subprocess.CompletedProcess[str]:
    start = (
        ["-m", "stage1_pro.integrations.streetvision"] if module else ["-m", "stage1_pro.cli", "streetvision", "launch"]
    )
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


def test_a_detector_of_either_layout(miner: Path, bundle: Path, photo: bytes, tmp_path: Path) -> None:
    settings = tmp_path / "miner.yaml"
    settings.write_text(yaml.safe_dump({"bundle": str(bundle), "train_prior": 0.8, "serve_prior": 0.5}))
    (made,) = register("auto", miner)
    (base,) = (m for n, m in sys.modules.items() if n.endswith(("base_miner.detectors", "natix.miner.detectors")))
    assert issubclass(made, base.FeatureDetector)
    registry = sys.modules[base.__name__.replace("detectors", "registry")].DETECTOR_REGISTRY
    assert registry["STAGE1"] is made
    detector = registry["STAGE1"](config_name=str(settings), device="cuda:0")
    assert detector.train_prior == 0.8 and detector.device == "cpu"
    answer = detector(Image.open(io.BytesIO(photo)))
    assert type(answer) is float
    assert answer == StreetVision(bundle, train_prior=0.8, serve_prior=0.5).answer(photo)
    assert detector(Image.open(io.BytesIO(photo[: len(photo) // 2]))) == -1

    settings.write_text(f"bundle: {bundle}\nserve_piror: 0.5\n")
    with pytest.raises(InputError, match="got 'serve_piror'; did you mean 'serve_prior'"):
        registry["STAGE1"](config_name=str(settings))
    settings.write_text(f"bundle: {os.path.relpath(bundle, tmp_path)}\nhf_repo: somebody/else\n")
    assert 0 <= registry["STAGE1"](config_name=str(settings))(Image.open(io.BytesIO(photo))) <= 1
    settings.write_text("runtime: auto\n")
    with pytest.raises(InputError, match="bundle of .*miner.yaml must .*got nothing"):
        registry["STAGE1"](config_name=str(settings))


@pytest.mark.parametrize("module", [False, True])
def test_the_launcher_runs_the_miners_own_entry_point(
    module: bool, miner: Path, bundle: Path, photo: bytes, tmp_path: Path
) -> None:
    settings, image = tmp_path / "miner.yaml", tmp_path / "photo.txt"
    settings.write_text(f"bundle: {os.path.relpath(bundle, tmp_path)}\n")
    image.write_text(base64.b64encode(photo).decode())
    before = {path: path.read_bytes() for path in miner.rglob("*.py")}
    done = launched(
        "--repo", miner, "--settings", settings, "--", "--netuid", 72, "--photo", image,
        module=module, cwd=tmp_path, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said == {
        "prediction": StreetVision(bundle).answer(photo), "netuid": 72, "argv": str(miner / "neurons" / "miner.py")
    }  # fmt: skip
    assert {path: path.read_bytes() for path in miner.rglob("*") if path.is_file()} == before
    if module:
        return
    # What the miner itself raises is its own, with its traceback.
    done = launched("--repo", miner, "--settings", settings, "--", "--netuid", 13)
    assert done.returncode == 1 and "Traceback" in done.stderr and "OSError: the chain is gone" in done.stderr
    settings.write_text("bundel: x\n")
    done = launched("--repo", miner, "--settings", settings)
    assert done.returncode == 2 and "'bundel'; did you mean 'bundle'" in done.stderr
    assert "Traceback" not in done.stderr


def test_wrong_launches_are_told(tmp_path: Path, bundle: Path) -> None:
    checkout = make_miner(tmp_path / "checkout", "natix")
    settings = tmp_path / "miner.yaml"
    settings.write_text(f"bundle: {bundle}\n")
    done = launched("--repo", checkout, "--layout", "base_miner")
    assert done.returncode == 5 and "base_miner.registry cannot be imported" in done.stderr
    done = launched("--repo", tmp_path)
    assert done.returncode == 2 and "repo must hold the miner's neurons/miner.py" in done.stderr
    done = launched("--repo", checkout, "--settings", settings, "--", "--neuron.image_detector=ROADWORK")
    assert done.returncode == 2 and "the detector must be named once" in done.stderr
    with pytest.raises(InputError, match="layout must .*got 'new'"):
        register("new")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="which is no folder"):
        register("auto", tmp_path / "none")
    with pytest.raises(DependencyError, match="no miner code is on Python's path"):
        register("auto")


def test_the_base_install_mines(bundle: Path, tmp_path: Path, photo: bytes) -> None:
    checkout = make_miner(tmp_path / "checkout", "natix")
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("torch", "transformers", "peft", "sklearn", "safetensors", "onnx"):
        (blocked / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name}', name='{name}')\n")
    settings, image = tmp_path / "miner.yaml", tmp_path / "photo.txt"
    settings.write_text(f"bundle: {bundle}\n")
    image.write_text(base64.b64encode(photo).decode())
    done = launched(
        "--repo", checkout, "--settings", settings, "--", "--photo", image,
        env={**os.environ, "PYTHONPATH": str(blocked)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 0 <= json.loads(done.stdout)["prediction"] <= 1


def test_the_real_miners_code(bundle: Path, photo: bytes, tmp_path: Path) -> None:
    checkout = os.environ.get("STREETVISION_REPO")
    if not checkout:
        pytest.skip("STREETVISION_REPO is not set: name a checkout of the miner, with its dependencies installed here")
    settings = tmp_path / "miner.yaml"
    settings.write_text(f"bundle: {bundle}\n")
    code = (
        "import io, sys\n"
        "from PIL import Image\n"
        "from stage1_pro.integrations.streetvision import register\n"
        "for made in register('auto', sys.argv[1]):\n"
        "    print(made(config_name=sys.argv[2], device='cpu')(Image.open(sys.argv[3])))\n"
    )
    (tmp_path / "photo.jpg").write_bytes(photo)
    done = subprocess.run(
        [sys.executable, "-c", code, checkout, settings, tmp_path / "photo.jpg"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) == StreetVision(bundle).answer(photo)


# --------------------------------------------------------------------------------------------
# Protocols


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(60, 200, (9, 16, 3), dtype=np.uint8))
    return coarse.resize((640, 360), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("protocol", protocols.PROTOCOLS)
def test_challenges_are_a_function_of_seed_and_row(protocol: str, scene: Image.Image) -> None:
    for level in protocols.levels(protocol):
        first = protocols.challenge(scene, protocol, level, seed=1, row=7)
        assert first == protocols.challenge(scene, protocol, level, seed=1, row=7)
        others = [protocols.challenge(scene, protocol, level, seed=s, row=r) for s, r in ((1, 8), (2, 7))]
        assert all((other != first) == (level > 0) for other in others)
        image = Image.open(io.BytesIO(first))
        assert image.format == "JPEG" and JpegImagePlugin.get_sampling(image) == 2
        assert image.quantization == Image.open(io.BytesIO(_jpeg(scene, 75))).quantization
        assert image.size == (scene.size if protocol == "native" else (224, 224))
    drawn = [protocols.draw_level(protocol, seed=0, row=row) for row in range(2000)]
    counts = np.bincount(drawn, minlength=len(protocols.levels(protocol)))
    assert counts.size == len(protocols.levels(protocol))
    assert np.abs(counts / 2000 - 1 / counts.size).max() < 0.04


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def test_geometry_of_the_protocols() -> None:
    flat = Image.new("RGB", (600, 300), (200, 100, 50))
    crop = np.asarray(read_image(protocols.challenge(flat, "crop224", 0, seed=0, row=0)))
    assert np.abs(crop.astype(int) - (200, 100, 50)).max() <= 3
    boxed = np.asarray(read_image(protocols.challenge(flat, "letterbox224", 0, seed=0, row=0))).astype(int)
    assert np.abs(boxed[60:164] - (200, 100, 50)).max() <= 6
    assert boxed[:50].max() <= 6 and boxed[174:].max() <= 6
    # Turned: black corners in every letterboxed photo, and never past 20 degrees.
    marked = Image.new("RGB", (300, 300), "white")
    for row in range(20):
        turned = np.asarray(read_image(protocols.challenge(marked, "letterbox224", 1, seed=0, row=row))).mean(axis=2)
        outside = (turned < 128).mean()
        angle = np.radians(20)
        # What a square and the same square turned do not share.
        assert 0 < outside <= 1 - 2 / (1 + np.sin(angle) + np.cos(angle)) + 0.02
    areas = []
    for row in range(300):
        left, top, right, bottom = protocols._random_square((640, 480), protocols._generator(0, row))
        assert left >= 0 and top >= 0 and right <= 640 and bottom <= 480 and right - left == bottom - top
        areas.append((right - left) * (bottom - top) / (640 * 480))
    assert 0.19 < min(areas) < 0.25 and 0.65 < max(areas) <= 0.75


def test_distortions_do_what_their_names_say(scene: Image.Image) -> None:
    pixels = np.asarray(scene, dtype=float)
    luma = pixels @ protocols._LUMA
    for strength, share in ((1, 0.4), (2, 0.3)):
        grey = np.asarray(protocols._recolour(scene, strength, 0, 0), dtype=float)
        assert np.abs(grey @ protocols._LUMA - luma).max() <= 1.01
        apart = (grey - (grey @ protocols._LUMA)[..., None]).std() / (pixels - luma[..., None]).std()
        assert apart == pytest.approx(share, abs=0.02)
    for strength, share in ((1, 0.85), (2, 0.725)):
        dark = np.asarray(protocols._recolour(scene, 0, strength, 0), dtype=float)
        assert dark == pytest.approx(np.floor(pixels * share + 1e-6))
    dots = Image.fromarray((np.indices((48, 48)).sum(axis=0) % 2 * 255).astype(np.uint8)).convert("RGB")
    assert np.ptp(np.asarray(protocols._recolour(dots, 0, 0, 1))) == 0  # halves of a checkerboard are grey
    assert protocols._recolour(scene, 0, 0, 2).size == scene.size
    grey = Image.new("RGB", (400, 400), (128, 128, 128))
    for strength, variance in ((1, 0.001), (2, 0.002)):
        noisy = np.asarray(protocols._noise(grey, strength, np.random.default_rng(0)), dtype=float)
        assert (noisy @ protocols._LUMA).std() == pytest.approx(np.sqrt(variance) * 255 * 255 / 219, rel=0.03)
    for strength, size in ((1, 7), (2, 9)):
        blurred = np.asarray(protocols._blur(scene, strength), dtype=float)
        for channel in range(3):
            judge = ndimage.gaussian_filter(pixels[..., channel], size / 6, mode="mirror", radius=size // 2)
            assert np.abs(np.floor(judge) - blurred[..., channel]).max() <= 1
    assert protocols._blur(scene, 0) is scene and protocols._noise(scene, 0, np.random.default_rng(0)) is scene
    hard = [protocols.challenge(scene, "crop224", 3, seed=0, row=row) for row in range(12)]
    mild = [protocols.challenge(scene, "crop224", 1, seed=0, row=row) for row in range(12)]
    assert sum(a != b for a, b in zip(hard, mild, strict=True)) >= 11


def test_wrong_challenges_are_told(scene: Image.Image) -> None:
    with pytest.raises(InputError, match="protocol must be one of crop224, .*got 'crop'; did you mean 'crop224'"):
        protocols.levels("crop")
    with pytest.raises(InputError, match="level must .*0.*got 1"):
        protocols.challenge(scene, "native", 1, seed=0, row=0)
    with pytest.raises(InputError, match="row must be 0"):
        protocols.challenge(scene, "native", 0, seed=0, row=-1)


def test_the_native_protocol_and_its_command_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("bundle")))
    assert cli.main(["evaluate", "--run", str(mine), "--protocol", "native", "--replicates", "20"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "minus unaltered" in shown and "asks as many positives as negatives" in shown
    found = ProtocolEvaluation.read(mine / "protocols" / "native" / "protocol.json")
    assert [one.level for one in found.levels] == ["unaltered", "L0"]
    assert "promises nothing" in found.statement
    assert not (mine / "evaluation").exists() and not (mine / "report.html").exists()
    assert cli.main(["evaluate", "--run", str(mine), "--photo-seed", "1"]) == 2
    assert "must stand beside --protocol" in capsys.readouterr().err
    assert cli.main(["evaluate", "--run", str(mine), "--protocol", "native", "--beside", str(mine)]) == 2
    assert cli.main(["evaluate", "--run", str(mine), "--protocol", "native", "--replicates", "0"]) == 2


@pytest.mark.slow
def test_evaluation_by_protocol_is_kept_apart(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("bundle")))
    plain = stage1_pro.evaluate(mine, n_replicates=50)
    before = {path: path.read_bytes() for path in (mine / "evaluation").iterdir()}
    assert cli.main(["evaluate", "--run", str(mine), "--protocol", "crop224", "--replicates", "50", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {path: path.read_bytes() for path in (mine / "evaluation").iterdir()} == before
    folder = mine / "protocols" / "crop224"
    found = ProtocolEvaluation.read(folder / "protocol.json")
    assert said == found.model_dump(mode="json")
    assert [one.level for one in found.levels] == ["unaltered", "L0", "L1", "L2", "L3", "mixed"]
    # Photos as they are give evaluate's own figures.
    for measure in found.levels[0].measures:
        assert measure.value == plain.value(measure.metric, measure.stage)
    assert found.levels[0].accuracy_minus_unaltered.value == 0
    for one in found.levels[1:]:
        accuracy = one.measure("accuracy")
        assert accuracy.n_groups == plain.n_groups and accuracy.low is not None
        gap = accuracy.value - plain.value("accuracy")
        assert one.accuracy_minus_unaltered.value == pytest.approx(gap)
        assert round(accuracy.n * (1 - accuracy.value)) == one.n_mistakes
    bytes_before = (folder / "protocol.json").read_bytes()
    again = evaluate_protocol(mine, "crop224", n_replicates=50)
    assert again == found and (folder / "protocol.json").read_bytes() == bytes_before
    assert (folder / "metrics.csv").read_text().splitlines()[1].startswith("unaltered,all,")


def test_a_certificate_is_not_held_against_changed_photos(run: Path) -> None:
    from stage1_pro.policies.policy import read_policy
    from stage1_pro.training.robustness import _statement

    policy = read_policy(run)
    predictions = Predictions.load(run / "val_calib.npz")
    certified = policy.model_copy(update={"guarantee": "ltt"})  # type: ignore[union-attr]
    assert "about unaltered photos" in _statement(certified, "crop224", predictions)
    assert "No exit policy" in _statement(None, "crop224", predictions)
    assert not {"fnr_check", "verification", "exit_promises"} & set(ProtocolEvaluation.model_fields)


# --------------------------------------------------------------------------------------------
# Reward


def test_rewards_are_those_of_a_tracker_with_two_windows() -> None:
    rng = np.random.default_rng(0)
    rounds = 260
    positive, luck = rng.random((3, rounds)) < 0.5, rng.random((3, rounds))
    right, wrong = luck < 0.7, luck > 0.85
    found = _rewards(right, wrong, positive)
    for miner in range(3):
        seen: deque[tuple[int, int]] = deque(maxlen=100)
        for i in range(rounds):
            said = int(positive[miner, i] == right[miner, i]) if right[miner, i] or wrong[miner, i] else -1
            seen.append((said, int(positive[miner, i])))
            if i < 100:
                continue
            hundred = [(p, y) for p, y in seen if p != -1]
            ten = [(p, y) for p, y in list(seen)[-10:] if p != -1]
            mcc = max(0.0, matthews_corrcoef([y for _, y in hundred], [p for p, _ in hundred]))
            accuracy = np.mean([p == y for p, y in ten]) if ten else 0.0
            assert found[miner, i - 100] == pytest.approx((0.5 * mcc + 0.5 * accuracy) ** 3)


def test_rewards_without_answers_or_with_one_label() -> None:
    no = np.zeros((2, 150), dtype=bool)
    assert _rewards(no, no, no).max() == 0
    # Right always, but only one label is ever seen: MCC is 0.
    assert _rewards(~no, no, ~no) == pytest.approx(np.full((2, 50), 0.125))
    assert Simulator(miners=2, rounds=5).run(Rates((1, 1), (0, 0))).mean == 1
    assert Simulator(miners=2, rounds=5).run(Rates((0, 0), (1, 1))).mean == 0
    for wrong in ({"prior": 1.0}, {"miners": 1}, {"rounds": 0}):
        with pytest.raises(InputError, match="must be"):
            Simulator(**wrong)  # type: ignore[arg-type]


def calibrated(accuracy: float, n: int = 40_000) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Probabilities that mean what they say, of a miner of this accuracy: two normals of one width, Bayes' rule."""
    rng = np.random.default_rng(0)
    positive, z = rng.random(n) < 0.5, rng.standard_normal(n)

    def probs(strength: float) -> np.ndarray[Any, Any]:
        return expit(2 * strength * (strength * np.where(positive, 1, -1) + z))

    def missed(strength: float) -> float:
        return float(((probs(strength) > 0.5) == positive).mean()) - accuracy

    return probs(brentq(missed, 0.1, 5, xtol=1e-3)), positive


@pytest.mark.parametrize(
    ("accuracy", "above", "everything", "banded"), [(0.867, 0.70, 0.549, 0.594), (0.958, 0.80, 0.837, 0.861)]
)
def test_abstaining_pays_what_was_reported(accuracy: float, above: float, everything: float, banded: float) -> None:
    """Figures reported of this reward; their own simulation is not known, a score strays by .1 from round to round."""
    probs, positive = calibrated(accuracy)
    simulator = Simulator(miners=200, rounds=1000)
    accepted = np.ones(probs.size, dtype=bool)

    def reward(band: float) -> float:
        setting = Setting(threshold=0.5, answer_above=band, on_abstain="minus_one")
        return simulator.run(rates_of(outcomes(probs, positive, accepted, setting), positive)).mean

    plain, better = reward(0.5), reward(above)
    print(f"accuracy {accuracy}: {plain:.3f} -> {better:.3f} above {above} ({better / plain - 1:+.1%})")
    assert plain == pytest.approx(everything, abs=0.03)
    assert better == pytest.approx(banded, abs=0.03)
    assert better - plain == pytest.approx(banded - everything, abs=0.015)
    assert 0.02 < better / plain - 1 < 0.12
    # Over-abstaining loses, and fast.
    assert reward(0.99) < plain
    found = best_setting(probs, positive, accepted, simulator, thresholds=[0.4, 0.6], bands=[0.5, 0.7, 0.8, 0.99])
    assert found.on_abstain == "minus_one" and found.answer_above in (0.7, 0.8)


def test_simulated_scores_are_a_moving_average() -> None:
    rates = Rates((0.867, 0.867), (0, 0))
    reward = Simulator(miners=2000, rounds=300).run(rates)
    assert reward.error < 0.003
    assert 0.07 < reward.spread < 0.13
    assert reward == Simulator(miners=2000, rounds=300).run(rates)


@pytest.mark.parametrize("threshold", [np.nan, -0.1, 0.0, 1.0, 2.0])
def test_no_reward_is_simulated_at_a_threshold_that_is_none(threshold: float) -> None:
    probs, accepted = np.array([0.1, 0.9]), np.ones(2, dtype=bool)
    how = {"thresholds": [threshold], "bands": []}
    with pytest.raises(ValueError, match="threshold"):
        best_setting(probs, probs > 0.5, accepted, Simulator(miners=2, rounds=1), **how)


def test_outcomes_and_shifts_have_stated_answers() -> None:
    probs = np.array([0.9, 0.1, 0.6, np.nan, 1.0, 0.0, 0.5])
    positive = np.array([True, True, False, True, True, True, True])
    accepted = np.array([True, True, True, True, False, True, True])
    assert outcomes(probs, positive, accepted, PLAIN).tolist() == [1, -1, -1, 0, 1, -1, -1]
    banded = Setting(threshold=0.5, answer_above=0.8, on_abstain="minus_one")
    assert outcomes(probs, positive, accepted, banded).tolist() == [1, -1, 0, 0, 0, -1, 0]
    # .5 answers everything, also what is exactly as sure.
    everything = Setting(threshold=0.5, answer_above=0.5, on_abstain="minus_one")
    assert outcomes([0.5], [False], [True], everything).tolist() == [1]
    assert shifted([0.0, 0.3, 1.0, np.nan], 0.3).tolist()[:3] == [0.0, 0.5, 1.0]
    assert rates_of(np.array([1, -1, 0, 1], np.int8), np.array([1, 1, 0, 0], bool)) == Rates((0.5, 0.5), (0.5, 0.0))


# --------------------------------------------------------------------------------------------
# Tuner


def tune(**options: Any) -> MinerTuning:
    return tuning.tune(Tune.of(**options))


def make_tunable(
    folder: Path, n: int, strength: float, seed: int = 0, bias: float = 0.0, *, select: bool = False
) -> Path:
    """A calibrated run of which the tuner needs no photo: splits, policy, outputs on val_calib, and on val_select."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.8).astype(np.int64)
    logit_ = 2 * strength * (strength * (2 * labels - 1) + rng.standard_normal(n)) + np.log(4) + bias
    logits = np.column_stack([-logit_ / 2, logit_ / 2]).astype(np.float32)
    groups = np.array([f"g{i // 2}" for i in range(n)])
    predictions = Predictions(
        row_ids=np.array([f"r{i}" for i in range(n)]), groups=groups, sources=np.array([""] * n),
        halves=np.where(np.arange(n) // 2 % 2 == 0, "fit", "certify"), logits_a=logits, logits_b=logits,
        gate_logits=np.zeros(n, np.float32), labels=labels, classes=["none", "roadwork"], positive="roadwork",
        split="val_calib", split_hash="c", model_fingerprint="m" * 64, preprocessing_fingerprint="p" * 64,
    )  # fmt: skip
    folder.mkdir()
    predictions.save(folder / "val_calib.npz")
    if select:
        chosen = replace(
            predictions, row_ids=np.array([f"s{i}" for i in range(n)]),
            groups=np.array([f"s{i // 2}" for i in range(n)]), halves=np.array([""] * n), split="val_select",
            split_hash="x",
        )  # fmt: skip
        chosen.save(folder / "val_select.npz")
    names = ("train", "val_select", "val_calib", "val_test")
    Splits(
        root=str(folder), classes=predictions.classes, positive="roadwork", seed=0,
        fractions=dict.fromkeys(names, 0.25),
        counts={s: {"none": 20, "roadwork": 80} for s in names}, groups=dict.fromkeys(names, 50),
        hashes={**dict.fromkeys(names, "x"), "val_calib": "c"},
        rows=[
            Row(id=f"{kind}{i}", file=f"{kind}{i}.jpg", label="none", group=group, split=split, sha256=f"{kind}{i}")
            for kind, split in (("r", "val_calib"), ("s", "val_select"))
            for i, group in enumerate(groups if kind == "r" else [f"s{i // 2}" for i in range(n)])
        ],
        merging=Merging(pairs=0, components=0, largest_rows=0, largest_share=0, largest_groups=[]),
    ).write(folder / "splits.json")  # fmt: skip
    fit_softmax_policy(
        softmax(logits), labels, classes=predictions.classes, positive="roadwork", target_fnr=0.1, groups=groups,
        split_hashes={"val_calib": "c"}, model_fingerprint="m" * 64, preprocessing_fingerprint="p" * 64,
    ).write(folder / "thresholds.json")  # fmt: skip
    return folder


def test_tuning_reads_val_select_where_a_run_has_it(tmp_path: Path) -> None:
    run = make_tunable(tmp_path / "run", 4000, 1.113, select=True)
    record = tune(run=run, n_replicates=20)
    assert (record.rows, record.n_rows) == ("val_select", 4000)
    assert yaml.safe_load(yaml_of(record))["bundle"] == str((run / "bundle").resolve())
    old = record.model_copy(update={"rows": "val_calib.fit"})
    assert yaml_of(old) == yaml_of(record)


def test_tuning_finds_the_band_and_prints_a_yaml_that_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_tunable(tmp_path / "run", 8000, 1.113)
    settings = tmp_path / "miner.yaml"
    arguments = ["streetvision", "tune", "--run", str(run), "--settings", str(settings), "--replicates", "100"]
    assert cli.main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    record = MinerTuning.read(run / "streetvision.json")
    assert said.pop("yaml") == settings.read_text() == yaml_of(record)
    assert said == record.model_dump(mode="json")
    assert record.n_rows == 4000 and record.n_groups == 2000  # the fit half alone
    assert record.train_prior == 0.8 and record.serve_prior == 0.5
    assert record.chosen == "tuned" and record.gain_low > 0
    setting = record.tuned.setting
    assert setting.on_abstain == "minus_one" and 0.6 <= setting.answer_above <= 0.8
    assert 0.35 < setting.threshold < 0.65  # the prior's correction is made first
    assert record.plain.accuracy == pytest.approx(0.867, abs=0.02)
    assert record.plain.low < record.plain.mean < record.plain.high
    assert 0.02 < record.gain < 0.08
    assert record.tuned.answered < 0.95 < record.plain.answered
    read = Settings.read(settings)
    assert (read.threshold, read.answer_above) == (setting.threshold, setting.answer_above)
    assert read.bundle == str(run / "bundle") and read.train_prior == 0.8
    first = (run / "streetvision.json").read_bytes()
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "chosen: tuned" in shown and "answer_above:" in shown and "nothing here promises earnings" in shown
    assert (run / "streetvision.json").read_bytes() == first


def test_a_gain_that_is_not_shown_is_not_taken(tmp_path: Path) -> None:
    record = tune(run=make_tunable(tmp_path / "run", 120, 2.5), n_replicates=40)
    assert record.chosen == "plain" and "not shown" in record.reason
    assert yaml.safe_load(yaml_of(record))["on_abstain"] == "answer"


def test_a_model_that_leans_gets_its_threshold(tmp_path: Path) -> None:
    record = tune(run=make_tunable(tmp_path / "run", 4000, 1.113, bias=1.5), n_replicates=40)
    assert record.chosen == "tuned"
    assert logit(record.tuned.setting.threshold) == pytest.approx(1.5, abs=0.5)


def test_tuning_refuses_what_it_cannot_use(tmp_path: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_tunable(tmp_path / "run", 400, 1.0)
    with pytest.raises(InputError, match="serve_prior must .*0.*1.*got 1"):
        tune(run=run, serve_prior=1.0)
    with pytest.raises(InputError, match="n_replicates must be at least 20"):
        tune(run=run, n_replicates=3)
    with pytest.raises(InputError, match="exactly one of run or bundle"):
        tune()
    with pytest.raises(InputError, match="labels and out"):
        tune(bundle=bundle)
    with pytest.raises(InputError, match="rows of its own"):
        tune(run=run, labels=tmp_path / "labels.csv")
    with pytest.raises(InputError, match="run must be a run folder"):
        tune(run=tmp_path / "none")
    with pytest.raises(InputError, match="both labels in every four"):
        tune(run=make_tunable(tmp_path / "small", 16, 1.0))
    (run / "thresholds.json").unlink()
    with pytest.raises(InputError, match="run `stage1 calibrate"):
        tune(run=run)
    assert cli.main(["streetvision", "tune", "--run", str(run), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["kind"] == "InputError"


def test_tuning_a_bundle_on_labelled_photos(run: Path, bundle: Path, tmp_path: Path) -> None:
    splits = Splits.read(run / "splits.json")
    rows = splits.of("val_select") + splits.of("train")
    labels = Path(splits.root) / "held_out.csv"
    labels.write_text("file,label,group\n" + "".join(f"{row.file},{row.label},{row.group}\n" for row in rows))
    record = tune(bundle=bundle, labels=labels, out=tmp_path / "record.json", n_replicates=20)
    assert record == MinerTuning.read(tmp_path / "record.json")
    assert record.rows == str(labels) and record.n_rows == len(rows)
    assert yaml.safe_load(yaml_of(record))["bundle"] == str(bundle.resolve())
    labels.write_text("file,label\n" + f"{rows[0].file},roadwrok\n")
    with pytest.raises(InputError, match="got 'roadwrok'; did you mean 'roadwork'"):
        tune(bundle=bundle, labels=labels, out=tmp_path / "record.json")


# --------------------------------------------------------------------------------------------
# The manual


def test_the_manual_shows_every_key_of_the_miners_settings() -> None:
    page = (Path(stage1_pro.__file__).parent / "manual" / "streetvision.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert set(Settings.model_fields) - {"max_pixels", "threads", "loop"} == set(yaml.safe_load(block))
