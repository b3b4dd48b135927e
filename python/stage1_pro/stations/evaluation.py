"""Evaluation: final figures of the best model and its policy on ``val_test``, and the report."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stage1_pro.artifacts import Evaluation, Measure, Policy, Predictions, Splits, write_bytes, write_csv
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.metrics.intervals import bootstrap_augrc, clopper_pearson_upper
from stage1_pro.metrics.plots import confidence_png, reliability_png, risk_coverage_png
from stage1_pro.metrics.probabilistic import accuracy, auroc, balanced_accuracy, mcc
from stage1_pro.policies import exits as rows_that_exit
from stage1_pro.policies import read_policy
from stage1_pro.policies.certify import groups_in_error
from stage1_pro.policies.softmax import confidence, softmax
from stage1_pro.progress import say
from stage1_pro.report import Picture, training_picture, write_report

StageName = Literal["stage_a", "stage_b", "cascade"]
STAGES: tuple[StageName, ...] = ("stage_a", "stage_b", "cascade")
LEVEL = 0.95
NO_POLICY = "No exit policy has been calibrated: coverage and FNR on exits are empty, and nothing is promised."
MISTAKE_COLUMNS = ["file", "label", "predicted", "probability", "confidence", "stage", "group", "source", "id"]


@dataclass(frozen=True)
class Answers:
    """What one stage, or the cascade of both, answers on N rows.

    ``prediction`` [N] class indices; ``probability`` [N] of the positive class; ``confidence`` [N] of the
    answer; ``error`` bool [N]; ``exited`` bool [N]: answered by Stage A.
    """

    prediction: NDArray[np.int64]
    probability: NDArray[np.float64]
    confidence: NDArray[np.float64]
    error: NDArray[np.bool_]
    exited: NDArray[np.bool_]


def answer(predictions: Predictions, policy: Policy | None) -> dict[StageName, Answers]:
    """Give both stages' answers and, under a policy, the cascade's: Stage A's where it exits, else Stage B's.

    Raises:
        ArtifactError: the policy is of another model, preprocessing or other classes, or a logit is NaN.
    """
    if policy is not None:
        _check_policy(predictions, policy)
    positive = predictions.classes.index(predictions.positive)
    probs = {"stage_a": softmax(predictions.logits_a), "stage_b": softmax(predictions.logits_b)}
    for stage, values in probs.items():
        broken = np.flatnonzero(np.isnan(values).any(axis=1))
        if broken.size:
            name, row = stage[-1].upper(), predictions.row_ids[broken[0]]
            raise ArtifactError(
                f"logits of Stage {name} must be finite, got NaN or infinity for row {row}; train again"
            )
    exits = {"stage_a": np.ones(predictions.labels.size, dtype=bool)}
    if policy is not None:
        exits["cascade"] = rows_that_exit(policy, probs["stage_a"], predictions.gate_logits)
        probs["cascade"] = np.where(exits["cascade"][:, None], probs["stage_a"], probs["stage_b"])
    found: dict[StageName, Answers] = {}
    for stage in STAGES:
        if stage in probs:
            given = probs[stage].argmax(axis=1)
            found[stage] = Answers(
                prediction=given,
                probability=probs[stage][:, positive],
                confidence=confidence(probs[stage]),
                error=given != predictions.labels,
                exited=exits.get(stage, np.zeros(given.size, dtype=bool)),
            )
    return found


def evaluate_predictions(
    predictions: Predictions, policy: Policy | None = None, *, n_replicates: int = 1000, seed: int = 0
) -> Evaluation:
    """Measure predictions on ``val_test``: per stage and for the cascade, over all rows and per source.

    For each: ``accuracy, balanced_accuracy, mcc, auroc`` (positive against the rest) and ``augrc`` with a
    bootstrap interval by group. Under a policy also, of Stage A, ``coverage``, ``exit_accuracy`` and
    ``fnr_on_exited`` with its Clopper-Pearson upper bound by group, and of Stage B ``deferred_accuracy``;
    without one these are null. Undefined figures are null, never 0.

    Args:
        predictions: of ``val_test``, N >= 1.
        policy: the active exit policy, if any.
        n_replicates: bootstrap replicates.
        seed: of the bootstrap.

    Raises:
        ArtifactError: other rows than ``val_test``, a foreign policy, or NaN logits.
    """
    if predictions.split != "val_test":
        raise ArtifactError(
            f"predictions must be of val_test, got {predictions.split}; final figures come from val_test alone"
        )
    if predictions.labels.size == 0:
        raise ArtifactError("val_test must have at least one row, got none; split again")
    if n_replicates < 1:
        raise InputError(f"n_replicates must be at least 1, got {n_replicates}; 1000 is usual")
    answers = answer(predictions, policy)
    deployed = answers.get("cascade", answers["stage_a"])
    exited = answers["cascade"].exited if policy else None
    measures: list[Measure] = []
    for source, rows in _scopes(predictions):
        for stage, given in answers.items():
            measures += _quality(predictions, given, source, stage, rows, n_replicates, seed)
        measures += _exits(predictions, answers, exited, source, rows)
    return Evaluation(
        split_hash=predictions.split_hash,
        model_fingerprint=predictions.model_fingerprint,
        classes=predictions.classes,
        positive=predictions.positive,
        n_rows=predictions.labels.size,
        n_groups=np.unique(predictions.groups).size,
        n_exited=None if exited is None else int(exited.sum()),
        n_mistakes=int(deployed.error.sum()),
        policy=None if policy is None else policy.policy,
        guarantee=None if policy is None else policy.guarantee,
        exit_threshold=None if policy is None else policy.exit_threshold,
        target_fnr=None if policy is None else policy.target_fnr,
        statement=NO_POLICY if policy is None else policy.statement,
        level=LEVEL,
        n_replicates=n_replicates,
        seed=seed,
        measures=measures,
    )


def evaluate(
    run: Path | str, *, n_replicates: int = 1000, seed: int = 0, predictions: Predictions | None = None
) -> Evaluation:
    """Measure the best model of a run and its policy on ``val_test``, and write figures, mistakes and report.

    Writes ``RUN/evaluation/metrics.csv`` (a row a figure), ``RUN/evaluation/evaluation.json``,
    ``RUN/evaluation/mistakes.csv`` (wrong answers, the most confident first), ``RUN/metrics/*.png`` and
    ``RUN/report.html``.

    Args:
        run: trained run folder.
        n_replicates: bootstrap replicates of an interval.
        seed: of the bootstrap.
        predictions: both stages' outputs on ``val_test``; inferred with ``model_best.pth`` when not given.

    Raises:
        ArtifactError: the run is incomplete, or its parts are of different trainings or splits.
    """
    run = Path(run)
    splits = Splits.read(run / "splits.json")
    policy = read_policy(run)
    if predictions is None:
        from stage1_pro.training.inference import infer_split

        predictions = infer_split(run, "val_test")
    rows = splits.of("val_test")
    same_rows = predictions.row_ids.tolist() == [row.id for row in rows]
    if predictions.split_hash != splits.hashes["val_test"] or not same_rows:
        raise ArtifactError(
            f"predictions must be of val_test in {run / 'splits.json'}, got other rows; infer them again"
        )
    evaluation = evaluate_predictions(predictions, policy, n_replicates=n_replicates, seed=seed)
    answers = answer(predictions, policy)
    mistakes = find_mistakes(predictions, answers, [row.file for row in rows])

    write_csv(run / "evaluation" / "metrics.csv", [_flat(measure) for measure in evaluation.measures], _CSV_COLUMNS)
    write_csv(run / "evaluation" / "mistakes.csv", mistakes, MISTAKE_COLUMNS)
    evaluation.write(run / "evaluation" / "evaluation.json")
    pictures = _draw(answers, policy)
    for picture in pictures:
        write_bytes(run / "metrics" / f"{picture.name}.png", picture.png)
    training = training_picture(run / "metrics.csv")
    if training is not None:
        write_bytes(run / "metrics" / f"{training.name}.png", training.png)
        pictures.append(training)
    write_report(
        run / "report.html",
        evaluation,
        policy=policy,
        pictures=pictures,
        mistakes=mistakes,
        image_root=Path(splits.root),
    )
    say(f"wrote {run / 'evaluation'}/metrics.csv, mistakes.csv and {run / 'report.html'}")
    return evaluation


def find_mistakes(
    predictions: Predictions, answers: dict[StageName, Answers], files: list[str]
) -> list[dict[str, object]]:
    """Give the wrong answers of what would be deployed, the most confident first, for relabelling.

    That is the cascade, or Stage A while there is no policy. ``probability`` is the positive class's,
    ``confidence`` the given answer's.
    """
    deployed = answers.get("cascade", answers["stage_a"])
    wrong = np.flatnonzero(deployed.error)
    ordered = wrong[np.lexsort((wrong, -deployed.confidence[wrong]))]
    return [
        {
            "file": files[i],
            "label": predictions.classes[predictions.labels[i]],
            "predicted": predictions.classes[deployed.prediction[i]],
            "probability": float(deployed.probability[i]),
            "confidence": float(deployed.confidence[i]),
            "stage": "stage_a" if deployed.exited[i] else "stage_b",
            "group": str(predictions.groups[i]),
            "source": str(predictions.sources[i]),
            "id": str(predictions.row_ids[i]),
        }
        for i in ordered.tolist()
    ]


def render(evaluation: Evaluation) -> str:
    """Show the main figures as text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    def cell(metric: str, stage: str, source: str | None) -> str:
        try:
            found = evaluation.measure(metric, stage, source)
        except KeyError:
            return ""
        if found.value is None:
            return "-"
        if found.low is not None and found.high is not None:
            return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"
        return f"{found.value:.4f}" + ("" if found.high is None else f" (<= {found.high:.4f})")

    buffer = io.StringIO()
    console = Console(file=buffer, width=118, color_system=None, highlight=False)
    console.print(
        f"val_test: {evaluation.n_rows} rows, {evaluation.n_groups} groups, positive class '{evaluation.positive}'"
    )
    sources = sorted({m.source for m in evaluation.measures if m.source is not None})
    stages = [stage for stage in STAGES if any(m.stage == stage for m in evaluation.measures)]
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("source", "answers", "rows", "accuracy", "balanced", "MCC", "AUROC", "AUGRC"):
        table.add_column(name, justify="left" if name in ("source", "answers") else "right", no_wrap=True)
    exits = Table(box=box.SIMPLE_HEAD)
    for name in ("source", "coverage", "exit accuracy", "FNR on exits", "deferred accuracy"):
        exits.add_column(name, justify="left" if name == "source" else "right")
    for source in (None, *sources):
        # Names of data sets can be long; the files have them whole.
        name = "all" if source is None else source if len(source) <= 24 else source[:23] + "…"
        for stage in stages:
            n = evaluation.measure("accuracy", stage, source).n
            cells = [cell(m, stage, source) for m in ("accuracy", "balanced_accuracy", "mcc", "auroc", "augrc")]
            table.add_row(name if stage == stages[0] else "", stage, str(n) if stage == stages[0] else "", *cells)
        cells = [cell(m, "stage_a", source) for m in ("coverage", "exit_accuracy", "fnr_on_exited")]
        exits.add_row(name, *cells, cell("deferred_accuracy", "stage_b", source))
    console.print(table)
    if evaluation.policy is None:
        console.print(evaluation.statement)
    else:
        console.print(exits)
        console.print(
            f"guarantee: {evaluation.guarantee}. The bound of FNR on exits counts groups (Clopper-Pearson, "
            f"{evaluation.level:.0%}); target "
            f"{'none' if evaluation.target_fnr is None else format(evaluation.target_fnr, 'g')}."
        )
    return buffer.getvalue().rstrip()


def _check_policy(predictions: Predictions, policy: Policy) -> None:
    """A policy speaks of the logits it was calibrated on, and of no others."""
    for name in ("model_fingerprint", "preprocessing_fingerprint"):
        promised, found = getattr(policy, name), getattr(predictions, name)
        if promised is not None and promised != found:
            what = name.replace("_fingerprint", "")
            raise ArtifactError(
                f"the policy must be of this {what}, got one calibrated on {promised[:12]} instead of {found[:12]}; "
                "run `stage1 calibrate` again"
            )
    if policy.classes != predictions.classes or policy.positive != predictions.positive:
        raise ArtifactError(
            f"the policy must be of the classes {predictions.classes} with positive '{predictions.positive}', got "
            f"{policy.classes} with '{policy.positive}'; run `stage1 calibrate` again"
        )


def _scopes(predictions: Predictions) -> Iterator[tuple[str | None, NDArray[np.bool_]]]:
    """All rows, then those of every source when there are several."""
    yield None, np.ones(predictions.labels.size, dtype=bool)
    names = np.unique(predictions.sources)
    if names.size > 1:
        for name in names.tolist():
            yield name or "(no source)", predictions.sources == name


def _quality(
    predictions: Predictions,
    given: Answers,
    source: str | None,
    stage: StageName,
    rows: NDArray[np.bool_],
    n_replicates: int,
    seed: int,
) -> list[Measure]:
    labels, groups, prediction = predictions.labels[rows], predictions.groups[rows], given.prediction[rows]
    is_positive = labels == predictions.classes.index(predictions.positive)
    interval = bootstrap_augrc(
        given.confidence[rows], given.error[rows], groups=groups, n_replicates=n_replicates, level=LEVEL, seed=seed
    )
    n, n_groups = labels.size, np.unique(groups).size
    values = {
        "accuracy": accuracy(prediction, labels),
        "balanced_accuracy": balanced_accuracy(prediction, labels),
        "mcc": mcc(prediction, labels) if np.unique(labels).size > 1 else math.nan,
        "auroc": auroc(given.probability[rows], is_positive),
    }
    found = [
        Measure(source=source, stage=stage, metric=name, value=_known(value), n=n, n_groups=n_groups)
        for name, value in values.items()
    ]
    found.append(
        Measure(
            source=source,
            stage=stage,
            metric="augrc",
            value=_known(interval.value),
            std=_known(interval.std),
            low=_known(interval.low),
            high=_known(interval.high),
            n=n,
            n_groups=n_groups,
        )
    )
    return found


def _exits(
    predictions: Predictions,
    answers: dict[StageName, Answers],
    exited: NDArray[np.bool_] | None,
    source: str | None,
    rows: NDArray[np.bool_],
) -> list[Measure]:
    """What the policy does: exits of Stage A, and Stage B on the rest; null without a policy."""

    def over(
        stage: StageName, metric: str, hits: NDArray[np.bool_], among: NDArray[np.bool_], *, bound: bool = False
    ) -> Measure:
        if exited is None:
            return Measure(source=source, stage=stage, metric=metric, n=0, n_groups=0)
        n, groups = int(among.sum()), predictions.groups[among]
        upper = clopper_pearson_upper(*groups_in_error(hits[among], groups), level=LEVEL) if bound and n else None
        return Measure(
            source=source,
            stage=stage,
            metric=metric,
            value=int(hits[among].sum()) / n if n else None,
            high=upper,
            n=n,
            n_groups=np.unique(groups).size,
        )

    out = np.zeros_like(rows) if exited is None else exited
    stage_a, positive = answers["stage_a"], predictions.classes.index(predictions.positive)
    missed = stage_a.prediction != positive
    return [
        over("stage_a", "coverage", out, rows),
        over("stage_a", "exit_accuracy", ~stage_a.error, rows & out),
        over("stage_a", "fnr_on_exited", missed, rows & out & (predictions.labels == positive), bound=True),
        over("stage_b", "deferred_accuracy", ~answers["stage_b"].error, rows & ~out),
    ]


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


_CSV_COLUMNS = ["scope", "source", "stage", "metric", "value", "std", "low", "high", "n", "n_groups"]


def _flat(measure: Measure) -> dict[str, object]:
    return {"scope": "all" if measure.source is None else "source", **measure.model_dump()}


def _draw(answers: dict[StageName, Answers], policy: Policy | None) -> list[Picture]:
    """Figures of Stage A, which is what the policy selects from."""
    stage_a = answers["stage_a"]
    point = threshold = None
    if policy is not None:
        exited = answers["cascade"].exited
        # The gate's threshold is not on this axis.
        threshold = policy.exit_threshold if policy.policy == "softmax" else None
        if exited.any():
            point = (float(exited.mean()), float(stage_a.error[exited].mean()))
    return [
        Picture(
            "risk_coverage_curve",
            "Risk against coverage",
            "If Stage A answers only its surest photos (left), how many of those answers are wrong? "
            "Good confidence keeps the line low on the left.",
            risk_coverage_png(stage_a.confidence, stage_a.error, point=point),
        ),
        Picture(
            "reliability",
            "Is it as sure as it is right?",
            "Points below the dashed line: Stage A is surer than it should be. Small dots are few photos.",
            reliability_png(stage_a.confidence, ~stage_a.error),
        ),
        Picture(
            "confidence",
            "Confidence of right and wrong answers",
            "Wrong answers right of the threshold are the costly ones: they exit.",
            confidence_png(stage_a.confidence, ~stage_a.error, threshold=threshold),
        ),
    ]
