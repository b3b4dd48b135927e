"""stage1 plan: whole calibrations on drawn laws succeed as often as it says; its smallest n and alpha."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import stage1_pro
from stage1_pro import cli
from stage1_pro.data.splits import Splits
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.policies.bounds import binomial_cdf, trials_needed
from stage1_pro.policies.certify import Certificate
from stage1_pro.policies.ordering import certify_halves, infeasible
from stage1_pro.policies.planning import certify_power, plan_calibration
from stage1_pro.policies.policy import risk_of
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.sets import ScrcParams
from stage1_pro.policies.target import POLICIES, Gate, Scrc, Softmax, Target
from stage1_pro.studies.planning import CalibrationPlan, render
from stage1_pro.studies.worlds import Stated

DRAWS = 20_000
NOISE = 4 * 0.5 / DRAWS**0.5


@pytest.mark.parametrize(("n", "share", "error"), [(400, 0.7, 0.02), (700, 1.0, 0.03), (900, 0.17, 0.0)])
def test_power_of_a_risk_is_the_share_of_simulated_calibrations_that_certify(n, share, error) -> None:
    rng = np.random.default_rng(1)
    trials = rng.binomial(n, share, DRAWS)
    errors = rng.binomial(trials, error)
    certified = binomial_cdf(errors, trials, 0.05) <= 0.05
    assert certify_power(n, 0.05, 0.05, share, error) == pytest.approx(certified.mean(), abs=NOISE)


def test_no_units_have_no_power() -> None:
    assert certify_power(0, 0.1, 0.05, 0.7, 0.0) == 0
    assert certify_power(28, 0.1, 0.05, 1.0, 0.0) == 0 and certify_power(29, 0.1, 0.05, 1.0, 0.0) == 1
    assert plan_calibration(0.01, 0.05, 0.7, 0.005) == 3825


def law(n: int, rng: np.random.Generator, e: float, at: float, growth: float, *, sizes: int = 1, **more: float) -> Rows:
    """Rows of n groups of ``sizes`` photos and of two thirds as many more, which fix the order.

    Of the surest share c of them e (c / at)^growth are wrong.
    """
    first = math.ceil(2 * n / 3)
    depth = np.repeat(rng.random(first + n), sizes)
    wrong = rng.random(depth.size) < (growth + 1) * e * (depth / at) ** growth
    positive = (rng.random(depth.size) < more.get("positives", 0.5)).astype(np.int64)
    second = np.where(wrong, 1 - positive, positive)
    sure = 1 - depth / 2
    return Rows.of(
        np.where(np.arange(2) == second[:, None], sure[:, None], 1 - sure[:, None]), positive,
        classes=["no", "yes"], positive="yes", gate=-np.log(depth / (1 - depth)),
        halves=np.where(np.arange(first + n) < first, "fit", "certify").repeat(sizes),
        groups=np.arange(first + n).repeat(sizes).astype(str),
    )  # fmt: skip


def certified(target: Target, n: int, draws: int, **of: float) -> float:
    """Share of whole calibrations that write a policy; of scrc one whose sets have one class."""
    kept = 0
    for seed in range(draws):
        try:
            policy = POLICIES.find(target.policy).fit(target, law(n, np.random.default_rng([9, seed]), **of))
        except NotReachableError:
            continue
        kept += not isinstance(policy, ScrcParams) or max(cell.limit for cell in policy.lambda_2) < 0.5 + 1e-3
    return kept / draws


SMALL = {"alpha": 0.3, "min_coverage": 0.5, "expected_error": 0.08}


def test_a_planned_calibration_certifies_as_often_as_planned() -> None:
    found = stage1_pro.plan(**SMALL, growth=3)
    assert found.n_certify > 1.2 * plan_calibration(0.3, 0.05, 0.5, 0.08)
    target = Gate(exit_error=0.3, least_coverage=0.5)
    assert certified(target, found.n_certify, 200, e=0.08, at=0.5, growth=3) == pytest.approx(0.9, abs=0.07)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "options", "of"),
    [
        (Gate(exit_error=0.01, least_coverage=0.7), {"growth": 2}, {"e": 0.005, "at": 0.7, "growth": 2}),
        (Gate(exit_error=0.01, least_coverage=0.7), {"growth": 5}, {"e": 0.005, "at": 0.7, "growth": 5}),
        (
            Gate(exit_error=0.01, least_coverage=0.7), {"growth": 5, "expected_error": 0.003},
            {"e": 0.003, "at": 0.7, "growth": 5},
        ),
        (
            Gate(exit_error=0.05, least_coverage=0.6), {"growth": 2, "expected_error": 0.02},
            {"e": 0.02, "at": 0.6, "growth": 2},
        ),
        (Gate(exit_error=0.1, least_coverage=0.7), {"growth": 3}, {"e": 0.05, "at": 0.7, "growth": 3, "sizes": 3}),
        (
            Softmax(fnr=0.05), {"growth": 3, "expected_error": 0.02, "positives": 0.3},
            {"e": 0.02, "at": 0.7, "growth": 3, "positives": 0.3},
        ),
        (Scrc(alpha=0.05), {"growth": 3}, {"e": 0.025, "at": 0.7, "growth": 3}),
        # Of other laws than the one that is taken for granted: late and early errors.
        (Gate(exit_error=0.01, least_coverage=0.7), {}, {"e": 0.005, "at": 0.7, "growth": 5}),
        (Gate(exit_error=0.01, least_coverage=0.7), {}, {"e": 0.005, "at": 0.7, "growth": 2}),
    ],
)  # fmt: skip
def test_whole_calibrations_reach_the_planned_power(target, options, of, capsys) -> None:
    risk = target.promises("")[-1].limit
    found = stage1_pro.plan(
        target.policy, alpha=risk, min_coverage=getattr(target, "least_coverage", None) or 0.7, **options
    )
    draws = 300
    share = certified(target, found.n_certify, draws, **of)
    with capsys.disabled():
        error = (0.9 * 0.1 / draws) ** 0.5
        print(f"\n{target.policy} {options} {of}: n = {found.n_certify}, certified {share:.3f} +- {error:.3f}, .9")
    # Both are simulated: the plan, by some hundred calibrations, and this judge.
    assert share == pytest.approx(0.9, abs=0.05 + 2 * error)


def refusals(target: Target, n: int, want: int, **of: float) -> list[Certificate]:
    """Certificates of whole calibrations that are refused."""
    found = []
    for seed in range(5 * want):
        rows = law(n, np.random.default_rng([7, seed]), **of)
        asked = target.promises("yes")
        one = certify_halves(
            rows.gate, [risk_of(one, rows) for one in asked if one.quantity != "coverage"], rows.halves,
            delta=target.delta, groups=rows.groups, smallest=False,
            min_coverage=next((one.limit for one in asked if one.quantity == "coverage"), None),
        )  # fmt: skip
        found += [] if one.feasible or len(found) == want else [one]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "n", "of"),
    [
        (Gate(exit_error=0.01, least_coverage=0.7), 2000, {"e": 0.005, "at": 0.7, "growth": 2}),
        (Gate(exit_error=0.01, least_coverage=0.7), 1000, {"e": 0.003, "at": 0.7, "growth": 5}),
        (Gate(exit_error=0.05, least_coverage=0.6), 400, {"e": 0.02, "at": 0.6, "growth": 2}),
        (Softmax(fnr=0.05), 400, {"e": 0.02, "at": 0.7, "growth": 4, "positives": 0.3}),
    ],
)
def test_the_units_that_refusals_name_certify_as_often_as_said(target, n, of, capsys) -> None:
    """The median of many refusals; each names an interval, and most hold the number that is right."""
    found = [one.needed for one in refusals(target, n, 40, **of)]
    middle = int(np.median([np.inf if one is None else one.n for one in found]))
    draws = 200
    share = certified(target, middle, draws, **of)
    right = stage1_pro.plan(
        target.policy, alpha=target.promises("")[-1].limit, min_coverage=getattr(target, "least_coverage", None) or 0.7,
        expected_error=of["e"], expected_coverage=of["at"], growth=of["growth"], positives=of.get("positives", 0.5),
    ).n_certify  # fmt: skip
    held = np.mean([one is not None and one.low <= right <= (one.high or np.inf) for one in found])
    with capsys.disabled():
        error = (0.9 * 0.1 / draws) ** 0.5
        print(f"\n{target.policy} {n} {of}: {middle} certifies {share:.3f} +- {error:.3f}, .9; {held:.2f} hold {right}")
    assert share == pytest.approx(0.9, abs=0.08)
    assert held >= 0.6


def test_a_refusal_names_an_interval_of_units() -> None:
    (one,) = refusals(Gate(exit_error=0.2, least_coverage=0.5), 40, 1, e=0.05, at=0.5, growth=2)
    assert 40 < one.n_needed == one.needed.n and one.needed.low < one.needed.n < one.needed.high
    assert str(one.needed) in str(infeasible(one, "this", halved=True))


def test_rows_that_a_model_answered_are_the_world(tmp_path: Path) -> None:
    """A model that is never wrong needs what the coverage and no error take; groups are what is drawn."""
    rows = law(150, np.random.default_rng(0), 0.0, 0.5, 1, sizes=4)
    file = tmp_path / "answers.npz"
    arrays = {"probs": rows.probs, "labels": rows.labels, "gate_logits": rows.gate, "groups": rows.groups}
    np.savez(file, **arrays)
    found = stage1_pro.plan(alpha=0.05, min_coverage=0.5, logits=file)
    assert trials_needed(0, 0.05, 0.05) <= found.n_certify <= 1.5 * trials_needed(0, 0.05, 0.05)
    assert found.world == str(file) and found.expected_error is None
    np.savez(file, **{**arrays, "labels": np.where(np.arange(rows.labels.size) % 2, rows.labels, 1 - rows.labels)})
    with pytest.raises(InputError, match="power must be reachable"):
        stage1_pro.plan(alpha=0.3, min_coverage=0.5, logits=file)
    with pytest.raises(InputError, match="expected_error must be left out"):
        stage1_pro.plan(logits=file, expected_error=0.1)


def test_the_positive_class_of_a_file_is_the_one_that_calibrate_takes(tmp_path: Path) -> None:
    """Three in ten are of it, first or last; one that nothing tells, or an array that is missing, names the file."""
    file, rows = tmp_path / "answers.npz", law(200, np.random.default_rng(4), 0.05, 0.5, 2, positives=0.3)
    arrays = {"probs": rows.probs, "labels": rows.labels}
    turned = {"probs": rows.probs[:, ::-1], "labels": 1 - rows.labels}
    needed = []
    for given in (
        {**arrays, "classes": ["no", "weed"]},
        {**turned, "classes": ["weed", "no"]},
        {**turned, "classes": ["weed", "crop"], "positive": "weed"},
    ):
        np.savez(file, **given)
        needed.append(stage1_pro.plan("softmax", alpha=0.3, min_coverage=0.5, logits=file).n_certify)
    assert needed[0] == needed[1] == needed[2]
    for policy, lacking in (
        ("softmax", {**arrays, "classes": ["weed", "crop"]}),
        ("softmax", {**arrays, "positive": "weeds"}),
        ("softmax", {"probs": rows.probs}),
        ("gate", arrays),
    ):
        np.savez(file, **lacking)
        with pytest.raises(InputError, match=re.escape(str(file))):
            stage1_pro.plan(policy, alpha=0.3, min_coverage=0.5, logits=file)


def test_given_units_say_the_smallest_risk_they_can_certify() -> None:
    found = stage1_pro.plan(**SMALL, n=120)
    alpha, least = found.smallest_alpha_at_n, found.least_alpha_at_n
    assert found.power_at_n < 0.9 and alpha > 0.3 > least
    assert least == pytest.approx(1 - 0.05 ** (1 / 120))
    target = Gate(exit_error=alpha, least_coverage=0.5)
    assert certified(target, 120, 200, e=0.08, at=0.5, growth=3.5) == pytest.approx(0.9, abs=0.08)
    assert f"smallest alpha certifiable with them at a chance of 0.9: {alpha:g}; " in render(found)
    # Of 25 nearly all certify .78, and it says nothing of most.
    few = stage1_pro.plan(**SMALL, n=25)
    assert few.smallest_alpha_at_n is None and few.least_alpha_at_n == pytest.approx(1 - 0.05 ** (1 / 25))
    wished = [Gate(exit_error=0.78, least_coverage=0.5, allow_useless=useless) for useless in (True, False)]
    shares = [certified(target, 25, 200, e=0.08, at=0.5, growth=3.5) for target in wished]
    assert shares[0] == pytest.approx(0.9, abs=0.08) and shares[1] < 0.8
    few = stage1_pro.plan("scrc", alpha=0.3, min_coverage=0.7, n=3)
    assert few.smallest_alpha_at_n is None
    assert "no risk below 1 can be certified" in render(few)


def test_what_is_hoped_for_moves_the_number_of_units() -> None:
    middle = stage1_pro.plan(**SMALL).n_certify
    assert middle < stage1_pro.plan(**SMALL, growth=8).n_certify
    assert stage1_pro.plan(**SMALL, expected_coverage=0.7).n_certify < 0.8 * middle
    half, few = (stage1_pro.plan("softmax", alpha=0.1, positives=p, expected_error=0).n_certify for p in (0.5, 0.25))
    assert few == pytest.approx(2 * half, rel=0.1) and half > 2 * trials_needed(0, 0.1, 0.05)


@pytest.mark.parametrize("policy", ["gate", "softmax", "scrc"])
@pytest.mark.parametrize("alpha", [0.2, 0.4, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("part", [0.0, 0.1])
def test_few_units_are_found_too(policy: str, alpha: float, part: float) -> None:
    """The search ends where the ends are near each other, and what it names has the power."""
    wish = {"policy": policy, "alpha": alpha, "min_coverage": 0.5, "expected_error": part * alpha}
    if policy != "scrc" and alpha == 0.9 and part:
        # What exits is wrong as often as one answer to all.
        with pytest.raises(InputError, match="power must be reachable"):
            stage1_pro.plan(**wish)
        return
    found = stage1_pro.plan(**wish)
    powers = {point.n: point.power for point in found.table}
    few = 200 if alpha < 0.7 or not part or policy == "scrc" else 2000
    assert powers[found.n_certify] == pytest.approx(0.9, abs=0.1) and found.n_certify < few


@pytest.mark.parametrize(("policy", "target"), [("gate", Gate(exit_error=0.5, least_coverage=0.5)), ("scrc", None)])
def test_what_is_planned_says_something(policy: str, target: Target | None) -> None:
    target = Scrc(alpha=0.5, min_coverage=0.5) if target is None else target
    found = stage1_pro.plan(policy, alpha=0.5, min_coverage=0.5, expected_error=0.05)
    share = certified(target, found.n_certify, 200, e=0.05, at=0.5, growth=3.5)
    assert share == pytest.approx(0.9, abs=0.08)


def test_two_hundred_answers_are_a_world(tmp_path: Path) -> None:
    rows = law(100, np.random.default_rng(3), 0.03, 0.5, 2)
    file = tmp_path / "answers.npz"
    np.savez(file, probs=rows.probs, labels=rows.labels, gate_logits=rows.gate)
    found = stage1_pro.plan(alpha=0.2, min_coverage=0.5, logits=file)
    assert 20 < found.n_certify < 400
    assert "from few answers" in render(found)


@pytest.mark.slow
def test_a_coverage_near_all_is_planned_as_it_is_reached() -> None:
    """Of 5,000 units nearly all calibrations prove a coverage of .999 where all are answered."""
    found = stage1_pro.plan(alpha=0.3, min_coverage=0.999, expected_error=0.05, expected_coverage=1)
    assert 3000 < found.n_certify < 6000


@pytest.mark.parametrize(
    ("error", "coverage", "growth"), [(0.3, 0.5, 3.0), (0.1, 1e-5, 2.0), (0.05, 0.7, 3.5), (0.2, 0.4, 0.0)]
)
def test_a_stated_curve_is_what_is_said_of_it(error: float, coverage: float, growth: float) -> None:
    """Among the surest c, up to the depth from which all are wrong; there an answer is wrong."""
    world = Stated(error, coverage, growth, (0.5, 0.5))
    rows = world.rows(100_000, np.random.default_rng(0))
    depth, wrong = 1 / (1 + np.exp(rows.gate)), rows.probs.argmax(axis=1) != rows.labels
    for c in (world.lost / 2, world.lost):
        surest = wrong[depth <= c]
        expected = error * (c / coverage) ** growth
        assert surest.mean() == pytest.approx(expected, abs=4 * np.sqrt(expected / max(surest.size, 1)) + 1e-9)
    assert wrong[depth > world.lost].all() == (world.lost < 1 or not (depth > world.lost).any())


def test_steep_curves_overflow_nowhere() -> None:
    with np.errstate(all="raise"):
        for error in (0.0, 0.1):
            rows = Stated(error, 1e-300, 20, (0.5, 0.5)).rows(100, np.random.default_rng(0))
            assert (rows.probs.argmax(axis=1) != rows.labels).all() == (error > 0)


def test_the_same_seed_plans_the_same() -> None:
    asked = {"policy": "softmax", "alpha": 0.3, "expected_error": 0.05, "seed": 3}
    assert stage1_pro.plan(**asked) == stage1_pro.plan(**asked)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "gates"}, r"policy must be one of softmax, gate, scrc, got 'gates'"),
        ({"expected_error": 0.05}, r"expected_error must be in \[0, alpha = 0.05\), got 0.05; no number of rows"),
        ({"expected_coverage": 1.7}, r"expected_coverage must be in \(0, 1\], got 1.7"),
        ({"growth": -1}, r"growth must be from 0 to 20, got -1"),
        ({"alpha": 1e-6}, r"expected_error must be small enough"),
        ({"delta": (0.01, 0.04)}, r"delta must be one share for policy gate, got \[0.01, 0.04\]"),
        ({"cells": 2}, r"cells must be 1 for policy gate, got 2"),
        ({"cells": 1.5}, r"cells must be 1 to 100 positive shares that sum to 1, or their number, got 1.5"),
        ({"policy": "scrc", "cells": (0.5, float("nan"))}, r"cells must be 1 to 100 positive shares that sum to 1"),
        ({"policy": "scrc", "cells": (1 / 101,) * 101}, r"cells must be 1 to 100 positive shares"),
        ({"policy": "scrc", "cells": ()}, r"cells must be 1 to 100 positive shares that sum to 1"),
        ({"policy": "scrc", "cells": (0.5, 0.2)}, r"cells must be 1 to 100 positive shares that sum to 1"),
        ({"power": 1.0}, r"power must be from 0.05 to 0.99, got 1.0"),
        ({"power": 1e-9}, r"power must be from"),
        ({"power": float("nan")}, r"power must be from"),
        ({"seed": -1}, r"seed must be 0 or more, got -1"),
        ({"n": 10**8}, r"n must be from 1 to 100,000, got 100000000"),
        ({"alpha": 1e-320, "expected_error": 0.0}, r"alpha must be large enough"),
        ({"min_coverage": 1e-300}, r"alpha must be large enough"),
        ({"policy": "softmax", "positives": 1e-300}, r"alpha must be large enough"),
        ({"min_coverage": 0.9999999, "alpha": 0.3}, r"alpha and min_coverage must be provable with 100,000 units"),
        ({"delta": 1e-300}, r"delta must be at least 1e-12"),
        ({"policy": "scrc", "delta": 1e-300}, r"delta must be at least 1e-12"),
        ({"min_coverage": 1.5}, r"min_coverage must be inside \(0, 1\), got 1.5"),
        ({"policy": "softmax", "positives": 0.0}, r"positives must be inside \(0, 1\), got 0.0"),
        ({"n": 0}, r"n must be from 1 to 100,000, got 0"),
    ],
)
def test_what_is_wrong_is_said(given, message) -> None:
    with pytest.raises(InputError, match=message):
        stage1_pro.plan(**given)


def test_the_command_writes_its_plan_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from stage1_pro import cli; "
        f"code = cli.main(['plan', '--policy', 'scrc', '--alpha', '.3', '--n', '40', '--out', {str(tmp_path)!r}, "
        "'--json']); assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = CalibrationPlan.read(tmp_path / "plan.json")
    assert json.loads(done.stdout) == found.model_dump(mode="json")
    assert found.n in {point.n for point in found.table}
    picture = (tmp_path / "plan.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    stage1_pro.plan("scrc", alpha=0.3, n=40, out=tmp_path / "again")
    assert (tmp_path / "again" / "plan.png").read_bytes() == picture


def test_a_plan_of_an_older_version_is_of_exact_tests() -> None:
    found = stage1_pro.plan(alpha=0.3, min_coverage=0.5)
    points = [point.model_copy(update={"draws": None}) for point in found.table]
    text = render(found.model_copy(update={"seed": None, "table": points}))
    assert "exact tests" in text and "simulated" not in text
    assert "seed 0" in render(found)


def test_the_command_prints_the_answer_and_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--alpha", ".3", "--min-coverage", ".5", "--expected-error", ".08", "--n", "25"]
    assert cli.main(["plan", *given]) == 0
    text = capsys.readouterr().out
    n = stage1_pro.plan(**SMALL).n_certify
    assert f"needed: {n:,} rows in val_calib" in text
    assert "smallest alpha certifiable with them" in text and "<- given" in text
    assert cli.main(["plan", "--alpha", "2"]) == 2
    assert "alpha must be inside (0, 1), got 2.0" in capsys.readouterr().err


def test_splits_say_what_they_could_promise(streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["split", "--labels", str(streets / "labels.csv"), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    splits = Splits.read(tmp_path / "run" / "splits.json")
    kept = splits.of("val_calib")
    for rows in (kept, [row for row in kept if row.label == splits.positive]):
        n = len({row.group for row in rows})
        assert f"{100 * (1 - 0.05 ** (1 / n)):.1f}% at best" in said and f"{n} groups" in said
