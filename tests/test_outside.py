"""Nothing reaches out: no command turns to another machine or writes outside the folders that it was given."""

from __future__ import annotations

import getpass
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_old_files import unpack

from stage1_pro.commands import COMMANDS

# Every command once, in an order in which each finds what it needs. (minutes), (until stopped).
WORDS = """
doctor
help concepts
plan --policy gate --alpha .05 --min-coverage .5 --n 400
split --labels photos/labels.csv --out out/fresh
metrics predictions.csv --out out/figures --replicates 200
calibrate --run run --guarantee none --fnr .5
evaluate --run run --replicates 100
certify --run run --images photos/unlabelled --rows-independent --exit-error .3 --labels seen.csv  # or refused
infer --run run photos/new
export --run run --overwrite
predict --bundle run/bundle photos/new --out out/answers.csv
verify run/bundle
inspect run/bundle
keys new out/maker.key
keys trust out/maker.key.pub
sign run/bundle --key out/maker.key
migrate old/bundle --out out/migrated  # or refused
build --bundle run/bundle --out out/here  # engines
bench cascade --bundle run/bundle --batch 1 --rates 0 1 --rounds 1
bench latency --bundle run/bundle --quick --out out/before  # minutes
bench compare out/before/latency.json out/before/latency.json  # minutes
continual plan --alpha .05
continual init --root out/loop --run run --alpha .1
predict --bundle run/bundle photos/new --log out/loop/log
continual ingest --root out/loop
continual status --root out/loop --page out/status.html
continual labels --root out/loop --export out/labels.csv
continual run --root out/loop
continual propose --root out/loop  # or refused
continual evaluate --root out/loop  # or refused
continual promote --root out/loop  # or refused
continual rollback --root out/loop  # or refused
continual audit --root out/loop
continual compact --root out/loop
continual review --root out/loop --no-browser  # until stopped
review --store out/loop/loop.db --log out/loop/log --no-browser  # until stopped
streetvision answer --settings miner.yaml photos/new/a.png
streetvision tune --run run
streetvision launch --repo out/nothing  # refused
train --run out/fresh --set train.epochs=1 --set train.workers=0 --set train.mode=lora  # minutes
merge --adapter out/fresh/adapter --base tiny --out out/backbone  # minutes
explora --images photos/unlabelled --run run --base tiny --config adapt.yaml  # minutes
compare --config full.yaml linear.yaml --data photos/labels.csv --out out/study --seeds 1  # minutes
continual simulate --data photos --out out/simulated --days 2 --shift-day 1  # refused, minutes
"""
LINES = [line.partition("  # ")[::2] for line in WORDS.strip().splitlines()]


def name_of(words: str) -> str:
    """The command's name at the beginning of its words."""
    return max((name for name in COMMANDS if f"{words} ".startswith(f"{name} ")), key=len)


def test_every_command_is_tried():
    """But the demo, which is a few of them one after the other."""
    assert {name_of(words) for words, _ in LINES} == set(COMMANDS) - {"demo"}


@pytest.fixture(scope="module")
def place(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands speak of, an empty home and an empty folder for temporary files."""
    if not sys.platform.startswith("linux") or shutil.which("cc") is None:
        pytest.skip("listening needs Linux and a C compiler")
    root = tmp_path_factory.mktemp("outside")
    shutil.copytree(world, root / "here")
    here = root / "here"
    (here / "out").mkdir()
    unpack(here / "old")
    (here / "seen.csv").write_text("file,label\n0.png,0\n1.png,1\n")
    (here / "miner.yaml").write_text("bundle: run/bundle\nlog: out/served\n")
    for mode in ("full", "linear"):
        (here / f"{mode}.yaml").write_text(f"train: {{mode: {mode}, epochs: 1, workers: 0}}\n")
    (here / "adapt.yaml").write_text("explora: {epochs: 1, decoder_warmup_epochs: 0, train: full}\n")
    for name in ("home", "tmp", "config"):
        (root / name).mkdir()
    source = Path(__file__).parent / "no_network.c"
    subprocess.run(["cc", "-shared", "-fPIC", str(source), "-o", str(root / "listen.so"), "-ldl"], check=True)
    return root


def files(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in folder.rglob("*"))


def run(place: Path, words: str, how: str) -> None:
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "PYTHONPATH", "VIRTUAL_ENV")}
    told = place / "told"
    environment = {
        **kept, "HOME": str(place / "home"), "TMPDIR": str(place / "tmp"), "STAGE1_CONFIG": str(place / "config"),
        "LD_PRELOAD": str(place / "listen.so"), "STAGE1_OUTSIDE": str(told), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    here = place / "here"
    before = {name for name in files(here) if not name.startswith(("run", "out"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "stage1_pro.cli", *words.split()], cwd=here, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if "until stopped" in how:
        time.sleep(6)
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=300)
    wanted = {2, 3, 4, 5} if "refused" in how else {143} if "until stopped" in how else {0}
    wanted |= {0} if "or refused" in how or "until stopped" in how else set()
    assert process.returncode in wanted, f"{words}: {errors}"
    assert not told.exists(), f"{words}: {told.read_text()}"
    assert not list(files(place / "home")), f"{words} wrote into the home"
    # PyTorch makes an empty folder there as it is loaded.
    assert not [name for name in files(place / "tmp") if name != f"torchinductor_{getpass.getuser()}"], words
    after = {name for name in files(here) if not name.startswith(("run", "out"))}
    assert after == before, f"{words} wrote beside what it was given"


@pytest.mark.slow
def test_no_command_reaches_out(place: Path) -> None:
    for words, how in LINES:
        if "minutes" not in how and ("engines" not in how or importlib.util.find_spec("tensorrt_rtx")):
            run(place, words, how)


@pytest.mark.slow
def test_no_training_reaches_out(place: Path) -> None:
    for words, how in LINES:
        if "minutes" in how or words.startswith("split"):
            run(place, words, how)
