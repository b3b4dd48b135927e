"""The loop's long work: what an executor runs, in a process of its own, on nothing but its inputs.

A proposal is made here, so this knows neither store nor guard: labels are inputs, and the guard's are not among them.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stage1_pro.continual.learn.rewards import NOBODY, RewardSpec
from stage1_pro.data.photos import Photo, open_photos
from stage1_pro.data.splits import Row, Splits, hash_splits
from stage1_pro.errors import ArtifactError, NotReachableError
from stage1_pro.files import uniform

# Of rows that certify, what says which threshold to certify; the test itself takes more.
_FIT = 1 / 3


def photos_of(inputs: Mapping[str, Any]) -> list[Photo]:
    """The photos that a piece of work is of; another content than was meant is unreadable."""
    source = open_photos(inputs["photos"])
    return [Photo(source, key, sha256) for key, sha256 in inputs["files"]]


def decide(inputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What a bundle of the registry decides on photos: class indices, -1 for nobody, and where Stage B ran.

    At ``threshold`` where that is stricter than its policy's.
    """
    from stage1_pro.continual.serving.live import load_content, tightened
    from stage1_pro.deploy.cascade import Cascade

    del folder
    bundle = load_content(inputs["root"], inputs["bundle"])
    cascade = Cascade.load(replace(bundle, policy=tightened(bundle.policy, inputs["threshold"])))
    found, classes = cascade.predict(photos_of(inputs)), cascade.bundle.classes
    answers = [classes.index(name) if name else NOBODY for name in found.label.tolist()]
    return {"answers": answers, "deferred": (~found.exited).tolist()}


def measure(inputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Measure a candidate's bundle before it decides anything: parity, and the time of a decision.

    ``parity`` is how far its graphs are from its own reference outputs; null where it has none, or gives no numbers.
    ``latency`` is the mean time of a decision over the champion's: one photo a call as it was served, from its pixels
    on, with the exits that each bundle takes, in turns in one process, one thread for each operator. Every photo counts
    with the fastest of its passes, as whatever else a machine does only ever adds time; the interval is of the photos.
    Null where parity fails, as such a candidate is not run, and without passes. A time is never the same twice, so this
    is measured once, and whoever asks again is given this result.
    """
    from stage1_pro.continual.serving.live import load_content
    from stage1_pro.deploy.cascade import Cascade, open_image
    from stage1_pro.deploy.onnxruntime import OnnxRuntime
    from stage1_pro.deploy.reference import measure_parity, read_reference
    from stage1_pro.deploy.timing import Sampling, machine, ratios, sample, timed

    del folder
    bundles = {name: load_content(inputs["root"], inputs[name]) for name in ("champion", "candidate")}
    candidate = bundles["candidate"]
    found: dict[str, Any] = {"parity": None, "latency": None, "machine": machine("onnxruntime", 1), "why": ""}
    reference = read_reference(candidate)
    if reference is None:
        return {**found, "why": "the bundle has no reference outputs; export it with this version"}
    runtimes = {name: OnnxRuntime(bundle, 1) for name, bundle in bundles.items()}
    parity = measure_parity(runtimes["candidate"], candidate, reference, OnnxRuntime.name)
    if not math.isfinite(parity.logit):
        return {**found, "why": "the graphs give no numbers for the reference inputs"}
    found["parity"] = {"logit": parity.logit, "flips": parity.flips}
    if not parity.logit <= parity.tolerance or parity.flips:
        return {**found, "why": "not timed: it does not give its reference outputs"}
    if not inputs["passes"]:
        return found
    photos = [open_image(photo) for photo in photos_of(inputs)]

    def decides(name: str) -> Callable[[int], Mapping[str, float]]:
        cascade = Cascade(bundles[name], runtimes[name])

        def call(number: int) -> Mapping[str, float]:
            photo = photos[number % len(photos)]
            return timed(cascade.runtime, lambda: cascade.decide(cascade.pixels(photo)[None]))

        return call

    how = Sampling(inputs["passes"] * len(photos), warmup=0.2, limit=inputs["seconds"])
    times = sample({name: decides(name) for name in bundles}, how)
    taken = len(times["candidate"]["host"])
    passes = max(1, taken // len(photos))
    n = min(taken, len(photos))
    best = {name: parts["host"][: passes * n].reshape(passes, n).min(axis=0) for name, parts in times.items()}
    (mean, *_) = ratios(best["candidate"], best["champion"], paired=True)
    found["latency"] = {
        "ratio": mean.ratio, "low": mean.low, "high": mean.high, "n": n, "passes": passes,
        "milliseconds": {name: 1e3 * float(values.mean()) for name, values in best.items()},
    }  # fmt: skip
    return found


def propose(inputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Propose from the champion's run, its own rows and the learned ones; the run is in ``run``, where there is a gain.

    By ``mgrpo`` (new rows, replay, held near the champion) or by reward tuning alone (``tune``, on all rows).
    """
    from stage1_pro.continual.learn import mgrpo, rlvr

    parent, base, out = Path(inputs["run"]), extend_run(inputs, folder / "base"), folder / "run"
    spec = RewardSpec.model_validate(inputs["spec"])
    record: mgrpo.ProposalRecord | rlvr.TuningRecord
    try:
        if inputs["method"] == "mgrpo":
            record = mgrpo.propose_run(
                base, out,
                known={row.sha256 for row in Splits.read(parent / "splits.json").rows if row.split != "val_calib"},
                anchor=inputs["anchor"],
                recent=[Path(inputs["images"]) / name for name in inputs["recent"]],
                spec=spec, options=mgrpo.ProposalOptions.model_validate(inputs["options"]),
                reservoir=parent / mgrpo.RESERVOIR,
            )  # fmt: skip
        else:
            options = rlvr.TuneOptions.model_validate(inputs["options"])
            record = rlvr.tune(base, out, spec=spec, options=options, through=inputs["through"])
    except NotReachableError as error:
        return {"gain": None, "why": str(error)}
    finally:
        shutil.rmtree(base)
    return {"gain": record.reward_after - record.reward_before, "model": record.model_fingerprint}


def recalibrate(inputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Calibrate a proposal for the champion's target on its fresh ``val_calib``, and export it to ``bundle``."""
    from stage1_pro.commands.calibrate import Calibrate
    from stage1_pro.deploy.exporting import export
    from stage1_pro.policies.target import parse_target
    from stage1_pro.training.calibration import calibrate

    run = Path(shutil.copytree(inputs["run"], folder / "run"))
    # Its val_select is of the champion's time as well, whose errors may be others.
    policy = calibrate(Calibrate(run=run), parse_target(inputs["target"]), halve=True)
    export(run, folder / "bundle", target="onnx")
    return {"bundle": "bundle", "policy": policy.fingerprint()}


def extend_run(inputs: Mapping[str, Any], out: Path) -> Path:
    """A copy of the champion's run whose ``train`` and ``val_select`` have the learned rows as well.

    Its ``val_calib`` holds the rows that certify alone, so that what is certified is what is served now. ``val_test``
    stays. An image has one place; rows of the run that were served again stay where they are.
    """
    from stage1_pro.training import checkpoint

    run = Path(inputs["run"])
    model, run_config = checkpoint.load_run_model(run)
    if model.fingerprint() != inputs["model"]:
        raise ArtifactError(f"{run} must hold the model of the champion, got another; it was trained again")
    old = Splits.read(run / "splits.json").verify()
    leave_out, images = set(inputs["leave_out"]), Path(inputs["images"])
    certify = {sha256 for sha256, _, _ in inputs["certify"]}

    def place_of(row: Row) -> Path:
        path = old.path(row)
        # The loop's folder was moved, and its photos with it.
        return images / row.sha256 if not path.exists() and (images / row.sha256).is_file() else path

    rows = [
        row.model_copy(update={"file": str(place_of(row).resolve())})
        for row in old.rows
        if row.split != "val_calib" and row.sha256 not in leave_out
    ]
    taken = {row.sha256 for row in rows} | leave_out
    for sha256, label, source in [*inputs["certify"], *inputs["learn"]]:
        if sha256 in taken:
            continue
        taken.add(sha256)
        place: dict[str, Any]
        if sha256 in certify:
            place = {"split": "val_calib", "half": "fit" if uniform(0, "half", sha256) < _FIT else "certify"}
        else:
            place = {"split": "val_select" if uniform(0, "select", sha256) < inputs["select_share"] else "train"}
        rows.append(
            Row(id=sha256, file=str(images / sha256), label=label, group=sha256, source=source, sha256=sha256, **place)
        )
    splits = old.model_copy(
        update={
            "root": "/",
            "given": None,
            "rows": rows,
            "hashes": hash_splits(rows),
            "counts": {
                name: {one: sum(r.split == name and r.label == one for r in rows) for one in old.classes}
                for name in old.counts
            },
            "groups": {name: len({r.group for r in rows if r.split == name}) for name in old.groups},
        }
    ).verify()
    out.mkdir()
    splits.write(out / "splits.json")
    run_config.model_copy(update={"split_hashes": splits.hashes}).write(out / "config.json")
    shutil.copy2(run / "metrics.csv", out / "metrics.csv")
    content = checkpoint.load(run / "model_best.pth")
    checkpoint.save(out / "model_best.pth", {**content, "split_hashes": splits.hashes})
    return out
