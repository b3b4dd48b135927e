"""``stage1 certify``: label until it is proven."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from stage1_pro.command import Columns, Command, Count, Flag, Place, Rate, Result, Seed, Share, option, table_columns
from stage1_pro.commands.continual import BROWSER, PORT, REVIEWER, Browser

_BEGIN = Flag(group="what to prove; the same, or left out, to go on")


class Certify(Command, topic="certificates"):
    """Label photos on a local page until a promise of the exits is proven.

    The run's model looks at photos without labels once. Then a page shows some of them, drawn by chance, more often
    those that may be answered wrongly, and never what the model says. After each label it is known how much is proven,
    so that nobody labels more than it takes. What is proven becomes the run's policy. Ended at any moment, the same
    command, or `stage1 certify --run RUN`, goes on.
    """

    run: Path = option(..., "trained run folder")
    images: Annotated[Place | None, _BEGIN] = option(
        None,
        "photos of the place where it will serve: a folder, tar or CSV with file[,group]; without groups add "
        "--rows-independent",
    )
    exit_error: Annotated[Share | None, _BEGIN] = option(
        None, "largest share of wrong answers among exits, such as .01 for 1 in 100"
    )
    delta: Annotated[Share | None, _BEGIN] = option(
        None, "largest chance that something false is proven, all claims on these photos together; .05 by default"
    )
    claims: Annotated[Count | None, _BEGIN] = option(
        None, "claims that delta is divided for, fixed by the first; 1 by default"
    )
    policy: Annotated[str | None, _BEGIN] = option(
        None, "what decides an exit: softmax, gate, or auto (by default): the better of both by gate.json"
    )
    floor: Annotated[Rate | None, _BEGIN] = option(
        None,
        "smallest chance of an exit to be labelled, at most 1: every one; by default .1, or more where photos are few "
        "(a smaller one looks through more of them for as many labels)",
    )
    batch: Annotated[Count | None, _BEGIN] = option(
        None,
        "labels after which the progress is shown anew, which would tell how the last one compares with the "
        "model's answer; 10 by default",
    )
    seed: Annotated[Seed | None, _BEGIN] = option(None, "of the order of photos and the draw; 0 by default")
    columns: Annotated[Columns | None, _BEGIN] = table_columns("what a CSV of photos calls its columns")
    rows_independent: Annotated[bool | None, _BEGIN] = option(
        None, "state that every photo is of a place of its own, where no table names groups"
    )
    allow_useless: Annotated[bool | None, _BEGIN] = option(
        None, "prove also what is no better than always answering the commonest class; put on record"
    )
    overwrite: bool = option(
        False,
        "begin anew: another claim, with photos that were not looked through before; what was begun is kept as "
        "RUN/certify.before",
    )
    labels: Path | None = option(
        None,
        "no page: a CSV with sha256 or file, and label (empty: nobody can tell); only what is drawn is taken",
        metavar="CSV",
    )
    check: bool = option(False, "only replay the log of labels, and say whether it proves the policy that lies there")
    reviewer: str | None = option(None, REVIEWER)
    port: int = option(0, PORT)
    browser: Browser = option(True, BROWSER)
    as_json: Annotated[bool, Flag(hidden=True)] = False

    def begun_with(self) -> dict[str, Any]:
        """Options that are fixed when it begins; None: left out. A policy ``auto`` is chosen then."""
        names = ("images", "exit_error", "delta", "claims", "floor", "batch", "seed", "columns", "rows_independent",
                 "allow_useless")  # fmt: skip
        return {name: getattr(self, name) for name in names} | {
            "policy": None if self.policy == "auto" else self.policy
        }

    def execute(self) -> Result:
        """Print what is proven, or how far it is; the exit code is 3 where nothing is and no photo or label is left."""
        from stage1_pro.files import user_name
        from stage1_pro.training.certifying import check_log, opened, render

        if self.check:
            found, said = check_log(self.run)
            return Result(f"{render(found)}\n{said}", {**found.model_dump(mode="json"), "checked": said})
        by = self.reviewer or user_name()
        with opened(self) as (work, given):
            ignored = 0
            if self.labels is not None:
                ignored = work.take(given, by)
            elif work.photo is not None:
                from stage1_pro.continual.ledger.certify_page import CertifyPage
                from stage1_pro.continual.ledger.page import serve

                serve(CertifyPage(work, by, self.port), f"certify as {by}", browser=self.browser, ready=self._ready)
            found = work.stands(ignored)
        code = 0 if found.proven or (found.can_go_on and self.labels is None) else 3
        return Result(render(found), found.model_dump(mode="json"), code)

    def _ready(self, url: str) -> None:
        # A program that starts the page waits for this line.
        if self.as_json:
            print(json.dumps({"url": url}), flush=True)
