"""stage1 plan: its powers against simulated calibrations with the policies' own tests, its smallest n and alpha."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import stage1_pro
from stage1_pro import cli
from stage1_pro.errors import InputError
from stage1_pro.policies.bounds import binomial_cdf, coverage_p_value, errors_allowed, selection_rank, trials_needed
from stage1_pro.policies.planning import certify_power, plan_calibration, scrc_power, smallest_alpha
from stage1_pro.policies.scrc import SCRC
from stage1_pro.studies.planning import CalibrationPlan, render

DRAWS = 20_000
NOISE = 4 * 0.5 / DRAWS**0.5


@pytest.mark.parametrize(("n", "share", "error"), [(400, 0.7, 0.02), (700, 1.0, 0.03), (900, 0.17, 0.0)])
def test_power_of_a_risk_is_the_share_of_simulated_calibrations_that_certify(n, share, error) -> None:
    rng = np.random.default_rng(1)
    trials = rng.binomial(n, share, DRAWS)
    errors = rng.binomial(trials, error)
    certified = binomial_cdf(errors, trials, 0.05) <= 0.05
    assert certify_power(n, 0.05, 0.05, share, error) == pytest.approx(certified.mean(), abs=NOISE)


def test_power_of_the_gate_counts_the_test_of_its_coverage() -> None:
    rng = np.random.default_rng(2)
    trials = rng.binomial(600, 0.74, DRAWS)
    errors = rng.binomial(trials, 0.025)
    both = (binomial_cdf(errors, trials, 0.05) <= 0.05) & (coverage_p_value(trials, np.full(DRAWS, 600), 0.7) <= 0.05)
    found = certify_power(600, 0.05, 0.05, 0.74, 0.025, min_coverage=0.7)
    assert found == pytest.approx(both.mean(), abs=NOISE)
    assert found < certify_power(600, 0.05, 0.05, 0.74, 0.025) - 0.1


@pytest.mark.parametrize("cells", [(1.0,), (0.5, 0.5), (0.7, 0.2, 0.1)])
def test_power_of_scrc_is_that_of_its_budgets(cells) -> None:
    rng = np.random.default_rng(3)
    n, error = 900, 0.02
    accepted = selection_rank(n, 0.7, 0.01) - 1
    trials = rng.multinomial(accepted, cells, DRAWS)
    kept = (rng.binomial(trials, error) <= errors_allowed(trials, 0.06, 0.04 / len(cells))).all(axis=1)
    assert scrc_power(n, 0.7, 0.06, (0.01, 0.04), error, cells) == pytest.approx(kept.mean(), abs=NOISE)


def test_power_of_scrc_is_that_of_calibrations_by_its_own_code() -> None:
    """A limit of .5 has true risk .06: certified limits are no larger as often as planned."""
    rng = np.random.default_rng(4)
    n, error, draws = 250, 0.06, 1500
    wish = SCRC(0.6, 0.1, allow_empty=True)
    kept = 0
    for _ in range(draws):
        labels, gate = rng.integers(0, 2, n), rng.random(n)
        right = np.where(rng.random(n) < error, rng.uniform(0, 0.4, n), rng.uniform(0.6, 1, n))
        probs = np.where(np.arange(2) == labels[:, None], right[:, None], 1 - right[:, None])
        limit = wish.calibrate(probs, gate, labels).cells[0].limit
        kept += limit is not None and limit <= 0.5
    planned = scrc_power(n, 0.6, 0.1, (0.01, 0.04), error)
    assert 0.1 < planned < 0.9
    assert kept / draws == pytest.approx(planned, abs=4 * 0.5 / draws**0.5)


def test_no_units_and_a_rank_that_does_not_exist_have_no_power() -> None:
    assert certify_power(0, 0.1, 0.05, 0.7, 0.0) == 0
    assert certify_power(28, 0.1, 0.05, 1.0, 0.0) == 0 and certify_power(29, 0.1, 0.05, 1.0, 0.0) == 1
    assert selection_rank(5, 0.7, 0.01) is None
    assert scrc_power(5, 0.7, 0.9, (0.01, 0.04), 0.0) == 0


def test_the_plan_is_the_smallest_n_from_which_power_stays() -> None:
    assert stage1_pro.plan(alpha=0.01, min_coverage=0.7, expected_error=0.005).n_certify == 3825
    assert plan_calibration(0.01, 0.05, 0.7, 0.005) == 3825
    found = stage1_pro.plan("scrc", alpha=0.05, min_coverage=0.8, expected_error=0.02, cells=2)
    wish = (0.8, 0.05, (0.01, 0.04), 0.02, (0.5, 0.5))
    powers = [scrc_power(n, *wish) for n in range(found.n_certify - 1, found.n_certify + 60)]
    assert powers[0] < 0.9 <= min(powers[1:])
    assert (found.n_val_calib, found.delta) == (2 * found.n_certify, pytest.approx([0.01, 0.04]))


def test_given_units_say_the_smallest_risk_they_can_certify() -> None:
    found = stage1_pro.plan("softmax", positives=0.25, min_coverage=1 - 1e-9, expected_error=0.0, n=400)
    assert found.smallest_alpha_at_n == found.least_alpha_at_n
    alpha = found.smallest_alpha_at_n
    assert certify_power(400, alpha, 0.05, 0.25, 0.0) >= 0.9 > certify_power(400, alpha - 1e-4, 0.05, 0.25, 0.0)
    assert found.power_at_n == certify_power(400, 0.02, 0.05, 0.25 * (1 - 1e-9), 0.0)
    assert smallest_alpha(lambda _: 0.0, 0.9) is None
    few = stage1_pro.plan("scrc", alpha=0.1, min_coverage=0.7, n=3)
    assert few.smallest_alpha_at_n is None
    assert "no risk below 1 can be certified" in render(few)


def test_the_expected_coverage_costs_rows_and_positives_are_a_share() -> None:
    taken = stage1_pro.plan(alpha=0.05, expected_error=0.02)
    counted = stage1_pro.plan(alpha=0.05, expected_error=0.02, expected_coverage=0.74)
    assert counted.n_certify > 1.3 * taken.n_certify
    half, all_ = (stage1_pro.plan("softmax", positives=p, expected_error=0).n_certify for p in (0.5, 1.0))
    assert half == pytest.approx(2 * all_, rel=0.05) and half > 2 * trials_needed(0, 0.02, 0.05)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "gates"}, r"policy must be one of softmax, gate, scrc, got 'gates'"),
        ({"expected_error": 0.01}, r"expected_error must be in \[0, alpha = 0.01\), got 0.01; no number of rows"),
        ({"expected_coverage": 0.7}, r"expected_coverage must be in \(min_coverage = 0.7, 1\], got 0.7"),
        ({"policy": "scrc", "expected_coverage": 0.8}, r"expected_coverage must be left out for policy scrc, got 0.8"),
        ({"delta": (0.01, 0.04)}, r"delta must be one share for policy gate, got \[0.01, 0.04\]"),
        ({"cells": 2}, r"cells must be 1 for policy gate, got 2"),
        ({"cells": 1.5}, r"cells must be 1 for policy gate, got 1.5"),
        ({"policy": "scrc", "cells": (0.5, float("nan"))}, r"cells must be 1 to 100 positive shares that sum to 1"),
        ({"policy": "scrc", "cells": ()}, r"cells must be 1 to 100 positive shares that sum to 1"),
        ({"policy": "scrc", "cells": (0.5, 0.2)}, r"cells must be 1 to 100 positive shares that sum to 1"),
        ({"power": 1.0}, r"power must be inside \(0, 1\), got 1.0"),
        ({"min_coverage": 1.5}, r"min_coverage must be inside \(0, 1\), got 1.5"),
        ({"policy": "softmax", "positives": 0.0}, r"positives must be in \(0, 1\], got 0.0"),
        ({"n": 0}, r"n must be 1 or more, got 0"),
    ],
)
def test_what_is_wrong_is_said(given, message) -> None:
    with pytest.raises(InputError, match=message):
        stage1_pro.plan(**given)


def test_the_command_writes_its_plan_and_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from stage1_pro import cli; "
        f"code = cli.main(['plan', '--policy', 'scrc', '--alpha', '.1', '--n', '200', '--out', {str(tmp_path)!r}, "
        "'--json']); assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = CalibrationPlan.read(tmp_path / "plan.json")
    assert json.loads(done.stdout) == found.model_dump(mode="json")
    assert found.n in {point.n for point in found.table}
    picture = (tmp_path / "plan.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    stage1_pro.plan("scrc", alpha=0.1, n=200, out=tmp_path / "again")
    assert (tmp_path / "again" / "plan.png").read_bytes() == picture


def test_the_command_prints_the_answer_and_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--alpha", ".01", "--min-coverage", ".7", "--expected-error", ".005", "--n", "1000"]) == 0
    text = capsys.readouterr().out
    assert "needed: 3,825 rows in the certify half, 7,650 in val_calib" in text
    assert "smallest alpha certifiable with them" in text
    assert cli.main(["plan", "--alpha", "2"]) == 2
    assert "alpha must be inside (0, 1), got 2.0" in capsys.readouterr().err
