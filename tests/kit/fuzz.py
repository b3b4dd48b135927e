"""Mutate what people and strangers hand in, and see that each is read or refused in one line: nothing else may happen.

    python -m tests.kit.fuzz yaml --cases 10000 --seed 0
    python -m tests.kit.fuzz all --cases 10000        # images: a fifth of it, bundles: ten times

Kinds: images, yaml (configuration, overrides, recipe, miner, loop), csv (labels, lists, predictions, labels of a
loop), npz (predictions, logits, references), labels (Label Studio's JSON) and bundles (``fuzz_bundles.py``). Case i of
a seed is always the same. Seeds are valid, and mutated by their grammar: values, structure, depth, encodings.

A finding is an exception that is none of ours, a message that a terminal obeys, more than 10 s of CPU, more than 1 GiB
of memory, or no end; workers are processes of their own, so a crash is seen as one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kit import fuzz_bundles
from kit.fuzz_binary import Images, Npz
from kit.fuzz_texts import Csv, Labels, Yaml
from stage1_pro.errors import Stage1Error

MEGABYTES = 1024
LIMIT = 8 * 2**30  # so that a finding does not take the machine
CASES = {"images": 0.2, "yaml": 1, "csv": 1, "npz": 1, "labels": 1, "bundles": 10}


KINDS = {"yaml": Yaml, "csv": Csv, "npz": Npz, "labels": Labels, "images": Images}


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def peak():
    """Megabytes that this process had at most since they were forgotten."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) // 1024


def judge(door, what):
    """(outcome, detail) of reading one case."""
    try:
        door.read(what)
    except Stage1Error as error:
        text = str(error)
        fit = text and len(text) < 3000 and text.isprintable()
        return ("refused", text) if fit else ("bad message", repr(text[:800]))
    except BaseException:  # noqa: BLE001 - that is what is looked for
        return "other exception", traceback.format_exc()[-3000:]
    return "loaded", ""


def work(kind, seed, start, stop, step, scratch):
    """Judge cases start, start + step, …; one line before and one after each, so that a crash has a number."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module=r"PIL\b")
    folder = Path(tempfile.mkdtemp(dir=scratch))
    os.chdir(folder)
    door, parent = KINDS[kind](folder), os.getppid()
    for index in range(start, stop, step):
        if os.getppid() != parent:
            break  # nobody reads what would be found
        print(f"> {index}", flush=True)
        what, kinds = door.make(random.Random(f"{seed}/{index}"))
        forget_peak()
        began = time.process_time()
        outcome, detail = judge(door, what)
        seconds, megabytes = time.process_time() - began, peak()
        if outcome in ("refused", "loaded") and seconds > fuzz_bundles.SECONDS:
            outcome, detail = "slow", f"{seconds:.1f} s: {detail}"
        if outcome in ("refused", "loaded") and megabytes > MEGABYTES:
            outcome, detail = "memory", f"{megabytes} MB: {detail}"
        if outcome not in ("refused", "loaded"):
            keep = Path(os.environ.get("STAGE1_FUZZ_KEEP", folder)) / f"{kind}-{seed}-{index}"
            shutil.copy(door.path, keep)
            detail = f"{what}\n{detail}"
        print("= " + json.dumps([index, outcome, kinds, False, detail, round(seconds, 2), megabytes]), flush=True)
    shutil.rmtree(folder)


def start_worker(options, start, scratch):
    numbers = map(str, (start, options.n, options.workers))
    command = [sys.executable, __file__, options.kind, "--seed", str(options.seed), "--work", *numbers, scratch]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True, bufsize=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*CASES, "all"])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON of what came of them")
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        start, stop, step, scratch = options.work
        work(options.kind, options.seed, int(start), int(stop), int(step), scratch)
        return 0
    code, out = 0, options.out
    for kind in CASES if options.kind == "all" else [options.kind]:
        options.kind, options.n = (
            kind,
            round(options.cases * (CASES[kind] if len(sys.argv) > 1 and sys.argv[1] == "all" else 1)),
        )
        options.out = out if out is None or kind == sys.argv[1] else out.with_stem(f"{out.stem}-{kind}")
        print(f"\n{kind}")
        found = fuzz_bundles.run(options, None if kind == "bundles" else start_worker)
        code |= fuzz_bundles.report(options, *found)
    return code


if __name__ == "__main__":
    sys.exit(main())
