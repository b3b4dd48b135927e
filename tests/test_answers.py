"""predict and infer write as they go: ended at any moment they go on after what is written, to the same bytes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from kit.tiny import copy_run, make_images, make_policy, set_policy

pytest.importorskip("torch")

from stage1_pro.continual.serving.events import EventLog
from stage1_pro.data.splits import Splits
from stage1_pro.deploy.answers import COLUMNS, Answers, Filed
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.deploy.prediction import count, infer, predict
from stage1_pro.errors import ArtifactError, InputError, TemporaryError
from stage1_pro.files import sha256_file

NAMES = ["=sum(1).png", 'a"b,c.png', "line\nend.png", "return\rhere.png", "plain.png", "\udcff.png", "日本.png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine photos with names that a CSV must quote, one of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    for path, name in zip(make_images(folder, 9), [*NAMES, "x1.png", "x2.png"], strict=True):
        path.rename(folder / name)
    (folder / "x0.jpg").write_bytes(b"broken")
    return folder


@pytest.fixture(scope="module")
def cascade(tiny: Path) -> Cascade:
    return Cascade.load(tiny / "bundle", threads=1)


def ended(cascade: Cascade, photos: Path, out: Path, after: int, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """Answers that end once ``after`` batches are written and the next is answered."""
    append, done = Answers.append, 0

    def until(self: Answers, rows: Any) -> None:
        nonlocal done
        if done == after:
            raise KeyboardInterrupt
        append(self, rows)
        done += 1

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "append", until)
        with pytest.raises(KeyboardInterrupt):
            predict(cascade, [photos], out=out, batch_size=2, **more)


def test_cut_anywhere_answers_go_on_to_the_same_bytes_and_nothing_is_logged_twice(
    cascade: Cascade, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, failures = predict(cascade, [photos], out=tmp_path / "whole.csv", batch_size=2)
    assert failures == 1 and [path.name for path in tmp_path.iterdir()] == ["whole.csv"]
    with (tmp_path / "whole.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        read = list(csv.DictReader(file))
    assert sorted(row["file"].removeprefix("'") for row in read) == sorted(map(str, photos.iterdir()))
    assert list(Filed(tmp_path / "whole.csv", 10)) == whole
    out, log = tmp_path / "out.csv", tmp_path / "log"
    ended(cascade, photos, out, 3, monkeypatch, log=log)
    assert "6 of 10 answers are in" in capsys.readouterr().err
    left, about = (tmp_path / f"out.csv.{end}" for end in ("partial", "partial.json"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "log",
        "out.csv.partial",
        "out.csv.partial.json",
        "whole.csv",
    ]
    rows, said = left.read_bytes(), about.read_bytes()
    assert (tmp_path / "whole.csv").read_bytes().startswith(rows)
    kept = shutil.copytree(log, tmp_path / "kept")
    wanted = Counter(sha256_file(path) for path in photos.iterdir() if path.name != "x0.jpg")
    ends = [at for at in range(len(rows) + 1) if rows[at - 1 : at] == b"\n"]
    for cut in sorted({*range(0, len(rows), 23), *ends, *(at - 1 for at in ends), len(rows)}):
        left.write_bytes(rows[:cut])
        about.write_bytes(said)
        shutil.rmtree(log)
        shutil.copytree(kept, log)
        again, failures = predict(cascade, [photos], out=out, batch_size=2, log=log, resume=True)
        assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes(), cut
        assert (again, failures) == (whole, 1) and not left.exists() and not about.exists()
        assert Counter(event.image_sha256 for event in EventLog(log)) == wanted, cut
        out.unlink()


def test_what_was_renamed_is_whole(
    cascade: Cascade, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, unlink = tmp_path / "out.csv", Path.unlink

    def dies(self: Path, *, missing_ok: bool = False) -> None:
        if self.name == "out.csv.partial.json" and out.exists():
            raise KeyboardInterrupt
        unlink(self, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dies)
        with pytest.raises(KeyboardInterrupt):
            predict(cascade, [photos], out=out, batch_size=2)
    before = out.stat().st_mtime_ns
    rows, failures = predict(cascade, [photos], out=out, batch_size=2, resume=True)
    assert (len(rows), failures, out.stat().st_mtime_ns) == (10, 1, before)
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_other_work_is_not_gone_on_with(
    cascade: Cascade, photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.csv"
    ended(cascade, photos, out, 2, monkeypatch)
    kept = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = copy_run(tiny, tmp_path.with_name("other"))
    splits = Splits.read(other / "splits.json")
    set_policy(other / "bundle", make_policy(cascade_model(tiny), splits.hashes, 0.7))
    second = Cascade.load(other / "bundle", threads=1)
    threads = Cascade.load(tiny / "bundle", threads=2)
    with pytest.raises(InputError, match="--resume or .*--overwrite"):
        predict(cascade, [photos], out=out, batch_size=2)
    for what, words, more in (
        (second, "another bundle", {}),
        (threads, "threads 2 instead of 1", {}),
        (cascade, "batch_size 3 instead of 2", {"batch_size": 3}),
        (cascade, "log .*elsewhere instead of None", {"log": tmp_path.with_name("elsewhere")}),
        (cascade, "other photos", {"inputs": [photos / "plain.png"]}),
        (cascade, "choose one", {"overwrite": True}),
    ):
        given: dict[str, Any] = {"inputs": [photos], "batch_size": 2, **more}
        with pytest.raises(InputError, match=words):
            predict(what, out=out, resume=True, **given)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == kept
    assert not tmp_path.with_name("elsewhere").exists()
    left = tmp_path / "out.csv.partial"
    left.write_bytes(kept[left].replace(b"plain.png", b"other.png"))
    with pytest.raises(ArtifactError, match="was changed"):
        predict(cascade, [photos], out=out, batch_size=2, resume=True)
    predict(cascade, [photos], out=out, batch_size=3, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def cascade_model(run: Path) -> Any:
    from stage1_pro.training.checkpoint import load_run_model

    return load_run_model(run)[0]


def test_infer_goes_on_too(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    infer(tiny, split="train", out=tmp_path / "whole.csv", batch_size=1)
    append, done = Answers.append, []

    def until(self: Answers, rows: Any) -> None:
        if len(done) == 2:
            raise OSError(28, "No space left on device")
        append(self, rows)
        done.append(rows)

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "append", until)
        with pytest.raises(OSError, match="No space"):
            infer(tiny, split="train", out=tmp_path / "out.csv", batch_size=1)
    with pytest.raises(InputError, match="split val_test instead of train"):
        infer(tiny, split="val_test", out=tmp_path / "out.csv", batch_size=1, resume=True)
    infer(tiny, split="train", out=tmp_path / "out.csv", batch_size=1, resume=True)
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def command(tiny: Path, photos: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "stage1_pro.cli", "predict", "--bundle", str(tiny / "bundle"), str(photos),
            "--threads", "1", "--batch-size", "4", "--out", str(out), *more]  # fmt: skip


def test_the_same_names_elsewhere_are_other_photos(
    cascade: Cascade, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["plain.png", "x1.png", "x2.png", "日本.png"]
    for folder in ("a", "b"):
        shutil.copytree(photos, tmp_path / folder)
        (tmp_path / folder / "list.csv").write_text("file\n" + "".join(f"{name}\n" for name in names))
    out = tmp_path / "out.csv"
    ended(cascade, tmp_path / "a" / "list.csv", out, 1, monkeypatch)
    with pytest.raises(InputError, match="other photos"):
        predict(cascade, [tmp_path / "b" / "list.csv"], out=out, batch_size=2, resume=True)
    predict(cascade, [tmp_path / "a" / "list.csv"], out=out, batch_size=2, resume=True)
    assert len(out.read_text().splitlines()) == len(names) + 1


def test_resume_needs_a_file(tiny: Path, photos: Path) -> None:
    done = subprocess.run(
        [*command(tiny, photos, Path("x"))[:-2], "--resume"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "--out" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_answers_go_on(tiny: Path, photos: Path, tmp_path: Path, number: signal.Signals) -> None:
    many, out = tmp_path / "many", tmp_path / "out.csv"
    many.mkdir()
    for at in range(1500):
        (many / f"{at:05}.png").symlink_to(photos / "plain.png")
    (many / "00001.jpg").write_bytes(b"broken")
    assert subprocess.run(command(tiny, many, tmp_path / "whole.csv"), capture_output=True, check=False).returncode == 1
    left, before, more = tmp_path / "out.csv.partial", 0, list[str]()
    for _ in range(2):
        # Where the tests run in the background Ctrl-C is ignored, and children inherit that.
        child = subprocess.Popen(
            command(tiny, many, out, *more), stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,  # noqa: PLW1509
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not left.exists() or left.stat().st_size < before + 8000:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        child.send_signal(number)
        _, said = child.communicate()
        assert child.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number], said
        assert number == signal.SIGKILL or "answers are in" in said
        before, more = left.stat().st_size, ["--resume"]
    done = subprocess.run(command(tiny, many, out, "--resume", "--json"), capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert out.read_bytes() == (tmp_path / "whole.csv").read_bytes() and not left.exists()
    found = json.loads(done.stdout)
    assert len(found["rows"]) == 1501 and found["failures"] == found["unreadable"] == 1
    assert found["rows"] == json.loads(json.dumps(list(Filed(out, 1501)))) and set(COLUMNS) < set(found["rows"][0])
    assert count(found["rows"]) == {name: found[name] for name in count([])}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_photos(tiny: Path, photos: Path, tmp_path: Path) -> None:
    peaks = {}
    for n in (2000, 12_000):
        listed = tmp_path / f"{n}.csv"
        listed.write_text("file\n" + f"{photos / 'plain.png'}\n" * n)
        words = command(tiny, listed, tmp_path / "out.csv")
        words[words.index("--batch-size") + 1] = "32"
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as done:
            _, done.returncode, used = os.wait4(done.pid, 0)
        assert done.returncode == 0
        peaks[n] = used.ru_maxrss << 10
    assert peaks[12_000] - peaks[2000] < 500 * 10_000, peaks  # the list of names alone; rows took 1.2 KB each


def test_a_full_disk_leaves_what_was_written(
    cascade: Cascade, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    whole, _ = predict(cascade, [photos], out=tmp_path / "whole.csv", batch_size=2)
    size = (tmp_path / "whole.csv").stat().st_size
    before, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 100, before[1]))
        with pytest.raises(OSError, match="out.csv.partial") as caught:
            predict(cascade, [photos], out=tmp_path / "out.csv", batch_size=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)
    from stage1_pro.errors import explain

    assert isinstance(explain(caught.value), TemporaryError) and "8 of 10 answers" in capsys.readouterr().err
    assert predict(cascade, [photos], out=tmp_path / "out.csv", batch_size=2, resume=True)[0] == whole
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
