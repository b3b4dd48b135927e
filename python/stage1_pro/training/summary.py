"""An evaluation as text: every figure that fits a terminal, and what the policy promised."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from stage1_pro.metrics.answers import STAGES
from stage1_pro.metrics.intervals import metric_names
from stage1_pro.policies.certificate import PromiseCheck
from stage1_pro.policies.ranking import GATE
from stage1_pro.policies.sets import SetCheck
from stage1_pro.report import POINTS, RANKINGS, short_note
from stage1_pro.training.measures import DIFFERENCE

if TYPE_CHECKING:
    from rich.console import Console

    from stage1_pro.training.evaluation import Evaluation


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
    for metric in (*metric_names(exits=False), *POINTS):
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
