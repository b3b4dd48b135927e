"""A run, bundles of every policy and a loop, as commit 9031a61 wrote them, are read and used."""

from __future__ import annotations

import csv
import json
import shutil
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from stage1_pro.cli import main
from stage1_pro.data.splits import Splits
from stage1_pro.deploy.bundle import load_bundle
from stage1_pro.deploy.manifest import BundleManifest
from stage1_pro.deploy.trust import Signature
from stage1_pro.policies.claims import Claims
from stage1_pro.policies.gate import GateParams
from stage1_pro.policies.ranking import GateChoice
from stage1_pro.policies.sets import ScrcParams
from stage1_pro.policies.softmax import Thresholds
from stage1_pro.policies.target import Softmax, settle_target
from stage1_pro.record import Record

FILES = Path(__file__).parent / "files_9031a61"
POLICIES: dict[str, type[Record]] = {
    "thresholds.json": Thresholds, "gateparams.json": GateParams, "scrcparams.json": ScrcParams
}  # fmt: skip


def unpack(folder: Path) -> None:
    """Unpack the archives; what was below ``/old`` is below ``folder`` now."""
    for path in FILES.glob("*.tar.xz"):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="tar")
    for path in folder.rglob("*.json"):
        text = path.read_text()
        if '"/old' in text:
            path.write_text(text.replace('"/old', f'"{folder}'))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All that was written, to read."""
    folder = tmp_path_factory.mktemp("old")
    unpack(folder)
    return folder


def holds(new: Any, old: Any) -> bool:
    """Whether every key and value of ``old`` is in ``new``, which may have more keys."""
    if isinstance(old, dict):
        return isinstance(new, dict) and all(key in new and holds(new[key], old[key]) for key in old)
    if isinstance(old, list):
        return isinstance(new, list) and len(new) == len(old) and all(map(holds, new, old))
    return bool(new == old)


def kept(record: type[Record], path: Path) -> None:
    """Read a file as a record and lose nothing of it."""
    found = record.read(path)
    assert holds(json.loads(found.model_dump_json()), json.loads(path.read_text())), path.name


@pytest.fixture
def done(capsys: pytest.CaptureFixture[str]) -> Any:
    """The function ``done(*words) -> result`` of a command that ends well."""

    def call(*words: object, code: int = 0) -> Any:
        capsys.readouterr()
        assert main([*map(str, words), "--json"]) == code, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return call


@pytest.mark.parametrize("guarantee", ["none", "certified"])
@pytest.mark.parametrize("file", POLICIES)
def test_a_policy_keeps_every_number_and_promise(files: Path, file: str, guarantee: str) -> None:
    kept(POLICIES[file], files / "policies" / guarantee / file)


def test_records_of_a_run_and_a_bundle_keep_every_value(files: Path) -> None:
    kept(Splits, files / "run" / "splits.json")
    kept(GateChoice, files / "run" / "gate.json")
    kept(Claims, files / "run" / "claims.json")
    kept(BundleManifest, files / "bundle" / "bundle.json")
    kept(Signature, files / "bundle" / "bundle.sig")


LIMITS = ("target_fnr", "max_exit_error", "min_coverage", "target_fnr_exit")


def test_records_of_training_keep_every_value(files: Path) -> None:
    pytest.importorskip("torch")
    from stage1_pro.training.evaluation import Evaluation
    from stage1_pro.training.run import ExploraRecord, RunConfig, Start

    # Keys that have other names now: `tensorboard: true` is `trackers: [tensorboard]`, and limits of exits.
    stored = json.loads((files / "run" / "config.json").read_text())
    flag = stored["config"]["train"].pop("tensorboard")
    found = RunConfig.read(files / "run" / "config.json")
    assert found.config.train.trackers == (("tensorboard",) if flag else ())
    limits = {name: stored["config"]["calibrate"].pop(name) for name in LIMITS}
    assert stored["config"]["calibrate"]["policy"] == "softmax"
    assert settle_target(found.config.calibrate, {}) == Softmax(fnr=limits["target_fnr"])
    assert holds(json.loads(found.model_dump_json()), stored)
    kept(Start, files / "run" / "start.json")
    kept(ExploraRecord, files / "run" / "explora" / "explora.json")
    kept(Evaluation, files / "run" / "evaluation" / "evaluation.json")


def test_records_of_a_loop_keep_every_value(files: Path) -> None:
    pytest.importorskip("sqlalchemy")
    from stage1_pro.continual.learn.mgrpo import ProposalRecord
    from stage1_pro.continual.learn.rlvr import TuningRecord
    from stage1_pro.continual.loop.executors import Work
    from stage1_pro.continual.loop.folder import LoopFile
    from stage1_pro.continual.loop.promotion import Verdict
    from stage1_pro.continual.loop.rounds import RunOf, Snapshot
    from stage1_pro.continual.serving.events import Event, LogInfo, ReviewPlan
    from stage1_pro.continual.serving.live import Pointer

    loop = files / "loop"
    one = {
        LoopFile: "loop.json", Pointer: "champion.json", ReviewPlan: "plan.json", LogInfo: "log/log.json",
        RunOf: "runs/*.json", Snapshot: "snapshots/*.json", Verdict: "verdicts/*.json", Work: "work/*/result.json",
        ProposalRecord: "work/*/files/run/proposal.json", TuningRecord: "work/*/files/run/tuning.json",
    }  # fmt: skip
    for record, pattern in one.items():
        paths = list(loop.glob(pattern))
        assert paths, pattern
        for path in paths:
            kept(record, path)
    lines = (loop / "log" / "events-00000000.jsonl").read_text().splitlines()
    assert len(lines) == 48
    for line in lines:
        assert holds(json.loads(Event.parse(line, "event").model_dump_json()), json.loads(line))


@pytest.mark.parametrize("policy", ["softmax", "gate", "scrc"])
def test_a_bundle_of_every_policy_answers_as_it_did(files: Path, tmp_path: Path, done: Any, policy: str) -> None:
    bundle = Path(shutil.copytree(files / "bundle", tmp_path / "bundle"))
    for name in ("bundle.sig", "thresholds.json"):
        (bundle / name).unlink()
    shutil.copytree(files / "bundles" / policy, bundle, dirs_exist_ok=True)
    assert done("inspect", bundle)["policy"]["name"] == policy
    with (files / "answers" / f"{policy}.csv").open(newline="") as file:
        old = list(csv.DictReader(file))
    assert {row["decision"] for row in old} >= {"exited", "deferred"}
    photos = [files / row["file"] for row in old]
    new = done("predict", "--bundle", bundle, "--runtime", "onnxruntime", *photos)["rows"]
    for was, now in zip(old, new, strict=True):
        for name in ("decision", "stage", "label", "set"):
            assert (now[name] or "") == was[name], name
        for name in ("probability", "confidence"):
            assert now[name] == pytest.approx(float(was[name]), abs=1e-5)


def test_a_signature_still_verifies(files: Path, done: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    monkeypatch.setenv("STAGE1_CONFIG", str(tmp_path / "keys"))
    done("keys", "trust", files / "maker.key.pub", "--name", "maker")
    assert "maker" in json.dumps(done("verify", "--require-signature", files / "bundle")["signature"])
    assert load_bundle(files / "bundle").manifest.classes == ["none", "roadwork"]


def test_a_run_is_measured_as_it_was_and_goes_on(files: Path, tmp_path: Path, done: Any) -> None:
    pytest.importorskip("torch")
    run = Path(shutil.copytree(files / "run", tmp_path / "run"))
    old = json.loads((run / "evaluation" / "evaluation.json").read_text())
    new = done("evaluate", "--run", run, "--replicates", 20)
    assert new["n_rows"] == old["n_rows"] and new["policy"] == old["policy"] == "softmax"
    assert len(new["measures"]) == len(old["measures"])
    for was, now in zip(old["measures"], new["measures"], strict=True):
        assert {k: now[k] for k in ("stage", "source", "metric", "n")} == {
            k: was[k] for k in ("stage", "source", "metric", "n")
        }
        # The figures are the same; intervals by other methods are others, and those of few groups wider.
        for name in ("value", "low", "high") if was["method"] == now["method"] == "percentile" else ("value",):
            assert now[name] == (None if was[name] is None else pytest.approx(was[name], abs=1e-4)), was["metric"]
        if was["method"] == now["method"] and was["low"] is not None:
            assert now["low"] <= was["low"] + 1e-4 and was["high"] <= now["high"] + 1e-4, was["metric"]
    assert len(done("infer", "--run", run, "--split", "val_test")["rows"]) == new["n_rows"]
    gate = done("calibrate", "--run", run, "--policy", "gate", "--guarantee", "none", "--max-exit-error", ".6",
                "--min-coverage", ".1")  # fmt: skip
    was = json.loads((files / "policies" / "none" / "gateparams.json").read_text())
    assert gate["threshold"] == pytest.approx(was["threshold"], abs=1e-4)


def test_a_loop_is_read_and_served_on(files: Path, tmp_path: Path, done: Any) -> None:
    pytest.importorskip("sqlalchemy")
    from stage1_pro.continual.serving.events import EventLog
    from stage1_pro.continual.serving.live import LiveCascade

    unpack(tmp_path)
    root = tmp_path / "loop"
    champion = json.loads((root / "champion.json").read_text())["champion"]
    shutil.copytree(tmp_path / "bundle", root / "bundles" / champion)
    status = done("continual", "status", "--root", root)
    assert status["state"] == "HOLD" and champion in json.dumps(status)
    audited = done("continual", "audit", "--root", root)
    assert audited["ok"] and audited["rows"] == 7
    assert done("continual", "labels", "--root", root, "--export", tmp_path / "labels.csv")["rows"] == 39
    photos = sorted((tmp_path / "photos" / "images").iterdir())[:4]
    served = LiveCascade(root, threads=1, log=EventLog(root / "log")).predict(photos)
    assert len(served.label) == 4
    assert done("continual", "ingest", "--root", root)["events"] == 4
    # A look removes photos whose time is over; nobody need open the page.
    images, now = EventLog(root / "log").images, time.time()
    for name, days in (("a" * 64, 31), ("b" * 64, 29)):
        images.put(name, b"photo", now - days * 86400)
    (root / "log" / "leap").unlink(missing_ok=True)
    # Its hour of hold was over an hour after it was made.
    assert done("continual", "run", "--root", root)["state"] == "MONITOR"
    assert "a" * 64 not in images and "b" * 64 in images
