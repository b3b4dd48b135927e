"""Random sequences of what people do: wherever a promise is shown, the policy file of what is deployed holds it."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="bundles are exported with [train]")
pytest.importorskip("sqlalchemy", reason="the loop needs [continual]")

from kit.claims import CLAIMS, OF_EXITS, WAS
from kit.loop_parts import promote
from kit.tiny import copy_run, untrained_run

from stage1_pro import cli
from stage1_pro.continual.loop.folder import opened
from stage1_pro.continual.serving.events import EventLog, ReviewPlan
from stage1_pro.continual.serving.live import LiveCascade
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits
from stage1_pro.deploy.bundle import load_bundle
from stage1_pro.integrations.streetvision import Settings, StreetVision
from stage1_pro.policies.policy import Policy, policy_files, read_policy
from stage1_pro.training.inference import save_calibration

SURE = re.compile(r"With probability at least")
ALPHA = 0.3
# What is asked for; those with small limits cannot be certified with so few groups.
FEASIBLE = {
    "softmax": ["--policy", "softmax", "--target-fnr", ".4"],
    "gate": ["--policy", "gate", "--alpha", str(ALPHA), "--min-coverage", ".2"],
    "scrc": ["--policy", "scrc", "--alpha", ".35", "--min-coverage", ".2"],
    "scrc I": ["--policy", "scrc", "--alpha", ".35", "--min-coverage", ".2", "--variant", "I"],
    "scrc class": ["--policy", "scrc", "--alpha", ".6", "--min-coverage", ".2", "--cells", "class"],
}
INFEASIBLE = {
    "softmax": ["--policy", "softmax", "--target-fnr", ".001"],
    "gate": ["--policy", "gate", "--alpha", ".001", "--min-coverage", ".5"],
    "scrc": ["--policy", "scrc", "--alpha", ".001", "--min-coverage", ".5"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model that knows nothing, whose stored answers on val_calib are mostly right and know where not."""
    folder = tmp_path_factory.mktemp("sequences")
    run = folder / "run"
    fractions = {"train": 0.2, "val_select": 0.1, "val_calib": 0.6, "val_test": 0.1}
    known = untrained_run(run, run / "pool", fractions, 48)
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.5, 4, known.labels.size).astype(np.float32)
    right = rng.random(known.labels.size) < 1 / (1 + np.exp(-2 * sure))
    side = np.where(right, 1, -1) * (2 * known.labels - 1)
    logits = np.stack([-side * sure, side * sure], axis=1).astype(np.float32)
    answers = {**vars(known), "logits_a": logits, "logits_b": logits, "gate_logits": sure}
    save_calibration(run, Predictions(**answers))
    return run


class Story:
    """One sequence on a copy of the run: what was done, and what of it was shown."""

    def __init__(self, run: Path, folder: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
        self.run, self.root, self.folder = copy_run(run, folder / "run"), folder / "loop", folder
        self.draw, self.capsys, self.done = random.Random(seed), capsys, [f"seed {seed}"]
        splits = Splits.read(self.run / "splits.json")
        self.photos = [splits.path(row) for row in splits.of("val_test")][:4]
        self.bundle: Path | None = None
        self.number = 0

    # -------------------------------------------------------------------- what is shown

    def stage1(self, *words: object, codes: tuple[int, ...] = (0,)) -> tuple[int, str, Any]:
        """Exit code, text and record of a command."""
        self.capsys.readouterr()
        asked = [str(word) for word in words]
        as_json = self.draw.random() < 0.5
        self.done.append(" ".join(asked[:6]))
        code = cli.main([*asked, *(["--json"] if as_json else [])])
        out, err = self.capsys.readouterr()
        assert code in codes, (self.done, err)
        return code, out + err, json.loads(out) if as_json and code in (0, 7) else None

    def hold(
        self, policy: Policy | None, text: str, record: Any = None, *, exits_only: bool = False,
        exported: Policy | None = None,
    ) -> None:  # fmt: skip
        """What is shown, as text or record, is what a policy file holds; of what was promised, the ``exported`` one."""
        promises = () if policy is None else policy.promises
        plain = " ".join(html.unescape(re.sub(r"data:image/png;base64,[^\"]*", "", text)).split())
        if not promises:
            assert not (found := CLAIMS.search(plain)), (
                self.done,
                found and plain[max(0, found.start() - 200) :][:500],
            )
        was = [] if exported is None else [one for one in exported.promises if one.quantity == "exit error"]
        assert not exits_only or was or not WAS.search(plain), (self.done, plain)
        # Audits are of photos: they test no promise of groups that have several.
        certificate = ({} if policy is None else policy.model_dump()).get("certificate") or {}
        of_exits = certificate.get("unit") in ("rows", "photos") and any(
            one.quantity == "exit error" and one.limit == ALPHA for one in promises
        )
        if exits_only and not of_exits:
            assert not (found := OF_EXITS.search(plain)), (
                self.done,
                found and plain[max(0, found.start() - 200) :][:500],
            )
        for found in SURE.finditer(plain) if policy is not None and promises else ():
            own = SURE.search(policy.statement)
            assert own and plain[found.start() :][:200] == policy.statement[own.start() :][:200], (self.done, plain)
        for one in _records(record):
            if "guarantee" in one and "statement" in one:
                if policy is None:
                    assert one["guarantee"] in (None, "none"), (self.done, one)
                else:
                    assert (one["guarantee"], one["statement"]) == (policy.guarantee, policy.statement), (
                        self.done,
                        one,
                    )
            if one.get("outcome") in ("PASS", "FAIL", "INCONCLUSIVE") and "limit" in one:
                assert promises, (self.done, one)
                limit = one["limit"]
                near = [x for p in promises for x in (p.limit, 1 - p.limit) if x == pytest.approx(limit)]
                assert near, (self.done, one, promises)
            if "audit_rate" in one and "promises" in one:
                assert bool(one["promises"]) == bool(promises), (self.done, one["promises"])
            if one.get("limit") == "promised":
                assert of_exits, (self.done, one)

    # -------------------------------------------------------------------- what is done

    def calibrate(self) -> None:
        """A wish, certified or not; what is refused changes nothing."""
        none, wishes = self.draw.random() < 0.35, self.draw.choice([FEASIBLE, FEASIBLE, INFEASIBLE])
        words = list(wishes[self.draw.choice(list(wishes))])
        if none:
            words = [word for word in words if word not in ("--variant", "I")] + ["--guarantee", "none"]
        else:
            words += ["--delta", ".4", "--claims", "4"]
        counts_decide = wishes is INFEASIBLE
        before = self.files(claims=counts_decide)
        code, text, record = self.stage1("calibrate", "--run", self.run, *words, codes=(0, 2, 3))
        if code:
            assert self.files(claims=counts_decide) == before, self.done
            self.hold(None, text)
        else:
            policy = read_policy(self.run)
            assert policy is not None and (policy.guarantee == "none") == none, self.done
            self.hold(policy, text, record)

    def files(self, *, claims: bool) -> dict[str, bytes]:
        """Policy files of the run, and the claims: where no error at all could decide otherwise, none is spent."""
        names = [*policy_files(), *(["claims.json"] if claims else [])]
        return {name: (self.run / name).read_bytes() for name in names if (self.run / name).is_file()}

    def evaluate(self) -> None:
        """On val_test, with its report."""
        _, text, record = self.stage1("evaluate", "--run", self.run, "--replicates", "5", codes=(0, 7))
        policy = read_policy(self.run)
        self.hold(policy, text, record)
        self.hold(policy, (self.run / "report.html").read_text())

    def deploy(self) -> None:
        """Export what stands, and show it; it is promoted where a loop has begun, which it begins otherwise."""
        policy = read_policy(self.run)
        if policy is None:
            return
        self.stage1("export", "--run", self.run, "--overwrite") if (self.run / "bundle").exists() else self.stage1(
            "export", "--run", self.run
        )
        self.number += 1
        self.bundle = Path(shutil.copytree(self.run / "bundle", self.folder / f"bundle{self.number}"))
        assert load_bundle(self.bundle).policy == policy
        if not self.root.exists():
            self.stage1("continual", "init", "--root", self.root, "--run", self.run, "--alpha", ALPHA)
        else:
            with opened(self.root) as (_, registry, _parts, _loop):
                version = registry.alias("champion").version
                promote(registry, registry.add(self.bundle), expected=version, now=time.time(), by="ada")

    def tighten(self, by: float | None = None) -> None:
        """The champion's threshold, as labels would."""
        if self.root.exists():
            with opened(self.root) as (_, registry, _parts, _loop):
                champion = registry.alias("champion").bundle
                assert champion is not None
                above = registry.load(champion).policy.exit_threshold
                above += self.draw.choice([-0.01, 0.001, 0.05]) if by is None else by
                with registry.store.write() as connection:
                    registry.tighten(connection, champion, above, now=time.time())
                registry.sync()
            self.done.append(f"tighten {above}")

    def show(self) -> None:
        """The bundle by commands: what it is, and its answers."""
        if self.bundle is None:
            return
        policy = load_bundle(self.bundle).policy
        for words in (["inspect", self.bundle], ["predict", "--bundle", self.bundle, *self.photos]):
            _, text, record = self.stage1(*words)
            self.hold(policy, text, record)

    def serve(self) -> None:
        """The loop's champion, followed and mined: it is what the pointer says, and no more is said of it."""
        if not self.root.exists():
            return
        live = LiveCascade(self.root, threads=1, log=EventLog(self.root / "log"), plan=ReviewPlan(floor=1.0))
        live.predict(self.photos)
        miner = StreetVision(Settings.of({"loop": str(self.root)}))
        assert -1 <= miner.answer(self.photos[0].read_bytes()) <= 1
        policy, threshold = self.in_force()
        assert live.bundle.policy.exit_threshold == threshold, self.done
        assert bool(live.bundle.policy.promises) == (policy is not None and bool(policy.promises)), self.done
        self.hold(policy, "".join(self.capsys.readouterr()), {
            "guarantee": live.bundle.policy.guarantee, "statement": live.bundle.policy.statement
        })  # fmt: skip

    def in_force(self) -> tuple[Policy | None, float]:
        """The champion's policy and threshold by its raw files; above the policy file's threshold no policy holds."""
        pointer = json.loads((self.root / "champion.json").read_text())
        folder = self.root / "bundles" / pointer["champion"]
        (file,) = (folder / name for name in policy_files() if (folder / name).is_file())
        held = json.loads(file.read_text())
        own = next(held[name] for name in ("exit_threshold", "threshold", "t1") if name in held)
        threshold = own if pointer["threshold"] is None else max(own, pointer["threshold"])
        policy = read_policy(folder)
        assert policy is not None and (held["guarantee"] == "none") == (not policy.promises), self.done
        self.exported = policy
        return (policy if threshold == own else None), threshold

    def status(self) -> None:
        """The loop's record, page and metrics."""
        if not self.root.exists():
            return
        page, metrics = self.folder / "status.html", self.folder / "now.prom"
        words = ["continual", "status", "--root", self.root, "--page", page, "--metrics", metrics]
        _, text, record = self.stage1(*words)
        for shown in (text, page.read_text(), metrics.read_text()):
            policy, threshold = self.in_force()
            self.hold(policy, shown, record, exits_only=True, exported=None if policy else self.exported)
            moved = policy is None or json.loads((self.root / "champion.json").read_text())["threshold"] is not None
            for one in _records(record):
                if moved and "exit_risk" in one and "health" in one:
                    assert one["threshold"] == threshold, self.done

    def go(self, steps: int) -> None:
        """Begin with something that stands, then do anything."""
        self.calibrate()
        kinds: list[Callable[[], None]] = [
            self.calibrate, self.evaluate, self.deploy, self.deploy, self.tighten, self.show, self.serve, self.status,
        ]  # fmt: skip
        for _ in range(steps):
            self.draw.choice(kinds)()


def _records(value: Any) -> Iterator[dict[str, Any]]:
    """Every record within a record."""
    if isinstance(value, dict):
        yield value
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _records(one)


@pytest.mark.parametrize("seed", [1])
def test_a_short_story_shows_what_its_policy_file_holds(made, tmp_path, capsys, seed: int) -> None:
    Story(made, tmp_path, seed, capsys).go(6)


def test_a_tightened_champion_keeps_no_promise_wherever_it_is_shown(made, tmp_path, capsys) -> None:
    """Of clips with several photos, certified, deployed and tightened: what no draw of a story need reach."""
    story = Story(made, tmp_path, 0, capsys)
    story.stage1("calibrate", "--run", story.run, *FEASIBLE["gate"], "--delta", ".4")
    story.deploy()
    story.status()
    held = story.in_force()[0]
    assert held is not None and held.promises and held.model_dump()["certificate"]["unit"] == "groups"
    story.tighten(0.01)
    assert story.in_force()[0] is None
    story.status()
    story.serve()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 16))
def test_long_stories_show_what_their_policy_files_hold(made, tmp_path, capsys, seed: int) -> None:
    Story(made, tmp_path, seed, capsys).go(12)


def test_every_wish_of_the_stories_is_what_it_is_called(made, tmp_path, capsys) -> None:
    """Or the stories would never certify, or never refuse."""
    for number, (wishes, codes) in enumerate([(FEASIBLE, {0}), (INFEASIBLE, {2, 3})]):
        for name, words in wishes.items():
            story = Story(made, tmp_path / f"{number} {name}", 0, capsys)
            code, text, _ = story.stage1(
                "calibrate", "--run", story.run, *words, "--delta", ".4", "--claims", "4", codes=(0, 2, 3)
            )
            assert code in codes, text
