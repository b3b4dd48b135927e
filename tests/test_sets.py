"""Policy scrc from calibration to serving: two halves, one record, one rule in every runtime, promises held."""

from __future__ import annotations

import csv
import html.parser
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fitting import fit_gate_policy, fit_scrc_policy, fit_softmax_policy
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from PIL import Image
from scipy.special import expit

from stage1_pro import cli
from stage1_pro.commands.calibrate import calibrate
from stage1_pro.config import Config, ModelConfig
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Merging, Row, Splits, SplitsSummary, hash_splits
from stage1_pro.errors import ArtifactError, InputError, NotReachableError
from stage1_pro.files import sha256_file
from stage1_pro.metrics.binomial import clopper_pearson_lower, clopper_pearson_upper
from stage1_pro.policies.claims import Claims
from stage1_pro.policies.platt import fit_platt
from stage1_pro.policies.policy import read_policy
from stage1_pro.policies.routing import make_router
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.sets import LIMIT_SLACK, NOBODY_EXITS, ScrcParams, confidence_logit
from stage1_pro.policies.softmax import softmax
from stage1_pro.policies.standing import standing
from stage1_pro.policies.target import Scrc
from stage1_pro.training.answers import answer, count_groups
from stage1_pro.training.calibration import render as render_policy
from stage1_pro.training.evaluation import Evaluation, evaluate
from stage1_pro.training.evaluation import evaluate_predictions as measured
from stage1_pro.training.evaluation import render as render_evaluation
from stage1_pro.words import SPLITS


def made(n: int = 6000, *, seed: int = 0, k: int = 2, spread: float = 1.5, each: int = 1) -> dict[str, Any]:
    """Logits of two stages and a gate that knows something; ``each`` rows a group."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    hard = np.repeat(rng.random(n), 1) < 0.3
    signal = np.eye(k)[labels]
    logits = [
        (scale * np.where(hard, 0.3, 1.0)[:, None] * signal + rng.normal(0, spread, (n, k))).astype(np.float32)
        for scale in (5.0, 6.0)
    ]
    top = np.sort(logits[0], axis=1)
    gate = (top[:, -1] - top[:, -2] - 1 + rng.normal(0, 0.5, n)).astype(np.float32)
    groups = np.array([f"g{i // each}" for i in range(n)])
    halves = np.where(np.arange(n) // each % 2 == 0, "fit", "certify")
    return {
        "logits_a": logits[0], "logits_b": logits[1], "gate": gate, "labels": labels, "halves": halves,
        "groups": groups, "classes": ["none", "roadwork", "cone", "worker"][:k], "positive": "roadwork",
    }  # fmt: skip


def fit(data: dict[str, Any], **wish: Any) -> ScrcParams:
    return fit_scrc_policy(
        softmax(data["logits_a"]), data["gate"], softmax(data["logits_b"]), data["labels"], halves=data["halves"],
        classes=data["classes"], positive=data["positive"], groups=data["groups"],
        **{"alpha": 0.05, "max_exit_error": 0.02, **wish},
    )  # fmt: skip


def evaluate_predictions(*given: Any, **options: Any) -> Evaluation:
    return measured(*given, **options)[0]


def merged(policy: ScrcParams, data: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Probabilities of the stage that answers, and who exits."""
    out = policy.exits(softmax(data["logits_a"]), data["gate"])
    return np.where(out[:, None], softmax(data["logits_a"]), softmax(data["logits_b"])), out


# --------------------------------------------------------------------------------------------
# The record


def test_the_rule_by_hand() -> None:
    data = made()
    policy = fit(data, alpha=0.03, max_exit_error=0.005)
    first, second = softmax(data["logits_a"]), softmax(data["logits_b"])
    fitted_half = data["halves"] == "fit"
    wrong = first.argmax(1) != data["labels"]
    platt = fit_platt(data["gate"][fitted_half], ~wrong[fitted_half])
    sure = expit(platt.a * data["gate"].astype(np.float64) + platt.b)
    # The laxest exit rule: every distinct score tried one by one, in whole numbers.
    rates = [
        (int((sure[fitted_half] >= t).sum()), int((wrong & (sure >= t))[fitted_half].sum()), t)
        for t in np.unique(sure[fitted_half])
    ]
    laxest = min(t for n, k, t in rates if 1000 * k <= 5 * n)
    exited = sure >= policy.exit_threshold
    assert (exited == (sure >= laxest))[fitted_half].all() and 0.1 < exited.mean() < 0.99
    assert policy.exit_rate == exited[fitted_half].mean()
    assert policy.exit_error == pytest.approx(wrong[fitted_half & exited].mean())
    rows = fitted_half & ~exited
    top = second.max(1)
    platt_b = fit_platt(np.log(top / (1 - top))[rows], second.argmax(1)[rows] == data["labels"][rows])
    assert (policy.a_b, policy.b_b) == pytest.approx((platt_b.a, platt_b.b), rel=1e-6)

    probs, out = merged(policy, data)
    assert (out == exited).all()
    correct = np.where(out, sure, expit(policy.a_b * np.log(top / (1 - top)) + policy.b_b))
    sets, accepted = policy.answer(probs, out, data["gate"])
    np.testing.assert_allclose(policy.p_correct(probs, out, data["gate"]), correct, atol=1e-9)
    assert accepted.tolist() == (correct >= policy.lambda_1).tolist()
    (cell,) = policy.lambda_2
    wanted = (1 - probs <= cell.limit) | (probs == probs.max(1, keepdims=True))
    assert (sets == wanted & accepted[:, None]).all()
    # Counts are the certify half's.
    part = ~fitted_half
    assert (policy.n, policy.accepted, cell.trials) == (part.sum(), (accepted & part).sum(), (accepted & part).sum())
    missed = accepted & part & ~sets[np.arange(len(sets)), data["labels"]]
    assert missed.sum() <= cell.errors <= cell.budget
    assert cell.bound == clopper_pearson_upper(cell.errors, cell.trials, 0.96) <= 0.03
    assert policy.coverage_bound is not None and policy.coverage_bound >= 0.7


def sure_but_for_few(n: int, k: int, *, hard: float, wrong: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [2n, k] and labels: a share of ``hard`` rows is unsure, and of those a share of ``wrong`` is."""
    rng = np.random.default_rng(seed)
    labels, unsure = rng.integers(0, k, 2 * n), rng.random(2 * n) < hard
    answer = np.where(unsure & (rng.random(2 * n) < wrong), (labels + 1) % k, labels)
    top = np.where(unsure, rng.uniform(0.4, 0.8, 2 * n), rng.uniform(0.9, 1, 2 * n))
    probs = np.where(np.arange(k) == answer[:, None], top[:, None], ((1 - top) / (k - 1))[:, None])
    return probs, labels


@pytest.mark.parametrize("alpha", [0.05, 0.01])
def test_as_many_are_accepted_as_one_class_each_allows(alpha: float) -> None:
    """4,000 rows of three classes, .6% answered wrongly, all among the unsurest 2.4%: 72% was accepted once."""
    for seed in range(3):
        probs, labels = sure_but_for_few(2000, 3, hard=0.024, wrong=0.25, seed=seed)
        rows = Rows.of(
            probs, labels, classes=["none", "roadwork", "cone"], positive="roadwork", rows_independent=True,
            gate=confidence_logit(probs), halves=np.repeat(["fit", "certify"], 2000),
        )  # fmt: skip
        policy = ScrcParams.fit(Scrc(alpha=alpha), rows)
        assert policy.coverage >= 0.97 and policy.xi == 0.7 and policy.coverage_bound > 0.96
        (cell,) = policy.lambda_2
        assert cell.bound <= alpha and cell.errors <= 0.007 * cell.trials
        sets, accepted = policy.answer(probs, policy.exits(probs, rows.gate), rows.gate)
        assert np.mean(sets[accepted].sum(axis=1) == 1) > 0.99
        if alpha == 0.05:
            assert accepted.all() and sets.sum() == labels.size
        assert "the selection threshold were fixed before anybody looked" in policy.statement


def test_few_groups_are_accepted_but_for_the_unsure() -> None:
    """Four classes, 2.1% wrong, 147 groups certify in the order of as many: a quarter of them was refused once."""
    coverage = []
    for seed in range(10):
        probs, labels = sure_but_for_few(147, 4, hard=0.042, wrong=0.5, seed=seed)
        rows = Rows.of(
            probs, labels, classes=list("abcd"), positive="b", groups=np.arange(294),
            halves=np.repeat(["fit", "certify"], 147),
        )  # fmt: skip
        coverage.append(ScrcParams.fit(Scrc(alpha=0.05), rows).coverage)
    assert min(coverage) > 0.93 and np.mean(coverage) > 0.96


def test_each_half_decides_its_own() -> None:
    data = made(3000)
    policy = fit(data)
    numbers = ("a", "b", "a_b", "b_b", "exit_threshold", "exit_error", "exit_rate", "n_fit_rows")
    counts = ("n", "accepted", "rank", "coverage_bound")
    own = np.flatnonzero(data["halves"] == "certify")[:40]
    other = np.flatnonzero(data["halves"] == "fit")[:40]

    def changed(rows: np.ndarray[Any, Any]) -> ScrcParams:
        labels, gate, second = data["labels"].copy(), data["gate"].copy(), data["logits_b"].copy()
        labels[rows] = 1 - labels[rows]
        gate[rows] += 3
        second[rows] *= -1
        return fit({**data, "labels": labels, "gate": gate, "logits_b": second}, alpha=0.2)

    policy = fit(data, alpha=0.2)
    for name in numbers:
        assert getattr(changed(own), name) == getattr(policy, name), f"a certify row moved {name}"
    assert changed(own).lambda_2 != policy.lambda_2
    for name in counts:
        assert getattr(changed(other), name) == getattr(policy, name), f"a fit row changed {name}"
    assert (changed(other).a, changed(other).exit_threshold) != (policy.a, policy.exit_threshold)


def test_the_record_fits_its_schema_and_reads_back(tmp_path: Path) -> None:
    for wish in ({}, {"cells": "class"}, {"cells": "stage"}, {"variant": "I"}, {"variant": "T"}, {"variant": "naive"},
                 {"loss": "fnr"}, {"score": "raps", "allow_empty": True}):  # fmt: skip
        policy = fit(made(), **wish)
        Draft202012Validator(ScrcParams.model_json_schema()).validate(policy.model_dump(mode="json"))
        policy.write(tmp_path / "scrcparams.json")
        assert read_policy(tmp_path) == policy
        assert policy.guarantee == {"naive": "none", "I": "expectation", "T": "expectation"}.get(
            wish.get("variant", ""), "pac"
        )
        # Keys that readers of earlier files look for.
        written = json.loads((tmp_path / "scrcparams.json").read_text())
        assert {"alpha", "coverage", "fnr_bound", "lambda_1", "lambda_2"} <= set(written)
        assert (written["fnr_bound"] is None) == (wish.get("loss") != "fnr" and wish.get("cells") != "class")
    assert fit(made(), cells="class").lambda_2[1].name == "roadwork"
    assert "With probability at least 95%" in fit(made()).statement
    assert "With probability at least 97.5%" in fit(made(), claims=2).statement
    assert fit(made(), claims=2).delta == pytest.approx((0.005, 0.02))
    assert "nothing is promised" in fit(made(), variant="naive").statement


@pytest.mark.parametrize(
    "change",
    [{"alpha": 0.01}, {"a": 1.0}, {"b_b": 0.0}, {"lambda_1": 0.1}, {"exit_threshold": 0.5}, {"coverage_bound": 0.99},
     {"guarantee": "expectation"}, {"claims": 3}, {"classes": ["roadwork", "none"]}, {"allow_empty": True},
     {"statement": "Nothing ever fails."}, {"assumptions": []}, {"model_fingerprint": "x"}],
)  # fmt: skip
def test_a_changed_number_voids_the_certificate(tmp_path: Path, change: dict[str, object]) -> None:
    policy = fit(made(2000), alpha=0.1)
    path = tmp_path / "scrcparams.json"
    policy.write(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ArtifactError, match="certificate is void"):
        read_policy(tmp_path)
    values = policy.model_dump(mode="json")
    values["lambda_2"][0]["limit"] = 0.5
    path.write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="certificate is void"):
        read_policy(tmp_path)


def test_groups_are_the_unit() -> None:
    policy = fit(made(6000, each=3), alpha=0.1)
    assert (policy.unit, policy.n, policy.grouped) == ("groups", 1000, True)
    assert "one image drawn from a new group" in policy.statement


def test_ties_nan_gates_and_nobody() -> None:
    data = made(4000)
    coarse = {**data, "gate": np.round(data["gate"]).astype(np.float32)}
    policy = fit(coarse)
    probs, out = merged(policy, coarse)
    _, accepted = policy.answer(probs, out, coarse["gate"])
    correct = policy.p_correct(probs, out, coarse["gate"])
    for value in np.unique(correct[out]):
        assert np.unique(accepted[correct == value]).size == 1, "a tie group is cut"
    # Without a gate value a row defers; it is accepted by what Stage B says.
    holes = {**data, "gate": np.where(np.arange(4000) % 5 == 0, np.nan, data["gate"])}
    policy = fit(holes)
    probs, out = merged(policy, holes)
    _, accepted = policy.answer(probs, out, holes["gate"])
    assert not out[::5].any() and accepted[::5].any()
    # A gate that never speaks, or knows nothing: nobody exits, and Stage B answers all.
    for gate in (np.full(4000, np.nan), np.zeros(4000)):
        policy = fit({**data, "gate": gate}, max_exit_error=0.001)
        assert policy.exit_threshold == NOBODY_EXITS and policy.exit_error is None and policy.exit_rate == 0
        assert not policy.exits(softmax(data["logits_a"]), np.full(4000, 1e9)).any()
        assert "nobody exits" in policy.rule()
        assert fit({**data, "gate": gate}, max_exit_error=0.001, cells="stage").lambda_2[0].name == "B"
    # No number, no answer.
    policy = fit(data)
    probs, out = merged(policy, data)
    probs[:3] = np.nan
    sets, accepted = policy.answer(probs, out, data["gate"])
    assert not accepted[:3].any() and not sets[:3].any() and accepted.any()
    assert not policy.near(probs, out, data["gate"])[:3].any()


def test_a_stage_without_a_cell_answers_nothing() -> None:
    data = made(4000)
    policy = fit({**data, "gate": np.full(4000, np.nan)}, max_exit_error=0.001, cells="stage")
    probs = softmax(data["logits_a"])
    out = np.arange(4000) % 2 == 0  # made to exit, as a benchmark does
    sets, accepted = policy.answer(probs, out, np.full(4000, 50.0))
    assert not accepted[out].any() and not sets[out].any() and accepted[~out].any()


def test_infeasible_says_what_would_do() -> None:
    with pytest.raises(NotReachableError, match=r"INFEASIBLE.*smallest risk that could be certified is 0\.0"):
        fit(made(400), alpha=0.001)
    with pytest.raises(NotReachableError, match=r"About \d+ rows would do"):
        fit(made(400), alpha=0.001)
    # One class never is among the accepted.
    data = made(1000)
    with pytest.raises(NotReachableError, match="INFEASIBLE"):
        fit({**data, "labels": np.zeros(1000, int)}, cells="class")


@pytest.mark.parametrize(
    ("wish", "message"),
    [({"alpha": 0.0}, "alpha must be"), ({"xi": 1.0}, "min_coverage must be"), ({"delta": 1.0}, "delta must be"),
     ({"claims": 0}, "claims must be"), ({"max_exit_error": 0.0}, "max_exit_error must be"),
     ({"variant": "pack"}, "did you mean 'pac'"), ({"cells": "town"}, "cells must be one of"),
     ({"loss": "fnr", "cells": "class"}, "must not be 'class' with loss fnr")],
)  # fmt: skip
def test_wrong_wishes_are_told(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit(made(200), **wish)


def test_wrong_arrays_are_told() -> None:
    data, policy = made(200), fit(made(2000), alpha=0.1)
    with pytest.raises(InputError, match=r"gate_logits must have shape \[200\]"):
        fit({**data, "gate": data["gate"][:10]})
    with pytest.raises(InputError, match="positive must be one of none, roadwork"):
        fit({**data, "positive": "road"})
    probs = softmax(data["logits_a"])
    with pytest.raises(InputError, match=r"must have shape \[200\] for the scrc policy, got \[200\] and None"):
        policy.answer(probs, np.ones(200, bool))
    with pytest.raises(InputError, match=r"probs must have shape \[N, 2\]"):
        policy.answer(np.full((5, 3), 1 / 3), np.ones(5, bool), np.zeros(5))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_row_order_changes_no_answer(seed: int) -> None:
    data = made(500)
    policy = fit(made(3000), cells="stage", alpha=0.1)
    order = np.random.default_rng(seed).permutation(500)
    probs, out = merged(policy, data)
    sets, accepted = policy.answer(probs, out, data["gate"])
    again, kept = policy.answer(probs[order], out[order], data["gate"][order])
    assert (again == sets[order]).all() and (kept == accepted[order]).all()


def test_limits_are_a_hair_above_the_certified_ones() -> None:
    """A calibration row that sits on a limit is in the set whatever a runtime rounds."""
    data = made()
    policy = fit(data, alpha=0.02, xi=0.9)
    probs, out = merged(policy, data)
    (cell,) = policy.lambda_2
    assert cell.limit > LIMIT_SLACK, "this test wants sets of two"
    true = probs[np.arange(len(probs)), data["labels"]]
    on = np.flatnonzero(np.abs(1 - true - (cell.limit - LIMIT_SLACK)) < 1e-12)
    assert on.size
    for shift in (-1e-7, 1e-7):
        moved = probs.copy()
        moved[on, data["labels"][on]] += shift
        moved[on, 1 - data["labels"][on]] -= shift
        sets, accepted = policy.answer(moved, out, data["gate"])
        assert sets[on, data["labels"][on]][accepted[on]].all()


def test_other_policies_answer_with_the_label_alone() -> None:
    data = made(2000)
    probs = softmax(data["logits_a"])
    policy = fit_softmax_policy(probs, data["labels"], classes=data["classes"], positive="roadwork", target_fnr=0.3)
    probs[0] = np.nan
    sets, accepted = policy.answer(probs, np.ones(2000, bool))
    assert not accepted[0] and accepted[1:].all() and not sets[0].any()
    assert (sets[1:].argmax(1) == probs[1:].argmax(1)).all() and (sets[1:].sum(1) == 1).all()
    assert not policy.near(probs, np.ones(2000, bool), None).any()


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("pure", [False, True])
def test_the_router_carries_scrc(k: int, pure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from stage1_pro.native import _reference

    if pure:
        monkeypatch.setattr("stage1_pro.native.router.kernels", lambda: _reference)
    data = made(3000, k=k)
    policy = fit(data, score="aps" if k > 2 else "lac", alpha=0.1)
    probs, out = merged(policy, data)
    wanted, accepted = policy.answer(probs, out, data["gate"])
    new = made(500, seed=1, k=k)
    for rows in (data, new):
        router = make_router(policy, 3000)
        routed = router.route(rows["logits_a"], rows["gate"])
        exited = routed.exited.astype(bool)
        assert 0 < exited.sum() < exited.size
        late = router.gather(rows["logits_b"], routed.deferred)
        answered = softmax(rows["logits_a"])
        answered[routed.deferred] = softmax(late)
        probs, out = merged(policy, rows)
        assert (exited == out).all()
        wanted, accepted = policy.answer(probs, out, rows["gate"])
        sets, kept = policy.answer(answered, exited, rows["gate"])
        assert (sets == wanted).all() and (kept == accepted).all()
    nobody = fit({**data, "gate": np.full(3000, np.nan)}, alpha=0.1)
    assert not make_router(nobody, 10).route(data["logits_a"][:10], np.full(10, 1e9, np.float32)).exited.any()
    gate = fit_gate_policy(
        softmax(data["logits_a"]), data["gate"], data["labels"], halves=data["halves"], classes=data["classes"],
        positive="roadwork", guarantee="none", max_exit_error=0.2, min_coverage=0.2,
    )  # fmt: skip
    plain = fit_softmax_policy(
        softmax(data["logits_a"]), data["labels"], classes=data["classes"], positive="roadwork", target_fnr=0.3
    )
    for other, values in ((gate, data["gate"]), (plain, None)):
        found = make_router(other, 3000).route(data["logits_a"], values).exited.astype(bool)
        assert (found == other.exits(softmax(data["logits_a"]), data["gate"])).mean() > 0.999, "float32 at most"


# --------------------------------------------------------------------------------------------
# Calibration as a station


def make_run(run: Path, n: int = 6000, **changes: Any) -> Path:
    """A run folder with splits.json and val_calib.npz."""
    run.mkdir(exist_ok=True)
    data = made(n)
    rows = [
        Row(id=f"r{i}", file=f"{i}.png", label=data["classes"][y], group=f"g{i}", split="val_calib", half=half,
            sha256=str(i))
        for i, (y, half) in enumerate(zip(data["labels"].tolist(), data["halves"].tolist(), strict=True))
    ]  # fmt: skip
    splits = Splits(
        root=str(run), classes=data["classes"], positive="roadwork", seed=0, fractions=dict.fromkeys(SPLITS, 0.25),
        counts={name: {} for name in SPLITS}, groups=dict.fromkeys(SPLITS, 0), hashes=hash_splits(rows), rows=rows,
        merging=Merging(pairs=0, components=0, largest_rows=0, largest_share=0, largest_groups=[]),
    )  # fmt: skip
    splits.write(run / "splits.json")
    found = Predictions(
        row_ids=np.array([row.id for row in rows]), groups=data["groups"], sources=np.array([""] * n),
        halves=data["halves"], logits_a=data["logits_a"], logits_b=data["logits_b"], gate_logits=data["gate"],
        labels=data["labels"].astype(np.int64), classes=data["classes"], positive="roadwork", split="val_calib",
        split_hash=splits.hashes["val_calib"], model_fingerprint="m" * 64, preprocessing_fingerprint="p" * 64,
    )  # fmt: skip
    replace(found, **changes).save(run / "val_calib.npz")
    return run


def test_calibrate_a_run_and_count_the_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    arguments = ["calibrate", "--run", str(run), "--policy", "scrc", "--max-exit-error", "0.02"]
    # What promises nothing needs no claim.
    assert cli.main([*arguments, "--variant", "naive"]) == 0
    said = capsys.readouterr().out
    assert "variant naive" in said and "guarantee: none" in said
    known = Claims.read(run / "claims.json")
    assert known.halves == {} and list(known.looks.values()) == [1], "looked at, but nothing was claimed"
    assert cli.main([*arguments, "--guarantee", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["variant"] == "naive"

    assert cli.main([*arguments, "--alpha", "0.03"]) == 0
    said = capsys.readouterr().out
    assert "guarantee: pac" in said and "claim 1 of 1 on these photos; it certifies nothing else" in said
    policy = read_policy(run)
    assert isinstance(policy, ScrcParams) and (policy.claims, policy.certify_uses) == (1, 1)
    assert policy.split_hashes == Splits.read(run / "splits.json").hashes
    assert "the 2 empirical choice(s) that saw these rows before it" in policy.assumptions[-1]
    assert policy.model_fingerprint == "m" * 64 and render_policy(policy) in said
    data = made()
    assert policy.lambda_2 == fit(data, alpha=0.03, use=1).lambda_2
    written = (run / "scrcparams.json").read_bytes()
    assert cli.main([*arguments, "--alpha", "0.03"]) == 0 and (run / "scrcparams.json").read_bytes() == written
    capsys.readouterr()
    for other in (["--alpha", "0.04"], ["--alpha", "0.03", "--cells", "class"], ["--alpha", "0.03", "--variant", "T"]):
        assert cli.main([*arguments, *other]) == 2
        said = capsys.readouterr().err
        assert "must serve one claim" in said and "scrc: accepted >= 0.7, miscoverage <= 0.03, variant pac" in said
    half = Splits.read(run / "splits.json").hashes["val_calib.certify"]
    assert [use.outcome for use in Claims.read(run / "claims.json").halves[half].uses] == ["certified"]


def test_claims_divide_delta(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = calibrate(run, policy="scrc", alpha=0.05, max_exit_error=0.02, claims=2)
    second = calibrate(run, policy="scrc", alpha=0.04, max_exit_error=0.02, cells="stage")
    assert isinstance(first, ScrcParams) and isinstance(second, ScrcParams)
    assert first.delta == second.delta == pytest.approx((0.005, 0.02)) and second.certify_uses == 2
    with pytest.raises(InputError, match="must serve the 2 claims declared"):
        calibrate(run, policy="gate")


def test_infeasible_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", n=400)
    assert cli.main(["calibrate", "--run", str(run), "--policy", "scrc", "--variant", "naive"]) == 0
    stands = (run / "scrcparams.json").read_bytes()
    assert cli.main(["calibrate", "--run", str(run), "--policy", "scrc"]) == 3
    assert "INFEASIBLE" in (said := capsys.readouterr().err) and "unspent" in said
    assert cli.main(["calibrate", "--run", str(run), "--policy", "scrc", "--alpha", ".018"]) == 3
    said = capsys.readouterr().err
    assert "INFEASIBLE" in said and "smallest risk that could be certified is" in said
    assert "rows would do (there are 200)" in said
    assert "scrcparams.json stands" in said and (run / "scrcparams.json").read_bytes() == stands


def test_wishes_that_contradict_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", n=40)
    for wrong, message in (
        (["--policy", "scrc", "--variant", "naive", "--guarantee", "ltt"], "guarantee must be none with variant naive"),
        (["--policy", "scrc", "--variant", "pac", "--guarantee", "none"], "guarantee must be ltt with variant pac"),
        (
            ["--policy", "scrc", "--target-fnr", ".1"],
            "target_fnr must go with policy softmax or gate, got it with scrc",
        ),
        (["--policy", "gate", "--cells", "class"], "cells must go with policy scrc, got it with gate"),
        (["--policy", "scrc", "--variant", "naive", "--claims", "2"], "claims must go with guarantee ltt"),
    ):
        assert cli.main(["calibrate", "--run", str(run), *wrong]) == 2
        assert message in capsys.readouterr().err
    assert not (run / "claims.json").exists()


def test_anybodys_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = made()
    arrays = {"logits": data["logits_a"], "labels": data["labels"], "classes": np.array(data["classes"]),
              "half": data["halves"]}  # fmt: skip
    out = tmp_path / "scrcparams.json"
    command = ["calibrate", "--logits", str(tmp_path / "mine.npz"), "--policy", "scrc", "--alpha", "0.05",
               "--max-exit-error", "0.02", "--out", str(out), "--json", "--rows-independent"]  # fmt: skip
    np.savez(tmp_path / "mine.npz", **arrays, gate_logits=data["gate"], logits_b=data["logits_b"])
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text()) and found["certify_uses"] is None
    assert found["lambda_1"] == fit(data).lambda_1
    assert any("nobody counted" in one for one in found["assumptions"])
    # One model alone: its confidence is the gate, and it answers everything.
    np.savez(tmp_path / "mine.npz", **arrays)
    assert cli.main(command) == 0
    policy = ScrcParams.read(out)
    probs = softmax(data["logits_a"])
    gate = confidence_logit(probs)
    sets, accepted = policy.answer(probs, policy.exits(probs, gate), gate)
    assert policy.accepted == (accepted & (data["halves"] == "certify")).sum() and sets[accepted].any(axis=1).all()


# --------------------------------------------------------------------------------------------
# Priors


def summary(positives: int, others: int, groups: int) -> SplitsSummary:
    return SplitsSummary(
        classes=["none", "roadwork"], positive="roadwork", seed=0, fractions=dict.fromkeys(SPLITS, 0.25),
        counts={name: {"none": others, "roadwork": positives} for name in SPLITS},
        groups=dict.fromkeys(SPLITS, groups), hashes={},
    )  # fmt: skip


def test_another_prior_voids_what_speaks_of_all_images() -> None:
    splits = summary(3000, 3000, 6000)
    plain, by_class, fnr = (fit(made(), **wish) for wish in ({}, {"cells": "class"}, {"loss": "fnr"}))
    assert standing(plain, splits).stands == ("share accepted", "risk") and standing(plain, splits).void == ()
    same = standing(plain, splits, 0.505)
    assert same.void == () and "is inside what was calibrated on" in same.note
    other = standing(plain, splits, 0.05)
    assert other.void == ("share accepted", "risk") and other.stands == ()
    assert "Void: share accepted, risk. Nothing stands" in other.note and "Answers do not change" in other.note
    for policy, part in ((by_class, "risk of each class"), (fnr, "FNR of accepted sets")):
        other = standing(policy, splits, 0.05)
        assert other.void == ("share accepted",) and other.stands == (part,) and "label shift" in other.note
    nothing = standing(fit(made(), variant="naive"), splits, 0.05)
    assert (nothing.guarantee, nothing.stands, nothing.void) == ("none", (), ())
    for prior in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match=r"prior must be inside \(0, 1\)"):
            standing(plain, splits, prior)
    # Few groups cannot tell one prior from another.
    assert standing(plain, summary(3000, 3000, 6), 0.3).void == ()


def test_priors_and_the_other_policies() -> None:
    data, splits = made(20_000), summary(3000, 3000, 6000)
    shared = {"classes": data["classes"], "positive": "roadwork", "halves": data["halves"], "guarantee": "ltt"}
    probs = softmax(data["logits_b"] * 2)
    gate = fit_gate_policy(probs, data["gate"], data["labels"], max_exit_error=0.1, min_coverage=0.2, **shared)
    plain = fit_softmax_policy(probs, data["labels"], target_fnr=0.1, **shared)
    both = fit_gate_policy(
        probs, data["gate"], data["labels"], max_exit_error=0.1, min_coverage=0.2, target_fnr=0.2, **shared
    )
    assert standing(gate, splits, 0.05).void == ("coverage", "exit error") and standing(gate, splits, 0.05).stands == ()
    assert standing(plain, splits, 0.05).void == () and standing(plain, splits, 0.05).stands == ("FNR on exits",)
    assert standing(both, splits, 0.05).stands == ("FNR on exits",)


def test_label_shift_leaves_the_risk_of_each_class() -> None:
    """What is said of priors, seen on 200,000 new rows: the risk by class stays, that of all together moves."""

    # Positives are harder, so their share matters.
    def shifted(n: int, seed: int, prior: float) -> dict[str, Any]:
        data = made(n, seed=seed)
        rng = np.random.default_rng(seed + 1)
        labels = (rng.random(n) < prior).astype(int)
        logits = np.where(labels == 1, 1.0, 4.0)[:, None] * np.eye(2)[labels] + rng.normal(0, 1, (n, 2))
        return {**data, "labels": labels, "logits_a": logits, "logits_b": logits,
                "gate": np.abs(logits[:, 1] - logits[:, 0])}  # fmt: skip

    policy = fit(shifted(8000, 0, 0.3), cells="class", alpha=0.1, xi=0.5)
    risks = []
    for prior in (0.3, 0.9):
        data = shifted(200_000, 5, prior)
        probs, out = merged(policy, data)
        sets, accepted = policy.answer(probs, out, data["gate"])
        missed = ~sets[np.arange(len(sets)), data["labels"]]
        risks.append([missed[accepted & (data["labels"] == k)].mean() for k in (0, 1)] + [accepted.mean()])
    np.testing.assert_allclose(risks[0][:2], risks[1][:2], atol=0.005)
    assert max(risks[1][:2]) <= 0.1 and abs(risks[0][2] - risks[1][2]) > 0.1


# --------------------------------------------------------------------------------------------
# Verification


def predicted(n: int = 3000, *, seed: int = 1, each: int = 1, flipped: float = 0.0, **changes: Any) -> Predictions:
    """``val_test`` rows from where the calibration rows came, with a share of labels turned."""
    data = made(n, seed=seed, each=each)
    rng = np.random.default_rng(seed)
    labels = np.where(rng.random(n) < flipped, 1 - data["labels"], data["labels"])
    return replace(
        Predictions(
            row_ids=np.array([f"r{i}" for i in range(n)]), groups=data["groups"],
            sources=np.array([f"city{i // each % 2}" for i in range(n)]), halves=np.array([""] * n),
            logits_a=data["logits_a"], logits_b=data["logits_b"], gate_logits=data["gate"],
            labels=labels.astype(np.int64), classes=data["classes"], positive="roadwork", split="val_test",
            split_hash="t" * 64, model_fingerprint="m" * 64, preprocessing_fingerprint="p" * 64,
        ),
        **changes,
    )  # fmt: skip


def policy_of(**wish: Any) -> ScrcParams:
    return fit(made(20_000), model_fingerprint="m" * 64, preprocessing_fingerprint="p" * 64, **wish)


def test_outcomes_by_their_bounds() -> None:
    policy = policy_of(alpha=0.05, cells="stage", max_exit_error=0.005)
    found = evaluate_predictions(predicted(), policy, n_replicates=20)
    check = found.verification
    assert check is not None and found.policy == "scrc" and found.guarantee == "pac"
    own = [one for one in check.promises if one.source is None]
    assert [one.name for one in own] == ["rejection rate", "risk of stage A", "risk of stage B"]
    assert {one.source for one in check.promises} == {None, "city0", "city1"}
    cascade = answer(predicted(), policy)["cascade"]
    sets, accepted = policy.answer(cascade.probs, cascade.exited, predicted().gate_logits)
    missed = ~sets[np.arange(3000), predicted().labels]
    counts = [(3000 - accepted.sum(), 3000)]
    counts += [
        ((missed & accepted & part).sum(), (accepted & part).sum()) for part in (cascade.exited, ~cascade.exited)
    ]
    assert [(one.errors, one.trials) for one in own] == counts
    for one in check.promises:
        # Three promises share the 1% of FAIL; of a source nothing is promised, so nothing is judged.
        lower, upper = (clopper_pearson_lower(one.errors, one.trials, 1 - (1 - 0.99) / 3),
                        clopper_pearson_upper(one.errors, one.trials, 0.95))  # fmt: skip
        assert (one.lower, one.upper) == (lower, upper)
        judged = "FAIL" if lower > one.limit else "PASS" if upper <= one.limit else "INCONCLUSIVE"
        assert one.outcome == (judged if one.source is None else None)
        assert (one.n_to_settle is not None) <= (one.outcome == "INCONCLUSIVE")
    assert check.ambiguous_rate.value == (sets.sum(1) > 1)[accepted].mean()
    assert check.rejection_rate.value == pytest.approx(1 - accepted.mean())
    assert check.average_set_size.value == pytest.approx(sets[accepted].sum(1).mean())
    assert {part.name for part in check.parts if part.part == "stage"} == {"A", "B"}
    assert sum(part.n for part in check.parts if part.part == "stage") == check.n
    assert sum(part.accepted for part in check.parts if part.part == "stage") == check.accepted
    per_group = count_groups(predicted(), answer(predicted(), policy), policy)
    assert sum(int(str(row["abstained"])) for row in per_group) == (~accepted).sum()
    assert sum(int(str(row["ambiguous"])) for row in per_group) == (sets[accepted].sum(1) > 1).sum()
    text = render_evaluation(found)
    assert "sets of" in text and "stage A" in text
    assert "risk of stage B" in text and check.statement.split(":")[0] in text


def test_pass_fail_and_inconclusive() -> None:
    policy = policy_of(alpha=0.05)
    found = {
        name: evaluate_predictions(rows, policy, n_replicates=5).verification
        for name, rows in (
            ("PASS", predicted(20_000)), ("FAIL", predicted(20_000, flipped=0.3)), ("INCONCLUSIVE", predicted(60)),
        )
    }  # fmt: skip
    for outcome, check in found.items():
        assert check is not None and check.outcome == outcome and check.statement.startswith(outcome)
    assert found["INCONCLUSIVE"] is not None
    assert "rows in all would settle it if rates stay as seen" in found["INCONCLUSIVE"].statement
    groups = evaluate_predictions(predicted(3000, each=3), policy, n_replicates=5).verification
    assert groups is not None and (groups.unit, groups.n) == ("groups", 1000)
    naive = evaluate_predictions(predicted(20_000, flipped=0.3), policy_of(variant="naive"), n_replicates=5)
    assert naive.verification is not None and "(nothing was promised)" in naive.verification.statement

    def held(probs: Any, labels: list[int]) -> Any:
        gate = np.full(len(labels), -1e9)  # nobody exits
        return policy.check(Rows.of(probs, labels, gate=gate, classes=["none", "roadwork"], positive="roadwork")).sets

    lone = held(softmax([[0.0, 3.0]]), [1])
    assert lone.outcome == "INCONCLUSIVE" and lone.n == 1
    none = held(np.full((4, 2), 0.5), [0, 1, 0, 1])
    assert none.accepted == 0 and none.average_set_size.value is None and none.rejection_rate.value == 1


def test_a_foreign_policy_is_void() -> None:
    policy = policy_of(alpha=0.1)
    for name in ("model_fingerprint", "preprocessing_fingerprint"):
        with pytest.raises(ArtifactError, match="certificate is void.*stage1 calibrate"):
            evaluate_predictions(predicted(100, **{name: "x" * 64}), policy)


class _Text(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def written(run: Path, predictions: Predictions, policy: ScrcParams) -> Path:
    """An evaluated run without photos; gives its report."""
    run.mkdir(exist_ok=True)
    rows = [
        Row(id=str(predictions.row_ids[i]), file=f"{i}.png", label=predictions.classes[y],
            group=str(predictions.groups[i]), source=str(predictions.sources[i]), split="val_test", sha256="0")
        for i, y in enumerate(predictions.labels.tolist())
    ]  # fmt: skip
    Splits(
        root=str(run), classes=predictions.classes, positive="roadwork", seed=0, rows=rows,
        fractions=dict.fromkeys(SPLITS, 0.25), counts={s: {} for s in SPLITS}, groups=dict.fromkeys(SPLITS, 0),
        hashes=dict.fromkeys(SPLITS, "t" * 64),
        merging=Merging(pairs=0, components=0, largest_rows=0, largest_share=0, largest_groups=[]),
    ).write(run / "splits.json")  # fmt: skip
    policy.write(run / "scrcparams.json")
    evaluate(run, predictions=predictions, n_replicates=20, blocks=(2, 4))
    return run / "report.html"


def test_the_report_says_it_in_plain_words(tmp_path: Path) -> None:
    page = written(tmp_path / "run", predicted(300, each=2), policy_of(alpha=0.05, cells="class"))
    parser = _Text()
    parser.feed(page.read_text())
    words = " ".join(" ".join(parser.words).split())
    for text in (
        "nobody answers, and a person should look", "At least 70.0% of photos are accepted",
        "for the photos of each class", "Is the promise kept here?", "Rejection rate", "Risk of class roadwork",
        "test groups in all would settle it", "city0 (for information: nobody promised it of a source)",
        "Classes in a set, on average", "Clopper and Pearson's, one seeded photo speaking for its group",
    ):  # fmt: skip
        assert text in words, text
    assert not any(word in words for word in ("None", "nan", "{{"))
    with (tmp_path / "run" / "evaluation" / "evaluation.json").open() as file:
        assert json.load(file)["verification"]["unit"] == "groups"


# --------------------------------------------------------------------------------------------
# Serving: one rule in torch, onnxruntime and evaluation

torch = pytest.importorskip("torch")

from stage1_pro.data.images import preprocess, read_image
from stage1_pro.deploy.bundle import load_bundle
from stage1_pro.deploy.cascade import Cascade, Decisions
from stage1_pro.deploy.exporting import export
from stage1_pro.deploy.inspection import inspect, render_inspection
from stage1_pro.deploy.prediction import COLUMNS, count, infer, predict, promised
from stage1_pro.models.model import create_model
from stage1_pro.training.checkpoint import save_model
from stage1_pro.training.inference import infer_split
from stage1_pro.training.run import write_config

N_IMAGES = 24


def trained(run: Path, classes: list[str]) -> Path:
    """A run without the training, whose photos are noise: every head depends on the pixels."""
    model = create_model(ModelConfig(backbone="tiny", tap=2), classes, "roadwork", 0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in (model.heads, model.norm_a):
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.3)
    model = model.eval()
    (run / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(N_IMAGES):
        coarse = rng.integers(0, 256, (2 + i % 5, 3 + i % 4, 3), dtype=np.uint8)
        path = run / "images" / f"{i:02d}.png"
        Image.fromarray(coarse).resize((60 + i, 50 + i), Image.Resampling.BICUBIC).save(path)
        split = SPLITS[i % 4]
        rows.append(
            Row(id=str(i), file=path.name, label=classes[i // 4 % len(classes)], group=f"g{i}", split=split,
                half=("fit", "certify")[i // 4 % 2] if split == "val_calib" else None, sha256=sha256_file(path))
        )  # fmt: skip
    splits = Splits(
        root=str(run / "images"), classes=classes, positive="roadwork", seed=0, fractions=dict.fromkeys(SPLITS, 0.25),
        counts={name: dict.fromkeys(classes, 6 // len(classes)) for name in SPLITS}, groups=dict.fromkeys(SPLITS, 6),
        hashes=hash_splits(rows), rows=rows,
        merging=Merging(pairs=0, components=0, largest_rows=0, largest_share=0.0, largest_groups=[]),
    )  # fmt: skip
    splits.write(run / "splits.json")
    write_config(run, Config(model=ModelConfig(backbone="tiny", tap=2, image_size=48)), splits)
    save_model(run / "model_best.pth", model, model.state_dict(), split_hashes=splits.hashes)
    (run / "metrics.csv").write_text("epoch,loss\n1,0.5\n")
    return run


def sealed(policy: ScrcParams, **changes: Any) -> ScrcParams:
    """The same policy with other numbers, as if it had been calibrated so."""
    values = {name: getattr(policy, name) for name in type(policy).model_fields if name != "calibrator_fingerprint"}
    return ScrcParams.seal(**{**values, **changes})


def serving(run: Path, **wish: Any) -> ScrcParams:
    """A policy for a run, calibrated elsewhere, whose thresholds cut this run's photos into all kinds of answers."""
    model = Cascade_model(run)
    pixels = all_pixels(run, model)
    with torch.no_grad():
        outputs = model(torch.from_numpy(pixels))
    a = model.architecture
    k = len(a.classes)
    first, second = (softmax(x.numpy()) for x in (outputs.logits_a, outputs.logits_b))
    gate = outputs.gate_logit.double().numpy()
    data = made(4000, k=k)
    policy = fit(
        {**data, "classes": a.classes}, alpha=0.2, model_fingerprint=model.fingerprint(),
        preprocessing_fingerprint=a.preprocessing.fingerprint(),
        split_hashes={"val_calib": Splits.read(run / "splits.json").hashes["val_calib"]}, **wish,
    )  # fmt: skip
    between = lambda values: float(np.sort(values)[len(values) // 2 - 1 : len(values) // 2 + 1].mean())  # noqa: E731
    policy = sealed(policy, exit_threshold=between(expit(policy.a * gate + policy.b)))
    out = policy.exits(first, gate)
    probs = np.where(out[:, None], first, second)
    correct = policy.p_correct(probs, out, gate)
    cut = np.sort(correct)[N_IMAGES // 4 - 1 : N_IMAGES // 4 + 1].mean()
    limit = between(np.sort(1 - probs, axis=1)[:, 1])
    cells = [cell.model_copy(update={"limit": limit}) for cell in policy.lambda_2]
    return sealed(policy, lambda_1=float(cut), lambda_2=cells)


def Cascade_model(run: Path) -> Any:
    from stage1_pro.training.checkpoint import load_run_model

    return load_run_model(run)[0].eval()


def all_pixels(run: Path, model: Any) -> Any:
    spec = model.architecture.preprocessing
    return np.stack([preprocess(read_image(p), spec) for p in sorted((run / "images").iterdir())])


@pytest.fixture(scope="module", params=[["none", "roadwork"], ["cone", "none", "roadwork"]], ids=["two", "three"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = trained(tmp_path_factory.mktemp("sets") / "run", request.param)
    serving(folder, cells="stage").write(folder / "scrcparams.json")
    export(folder)
    return folder


def with_policy(cascade: Cascade, policy: ScrcParams) -> Cascade:
    return Cascade(replace(cascade.bundle, policy=policy), cascade.runtime)


def alike(one: Decisions, other: Decisions) -> None:
    for name in ("label", "stage", "exited", "sets", "accepted"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
    np.testing.assert_allclose(one.prob, other.prob, atol=1e-5)


def test_torch_onnx_and_evaluation_decide_alike(run: Path) -> None:
    policy = read_policy(run)
    assert isinstance(policy, ScrcParams)
    paths = sorted((run / "images").iterdir())
    loaded = load_bundle(run / "bundle")
    assert loaded.policy == policy and loaded.manifest.active_exit_policy == "scrc"
    bundle, torch_ = Cascade.load(run / "bundle"), Cascade.from_run(run)
    whole = bundle.predict(paths, batch_size=16)
    assert 0 < whole.accepted.sum() < len(paths) and 0 < whole.exited.sum() < len(paths)
    sizes = whole.sets.sum(axis=1)
    assert (sizes[whole.accepted] > 1).any() and (sizes[whole.accepted] == 1).any() and not sizes[~whole.accepted].any()
    assert set(whole.label[~whole.accepted]) == {""} and (whole.stage != "").all()
    assert np.isfinite(whole.prob).all(), "an abstention still says how sure who looked was"
    for batch_size in (1, 3, 16):
        alike(whole, bundle.predict(paths, batch_size=batch_size))
        alike(whole, torch_.predict(paths, batch_size=batch_size))
    # The very rows that evaluation measures.
    tested = infer_split(run, "val_test")
    files = [paths.index(run / "images" / row.file) for row in Splits.read(run / "splits.json").of("val_test")]
    cascade = answer(tested, policy)["cascade"]
    sets, accepted = policy.answer(cascade.probs, cascade.exited, tested.gate_logits)
    assert sets.tolist() == whole.sets[files].tolist() and accepted.tolist() == whole.accepted[files].tolist()
    assert len(bundle.predict([])) == 0
    assert whole.to_dict()["sets"] == whole.sets.tolist()


def test_an_image_at_a_threshold_decides_alike_alone(run: Path) -> None:
    """Selection thresholds and limits put on the very images, in both stages and both runtimes."""
    policy = read_policy(run)
    assert isinstance(policy, ScrcParams)
    pixels = all_pixels(run, Cascade_model(run))
    for cascade in (Cascade.load(run / "bundle"), Cascade.from_run(run)):
        free = cascade.decide(pixels)
        chosen = [*np.flatnonzero(free.exited)[:2], *np.flatnonzero(~free.exited)[:2]]
        outputs = cascade.runtime.run("stage_a", {"pixels": pixels})
        probs = softmax(outputs["logits"])
        # What a row alone, as two, gives: where it lies near a threshold that decides, in any batch.
        for i in chosen:
            twice = cascade.runtime.run("stage_a", {"pixels": pixels[[i, i]]})
            late = cascade.runtime.run("stage_b", {"hidden": twice["hidden"]})["logits"]
            probs[i] = softmax(twice["logits"] if free.exited[i] else late)[0]
            outputs["gate_logit"][i] = twice["gate_logit"][0]
        correct = policy.p_correct(probs, free.exited, outputs["gate_logit"])
        second = np.sort(1 - probs, axis=1)[:, 1]
        for i in chosen:
            on = [sealed(policy, lambda_1=float(correct[i]))]
            cells = [cell.model_copy(update={"limit": float(second[i])}) for cell in policy.lambda_2]
            on.append(sealed(policy, lambda_1=0.0, lambda_2=cells))
            for k, moved in enumerate(on):
                there = with_policy(cascade, moved)
                together, alone = there.decide(pixels[[0, i, 1, 2, 3]]), there.decide(pixels[i : i + 1])
                assert together.accepted[1] and alone.accepted[0]
                assert alone.sets[0].tolist() == together.sets[1].tolist()
                if k == 1:
                    assert alone.sets[0].sum() >= 2


def test_an_edge_row_runs_twice_and_others_once(run: Path) -> None:
    cascade = Cascade.load(run / "bundle")
    policy = cascade.bundle.policy
    assert isinstance(policy, ScrcParams)
    seen: list[int] = []

    class Counting:
        name = "onnxruntime"

        def run(self, stage: str, inputs: dict[str, Any]) -> Any:
            seen.append(len(next(iter(inputs.values()))))
            return cascade.runtime.run(stage, inputs)

    pixels = all_pixels(run, Cascade_model(run))[:1]
    # Limits at 0 and everything accepted: the most probable class, whose nonconformity is 0 always, is near nothing.
    cells = [cell.model_copy(update={"limit": 0.0}) for cell in policy.lambda_2]
    there = Cascade(replace(cascade.bundle, policy=sealed(policy, lambda_1=-1.0, lambda_2=cells)), Counting())
    there.decide(pixels)
    assert seen and max(seen) == 1


def test_predict_gives_sets_abstentions_and_the_promise(run: Path, tmp_path: Path, capsys: Any) -> None:
    images = run / "images"
    rows, failures = predict(Cascade.load(run / "bundle"), [images], out=tmp_path / "out.csv")
    assert failures == 0
    decided = Cascade.load(run / "bundle").predict(sorted(images.iterdir()))
    classes = load_bundle(run / "bundle").classes
    for row, one in zip(rows, decided, strict=True):
        if one["accepted"]:
            named = [name for name, within in zip(classes, one["sets"], strict=True) if within]
            assert row["set"] == "|".join(named) and row["label"] in named
        else:
            assert (row["decision"], row["label"], row["set"], row["error"]) == ("abstained", None, None, None)
            assert row["stage"] == one["stage"] and row["probability"] == one["prob"]
    with (tmp_path / "out.csv").open(newline="") as file:
        assert list(next(csv.reader(file))) == [*COLUMNS, *(f"prob_{name}" for name in classes)]
    counts = count(rows)
    assert counts["abstained"] > 0 and counts["ambiguous"] > 0
    again, _ = infer(run, [images])
    assert [row["set"] for row in again] == [row["set"] for row in rows]

    assert cli.main(["predict", "--bundle", str(run / "bundle"), str(images), "--json", "--prior", "0.9"]) == 0
    found = json.loads(capsys.readouterr().out)
    policy = read_policy(run)
    assert policy is not None
    assert found["promise"]["guarantee"] == "pac" and found["promise"]["statement"] == policy.statement
    assert found["promise"]["prior"] == 0.9 and found["abstained"] == counts["abstained"]
    assert found["rows"] == rows, "a prior changes no answer"
    assert cli.main(["infer", "--run", str(run), "--split", "val_test", "--prior", "0.999"]) == 0
    said = capsys.readouterr().out
    assert (
        "guarantee: pac. With probability" in said
        and "Void: share accepted, risk of each stage. Nothing stands" in said
    )
    assert "abstained" in said and "set" in said.splitlines()[0].split()
    assert cli.main(["predict", "--bundle", str(run / "bundle"), str(images), "--prior", "2"]) == 2
    assert promised(run / "bundle") == promised(run)


def test_inspect_shows_the_promise(run: Path) -> None:
    facts = inspect(run / "bundle")
    assert facts["policy"]["name"] == "scrc" and facts["policy"]["lambda_2"][0]["name"] == "A"
    assert json.dumps(facts, allow_nan=False)
    text = render_inspection(facts)
    for words in (
        "accept when P(answer correct)",
        "guarantee: pac. With probability",
        "scrcparams.json",
        "wished 70.0%",
    ):
        assert words in text


def test_a_bundle_with_changed_numbers_is_void(run: Path, tmp_path: Path) -> None:
    policy = read_policy(run)
    assert isinstance(policy, ScrcParams)
    strange = sealed(policy, model_fingerprint="0" * 64)
    strange.write(tmp_path / "scrcparams.json")
    original = (run / "scrcparams.json").read_bytes()
    try:
        (run / "scrcparams.json").write_bytes((tmp_path / "scrcparams.json").read_bytes())
        with pytest.raises(ArtifactError, match="another model fingerprint.*certificate is void"):
            Cascade.from_run(run)
    finally:
        (run / "scrcparams.json").write_bytes(original)


def test_evaluate_exits_with_7_where_a_promise_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(tmp_path / "run", ["none", "roadwork"])
    policy = serving(folder)
    # Nobody is accepted: of six rows all are rejected, where at most three in ten may be.
    broken = sealed(policy, lambda_1=2.0)
    for one, code in ((broken, 7), (sealed(broken, guarantee="none", variant="naive"), 0), (policy, 0)):
        one.write(folder / "scrcparams.json")
        assert cli.main(["evaluate", "--run", str(folder), "--replicates", "5"]) == code
        said = capsys.readouterr().out
        assert ("FAIL" in said) == (one is broken)
        written = json.loads((folder / "evaluation" / "evaluation.json").read_text())
        outcome = "INCONCLUSIVE" if one is policy else "FAIL" if one is broken else None
        assert written["verification"]["outcome"] == outcome
        assert (folder / "report.html").exists()


def test_the_statistics_behind_a_record_are_those_it_came_from() -> None:
    policy = fit(made(), cells="class", score="aps")
    found = policy.statistics
    assert [cell.name for cell in found.cells] == policy.classes and found.threshold == policy.lambda_1
    assert found.coverage == policy.coverage and found.rank == policy.rank
