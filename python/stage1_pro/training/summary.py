"""An evaluation as text: every figure that fits a terminal, and what the policy promised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stage1_pro.metrics.answers import STAGES, Stage
from stage1_pro.metrics.intervals import metric_names
from stage1_pro.metrics.table import names
from stage1_pro.policies.certificate import PromiseCheck, SetCheck
from stage1_pro.policies.ranking import GATE
from stage1_pro.report import RANKINGS, short_note
from stage1_pro.tables import Notes, Sheet, grid, interval
from stage1_pro.training.measures import DIFFERENCE

if TYPE_CHECKING:
    from stage1_pro.training.evaluation import Evaluation


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
    sheet.add(
        f"val_test: {evaluation.n_rows} rows, {evaluation.n_groups} groups, positive class '{evaluation.positive}'"
    )
    sources = sorted({m.source for m in evaluation.measures if m.source is not None})
    stages = [stage for stage in STAGES if any(m.stage == stage for m in evaluation.measures)]
    whole = grid(("all rows", *stages), left=("all rows", *stages), no_wrap=("all rows",))
    for metric in (*metric_names(exits=False), *names("answers")):
        whole.add_row(metric, *(cells.show(metric, stage) for stage in stages))
    sheet.add(whole)
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
    if evaluation.fnr_check is not None:
        sheet.add(f"FNR on exits: {evaluation.fnr_check.statement}")
    if evaluation.exit_promises:
        _add_promises(sheet, evaluation.exit_promises)
    if evaluation.verification is not None:
        _add_sets(sheet, evaluation.verification)
    sheet.add(evaluation.statement if evaluation.policy is None else f"guarantee: {evaluation.guarantee}")
    return sheet.text()


def _add_sources(
    sheet: Sheet, cells: _Cells, evaluation: Evaluation, sources: Sequence[str | None], stages: Sequence[Stage]
) -> None:
    """Answers by source, where there are several, and exits by source, where there is a policy."""
    answers = grid(
        ("source", "answers", "rows", "accuracy", "balanced", "MCC", "AUROC", "AUGRC"), left=("source", "answers")
    )
    exits = grid(
        ("source", "coverage", "exit accuracy", "FNR on exits", "deferred accuracy"), left=("source",), no_wrap=()
    )
    for source in sources:
        # Names of data sets can be long; the files have them whole.
        name = "all" if source is None else source if len(source) <= 24 else source[:23] + "…"
        for stage in stages:
            first = stage == stages[0]
            n = evaluation.measure("accuracy", stage, source).n
            shown = [
                cells.show(m, stage, source, short=True) for m in ("accuracy", "balanced_accuracy", "mcc", "auroc")
            ]
            shown.append(cells.show("augrc", stage, source))
            answers.add_row(name if first else "", stage, str(n) if first else "", *shown)
        shown = [cells.show(m, "stage_a", source) for m in ("coverage", "exit_accuracy", "fnr_on_exited")]
        exits.add_row(name, *shown, cells.show("deferred_accuracy", "stage_b", source))
    if len(sources) > 1:
        sheet.add(answers)
    if evaluation.policy is not None:
        sheet.add(exits)


def _add_promises(sheet: Sheet, promises: Sequence[PromiseCheck]) -> None:
    """What was promised, or only wished, and whether these rows keep it."""
    table = grid(
        ("promise", "source", "at most", "seen", "99% lower", "95% upper", "outcome", "to settle"),
        left=("promise", "source", "outcome"),
    )
    for one in promises:
        limit, lower, upper = (f"{value:.4f}" for value in (one.limit, one.lower, one.upper))
        settle = "" if one.n_to_settle is None else str(one.n_to_settle)
        name = "all" if one.source is None else one.source[:24]
        table.add_row(one.name, name, limit, f"{one.errors}/{one.trials}", lower, upper, one.outcome, settle)
    sheet.add(table)


def _add_sets(sheet: Sheet, check: SetCheck) -> None:
    """The promises of a policy with sets, and what its sets are like."""
    _add_promises(sheet, check.promises)
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
