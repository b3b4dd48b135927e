"""Killed is normal: after `kill -9` at any durable step, the same command finishes, and nothing is left lying about."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults import faults, leftovers

from stage1_pro.continual.loop.folder import opened
from stage1_pro.continual.serving.live import POINTER
from stage1_pro.files import sweep


@pytest.mark.slow
def test_init_finishes_what_it_began(tiny: Path, tmp_path: Path) -> None:
    root = tmp_path / "loop"
    words = ("continual", "init", "--root", root, "--run", tiny, "--alpha", ".1")
    with faults("stage1_pro.continual.loop.folder") as children:
        late = 0
        for number, ended in children.each(words):
            if ended.rc == -9:
                again = children.run(words)
                # Only the last fsync and its tidying come after all that a loop needs.
                done = again.rc == 2 and "stage1 continual status" in again.err and (root / POINTER).is_file()
                assert again.rc == 0 or done, (number, ended.steps[-1], again.err)
                late += done
            assert leftovers(root) == []
            with opened(root) as (_, registry, _parts, loop):
                assert loop.resume().state == "MONITOR" and registry.alias("champion").version == 1
            assert children.run(words).rc == 2, "a loop that has begun begins once"
            shutil.rmtree(root)
        assert ended.rc == 0 and late <= 2
        assert {"commit", "os.fsync"} < set(ended.steps) and any(POINTER in one for one in ended.steps)


def test_a_sweep_takes_what_the_dead_left_and_not_what_the_living_write(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from stage1_pro.files import atomic_directory, atomic_path\n"
        "root = Path(sys.argv[1])\n"
        "with atomic_path(root / 'file'), atomic_directory(root / 'folder'):\n"
        "    print('writes', flush=True); sys.stdin.readline(); os.kill(os.getpid(), 9) if sys.argv[2] else None\n"
    )
    for dies in ("", "yes"):
        with subprocess.Popen(
            [sys.executable, "-c", code, tmp_path, dies], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "writes\n"
            sweep(tmp_path)
            assert len(leftovers(tmp_path)) == 2
            writer.communicate("\n")
        assert writer.returncode == (-9 if dies else 0) and len(leftovers(tmp_path)) == (2 if dies else 0)
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    # The only copy of a folder that was moved aside stays for `recover_directory`.
    (tmp_path / ".gone.x.old" / "gone").mkdir(parents=True)
    sweep(tmp_path)
    assert (tmp_path / ".gone.x.old" / "gone").is_dir()
