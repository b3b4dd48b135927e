"""A browser for BROWSER that answers everything on the page of a review, and then ends the review.

It writes the events whose answers were acknowledged into the file that ACKNOWLEDGED names.
"""

from __future__ import annotations

import contextlib
import http.client
import http.cookiejar
import json
import os
import signal
import sys
import urllib.request
from pathlib import Path
from typing import Any


def answer_all(address: str) -> None:
    """Open the page and answer until it shows nothing more."""
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar()))
    base = address.partition("/?")[0]

    def post(what: str, **asked: str) -> Any:
        data = json.dumps(asked).encode()
        request = urllib.request.Request(f"{base}/{what}", data, {"Content-Type": "application/json"})
        return json.load(browser.open(request, timeout=60))["item"]

    browser.open(address, timeout=60)
    item = post("next")
    while item is not None:
        name, skips = item["event_id"], item["event_id"][0] in "0123"
        item = post("skip", event_id=name) if skips else post("answer", event_id=name, label=item["classes"][-1])
        with Path(os.environ["ACKNOWLEDGED"]).open("a") as file:
            file.write(f"{name}\n")
    os.kill(os.getppid(), signal.SIGTERM)


if __name__ == "__main__":
    file = Path(sys.argv[1].removeprefix("file://"))
    # The server may be killed under it at any moment.
    with contextlib.suppress(OSError, http.client.HTTPException):
        answer_all(file.read_text().partition("url=")[2].partition('"')[0])
