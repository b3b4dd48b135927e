"""A promise is true or refused, wherever it is shown: followed by the loop, tightened, watched, compiled."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fitting import fit_gate_policy, fit_scrc_policy, fit_softmax_policy

from stage1_pro.continual.loop import folder
from stage1_pro.continual.loop.promotion import check_certificate
from stage1_pro.continual.serving.live import tightened
from stage1_pro.errors import InputError
from stage1_pro.policies.policy import Origin
from stage1_pro.policies.routing import make_router
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.sets import ScrcParams
from stage1_pro.policies.softmax import confidence, softmax
from stage1_pro.policies.target import Gate, Promise, Scrc, Softmax, parse_target

CLASSES = ["none", "roadwork"]


@pytest.fixture(scope="module")
def rows() -> dict[str, Any]:
    """Rows of which an answer is right as often as its margin says."""
    rng = np.random.default_rng(0)
    n = 24_000
    labels = rng.integers(0, 2, n)
    strength = rng.normal(size=n) * 2 + 4
    margin = np.where(rng.random(n) < 1 / (1 + np.exp(-strength)), 1, -1) * (2 * labels - 1) * np.abs(strength)
    p = 1 / (1 + np.exp(-margin))
    return {
        "probs": np.stack([1 - p, p], 1), "gate": np.abs(margin) + rng.normal(size=n) * 0.1, "labels": labels,
        "halves": np.where(rng.random(n) < 0.5, "fit", "certify"),
    }  # fmt: skip


def scrc(rows: dict[str, Any], model: str = "new", **wish: Any) -> ScrcParams:
    return fit_scrc_policy(
        rows["probs"], rows["gate"], rows["probs"], rows["labels"], halves=rows["halves"], classes=CLASSES,
        positive="roadwork", model_fingerprint=model, **{"alpha": 0.05, "delta": 0.02, "max_exit_error": 0.02, **wish},
    )  # fmt: skip


# ------------------------------------------------------------------------------ A1: the loop asks for what was promised


@pytest.mark.parametrize(
    "wish",
    [
        {"cells": "class"},
        {"loss": "fnr", "score": "aps", "allow_empty": True},
        {"cells": "stage", "score": "raps", "raps": (0.02, 1), "max_exit_error": 0.002},
        {"variant": "I", "xi": 0.6},
        {"variant": "T", "delta": 0.1},
    ],
)
def test_the_target_of_a_policy_asks_for_the_very_same_policy(rows: dict[str, Any], wish: dict[str, Any]) -> None:
    champion = scrc(rows, "m", **wish)
    target = parse_target(champion.target.model_dump(mode="json"))
    given = Rows.of(
        rows["probs"], rows["labels"], gate=rows["gate"], probs_b=rows["probs"], halves=rows["halves"],
        classes=CLASSES, positive="roadwork", rows_independent=True,
    )  # fmt: skip
    again = ScrcParams.fit(target, given, origin=Origin(model_fingerprint="m"))
    assert {**again.model_dump(), "delta": None, "calibrator_fingerprint": None} == {
        **champion.model_dump(), "delta": None, "calibrator_fingerprint": None,
    }  # fmt: skip
    assert again.model_dump()["delta"] == pytest.approx(champion.delta, rel=1e-12)
    assert check_certificate(champion, again, "m").passed


def test_divided_claims_are_asked_for_as_they_were_made(rows: dict[str, Any]) -> None:
    gate = fit_gate_policy(
        rows["probs"], rows["gate"], rows["labels"], halves=rows["halves"], classes=CLASSES, positive="roadwork",
        max_exit_error=0.05, target_fnr=0.1, min_coverage=0.5, claims=3, use=2,
    )  # fmt: skip
    assert gate.target == Gate(
        max_exit_error=0.05, min_coverage=0.5, target_fnr=0.1, delta=gate.certificate.delta if gate.certificate else 0
    )
    assert [str(one) for one in gate.promises] == [
        "coverage at least 0.5 (certified, delta 0.0166667)",
        "exit error at most 0.05 (certified, delta 0.0166667)",
        "FNR on exits of 'roadwork' at most 0.1 (certified, delta 0.0166667)",
    ]
    assert scrc(rows, claims=4, use=1).target.delta == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("champion", "candidate", "passes"),
    [
        ({"cells": "class"}, {}, False),
        ({}, {"cells": "class"}, True),
        ({"cells": "stage", "max_exit_error": 0.002}, {"cells": "class"}, False),
        ({"loss": "fnr"}, {}, False),
        ({}, {"loss": "fnr"}, False),
        ({}, {"variant": "T"}, False),
        ({}, {"variant": "I"}, False),
        ({"variant": "T"}, {"variant": "I"}, True),
        ({"variant": "T"}, {}, True),
        ({}, {"delta": 0.05}, False),
        ({}, {"alpha": 0.06}, False),
        ({}, {"xi": 0.6}, False),
        ({"xi": 0.6, "alpha": 0.06}, {}, True),
        ({}, {"score": "aps", "allow_empty": True, "max_exit_error": 0.05}, True),
    ],
)
def test_a_candidate_must_promise_what_the_champion_does(
    rows: dict[str, Any], champion: dict[str, Any], candidate: dict[str, Any], passes: bool
) -> None:
    found = check_certificate(scrc(rows, "old", **champion), scrc(rows, **candidate), "new")
    assert found.passed == passes, found.note


def test_a_promise_covers_what_asks_for_no_more() -> None:
    one = Promise(quantity="risk", limit=0.05, delta=0.05)

    def changed(**values: Any) -> Promise:
        return Promise.model_validate({**one.model_dump(), **values})

    assert one.covers(one)
    for less in ({"limit": 0.06}, {"delta": 0.1}, {"strength": "on average", "delta": None}):
        assert one.covers(changed(**less)), less
        assert not changed(**less).covers(one), less
    assert changed(of="each class").covers(one) and not one.covers(changed(of="each class"))
    for other in ({"quantity": "exit error"}, {"label": "roadwork"}, {"unit": "photo"}, {"bound": "at least"}):
        assert not one.covers(changed(**other)) and not changed(**other).covers(one), other
    least = changed(bound="at least")
    assert changed(bound="at least", limit=0.06).covers(least) and not changed(bound="at least", limit=0.04).covers(
        least
    )
    averages = {"strength": "on average", "delta": None}
    assert not changed(of="each class", **averages).covers(changed(**averages)), "the mix is drawn anew with the rows"


# -------------------------------------------------------------------------------- A2: a stricter threshold


def specialist(rng: np.random.Generator, n: int) -> tuple[Any, ...]:
    """Stage B is a specialist of what is deferred: 98.5% right there, 90% on what Stage A is sure of."""
    y, easy = rng.integers(0, 2, n), rng.random(n) < 0.8
    a = np.where(easy, 6.0, 1.0) * np.where(rng.random(n) < np.where(easy, 0.999, 0.7), 1, -1) * (2 * y - 1)
    b = np.where(easy, np.where(rng.random(n) < 0.9, 3.0, -3.0), np.where(rng.random(n) < 0.985, 3.0, -3.0))
    gate = np.where(easy, 5.0, -1.0) + rng.normal(size=n) * 0.2
    first, second = (softmax(np.stack([-z / 2, z / 2], 1)) for z in (a, b * (2 * y - 1)))
    return first, second, gate, y


def test_a_tightened_scrc_policy_promises_nothing() -> None:
    rng = np.random.default_rng(1)
    first, second, gate, y = specialist(rng, 30_000)
    policy = fit_scrc_policy(
        first, gate, second, y, halves=np.where(rng.random(30_000) < 0.5, "fit", "certify"), classes=CLASSES,
        positive="roadwork", alpha=0.02, xi=0.9, max_exit_error=0.01,
    )  # fmt: skip
    strict = tightened(policy, 1.5)
    first, second, gate, y = specialist(rng, 100_000)
    risks = []
    for one in (policy, strict):
        out = one.exits(first, gate)
        sets, accepted = one.answer(np.where(out[:, None], first, second), out, gate)
        risks.append(float((~sets[np.arange(y.size), y])[accepted].mean()))
    assert risks[0] <= 0.02 < risks[1], "what was promised does not hold of the tightened cascade"
    assert (policy.guarantee, len(policy.promises)) == ("pac", 2)
    assert (strict.guarantee, strict.promises) == ("none", ())
    assert "nothing is promised" in strict.statement
    assert ScrcParams.parse(strict.model_dump_json(), "scrcparams.json") == strict, "sealed as any other"
    assert tightened(policy, policy.exit_threshold) is policy and tightened(policy, 0.1) is policy


def test_no_rate_is_certified_at_a_stricter_threshold(rows: dict[str, Any]) -> None:
    common = {"halves": rows["halves"], "classes": CLASSES, "positive": "roadwork", "guarantee": "ltt"}
    for policy in (
        fit_softmax_policy(rows["probs"], rows["labels"], target_fnr=0.05, **common),
        fit_gate_policy(rows["probs"], rows["gate"], rows["labels"], max_exit_error=0.05, min_coverage=0.5, **common),
    ):
        strict = policy.at(policy.exit_threshold + 0.01)
        assert policy.promises and not strict.promises
        assert strict.guarantee == "none" and "nothing is promised" in strict.statement
        assert strict.exit_threshold == policy.exit_threshold + 0.01


# -------------------------------------------------------------------------------- A3: what audits of exits can test


def test_the_loop_watches_only_what_was_asked_of_exits(
    rows: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Gate(max_exit_error=0.03).watched() == 0.03
    assert Softmax(fnr=0.02).watched() is None and Scrc(alpha=0.04).watched() is None
    policy = scrc(rows, "m")
    bundle = SimpleNamespace(
        policy=policy, path=tmp_path, manifest=SimpleNamespace(provenance=SimpleNamespace(model_fingerprint="m"))
    )
    monkeypatch.setattr(folder, "load_bundle", lambda _: bundle)
    (tmp_path / "splits.json").touch()
    with pytest.raises(InputError, match="--alpha"):
        folder.init(tmp_path / "loop", tmp_path, by="ada")
    assert not type(policy).steerable, "nor may it tighten what would give the promise up"


# -------------------------------------------------------------------------------- A4: the compiled router


@pytest.mark.parametrize(("centre", "refused"), [(4.0, False), (12.0, True), (18.0, True)])
def test_the_router_decides_as_the_policy_does_or_is_refused(centre: float, refused: bool) -> None:
    margin = np.random.default_rng(0).normal(size=1_000_000) * 3 + centre
    logits = np.stack([-margin / 2, margin / 2], 1).astype(np.float32)
    sure = confidence(softmax(logits))
    threshold = float(np.quantile(sure, 0.3))
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 200)
    p = np.where(labels == 1, 0.9, 0.1)
    policy = fit_softmax_policy(
        np.stack([1 - p, p], 1), labels, classes=CLASSES, positive="roadwork", target_fnr=0.5, guarantee="none"
    ).model_copy(update={"exit_threshold": (threshold + np.nextafter(threshold, 2)) / 2})
    if refused:
        with pytest.raises(InputError, match="float32"):
            make_router(policy, logits.shape[0])
        return
    routed = make_router(policy, logits.shape[0]).route(logits)
    assert (routed.exited.astype(bool) == (sure >= policy.exit_threshold)).all()


def test_a_gate_of_large_offset_is_refused() -> None:
    """Its two terms cancel, and float32 keeps their rounding."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 4000)
    p = np.clip(np.where(rng.random(4000) < 0.95, labels, 1 - labels), 0.1, 0.9)
    policy = fit_gate_policy(
        np.stack([1 - p, p], 1), rng.normal(size=4000) + 2 * ((p > 0.5) == labels), labels, classes=CLASSES,
        halves=np.where(np.arange(4000) % 2 == 0, "fit", "certify"), positive="roadwork", guarantee="none",
        max_exit_error=0.2, min_coverage=0.2,
    )  # fmt: skip
    assert make_router(policy, 10).uses_gate
    with pytest.raises(InputError, match="float32"):
        make_router(policy.model_copy(update={"b": 1000.0}), 10)
    assert (
        not make_router(policy.model_copy(update={"threshold": 1.5}), 10)
        .route(np.zeros((3, 2), np.float32), np.full(3, 1e9, np.float32))
        .exited.any()
    )
