"""Room continual: the review queue under several reviewers, the page's manners, and the page in a real browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue as queue_module
import signal
import socket
import subprocess
import sys
import threading
import time
import webbrowser
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.browser import Browser
from PIL import Image
from sqlalchemy import create_engine, text

from stage1_pro.continual.ledger.labels import Label, add_labels, disagreement, ingest, read_labels, resolve
from stage1_pro.continual.ledger.page import opened
from stage1_pro.continual.ledger.review import LeaseLostError, ReviewQueue
from stage1_pro.continual.ledger.reviewing import ReviewServer, render, review
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.events import BundleFacts, Event, EventLog
from stage1_pro.errors import InputError
from stage1_pro.files import sha256_bytes, uniform

BUNDLE = "a" * 64
HOSTILE = '<img src=x onerror="document.title=1">'
FACTS = BundleFacts(bundle=BUNDLE, classes=("none", "roadwork"), positive="roadwork")


def photo(index: int) -> bytes:
    import io

    rng = np.random.default_rng(index)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((480, 320), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def make_event(index: int, **changes: Any) -> Event:
    values: dict[str, Any] = {
        "id": f"e{index:05d}", "time": 1000.0 + index, "bundle": BUNDLE, "image_sha256": sha256_bytes(photo(index)),
        "action": "defer", "stage": "B", "label": "roadwork", "prob_a": 0.31, "prob_b": 0.83, "confidence": 0.83,
        "gate_logit": None, "exit_score": 0.69, "threshold": 0.8, "propensity": 0.5, "selected": True,
        "sketch": np.zeros(64),
    }  # fmt: skip
    return Event(**(values | changes))


def fill(log: EventLog, count: int, facts: BundleFacts = FACTS, **changes: Any) -> None:
    log.describe(facts)
    log.append([make_event(index, bundle=facts.bundle, **changes) for index in range(count)])
    for index in range(count):
        log.images.put(sha256_bytes(photo(index)), photo(index), 1000.0 + index)


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "log")


@pytest.fixture
def queue(store: Store, log: EventLog) -> ReviewQueue:
    """Six events, each wanted from one reviewer."""
    fill(log, 6)
    ingest(store, log, double_share=0.0)
    return ReviewQueue(store, log.images, lease=60.0)


# --------------------------------------------------------------------------------------------
# The queue


def test_two_reviewers_get_different_events(queue: ReviewQueue) -> None:
    first, second = queue.take("ada", 2000.0), queue.take("bob", 2000.0)
    assert first is not None and second is not None
    assert (first.event_id, second.event_id) == ("e00000", "e00001")
    assert queue.take("ada", 2001.0).event_id == "e00000"  # type: ignore[union-attr]
    assert (first.answer_a, first.answer_b, first.classes) == ("none", "roadwork", ("none", "roadwork"))
    assert queue.holds("e00000", "ada", 2001.0) == first.image_sha256
    assert queue.holds("e00000", "bob", 2001.0) is None
    with pytest.raises(LeaseLostError, match="may answer, got e00000; take another"):
        queue.answer("e00000", "none", "bob", 2002.0)
    queue.answer("e00000", "none", "ada", 2002.0)
    assert queue.take("ada", 2003.0).event_id == "e00002"  # type: ignore[union-attr]
    assert {name: one.label for name, one in resolve(queue.store).items()} == {"e00000": "none"}


def test_a_lease_ends(queue: ReviewQueue) -> None:
    queue.take("ada", 2000.0)
    assert queue.take("bob", 2059.0).event_id == "e00001"  # type: ignore[union-attr]
    assert queue.take("cyd", 2060.0).event_id == "e00000"  # type: ignore[union-attr]
    with pytest.raises(LeaseLostError):
        queue.answer("e00000", "none", "ada", 2061.0)
    # Nobody else took this one, so the late answer counts.
    queue.answer("e00001", "roadwork", "bob", 9000.0)
    assert set(resolve(queue.store)) == {"e00001"}


def test_skips_go_to_somebody_else(queue: ReviewQueue) -> None:
    queue.take("ada", 2000.0)
    queue.skip("e00000", "ada", 2001.0)
    assert queue.take("ada", 2002.0).event_id == "e00001"  # type: ignore[union-attr]
    assert queue.take("bob", 2002.0).event_id == "e00000"  # type: ignore[union-attr]
    assert read_labels(queue.store) == []
    assert queue.progress("ada", 2003.0).model_dump() == {
        "selected": 6, "finished": 0, "left": 5, "lent": 0, "answered_here": 0, "skipped_here": 1,
    }  # fmt: skip
    assert queue.progress("cyd", 2003.0).lent == 2


def test_undo_supersedes_and_gives_the_event_back(queue: ReviewQueue) -> None:
    for label, at in (("none", 2000.0), ("roadwork", 2001.0)):
        item = queue.take("ada", at)
        queue.answer(item.event_id, label, "ada", at)  # type: ignore[union-attr]
    queue.take("ada", 2002.0)
    queue.skip("e00002", "ada", 2002.0)
    held = queue.take("ada", 2002.5)
    assert held is not None and held.event_id == "e00003"
    for expected in ("e00002", "e00001", "e00000"):
        item = queue.undo("ada", 2003.0)
        assert item is not None and item.event_id == expected
    assert queue.undo("ada", 2004.0) is None
    assert resolve(queue.store) == {}
    with queue.store.read() as connection:
        kinds = connection.execute(text("SELECT kind FROM labels ORDER BY id")).scalars().all()
    assert kinds == ["answer", "answer", "skip", "undo", "undo", "undo"]
    queue.answer("e00000", "roadwork", "ada", 2005.0)
    assert resolve(queue.store)["e00000"].label == "roadwork"


def test_an_undo_of_what_somebody_else_holds(store: Store, log: EventLog) -> None:
    fill(log, 1)
    ingest(store, log, double_share=1.0)
    queue = ReviewQueue(store, log.images)
    queue.take("ada", 2000.0)
    queue.answer("e00000", "none", "ada", 2000.0)
    assert queue.take("bob", 2001.0).second  # type: ignore[union-attr]
    assert queue.undo("ada", 2002.0) is None
    assert resolve(store) == {} and queue.take("ada", 2003.0) is None


def test_two_are_asked_about_double_labelled_events(store: Store, log: EventLog) -> None:
    fill(log, 40)
    ingest(store, log, double_share=0.25, seed=3)
    double = {f"e{i:05d}" for i in range(40) if uniform(3, "double", f"e{i:05d}") < 0.25}
    assert 2 < len(double) < 20
    queue = ReviewQueue(store, log.images)
    for who, label in (("ada", "none"), ("bob", "roadwork"), ("cyd", "none")):
        seen = []
        while item := queue.take(who, 3000.0):
            seen.append(item.event_id)
            queue.answer(item.event_id, label, who, 3000.0)
        assert set(seen) == {"ada": {f"e{i:05d}" for i in range(40)}, "bob": double, "cyd": set()}[who]
    found = disagreement(store)
    assert found.doubled == found.disagreeing == len(double)
    assert queue.progress("dot", 3001.0).finished == 40


def test_what_its_owner_labelled_needs_no_reviewer(queue: ReviewQueue) -> None:
    for event, source in (("e00000", "owner"), ("e00001", "model")):
        add_labels(queue.store, [Label(event_id=event, label="none", source=source, annotator="x", time=1.0)])
    assert queue.take("ada", 2000.0).event_id == "e00001"  # type: ignore[union-attr]
    assert queue.progress("ada", 2000.0).finished == 1


def test_images_that_are_gone_are_passed_over(queue: ReviewQueue, log: EventLog) -> None:
    (log.images.folder / sha256_bytes(photo(0))[:2] / sha256_bytes(photo(0))).unlink()
    assert queue.take("ada", 2000.0).event_id == "e00001"  # type: ignore[union-attr]
    assert queue.take("ada", 1003.0 + log.images.ttl).event_id == "e00004"  # type: ignore[union-attr]
    assert queue.take("ada", 1006.0 + log.images.ttl) is None


def test_what_the_queue_refuses(queue: ReviewQueue) -> None:
    queue.take("ada", 2000.0)
    with pytest.raises(InputError, match="none, roadwork, got 'roadwrk'.*did you mean"):
        queue.answer("e00000", "roadwrk", "ada", 2000.0)
    with pytest.raises(InputError, match="whose log was ingested, got 'e9'"):
        queue.answer("e9", "none", "ada", 2000.0)
    with pytest.raises(InputError, match="lease must be a positive"):
        ReviewQueue(queue.store, queue.images, lease=0)
    with pytest.raises(InputError, match="reviewer must be a name"):
        ReviewServer(queue, "  ", clock=time.time)
    with pytest.raises(InputError, match="port must be a free one"):
        ReviewServer(queue, "ada", clock=time.time, port=99999)


REVIEWER = """
import sys
from stage1_pro.continual.serving.events import EventLog
from stage1_pro.continual.ledger.review import ReviewQueue
from stage1_pro.continual.ledger.store import Store
store = Store(sys.argv[1])
queue = ReviewQueue(store, EventLog(sys.argv[2]).images)
print("ready", flush=True)
sys.stdin.readline()
while item := queue.take(sys.argv[3], 3000.0):
    queue.answer(item.event_id, "none", sys.argv[3], 3000.0)
    print(item.event_id, flush=True)
store.close()
"""


def test_racing_reviewers_never_get_the_same_event(store_url: str, log: EventLog) -> None:
    """Processes that open a new database at once, then empty one queue."""
    fill(log, 60)
    reviewers = [
        subprocess.Popen([sys.executable, "-c", REVIEWER, store_url, str(log.folder), name], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, text=True)
        for name in ("ada", "bob", "cyd")
    ]  # fmt: skip
    for one in reviewers:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
    store = Store(store_url)
    ingest(store, log, double_share=0.0)
    for one in reviewers:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    seen = [name for one in reviewers for name in one.communicate(timeout=120)[0].split()]
    assert sorted(seen) == [f"e{i:05d}" for i in range(60)]
    assert len(read_labels(store)) == 60
    store.close()


# --------------------------------------------------------------------------------------------
# The server


@contextlib.contextmanager
def serving(store: Store, log: EventLog, **given: Any) -> Iterator[ReviewServer]:
    queue = ReviewQueue(store, log.images)
    with ReviewServer(queue, "ada", clock=lambda: 2000.0, **given) as page:
        thread = threading.Thread(target=page.serve, daemon=True)
        thread.start()
        try:
            yield page
        finally:
            page.close()
            thread.join(10)


@pytest.fixture
def local(tmp_path: Path, log: EventLog) -> Iterator[Store]:
    fill(log, 3)
    store = Store(tmp_path / "loop.db")
    ingest(store, log, double_share=0.0)
    yield store
    store.close()


def ask(page: ReviewServer, path: str, body: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
    given = {"Cookie": f"stage1-review-{page.port}={page.session}", "Content-Type": "application/json"} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, data, given)
    reply = connection.getresponse()
    found = reply.status, dict(reply.getheaders()), reply.read()
    connection.close()
    return found


@pytest.mark.parametrize("target", ["http://[", "http://[::1/next", "/?" + "a=1&" * 11])
def test_what_is_no_address_is_a_bad_request_and_no_traceback(
    target: str, local: Store, log: EventLog, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(local, log) as page:
        for method in ("GET", "POST"):
            with socket.create_connection(("127.0.0.1", page.port), timeout=10) as connection:
                connection.sendall(f"{method} {target} HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n".encode())
                assert connection.makefile("rb").readline().split()[1] == b"400", method
        assert ask(page, "/")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_only_the_token_opens_the_page(local: Store, log: EventLog) -> None:
    with serving(local, log) as page:
        status, headers, _ = ask(page, f"/?token={page.token}", Cookie="")
        assert status == 303 and headers["Location"] == "/"
        assert "HttpOnly" in headers["Set-Cookie"] and "SameSite=Lax" in headers["Set-Cookie"]
        assert page.token not in headers["Set-Cookie"]
        # Whoever sees the address later, in a process list or a history, finds it spent; the one who has it goes on.
        assert ask(page, f"/?token={page.token}", Cookie="")[0] == 403
        assert ask(page, f"/?token={page.token}")[0] == 303
        assert ask(page, "/", Cookie=f"stage1-review-{page.port}={page.token}")[0] == 403
        status, headers, body = ask(page, "/")
        assert status == 200 and b"<title>Review</title>" in body and page.session.encode() not in body
        assert (
            "default-src 'none'" in headers["Content-Security-Policy"]
            and "unsafe" not in headers["Content-Security-Policy"]
        )
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert b"Access-Control" not in str(headers).encode()
        for path in ("/", "/review.js", "/image?event=e00000", "/?token=wrong", "/?token=%C3%A4"):
            assert ask(page, path, Cookie="")[0] == 403, path
            assert path.startswith("/?") or ask(page, path, Cookie=f"stage1-review-{page.port}=wrong")[0] == 403
        # Another site's page, and a name of its own that points here.
        assert ask(page, "/next", {}, Origin="http://evil.example")[0] == 403
        assert ask(page, "/next", {}, Host="evil.example")[0] == 403
        assert ask(page, "/", Host=f"evil.example:{page.port}")[0] == 403
        assert ask(page, "/next", {}, Content_Type="text/plain")[0] == 403
        assert ask(page, "/next", {}, Cookie="")[0] == 403
        assert ask(page, "/next", {}, Cookie="a=b=c; \x7f=1")[0] == 403
        assert ask(page, "/next", {}, Origin=f"http://127.0.0.1:{page.port}")[0] == 200
        assert ask(page, "/../store.py")[0] == 404 and ask(page, "/delete", {})[0] == 404
        assert ask(page, "/next", b"{")[0] == 400 and ask(page, "/next", {"more": 1})[0] == 400
        assert ask(page, "/next", {"label": "x" * 20_000})[0] == 413
        # Nobody but this machine hears it.
        assert page._server.server_address[0] == "127.0.0.1"


def test_the_page_gives_images_of_its_own_event_alone(local: Store, log: EventLog) -> None:
    with serving(local, log) as page:
        state = json.loads(ask(page, "/next", {})[2])
        assert state["item"]["event_id"] == "e00000" and state["progress"]["left"] == 3
        status, headers, body = ask(page, "/image?event=e00000")
        assert (status, headers["Content-Type"], body) == (200, "image/jpeg", photo(0))
        assert ask(page, "/image?event=e00001")[0] == 404 and ask(page, "/image")[0] == 404
        state = json.loads(ask(page, "/answer", {"event_id": "e00000", "label": "none"})[2])
        assert state["item"]["event_id"] == "e00001" and state["note"] == "Answered none."
        assert ask(page, "/image?event=e00000")[0] == 404
        status, _, body = ask(page, "/answer", {"event_id": "e00001", "label": "nonsense"})
        assert status == 400 and "label must be one of" in json.loads(body)["error"]
        # Twice the same, as a double click sends it.
        state = json.loads(ask(page, "/answer", {"event_id": "e00000", "label": "roadwork"})[2])
        assert "nothing was changed" in state["note"] and [one.label for one in read_labels(local)] == ["none"]


def test_an_image_no_browser_shows_is_given_as_png(local: Store, log: EventLog) -> None:
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "TIFF")
    path = log.images.folder / sha256_bytes(photo(0))[:2] / sha256_bytes(photo(0))
    path.write_bytes(buffer.getvalue())
    with serving(local, log) as page:
        ask(page, "/next", {})
        status, headers, body = ask(page, "/image?event=e00000")
        assert status == 200 and headers["Content-Type"] == "image/png" and body.startswith(b"\x89PNG")
        path.write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>")
        assert ask(page, "/image?event=e00000")[0] == 404


def test_blind_tells_nothing_of_the_answers(local: Store, log: EventLog) -> None:
    with serving(local, log, blind=True) as page:
        text = ask(page, "/next", {})[2].decode()
        item = json.loads(text)["item"]
        assert item["classes"] == ["none", "roadwork"]
        assert all(item[name] is None for name in ("label", "answer_a", "answer_b", "prob_a", "prob_b", "action"))
        assert "0.31" not in text and "0.83" not in text


# --------------------------------------------------------------------------------------------
# The browser


LOADED = "document.querySelector('#photo').complete && document.querySelector('#photo').naturalWidth"


def shown(browser: Browser, event: str) -> None:
    browser.until(f"document.querySelector('#facts')?.textContent.includes('{event}') && !document.body.ariaBusy")
    assert browser.until(LOADED) == 480


def test_review_by_key_in_a_browser(local: Store, log: EventLog, chromium: Browser, tmp_path: Path) -> None:
    chromium.events.clear()
    with serving(local, log) as page:
        chromium.size(1200, 800)
        chromium.open(page.url)
        shown(chromium, "e00000")
        assert chromium.run("location.href") == f"http://127.0.0.1:{page.port}/"
        words = chromium.run("document.body.innerText")
        for part in ("What does the photo show?", "none, P(roadwork) 31.0%", "roadwork, P(roadwork) 83.0%",
                     "Stage B answered roadwork", "0 answered", "3 left", "0 of 3 finished"):  # fmt: skip
            assert part in words, words
        chromium.shoot(tmp_path / "wide.png")
        chromium.press("2")
        shown(chromium, "e00001")
        assert resolve(local)["e00000"].label == "roadwork"
        assert "Answered roadwork." in chromium.run("document.querySelector('[role=status]').textContent")
        chromium.press("3")  # No third class.
        chromium.press("1")
        shown(chromium, "e00002")
        chromium.press("u")
        shown(chromium, "e00001")
        assert set(resolve(local)) == {"e00000"}
        chromium.press("s")
        shown(chromium, "e00002")
        # By mouse and by the keyboard's own way round too.
        chromium.run("document.querySelector('#answers button').click()")
        chromium.until("!document.querySelector('#empty').hidden")
        assert "you have answered or skipped them" in chromium.run("document.body.innerText")
        assert chromium.run(
            "[...document.querySelectorAll('#answers button, #skip, #undo')].every(b => b.tabIndex === 0)"
        )
        chromium.press("u")
        shown(chromium, "e00002")
        chromium.press("1")
        chromium.until("!document.querySelector('#empty').hidden")
        chromium.shoot(tmp_path / "empty.png")
        assert {name: one.label for name, one in resolve(local).items()} == {"e00000": "roadwork", "e00002": "none"}
        assert chromium.complaints() == []


def test_nothing_that_is_shown_is_run(tmp_path: Path, log: EventLog, chromium: Browser) -> None:
    chromium.events.clear()
    facts = BundleFacts(bundle="b" * 64, classes=("none", HOSTILE), positive=HOSTILE)
    fill(log, 1, facts, label=HOSTILE)
    store = Store(tmp_path / "loop.db")
    ingest(store, log)
    with serving(store, log) as page:
        chromium.open(page.url)
        shown(chromium, "e00000")
        assert chromium.run("document.title") == "Review" and chromium.run("document.images.length") == 1
        assert HOSTILE in chromium.run("document.body.innerText")
        # Were somebody to get markup in all the same, the policy stops it.
        chromium.run(f"document.querySelector('#note').innerHTML = {json.dumps(HOSTILE)}")
        time.sleep(0.3)
        assert chromium.run("document.title") == "Review"
        chromium.press("2")
        chromium.until("!document.querySelector('#empty').hidden")
    assert resolve(store)["e00000"].label == HOSTILE
    store.close()


@pytest.mark.parametrize("width", [320, 700, 1400])
def test_the_page_fits_and_is_accessible(
    width: int, local: Store, log: EventLog, chromium: Browser, tmp_path: Path
) -> None:
    with serving(local, log) as page:
        chromium.size(width, 700)
        chromium.open(page.url)
        shown(chromium, "e00000")
        chromium.shoot(tmp_path / f"{width}.png")
        assert chromium.run("document.documentElement.scrollWidth") <= width
        box = (
            "(r => [r.left, r.right, r.top, r.bottom, r.height])(document.querySelector('%s').getBoundingClientRect())"
        )
        for one in ("#answers button:first-child", "#answers button:last-child", "#photo"):
            left, right, top, bottom, height = chromium.run(box % one)
            assert left >= 0 and right <= width and top >= 0 and height >= 44, one
            assert bottom <= 700, f"{one} is below the fold"
        tree = chromium.call("Accessibility.getFullAXTree")["nodes"]
        names = {(n["role"]["value"], n["name"]["value"]) for n in tree if not n["ignored"] and n.get("name")}
        assert ("image", "the photo to judge") in names
        assert {name for role, name in names if role == "button"} == {
            "1 none", "2 roadwork", "S cannot tell", "U undo"
        }  # fmt: skip
        assert any(
            role in ("progressbar", "progress", "ProgressIndicator") and "finished" in name for role, name in names
        )
        assert chromium.run("document.documentElement.lang") == "en"
        chromium.run("document.querySelector('#answers button').focus()")
        chromium.press("Tab")
    chromium.size(1200, 800)


def test_a_server_that_is_gone_is_said(local: Store, log: EventLog, chromium: Browser) -> None:
    with serving(local, log) as page:
        chromium.open(page.url)
        shown(chromium, "e00000")
    chromium.press("1")
    assert chromium.until(
        "document.querySelector('#note.wrong') && document.querySelector('#note').textContent"
    ).startswith("The server does not answer")
    assert resolve(local) == {}


# --------------------------------------------------------------------------------------------
# The command


def test_the_command_serves_ingests_and_ends(tmp_path: Path, log: EventLog) -> None:
    now = time.time()
    log.describe(FACTS)
    log.append([make_event(0, time=now), make_event(1, time=now - 90 * 86400)])
    for index, at in ((0, now), (1, now - 90 * 86400)):
        log.images.put(sha256_bytes(photo(index)), photo(index), at)
    process = subprocess.Popen(
        [sys.executable, "-m", "stage1_pro.cli", "review", "--store", str(tmp_path), "--reviewer", "ada", "--json",
         "--no-browser"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    url = json.loads(process.stdout.readline())["url"]
    port, token = int(url.split(":")[2].split("/")[0]), url.split("token=")[1]

    class Page:
        pass

    page: Any = Page()
    page.port, page.session = port, ""
    page.session = ask(page, f"/?token={token}")[1]["Set-Cookie"].split(";")[0].split("=")[1]
    state = json.loads(ask(page, "/next", {})[2])
    assert state["item"]["event_id"] == "e00000"
    state = json.loads(ask(page, "/answer", {"event_id": "e00000", "label": "none"})[2])
    assert state["item"] is None
    # What is served meanwhile comes in when nothing is left.
    log.append([make_event(2, time=now)])
    log.images.put(sha256_bytes(photo(2)), photo(2), now)
    assert json.loads(ask(page, "/next", {})[2])["item"]["event_id"] == "e00002"
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    result = json.loads(out)
    assert result["purged"] == 1 and result["ingested"] == 2
    assert result["progress"]["answered_here"] == 1 and token in errors
    store = Store(tmp_path)
    assert [(one.event_id, one.annotator) for one in read_labels(store)] == [("e00000", "ada")]
    store.close()


def test_the_command_purges_and_refuses(tmp_path: Path, log: EventLog) -> None:
    with pytest.raises(InputError, match="log must .*--log"):
        review(str(tmp_path / "nowhere"))
    log.images.put(sha256_bytes(b"x"), b"x", time.time() - 31 * 86400)
    log.images.put(sha256_bytes(b"y"), b"y", time.time() - 29 * 86400)
    assert review(str(tmp_path), purge=True) == {"purged": 1}


def test_a_purge_under_a_clock_in_doubt_says_what_would_go(tmp_path: Path, log: EventLog) -> None:
    fill(log, 3)
    found = review(str(tmp_path), purge=True)
    assert (found["purged"], found["in_doubt"]) == (0, 3) and "3" in render(found) and "--yes" in render(found)
    assert all(sha256_bytes(photo(index)) in log.images for index in range(3))
    assert review(str(tmp_path), purge=True, yes=True) == {"purged": 3}


def test_two_who_have_the_address_do_not_both_get_in(local: Store, log: EventLog) -> None:
    with serving(local, log) as page, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: ask(page, f"/?token={page.token}", Cookie="")[0], range(16)))
    assert sorted(found) == [303, *[403] * 15]


def test_no_token_stands_in_a_process_list(tmp_path: Path, log: EventLog) -> None:
    """The browser, which here writes down what it is given, opens a file that only its user reads."""
    fill(log, 1, time=time.time())
    browser, seen = tmp_path / "browser", tmp_path / "seen.json"
    browser.write_text(
        f"#!{sys.executable}\nimport json, os, sys, time, urllib.parse\n"
        "path = urllib.parse.urlsplit(sys.argv[1]).path\n"
        "modes = [os.stat(p).st_mode & 0o777 for p in (path, os.path.dirname(path))]\n"
        f"open({str(tmp_path / 'part')!r}, 'w').write(json.dumps([sys.argv[1:], modes, open(path).read()]))\n"
        f"os.rename({str(tmp_path / 'part')!r}, {str(seen)!r})\ntime.sleep(60)\n"
    )
    browser.chmod(0o755)
    environment = {**os.environ, "BROWSER": f"{browser} %s", "DISPLAY": ":0", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "stage1_pro.cli", "review", "--store", str(tmp_path), "--json"], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        printed = json.loads(process.stdout.readline())["url"]
        end = time.monotonic() + 60
        while not seen.exists() and time.monotonic() < end:
            time.sleep(0.05)
        arguments, modes, text = json.loads(seen.read_text())
        address = text.split("url=")[1].split('"')[0]
        assert "token=" not in str(arguments) and modes == [0o600, 0o700]
        assert address.split("token=")[0] == printed.split("token=")[0] and address != printed
        page: Any = type("Page", (), {"port": int(printed.split(":")[2].split("/")[0]), "session": ""})
        # A browser that does not end holds up nobody; each address opens the page once.
        for url in (address, printed):
            path = "/" + url.split("/", 3)[3]
            assert [ask(page, path)[0] for _ in range(2)] == [303, 403]
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    assert not list(tmp_path.glob("stage1-review-*"))


def test_a_database_that_is_gone_acknowledges_nothing(tmp_path: Path, log: EventLog, store_url: str) -> None:
    fill(log, 2)
    store = Store(store_url)
    ingest(store, log, double_share=0.0)
    with serving(store, log) as page:
        assert ask(page, "/next", {})[0] == 200
        lost = store.engine.url
        broken = "sqlite:////nowhere/at/all.db" if store.is_sqlite else lost.set(query={"host": str(tmp_path)})
        whole, store.engine = store.engine, create_engine(broken)
        for what in ("answer", "skip", "undo", "next"):
            status, _, body = ask(page, f"/{what}", {"event_id": "e00000", "label": "none"})
            assert status == 503 and "try again" in json.loads(body)["error"]
        assert ask(page, "/image?event=e00000")[0] == 503
        store.engine = whole
        assert resolve(store) == {}
        assert ask(page, "/answer", {"event_id": "e00000", "label": "none"})[0] == 200
        assert resolve(store)["e00000"].label == "none"
    store.close()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_photos_for_review_are_their_owners_alone(tmp_path: Path, umask: int) -> None:
    (tmp_path / "log" / "images").mkdir(parents=True, mode=0o755)  # as older versions made it
    before = os.umask(umask)
    try:
        images = EventLog(tmp_path / "log").images
        images.put("a" * 64, b"photo", 5.0)
    finally:
        os.umask(before)
    modes = [
        path.stat().st_mode & 0o777 for path in (images.folder, images.folder / "aa", images.folder / "aa" / ("a" * 64))
    ]
    assert modes == [0o700, 0o700, 0o600]
    assert (tmp_path / "log" / "log.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_the_redirecting_file_opens_the_page_in_a_browser(
    local: Store, log: EventLog, chromium: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: queue_module.Queue[str] = queue_module.Queue()
    monkeypatch.setattr(webbrowser, "open", addresses.put)
    with serving(local, log) as page, opened(page):
        chromium.open(addresses.get(timeout=10))
        shown(chromium, "e00000")
        assert chromium.run("location.href") == f"http://127.0.0.1:{page.port}/"
