"""Evaluation: final figures of the best model and its policy on ``val_test``, and the report."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import write_bytes, write_csv
from stage1_pro.metrics import figures
from stage1_pro.metrics.answers import (
    MEASURE_COLUMNS,
    STAGES,
    Answered,
    FnrCheck,
    Measure,
    Stage,
    StageEffect,
    check_fnr,
    count_effects,
)
from stage1_pro.metrics.by_class import CLASS_COLUMNS, ByClass, add_classes, by_class, class_rows, confusion_rows
from stage1_pro.metrics.intervals import metric_names
from stage1_pro.metrics.selective import cascade_risks, relative_cost
from stage1_pro.metrics.table import names
from stage1_pro.policies.certificate import PromiseCheck, SetCheck
from stage1_pro.policies.policy import Policy
from stage1_pro.policies.ranking import GATE, rank_answers
from stage1_pro.policies.rows import Rows
from stage1_pro.progress import say
from stage1_pro.record import Record
from stage1_pro.report import RANKINGS, Picture, short_note, training_picture, write_report
from stage1_pro.tables import Notes, Sheet, grid, interval
from stage1_pro.training.answers import (
    COLUMNS,
    answer,
    count_groups,
    find_changes,
    find_mistakes,
    list_answers,
    policy_of,
)
from stage1_pro.training.measures import DIFFERENCE, LEVEL, Measured, Scope, fnr_counts, measure_scope, scopes

NO_POLICY = "No exit policy has been calibrated: figures of exits are empty, and nothing is promised."
COST_COLUMNS = ["threshold", "exit_rate", "cost", "risk"]


class Evaluation(Record):
    """What ``evaluate`` found on ``val_test``: every figure, and the policy they were measured under."""

    format_version: Literal[1] = 1
    split: Literal["val_test"] = "val_test"
    split_hash: str
    model_fingerprint: str
    classes: list[str]
    positive: str | None
    n_rows: int
    n_groups: int
    n_exited: int | None = Field(default=None, description="null without a policy")
    n_mistakes: int = Field(description="wrong answers of the cascade; of Stage A without a policy")
    n_answered: int | None = Field(
        default=None, description="rows that the policy answers; null: it abstains from none"
    )
    n_missed: int | None = Field(default=None, description="of them, those whose set of classes lacks the label")
    n_several: int | None = Field(default=None, description="of them, those whose set has several classes")
    policy: str | None = None
    guarantee: str | None = None
    exit_threshold: float | None = None
    target_fnr: float | None = None
    statement: str = Field(description="what the policy promises, in words")
    fnr_check: FnrCheck | None = Field(default=None, description="null without a policy, or without a target on FNR")
    verification: SetCheck | None = Field(default=None, description="of policy scrc alone")
    exit_promises: list[PromiseCheck] = Field(
        default=[], description="of policies softmax and gate: each constraint held against these rows"
    )
    by_class: dict[str, ByClass] = Field(default={}, description="of each stage; empty in files of the first version")
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

    def one_verdict(self) -> tuple[FnrCheck | None, list[PromiseCheck]]:
        """The check of the target on FNR, and the promises held: a rate is shown once, judged where promised."""
        promises, name = self.exit_promises, "FNR on exits"
        if any(one.name == name and one.outcome is not None for one in promises):
            return None, promises
        if self.fnr_check is None:
            return None, promises
        return self.fnr_check, [one for one in promises if one.name != name]


def evaluate_predictions(
    predictions: Predictions,
    policy: Policy | None = None,
    *,
    n_replicates: int = 1000,
    seed: int = 0,
    blocks: tuple[int, int] | None = None,
) -> tuple[Evaluation, Answered, Measured]:
    """Measure predictions on ``val_test``: per stage and for the cascade, over all rows and per source.

    For each the suite of ``metric_names`` with intervals by group, and ``balanced_accuracy, mcc, auroc`` (positive
    against the rest) and ``ece``. Without a positive class ``auroc`` and ``fnr_on_exited`` are left out; ``by_class``
    has the AUROC of every class and their mean. Under a policy also ``coverage``, ``exit_error``, ``exit_accuracy`` and
    ``fnr_on_exited`` of Stage A, the last with its one-sided Clopper-Pearson upper bound by group, and
    ``deferred_accuracy`` of Stage B; without one these are null. Undefined figures are null, never 0.
    ``accuracy_minus_stage_b`` of the cascade is the paired difference from Stage B answering every row (positive: the
    cascade is better). Under scrc ``verification`` holds its promises against these rows; all other figures take the
    most probable class for the answer to every row, accepted or not.

    The answers and, of all rows, what pictures are drawn from are given too. ``blocks`` are tap and number of blocks.

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
    whole, *parts = scopes(predictions, answers, policy, n_replicates, seed)
    found = measure_scope(whole, figures.BAND_METRICS)
    ranked = rank_answers(predictions, n_replicates=n_replicates, seed=seed, level=LEVEL)
    measures = [
        *found.measures,
        *(one for part in parts for one in measure_scope(part).measures),
        *(whole.measure(name, "stage_a", one, whole.rows) for name, one in ranked.items()),
    ]
    tap, n_blocks = blocks or (None, None)
    evaluation = Evaluation(
        split_hash=predictions.split_hash,
        model_fingerprint=predictions.model_fingerprint,
        classes=predictions.classes,
        positive=predictions.positive,
        n_rows=predictions.labels.size,
        n_groups=np.unique(predictions.groups).size,
        n_mistakes=int(answers.get("cascade", answers["stage_a"]).error.sum()),
        tap=tap,
        n_blocks=n_blocks,
        level=LEVEL,
        n_replicates=n_replicates,
        seed=seed,
        measures=measures,
        by_class={
            stage: by_class(one.probs, predictions.labels, predictions.classes) for stage, one in answers.items()
        },
        **({"statement": NO_POLICY} if policy is None else _under_policy(whole, policy, found.measures)),
    )
    return evaluation, answers, found


def _under_policy(whole: Scope, policy: Policy, measures: Sequence[Measure]) -> dict[str, Any]:
    """Fields of an evaluation that only a policy fills."""
    predictions, answers = whole.predictions, whole.answers
    check = None
    if policy.fnr_target is not None:
        fnr = next(m for m in measures if m.metric == "fnr_on_exited")
        check = check_fnr(fnr, fnr_counts(whole), policy.fnr_target, LEVEL, promised=bool(policy.promises))
    checked = policy.check(
        Rows.of(
            answers["stage_a"].probs, predictions.labels, classes=predictions.classes, positive=predictions.positive,
            gate=predictions.gate_logits, probs_b=answers["stage_b"].probs, groups=predictions.groups,
            sources=predictions.sources,
        )
    )  # fmt: skip
    deployed, counts = answers["cascade"], {}
    if policy.abstains:
        sets, accepted = policy.answer(deployed.probs, deployed.exited, predictions.gate_logits)
        holds = sets[np.arange(accepted.size), predictions.labels]
        counts = {
            "n_answered": int(accepted.sum()),
            "n_missed": int((accepted & ~holds).sum()),
            "n_several": int((accepted & (sets.sum(axis=1) > 1)).sum()),
        }
    return {
        **counts,
        "n_exited": int(deployed.exited.sum()),
        "policy": policy.policy,
        "guarantee": policy.guarantee,
        "exit_threshold": policy.exit_threshold,
        "target_fnr": policy.fnr_target,
        "statement": policy.statement,
        "fnr_check": check,
        "verification": checked.sets,
        "exit_promises": checked.promises,
        "effects": count_effects(answers),
    }


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
    rows that Stage B fixes or breaks), ``predictions.csv`` (a row a photo: its label, the answer and the probability of
    every class by what is deployed, as ``stage1 metrics`` reads them), ``groups.csv`` (a row a group, the most errors
    first), ``classes.csv`` and ``confusion.csv`` (of every stage), ``cost_risk.csv`` (cost and risk at every threshold,
    where the tap saves anything) and ``*.png``; and ``RUN/report.html``. ``RUN/metrics`` holds training's own figures,
    of ``val_select``.

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
    evaluation, answers, found = evaluate_predictions(
        predictions, policy, n_replicates=n_replicates, seed=seed, blocks=blocks
    )
    files, folder = [row.file for row in rows], run / "evaluation"
    lists = {
        "mistakes": find_mistakes(predictions, answers, files),
        "changes": find_changes(predictions, answers, files),
        "groups": count_groups(predictions, answers, policy),
    }
    write_csv(folder / "metrics.csv", [measure.flat() for measure in evaluation.measures], MEASURE_COLUMNS)
    for name, table in lists.items():
        write_csv(folder / f"{name}.csv", table, COLUMNS[name])
    of_class = [f"prob_{name}" for name in predictions.classes]
    write_csv(
        folder / "predictions.csv",
        list_answers(predictions, answers, files, of_class),
        [*COLUMNS["predictions"], *of_class],
    )
    write_csv(
        folder / "classes.csv", [row for one in evaluation.by_class.items() for row in class_rows(*one)], CLASS_COLUMNS
    )
    confusion = [row for one in evaluation.by_class.items() for row in confusion_rows(*one)]
    write_csv(folder / "confusion.csv", confusion, list(confusion[0]))
    evaluation.write(folder / "evaluation.json")
    # Before anything is drawn: a process killed in those seconds leaves no curve of another policy.
    curve = _cost_curve(predictions, answers, policy, blocks)
    if curve is None:
        (folder / "cost_risk.csv").unlink(missing_ok=True)
    else:
        points = [dict(zip(COST_COLUMNS, map(float, row), strict=True)) for row in zip(*curve, strict=True)]
        write_csv(folder / "cost_risk.csv", points, COST_COLUMNS)
    pictures = _draw(predictions, answers, policy, evaluation, found)
    if curve is not None:
        pictures.append(_draw_cost(answers, evaluation, curve, others))
    for picture in pictures:
        write_bytes(folder / f"{picture.name}.png", picture.png)
    training = training_picture(run / "metrics.csv")
    if training is not None:
        write_bytes(run / "metrics" / f"{training.name}.png", training.png)
        pictures.append(training)
    write_report(
        run / "report.html", evaluation, policy=policy, pictures=pictures, image_root=Path(splits.root), **lists
    )
    say(f"wrote {folder}/ (metrics.csv, mistakes.csv, changes.csv, groups.csv, figures) and {run / 'report.html'}")
    return evaluation


class _Cells:
    """Figures of an evaluation as cells, with the notes that they refer to."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self.notes = Notes()

    def show(self, metric: str, stage: Stage, source: str | None = None, *, short: bool = False) -> str:
        """One figure; a short one has neither interval nor mark."""
        try:
            found = self._evaluation.measure(metric, stage, source)
        except KeyError:
            return ""
        mark = ""
        if source is not None:
            # What is to be said of every source fills pages; the file has it.
            mark = " *" if found.method != "none" and found.note and metric != "fnr_on_exited" and not short else ""
        elif not short:
            mark = self.notes.mark(short_note(found.note))
        ends = (None, None) if short else (found.low, found.high)
        return f"{interval(found.value, *ends)}{mark}"


def render(evaluation: Evaluation) -> str:
    """Show the main figures as text."""
    cells, sheet = _Cells(evaluation), Sheet()
    of = "no positive class" if evaluation.positive is None else f"positive class '{evaluation.positive}'"
    sheet.add(f"val_test: {evaluation.n_rows} rows, {evaluation.n_groups} groups, {of}")
    if evaluation.n_answered is not None:
        sheet.add(
            f"deployed: {evaluation.n_answered} of {evaluation.n_rows} rows are answered and nobody answers the "
            f"others; {evaluation.n_missed} answers lack the label, {evaluation.n_several} name several classes. "
            "Figures below take the most probable class for the answer to every row"
        )
    sources = sorted({m.source for m in evaluation.measures if m.source is not None})
    stages = [stage for stage in STAGES if any(m.stage == stage for m in evaluation.measures)]
    whole = grid(("all rows", *stages), left=("all rows", *stages), no_wrap=("all rows",))
    answers = names("answers", without=("positive",) if evaluation.positive is None else ())
    for metric in (*metric_names(exits=False), *answers):
        whole.add_row(metric, *(cells.show(metric, stage) for stage in stages))
    sheet.add(whole)
    _add_classes(sheet, evaluation)
    _add_sources(sheet, cells, evaluation, [None, *sources], stages)
    if evaluation.policy is not None:
        sheet.add(f"accuracy of the cascade minus Stage B alone, paired: {cells.show(DIFFERENCE, 'cascade')}")
        deferred = evaluation.effects[1]
        sheet.add(
            f"of {deferred.n} deferred rows Stage B fixes {deferred.fixed} and breaks {deferred.broken}; "
            f"{deferred.both_wrong} stay wrong"
        )
    sheet.add(*cells.notes.lines())
    if sources:
        sheet.add("* has a note in evaluation/metrics.csv")
    ranked = {name: cells.show(name, "stage_a") for name in RANKINGS}
    if ranked[GATE]:
        words = [f"{RANKINGS[name]} {text}" for name, text in ranked.items() if text]
        sheet.add(f"AUGRC of Stage A's answers, ranked by {'; '.join(words)}")
    check, promises = evaluation.one_verdict()
    if check is not None:
        sheet.add(f"FNR on exits: {check.statement}")
    if promises:
        _add_promises(sheet, promises, evaluation.guarantee)
        if evaluation.guarantee == "ltt" and all(one.outcome is None for one in promises):
            sheet.add("not judged: photos of no split certified it, and those of val_test may be of another kind")
    if evaluation.verification is not None:
        _add_sets(sheet, evaluation.verification, evaluation.guarantee)
    sheet.add(evaluation.statement if evaluation.policy is None else f"guarantee: {evaluation.guarantee}")
    return sheet.text()


def _add_classes(sheet: Sheet, evaluation: Evaluation) -> None:
    """Every class as what is deployed answers it, where there are more than two."""
    stage = next((one for one in reversed(STAGES) if one in evaluation.by_class), None)
    if stage is None or len(evaluation.classes) == 2:
        return
    add_classes(sheet, f"class, {stage}", evaluation.by_class[stage])


def _add_sources(
    sheet: Sheet, cells: _Cells, evaluation: Evaluation, sources: Sequence[str | None], stages: Sequence[Stage]
) -> None:
    """Answers by source, where there are several, and exits by source, where there is a policy."""
    of_answers = {"accuracy": "accuracy", "balanced_accuracy": "balanced", "mcc": "MCC", "auroc": "AUROC"}
    of_exits = {"coverage": "coverage", "exit_accuracy": "exit accuracy", "fnr_on_exited": "FNR on exits"}
    if evaluation.positive is None:
        del of_answers["auroc"], of_exits["fnr_on_exited"]
    answers = grid(("source", "answers", "rows", *of_answers.values(), "AUGRC"), left=("source", "answers"))
    exits = grid(("source", *of_exits.values(), "deferred accuracy"), left=("source",), no_wrap=())
    for source in sources:
        # Names of data sets can be long; the files have them whole.
        name = "all" if source is None else source if len(source) <= 24 else source[:23] + "…"
        for stage in stages:
            first = stage == stages[0]
            n = evaluation.measure("accuracy", stage, source).n
            shown = [cells.show(m, stage, source, short=True) for m in of_answers]
            shown.append(cells.show("augrc", stage, source))
            answers.add_row(name if first else "", stage, str(n) if first else "", *shown)
        shown = [cells.show(m, "stage_a", source) for m in of_exits]
        exits.add_row(name, *shown, cells.show("deferred_accuracy", "stage_b", source))
    if len(sources) > 1:
        sheet.add(answers)
    if evaluation.policy is not None:
        sheet.add(exits)


def _add_promises(sheet: Sheet, promises: Sequence[PromiseCheck], guarantee: str | None) -> None:
    """What was promised and whether these rows keep it, or what was only asked for, beside what is seen."""
    what = "asked for" if guarantee in (None, "none") else "promise"
    names = [what, "source", "at most", "seen", "99% lower", "95% upper", "outcome", "to settle"]
    photos = any(one.photo_trials is not None for one in promises)
    table = grid((*names, *(["of photos"] if photos else [])), left=(what, "source", "outcome"))
    for one in promises:
        limit, lower, upper = (f"{value:.4f}" for value in (one.limit, one.lower, one.upper))
        settle = "" if one.n_to_settle is None else str(one.n_to_settle)
        name = "all" if one.source is None else one.source[:24]
        cells = [one.name, name, limit, f"{one.errors}/{one.trials}", lower, upper, one.outcome or "not judged", settle]
        table.add_row(*cells, *([f"{one.photo_errors}/{one.photo_trials}"] if photos else []))
    sheet.add(table)


def _add_sets(sheet: Sheet, check: SetCheck, guarantee: str | None) -> None:
    """The promises of a policy with sets, and what its sets are like."""
    _add_promises(sheet, check.promises, guarantee)
    rates = {
        "rejected": check.rejection_rate,
        "ambiguous among the accepted": check.ambiguous_rate,
        "mean set size": check.average_set_size,
    }
    sheet.add("; ".join(f"{name} {interval(one.value, one.low, one.high)}" for name, one in rates.items()))
    if check.parts:
        shares = grid(("sets of", "units", "rejected", "ambiguous", "mean size"), left=("sets of",))
        for part in check.parts:
            cells = (part.rejection_rate, part.ambiguous_rate, part.average_set_size)
            shown = (interval(one.value, one.low, one.high) for one in cells)
            shares.add_row(f"{part.part} {part.name[:24]}", str(part.n), *shown)
        sheet.add(shares)
    sheet.add(check.statement)


def _cost_curve(
    predictions: Predictions, answers: Answered, policy: Policy | None, blocks: tuple[int, int] | None
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
            "--seed) and train with another model.tap. Such runs share one val_calib: certify one of them, or "
            "divide delta over all (--claims)"
        )
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [(float(row["cost"]), float(row["risk"])) for row in csv.DictReader(file)]
        cost, risk = np.asarray(rows, dtype=np.float64).T
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(f"{path} must have numbers under cost and risk; evaluate {run} again") from None
    return f"tap {other.tap} of {other.n_blocks} ({run.name}, {other.policy})", (cost, risk)


def _draw(
    predictions: Predictions, answers: Answered, policy: Policy | None, evaluation: Evaluation, found: Measured
) -> list[Picture]:
    """Draw Stage A, which is what the policy selects from; ``found`` is of all rows, with ``figures.BAND_METRICS``."""
    stage_a = answers["stage_a"]
    point = threshold = None
    if policy is not None:
        exited = answers["cascade"].exited
        # The gate's threshold is not on this axis.
        threshold = None if policy.needs_gate else policy.exit_threshold
        if exited.any():
            point = (float(exited.mean()), float(stage_a.error[exited].mean()))
    pictures = [
        Picture.of(
            "risk_coverage_curve",
            "If Stage A answers only its surest photos (left), how many of those answers are wrong? "
            f"Good confidence keeps the line low on the left. Shaded: {LEVEL:.0%} interval at each coverage.",
            figures.risk_coverage_png(
                stage_a.confidence, stage_a.error, point=point, band=figures.risk_band(found.stage_a), level=LEVEL
            ),
        ),
        Picture.of(
            "augrc",
            "AUGRC of Stage A on each resample of whole groups. A wide heap: few groups or few errors.",
            figures.distribution_png(found.stage_a["augrc"], "AUGRC of Stage A (lower is better)"),
        ),
        Picture.of(
            "reliability",
            "Points below the dashed line: Stage A is surer than it should be. ECE is the mean length of the bars, "
            "weighted by photos, over 15 bins of equal width. Small dots are few photos.",
            figures.reliability_png(stage_a.confidence, ~stage_a.error, error=evaluation.value("ece", "stage_a")),
        ),
        Picture.of(
            "confidence",
            "Wrong answers right of the threshold are the costly ones: they exit.",
            figures.confidence_png(stage_a.confidence, ~stage_a.error, threshold=threshold),
        ),
    ]
    if len(predictions.classes) > 2:
        stage = "cascade" if "cascade" in evaluation.by_class else "stage_a"
        pictures.append(
            Picture.of(
                "confusion",
                "How many photos of each class (down) are answered as each (across); darker is a larger share of the "
                "class. Right answers lie on the diagonal. evaluation/classes.csv has precision, recall and F1.",
                figures.confusion_png(evaluation.by_class[stage].confusion, predictions.classes),
            )
        )
    exits = found.exits
    if policy is not None and exits is not None:
        fnr = None if evaluation.positive is None else evaluation.measure("fnr_on_exited", "stage_a")
        if fnr is not None and fnr.value is not None:
            # Its bound stands for the interval.
            one = replace(exits["fnr_on_exited"], value=fnr.value, low=math.nan, high=math.nan)
            png = figures.distribution_png(one, "FNR on exits", percent=True, target=policy.fnr_target, bound=fnr.high)
            caption = (
                "Missed positives among exits, on each resample of whole groups. The dotted line is their upper bound, "
                "the dashed one the target."
            )
            pictures.append(Picture.of("fnr_on_exited", caption, png))
        png = figures.distribution_png(
            exits["coverage"], "coverage: share answered by Stage A", percent=True,
            target=policy.usual_exit_rate,
            target_label="on calibration rows",
        )  # fmt: skip
        caption = "Coverage on each resample of whole groups, beside what the calibration photos gave."
        pictures.append(Picture.of("coverage", caption, png))
        scores = np.nan_to_num(policy.scores(stage_a.probs, predictions.gate_logits), nan=0.0)
        png = figures.exit_rate_png(scores, answers["cascade"].exited, ~stage_a.error, label=policy.score_title)
        caption = (
            f"Photos in bins of about equal size by {policy.score_title} (its range is below each bar, with the number "
            "of photos). Bars should be high where the points are."
        )
        pictures.append(Picture("exit_rate", "Who exits", caption, png))
    return pictures


def _draw_cost(
    answers: Answered,
    evaluation: Evaluation,
    curve: tuple[NDArray[np.float64], ...],
    others: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]],
) -> Picture:
    """What every threshold would cost and risk, here and with the taps of other runs, and where the policy stands."""
    tap, n_blocks = evaluation.tap, evaluation.n_blocks
    assert tap is not None
    assert n_blocks is not None
    exited, deployed = answers["cascade"].exited, answers["cascade"].error
    png = figures.cost_risk_png(
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
