"""predict and infer: the cascade's answer for images, folders and CSV files, and its promise. No torch in predict."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from stage1_pro.data.images import ImageError
from stage1_pro.data.labels import Gathered, gather
from stage1_pro.data.photos import Found, ImageFile, is_address
from stage1_pro.data.splits import Splits
from stage1_pro.deploy.answers import COLUMNS, Answers, Begun, Filed, Row, columns_of, coming
from stage1_pro.deploy.bundle import MANIFEST, load_bundle
from stage1_pro.deploy.cascade import Answering, Cascade, Prepared, identity
from stage1_pro.errors import InputError, printable
from stage1_pro.policies.policy import read_policy
from stage1_pro.policies.standing import Standing, standing
from stage1_pro.progress import say, track
from stage1_pro.words import SplitName

SEPARATOR = "|"
Opened = contextlib.AbstractContextManager[Answering]


def predict(
    cascade: Cascade,
    inputs: Sequence[Path | str] | Gathered,
    *,
    out: Path | str | None = None,
    batch_size: int = 32,
    log: Path | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    lazily: bool = False,
) -> tuple[Sequence[Row], int]:
    """Answer for every image of the inputs, in order; an unreadable one gets an error and the others go on.

    Args:
        cascade: what answers.
        inputs: images, folders (searched through, in name order) and CSV files with a ``file`` column
            (relative to the CSV's folder), or what ``gather`` found in them.
        out: CSV to write: it grows by batches as ``<out>.partial``, which takes its name at the end.
        batch_size: images per batch.
        log: folder to log every decision to (``continual.events.EventLog``).
        resume: go on after what ended work left in ``<out>.partial``, to the same bytes.
        overwrite: begin anew where such a file lies.
        lazily: rows are read from ``out`` whenever they are gone through, and take no memory; a list otherwise.

    Returns:
        A row per image with ``answers.columns_of`` its classes as keys, and how many failed.
        ``probability`` is P(positive), None where no class is that, ``confidence`` the largest probability and
        ``prob_<class>`` that of each class, of the stage that answered;
        ``decision`` is ``exited``, ``deferred``, or ``abstained``: policy scrc does not accept it, or, with an error,
        the model gave no number. ``set`` is ``none|roadwork``, the label alone unless the policy is scrc; what a row
        lacks is None.

    Raises:
        InputError: an input does not exist, is of no known kind, or nothing is in it; ``<out>.partial`` lies there and
            nothing is said of it, or it is of other work.
    """
    _check(batch_size, out)
    work = _Work("predict", _files(inputs), out, batch_size, resume, overwrite, lazily)
    asked = {"runtime": cascade.runtime.name, "threads": (cascade.asked or {}).get("threads")}
    begun = work.begun(cascade, log=None if log is None else Path(log).absolute(), **asked)
    if log is None:
        return work.answer(begun, lambda _: contextlib.nullcontext(cascade))
    from stage1_pro.continual.serving.events import EventLog
    from stage1_pro.continual.serving.served import Served

    @contextlib.contextmanager
    def served(answers: Answers | None) -> Iterator[Served]:
        with EventLog(log) as events:
            found = Served(cascade, events, writer=begun.writer if answers is None else answers.begun.writer)
            if answers is not None and answers.begun is not begun and answers.n_rows < len(work.files):
                found.go_on(answers.n_decided)
            yield found

    return work.answer(begun, served)


def load(bundle: Path | str, runtime: str, *, threads: int = 0, trust_engines: bool = False) -> Cascade:
    """Load a bundle as ``Cascade.load`` does; say what was stepped down from, and what answers instead."""
    cascade = Cascade.load(bundle, runtime, threads=threads, trust_engines=trust_engines)
    for step in cascade.steps:
        if runtime == "auto" or len(cascade.steps) > 1:
            say(f"{'answers with' if step.ready else 'stepped down from'} {step}")
    return cascade


def infer(
    run: Path | str,
    inputs: Sequence[Path | str] | Gathered = (),
    *,
    split: SplitName | None = None,
    out: Path | str | None = None,
    batch_size: int = 32,
    resume: bool = False,
    overwrite: bool = False,
    lazily: bool = False,
) -> tuple[Sequence[Row], int]:
    """Answer for images, or for one split of the run, with a run's own model in torch: before any export.

    Reads pixels alone, of the one split that is named; no label, and nothing is measured or chosen.

    Takes and gives what ``predict`` does, or rows of the run's ``splits.json`` instead of inputs; it decides the same
    as the run's bundle.

    Raises:
        InputError: both inputs and a split or neither, no such input, or no policy in the run.
        ArtifactError: an incomplete run, or a policy of another model.
        DependencyError: torch or transformers are missing.
    """
    _check(batch_size, out)
    if (split is None) == (not inputs):
        got = "neither" if split is None else "both"
        raise InputError(f"infer must get images or --split, got {got}; for example --split val_test")
    if split is None:
        files = _files(inputs)
    else:
        splits = Splits.read(Path(run) / "splits.json")
        files = [(photo.key, photo) for photo in splits.photos_of(splits.of(split))]
        if not files:
            raise InputError(f"split must have rows, got {split} with none; choose another one or name images")
    cascade = Cascade.from_run(run)
    work = _Work("infer", files, out, batch_size, resume, overwrite, lazily)
    return work.answer(work.begun(cascade, split=split), lambda _: contextlib.nullcontext(cascade))


def promised(source: Path | str, prior: float | None = None) -> Standing:
    """Say what the policy of a bundle or a run promises, and what is left of it under another share of positives.

    Args:
        source: bundle or run folder.
        prior: share of positives where it serves; None: nothing is said.

    Raises:
        InputError: ``prior`` is outside (0, 1), or the folder holds no policy.
        ArtifactError: the bundle or the policy is damaged.
    """
    if (Path(source) / MANIFEST).is_file():
        # Whoever answers with it verifies every hash.
        bundle = load_bundle(source, verify=False)
        return standing(bundle.policy, bundle.splits, prior)
    policy = read_policy(source)
    if policy is None:
        raise InputError(f"{source} must hold a policy, got none; run `stage1 calibrate` first")
    return standing(policy, Splits.read(Path(source) / "splits.json").summary(), prior)


def _files(inputs: Sequence[Path | str] | Gathered) -> list[tuple[str, ImageFile]]:
    found = inputs if isinstance(inputs, Gathered) else gather(inputs)
    if found.passed:
        say(Found([], found.passed).words())
    return found.files


def _check(batch_size: int, out: Path | str | None) -> None:
    if batch_size < 1:
        raise InputError(f"batch_size must be 1 or more, got {batch_size}")
    if out is not None and Path(out).is_dir():
        raise InputError(f"--out must be a CSV file to write, got the folder {out}")
    if out is not None and Path(out).exists() and not Path(out).is_file():
        raise InputError(f"--out must be a CSV file to write, got {out}, which is none; leave it out for a table")


@dataclass(frozen=True)
class _Work:
    """All photos that one command answers for, and where its rows go."""

    name: str
    files: list[tuple[str, ImageFile]]
    out: Path | str | None
    batch_size: int
    resume: bool
    overwrite: bool
    lazily: bool

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.files]

    def begun(self, cascade: Cascade, **options: object) -> Begun:
        # Names may be relative: the same ones elsewhere are other photos.
        places = [str(one) if is_address(str(one)) else os.path.abspath(str(one)) for _, one in self.files]  # noqa: PTH100
        named = [part for pair in zip(self.names, places, strict=True) for part in pair]
        columns = columns_of(cascade.bundle.classes)
        return Begun.of(identity(cascade.bundle), named, columns=columns, batch_size=self.batch_size, **options)

    def answer(self, begun: Begun, answering: Callable[[Answers | None], Opened]) -> tuple[Sequence[Row], int]:
        """Rows for all photos, and how many have an error; ``answering`` is told what is answered already."""
        rows: Sequence[Row]
        if self.out is None:
            with answering(None) as opened:
                rows = [row for batch in self._batches(opened, 0) for row in batch]
        else:
            how = {"resume": self.resume, "overwrite": self.overwrite}
            begins = coming(Path(self.out), begun, self.names, batch_size=self.batch_size, **how)
            # A log is closed before the CSV takes its name: whoever sees that name need not begin again.
            with begins as answers, answering(answers) as opened:
                for batch in self._batches(opened, answers.n_rows):
                    answers.append(batch)
            rows = Filed(Path(self.out), len(self.files))
            say(f"wrote {self.out}")
        failures = sum(row["error"] is not None for row in rows)
        if failures:
            say(f"{failures} of {len(rows)} images could not be answered; see the column error")
        return rows if self.lazily else list(rows), failures

    def _batches(self, answering: Answering, done: int) -> Iterator[list[Row]]:
        total = len(self.files)
        remaining = track(islice(self.files, done, None), self.name, total, done=done)
        while chunk := list(islice(remaining, self.batch_size)):
            yield _answer(answering, chunk)


def count(rows: Sequence[Row]) -> dict[str, int]:
    """How many images exited, were deferred or abstained from, have a set of several classes, or could not be read."""
    found = dict.fromkeys(("exited", "deferred", "abstained", "ambiguous", "unreadable"), 0)
    for row in rows:
        found["unreadable" if row["decision"] is None else row["decision"]] += 1
        found["ambiguous"] += row["set"] not in (None, "", row["label"])
    return found


def render(rows: Sequence[Row], out: Path | str | None = None, promise: Standing | None = None) -> str:
    """Lines for people: a row an image, or where the CSV is and what is in it; then the promise."""
    end = "" if promise is None else f"\nguarantee: {promise.guarantee}. {promise.statement}"
    if promise is not None and promise.prior is not None:
        end += f"\n{promise.note}"
    counts = count(rows)
    summary = (
        f"{len(rows)} images: {counts['exited']} exited at Stage A, {counts['deferred']} deferred to Stage B, "
        f"{counts['abstained']} abstained, {counts['unreadable']} unreadable"
    )
    if counts["ambiguous"]:
        summary += f"; {counts['ambiguous']} have a set of several classes"
    if out is not None:
        return f"{summary}; wrote {out}{end}"
    # A name may hold what a terminal obeys, or a line of its own.
    rows = [{k: printable(v, 5000) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
    width = max((len(row["file"]) for row in rows), default=4)
    names = max([5, *(len(row["label"] or "") for row in rows)])
    # The set says more than the label only where there are others.
    shown = any(row["set"] != row["label"] for row in rows)
    # P(positive), where there is such a class; of every class the CSV and --json have it.
    positive = any(row["probability"] is not None for row in rows)
    column = "probability  " if positive else ""
    head = f"{'file':<{width}}  {'label':<{names}}  {column}confidence  decision   stage"
    lines = [f"{head}  set" if shown else head]
    for row in rows:
        if row["error"] is not None:
            lines.append(f"{row['file']:<{width}}  {row['error']}")
        else:
            lines.append(
                f"{row['file']:<{width}}  {row['label'] or '':<{names}}  "
                + (f"{row['probability']:>11.4f}  " if positive else "")
                + f"{row['confidence']:>10.4f}  {row['decision']:<9}  {row['stage']}"
                + (f"      {row['set'] or ''}" if shown else "")
            )
    return "\n".join([*lines, summary]) + end


def _answer(answering: Answering, chunk: list[tuple[str, ImageFile]]) -> list[Row]:
    columns = columns_of(answering.bundle.classes)
    rows: list[Row] = [dict.fromkeys(columns) | {"file": name} for name, _ in chunk]
    photos: list[Prepared] = []
    readable: list[Row] = []
    for row, (_, file) in zip(rows, chunk, strict=True):
        try:
            photos.append(answering.read(file))
            readable.append(row)
        except ImageError as error:
            row["error"] = f"{error.reason}: {error.detail}"
    if not photos:
        return rows
    for row, answer in zip(readable, answering.answer(photos), strict=True):
        row["decision"] = "abstained"
        if math.isnan(answer["confidence"]):
            row["error"] = "the model gave no number for this image"
            continue
        row |= {
            "confidence": answer["confidence"], "stage": answer["stage"],
            "probability": None if math.isnan(answer["prob"]) else answer["prob"],
            **dict(zip(columns[len(COLUMNS) :], answer["probs"], strict=True)),
        }  # fmt: skip
        if answer["accepted"]:
            row["label"] = answer["label"]
            row["decision"] = "exited" if answer["exited"] else "deferred"
            named = zip(answering.bundle.classes, answer["sets"], strict=True)
            row["set"] = SEPARATOR.join(name for name, within in named if within)
    return rows
