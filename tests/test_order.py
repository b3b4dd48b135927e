"""The order of thresholds comes from val_select and the certificate from all of val_calib, where a run has both."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import logit
from test_certify import BINARY, files_of, make_run

from stage1_pro.commands.calibrate import Calibrate, calibrate
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits, hash_splits
from stage1_pro.errors import ArtifactError, InputError, NotReachableError
from stage1_pro.policies.claims import Claims
from stage1_pro.policies.policy import Policy
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.sets import ScrcParams
from stage1_pro.policies.target import POLICIES, Gate, Scrc, Softmax
from stage1_pro.training.calibration import calibrate as calibrate_run

WISHES: list[dict[str, Any]] = [
    {"policy": "gate", "max_exit_error": 0.03},
    {"policy": "softmax", "target_fnr": 0.08},
    {"policy": "scrc", "alpha": 0.05},
]


def run_of(run: Path, n: int = 6000, select: int = 3000) -> tuple[Splits, Predictions, Predictions]:
    """A run whose last rows are those of val_select."""
    whole = make_run(run, n + select)
    splits = Splits.read(run / "splits.json")
    rows = [
        row if i < n else row.model_copy(update={"split": "val_select", "half": None})
        for i, row in enumerate(splits.rows)
    ]
    splits = splits.model_copy(update={"rows": rows, "hashes": hash_splits(rows)})
    splits.write(run / "splits.json")
    fields = ("row_ids", "groups", "sources", "halves", "logits_a", "logits_b", "gate_logits", "labels")
    found = []
    for split, cut in (("val_calib", slice(n)), ("val_select", slice(n, None))):
        part = {name: getattr(whole, name)[cut] for name in fields}
        if split == "val_select":
            part["halves"] = np.full(select, "")
        found.append(replace(whole, **part, split=split, split_hash=splits.hashes[split]))
        found[-1].save(run / f"{split}.npz")
    return splits, found[0], found[1]


@pytest.mark.parametrize("wish", WISHES)
def test_all_of_val_calib_certifies_in_the_order_of_val_select(tmp_path: Path, wish: dict[str, Any]) -> None:
    splits, calib, select = run_of(tmp_path)
    policy = calibrate(tmp_path, **wish)
    assert policy.n_certified == calib.labels.size == len(splits.of("val_calib"))
    if wish["policy"] != "softmax":
        assert policy.n_fit_rows == select.labels.size
    said = " ".join(policy.assumptions if wish["policy"] == "scrc" else policy.certificate.assumptions)
    assert "3000 photos of val_select, which share no photo and no group with the 6000 of val_calib" in said
    claims = Claims.of(tmp_path)
    assert list(claims.halves) == [splits.hashes["val_calib"]]
    assert len(claims.rows[splits.hashes["val_calib"]]) == 6000
    # The very same again is no new claim; another one is refused.
    assert calibrate(tmp_path, **wish) == policy
    other = {**wish, next(iter(wish.keys() - {"policy"})): 0.4}
    before = files_of(tmp_path)
    with pytest.raises(InputError, match="claim"):
        calibrate(tmp_path, **other)
    assert files_of(tmp_path) == before


def test_more_is_certified_than_by_halves(tmp_path: Path) -> None:
    """With as many photos that certify as halves would have the same wish is out of their reach."""
    (tmp_path / "all").mkdir()
    (tmp_path / "halves").mkdir()
    wish = {"policy": "gate", "max_exit_error": 0.015, "min_coverage": 0.5}
    run_of(tmp_path / "all", 1500, 700)
    run_of(tmp_path / "halves", 1500, 700)
    (tmp_path / "halves" / "val_select.npz").unlink()
    assert calibrate(tmp_path / "all", **wish).certificate.n == 1500
    with pytest.raises(NotReachableError, match="INFEASIBLE"):
        calibrate(tmp_path / "halves", **wish)


def test_the_order_is_of_val_select_alone(tmp_path: Path) -> None:
    firsts = set()
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        _, calib, _ = run_of(tmp_path / str(number))
        if number:  # other answers on val_calib, and other scores there
            rng = np.random.default_rng(number)
            gate = calib.gate_logits + rng.normal(0, 0.3, calib.gate_logits.size).astype(np.float32)
            replace(calib, gate_logits=gate).save(tmp_path / str(number) / "val_calib.npz")
        firsts.add(calibrate(tmp_path / str(number), policy="gate", max_exit_error=0.05).certificate.first_candidate)
    assert len(firsts) == 1


def test_a_val_select_of_something_else_is_refused(tmp_path: Path) -> None:
    _, _, select = run_of(tmp_path)
    for changed in (
        replace(select, model_fingerprint="o" * 64),
        replace(select, row_ids=select.row_ids[::-1].copy()),
        replace(select, classes=["a", "b"], positive="b"),
        replace(select, preprocessing_fingerprint="o" * 64),
        replace(select, split_hash="other"),
    ):
        changed.save(tmp_path / "val_select.npz")
        before = files_of(tmp_path)
        with pytest.raises(ArtifactError, match=r"val_select\.npz must be of the model and splits"):
            calibrate(tmp_path, **WISHES[0])
        assert files_of(tmp_path) == before


def test_another_order_is_another_claim(tmp_path: Path) -> None:
    """The best of many orders would be certified falsely more often than promised."""
    splits, _, select = run_of(tmp_path)
    policy = calibrate(tmp_path, **WISHES[0])
    replace(select, gate_logits=select.gate_logits + 0.5).save(tmp_path / "val_select.npz")
    before = files_of(tmp_path)
    with pytest.raises(InputError, match="must serve one claim"):
        calibrate(tmp_path, **WISHES[0])
    assert files_of(tmp_path) == before
    (tmp_path / "val_select.npz").unlink()
    with pytest.raises(ArtifactError, match="as it was when val_calib was claimed"):
        calibrate(tmp_path, **WISHES[0])
    select.save(tmp_path / "val_select.npz")
    assert calibrate(tmp_path, **WISHES[0]) == policy
    assert [len(one.uses) for one in Claims.of(tmp_path).halves.values()] == [1]
    assert splits.hashes["val_calib"] in Claims.of(tmp_path).halves


def test_a_look_saw_all_of_val_calib(tmp_path: Path) -> None:
    splits, calib, _ = run_of(tmp_path)
    calibrate(tmp_path, policy="gate", guarantee="none", max_exit_error=0.05)
    claims = Claims.of(tmp_path)
    assert claims.looks == {splits.hashes["val_calib"]: 1}
    assert len(claims.rows[splits.hashes["val_calib"]]) == calib.labels.size
    policy = calibrate(tmp_path, **WISHES[0])
    assert any("saw" in one or "look" in one for one in policy.certificate.assumptions)


def test_halves_can_be_asked_for(tmp_path: Path) -> None:
    splits, _, _ = run_of(tmp_path)
    policy = calibrate_run(Calibrate(run=tmp_path), Gate(max_exit_error=0.03), halve=True)
    assert policy.n_certified == len(splits.of("val_calib", "certify"))
    assert list(Claims.of(tmp_path).halves) == [splits.hashes["val_calib.certify"]]


def test_a_run_that_claimed_its_half_can_repeat_that_claim(tmp_path: Path) -> None:
    splits, _, select = run_of(tmp_path)
    (tmp_path / "val_select.npz").unlink()
    policy = calibrate(tmp_path, **WISHES[0])
    assert policy.certificate.n == len(splits.of("val_calib", "certify"))
    select.save(tmp_path / "val_select.npz")
    assert calibrate(tmp_path, **WISHES[0]) == policy
    assert list(Claims.of(tmp_path).halves) == [splits.hashes["val_calib.certify"]]


# P(wrong | score) of ten laws, score uniform in (0, 1).
LAWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "steep": lambda u: 0.5 * (1 - u) ** 6,
    "flat": lambda u: np.full_like(u, 0.018),
    "linear": lambda u: 0.06 * (1 - u),
    "noisy top": lambda u: np.where(u > 0.95, 0.06, 0.3 * (1 - u) ** 4),
    "spike": lambda u: np.where((u > 0.7) & (u < 0.75), 0.3, 0.2 * (1 - u) ** 4),
    "cliff": lambda u: np.where(u < 0.4, 0.3, 0.01),
    "useless": lambda u: 0.02 + 0.01 * np.sin(20 * u),
    "rare": lambda u: np.where(u > 0.999, 0.5, 0.03 * (1 - u)),
    "ties": lambda u: 0.2 * (1 - np.round(u, 1)) ** 3,
    "uneven groups": lambda u: 0.1 * (1 - u) ** 2,
}


def draw(
    law: str, n: int, rng: np.random.Generator, *, lucky: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, errors and groups of n units; errors are thinned by ``lucky``, as of rows that chose the model."""
    sizes = np.ones(n, dtype=int)
    if law == "uneven groups":  # a twentieth has 20 photos, which are alike
        sizes = np.where(rng.random(n) < 0.05, 20, 1)
    u = rng.random(n)
    wrong = rng.random(n) < lucky * LAWS[law](u)
    score = np.round(u, 1) if law == "ties" else u
    return np.repeat(score, sizes), np.repeat(wrong, sizes), np.repeat(np.arange(n), sizes)


# The largest risk asked for, of exits, of positives that exit, and of sets.
TARGETS = {
    "gate": Gate(max_exit_error=0.02, min_coverage=0.2),
    "softmax": Softmax(target_fnr=0.02, allow_useless=True),
    "scrc": Scrc(alpha=0.02, min_coverage=0.8, allow_useless=True),
}


def true_risk(policy: Policy, law: str, grid: np.ndarray) -> float:
    """Share of errors among what a policy answers, over scores that are uniform on ``grid``."""
    score = np.round(grid, 1) if law == "ties" else grid
    probs, gate = said(score, np.zeros(grid.size, dtype=int))
    exits, miss = policy.exits(probs, gate), LAWS[law](grid)
    if isinstance(policy, ScrcParams):
        sets, exits = policy.answer(probs, exits, gate)
        miss = miss * (sets.sum(axis=1) == 1)
    return float(miss[exits].mean()) if exits.any() else 0.0


def said(score: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [N, 2] and gate logits [N] that rank answers by a score in (0, 1)."""
    score = score.clip(1e-9, 1 - 1e-9)
    return np.where(np.arange(2) == answer[:, None], 0.5 + score[:, None] / 2, 0.5 - score[:, None] / 2), logit(score)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("lucky", [1.0, 0.5])
def test_certificates_are_true_as_often_as_promised(
    lucky: float, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten laws of known truth, 150 draws each: a risk of at most 2% for groups, in an order of lucky rows.

    Of 900 groups that certify half are positive; with the law "rare" a sixth.
    """
    told, grid = [], np.linspace(0.0005, 0.9995, 1000)
    for law in LAWS:
        draws, deployed, false = 150, 0, 0
        for seed in range(draws):
            rng = np.random.default_rng([seed, list(LAWS).index(law)])
            parts = [draw(law, 400, rng, lucky=lucky), draw(law, 900, rng)]
            score, wrong, member = (np.concatenate(one) for one in zip(*parts, strict=True))
            member = member + np.repeat([0, 10_000], [len(parts[0][0]), len(parts[1][0])])
            labels = (member % (6 if law == "rare" else 2) == 0).astype(int)
            probs, gate = said(score, labels ^ wrong)
            rows = Rows.of(
                probs, labels, **BINARY, gate=gate, told_apart=True,
                halves=np.repeat(["fit", "certify"], [len(one[0]) for one in parts]),
                groups=[f"g{one}" for one in member],
            )  # fmt: skip
            try:
                policy = POLICIES.find(target).fit(TARGETS[target], rows)
            except NotReachableError:
                continue
            deployed += 1
            false += true_risk(policy, law, grid) > 0.02
        told.append(f"{law}: deployed {deployed / draws:.2f}, false {false / draws:.3f}")
        assert false / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws), told[-1]
    with capsys.disabled():
        print(f"\n{target}, order from rows with errors x {lucky}: " + "; ".join(told))
