"""The monitors: false alarms and found harm, risk in spite of biased labels, drift, triggers, page, metrics, alerts."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from kit.rates import show
from scipy.stats import binom

from stage1_pro.continual.watch.alerts import Alert, Program, Webhook
from stage1_pro.continual.watch.monitor import (
    Cbpe,
    DriftConfig,
    Evidence,
    ServedColumns,
    Signals,
    TriggerConfig,
    TriggerState,
    cbpe,
    drift,
    grow,
    hajek_risk,
    horvitz_thompson_risk,
    naive_risk,
    rolling,
    triggers,
)
from stage1_pro.continual.watch.power import exact_audits, normal_audits, plan_audits, render
from stage1_pro.continual.watch.srt import ControllerConfig, ThresholdController
from stage1_pro.continual.watch.status import (
    METRICS,
    MonitorConfig,
    Status,
    assess,
    dashboard,
    exposition,
    samples,
    write_page,
    write_textfile,
)
from stage1_pro.errors import DependencyError, InputError
from stage1_pro.metrics.binomial import clopper_pearson

ALPHA = 0.02
DAY = 86400.0


@pytest.fixture
def simulation(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "benchmarks")
    import continual_monitor

    return continual_monitor


def rows_of(n: int = 10, **changes) -> ServedColumns:
    columns = {
        "time": np.arange(n, dtype=float),
        "exited": np.ones(n, bool),
        "wrong": np.zeros(n),
        "propensity": np.full(n, 0.5),
        "score": np.full(n, 0.97),
    }
    return ServedColumns(**(columns | changes))


def feed(evidence: Evidence, rows: ServedColumns) -> Evidence:
    at = rows.audited
    return evidence.after(rows.wrong[at], propensity=rows.propensity[at], time=rows.time[at])


# ---------------------------------------------------------------------------- evidence


def test_evidence_is_a_mixture_of_bets_over_starts() -> None:
    """Against the sum written out: every alternative, started at every audit."""
    wrong = np.array([0, 1, 0, 0, 1, 1, 0], bool)
    e = np.array([0.1, 0.2, 0.1, 0.5, 0.1, 0.3, 0.1])
    evidence = Evidence(alpha=ALPHA, reference=0.1, floor=0.1)
    gain = (wrong - ALPHA) * 0.1 / e
    prior = np.array([0.75 * 300 / ((t + 299) * (t + 300)) + (0.25 if t == 1 else 0) for t in range(1, 8)])
    expected = 1 - prior.sum()
    for odds in (1.5, 2, 3, 5, 8):
        alternative = odds * ALPHA / (1 - ALPHA + odds * ALPHA)
        bet = (alternative - ALPHA) / (ALPHA * (1 - ALPHA))
        expected += sum(prior[s] * np.prod(1 + bet * gain[s:]) for s in range(7)) / 5
    for one, chance in zip(wrong, e, strict=True):
        evidence = evidence.after(one, propensity=chance, time=0.0)
    assert evidence.value == pytest.approx(expected, rel=1e-12)
    assert evidence == Evidence(alpha=ALPHA, reference=0.1, floor=0.1).after(wrong, propensity=e, time=np.zeros(7))
    assert Evidence.parse(evidence.model_dump_json(), "evidence") == evidence


@pytest.mark.parametrize("unequal", [False, True])
def test_false_alarms_stay_below_delta_at_the_very_limit(unequal: bool) -> None:
    """Risk exactly alpha, also where exits that are wrong more often are audited more often; 400 runs, 4 SD."""
    runs, delta = 400, 0.1
    rng = np.random.default_rng(5)
    evidence = Evidence(alpha=0.05, delta=delta, reference=0.2, floor=0.1)
    capital = np.zeros((runs, 5))
    alarmed = np.zeros(runs, bool)
    for n in range(1, 1001):
        # Two kinds of exits, half and half: audited at .1 and .4, wrong in 2% and 8%.
        second = rng.random(runs) < (0.8 if unequal else 0.5)
        chance = np.where(second, 0.4, 0.1) if unequal else np.full(runs, 0.2)
        wrong = rng.random(runs) < np.where(second, 0.08, 0.02)
        capital, value = grow(capital, n, (wrong - 0.05) * 0.2 / chance, evidence.bets)
        alarmed |= value >= 1 / delta
    assert alarmed.mean() <= delta + 4 * (delta * (1 - delta) / runs) ** 0.5
    # Unweighted, the second kind would be taken for all: .068 is no .05.
    assert unequal or alarmed.any()


def test_stable_runs_stay_quiet_and_a_concept_shift_is_found(simulation) -> None:
    """Done when 3: at most 2 alarms in 100 stable runs, found in 95% within 1,500 decisions (20% of exits audited)."""
    assert simulation.true_error(0.0, threshold=simulation.CERTIFIED) == pytest.approx(0.0143, abs=2e-4)
    assert simulation.true_error(simulation.HARD_SHIFT, threshold=simulation.CERTIFIED) == pytest.approx(
        0.106, abs=1e-3
    )
    assert simulation.alarms(100, audit_rate=0.2, shifted=False)["false_alarms"] <= 2
    shifted = simulation.alarms(100, audit_rate=0.2, shifted=True)
    assert shifted["false_alarms"] <= 2
    assert shifted["found"] >= 95


def test_evidence_refuses_a_propensity_that_its_bets_cannot_bear() -> None:
    evidence = Evidence(alpha=ALPHA, reference=0.1, floor=0.05)
    with pytest.raises(InputError, match="propensity must .*0.05.*1.*got 0.01"):
        evidence.after(True, propensity=0.01, time=0.0)
    with pytest.raises(ValueError, match="floor must be at most reference"):
        Evidence(alpha=ALPHA, reference=0.1, floor=0.5)
    # The largest weight on a right answer never ruins anybody.
    right = Evidence(alpha=0.3, reference=1.0, floor=0.02).after(False, propensity=0.02, time=0.0)
    assert min(right.capital) > 0


def test_an_alarm_is_kept() -> None:
    evidence = feed(Evidence(alpha=ALPHA, reference=0.5), rows_of(40, wrong=np.ones(40)))
    assert evidence.alarm
    assert evidence.alarm_n is not None
    assert evidence.alarm_at == evidence.alarm_n - 1
    assert evidence.after([False] * 50, propensity=[0.5] * 50, time=range(50)).alarm_at == evidence.alarm_at
    many = evidence.after(np.ones(500), propensity=np.full(500, 0.5), time=np.arange(500))
    assert np.isfinite(many.value)
    assert Evidence.parse(many.model_dump_json(), "evidence") == many


# ---------------------------------------------------------------------------- risk from chosen rows


def test_weighted_estimates_correct_labels_that_come_from_hard_rows(simulation) -> None:
    """Done when 3: bias below .02 where the naive one is above .10; 60 runs, its own noise is .003."""
    found = {one["estimate"]: one for one in simulation.biased_labels(60)}
    assert abs(found["naive"]["bias"]) > 0.10
    assert abs(found["hajek"]["bias"]) < 0.02
    assert abs(found["horvitz-thompson"]["bias"]) < 0.02
    assert found["naive"]["covered"] == 0
    assert found["hajek"]["covered"] >= 0.9
    assert found["horvitz-thompson"]["covered"] >= 0.9


@pytest.mark.parametrize("n", [8, 60])
def test_weighted_intervals_cover_for_few_rows(n: int) -> None:
    """Nominal 90%; 300 draws, 3 SD. A normal interval at n = 8 and risk .1 covers about half."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(300):
        second = rng.random(n) < 0.8  # audited at .4 against .1, half of all rows
        wrong = rng.random(n) < np.where(second, 0.15, 0.05)
        found = hajek_risk(wrong, np.where(second, 0.4, 0.1), level=0.9)
        covered += found.low <= 0.1 <= found.high
        assert found.method in ("betting", "clopper-pearson")
    assert covered / 300 >= 0.9 - 3 * (0.09 / 300) ** 0.5


def test_only_a_design_of_one_chance_gives_the_exact_interval() -> None:
    """Equal chances of the rows that were drawn say nothing of rows that were not."""
    wrong, equal = np.array([1, 0, 0, 0, 1, 0, 0, 0]), np.full(8, 0.1)
    found = hajek_risk(wrong, equal, floor=0.1, ceiling=0.1)
    assert (found.value, found.method, found.n_effective) == (0.25, "clopper-pearson", 8)
    assert (found.low, found.high) == clopper_pearson(2, 8)
    assert naive_risk(wrong).value == 0.25
    rarer = [hajek_risk(wrong, equal, floor=floor) for floor in (0.1, 0.05, 0.02)]
    assert all(one.method == "betting" and one.value == 0.25 for one in rarer)
    assert found.high < rarer[0].high < rarer[1].high <= rarer[2].high
    for design in ({"floor": 0.2}, {"ceiling": 0.05}, {"floor": 0.5, "ceiling": 0.2}, {"floor": 0.0}):
        with pytest.raises(InputError):
            hajek_risk(wrong, equal, **design)


# Share, chance of review and risk of every kind of row, and how many are served.
DESIGNS = {
    "a rare kind of 100": (100, [(0.2, 1, 0), (0.8, 0.02, 1)]),
    "a rare kind of 150": (150, [(0.3, 1, 0.01), (0.7, 0.02, 0.3)]),
    "2% of 1,000": (1000, [(0.98, 0.5, 0.01), (0.02, 0.02, 0.9)]),
    "2% of 1,000, three chances": (1000, [(0.49, 0.5, 0.01), (0.49, 0.25, 0.01), (0.02, 0.02, 0.9)]),
    "2% of 3,000, three chances": (3000, [(0.49, 0.5, 0.01), (0.49, 0.25, 0.01), (0.02, 0.02, 0.9)]),
    "most at the floor": (400, [(0.6, 0.02, 0.05), (0.4, 1, 0.4)]),
    "3% of 2,000": (2000, [(0.9, 0.1, 0.02), (0.07, 0.5, 0.2), (0.03, 0.02, 0.5)]),
    "deferred more often": (5000, [(0.95, 0.02, 0.01), (0.05, 0.6, 0.5)]),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DESIGNS)
def test_hajek_holds_for_rows_that_were_not_drawn(name: str) -> None:
    """Missed in at most 5% of 300 draws, with the floor of the plan and with that of the rows served."""
    n, kinds = DESIGNS[name]
    share, chance, risk = np.array(kinds).T
    truth, rng, missed = float(share @ risk), np.random.default_rng(0), np.zeros(2)
    for _ in range(300):
        kind = rng.choice(share.size, n, p=share)
        drawn, wrong = rng.random(n) < chance[kind], rng.random(n) < risk[kind]
        e = chance[kind]
        for i, design in enumerate(({"floor": 0.02}, {"floor": e.min(), "ceiling": e.max()})):
            found = hajek_risk(wrong[drawn], e[drawn], **design)
            missed[i] += found.value is not None and not found.low <= truth <= found.high
    show("Hájek's risk", name, "missed in at most .05", missed / 300, 300)
    assert (missed / 300 <= 0.05 + 3 * (0.05 * 0.95 / 300) ** 0.5).all()


def test_the_status_knows_the_chances_of_rows_that_were_not_drawn() -> None:
    """Ten audited exits of one chance among exits of a rarer one: no plain share of ten."""
    n = 400
    rare = np.arange(n) >= 200
    wrong = np.where(np.arange(n) < 10, 0.0, np.nan)
    rows = rows_of(n, wrong=wrong, exited=np.ones(n, bool), propensity=np.where(rare, 0.02, 0.5))
    evidence, before = Evidence(alpha=ALPHA), TriggerState(since=0.0)
    found, _ = assess(rows, MonitorConfig(alpha=ALPHA), now=1e3, triggers_before=before, evidence=evidence)
    assert found.exit_risk.method == found.stage_a_error.method == "betting"
    assert found.exit_risk.high > clopper_pearson(0, 10)[1]
    same = dataclasses.replace(rows, propensity=np.full(n, 0.5))
    found, _ = assess(same, MonitorConfig(alpha=ALPHA), now=1e3, triggers_before=before, evidence=evidence)
    assert found.exit_risk.method == "clopper-pearson"


def test_estimates_are_the_sums_they_are_named_for() -> None:
    wrong, e = np.array([1, 0, 1, 0.0, np.nan, np.nan]), np.array([0.1, 0.5, 0.8, 0.2, 0.1, 0.9])
    known = ~np.isnan(wrong)
    found = hajek_risk(wrong[known], e[known])
    assert found.value == pytest.approx((10 + 1.25) / (10 + 2 + 1.25 + 5))
    assert found.n_effective == pytest.approx(18.25**2 / (100 + 4 + 1.25**2 + 25))
    assert horvitz_thompson_risk(wrong, e).value == pytest.approx(11.25 / 6)
    assert "above 1" in horvitz_thompson_risk(wrong, e).note


@pytest.mark.parametrize("n", [1, 20, 300])
def test_both_ends_of_a_risk_leave_out_the_same_share(n: int) -> None:
    """The share of right answers has the interval of the share of wrong ones from the other side."""
    rng = np.random.default_rng(n)
    wrong, e = (rng.random(n) < 0.3).astype(float), rng.choice([0.1, 0.5, 0.8], n)
    for risk in (
        lambda one: hajek_risk(one, e, floor=0.1),
        lambda one: horvitz_thompson_risk(one, np.ones(n)),
        naive_risk,
    ):
        found, other = risk(wrong), risk(1 - wrong)
        assert (1 - other.high, 1 - other.low) == pytest.approx((found.low, found.high), abs=1e-9)


def test_labels_that_are_still_to_come_pull_horvitz_thompson_down_and_not_hajek() -> None:
    rng = np.random.default_rng(3)
    n = 4000
    e = np.where(rng.random(n) < 0.5, 0.2, 0.8)
    wrong = np.where(rng.random(n) < e, (rng.random(n) < 0.3).astype(float), np.nan)
    wrong[rng.random(n) < 0.5] = np.nan  # half of the labels are late
    known = ~np.isnan(wrong)
    assert hajek_risk(wrong[known], e[known]).value == pytest.approx(0.3, abs=0.05)
    assert horvitz_thompson_risk(wrong, e).value == pytest.approx(0.15, abs=0.03)


def test_where_nothing_is_labelled_nothing_is_known() -> None:
    for found in (hajek_risk([], []), naive_risk([]), horvitz_thompson_risk([np.nan], [0.5])):
        assert (found.value, found.low, found.high, found.method) == (None, None, None, "none")
        assert found.note


@pytest.mark.parametrize(
    ("wrong", "e", "said"),
    [([0.5], [0.5], "wrong must be 0 or 1"), ([1], [0.0], r"propensity must be in \(0, 1\]"), ([1, 0], [0.5], "shape")],
)
def test_bad_labels_are_refused(wrong, e, said) -> None:
    with pytest.raises(InputError, match=said):
        hajek_risk(wrong, e)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": np.full(10, 1.2)}, r"score must be in \[0, 1\], got 1.2 in row 0"),
        ({"propensity": np.zeros(10)}, r"propensity must be in \(0, 1\]"),
        ({"propensity": np.full(10, np.nan)}, "propensity"),
        ({"wrong": np.full(10, 2.0)}, "wrong must be"),
        ({"time": np.arange(10.0)[::-1]}, "never run backwards"),
        ({"exited": np.ones(9, bool)}, r"exited must have shape \[10\], got \[9\]"),
        ({"label": np.ones(10, int)}, "given together"),
    ],
)
def test_bad_rows_are_refused(change, said) -> None:
    with pytest.raises(InputError, match=said):
        rows_of(**change)


# ---------------------------------------------------------------------------- scores alone


def test_scores_alone_see_a_covariate_shift_and_are_blind_to_a_concept_shift(simulation) -> None:
    """CBPE and drift detectors never replace audits: risk .014 -> .106 at the same scores moves neither."""
    none, concept, covariate = simulation.blindness(2)
    assert concept["true_risk"] > 4 * ALPHA
    assert concept["cbpe"] == none["cbpe"] < ALPHA
    assert concept["cbpe_above_alpha"] == concept["drifting"] == none["drifting"] == 0
    assert covariate["cbpe_above_alpha"] == covariate["drifting"] == covariate["runs"]
    assert covariate["cbpe"] == pytest.approx(covariate["true_risk"], abs=0.005)


def test_cbpe_is_the_mean_doubt_over_exits() -> None:
    found = cbpe([0.9, 0.8, 0.1], [True, True, False])
    assert found.value == pytest.approx(0.15)
    assert (found.low, found.n) == (0, 2)
    assert cbpe([0.9], [False]).value is None
    with pytest.raises(InputError, match="confidence must be in"):
        cbpe([1.1], [True])


def test_drift_is_a_function_of_rows_and_seed() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.beta(9, 1, 1500), rng.beta(5, 2, 700)])
    found = drift(values)
    assert found == drift(values)
    assert found.drifting
    assert all(any(place >= 1500 for place in places) for places in found.changes.values())
    assert not drift(values[:1500]).drifting
    assert not drift(np.full(500, 0.9)).drifting
    assert drift([]).n == 0
    # A change long ago is over.
    assert not drift(values, DriftConfig(recent=10)).drifting


def test_without_river_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "river.drift", None)
    with pytest.raises(DependencyError, match=r"stage1_pro\[continual\]"):
        drift([0.5])


def test_rolling_figures_are_those_of_the_last_labels() -> None:
    label = np.array([0, 1] * 60)
    predicted = label.copy()
    predicted[:20] = 1 - predicted[:20]  # long ago
    predicted[-3:] = 1 - predicted[-3:]
    found = rolling(predicted, label)
    assert found.accuracy_10 == pytest.approx(0.7)
    assert found.mcc_100 == pytest.approx(0.94, abs=0.001)
    assert rolling(label[:9], label[:9]) == rolling([], []).model_copy(update={"n": 9})


# ---------------------------------------------------------------------------- triggers


def ask(state, now, **signals):
    return triggers(state, Signals(**signals), alpha=ALPHA, now=now, config=TriggerConfig())


def test_a_training_waits_for_labels_and_forgets_no_alarm_meanwhile() -> None:
    state = TriggerState(since=0.0)
    for now in (100.0, 200.0):
        state, verdict = ask(state, now, alarm_at=90.0, missing="12 of 50 to certify")
        assert (verdict.train, verdict.reasons, verdict.waiting) == (False, [], ["risk alarm"])
        assert verdict.missing == "12 of 50 to certify"
    hand, by_hand = ask(state, 250.0, alarm_at=90.0, missing="12 of 50 to certify", manual=True)
    assert by_hand.train and by_hand.reasons == ["risk alarm", "manual"]
    # That round came to nothing: the alarm still asks, a cooldown later.
    assert ask(hand, 250.0 + 2 * 86400, alarm_at=90.0)[1].reasons == ["risk alarm"]
    state, verdict = ask(state, 300.0, alarm_at=90.0)
    assert verdict.train and verdict.reasons == ["risk alarm"] and state.alarm_seen == 90.0
    assert not ask(state, 300.0 + 2 * 86400, alarm_at=90.0)[1].train


HIGH = Cbpe(value=0.05, low=0.04, high=0.06, level=0.95, n=500)
MIDDLE = Cbpe(value=0.019, low=0.01, high=0.03, level=0.95, n=500)
LOW = Cbpe(value=0.01, low=0.005, high=0.015, level=0.95, n=500)
START = TriggerState(since=0.0)


@pytest.mark.parametrize(
    ("signals", "reason"),
    [
        ({"alarm_at": 5.0}, "risk alarm"),
        ({"cbpe": HIGH, "drifting": True}, "confidence and drift"),
        ({"new_labels": 500}, "labels"),
        ({"manual": True}, "manual"),
    ],
)
def test_each_harm_asks_for_a_training(signals, reason) -> None:
    _, verdict = ask(START, 10.0, **signals)
    assert verdict.train
    assert verdict.reasons == [reason]


def test_age_asks_for_a_training() -> None:
    assert not ask(START, 30 * DAY - 1)[1].train
    assert ask(START, 30 * DAY)[1].reasons == ["age"]


def test_drift_alone_only_raises_the_audit_rate_and_holds_it() -> None:
    state, verdict = ask(START, 10.0, drifting=True, cbpe=LOW)
    assert not verdict.train
    assert verdict.audit_rate == 0.3
    state, verdict = ask(state, 10.0 + 2 * DAY, cbpe=LOW)
    assert verdict.audit_rate == 0.3
    state, verdict = ask(state, 11.0 + 2 * DAY, cbpe=LOW)
    assert verdict.audit_rate == 0.1
    assert not ask(START, 10.0, cbpe=HIGH)[1].train  # nor does CBPE without drift


def test_hysteresis_asks_once_for_each_harm() -> None:
    state, verdict = ask(START, 10.0, alarm_at=5.0, cbpe=HIGH, drifting=True)
    assert verdict.reasons == ["risk alarm", "confidence and drift"]
    # The same alarm and the same shift ask no more, however long they last.
    state, verdict = ask(state, 3 * DAY, alarm_at=5.0, cbpe=HIGH, drifting=True)
    assert not verdict.reasons + verdict.waiting
    # Below alpha but not well: still the same shift.
    state, _ = ask(state, 4 * DAY, alarm_at=5.0, cbpe=MIDDLE)
    assert not ask(state, 5 * DAY, cbpe=HIGH, drifting=True)[1].train
    state, _ = ask(state, 5 * DAY, cbpe=LOW)
    assert ask(state, 6 * DAY, cbpe=HIGH, drifting=True)[1].reasons == ["confidence and drift"]
    assert ask(state, 6 * DAY, alarm_at=5 * DAY)[1].reasons == ["risk alarm"]


def test_an_alarm_that_stands_asks_again_with_new_labels_and_no_other_one_does() -> None:
    state, verdict = ask(START, 10.0, alarm_at=5.0, new_labels=249)
    assert verdict.reasons == ["risk alarm"]
    # Half of min_labels since that training, under the same champion; without them, never.
    state, verdict = ask(state, 90 * DAY / 4, alarm_at=5.0, new_labels=249)
    assert not verdict.reasons + verdict.waiting
    waiting, verdict = ask(state, 25 * DAY, alarm_at=5.0, new_labels=250, missing="12 of 50 to certify")
    assert (verdict.train, verdict.waiting) == (False, ["alarm stands"])
    # A round by hand that lacked something came to nothing, and did not use these labels up.
    hand, verdict = ask(waiting, 25 * DAY, alarm_at=5.0, new_labels=250, missing="12 of 50 to certify", manual=True)
    assert verdict.train and hand.trained_at == waiting.trained_at
    state, verdict = ask(hand, 26 * DAY, alarm_at=5.0, new_labels=251)
    assert verdict.train and verdict.reasons == ["alarm stands"] and state.trained_at == 26 * DAY
    assert not ask(state, 29 * DAY, alarm_at=5.0, new_labels=249)[1].train
    assert not ask(START, 10.0, new_labels=499)[1].train
    # A new alarm is one, not one that stands.
    assert ask(state, 29 * DAY, alarm_at=28 * DAY, new_labels=250)[1].reasons == ["risk alarm"]
    often = TriggerConfig(again_labels=20)
    _, verdict = triggers(state, Signals(alarm_at=5.0, new_labels=20), alpha=ALPHA, now=29 * DAY, config=often)
    assert verdict.reasons == ["alarm stands"]


def test_a_cooldown_makes_reasons_wait_but_not_a_wish_by_hand() -> None:
    state, _ = ask(START, 10.0, manual=True)
    state, verdict = ask(state, 20.0, alarm_at=15.0)
    assert not verdict.train
    assert verdict.waiting == ["risk alarm"]
    assert ask(state, 30.0, manual=True, alarm_at=15.0)[1].train
    _, verdict = ask(state, 10.0 + DAY, alarm_at=15.0)
    assert verdict.reasons == ["risk alarm"]
    with pytest.raises(InputError, match="clock runs backwards"):
        ask(state, 5.0)
    with pytest.raises(ValueError, match="greater than or equal to 0.02"):
        TriggerConfig(audit_rate=0.01)


# ---------------------------------------------------------------------------- how many audits


def test_the_plan_of_the_notes_is_reproduced() -> None:
    """.02 -> .04 takes about 391 audited exits: one look, level .05, power .8, normal approximation."""
    assert normal_audits(0.02, 0.04, 0.05, 0.8) == 391


@pytest.mark.parametrize(("alpha", "risk"), [(0.02, 0.04), (0.02, 0.1), (0.1, 0.2)])
def test_exact_audits_are_those_of_the_binomial_test(alpha, risk) -> None:
    found = exact_audits(alpha, risk, 0.05, 0.8)

    def power(n: int) -> float:
        limit = binom.isf(0.05, n, alpha) + 1  # the smallest k with P(X >= k) <= .05
        return float(binom.sf(limit - 1, n, risk))

    assert power(found - 1) < 0.8
    assert min(power(n) for n in range(found, 2 * found)) >= 0.8


def test_the_plan_of_the_e_process_is_the_share_that_alarms() -> None:
    plan = plan_audits(0.02, harms=[0.1], exit_rate=0.5, audit_rate=0.2, runs=400)
    (harm,) = plan.harms
    assert harm.n_exact <= harm.n_anytime
    assert harm.decisions == harm.n_anytime * 10
    rng = np.random.default_rng(99)
    found = 0
    for _ in range(300):
        evidence = Evidence(alpha=0.02)
        wrong = rng.random(harm.n_anytime) < 0.1
        found += evidence.after(wrong, propensity=np.ones(wrong.size), time=np.arange(wrong.size)).alarm
    assert found / 300 == pytest.approx(0.8, abs=4 * (0.16 / 300) ** 0.5 + 4 * (0.16 / 400) ** 0.5)
    assert "any time" in render(plan)
    assert plan == plan_audits(0.02, harms=[0.1], exit_rate=0.5, audit_rate=0.2, runs=400)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"harms": [0.01]}, "harms must be inside"), ({"audit_rate": 0.01}, "audit_rate must be"),
        ({"power": 1.0}, "power must be"), ({"exit_rate": 0.0}, "exit_rate must be"), ({"runs": 5}, "runs must be"),
    ],
)  # fmt: skip
def test_bad_plans_are_refused(change, said) -> None:
    with pytest.raises(InputError, match=said):
        plan_audits(**({"alpha": 0.02} | change))


# ---------------------------------------------------------------------------- status, page, metrics


@pytest.fixture(scope="module")
def harmed() -> tuple[ServedColumns, Status]:
    """A watched stream that goes wrong, with everything that a status can show."""
    rng = np.random.default_rng(2)
    n = 1500
    score = rng.beta(12, 1, n)
    out = score >= 0.9
    chance = np.where(out, 0.3, 0.8)
    wrong_rate = np.where(np.arange(n) < 800, 0.01, 0.15)
    wrong = np.where(rng.random(n) < chance, (rng.random(n) < wrong_rate).astype(float), np.nan)
    label = np.where(np.isnan(wrong), -1, rng.integers(0, 2, n))
    predicted = np.where(label < 0, 0, np.where(wrong == 1, 1 - label, label))
    rows = ServedColumns(
        time=1.7e9 + 3600.0 * np.arange(n), exited=out, wrong=wrong, propensity=chance, score=score,
        predicted=predicted, label=label,
    )  # fmt: skip
    controller = ThresholdController(ControllerConfig(alpha=ALPHA, certified=0.9, audit_rate=0.3, floor=0.3))
    status, _ = assess(
        rows,
        MonitorConfig(alpha=ALPHA, floor=0.3),
        now=float(rows.time[-1]),
        triggers_before=TriggerState(since=1.7e9),
        evidence=feed(Evidence(alpha=ALPHA, reference=0.3, floor=0.3), rows),
        new_labels=3,
        controller=controller.state,
        bundle="ab" * 32,
    )
    return rows, status


def test_status_says_what_is_known(harmed, tmp_path) -> None:
    rows, status = harmed
    assert status.health == "alarm"
    assert status.verdict.reasons == ["risk alarm", "age"]
    audited = rows.audited
    assert status.exit_risk.n == audited.sum()
    assert status.exit_risk.value == pytest.approx(rows.wrong[audited].mean())
    assert status.evidence.alarm_at > rows.time[800]
    # No policy is known: nothing is said of one.
    assert "The threshold is the calibrated one." in status.sentences
    assert not re.search("promis|certif|policy", " ".join(status.sentences))
    status.write(tmp_path / "status.json")
    assert Status.read(tmp_path / "status.json") == status


@pytest.mark.parametrize(
    ("n", "wrong", "health"),
    [(400, 0, "holds"), (20, 0, "not shown"), (60, 2, "watch"), (60, 10, "alarm"), (0, 0, "not shown")],
)
def test_health_is_what_the_interval_shows(n, wrong, health) -> None:
    def seen(rows: ServedColumns) -> Status:
        evidence = feed(Evidence(alpha=ALPHA, reference=0.5, floor=0.5), rows)
        before = TriggerState(since=0.0)
        config = MonitorConfig(alpha=ALPHA, floor=0.5)
        status, _ = assess(rows, config, now=1e3, triggers_before=before, evidence=evidence)
        return status

    assert seen(rows_of(n, wrong=np.arange(n) < wrong, score=np.full(n, 0.995))).health == health
    drifting = seen(rows_of(n, score=np.full(n, 0.9)))
    assert drifting.health == ("watch" if n == 400 else "not shown")  # confidences of few exits say little


def test_the_page_stands_alone_and_says_it_at_a_glance(harmed, tmp_path) -> None:
    rows, status = harmed
    write_page(tmp_path / "status.html", status, rows)
    text = (tmp_path / "status.html").read_text()
    assert status.headline in text
    assert "verdict exceeded" in text
    assert text.count("data:image/png;base64,") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    write_page(tmp_path / "empty.html", status, rows_of(0))
    assert "No decision has been served yet" in (tmp_path / "empty.html").read_text()


def test_the_page_in_a_browser_is_no_wider_than_a_phone(harmed, tmp_path) -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH to show the page in")
    rows, status = harmed
    write_page(tmp_path / "status.html", status, rows)
    root, drawn = "document.documentElement.scrollWidth", "[...document.images].every((one) => one.naturalWidth > 0)"
    measured = f"[{root}, innerWidth, {drawn}]"
    probe = (
        f"<script>onload = () => {{document.title = 'PROBE' + JSON.stringify({measured}) + 'PROBE'}}</script></body>"
    )
    page = tmp_path / "status.html"
    page.write_text(page.read_text().replace("</body>", probe))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=500,900", "--virtual-time-budget=20000",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    width, inner, drawn = json.loads(done.stdout.split("PROBE[")[1].split("]PROBE")[0].join("[]"))
    assert width <= inner
    assert drawn


def test_prometheus_reads_every_metric_and_unknown_figures_are_left_out(harmed, tmp_path) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    _, status = harmed
    found = {family.name: family for family in text_string_to_metric_families(exposition(status).decode())}
    assert set(found) == set(METRICS)
    assert {name: family.samples[0].value for name, family in found.items()} == dict(samples(status))
    assert found["stage1_alarm"].samples[0].labels == {"bundle": "ab" * 6}
    assert all(family.documentation == METRICS[name][0] for name, family in found.items())
    nothing, fresh = rows_of(0), TriggerState(since=0.0)
    evidence = Evidence(alpha=ALPHA)
    fewer, _ = assess(nothing, MonitorConfig(alpha=ALPHA), now=0.0, triggers_before=fresh, evidence=evidence)
    assert "stage1_exit_risk " not in exposition(fewer).decode()
    assert set(dict(samples(fewer))) < set(METRICS)
    write_textfile(tmp_path / "stage1.prom", status)
    assert (tmp_path / "stage1.prom").read_bytes() == exposition(status)
    with pytest.raises(InputError, match=r"\.prom"):
        write_textfile(tmp_path / "stage1.txt", status)


def test_the_dashboard_draws_metrics_that_exist() -> None:
    board = json.loads(json.dumps(dashboard()))
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for text in expressions for name in re.findall(r"stage1_\w+", text)}
    assert named == set(METRICS)  # every metric is drawn, and no other
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert all(len({t["refId"] for t in panel["targets"]}) == len(panel["targets"]) for panel in board["panels"])
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert all(x + w <= 24 for x, _, w, _ in places)
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))) == set(variables)
    assert "label_values(stage1_alpha, bundle)" in json.dumps(variables["bundle"])


# ---------------------------------------------------------------------------- alerts

ALERT = Alert(time=1.0, kind="alarm", title="harm", text="exits are wrong", figures={"risk": 0.1})


@pytest.mark.parametrize(
    ("given", "delivered", "tries"),
    [([], True, 1), ([500, 429], True, 3), ([500, 500, 500], False, 3), ([404], False, 1), ([302], False, 1)],
)
def test_a_webhook_tries_again_where_that_can_help(hook, given, delivered, tries) -> None:
    url, got, answers = hook
    answers += given
    found = Webhook(url, wait=0.01).send(ALERT)
    assert (found.delivered, found.tries) == (delivered, tries)
    assert found.hook == "127.0.0.1"
    assert "s3cret" not in found.model_dump_json()
    assert len(got) == tries
    assert all(Alert.parse(body.decode(), "alert") == ALERT for body in got)
    assert found.reason == ("" if delivered else f"HTTP {given[-1]}")


def test_a_webhook_that_hangs_or_is_not_there_raises_nothing(hook) -> None:
    url, _, answers = hook
    answers.append(0)
    slow = Webhook(url, timeout=0.2, tries=1).send(ALERT)
    gone = Webhook("http://127.0.0.1:9/x", tries=2, wait=0.01).send(ALERT)
    assert not slow.delivered
    assert "timed out" in slow.reason
    assert (gone.delivered, gone.tries) == (False, 2)
    assert "refused" in gone.reason


def test_a_command_gets_the_alert_and_no_shell_reads_it(tmp_path) -> None:
    keep = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.stdin.read())"
    target = tmp_path / "got; touch evil"
    found = Program((sys.executable, "-c", keep, str(target))).send(ALERT)
    assert found.delivered
    assert Alert.parse(target.read_text(), "alert") == ALERT
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_commands_that_fail_hang_or_do_not_exist_raise_nothing(tmp_path) -> None:
    mark = tmp_path / "grandchild"
    hang = f"import subprocess, time; subprocess.Popen(['sh', '-c', 'sleep 2; touch {mark}']); time.sleep(60)"
    began = time.monotonic()
    failed = Program((sys.executable, "-c", "import sys; sys.exit('no mail today')")).send(ALERT)
    hung = Program((sys.executable, "-c", hang), timeout=0.7).send(ALERT)
    missing, deaf = (Program((name,)).send(ALERT) for name in ("no-such-program", "true"))
    assert time.monotonic() - began < 30
    assert (failed.delivered, failed.reason) == (False, "exit code 1: no mail today")
    assert (hung.delivered, hung.reason) == (False, "killed after 0.7 s")
    assert not missing.delivered
    assert "No such file" in missing.reason
    assert deaf.delivered  # it never read what it was given
    time.sleep(2)
    assert not mark.exists()  # what it started was killed with it


def test_an_address_that_cannot_be_one_is_reported_without_its_secret() -> None:
    found = Webhook("http://127.0.0.1:9/T0P SECRET", tries=1).send(ALERT)
    assert not found.delivered and "SECRET" not in found.reason and "T0P" not in found.reason


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://x/y", "hook", "http://"])
def test_only_http_urls_are_hooks(url) -> None:
    with pytest.raises(InputError, match="url must be http"):
        Webhook(url)


def test_bad_commands_are_refused() -> None:
    for words in ((), "rm -rf", ("a", 1)):
        with pytest.raises(InputError, match="words must be"):
            Program(words)
    with pytest.raises(InputError, match="timeout must be"):
        Program(("true",), timeout=0)
    with pytest.raises(InputError, match="must be positive"):
        Webhook("http://x", tries=0)


def test_the_base_install_watches_and_steers() -> None:
    """No torch, no database, no river, no prometheus_client: imports, a controller and a status without drift."""
    code = """
import sys
for name in ("torch", "sqlalchemy", "river", "river.drift", "prometheus_client", "pyarrow"):
    sys.modules[name] = None
import numpy as np
from stage1_pro.continual.watch import alerts
from stage1_pro.continual.watch import monitor
from stage1_pro.continual.watch import power
from stage1_pro.continual.watch import srt
from stage1_pro.continual.watch import status
rows = monitor.ServedColumns(np.arange(3.0), np.ones(3, bool), np.zeros(3), np.ones(3), np.ones(3))
config = status.MonitorConfig(alpha=.02)
before, evidence = monitor.TriggerState(since=0.0), monitor.Evidence(alpha=.02)
found, _ = status.assess(rows, config, now=3.0, triggers_before=before, evidence=evidence)
assert found.drift is None
srt.ThresholdController(srt.ControllerConfig(alpha=.02, certified=.9))
try:
    status.exposition(found)
except Exception as error:
    assert "stage1_pro[continual]" in str(error)
else:
    raise SystemExit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
