"""``stage1 continual``: a loop that keeps learning, step by step."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from stage1_pro.command import Command, Flag, Place, Rate, Result, Share
from stage1_pro.commands.review import BROWSER, PORT, REVIEWER, Browser

BY = "who does it; the user's name by default"


class Loop(Command):
    """A command about the loop in a folder."""

    topic: ClassVar[str] = "loop"

    root: Path = Field(description="the loop's folder")


def _told(what: str, found: dict[str, Any], exit_code: int = 0) -> Result:
    from stage1_pro.continual.loop.folder import render

    return Result(render(what, found), found, exit_code)


class PlanAudits(Command):
    """Say how many audited exits tell which risk from the promised one."""

    topic: ClassVar[str] = "loop"

    alpha: Share = Field(description="risk of exits that was promised")
    harms: Annotated[tuple[float, ...] | None, Flag("--harm")] = Field(
        None, description="true risks to see; 1.5, 2, 3, 5 times alpha by default"
    )
    delta: Share = Field(0.05, description="chance of a false alarm")
    power: Share = Field(0.8, description="chance to see the harm that you want")
    exit_rate: Rate = Field(0.7, description="share of decisions that exit")
    audit_rate: Rate = Field(0.1, description="share of exits that are audited")

    def execute(self) -> Result:
        """Print audits and days for every harm."""
        from stage1_pro.continual.watch.power import plan_audits, render

        found = plan_audits(**dict(self))
        return Result(render(found), found.model_dump(mode="json"))


class Init(Loop):
    """Begin a loop with the bundle of a run as its first champion."""

    run: Path = Field(description="trained and calibrated run; proposals start from it")
    bundle: Path | None = Field(None, description="what the run was exported to; RUN/bundle by default")
    alpha: Share | None = Field(None, description="risk of exits that is watched; what the policy promises by default")
    store: Place | None = Field(None, description="postgresql://…, or a folder or file for SQLite; ROOT by default")
    log: Path | None = Field(None, description="folder that serving logs to; ROOT/log by default")
    config: Path | None = Field(None, description="YAML with loop:, rounds:, alerts: and metrics: of ROOT/loop.json")
    by: str = Field(default_factory=getpass.getuser, description=BY)

    def execute(self) -> Result:
        """Print the first champion."""
        from stage1_pro.continual.loop.folder import init

        return _told("init", init(**dict(self)))


class Ingest(Loop):
    """Put what serving logged into the store."""

    def execute(self) -> Result:
        """Print what was new."""
        from stage1_pro.continual.loop.folder import ingest_log

        return _told("ingest", ingest_log(self.root))


class Status(Loop):
    """Say where the loop is, what serves, and whether the risk is kept."""

    page: Path | None = Field(None, description="HTML page to write")
    metrics: Annotated[Path | None, Flag(metavar="FILE.prom")] = Field(
        None, description="for Prometheus' textfile collector"
    )
    grafana: Annotated[Path | None, Flag(metavar="FILE.json")] = Field(
        None, description="dashboard of these metrics, to import"
    )
    test_alert: bool = Field(False, description="send one to every hook of ROOT/loop.json; exit status 1: one failed")

    def execute(self) -> Result:
        """Print state, champion and risk; the exit code is 1 where an alert was not delivered."""
        from stage1_pro.continual.loop.folder import status

        found = status(self)
        return _told("status", found, int(not all(one["delivered"] for one in found.get("deliveries", ()))))


class ReviewLoop(Loop):
    """Answer on a local page what was selected for review."""

    reviewer: str | None = Field(None, description=REVIEWER)
    port: int = Field(0, description=PORT)
    browser: Browser = Field(True, description=BROWSER)

    def execute(self) -> Result:
        """Print what was answered, once the page is closed."""
        from stage1_pro.continual.ledger.reviewing import render, review
        from stage1_pro.continual.loop.folder import opened

        with opened(self.root) as (config, *_):
            store, log = config.store, config.log
        found = review(store, Path(log), reviewer=self.reviewer, port=self.port, browser=self.browser)
        return Result(render(found), found)


class Labels(Loop):
    """Import or export labels."""

    imported: Annotated[Path | None, Flag("--import", one_of="way", metavar="FILE")] = Field(
        None, description=".csv, or Label Studio's .json"
    )
    exported: Annotated[Path | None, Flag("--export", one_of="way", metavar="FILE")] = Field(
        None, description=".csv, .json; a folder: Parquet"
    )
    source: Literal["owner", "review", "match", "model"] | None = Field(
        None,
        description="the most that a file's labels are believed, whatever it says of itself; by default review for "
        ".json, and what each row says for .csv",
    )
    annotator: str | None = Field(None, description="of rows without one")

    def execute(self) -> Result:
        """Print how many labels came or went."""
        from stage1_pro.continual.loop.folder import labels

        return _told("labels", labels(self))


class Run(Loop):
    """Take steps until one has to wait."""

    every: Annotated[float | None, Flag(metavar="SECONDS")] = Field(
        None, description="look again after so long, for good"
    )

    def execute(self) -> Result:
        """Print where the loop waits."""
        from stage1_pro.continual.loop.folder import run

        return _told("run", run(self.root, every=self.every))


class Propose(Loop):
    """Begin a round now and go on up to its candidate."""

    def execute(self) -> Result:
        """Print where the loop waits."""
        from stage1_pro.continual.loop.folder import run

        return _told("propose", run(self.root, manual=True, until="EVALUATE"))


class EvaluateCandidate(Loop):
    """Judge the candidate, and show the last verdict."""

    def execute(self) -> Result:
        """Print the verdict."""
        from stage1_pro.continual.loop.folder import evaluate

        return _told("evaluate", evaluate(self.root))


class Promote(Loop):
    """Approve the candidate in the shadow."""

    candidate: str | None = Field(None, description="first digits of its hash, to be sure")
    by: str = Field(default_factory=getpass.getuser, description=BY)

    def execute(self) -> Result:
        """Print what was approved."""
        from stage1_pro.continual.loop.folder import promote

        return _told("promote", promote(**dict(self)))


class Rollback(Loop):
    """Bring back the champion before, at once."""

    to: str | None = Field(None, description="hash of an earlier champion; the one before by default")
    by: str = Field(default_factory=getpass.getuser, description=BY)

    def execute(self) -> Result:
        """Print what serves now."""
        from stage1_pro.continual.loop.folder import rollback

        return _told("rollback", rollback(**dict(self)))


class Audit(Loop):
    """Verify the chain of all that was done."""

    exported: Annotated[Path | None, Flag("--export", metavar="FILE")] = Field(None, description="JSON lines to write")
    file: Path | None = Field(None, description="verify this export, not the store")
    head: str | None = Field(None, description="hash that was noted earlier and must be in the chain")

    def execute(self) -> Result:
        """Print length and head of the chain, and its last rows."""
        from stage1_pro.continual.loop.folder import audit

        return _told("audit", audit(**dict(self)))
