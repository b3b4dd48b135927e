"""``stage1 continual``: a loop that keeps learning, step by step; and ``stage1 review``, its page for reviewers."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from stage1_pro.command import Columns, Command, Flag, Place, Rate, Result, Share, option, table_columns, within
from stage1_pro.files import user_name


def _days(value: Any) -> Any:
    """Days from a number and its unit."""
    units = {"h": 1 / 24, "d": 1, "w": 7}
    if isinstance(value, str) and value[-1:] in units:
        value, unit = value[:-1], units[value[-1]]
        with contextlib.suppress(ValueError):
            return float(value) * unit
    return value


Days = Annotated[float, BeforeValidator(_days), within(lambda x: 0 <= x < float("inf"), "an age such as 90d or 12h")]
Browser = Annotated[bool, Flag("--no-browser")]
Blind = Annotated[bool, Flag("--show-answers")]
ANSWERS = "show what the cascade said; labels that follow it hide its errors from certificates"
REVIEWER = "whose answers these are; the user's name by default"
PORT = "port of 127.0.0.1; 0 = any free one"
BROWSER = "print the address, open nothing"
BY = "who does it; the user's name by default"


class Loop(Command, topic="loop"):
    """A command about the loop in a folder: ``does`` names the function of ``loop.folder`` that it calls."""

    does: ClassVar[str] = ""
    root: Path = option(..., "the loop's folder")

    def __init_subclass__(cls, does: str = "", **more: Any) -> None:
        super().__init_subclass__(**more)
        cls.does = does or cls.does

    def execute(self) -> Result:
        """Print what was done or found."""
        from stage1_pro.continual.loop import folder

        found = getattr(folder, self.does)(**dict(self))
        return Result(folder.render(self.does, found), found)


class PlanAudits(Command, topic="loop"):
    """Say how many audited exits tell which risk from the limit."""

    alpha: Share = option(..., "limit of the risk of exits")
    harms: tuple[float, ...] | None = option(
        None, "true risks to see; 1.5, 2, 3, 5 times alpha by default", name="--harm"
    )
    delta: Share = option(0.05, "chance of a false alarm")
    power: Share = option(0.8, "chance to see the harm that you want")
    exit_rate: Rate = option(0.7, "share of decisions that exit")
    audit_rate: Rate = option(0.1, "share of exits that are audited")

    def execute(self) -> Result:
        """Print audits and days for every harm."""
        from stage1_pro.continual.watch.power import plan_audits, render

        found = plan_audits(**dict(self))
        return Result(render(found), found.model_dump(mode="json"))


class Init(Loop, does="init"):
    """Begin a loop with the bundle of a run as its first champion."""

    run: Path = option(..., "trained and calibrated run; proposals start from it")
    bundle: Path | None = option(None, "what the run was exported to; RUN/bundle by default")
    alpha: Share | None = option(None, "limit of the risk of exits; what the policy was asked for by default")
    store: Place | None = option(None, "postgresql://…, or a folder or file for SQLite; ROOT by default")
    log: Path | None = option(None, "folder that serving logs to; ROOT/log by default")
    config: Path | None = option(None, "YAML with loop:, rounds:, alerts: and metrics: of ROOT/loop.json")
    by: str = Field(default_factory=user_name, description=BY)


class Ingest(Loop, does="ingest_log"):
    """Put what serving logged into the store."""


class Status(Loop, does="status"):
    """Say where the loop is, what serves, and whether the risk is kept."""

    page: Path | None = option(None, "HTML page to write")
    metrics: Path | None = option(None, "for Prometheus' textfile collector", metavar="FILE.prom")
    grafana: Path | None = option(None, "dashboard of these metrics, to import", metavar="FILE.json")
    test_alert: bool = option(False, "send one to every hook of ROOT/loop.json; exit status 1: one failed")

    def execute(self) -> Result:
        """The exit code is 1 where an alert was not delivered."""
        found = super().execute()
        return replace(found, exit_code=int(not all(one["delivered"] for one in found.record["deliveries"])))


class Review(Command, topic="loop"):
    """Answer on a local page what was selected for review while serving."""

    store: Place = option(..., "a folder or file (SQLite), or postgresql://…", metavar="URL")
    log: Path | None = option(None, "the log that serving writes, with the images; STORE/log by default")
    reviewer: str | None = option(None, REVIEWER)
    port: int = option(0, PORT)
    lease: float = option(300.0, "seconds that an image is this reviewer's alone")
    blind: Blind = option(True, ANSWERS)
    browser: Browser = option(True, BROWSER)
    purge: bool = option(False, "remove images whose time is over, and stop")
    yes: bool = option(False, "with --purge: also where the clock is far past the newest event")
    as_json: Annotated[bool, Flag(hidden=True)] = False

    def execute(self) -> Result:
        """Print what was purged, ingested and answered, once the page is closed."""
        from stage1_pro.continual.ledger.reviewing import render, review

        def ready(url: str) -> None:
            # A program that starts the page waits for this line.
            if self.as_json:
                print(json.dumps({"url": url}), flush=True)

        options = {name: value for name, value in self if name != "as_json"}
        found = review(**options, ready=ready)
        return Result(render(found), found)


class ReviewLoop(Loop):
    """Answer on a local page what was selected for review."""

    reviewer: str | None = option(None, REVIEWER)
    port: int = option(0, PORT)
    blind: Blind = option(True, ANSWERS)
    browser: Browser = option(True, BROWSER)

    def execute(self) -> Result:
        """Print what was answered, once the page is closed."""
        from stage1_pro.continual.ledger.reviewing import render, review
        from stage1_pro.continual.loop.folder import find_log, find_store, opened

        with opened(self.root) as (config, *_):
            store, log = find_store(self.root, config), find_log(self.root, config)
        options = {name: value for name, value in self if name != "root"}
        found = review(store, log, **options)
        return Result(render(found), found)


class Labels(Loop, does="labels"):
    """Import or export labels."""

    imported: Path | None = option(None, ".csv, or Label Studio's .json", name="--import", one_of="way", metavar="FILE")
    exported: Path | None = option(
        None, ".csv, .json; a folder: Parquet", name="--export", one_of="way", metavar="FILE"
    )
    columns: Columns | None = table_columns("with --import of a CSV: what it calls its columns, such as label=class")
    source: Literal["owner", "review", "match", "model"] | None = option(
        None,
        "the most that a file's labels are believed, whatever it says of itself; by default review for "
        ".json, and what each row says for .csv",
    )
    annotator: str | None = option(None, "of rows without one")
    blind: Blind = option(True, f"with --export to .json: {ANSWERS}")


class Run(Loop, does="run"):
    """Take steps until one has to wait."""

    every: float | None = option(None, "look again after so long, for good", metavar="SECONDS")


class Propose(Loop):
    """Begin a round now and go on up to its candidate."""

    def execute(self) -> Result:
        """Print where the loop waits."""
        from stage1_pro.continual.loop import folder

        found = folder.run(self.root, manual=True, until="EVALUATE")
        return Result(folder.render("propose", found), found)


class EvaluateCandidate(Loop, does="evaluate"):
    """Judge the candidate, and show the last verdict."""


class Promote(Loop, does="promote"):
    """Approve the candidate in the shadow."""

    candidate: str | None = option(None, "first digits of its hash, to be sure")
    by: str = Field(default_factory=user_name, description=BY)


class Rollback(Loop, does="rollback"):
    """Bring back the champion before, at once."""

    to: str | None = option(None, "hash of an earlier champion; the one before by default")
    by: str = Field(default_factory=user_name, description=BY)


class Compact(Loop, does="compact"):
    """Remove what the loop no longer needs."""

    keep: Days = option(90.0, "for which every event stays, such as 90d, 12h or 4w; a number is of days", metavar="AGE")
    dry_run: bool = option(False, "say what would go, and remove nothing")


class Audit(Loop, does="audit"):
    """Verify the chain of all that was done."""

    exported: Path | None = option(None, "JSON lines to write", name="--export", metavar="FILE")
    file: Path | None = option(None, "verify this export, not the store")
    head: str | None = option(None, "hash that was noted earlier and must be in the chain")
