"""Evaluation: final figures of the best model and its policy on ``val_test``, and the report."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import write_bytes, write_csv
from stage1_pro.metrics.answers import FnrCheck, Measure, StageEffect
from stage1_pro.metrics.figures import (
    BAND_METRICS,
    confidence_png,
    cost_risk_png,
    distribution_png,
    exit_rate_png,
    reliability_png,
    risk_band,
    risk_coverage_png,
)  # fmt: skip
from stage1_pro.metrics.intervals import (
    Interval,
    Intervals,
    bootstrap,
    bootstrap_answers,
    clopper_pearson_upper,
    compare,
    metric_names,
)
from stage1_pro.metrics.selective import cascade_risks, relative_cost
from stage1_pro.policies.certificate import PromiseCheck, SetCheck
from stage1_pro.policies.policy import Checked, Policy, read_policy
from stage1_pro.policies.ranking import GATE, rank_answers
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.softmax import confidence, softmax
from stage1_pro.policies.units import groups_in_error
from stage1_pro.progress import say
from stage1_pro.report import POINTS, RANKINGS, Picture, short_note, training_picture, write_report

if TYPE_CHECKING:
    from rich.console import Console
from pydantic import Field

from stage1_pro.record import Record


class Evaluation(Record):
    """What ``evaluate`` found on ``val_test``: every figure, and the policy they were measured under."""

    format_version: Literal[1] = 1
    split: Literal["val_test"] = "val_test"
    split_hash: str
    model_fingerprint: str
    classes: list[str]
    positive: str
    n_rows: int
    n_groups: int
    n_exited: int | None = Field(description="null without a policy")
    n_mistakes: int = Field(description="wrong answers of the cascade; of Stage A without a policy")
    policy: str | None
    guarantee: str | None
    exit_threshold: float | None
    target_fnr: float | None
    statement: str = Field(description="what the policy promises, in words")
    fnr_check: FnrCheck | None = Field(description="null without a policy, or without a target on FNR")
    verification: SetCheck | None = Field(default=None, description="of policy scrc alone")
    exit_promises: list[PromiseCheck] = Field(
        default=[], description="of policies softmax and gate: each constraint held against these rows"
    )
    effects: list[StageEffect] = Field(default=[], description="exited, then deferred rows; empty without a policy")
    tap: int | None = Field(default=None, description="block that Stage A ends with; null when it is not known")
    n_blocks: int | None = Field(default=None, description="blocks of a full pass; null when it is not known")
    level: float = Field(gt=0, lt=1, description="of intervals and bounds")
    n_replicates: int
    seed: int
    measures: list[Measure]

    def value(self, metric: str, stage: str = "cascade", source: str | None = None) -> float | None:
        """The figure itself; null when it is undefined, KeyError when it was not measured."""
        return self.measure(metric, stage, source).value

    def measure(self, metric: str, stage: str = "cascade", source: str | None = None) -> Measure:
        """One figure with its interval; KeyError when it was not measured."""
        for found in self.measures:
            if (found.metric, found.stage, found.source) == (metric, stage, source):
                return found
        raise KeyError((metric, stage, source))


StageName = Literal["stage_a", "stage_b", "cascade"]
STAGES: tuple[StageName, ...] = ("stage_a", "stage_b", "cascade")
LEVEL = 0.95
NO_POLICY = "No exit policy has been calibrated: coverage and FNR on exits are empty, and nothing is promised."
SUITE = metric_names(exits=False)
GROUP_COLUMNS = [
    "group", "source", "rows", "errors", "exits", "missed_positives", "abstained", "ambiguous", "missed_sets",
]  # fmt: skip
# Accuracy of the cascade minus that of Stage B answering everything, on the same rows.
DIFFERENCE = "accuracy_minus_stage_b"
CHANGE_COLUMNS = [
    "file",
    "label",
    "effect",
    "stage_a",
    "confidence_a",
    "stage_b",
    "confidence_b",
    "group",
    "source",
    "id",
]
COST_COLUMNS = ["threshold", "exit_rate", "cost", "risk"]
MISTAKE_COLUMNS = ["file", "label", "predicted", "probability", "confidence", "stage", "group", "source", "id"]


@dataclass(frozen=True)
class Answers:
    """What one stage, or the cascade of both, answers on N rows.

    ``probs`` [N, K]; ``prediction`` [N] class indices; ``probability`` [N] of the positive class; ``confidence`` [N]
    of the answer; ``error`` bool [N]; ``exited`` bool [N]: answered by Stage A.
    """

    probs: NDArray[np.float64]
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
        exits["cascade"] = policy.exits(probs["stage_a"], predictions.gate_logits)
        probs["cascade"] = np.where(exits["cascade"][:, None], probs["stage_a"], probs["stage_b"])
    found: dict[StageName, Answers] = {}
    for stage in STAGES:
        if stage in probs:
            given = probs[stage].argmax(axis=1)
            found[stage] = Answers(
                probs=probs[stage],
                prediction=given,
                probability=probs[stage][:, positive],
                confidence=confidence(probs[stage]),
                error=given != predictions.labels,
                exited=exits.get(stage, np.zeros(given.size, dtype=bool)),
            )
    return found


def evaluate_predictions(
    predictions: Predictions,
    policy: Policy | None = None,
    *,
    n_replicates: int = 1000,
    seed: int = 0,
    blocks: tuple[int, int] | None = None,
) -> Evaluation:
    """Measure predictions on ``val_test``: per stage and for the cascade, over all rows and per source.

    For each the suite of ``metric_names`` with intervals by group, and ``balanced_accuracy, mcc, auroc`` (positive
    against the rest) and ``ece``. Under a policy also, of Stage A, ``coverage``, ``exit_error``,
    ``exit_accuracy`` and ``fnr_on_exited`` with its one-sided Clopper-Pearson upper bound by group, and of Stage B
    ``deferred_accuracy``; without one these are null. Over all rows also what ``rank_answers`` gives: AUGRC of the gate
    and of max softmax side by side. Undefined figures are null, never 0. ``fnr_check`` says whether FNR on exits keeps
    the policy's target by that bound. Of the cascade there is ``accuracy_minus_stage_b``, the paired difference from
    Stage B answering every row (positive: the cascade is better), and ``effects`` count what Stage B fixes and breaks.
    Under scrc ``verification`` holds its promises against these rows; all other figures then take the most probable
    class for the answer to every row, accepted or not.

    Args:
        predictions: of ``val_test``, N >= 1.
        policy: the active exit policy, if any.
        n_replicates: bootstrap replicates.
        seed: of the bootstrap.
        blocks: tap and number of blocks, for the record.

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
        measures += measure_rows(predictions, answers, policy, source, rows, n_replicates, seed)
    check = None
    if policy is not None and policy.fnr_target is not None:
        everything = np.ones(predictions.labels.size, dtype=bool)
        fnr = next(m for m in measures if m.metric == "fnr_on_exited" and m.source is None)
        check = _check_fnr(fnr, _fnr_counts(predictions, answers, everything), policy.fnr_target)
    checked = Checked() if policy is None else policy.check(_rows(predictions, answers))
    n, n_groups = predictions.labels.size, np.unique(predictions.groups).size
    ranked = rank_answers(predictions, n_replicates=n_replicates, seed=seed, level=LEVEL)
    measures += [_measure(None, "stage_a", name, one, n, n_groups) for name, one in ranked.items()]
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
        target_fnr=None if policy is None else policy.fnr_target,
        statement=NO_POLICY if policy is None else policy.statement,
        fnr_check=check,
        verification=checked.sets,
        exit_promises=checked.promises,
        effects=[] if policy is None else count_effects(answers),
        tap=None if blocks is None else blocks[0],
        n_blocks=None if blocks is None else blocks[1],
        level=LEVEL,
        n_replicates=n_replicates,
        seed=seed,
        measures=measures,
    )


def evaluate(
    run: Path | str,
    *,
    n_replicates: int = 1000,
    seed: int = 0,
    predictions: Predictions | None = None,
    blocks: tuple[int, int] | None = None,
    beside: Sequence[Path | str] = (),
) -> Evaluation:
    """Measure the best model of a run and its policy on ``val_test``, and write figures, mistakes and report.

    Writes into ``RUN/evaluation``, which holds figures of ``val_test`` and nothing else: ``metrics.csv`` (a row a
    figure), ``evaluation.json``, ``mistakes.csv`` (wrong answers, the most confident first), ``changes.csv`` (deferred
    rows that Stage B fixes or breaks), ``groups.csv`` (a row a group, the most errors first), ``cost_risk.csv`` (cost
    and risk at every threshold, where the tap saves anything) and ``*.png``; and ``RUN/report.html``. ``RUN/metrics``
    holds training's own figures, of ``val_select``.

    Args:
        run: trained run folder.
        n_replicates: bootstrap replicates of an interval.
        seed: of the bootstrap.
        predictions: both stages' outputs on ``val_test``; inferred with ``model_best.pth`` when not given.
        blocks: with predictions: tap and number of blocks, for costs; without them no cost is shown.
        beside: evaluated runs on the same splits with other taps, to draw their cost and risk beside this one's.

    Raises:
        ArtifactError: the run is incomplete, its parts are of different trainings or splits, or a run beside it is.
    """
    run = Path(run)
    splits = Splits.read(run / "splits.json")
    others = dict(_read_curve(Path(other), splits.hashes["val_test"]) for other in beside)
    policy = policy_of(run, splits)
    if predictions is None:
        from stage1_pro.training.checkpoint import load_joint_gate, load_run_model
        from stage1_pro.training.inference import infer

        model, config = load_run_model(run)
        joint = load_joint_gate(run / "model_best.pth", model)
        predictions = infer(model, splits, "val_test", workers=config.config.train.workers, joint_gate=joint)
        blocks = model.architecture.tap, model.architecture.backbone.n_blocks
    rows = splits.of("val_test")
    same_rows = predictions.row_ids.tolist() == [row.id for row in rows]
    if predictions.split_hash != splits.hashes["val_test"] or not same_rows:
        raise ArtifactError(
            f"predictions must be of val_test in {run / 'splits.json'}, got other rows; infer them again"
        )
    evaluation = evaluate_predictions(predictions, policy, n_replicates=n_replicates, seed=seed, blocks=blocks)
    answers = answer(predictions, policy)
    files = [row.file for row in rows]
    mistakes, changes = find_mistakes(predictions, answers, files), find_changes(predictions, answers, files)

    write_csv(run / "evaluation" / "metrics.csv", [flat(measure) for measure in evaluation.measures], MEASURE_COLUMNS)
    write_csv(run / "evaluation" / "mistakes.csv", mistakes, MISTAKE_COLUMNS)
    write_csv(run / "evaluation" / "changes.csv", changes, CHANGE_COLUMNS)
    groups = count_groups(predictions, answers, policy)
    write_csv(run / "evaluation" / "groups.csv", groups, GROUP_COLUMNS)
    evaluation.write(run / "evaluation" / "evaluation.json")
    curve = _cost_curve(predictions, answers, policy, blocks)
    if curve is None:
        (run / "evaluation" / "cost_risk.csv").unlink(missing_ok=True)
    else:
        write_csv(
            run / "evaluation" / "cost_risk.csv",
            [dict(zip(COST_COLUMNS, map(float, row), strict=True)) for row in zip(*curve, strict=True)],
            COST_COLUMNS,
        )
    pictures = _draw(predictions, answers, policy, evaluation)
    if curve is not None:
        pictures.append(_draw_cost(answers, evaluation, curve, others))
    for picture in pictures:
        write_bytes(run / "evaluation" / f"{picture.name}.png", picture.png)
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
        changes=changes,
        groups=groups,
        image_root=Path(splits.root),
    )
    say(
        f"wrote {run / 'evaluation'}/ (metrics.csv, mistakes.csv, changes.csv, groups.csv, figures) and "
        f"{run / 'report.html'}"
    )
    return evaluation


def policy_of(run: Path, splits: Splits) -> Policy | None:
    """The active policy of a run, if any; raise ArtifactError when it was calibrated on other splits."""
    policy = read_policy(run)
    if policy is not None:
        other = [name for name, digest in policy.split_hashes.items() if splits.hashes.get(name) != digest]
        if other:
            raise ArtifactError(
                f"the policy in {run} must be of these splits, got one calibrated on another {', '.join(sorted(other))}"
                f"{policy.void()}; run `stage1 calibrate --run {run}` again"
            )
    return policy


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


def find_changes(
    predictions: Predictions, answers: dict[StageName, Answers], files: list[str]
) -> list[dict[str, object]]:
    """Give the deferred rows on which Stage B breaks what was right, then those it fixes, its surest answers first.

    ``effect`` is ``broken`` or ``fixed``; confidences are of each stage's own answer. Empty without a policy.
    """
    if "cascade" not in answers:
        return []
    a, b = answers["stage_a"], answers["stage_b"]
    changed = np.flatnonzero(~answers["cascade"].exited & (a.error != b.error))
    order = changed[np.lexsort((changed, -b.confidence[changed], a.error[changed]))]
    return [
        {
            "file": files[i],
            "label": predictions.classes[predictions.labels[i]],
            "effect": "fixed" if a.error[i] else "broken",
            "stage_a": predictions.classes[a.prediction[i]],
            "confidence_a": float(a.confidence[i]),
            "stage_b": predictions.classes[b.prediction[i]],
            "confidence_b": float(b.confidence[i]),
            "group": str(predictions.groups[i]),
            "source": str(predictions.sources[i]),
            "id": str(predictions.row_ids[i]),
        }
        for i in order.tolist()
    ]


def count_effects(answers: dict[StageName, Answers]) -> list[StageEffect]:
    """Count on exited, then on deferred rows who of the two stages is right; under a policy."""
    a, b, exited = answers["stage_a"].error, answers["stage_b"].error, answers["cascade"].exited
    parts: tuple[tuple[Literal["exited", "deferred"], NDArray[np.bool_]], ...] = (
        ("exited", exited),
        ("deferred", ~exited),
    )
    return [
        StageEffect(
            rows=name,
            n=int(rows.sum()),
            both_right=int((rows & ~a & ~b).sum()),
            fixed=int((rows & a & ~b).sum()),
            broken=int((rows & ~a & b).sum()),
            both_wrong=int((rows & a & b).sum()),
        )
        for name, rows in parts
    ]


def count_groups(
    predictions: Predictions, answers: dict[StageName, Answers], policy: Policy | None = None
) -> list[dict[str, object]]:
    """Give a row a group with what went wrong in it, the most errors first: columns ``GROUP_COLUMNS``.

    ``errors`` are of what would be deployed (the cascade, or Stage A while there is no policy); ``missed_positives``
    are positives that exited under another name; without a policy nothing exits and both counts are null.
    Under scrc also rows that nobody answers, accepted ones with several classes, and accepted ones whose set lacks the
    label.
    """
    deployed, exits = answers.get("cascade", answers["stage_a"]), "cascade" in answers
    positive = predictions.classes.index(predictions.positive)
    missed = deployed.exited & (predictions.labels == positive) & (answers["stage_a"].prediction != positive)
    names, first, member = np.unique(predictions.groups, return_index=True, return_inverse=True)
    counts = {
        "rows": np.bincount(member),
        "errors": np.bincount(member, deployed.error),
        "exits": np.bincount(member, deployed.exited),
        "missed_positives": np.bincount(member, missed),
    }
    if policy is not None and policy.abstains:
        given, accepted = policy.answer(deployed.probs, deployed.exited, predictions.gate_logits)
        holds = given[np.arange(given.shape[0]), predictions.labels]
        counts["abstained"] = np.bincount(member, ~accepted)
        counts["ambiguous"] = np.bincount(member, accepted & (given.sum(axis=1) > 1))
        counts["missed_sets"] = np.bincount(member, accepted & ~holds)
    order = np.lexsort((names, -counts["rows"], -counts["missed_positives"], -counts["errors"]))
    return [
        {
            "group": str(names[i]),
            "source": str(predictions.sources[first[i]]),
            **{name: int(count[i]) if exits or name in ("rows", "errors") else None for name, count in counts.items()},
        }
        for i in order.tolist()
    ]


def render(evaluation: Evaluation) -> str:
    """Show the main figures as text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    notes: list[str] = []

    def cell(metric: str, stage: str, source: str | None, *, short: bool = False) -> str:
        try:
            found = evaluation.measure(metric, stage, source)
        except KeyError:
            return ""
        mark = ""
        if source is not None:
            # What is to be said of every source fills pages; the file has it.
            mark = " *" if found.method != "none" and found.note and metric != "fnr_on_exited" and not short else ""
        elif found.note and not short:
            note = short_note(found.note)
            if note not in notes:
                notes.append(note)
            mark = f" ({notes.index(note) + 1})"
        if found.value is None:
            return f"-{mark}"
        if short or (found.low is None and found.high is None):
            return f"{found.value:.4f}{mark}"
        if found.low is None:
            return f"{found.value:.4f} (<= {found.high:.4f}){mark}"
        return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]{mark}"

    buffer = io.StringIO()
    console = Console(file=buffer, width=118, color_system=None, highlight=False, markup=False)
    console.print(
        f"val_test: {evaluation.n_rows} rows, {evaluation.n_groups} groups, positive class '{evaluation.positive}'"
    )
    sources = sorted({m.source for m in evaluation.measures if m.source is not None})
    stages = [stage for stage in STAGES if any(m.stage == stage for m in evaluation.measures)]
    whole = Table(box=box.SIMPLE_HEAD)
    whole.add_column("all rows", no_wrap=True)
    for stage in stages:
        whole.add_column(stage)
    for metric in (*SUITE, *POINTS):
        whole.add_row(metric, *(cell(metric, stage, None) for stage in stages))
    console.print(whole)
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
            cells = [cell(m, stage, source, short=True) for m in ("accuracy", "balanced_accuracy", "mcc", "auroc")]
            cells.append(cell("augrc", stage, source))
            table.add_row(name if stage == stages[0] else "", stage, str(n) if stage == stages[0] else "", *cells)
        cells = [cell(m, "stage_a", source) for m in ("coverage", "exit_accuracy", "fnr_on_exited")]
        exits.add_row(name, *cells, cell("deferred_accuracy", "stage_b", source))
    if sources:
        console.print(table)
    if evaluation.policy is not None:
        console.print(exits)
        apart = cell(DIFFERENCE, "cascade", None)
        console.print(f"accuracy of the cascade minus Stage B alone, paired: {apart}")
        deferred = evaluation.effects[1]
        console.print(
            f"of {deferred.n} deferred rows Stage B fixes {deferred.fixed} and breaks {deferred.broken}; "
            f"{deferred.both_wrong} stay wrong"
        )
    for number, note in enumerate(notes, 1):
        console.print(f"({number}) {note}")
    if sources:
        console.print("* has a note in evaluation/metrics.csv", highlight=False)
    ranked = {name: cell(name, "stage_a", None) for name in RANKINGS}
    if ranked[GATE]:
        words = [f"{RANKINGS[name]} {text}" for name, text in ranked.items() if text]
        console.print(f"AUGRC of Stage A's answers, ranked by {'; '.join(words)}")
    if evaluation.fnr_check is not None:
        console.print(f"FNR on exits: {evaluation.fnr_check.statement}")
    if evaluation.exit_promises:
        _print_promises(console, evaluation.exit_promises)
    if evaluation.verification is not None:
        _print_sets(console, evaluation.verification)
    if evaluation.policy is None:
        console.print(evaluation.statement)
    else:
        console.print(f"guarantee: {evaluation.guarantee}")
    return buffer.getvalue().rstrip()


def _print_promises(console: Console, promises: Sequence[PromiseCheck]) -> None:
    """What was promised, or only wished, and whether these rows keep it."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for name in ("promise", "source", "at most", "seen", "99% lower", "95% upper", "outcome", "to settle"):
        table.add_column(name, justify="left" if name in ("promise", "source", "outcome") else "right", no_wrap=True)
    for one in promises:
        bounds = (f"{value:.4f}" for value in (one.limit, one.lower, one.upper))
        limit, lower, upper = bounds
        settle = "" if one.n_to_settle is None else str(one.n_to_settle)
        name = "all" if one.source is None else one.source[:24]
        table.add_row(one.name, name, limit, f"{one.errors}/{one.trials}", lower, upper, one.outcome, settle)
    console.print(table)


def _print_sets(console: Console, check: SetCheck) -> None:
    """The promises of a policy with sets, and what its sets are like."""
    from rich import box
    from rich.table import Table

    _print_promises(console, check.promises)
    rates = (
        ("rejected", check.rejection_rate),
        ("ambiguous among the accepted", check.ambiguous_rate),
        ("mean set size", check.average_set_size),
    )
    shown = ("-" if rate.value is None else f"{rate.value:.4f} [{rate.low:.4f}, {rate.high:.4f}]" for _, rate in rates)
    console.print("; ".join(f"{name} {text}" for (name, _), text in zip(rates, shown, strict=True)))
    if check.parts:
        shares = Table(box=box.SIMPLE_HEAD)
        for name in ("sets of", "units", "rejected", "ambiguous", "mean size"):
            shares.add_column(name, justify="left" if name == "sets of" else "right", no_wrap=True)
        for part in check.parts:
            cells = (part.rejection_rate, part.ambiguous_rate, part.average_set_size)
            texts = ("-" if c.value is None else f"{c.value:.4f} [{c.low:.4f}, {c.high:.4f}]" for c in cells)
            shares.add_row(f"{part.part} {part.name[:24]}", str(part.n), *texts)
        console.print(shares)
    console.print(check.statement)


def _rows(predictions: Predictions, answers: dict[StageName, Answers]) -> Rows:
    return Rows.of(
        answers["stage_a"].probs, predictions.labels, classes=predictions.classes, positive=predictions.positive,
        gate=predictions.gate_logits, probs_b=answers["stage_b"].probs, groups=predictions.groups,
        sources=predictions.sources,
    )  # fmt: skip


def _check_policy(predictions: Predictions, policy: Policy) -> None:
    """A policy speaks of the logits it was calibrated on, and of no others."""
    for name in ("model_fingerprint", "preprocessing_fingerprint"):
        promised, found = getattr(policy, name), getattr(predictions, name)
        what = name.replace("_fingerprint", "")
        if promised is None and policy.guarantee != "none":
            raise ArtifactError(
                f"a policy that promises something must say of which {what} it is, got none: what it promises is of "
                "somebody's logits; run `stage1 calibrate --run RUN`"
            )
        if promised is not None and promised != found:
            raise ArtifactError(
                f"the policy must be of this {what}, got one calibrated on {promised[:12]} instead of {found[:12]}"
                f"{policy.void()}; run `stage1 calibrate` again"
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


def measure_rows(
    predictions: Predictions,
    answers: dict[StageName, Answers],
    policy: Policy | None,
    source: str | None,
    rows: NDArray[np.bool_],
    n_replicates: int,
    seed: int,
) -> list[Measure]:
    """Every figure of some rows [N] bool, with its interval: of each stage, of exits, of the cascade's difference."""
    measures: list[Measure] = []
    for stage, given in answers.items():
        measures += _quality(predictions, given, source, stage, rows, n_replicates, seed)
    measures += _exits(predictions, answers, policy, source, rows, n_replicates, seed)
    if policy is not None:
        measures.append(_difference(predictions, answers, source, rows, n_replicates, seed))
    return measures


def _quality(
    predictions: Predictions,
    given: Answers,
    source: str | None,
    stage: StageName,
    rows: NDArray[np.bool_],
    n_replicates: int,
    seed: int,
) -> list[Measure]:
    labels, groups = predictions.labels[rows], predictions.groups[rows]
    positive = predictions.classes.index(predictions.positive)
    intervals = bootstrap(
        given.probs[rows], labels, confidence=given.confidence[rows], groups=groups, metrics=SUITE,
        n_replicates=n_replicates, level=LEVEL, seed=seed, positive=positive,
    )  # fmt: skip
    n, n_groups = labels.size, np.unique(groups).size
    answers = bootstrap_answers(
        given.probs[rows], labels, groups=groups, n_replicates=n_replicates, level=LEVEL, seed=seed, positive=positive
    )
    return [_measure(source, stage, name, one, n, n_groups) for name, one in [*intervals.items(), *answers.items()]]


def _measure(source: str | None, stage: StageName, name: str, one: Interval, n: int, n_groups: int) -> Measure:
    return Measure(
        source=source, stage=stage, metric=name, value=_known(one.value), std=_known(one.std), low=_known(one.low),
        high=_known(one.high), method=one.method, note=one.note, n=n, n_groups=n_groups,
    )  # fmt: skip


def _exits(
    predictions: Predictions,
    answers: dict[StageName, Answers],
    policy: Policy | None,
    source: str | None,
    rows: NDArray[np.bool_],
    n_replicates: int,
    seed: int,
) -> list[Measure]:
    """What the policy does: exits of Stage A, and Stage B on the rest; null without a policy."""
    names: list[tuple[StageName, str]] = [("stage_a", name) for name in ("coverage", "exit_error", "exit_accuracy")]
    names += [("stage_a", "fnr_on_exited"), ("stage_b", "deferred_accuracy")]
    if policy is None:
        return [
            Measure(source=source, stage=stage, metric=name, note="undefined: no exit policy", n=0, n_groups=0)
            for stage, name in names
        ]
    out, groups, stage_a = answers["cascade"].exited, predictions.groups, answers["stage_a"]
    among = {"coverage": rows, "exit_error": rows & out, "deferred_accuracy": rows & ~out}
    sizes = {name: (int(part.sum()), np.unique(groups[part]).size) for name, part in among.items()}
    found = _exit_intervals(predictions, stage_a, policy, rows, n_replicates, seed)
    intervals = {name: found[name] for name in ("coverage", "exit_error")}
    measures = [_measure(source, "stage_a", name, one, *sizes[name]) for name, one in intervals.items()]
    wrong = intervals["exit_error"]
    right = replace(wrong, value=1 - wrong.value, low=1 - wrong.high, high=1 - wrong.low)
    # The mean itself, not one minus another mean: the last bit counts where figures are compared.
    if sizes["exit_error"][0]:
        right = replace(right, value=float(np.mean(~stage_a.error[among["exit_error"]])))
    measures.append(_measure(source, "stage_a", "exit_accuracy", right, *sizes["exit_error"]))
    measures.append(_fnr_measure(source, _fnr_counts(predictions, answers, rows), found["fnr_on_exited"]))
    deferred = Interval(math.nan, math.nan, math.nan, math.nan, method="none", note="undefined: no row is deferred")
    if sizes["deferred_accuracy"][0]:
        part = among["deferred_accuracy"]
        deferred = bootstrap(
            answers["stage_b"].probs[part], predictions.labels[part], groups=groups[part], metrics=["accuracy"],
            n_replicates=n_replicates, level=LEVEL, seed=seed,
        )["accuracy"]  # fmt: skip
    return [*measures, _measure(source, "stage_b", "deferred_accuracy", deferred, *sizes["deferred_accuracy"])]


def _difference(
    predictions: Predictions,
    answers: dict[StageName, Answers],
    source: str | None,
    rows: NDArray[np.bool_],
    n_replicates: int,
    seed: int,
) -> Measure:
    """Accuracy of the cascade minus that of Stage B alone, both on the same resamples of groups."""
    groups = predictions.groups[rows]
    one = compare(
        answers["cascade"].probs[rows], answers["stage_b"].probs[rows], predictions.labels[rows], groups=groups,
        metrics=["accuracy"], n_replicates=n_replicates, level=LEVEL, seed=seed,
    )["accuracy"]  # fmt: skip
    return _measure(source, "cascade", DIFFERENCE, one, int(rows.sum()), np.unique(groups).size)


def _exit_intervals(
    predictions: Predictions, stage_a: Answers, policy: Policy, rows: NDArray[np.bool_], n_replicates: int, seed: int
) -> Intervals:
    scores = policy.scores(stage_a.probs, predictions.gate_logits)
    # A row without a score never exits.
    scores = np.where(np.isnan(scores), -np.inf, scores)
    return bootstrap(
        stage_a.probs[rows], predictions.labels[rows], confidence=scores[rows],
        threshold=policy.exit_threshold, groups=predictions.groups[rows],
        metrics=["coverage", "exit_error", "fnr_on_exited"], n_replicates=n_replicates, level=LEVEL, seed=seed,
        positive=predictions.classes.index(predictions.positive),
    )  # fmt: skip


def _fnr_counts(
    predictions: Predictions, answers: dict[StageName, Answers], rows: NDArray[np.bool_]
) -> tuple[int, int, int, int]:
    """Missed and all exited positives, then the groups that hold any of them."""
    positive = predictions.classes.index(predictions.positive)
    among = rows & answers["cascade"].exited & (predictions.labels == positive)
    missed = answers["stage_a"].prediction[among] != positive
    return int(missed.sum()), int(among.sum()), *groups_in_error(missed, predictions.groups[among])


def _fnr_measure(source: str | None, counts: tuple[int, int, int, int], interval: Interval) -> Measure:
    """FNR on exits with an upper bound on the rate of rows, whatever the sizes of their groups.

    Clopper and Pearson's bound is on the share of groups that hold a miss. Where a large group is missed the share of
    rows is more than that, which the bootstrap by group sees; the larger of the two is the bound.
    """
    missed, n, groups_missed, n_groups = counts
    if n == 0:
        note = "undefined: no positive row exits"
        return Measure(source=source, stage="stage_a", metric="fnr_on_exited", note=note, n=0, n_groups=0)
    high, method = clopper_pearson_upper(groups_missed, n_groups, level=LEVEL), "clopper-pearson"
    note = f"one-sided upper bound: {groups_missed} of {n_groups} groups hold a missed positive"
    if n_groups < n and interval.method in ("bca", "percentile") and interval.high > high:
        high, method = interval.high, interval.method
        note += "; the bootstrap by group goes higher, since the groups' sizes differ"
    return Measure(
        source=source, stage="stage_a", metric="fnr_on_exited", value=missed / n, std=_known(interval.std), high=high,
        method=method, note=note, n=n, n_groups=n_groups,
    )  # fmt: skip


def _check_fnr(measure: Measure, counts: tuple[int, int, int, int], target: float) -> FnrCheck:
    """Hold FNR on exits against the policy's target, by its upper bound."""
    missed, n, groups_missed, n_groups = counts
    outcome: Literal["holds", "not shown", "exceeded"]
    if measure.value is None or measure.high is None:
        outcome, words = "not shown", "not shown: no positive row exits, so nothing is known"
    else:
        figures = (
            f"{missed} of {n} exited positives missed ({measure.value:.2%}), {LEVEL:.0%} upper bound "
            f"{measure.high:.2%} from {n_groups} groups, target {target:.2%}"
        )
        if measure.value > target:
            outcome, words = "exceeded", f"exceeded: the measured rate itself is above the target; {figures}"
        elif measure.high <= target:
            outcome, words = "holds", f"holds by its bound: even the upper bound meets the target; {figures}"
        else:
            outcome = "not shown"
            words = f"not shown: the measured rate meets the target, its upper bound does not; {figures}"
    return FnrCheck(
        outcome=outcome, value=measure.value, upper_bound=measure.high, target=target, level=LEVEL, n_missed=missed,
        n_positives=n, n_groups_missed=groups_missed, n_groups=n_groups, statement=words,
    )  # fmt: skip


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


MEASURE_COLUMNS = [
    "scope",
    "source",
    "stage",
    "metric",
    "value",
    "std",
    "low",
    "high",
    "method",
    "note",
    "n",
    "n_groups",
]


def flat(measure: Measure) -> dict[str, object]:
    """One figure as a row of ``MEASURE_COLUMNS``."""
    return {"scope": "all" if measure.source is None else "source", **measure.model_dump()}


def _draw(
    predictions: Predictions, answers: dict[StageName, Answers], policy: Policy | None, evaluation: Evaluation
) -> list[Picture]:
    """Figures of Stage A, which is what the policy selects from."""
    stage_a, rows = answers["stage_a"], np.ones(predictions.labels.size, dtype=bool)
    # The same resamples as the figures in the table come from: one seed, one number of replicates.
    intervals = bootstrap(
        stage_a.probs, predictions.labels, confidence=stage_a.confidence, groups=predictions.groups,
        metrics=["augrc", *BAND_METRICS], n_replicates=evaluation.n_replicates, level=LEVEL, seed=evaluation.seed,
    )  # fmt: skip
    point = threshold = None
    if policy is not None:
        exited = answers["cascade"].exited
        # The gate's threshold is not on this axis.
        threshold = None if policy.needs_gate else policy.exit_threshold
        if exited.any():
            point = (float(exited.mean()), float(stage_a.error[exited].mean()))
    pictures = [
        Picture(
            "risk_coverage_curve",
            "Risk against coverage",
            "If Stage A answers only its surest photos (left), how many of those answers are wrong? "
            f"Good confidence keeps the line low on the left. Shaded: {LEVEL:.0%} interval at each coverage.",
            risk_coverage_png(stage_a.confidence, stage_a.error, point=point, band=risk_band(intervals), level=LEVEL),
        ),
        Picture(
            "augrc",
            "How far AUGRC may be off",
            "AUGRC of Stage A on each resample of whole groups. A wide heap: few groups or few errors.",
            _heap(intervals["augrc"], "AUGRC of Stage A (lower is better)"),
        ),
        Picture(
            "reliability",
            "Is it as sure as it is right?",
            "Points below the dashed line: Stage A is surer than it should be. ECE is the mean length of the bars, "
            "weighted by photos, over 15 bins of equal width. Small dots are few photos.",
            reliability_png(stage_a.confidence, ~stage_a.error, error=evaluation.value("ece", "stage_a")),
        ),
        Picture(
            "confidence",
            "Confidence of right and wrong answers",
            "Wrong answers right of the threshold are the costly ones: they exit.",
            confidence_png(stage_a.confidence, ~stage_a.error, threshold=threshold),
        ),
    ]
    if policy is not None:
        exits = _exit_intervals(predictions, stage_a, policy, rows, evaluation.n_replicates, evaluation.seed)
        fnr = evaluation.measure("fnr_on_exited", "stage_a")
        if fnr.value is not None:
            png = distribution_png(
                exits["fnr_on_exited"].replicates, value=fnr.value, label="FNR on exits", percent=True,
                target=policy.fnr_target, bound=fnr.high,
            )  # fmt: skip
            caption = (
                "Missed positives among exits, on each resample of whole groups. The target is kept by its bound when "
                "the dotted line is left of the dashed one."
            )
            pictures.append(Picture("fnr_on_exited", "How far FNR on exits may be off", caption, png))
        png = _heap(
            exits["coverage"], "coverage: share answered by Stage A", percent=True,
            target=policy.usual_exit_rate,
            target_label="on calibration rows",
        )  # fmt: skip
        caption = "Coverage on each resample of whole groups, beside what the calibration photos gave."
        pictures.append(Picture("coverage", "How far coverage may be off", caption, png))
        scores = policy.scores(stage_a.probs, predictions.gate_logits)
        pictures.append(_draw_exits(answers, np.nan_to_num(scores, nan=0.0), policy))
    return pictures


def _draw_exits(answers: dict[StageName, Answers], scores: NDArray[np.float64], policy: Policy) -> Picture:
    """Which rows exit, by what the policy compares with its threshold."""
    a, exited = answers["stage_a"], answers["cascade"].exited
    what = policy.score_title
    return Picture(
        "exit_rate",
        "Who exits",
        f"Photos in bins of about equal size by {what} (its range is below each bar, with the number of photos). Bars "
        "should be high where the points are.",
        exit_rate_png(scores, exited, ~a.error, label=what),
    )


def _cost_curve(
    predictions: Predictions, answers: dict[StageName, Answers], policy: Policy | None, blocks: tuple[int, int] | None
) -> tuple[NDArray[np.float64], ...] | None:
    """Threshold, exit rate, cost and risk of the cascade, from nobody exits on; None where no exit saves anything.

    Rows are ranked by what the policy compares with its threshold; a row without a score exits last.
    """
    if policy is None or blocks is None or blocks[0] == blocks[1]:
        return None
    scores = np.nan_to_num(policy.scores(answers["stage_a"].probs, predictions.gate_logits), nan=-1.0)
    rates, risks = cascade_risks(scores, answers["stage_a"].error, answers["stage_b"].error)
    thresholds = np.concatenate([[np.inf], np.unique(scores)[::-1]])
    return thresholds, rates, relative_cost(rates, *blocks), risks


def _draw_cost(
    answers: dict[StageName, Answers],
    evaluation: Evaluation,
    curve: tuple[NDArray[np.float64], ...],
    others: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> Picture:
    """What every threshold would cost and risk, here and with the taps of other runs, and where the policy stands."""
    tap, n_blocks = evaluation.tap, evaluation.n_blocks
    assert tap is not None
    assert n_blocks is not None
    exited, deployed = answers["cascade"].exited, answers["cascade"].error
    png = cost_risk_png(
        {f"tap {tap} of {n_blocks}, all thresholds": (curve[2], curve[3]), **others},
        point=(float(relative_cost(exited.mean(), tap, n_blocks)), float(deployed.mean())),
        stage_b=(1.0, float(answers["stage_b"].error.mean())),
    )
    caption = (
        f"Left: everybody exits after {tap} of {n_blocks} blocks. Right: everybody runs them all. Lower and further "
        "left is better. Cost counts blocks alone; `stage1 bench cascade` measures time. `stage1 evaluate --beside` "
        "adds the curves of runs with other taps."
    )
    return Picture("cost_risk", "What a threshold costs and risks", caption, png)


def _read_curve(run: Path, split_hash: str) -> tuple[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Cost and risk that another run's evaluation left, with a name for the legend."""
    path = run / "evaluation" / "cost_risk.csv"
    if not path.is_file():
        raise ArtifactError(
            f"{path} must exist to be drawn beside; calibrate and evaluate {run} first, with its tap before the last "
            "block"
        )
    other = Evaluation.read(run / "evaluation" / "evaluation.json")
    if other.split_hash != split_hash:
        raise ArtifactError(
            f"{run} must be of the same val_test rows, got others; cut the same splits (stage1 split with the same "
            "--seed) and train with another model.tap. Such runs share one certify half: certify one of them, or "
            "divide delta over all (--claims)"
        )
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(float(row["cost"]), float(row["risk"])) for row in csv.DictReader(file)]
        cost, risk = np.asarray(rows, dtype=np.float64).T
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(f"{path} must have numbers under cost and risk; evaluate {run} again") from None
    return f"tap {other.tap} of {other.n_blocks} ({run.name}, {other.policy})", (cost, risk)


def _heap(one: Interval, label: str, **options: Any) -> bytes:
    return distribution_png(
        one.replicates, value=one.value, low=one.low, high=one.high, label=label, level=one.level, **options
    )
