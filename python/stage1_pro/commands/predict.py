"""``stage1 predict`` and ``stage1 infer``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from stage1_pro.command import Columns, Command, Count, Flag, Place, Result, option, table_columns, within
from stage1_pro.commands.evaluate import OfRun
from stage1_pro.deploy.runtime import NAMES
from stage1_pro.errors import InputError
from stage1_pro.words import SplitName

if TYPE_CHECKING:
    from stage1_pro.data.photos import Found

INPUTS = Flag(positional=True, metavar="IMAGE|FOLDER|TAR|CSV")


class Answering(Command):
    """What predict and infer share."""

    columns: Columns | None = table_columns("what a CSV among the inputs calls its column file: file=path")
    out: Path | None = option(
        None, "CSV to write, which grows by batches as OUT.partial until it is whole; a table on stdout otherwise"
    )
    resume: bool = option(False, "with --out: go on after what ended work left in OUT.partial, to the same bytes")
    overwrite: bool = option(False, "with --out: begin anew where OUT.partial lies")
    batch_size: Count = option(32, "images per batch")
    prior: float | None = option(
        None,
        "share of the positive class where this serves; says what of the promise is void there, answers do not change",
    )

    def _written(self) -> dict[str, Any]:
        """Where rows go, as ``predict`` and ``infer`` take it."""
        if self.out is None and (self.resume or self.overwrite):
            raise InputError("--resume and --overwrite must stand beside --out, got none; a table is printed whole")
        return {**self.model_dump(include={"out", "batch_size", "resume", "overwrite"}), "lazily": True}

    def _told(self, source: Path, rows: Sequence[dict[str, Any]], failures: int, given: Found, **more: Any) -> Result:
        from stage1_pro.deploy.prediction import count, promised, render

        found = promised(source, self.prior)
        record = {
            "rows": rows, "failures": failures, **count(rows), "passed_over": given.record(), "promise": asdict(found),
            **more,
        }  # fmt: skip
        lost = failures > 0 or any(one.may_be_photos for one in given.passed)
        return Result(render(rows, self.out, found), record, int(lost))


class Predict(Answering, topic="engines"):
    """Answer for images with a bundle (needs no torch)."""

    hints: ClassVar = {"--run": "predict takes --bundle RUN/bundle; of a run itself: stage1 infer"}

    bundle: Path = option(..., "bundle folder")
    inputs: Annotated[tuple[Place, ...], INPUTS] = option(..., "what to answer for")
    log: Path | None = option(None, "folder to log every decision to, as an event; see `stage1 review`")
    runtime: str = option("onnxruntime", f"what executes the stages: {NAMES}; see `stage1 help engines`")
    threads: Annotated[int, within(lambda x: x >= 0, "0 or more")] = option(
        0, "threads of a runtime on the CPU; 0: as many as there are cores", metavar="N"
    )
    trust_engines: bool = option(
        False, "run engines that were neither built here nor signed by a trusted key; an engine is a program"
    )

    def execute(self) -> Result:
        """Print a row for every image, and what of the promise holds here."""
        from stage1_pro.data.labels import gather
        from stage1_pro.data.photos import Found
        from stage1_pro.deploy.prediction import load, predict, promised
        from stage1_pro.policies.standing import check_prior

        check_prior(self.prior)
        if self.prior is not None:
            promised(self.bundle, self.prior)  # refuses a prior of no class before any photo is answered for
        given = gather(self.inputs, self.columns)
        cascade = load(self.bundle, self.runtime, threads=self.threads, trust_engines=self.trust_engines)
        rows, failures = predict(cascade, given, log=self.log, **self._written())
        steps, beside = [asdict(step) for step in cascade.steps], Found([], given.passed)
        return self._told(self.bundle, rows, failures, beside, runtime=cascade.runtime.name, steps=steps)


class Infer(OfRun, Answering, topic="engines"):
    """Answer for images or a split with a run's own model in torch, before any export."""

    hints: ClassVar = {"--bundle": "infer takes --run; of a bundle: stage1 predict"}

    run: Path = option(..., "trained and calibrated run folder")
    inputs: Annotated[tuple[Place, ...], INPUTS] = option((), "what to answer for")
    split: SplitName | None = option(None, "rows of the run instead of images")

    def execute(self) -> Result:
        """Print a row for every image."""
        from stage1_pro.data.labels import gather
        from stage1_pro.data.photos import Found
        from stage1_pro.deploy.prediction import infer, promised
        from stage1_pro.policies.standing import check_prior

        check_prior(self.prior)
        if self.prior is not None:
            promised(self.run, self.prior)
        given = gather(self.inputs, self.columns) if self.inputs and self.split is None else None
        if self.images is not None and self.split is None:
            raise InputError("--images must stand beside --split, got no split; photos to answer for need no flag")
        if self.columns is not None and given is None:
            raise InputError("--columns must stand beside a CSV of photos, got --split; a run's rows are its own")
        asked = self.inputs if given is None else given
        with self.settled():
            rows, failures = infer(self.run, asked, split=self.split, **self._written())
        return self._told(self.run, rows, failures, Found([], [] if given is None else given.passed))
