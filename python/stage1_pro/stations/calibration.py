"""Calibration: choose the exit policy on ``val_calib``, or on anybody's logits."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from jsonschema import Draft202012Validator
from numpy.typing import NDArray

from stage1_pro.artifacts import POLICY_FILES, Predictions, Splits, Thresholds, load_npz, sha256_file
from stage1_pro.classes import choose_positive
from stage1_pro.config import CalibrateConfig
from stage1_pro.errors import ArtifactError, InputError, NotReachableError, nearest
from stage1_pro.policies import withdraw_policies
from stage1_pro.policies.softmax import fit_softmax_policy, softmax
from stage1_pro.progress import say


def calibrate(
    run: Path | str | None = None,
    *,
    logits: Path | str | None = None,
    policy: str = "softmax",
    guarantee: str = "none",
    target_fnr: float | None = None,
    out: Path | str | None = None,
    positive: str | None = None,
    classes: list[str] | None = None,
) -> Thresholds:
    """Choose when Stage A may answer, and write the policy file.

    With ``run`` it reads ``RUN/val_calib.npz`` alone and writes ``RUN/thresholds.json``, the run's only
    policy file from then on. With ``logits`` it reads an ``.npz`` of ``logits`` [N, K] (or [N]: the logit
    of the second of two classes) or ``probs``, ``labels`` [N] as indices, and optionally ``groups`` [N],
    ``classes`` [K] and ``positive``; it writes to ``out`` when that is given.

    Args:
        run: trained run folder.
        logits: somebody's logits instead of a run.
        policy: what decides an exit; ``softmax``.
        guarantee: ``none``, an empirical choice that promises nothing.
        target_fnr: largest FNR among exits; the run's configuration (or .02) by default.
        out: with ``logits``: a ``.json`` file to write, or a folder for ``thresholds.json``.
        positive: with ``logits``: name of the positive class.
        classes: with ``logits``: K names; the file's own, else ``0, 1, …`` by default.

    Raises:
        InputError: an argument or array is not what it must be.
        ArtifactError: ``val_calib.npz`` is missing, damaged, or of other splits.
        NotReachableError: no threshold meets the target; the old policy is withdrawn, none is written.
    """
    if (run is None) == (logits is None):
        raise InputError("calibrate must have either a run or a logits file; give one of --run and --logits")
    _one_of("policy", policy, ["softmax"])
    _one_of("guarantee", guarantee, ["none"])
    if run is not None:
        if out is not None or positive is not None or classes is not None:
            raise InputError("out, positive and classes must go with --logits, got them with --run; a run has its own")
        return _calibrate_run(Path(run), target_fnr)
    assert logits is not None
    return _calibrate_logits(Path(logits), target_fnr, None if out is None else Path(out), positive, classes)


def render(thresholds: Thresholds) -> str:
    """Show a policy as text: the classic grid with the chosen threshold in its place, and what it means."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("threshold", "coverage", "FNR on exits", "missed/positives", "exit accuracy", ""):
        table.add_column(name, justify="left" if name == "" else "right")
    chosen = False
    for row in thresholds.sweep_results:
        is_chosen = not row.grid and not chosen and row.threshold == thresholds.exit_threshold
        if not (row.grid or is_chosen):
            continue
        chosen = chosen or is_chosen
        table.add_row(
            f"{row.threshold:.6g}" if is_chosen else f"{row.threshold:.2f}",
            f"{row.coverage:.1%}",
            "-" if row.fnr_on_exited is None else f"{row.fnr_on_exited:.2%}",
            f"{row.n_false_negative}/{row.n_positive_exited}",
            "-" if row.exit_accuracy is None else f"{row.exit_accuracy:.2%}",
            "<- chosen" if is_chosen else "",
            style="bold" if is_chosen else None,
        )
    buffer = io.StringIO()
    console = Console(file=buffer, width=100, color_system=None)
    console.print(
        f"softmax policy, positive class '{thresholds.positive}', target FNR on exits {thresholds.target_fnr:.4g}"
    )
    console.print(table)
    console.print(
        f"exit when the largest probability of Stage A is at or above {thresholds.exit_threshold:.6g}\n"
        f"guarantee: {thresholds.guarantee}. {thresholds.statement}",
        highlight=False,
    )
    return buffer.getvalue().rstrip()


def _one_of(name: str, value: str, options: list[str]) -> None:
    if value not in options:
        raise InputError(f"{name} must be {' or '.join(options)}, got '{value}'{nearest(value, options)}")


def _calibrate_run(run: Path, target_fnr: float | None) -> Thresholds:
    predictions = read_calibration(run)
    try:
        thresholds = fit_softmax_policy(
            softmax(predictions.logits_a),
            predictions.labels,
            classes=predictions.classes,
            positive=predictions.positive,
            target_fnr=_run_target(run) if target_fnr is None else target_fnr,
            groups=predictions.groups,
            split_hashes=Splits.read(run / "splits.json").hashes,
            model_fingerprint=predictions.model_fingerprint,
            preprocessing_fingerprint=predictions.preprocessing_fingerprint,
        )
    except NotReachableError as error:
        # A policy of an earlier, easier wish must not be what export finds.
        withdrawn = withdraw_policies(run)
        if withdrawn:
            raise NotReachableError(f"{error}, and the old one ({', '.join(withdrawn)}) was withdrawn") from None
        raise
    # Killed in between, the run has no policy rather than two.
    withdraw_policies(run)
    _write(thresholds, run / POLICY_FILES["softmax"])
    return thresholds


def read_calibration(run: Path) -> Predictions:
    """Read ``RUN/val_calib.npz`` and check that it holds the ``val_calib`` rows of the run's splits.

    Raises:
        ArtifactError: a file is missing or damaged, or the rows are others.
    """
    path = run / "val_calib.npz"
    splits = Splits.read(run / "splits.json")
    if not path.is_file():
        raise ArtifactError(f"{path} must exist, but there is no such file; run `stage1 train --run {run}` first")
    try:
        predictions = Predictions.load(path)
    except InputError as error:
        raise ArtifactError(str(error)) from None
    if predictions.split != "val_calib":
        raise ArtifactError(
            f"{path} must hold the split val_calib, got {predictions.split}; thresholds come from val_calib alone"
        )
    same_rows = predictions.row_ids.tolist() == [row.id for row in splits.of("val_calib")]
    if predictions.split_hash != splits.hashes["val_calib"] or not same_rows:
        raise ArtifactError(
            f"{path} must be of the splits in {run / 'splits.json'}, got rows with hash {predictions.split_hash[:12]} "
            f"instead of {splits.hashes['val_calib'][:12]}; train again on these splits"
        )
    return predictions


def _run_target(run: Path) -> float:
    """The target of the run's configuration; the default where a run has none."""
    if not (run / "config.json").is_file():
        return CalibrateConfig().target_fnr
    from stage1_pro.training.prepare import RunConfig

    return RunConfig.read(run / "config.json").config.calibrate.target_fnr


def _calibrate_logits(
    path: Path, target_fnr: float | None, out: Path | None, positive: str | None, classes: list[str] | None
) -> Thresholds:
    arrays = load_npz(path)
    probs = _file_probs(path, arrays)
    if "labels" not in arrays:
        raise InputError(f"{path} must hold labels [N] as class indices, got {', '.join(sorted(arrays)) or 'nothing'}")
    names = classes or [str(name) for name in np.atleast_1d(arrays.get("classes", np.arange(probs.shape[1])))]
    if positive is None and "positive" in arrays:
        positive = str(arrays["positive"])
    target = None if out is None else (out if out.suffix == ".json" else out / POLICY_FILES["softmax"])
    try:
        thresholds = fit_softmax_policy(
            probs,
            arrays["labels"],
            classes=names,
            positive=choose_positive(names, positive),
            target_fnr=CalibrateConfig().target_fnr if target_fnr is None else target_fnr,
            groups=arrays.get("groups"),
            split_hashes={"logits": sha256_file(path)},
        )
    except NotReachableError:
        if target is not None:
            target.unlink(missing_ok=True)
        raise
    if target is not None:
        _write(thresholds, target)
    return thresholds


def _file_probs(path: Path, arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Probabilities [N, K] from ``logits`` or ``probs``; one column stands for the second of two classes."""
    given = [name for name in ("logits", "probs") if name in arrays]
    if len(given) != 1:
        found = " and ".join(given) or ", ".join(sorted(arrays)) or "nothing"
        raise InputError(f"{path} must hold exactly one of logits and probs, got {found}")
    values = arrays[given[0]]
    if values.dtype.kind not in "fiu":
        raise InputError(f"{given[0]} must be numbers, got {values.dtype}")
    values = values.astype(np.float64)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.size == 0:
        raise InputError(f"{given[0]} must be [N, K] or [N] with at least one row and class, got {list(values.shape)}")
    if values.ndim == 1:
        other = 1 - values if given[0] == "probs" else np.zeros_like(values)
        values = np.stack([other, values], axis=1)
    if values.ndim != 2:
        raise InputError(f"{given[0]} must have shape [N, K] or [N], got {list(values.shape)}")
    return softmax(values) if given[0] == "logits" else cast("NDArray[np.float64]", values)


def _write(thresholds: Thresholds, path: Path) -> None:
    problem = next(
        Draft202012Validator(Thresholds.model_json_schema()).iter_errors(thresholds.model_dump(mode="json")), None
    )
    if problem is not None:
        raise ArtifactError(
            f"{path.name} must fit its JSON Schema, but {problem.json_path}: {problem.message}; not written"
        )
    thresholds.write(path)
    say(f"wrote {path}")
