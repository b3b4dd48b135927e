"""Work and parts of a small loop for tests: real bundles, vault and gate; proposals are numbers."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stage1_pro.continual.learn.rewards import Actions, RewardSpec, verified
from stage1_pro.continual.ledger import audit
from stage1_pro.continual.ledger.guard import GuardVault
from stage1_pro.continual.loop.executors import Work
from stage1_pro.continual.loop.machine import Compared, Job, Round, Watched
from stage1_pro.continual.loop.promotion import Anchor, Side, Terms, Verdict, evaluate
from stage1_pro.continual.loop.registry import Alias, Registry
from stage1_pro.continual.serving.live import POINTER, Pointer
from stage1_pro.continual.watch.monitor import Evidence
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.files import sha256_file
from stage1_pro.record import FileEntry

CLASSES = ("none", "roadwork")
N = 400


def read_pointer(root: Path) -> Pointer:
    """What serves, as serving reads it."""
    return Pointer.read(root / POINTER)


def propose(inputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Weights of a seed, and what they earn."""
    weights = np.random.default_rng([inputs["seed"], len(inputs["snapshot"]["rows"])]).normal(size=8)
    (folder / "weights.json").write_text(json.dumps(weights.tolist()))
    return {"reward": float(weights.sum())}


def recalibrate(inputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The template's bundle with another threshold."""
    path = Path(shutil.copytree(inputs["template"], folder / "bundle"))
    policy = json.loads((path / "thresholds.json").read_text())
    (path / "thresholds.json").write_text(json.dumps({**policy, "exit_threshold": inputs["threshold"]}))
    manifest = json.loads((path / "bundle.json").read_text())
    entry = FileEntry(sha256=sha256_file(path / "thresholds.json"), size=(path / "thresholds.json").stat().st_size)
    manifest["files"]["thresholds.json"] = entry.model_dump()
    (path / "bundle.json").write_text(json.dumps(manifest))
    return {"bundle": "bundle"}


def sleep(inputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Say that it began, wait, and say who did it."""
    with (folder.parent / "began").open("a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(inputs["seconds"])
    (folder / "done").write_text("done")
    return {"rank": os.environ.get("RANK"), "size": os.environ.get("WORLD_SIZE")}


def refuse(inputs: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """An error of a person's making, or of the program's."""
    if inputs["kind"] == "input":
        raise InputError("rows must be 1 or more, got 0")
    raise ZeroDivisionError("a bug")


def promote(registry: Registry, bundle: str, *, expected: int, now: float, by: str) -> Pointer:
    """Make a bundle the champion, with a row in the audit, if it is still at version ``expected``; serving follows."""
    with registry.store.write() as connection:
        alias = registry.move(connection, "champion", bundle, expected=expected, now=now, by=by)
        audit.append(connection, registry.store, "champion", alias.model_dump(), now)
    return registry.sync()


class Parts:
    """A candidate that is better, the same, or wrong where it differs from the champion once it is tried."""

    def __init__(self, registry: Registry, template: Path, *, better: bool = True, harmful: bool = False) -> None:
        self.registry, self.template = registry, template
        self.better, self.harmful = better, harmful
        self.vault = GuardVault(registry.store)
        self.truth = np.random.default_rng(0).integers(0, 2, N)

    def open_guard(self) -> None:
        """Begin the guard's one epoch."""
        rows = [str(row) for row in range(N)]
        self.vault.open("one", rows, rows, now=0.0)
        self.vault.label("one", {row: CLASSES[self.truth[int(row)]] for row in rows}, "owner")

    def watch(self, memory: Mapping[str, Any], champion: Alias, *, now: float, manual: bool) -> Watched:
        """Ask when a person does, and tighten meanwhile."""
        return Watched(manual, ["manual"] if manual else [], {"looks": 1}, 0.9, {"champion": champion.bundle})

    def collect(self, work: Round) -> Mapping[str, Any]:
        """Fixed rows."""
        return {"rows": list(range(20))}

    def proposals(self, work: Round) -> Sequence[Job]:
        """Three seeds."""
        return [Job("kit.loop_parts:propose", {"seed": seed, "snapshot": work.snapshot}) for seed in range(3)]

    def select(self, work: Round, done: Sequence[Work]) -> str:
        """The one that earns most."""
        best = max(done, key=lambda one: one.result["reward"])
        if best.result["reward"] < -100:
            raise NotReachableError("no proposal earns more than the champion")
        return best.key

    def recalibration(self, work: Round, chosen: Work) -> Job:
        """Another bundle of the same graphs."""
        inputs = {"template": str(self.template), "threshold": 0.95, "chosen": chosen.key}
        return Job("kit.loop_parts:recalibrate", inputs)

    def evaluate(self, work: Round) -> Verdict:
        """The real gate on a real vault."""
        old, new = self.truth.copy(), self.truth.copy()
        old[:40] = 1 - old[:40]
        new[(0 if not self.better else 30) : 40] = 1 - new[(0 if not self.better else 30) : 40]
        flat = np.zeros(N, dtype=bool)
        anchor = np.tile([0, 1], 300)
        same = Actions(anchor, np.zeros(600, dtype=bool))
        held = Anchor(verified(anchor, "owner", classes=CLASSES, positive="roadwork"), np.arange(600).astype(str))
        return evaluate(
            self.vault, "one", Side(work.champion, Actions(old, flat), same),
            Side(work.candidate or "", Actions(new, flat), same), held, spec=RewardSpec(), now=work.entered,
            terms=Terms(require_certificate=False, n_replicates=1000),
        )  # fmt: skip

    def compare(self, work: Round, *, delta: float) -> Compared:
        """Harm shows where the candidate is the canary."""
        evidence = Evidence(alpha=0.5, delta=delta, floor=1.0)
        trying = self.registry.alias("canary").bundle is not None
        if self.harmful and trying:
            evidence = evidence.after(np.ones(40), propensity=np.ones(40), time=np.full(40, work.entered))
        return Compared(1000, 40, evidence)
