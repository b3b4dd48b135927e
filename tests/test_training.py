"""Training: builds everything itself, reads only its splits, resumes exactly, and says what went wrong."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from sklearn import metrics as judge
from transformers import Dinov2Config, Dinov2Model

import stage1_pro
from stage1_pro.config import Config, TrainConfig, load_config
from stage1_pro.data.images import PreprocessSpec
from stage1_pro.data.loader import Batch
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits
from stage1_pro.data.synthetic import render_pool
from stage1_pro.errors import ArtifactError, DependencyError, InputError, TemporaryError, TrainingError
from stage1_pro.metrics import augrc, aurc, bootstrap, coverage_at_risk, risk_at_coverage
from stage1_pro.metrics.intervals import metric_names
from stage1_pro.models.model import Stage1Model
from stage1_pro.policies.softmax import softmax
from stage1_pro.stopping import Terminated, between_steps
from stage1_pro.training import loop, losses, validate
from stage1_pro.training import run as run_module
from stage1_pro.training.epochs import TIMINGS
from stage1_pro.training.inference import infer_split, run_over
from stage1_pro.training.loop import train
from stage1_pro.training.resume import State
from stage1_pro.training.run import RunConfig
from stage1_pro.training.session import Session
from stage1_pro.training.validate import COLUMNS

SMALL = ["train.epochs=2", "train.batch_size=32", "train.workers=1", "train.save_every_steps=2"]


@pytest.fixture(scope="module")
def split_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with splits of 240 rendered scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    labels = render_pool(folder / "pool", 240, seed=1, size=64)
    stage1_pro.split(labels, folder / "run", seed=0)
    return folder / "run"


@pytest.fixture
def run(split_run: Path, tmp_path: Path) -> Path:
    """A fresh copy of the split run."""
    shutil.copytree(split_run, tmp_path / "run")
    return tmp_path / "run"


def config(*overrides: str) -> Config:
    return load_config(None, [*SMALL, *overrides])


def test_one_call_writes_every_artefact(run: Path) -> None:
    splits = Splits.read(run / "splits.json")
    result = train(run, config())
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    assert list(rows[0]) == COLUMNS
    assert all(float(row["augrc_low"]) <= float(row["augrc"]) <= float(row["augrc_high"]) for row in rows)
    last = torch.load(run / "last.pth", weights_only=True)
    for key in ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "epoch", "global_step",
                "sampler_state", "best_acc", "best_augrc", "patience_counter", "ema_state_dict",
                "rng_state"):  # fmt: skip
        assert key in last, key
    assert last["best_augrc"] == min(float(row["augrc"]) for row in rows) == result.best["augrc"]
    assert last["best_acc"] == max(float(row["accuracy"]) for row in rows)
    stored = RunConfig.read(run / "config.json")
    assert stored.config.model.image_size == 48
    assert stored.config.model.tap == 4
    assert stored.versions["torch"] == torch.__version__
    predictions = Predictions.load(run / "val_calib.npz")
    assert predictions.row_ids.tolist() == [row.id for row in splits.of("val_calib")]
    assert set(predictions.halves.tolist()) == {"fit", "certify"}
    np.testing.assert_array_equal(torch.load(run / "val_calib_logits.pt").numpy(), predictions.logits_a)
    assert torch.load(run / "val_calib_labels.pt").dtype == torch.int64
    again = infer_split(run, "val_calib")
    np.testing.assert_array_equal(again.logits_a, predictions.logits_a)
    # figures in metrics.csv are those of the kept weights
    select = infer_split(run, "val_select")
    best = rows[result.best_epoch]
    assert np.mean(select.logits_a.argmax(1) == select.labels) == pytest.approx(float(best["accuracy"]))
    with Image.open(run / "metrics" / "risk_coverage_curve.png") as image:
        assert min(image.size) > 300


def test_every_epoch_has_the_selective_suite_on_val_select(run: Path) -> None:
    result = train(run, config())
    with (run / "metrics.csv").open(newline="") as file:
        best = list(csv.DictReader(file))[result.best_epoch]
    select = infer_split(run, "val_select")
    probs = softmax(select.logits_a)
    sure, wrong = probs.max(1), probs.argmax(1) != select.labels
    expected = {"augrc": augrc(sure, wrong), "aurc": aurc(sure, wrong), "accuracy": 1 - wrong.mean()}
    expected |= {f"risk_at_coverage_{c}": risk_at_coverage(sure, wrong, c).selective_risk for c in (0.5, 0.6, 0.7, 0.8)}
    expected |= {f"coverage_at_risk_{r}": coverage_at_risk(sure, wrong, r).coverage for r in (0.01, 0.02, 0.05, 0.1)}
    expected |= {
        "nll": judge.log_loss(select.labels, probs),
        "brier": judge.brier_score_loss(select.labels == 1, probs[:, 1]),
        "augrc_b": augrc(softmax(select.logits_b).max(1), select.logits_b.argmax(1) != select.labels),
    }
    for name, value in expected.items():
        assert float(best[name]) == pytest.approx(value, abs=1e-6), name
    groups = np.asarray([row.group for row in Splits.read(run / "splits.json").of("val_select")])
    interval = bootstrap(probs, select.labels, groups=groups, n_replicates=500)["augrc"]
    assert (float(best["augrc_low"]), float(best["augrc_high"])) == pytest.approx(
        (interval.low, interval.high), rel=1e-3
    )
    for name in metric_names(exits=False):
        low, high = best[f"{name}_low"], best[f"{name}_high"]
        assert (low == "") == (high == ""), name
        assert low == "" or float(low) <= float(best[name]) <= float(high), name


def test_training_never_opens_val_test_or_foreign_rows(run: Path) -> None:
    splits = Splits.read(run / "splits.json")
    copy = run.parent / "images"
    for row in splits.rows:
        if row.split != "val_test":
            (copy / row.file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(splits.path(row), copy / row.file)
    splits.model_copy(update={"root": str(copy)}).write(run / "splits.json")
    train(run, config("train.epochs=1"))
    with pytest.raises(InputError):
        infer_split(run, "val_test")


def weights(run: Path, name: str = "last.pth") -> dict[str, torch.Tensor]:
    return torch.load(run / name, weights_only=True)["model_state_dict"]


def test_number_of_workers_does_not_matter(run: Path, split_run: Path, tmp_path: Path) -> None:
    train(run, config("train.epochs=1", "train.workers=0"))
    other = shutil.copytree(split_run, tmp_path / "other")
    train(other, config("train.epochs=1", "train.workers=2"))
    assert (run / "last.pth").read_bytes() == (other / "last.pth").read_bytes()


def test_micro_batches_give_the_gradient_of_the_whole_batch(run: Path, split_run: Path, tmp_path: Path) -> None:
    train(run, config("train.epochs=1"))
    other = shutil.copytree(split_run, tmp_path / "other")
    train(other, config("train.epochs=1", "train.micro_batch=12"))
    a, b = weights(run), weights(other)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 2e-3  # AdamW turns rounding into up to lr a step
    la, lb = ([float(r["train_loss"]) for r in without_timings(x / "metrics.csv")] for x in (run, other))
    assert la == pytest.approx(lb, rel=1e-4)


class Spread:
    """Squared mean margin over its mean square: a ratio, and no sum over rows."""

    adds, reads_gate = False, False

    def __init__(self, options: TrainConfig) -> None:
        self.smoothing = options.label_smoothing

    def sums(self, part: losses.Part) -> torch.Tensor:
        margin = (part.outputs.logits_b[:, 0] - part.outputs.logits_b[:, 1]).float()
        return torch.stack([margin.sum(), margin.square().sum(), margin.new_tensor(float(len(margin)))])

    def of(self, sums: torch.Tensor) -> torch.Tensor:
        total, squares, rows = sums.unbind()
        return (total / rows) ** 2 / (squares / rows + 0.1)


def test_a_loss_from_outside_trains_like_those_inside(run: Path, split_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="spread"):
        losses.Objective(TrainConfig(losses={"spread": 1.0}))
    losses.LOSSES.register("spread", Spread)
    options = ("train.epochs=1", "train.losses={spread: 3.0}", "train.ema_decay=0")
    plain = train(run, config("train.epochs=1", "train.ema_decay=0"))
    with_it = weights(run)
    found = []
    for name, extra in (("whole", ()), ("parts", ("train.micro_batch=12",))):
        other = shutil.copytree(split_run, tmp_path / name)
        result = train(other, config(*options, *extra))
        found.append((weights(other), result.best["train_loss"]))
    (a, loss_a), (b, loss_b) = found
    assert loss_a == pytest.approx(loss_b, rel=1e-4)
    assert loss_a != pytest.approx(plain.best["train_loss"], rel=1e-4)
    assert max(float((a[k] - b[k]).abs().max()) for k in a) < 2e-3
    assert max(float((a[k] - with_it[k]).abs().max()) for k in a) > 2e-3


def _fail_above(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    whole = Stage1Model.forward

    def forward(self: Stage1Model, pixels: torch.Tensor):  # type: ignore[no-untyped-def]
        if self.training and len(pixels) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, pixels)

    monkeypatch.setattr(Stage1Model, "forward", forward)


def test_out_of_memory_keeps_the_effective_batch(
    run: Path, split_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(split_run, tmp_path / "other")
    train(other, config("train.epochs=1", "train.batch_size=64", "train.micro_batch=16"))
    _fail_above(monkeypatch, 20)
    train(run, config("train.epochs=1", "train.batch_size=64"))
    assert "micro-batches of 16, same effective batch" in capsys.readouterr().err
    assert torch.load(run / "last.pth", weights_only=True)["progress"]["micro_batch"] == 16
    a, b = weights(run), weights(other)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_out_of_memory_at_the_smallest_batch_is_a_clear_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_above(monkeypatch, 8)
    with pytest.raises(TrainingError, match="out of memory at 16 rows"):
        train(run, config("train.epochs=1"))


def test_a_loss_that_is_not_finite_names_its_images(run: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss must be finite, got nan .*\.(png|jpg)"):
        train(run, config("train.lr=1e30", "train.grad_clip=1e30", "train.warmup_epochs=0"))


def test_early_stopping_counts_epochs_without_a_better_augrc(run: Path) -> None:
    result = train(run, config("train.epochs=30", "train.patience=1", "train.lr=1e-8", "train.ema_decay=0"))
    assert result.epochs < 30
    assert result.best_epoch < result.epochs - 1


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_memory_that_runs_out_in_the_optimizers_step_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise kind("CUDA error: out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(TrainingError, match="optimizer's step"):
        train(run, config("train.epochs=1"))


@pytest.mark.parametrize("most", [1, 5, 0])
def test_inference_goes_on_with_fewer_rows_where_memory_is_short(split_run: Path, most: int) -> None:
    splits, spec, sizes = Splits.read(split_run / "splits.json"), PreprocessSpec(height=8, width=8), []
    photos = splits.photos_of(splits.of("val_select"))[:11]

    def forward(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(pixels) > most:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        sizes.append(len(pixels))
        return {"mean": pixels.mean((1, 2, 3))}

    if not most:
        with pytest.raises(TemporaryError, match="a single image"):
            run_over(forward, photos, spec, device=torch.device("cpu"), workers=0)
        return
    found = run_over(forward, photos, spec, device=torch.device("cpu"), workers=0)
    assert max(sizes) <= most and sum(sizes) == 11
    wanted = run_over(
        lambda pixels: {"mean": pixels.mean((1, 2, 3))}, photos, spec, device=torch.device("cpu"), workers=0
    )
    np.testing.assert_allclose(found["mean"], wanted["mean"], rtol=1e-6)


def test_a_training_stopped_between_two_losing_epochs_goes_on_the_same(
    run: Path, split_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        "train.epochs=9", "train.patience=2", "train.lr=1e-8", "train.ema_decay=0", "train.workers=0", "gate.fit=joint",
        "model.image_size=32",
    )  # fmt: skip
    whole = train(run, config(*options))
    other = Path(shutil.copytree(split_run, tmp_path / "other"))
    last, lost = validate.save_last, whole.epochs - 1

    def stops(session: Session, state: State) -> None:
        last(session, state)
        if state.epoch == lost:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(validate, "save_last", stops)
        with pytest.raises(KeyboardInterrupt):
            train(other, config(*options))
    assert train(other, resume=True).epochs == whole.epochs < 9
    for name in ("last.pth", "model_best.pth", "val_calib.npz"):
        assert (other / name).read_bytes() == (run / name).read_bytes(), name
    assert without_timings(other / "metrics.csv") == without_timings(run / "metrics.csv")


@contextlib.contextmanager
def heard(number: int) -> Iterator[Any]:
    """Hear a signal by its usual handler, also where the tests run in the background, which hears no Ctrl-C."""
    usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)
    try:
        yield usual
    finally:
        signal.signal(number, before)


def test_what_a_process_was_told_to_ignore_stops_nothing() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with between_steps() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_training_that_is_asked_to_stop_saves_its_step_and_goes_on_to_the_same_bytes(
    run: Path, split_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[BaseException]
) -> None:
    options = ("train.epochs=2", "train.save_every_steps=1000", "gate.fit=joint", "model.image_size=32")
    train(run, config(*options))
    other, learn, steps = Path(shutil.copytree(split_run, tmp_path / "other")), loop.learn, 0

    def asked(session: Session, state: State, batch: Batch) -> None:
        nonlocal steps
        learn(session, state, batch)
        steps += 1
        if steps == 2:
            os.kill(os.getpid(), number)

    with heard(number) as before, monkeypatch.context() as patch:
        patch.setattr(loop, "learn", asked)
        with pytest.raises(kind):
            train(other, config(*options))
        assert steps == 2 and signal.getsignal(number) is before
    assert torch.load(other / "last.pth", weights_only=True)["sampler_state"]["step_in_epoch"] == 2
    train(other, resume=True)
    for name in ("last.pth", "model_best.pth", "val_calib.npz"):
        assert (other / name).read_bytes() == (run / name).read_bytes(), name


def test_asked_twice_a_training_stops_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal must stop it")

    monkeypatch.setattr(loop, "learn", asked)
    with heard(signal.SIGINT), pytest.raises(KeyboardInterrupt):
        train(run, config("train.epochs=1", "train.workers=2"))
    assert not (run / "last.pth").exists()
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children(), "decoders must end with the training"


def test_class_weights_average_to_one_over_the_rows() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10 + [2] * 20)
    weight = losses.balanced_weights(labels, 3)
    assert float(weight[labels].mean()) == pytest.approx(1.0)
    assert (weight * torch.bincount(labels)).tolist() == pytest.approx([20.0] * 3)


def test_a_second_training_needs_a_word(run: Path) -> None:
    train(run, config("train.epochs=1"))
    with pytest.raises(InputError, match="--resume .*--overwrite"):
        train(run, config("train.epochs=1"))
    for change, shown in (("train.lr=1", "train.lr = 1.0 instead of"), ("seed=9", "seed = 9 instead of 0")):
        with pytest.raises(InputError, match=f"--resume must keep .* {shown}"):
            train(run, load_config(None, [change, "train.epochs=16"]), resume=True)
    train(run, load_config(None, ["train.workers=0"]), resume=True)
    assert RunConfig.read(run / "config.json").config.train.workers == 0
    before = (run / "model_best.pth").read_bytes()
    train(run, resume=True)
    assert (run / "model_best.pth").read_bytes() == before
    train(run, config("train.epochs=1", "seed=5"), overwrite=True)
    assert (run / "model_best.pth").read_bytes() != before


QUICK = ("train.workers=0", "model.image_size=32", "gate.fit=joint")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_overwritten_is_kept_once_and_is_a_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(run, config("train.epochs=1", *QUICK))
    (run / "thresholds.json").write_text("{}")
    (run / "claims.json").write_text("{}")
    first = contents(run)
    # Killed at any of its moves it is undone by whatever works in the run next.
    for n in range(100):
        moves, replace = 0, Path.replace

        def dies(self: Path, to: Path, n: int = n, replace: Any = replace) -> Path:
            nonlocal moves
            if moves == n:
                raise KeyboardInterrupt
            moves += 1
            return replace(self, to)

        try:
            with run_module.exclusive(run), monkeypatch.context() as patch:
                patch.setattr(Path, "replace", dies)
                run_module.forget_training(run)
        except KeyboardInterrupt:
            with run_module.exclusive(run):
                assert {k: v for k, v in contents(run).items() if k != ".lock"} == {
                    k: v for k, v in first.items() if k != ".lock"
                }, n
            continue
        break
    assert 8 < n < 40
    assert "moved to" in capsys.readouterr().err and not (run / "model_best.pth").exists()
    kept = {k.removeprefix(".before/"): v for k, v in contents(run).items() if k.startswith(".before/")}
    # The way to the photos is another from there.
    of = [Splits.parse(files["splits.json"].decode(), "splits.json") for files in (kept, first)]
    assert [one.model_copy(update={"beside": None}) for one in of] == [Splits.read(run / "splits.json")] * 2
    assert {**kept, "splits.json": b""} == {**{k: v for k, v in first.items() if k != ".lock"}, "splits.json": b""}
    assert of[0].beside == os.path.relpath(of[0].root, run / ".before")
    assert infer_split(run / ".before", "val_select").labels.size
    # What is unfinished pushes out nothing; the next whole one does.
    train(run, config("train.epochs=1", "seed=3", *QUICK))
    (run / "val_calib_gate_logits.pt").unlink()
    with run_module.exclusive(run):
        run_module.forget_training(run)
    assert (run / ".before" / "model_best.pth").read_bytes() == first["model_best.pth"]
    train(run, config("train.epochs=1", "seed=3", *QUICK))
    third = (run / "model_best.pth").read_bytes()
    train(run, config("train.epochs=1", *QUICK), overwrite=True)
    assert (run / ".before" / "model_best.pth").read_bytes() == third != first["model_best.pth"]
    assert sorted(path.name for path in run.glob(".before*")) == [".before"]


def test_a_finished_training_goes_on_with_more_epochs_to_the_same_bytes_when_killed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(run, config("train.epochs=1", *QUICK))
    (run / "thresholds.json").write_text("{}")
    (run / "evaluation").mkdir()
    (run / "claims.json").write_text("{}")
    one, other = weights(run), Path(shutil.copytree(run, tmp_path / "other"))
    unchanged = contents(run)
    for wish, words in (("train.lr=9", "lr = 9.0 instead"), ("seed=4", "seed = 4 instead")):
        with pytest.raises(InputError, match=words):
            train(run, load_config(None, [wish, "train.epochs=3"]), resume=True)
    assert contents(run) == unchanged
    whole = train(run, load_config(None, ["train.epochs=3"]), resume=True)
    said = capsys.readouterr().err
    assert "thresholds.json" in said and "not the same as so many epochs" in said
    assert whole.epochs == 3 and (run / "claims.json").exists()
    assert not (run / "thresholds.json").exists() and not (run / "evaluation").exists()
    assert (run / ".before" / "thresholds.json").exists() and (run / ".before" / "model_best.pth").exists()
    found = RunConfig.read(run / "config.json")
    assert (found.legs, found.config.train.epochs) == ([1], 3)
    rows = without_timings(run / "metrics.csv")
    rates = [float(row["lr"]) for row in rows]
    assert len(rows) == 3 and rates[0] == rates[1] > rates[2], "the leg warms up for an epoch, and falls to its floor"
    best = [(float(row["augrc"]), float(row["nll"])) for row in rows]
    assert whole.best_epoch == best.index(min(best))
    last = torch.load(run / "last.pth", weights_only=True)
    assert any(not torch.equal(one[key], last["model_state_dict"][key]) for key in one)
    assert last["ema_state_dict"]["n_averaged"] == last["global_step"] == int(rows[2]["step"])
    # The same, ended before its first step, within an epoch and between two.
    learn, steps = loop.learn, 0
    per_epoch = int(rows[0]["step"])

    def dies(session: Session, state: State, batch: Batch) -> None:
        nonlocal steps
        if steps in (0, per_epoch - 1, per_epoch + 1):
            steps += 1
            raise KeyboardInterrupt
        learn(session, state, batch)
        steps += 1

    wishes: list[str] = ["train.epochs=3"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "learn", dies)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                train(other, load_config(None, wishes) if wishes else None, resume=True)
            wishes = []
            with pytest.raises(InputError, match="for a training that is finished"):
                train(other, load_config(None, ["train.epochs=5"]), resume=True)
    train(other, resume=True)
    for name in ("last.pth", "model_best.pth", "val_calib.npz", "config.json", "gate.json"):
        assert (other / name).read_bytes() == (run / name).read_bytes(), name
    assert without_timings(other / "metrics.csv") == rows
    assert (other / ".before" / "thresholds.json").exists(), "the second start of a leg pushes nothing out"
    with pytest.raises(InputError, match="must add epochs to the 3 that are done"):
        train(run, load_config(None, ["train.epochs=2"]), resume=True)
    train(run, load_config(None, ["train.epochs=4"]), resume=True)
    assert RunConfig.read(run / "config.json").legs == [1, 3]


def test_a_run_with_a_foreign_checkpoint_is_refused(run: Path, split_run: Path, tmp_path: Path) -> None:
    train(run, config("train.epochs=1"))
    other = shutil.copytree(split_run, tmp_path / "other")
    train(other, config("train.epochs=1", "model.tap=2"))
    shutil.copy(other / "model_best.pth", run / "model_best.pth")
    with pytest.raises(ArtifactError, match="differs in model.tap: 2 instead of 4"):
        infer_split(run, "val_select")
    shutil.copy(other / "last.pth", run / "last.pth")
    with pytest.raises(ArtifactError, match=r"last.pth .*tap: 2 instead of 4"):
        train(run, resume=True)


def test_an_earlier_training_is_given_up_no_sooner_than_the_new_one_can_run(run: Path) -> None:
    train(run, config("train.epochs=1"))
    (run / "report.html").write_text("old")
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    with pytest.raises(InputError, match="must be a preset"):
        train(run, config("model.backbone=./nowhere"), overwrite=True)
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before
    train(run, config("train.epochs=1"), overwrite=True)
    assert not (run / "report.html").exists(), "what the old model wrote must not stand beside the new one"


def test_a_folder_in_use_is_left_alone(run: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from stage1_pro.training.run import exclusive\n"
        "with exclusive(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        before = sorted(p.name for p in run.iterdir())
        with pytest.raises(InputError, match="another process is at work in it"):
            train(run, config("train.epochs=1"), overwrite=True)
        with pytest.raises(InputError, match="another process is at work in it"):
            stage1_pro.split(Splits.read(run / "splits.json").root, run, seed=9)
        assert sorted(p.name for p in run.iterdir()) == before
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    train(run, config("train.epochs=1"))


def test_other_splits_than_the_trained_ones_are_refused(run: Path) -> None:
    train(run, config("train.epochs=1"))
    splits = Splits.read(run / "splits.json")
    with pytest.raises(InputError, match="replace its splits with --overwrite"):
        stage1_pro.split(Path(splits.root), run, seed=5)

    moved = [row.model_copy(update={"split": "val_test"}) if row.split == "train" else row for row in splits.rows[:40]]
    splits.model_copy(update={"rows": [*moved, *splits.rows[40:]]}).write(run / "splits.json")
    for act in (lambda: infer_split(run, "val_test"), lambda: train(run, resume=True)):
        with pytest.raises(ArtifactError, match="its rows do not give its hashes"):
            act()

    other = run.parent / "other"
    stage1_pro.split(Path(splits.root), other, seed=5)
    shutil.copy(other / "splits.json", run / "splits.json")
    with pytest.raises(ArtifactError, match="changed since the training began"):
        train(run, resume=True)
    (run / "config.json").unlink()
    train(other, config("train.epochs=1"))
    shutil.copy(other / "config.json", run / "config.json")
    for act in (lambda: infer_split(run, "val_test"), lambda: train(run, resume=True)):
        with pytest.raises(ArtifactError, match="trained on other splits"):
            act()
    stage1_pro.split(Path(splits.root), run, seed=7, overwrite=True)
    assert not (run / "model_best.pth").exists(), "a model whose training rows may be tests now must go"


def test_a_last_checkpoint_with_missing_keys_names_them(run: Path) -> None:
    train(run, config("train.epochs=1"))
    content = torch.load(run / "last.pth", weights_only=True)
    del content["rng_state"], content["world"]
    torch.save(content, run / "last.pth")
    with pytest.raises(ArtifactError, match="missing keys: rng_state, world"):
        train(run, resume=True)


def test_resume_with_nothing_to_resume(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--resume needs"):
        train(run, resume=True)
    with pytest.raises(InputError, match="must be a folder with splits.json"):
        train(tmp_path / "nowhere")


def test_linear_mode_trains_heads_on_cached_features(run: Path, shared) -> None:  # type: ignore[no-untyped-def]
    folder = shared("weights/dinov2-small")
    options = (f"model.backbone={folder}", "model.image_size=56", "model.tap=6", "train.mode=linear", "train.epochs=20")
    result = train(run, config(*options))
    state = weights(run, "model_best.pth")
    from stage1_pro.models.backbone import load_backbone

    fresh = load_backbone(str(folder), 56, pos_embed_rescale=None, seed=0).state_dict()
    assert all(torch.equal(state[f"backbone.{k}"], v) for k, v in fresh.items() if f"backbone.{k}" in state)
    assert set(weights(run)) == {k.removeprefix("heads.") for k in state if k.startswith("heads.")}
    select = infer_split(run, "val_select")
    assert np.mean(select.logits_a.argmax(1) == select.labels) == pytest.approx(result.best["accuracy"])
    stamp = (run / "features_train.npz").stat().st_mtime_ns
    train(run, config(*options, "train.epochs=5"), overwrite=True)
    assert (run / "features_train.npz").stat().st_mtime_ns == stamp, "features must be computed once"


def test_a_dinov2_without_a_mask_token_trains(run: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14,
            use_mask_token=False,
        )
    ).save_pretrained(tmp_path / "base")  # fmt: skip
    options = (f"model.backbone={tmp_path / 'base'}", "model.image_size=28", "model.tap=1", "train.epochs=1")
    assert train(run, config(*options)).epochs == 1


# ------------------------------------------------------------------------------------------------
# kill -9

ARTEFACTS = ("config.json", "splits.json", "model_best.pth", "model_best_acc.pth", "last.pth", "val_calib.npz",
             "val_calib_logits.pt", "val_calib_labels.pt", "val_calib_gate_logits.pt", "gate.json",
             "metrics/risk_coverage_curve.png")  # fmt: skip


def command(run: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "stage1_pro.cli", "train", "--run", str(run), *options]


def without_timings(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def _kill_when(run: Path, options: list[str], seen: str | None, delay: float) -> str | None:
    """Start a training, kill -9 it when its log says ``seen`` (and after ``delay``); the log's last words."""
    log = run / "train.log"
    start = log.stat().st_size if log.exists() else 0
    process = subprocess.Popen(command(run, *options), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None:
        text = log.read_bytes()[start:].decode() if log.exists() else ""
        if (seen or "train from step") in text:
            time.sleep(delay)
            break
        assert time.monotonic() < deadline, f"the log must say {seen!r} within two minutes"
        time.sleep(0.0005)
    if process.poll() is not None:
        return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return log.read_text()[start:].strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_kills_change_no_byte(split_run: Path, tmp_path: Path, mode: str) -> None:
    settings = (*SMALL, "train.epochs=8", "model.tap=2", f"train.mode={mode}", "adapter.dropout=0.1")
    options = [part for item in settings for part in ("--set", item)]
    whole = shutil.copytree(split_run, tmp_path / "whole")
    subprocess.run(command(whole, *options), check=True, capture_output=True)

    killed = shutil.copytree(split_run, tmp_path / "killed")
    rng = random.Random(4)
    wanted: list[str | None] = [
        "validate begin",
        "last.pth writing",
        None,
        "model_best.pth writing",
        None,
        "validate begin",
    ]
    if mode == "lora":
        wanted = ["adapter writing", None, "validate begin"]
    words: list[str] = []
    for seen in wanted:
        given = ["--resume"] if (killed / "config.json").exists() else options
        delay = rng.uniform(0, 0.5) if seen is None else rng.uniform(0, 0.003)
        last = _kill_when(killed, given, seen, delay)
        if last is None:  # it ended before the moment came; kill it at the end of the resumed run instead
            last = _kill_when(killed, ["--resume"], "val_calib begin", rng.uniform(0, 0.02))
        assert last is not None, (killed / "train.log").read_text()
        words.append(last)
    if mode == "lora":
        adapter = [f"adapter/{path.name}" for path in (whole / "adapter").iterdir()]
        assert len(adapter) == 4
    else:
        adapter = []
    for seen, longest in (("gate refit begin", 0.3), ("gate refitted", 0.02)):
        words.append(_kill_when(killed, ["--resume"], seen, rng.uniform(0, longest)) or "ended")
    assert any("gate" in word for word in words), words
    result = subprocess.run(command(killed, "--resume"), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

    inside = [w for w in words if w.endswith(("validate begin", "writing"))]
    assert len(inside) >= 2, words
    for name in (*ARTEFACTS, *adapter):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs after {words}"
    assert without_timings(killed / "metrics.csv") == without_timings(whole / "metrics.csv")
    assert not [*killed.rglob(".*.tmp"), *killed.rglob(".*.old")], "what killed writers left must be swept up"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_two_processes_reach_the_figures_of_one(split_run: Path, tmp_path: Path, mode: str) -> None:
    settings = (*SMALL, "train.epochs=3", f"train.mode={mode}", "train.gradient_checkpointing=true")
    options = [part for item in settings for part in ("--set", item)]
    runs = {}
    for processes in (1, 2):
        run = shutil.copytree(split_run, tmp_path / f"p{processes}")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run(
            [*launcher, "-m", "stage1_pro.cli", "--", "train", "--run", str(run), "--json", *options],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        runs[processes] = without_timings(run / "metrics.csv")
        assert Predictions.load(run / "val_calib.npz").logits_a.shape[0] == len(
            Splits.read(run / "splits.json").of("val_calib")
        )
    one, two = runs[1], runs[2]
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert a["step"] == b["step"], "same effective batch, same number of steps"
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=2e-2)
        assert float(a["nll"]) == pytest.approx(float(b["nll"]), rel=5e-2)
    assert float(one[0]["train_loss"]) == pytest.approx(float(two[0]["train_loss"]), rel=1e-3)


def test_train_json_is_one_document(run: Path) -> None:
    done = subprocess.run(
        command(run, "--json", "--set", "train.epochs=1", "--set", "train.workers=0"),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["epochs"] == 1


def test_trackers_get_every_epoch_and_a_missing_one_is_told_first(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.tracking import GeneralTracker
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from stage1_pro.training import trackers

    seen: list[tuple[int, float]] = []

    class Own(GeneralTracker):
        name, requires_logging_directory, tracker = "own", False, None

        def __init__(self, folder: Path) -> None:
            super().__init__()

        def log(self, values: dict[str, float], step: int | None = None, **_: object) -> None:
            assert step is not None
            seen.append((step, values["augrc"]))

        def finish(self) -> None:
            seen.append((-1, 0.0))

    assert TrainConfig.model_validate({"tensorboard": True}).trackers == ("tensorboard",)
    assert TrainConfig.model_validate({"tensorboard": False}) == TrainConfig()
    with pytest.raises(InputError, match="tensorbord"):
        train(run, config("train.trackers=[tensorbord]"))
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(DependencyError, match="wandb"):
            train(run, config("train.trackers=[wandb]"))
    assert not {"config.json", "start.json", "train.log", "tensorboard"} & {path.name for path in run.iterdir()}
    trackers.TRACKERS.register("own", Own)
    train(run, config("train.trackers=[own, tensorboard]"))
    rows = without_timings(run / "metrics.csv")
    assert seen == [(int(row["step"]), float(row["augrc"])) for row in rows] + [(-1, 0.0)]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [one.value for one in events.Scalars("augrc")] == pytest.approx([step[1] for step in seen[:-1]])
