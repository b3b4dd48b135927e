"""``stage1 review``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from stage1_pro.command import Command, Flag, Place, Result, option

Browser = Annotated[bool, Flag("--no-browser")]
REVIEWER = "whose answers these are; the user's name by default"
PORT = "port of 127.0.0.1; 0 = any free one"
BROWSER = "print the address, open nothing"


class Review(Command, topic="loop"):
    """Answer on a local page what was selected for review while serving."""

    store: Place = option(..., "a folder or file (SQLite), or postgresql://…", metavar="URL")
    log: Path | None = option(None, "the log that serving writes, with the images; STORE/log by default")
    reviewer: str | None = option(None, REVIEWER)
    port: int = option(0, PORT)
    lease: float = option(300.0, "seconds that an image is this reviewer's alone")
    blind: bool = option(False, "do not show what the cascade said, so that it sways nobody")
    browser: Browser = option(True, BROWSER)
    purge: bool = option(False, "remove images whose time is over, and stop")
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
