"""A fourth policy is one module: registered from outside it passes everything that the others do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tempered import Calm, Tempered
from test_deploy import make_model, make_run

from stage1_pro.commands.calibrate import calibrate
from stage1_pro.continual.loop.promotion import check_certificate
from stage1_pro.data.splits import Splits, hash_splits
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.deploy.exporting import export
from stage1_pro.deploy.inspection import inspect, render_inspection
from stage1_pro.deploy.prediction import predict, promised
from stage1_pro.errors import InputError
from stage1_pro.policies.policy import Origin, policy_files, read_policy, register
from stage1_pro.policies.routing import make_router
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.target import POLICIES, parse_target
from stage1_pro.training.calibration import render
from stage1_pro.training.checkpoint import save_model
from stage1_pro.training.evaluation import evaluate
from stage1_pro.training.inference import infer_split, save_calibration
from stage1_pro.training.run import RunConfig, write_config


@pytest.fixture
def tempered() -> Iterator[None]:
    """The policy is known while a test runs."""
    register(Tempered)
    yield
    del POLICIES._known["tempered"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with both halves of val_calib, not calibrated."""
    model = make_model()
    folder = make_run(tmp_path_factory.mktemp("door") / "run", model)
    for name in policy_files():
        (folder / name).unlink(missing_ok=True)
    splits = Splits.read(folder / "splits.json")
    halves = iter(("fit", "certify", "fit", "certify"))
    rows = [row.model_copy(update={"half": next(halves)}) if row.split == "val_calib" else row for row in splits.rows]
    splits = splits.model_copy(update={"rows": rows, "hashes": hash_splits(rows)})
    splits.write(folder / "splits.json")
    write_config(folder, RunConfig.read(folder / "config.json").config, splits)
    save_model(folder / "model_best.pth", model, model.state_dict(), split_hashes=splits.hashes)
    save_calibration(folder, infer_split(folder, "val_calib"))
    return folder


def test_it_is_calibrated_evaluated_exported_served_and_shown(run: Path, tempered: None, tmp_path: Path) -> None:
    policy = calibrate(run, target=Calm(guarantee="none", max_exit_error=0.9))
    assert isinstance(policy, Tempered) and read_policy(run) == policy
    assert "tempered policy" in render(policy) and policy.rule() in render(policy)
    found = evaluate(run, n_replicates=10)
    assert (found.policy, found.exit_threshold) == ("tempered", policy.exit_threshold)
    assert [one.name for one in found.exit_promises] == ["exit error"]
    assert "tempered" in (run / "report.html").read_text()
    bundle = export(run)
    facts = inspect(bundle)
    assert facts["policy"]["name"] == "tempered" and policy.rule() in render_inspection(facts)
    photos = sorted((run / "images").iterdir())
    rows, _ = predict(Cascade.load(bundle), photos)
    served = Cascade.load(bundle)
    probs, gates = [], []
    served.decide(
        np.stack([served.pixels(photo) for photo in photos]),
        watch=lambda trace: (probs.append(trace.probs_a), gates.append(trace.gate_logit)),
    )
    wanted = policy.exits(np.concatenate(probs), np.concatenate(gates))
    assert [row["decision"] == "exited" for row in rows] == wanted.tolist()
    assert promised(bundle).guarantee == "none"
    with pytest.raises(InputError, match="router"):
        make_router(policy, 4)


def test_it_promises_and_the_gate_of_the_loop_holds_it_to_that(tempered: None) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 8000)
    margin = np.where(rng.random(8000) < 0.97, 1, -1) * (2 * labels - 1) * rng.uniform(1, 6, 8000)
    p = 1 / (1 + np.exp(-margin))
    rows = Rows.of(
        np.stack([1 - p, p], 1), labels, classes=["none", "roadwork"], positive="roadwork",
        halves=np.where(np.arange(8000) % 2, "fit", "certify"), rows_independent=True,
    )  # fmt: skip
    champion = Tempered.fit(Calm(), rows, origin=Origin(model_fingerprint="old"))
    assert champion.guarantee == "ltt" and champion.target.watched() == 0.05
    target = parse_target(champion.target.model_dump())
    candidate = Tempered.fit(target, rows, origin=Origin(model_fingerprint="new"))
    assert check_certificate(champion, candidate, "new").passed
    laxer = Tempered.fit(Calm(max_exit_error=0.06), rows, origin=Origin(model_fingerprint="new"))
    assert not check_certificate(champion, laxer, "new").passed
    strict = champion.at(champion.exit_threshold + 0.01)
    assert (strict.guarantee, strict.promises) == ("none", ())


def test_an_entry_point_makes_it_known(tmp_path: Path) -> None:
    about = tmp_path / "outside-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[stage1_pro.policies]\ntempered = tempered:Tempered\n")
    code = "import json; from stage1_pro.policies.policy import policies; print(json.dumps(list(policies())))"
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ["softmax", "gate", "scrc", "tempered"]


def test_a_name_or_a_file_is_taken_once() -> None:
    class Other(Tempered):
        file = "thresholds.json"

    with pytest.raises(InputError, match="already taken"):
        register(Other)
