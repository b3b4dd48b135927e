"""evaluate --protocol: ``val_test`` as StreetVision's validator would send it, kept apart from the plain figures."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from stage1_pro.data.images import read_image
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.protocols import challenge, draw_level, levels
from stage1_pro.data.splits import Splits
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import sha256_bytes, write_csv
from stage1_pro.metrics.answers import MEASURE_COLUMNS, Measure, Stage
from stage1_pro.metrics.intervals import compare
from stage1_pro.metrics.measured import Metric
from stage1_pro.policies.policy import Policy
from stage1_pro.progress import say, track
from stage1_pro.record import Record
from stage1_pro.tables import Sheet, grid
from stage1_pro.training.answers import answer, policy_of
from stage1_pro.training.measures import LEVEL, measure_scope, scopes


class ProtocolLevel(Record):
    """Figures of ``val_test`` as a validator would send it at one level; nobody promised anything of such photos."""

    level: Literal["unaltered", "L0", "L1", "L2", "L3", "mixed"] = Field(
        description="mixed: a level drawn for every row; unaltered: what `stage1 evaluate` measures, for comparison"
    )
    n_mistakes: int = Field(description="wrong answers of the cascade; of Stage A without a policy")
    accuracy_minus_unaltered: Metric = Field(description="of these answers, paired by photo")
    measures: list[Measure]

    def measure(self, metric: str, stage: str = "cascade") -> Measure:
        """One figure with its interval; KeyError when it was not measured."""
        for found in self.measures:
            if (found.metric, found.stage) == (metric, stage):
                return found
        raise KeyError((metric, stage))


class ProtocolEvaluation(Record):
    """``protocol.json``: ``val_test`` changed as StreetVision's validator changes photos, by level and mixed."""

    format_version: Literal[1] = 1
    protocol: Literal["crop224", "letterbox224", "native"]
    split: Literal["val_test"] = "val_test"
    split_hash: str
    model_fingerprint: str
    preprocessing_fingerprint: str
    classes: list[str]
    positive: str | None
    n_rows: int
    n_groups: int
    policy: str | None
    guarantee: str | None
    statement: str = Field(description="what these figures are, and what they are not")
    photos_sha256: str = Field(description="of all changed photos, level by level, in the order of the rows")
    photo_seed: int = Field(description="of what was drawn for the photos")
    level: float = Field(gt=0, lt=1, description="of intervals")
    n_replicates: int
    seed: int = Field(description="of the bootstrap")
    levels: list[ProtocolLevel]


def evaluate_protocol(
    run: Path | str, protocol: str, *, n_replicates: int = 1000, seed: int = 0, photo_seed: int = 0
) -> ProtocolEvaluation:
    """Measure the best model of a run and its policy on changed photos of ``val_test``, by level and mixed.

    Writes ``RUN/protocols/<protocol>/``: ``protocol.json`` and ``metrics.csv``. ``RUN/evaluation`` stays as it is,
    and no promise of the policy is held against these photos: nobody promised anything of them.

    Args:
        run: trained run folder.
        protocol: ``crop224``, ``letterbox224`` or ``native``.
        n_replicates: bootstrap replicates of an interval.
        seed: of the bootstrap.
        photo_seed: of what is drawn for every photo, a function of it and the row's number.

    Raises:
        InputError: no such protocol, or a photo that cannot be read.
        ArtifactError: the run is incomplete, or its parts are of different trainings or splits.
    """
    asked = levels(protocol)
    if n_replicates < 1:
        raise InputError(f"n_replicates must be at least 1, got {n_replicates}; 1000 is usual")
    run = Path(run)
    splits = Splits.read(run / "splits.json")
    policy = policy_of(run, splits)
    rows = splits.of("val_test")
    if not rows:
        raise ArtifactError("val_test must have at least one row, got none; split again")

    from stage1_pro.training.checkpoint import load_run_model
    from stage1_pro.training.inference import infer

    model, config = load_run_model(run)
    workers = config.config.train.workers
    plain = infer(model, splits, "val_test", workers=workers)
    digest = hashlib.sha256()
    taken = splits.photos_of(rows)
    found: dict[str, Predictions] = {"unaltered": plain}
    for level in asked:
        with tempfile.TemporaryDirectory(prefix="stage1-protocol-") as folder:
            changed = []
            for number, (row, shot) in enumerate(zip(track(rows, f"photos at L{level}"), taken, strict=True)):
                photo = challenge(read_image(shot), protocol, level, seed=photo_seed, row=number)
                digest.update(photo)
                (Path(folder) / f"{number}.jpg").write_bytes(photo)
                changed.append(row.model_copy(update={"file": f"{number}.jpg", "sha256": sha256_bytes(photo)}))
            there = splits.model_copy(update={"root": folder, "rows": changed})
            found[f"L{level}"] = infer(model, there, "val_test", workers=workers)
    if len(asked) > 1:
        # Every row at its own level, from what was inferred at each.
        drawn = [draw_level(protocol, seed=photo_seed, row=row) for row in range(len(rows))]
        mixed: dict[str, Any] = {}
        for name in ("logits_a", "logits_b", "gate_logits"):
            stack = np.stack([getattr(found[f"L{level}"], name) for level in range(max(drawn) + 1)])
            mixed[name] = stack[drawn, np.arange(len(rows))]
        found["mixed"] = replace(plain, **mixed)
    evaluation = ProtocolEvaluation(
        protocol=protocol,
        split_hash=plain.split_hash,
        model_fingerprint=plain.model_fingerprint,
        preprocessing_fingerprint=plain.preprocessing_fingerprint,
        classes=plain.classes,
        positive=plain.positive,
        n_rows=len(rows),
        n_groups=np.unique(plain.groups).size,
        policy=None if policy is None else policy.policy,
        guarantee=None if policy is None else policy.guarantee,
        statement=_statement(policy, protocol, plain),
        photos_sha256=digest.hexdigest(),
        photo_seed=photo_seed,
        level=LEVEL,
        n_replicates=n_replicates,
        seed=seed,
        levels=[_measure_level(name, one, plain, policy, n_replicates, seed) for name, one in found.items()],
    )
    out = run / "protocols" / protocol
    evaluation.write(out / "protocol.json")
    table = [{"level": one.level, **measure.flat()} for one in evaluation.levels for measure in one.measures]
    write_csv(out / "metrics.csv", table, ["level", *MEASURE_COLUMNS])
    say(f"wrote {out}/ (protocol.json, metrics.csv); {run}/evaluation is left alone")
    return evaluation


def _measure_level(
    name: str, predictions: Predictions, plain: Predictions, policy: Policy | None, n_replicates: int, seed: int
) -> ProtocolLevel:
    answers, before = answer(predictions, policy), answer(plain, policy)
    deployed: Stage = "stage_a" if policy is None else "cascade"
    lost = compare(
        answers[deployed].probs, before[deployed].probs, predictions.labels, groups=predictions.groups,
        metrics=["accuracy"], n_replicates=n_replicates, level=LEVEL, seed=seed,
    )["accuracy"]  # fmt: skip
    whole = next(scopes(predictions, answers, policy, n_replicates, seed))
    return ProtocolLevel(
        level=name,
        n_mistakes=int(answers[deployed].error.sum()),
        accuracy_minus_unaltered=Metric.of("accuracy", lost),
        measures=measure_scope(whole).measures,
    )


def _statement(policy: Policy | None, protocol: str, plain: Predictions) -> str:
    text = f"val_test as the validator's protocol {protocol} would send it. "
    if plain.positive is not None:
        share = float(np.mean(plain.labels == plain.classes.index(plain.positive)))
        text = (
            f"val_test as the validator's protocol {protocol} would send it, {share:.0%} of it positive; the validator "
            "asks as many positives as negatives, which balanced accuracy speaks of. "
        )
    if policy is None:
        return f"{text}No exit policy has been calibrated, so nothing is promised."
    if policy.guarantee == "none":
        return f"{text}The policy promises nothing, of these photos or of others."
    return (
        f"{text}The policy's certificate is about unaltered photos like those of val_calib and says nothing of these; "
        "they are no evidence for or against it."
    )


def render(evaluation: ProtocolEvaluation) -> str:
    """Show the main figures of every level as text."""
    sheet = Sheet()
    stage = "stage_a" if evaluation.policy is None else "cascade"
    sheet.add(
        f"val_test by {evaluation.protocol}: {evaluation.n_rows} rows, {evaluation.n_groups} groups; answers of {stage}"
    )
    of_exits = ("coverage",) if evaluation.positive is None else ("coverage", "fnr_on_exited")
    titles = ("exits", "FNR on exits")[: len(of_exits)]
    columns = ("level", "accuracy", "minus unaltered", "balanced", "MCC", "AUGRC", *titles)
    table = grid(columns, left=("level",))
    for one in evaluation.levels:
        figures = [one.measure(name, stage) for name in ("accuracy", "balanced_accuracy", "mcc", "augrc")]
        figures += [one.measure(name, "stage_a") for name in of_exits]
        accuracy, *others = ("-" if f.value is None else f"{f.value:.4f}" for f in figures)
        ends = (figures[0].low, figures[0].high)
        if None not in ends:
            accuracy += f" [{ends[0]:.3f}, {ends[1]:.3f}]"
        lost = one.accuracy_minus_unaltered
        apart = "" if one.level == "unaltered" or lost.value is None else f"{lost.value:+.4f}"
        if apart and lost.low is not None and lost.high is not None:
            apart += f" [{lost.low:+.3f}, {lost.high:+.3f}]"
        table.add_row(one.level, accuracy, apart, *others)
    sheet.add(table, evaluation.statement)
    return sheet.text()
