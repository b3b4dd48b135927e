"""The threshold that follows labels: its sums, its bound, replay to the byte, and what it keeps after a shift."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_pro.continual.watch.srt import (
    CLOSED,
    ControllerConfig,
    ControllerState,
    Feedback,
    ThresholdController,
    to_logit,
    to_score,
)
from stage1_pro.errors import InputError

CONFIG = ControllerConfig(alpha=0.02, certified=0.9, audit_rate=0.1, floor=0.1)

items = st.builds(
    Feedback,
    known=st.floats(0, 1e6),
    event=st.uuids().map(str),
    score=st.floats(0, 1),
    wrong=st.booleans(),
    exited=st.booleans(),
    propensity=st.sampled_from([0.1, 0.3, 0.5, 1.0]),
)
logs = st.lists(items, max_size=120, unique_by=lambda item: (item.known, item.event))
configs = st.builds(
    ControllerConfig,
    alpha=st.sampled_from([0.01, 0.02, 0.2]),
    certified=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
    step=st.sampled_from([0.1, 0.35, 3.0]),
    audit_rate=st.just(0.1),
    floor=st.just(0.1),
    highest=st.sampled_from([5.0, 12.0]),
    window=st.sampled_from([5, 60]),
    pull=st.sampled_from([0.0, 0.01, 0.5]),
    every=st.sampled_from([1, 7]),
)


@pytest.fixture
def simulation(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "benchmarks")
    import continual_monitor

    return continual_monitor


def draw_log(n: int, seed: int = 0, error: float = 0.1) -> list[Feedback]:
    rng = np.random.default_rng(seed)
    return [
        Feedback(float(known), f"e{place:05d}", float(score), bool(wrong), bool(exited), float(propensity))
        for place, (known, score, wrong, exited, propensity) in enumerate(
            zip(rng.integers(0, n // 3, n), rng.beta(8, 1, n), rng.random(n) < error, rng.random(n) < 0.7,
                rng.choice([0.1, 0.3, 1.0], n), strict=True)
        )
    ]  # fmt: skip


# ---------------------------------------------------------------------------- sums and bounds


def feedback_risk(state: ControllerState) -> float:
    """Weighted share of wrong answers among the items that would have exited when their label came."""
    return state.weight_wrong / state.weight_trials


def risk_bound(state: ControllerState) -> float:
    """Upper bound of ``feedback_risk`` by the telescoping sum, for any labels.

    alpha + (u_max - u_min + step w) / (step W) with W = ``weight_trials`` and w the largest weight, plus what the
    centre has loosened and what clips at u_max took back. Without either it is the bound of the notes.
    """
    config = state.config
    reach = config.highest - to_logit(config.certified) + config.step * config.audit_rate / config.floor
    loosened = max(-(state.from_centre + state.from_alarms + min(state.from_clips, 0.0)), 0.0)
    return config.alpha + (reach + loosened) / (config.step * state.weight_trials)


@settings(deadline=None, max_examples=150)
@given(configs, logs)
def test_every_move_of_the_threshold_is_accounted_for(config: ControllerConfig, log: list[Feedback]) -> None:
    controller = ThresholdController(config)
    start = to_logit(config.certified)
    for item in sorted(log):
        controller.update([item])
        # Nothing ever takes it below the certificate.
        assert start <= controller.state.u <= config.highest
    state = controller.state
    told = state.from_feedback + state.from_centre + state.from_alarms + state.from_clips
    assert state.u - start == pytest.approx(told, abs=1e-9)
    owed = config.step * (state.weight_wrong - config.alpha * state.weight_trials)
    assert state.from_feedback == pytest.approx(owed, abs=1e-9)
    assert config.certified <= state.threshold <= CLOSED
    if state.n_trials:
        assert feedback_risk(state) <= risk_bound(state) + 1e-9


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.floats(0.3, 1), st.booleans()), min_size=1, max_size=400), st.integers(0, 2**32))
def test_risk_is_alpha_up_to_the_reach_of_the_threshold(log: list[tuple[float, bool]], seed: int) -> None:
    """|selective risk - alpha| <= (u_max - u_min + eta') / (eta' N), whatever the labels; an adversary chooses them."""
    rng = np.random.default_rng(seed)
    alpha, step, highest = 0.1, 0.5, 6.0
    config = ControllerConfig(
        alpha=alpha, certified=0.05, step=step, highest=highest, pull=0.0, audit_rate=1.0, floor=1.0, delta=1e-12
    )
    controller = ThresholdController(config)
    for place, (score, wrong) in enumerate(log):
        # Half of the labels are what pushes the threshold farthest out.
        worst = controller.state.u > 2 if rng.random() < 0.5 else wrong
        controller.update([Feedback(float(place), "x", score, bool(worst), False, 1.0)])
    state = controller.state
    if state.n_trials == 0:
        return
    reach = (highest - to_logit(config.certified) + step) / (step * state.n_trials)
    assert feedback_risk(state) - alpha <= reach + 1e-9
    if state.from_clips <= 1e-12:  # the certificate has not stopped it from loosening
        assert alpha - feedback_risk(state) <= reach + 1e-9


def test_bound_shrinks_with_the_number_of_trials_and_is_reached_by_nothing_but_errors() -> None:
    config = ControllerConfig(alpha=0.02, certified=0.5, step=0.35, pull=0.0, delta=1e-12, floor=1.0)
    controller = ThresholdController(config)
    count = 0
    while controller.state.threshold < CLOSED:
        controller.update([Feedback(float(count), "x", 1.0, True, False, 1.0)])
        count += 1
    # Nothing but errors: it closes after (u_max - u_min) / (eta' (1 - alpha)) of them.
    assert count == math.ceil(12.0 / (0.35 * 0.98))
    assert feedback_risk(controller.state) == 1.0 <= risk_bound(controller.state)


def test_a_step_is_eta_times_wrong_minus_alpha_over_alpha_weighted_by_propensities() -> None:
    """The notes' step: eta (wrong - alpha) / alpha (e_exit / e_i), with eta = step alpha."""
    for wrong, propensity in itertools.product((True, False), (0.1, 0.4)):
        config = ControllerConfig(alpha=0.02, certified=0.5, audit_rate=0.1, floor=0.05, pull=0.0)
        controller = ThresholdController(config)
        controller.update([Feedback(0.0, "first", 0.99, True, True, 0.1)])
        before = controller.state.u
        controller.update([Feedback(1.0, "second", 0.99, wrong, False, propensity)])
        eta = 0.35 * 0.02
        assert controller.state.u - before == pytest.approx(eta * (wrong - 0.02) / 0.02 * 0.1 / propensity)


def test_what_would_not_exit_now_moves_nothing_but_the_window() -> None:
    controller = ThresholdController(CONFIG)
    controller.update([Feedback(0.0, "a", 0.8, True, True, 0.1)])
    state = controller.state
    assert (state.u, state.n, state.n_trials, state.evidence.n) == (to_logit(0.9), 1, 0, 0)
    assert len(controller._window) == 1


def test_right_answers_never_loosen_it_past_the_certificate() -> None:
    controller = ThresholdController(CONFIG)
    controller.update(Feedback(float(k), f"{k}", 0.99, False, True, 0.1) for k in range(2000))
    assert controller.state.threshold == 0.9
    assert controller.state.u == to_logit(0.9)


# ---------------------------------------------------------------------------- replay


@settings(deadline=None, max_examples=60)
@given(configs, logs, st.randoms(use_true_random=False))
def test_any_order_and_any_batches_give_the_same_bytes(config, log, random) -> None:
    expected = ThresholdController.replay(config, log).state
    shuffled = list(log)
    random.shuffle(shuffled)
    assert ThresholdController.replay(config, shuffled).state.fingerprint() == expected.fingerprint()
    # As it happened: batch by batch.
    controller = ThresholdController(config)
    known = sorted(log)
    while known:
        size = random.randint(1, len(known))
        batch, known = known[:size], known[size:]
        random.shuffle(batch)
        controller.update(batch)
    assert controller.state.model_dump_json() == expected.model_dump_json()
    assert controller.state.fingerprint() == expected.fingerprint()


def test_replay_of_a_long_log_with_late_labels_is_equal_to_the_byte() -> None:
    log = draw_log(1500)
    live = ThresholdController(CONFIG)
    by_time = sorted(log)
    for start in range(0, len(by_time), 37):
        live.update(by_time[start : start + 37])
    again = ThresholdController.replay(CONFIG, reversed(log))
    assert json.dumps(live.state.model_dump(mode="json")) == json.dumps(again.state.model_dump(mode="json"))
    assert live.state.alarms > 0
    surest = max(log, key=lambda item: item.score)
    others = [item for item in log if item is not surest]
    other = ThresholdController.replay(CONFIG, [dataclasses.replace(surest, wrong=not surest.wrong), *others])
    assert other.state.fingerprint() != again.state.fingerprint()


def test_labels_from_before_the_last_one_and_events_twice_are_refused_whole() -> None:
    controller = ThresholdController(CONFIG)
    controller.update([Feedback(5.0, "a", 0.99, True, True, 0.1)])
    before = controller.state.fingerprint()
    fine = Feedback(6.0, "b", 0.99, True, True, 0.1)
    for bad in (
        Feedback(4.0, "c", 0.99, True, True, 0.1),
        Feedback(5.0, "a", 0.99, True, True, 0.1),
        fine,
        Feedback(7.0, "d", 0.99, True, True, 0.01),
    ):
        with pytest.raises(InputError, match=r"replay the log|floor"):
            controller.update([fine, bad])
        assert controller.state.fingerprint() == before
    controller.update([fine])
    assert controller.state.n == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"certified": 1.0}, "certified must be below"),
        ({"floor": 0.5}, "floor must be at most"),
        ({"alpha": 0}, "alpha"),
    ],
)
def test_bad_configurations_are_refused(change, said) -> None:
    with pytest.raises(ValueError, match=said):
        ControllerConfig(**{**CONFIG.model_dump(), **change})


@pytest.mark.parametrize("change", [{"score": 1.5}, {"score": math.nan}, {"propensity": 0.0}, {"known": math.inf}])
def test_bad_feedback_is_refused(change) -> None:
    with pytest.raises(InputError, match=f"{next(iter(change))} must be"):
        Feedback(**{**dataclasses.asdict(Feedback(0.0, "a", 0.5, True, True, 0.5)), **change})


# ---------------------------------------------------------------------------- centre and alarm


def test_centre_is_the_laxest_threshold_that_weighted_risk_control_allows() -> None:
    config = ControllerConfig(alpha=0.1, certified=0.1, audit_rate=0.2, floor=0.1, window=300, every=300, pull=0.01)
    rng = np.random.default_rng(4)
    score, propensity = rng.random(300), rng.choice([0.1, 0.2, 0.8], 300)
    wrong = rng.random(300) < 0.5 * (1 - score)
    log = [
        Feedback(float(k), f"{k:03d}", float(score[k]), bool(wrong[k]), False, float(propensity[k])) for k in range(300)
    ]
    found = ThresholdController.replay(config, log).state.centre
    weight = 0.2 / propensity
    allowed = []
    for limit in score:
        kept = score >= limit
        if ((weight * wrong)[kept].sum() + weight.max()) / (weight[kept].sum() + weight.max()) <= 0.1:
            allowed.append(limit)
    assert (score < min(allowed)).sum() > 50  # laxer ones were not allowed
    assert found == pytest.approx(to_logit(min(allowed)))


def test_few_labels_name_no_centre() -> None:
    config = CONFIG.model_copy(update={"every": 1})
    controller = ThresholdController(config)
    controller.update(Feedback(float(k), f"{k:02d}", 0.99, False, True, 0.1) for k in range(48))
    assert controller.state.centre is None
    controller.update([Feedback(48.0, "48", 0.99, False, True, 0.1)])
    assert controller.state.centre == to_logit(0.9)


def test_an_alarm_jumps_restarts_its_evidence_and_late_labels_of_former_exits_raise_no_second_one() -> None:
    config = CONFIG.model_copy(update={"step": 1e-6, "pull": 0.0})
    controller = ThresholdController(config)
    jumps = []
    for k in range(400):
        before = controller.state
        controller.update([Feedback(float(k), f"{k:03d}", 0.95, k % 4 == 0, True, 0.1)])
        if controller.state.alarms > before.alarms:
            jumps.append((k, controller.state.u - before.u))
    ((known, jump),) = jumps
    assert controller.state.alarms == 1
    assert jump == pytest.approx(1.0, abs=1e-5)
    assert controller.state.alarm_at == known
    # Score .95 exits no more: what still comes of such exits is not held against the new threshold.
    assert controller.state.threshold > 0.95
    assert controller.state.evidence.n == 0


def test_closed_means_nobody_exits_and_reviewed_deferred_items_open_it_again() -> None:
    config = ControllerConfig(alpha=0.02, certified=0.9, audit_rate=0.1, floor=0.1, highest=4.0, every=5)
    controller = ThresholdController(config)
    controller.update(Feedback(float(k), f"{k:03d}", 0.999, True, True, 0.1) for k in range(100))
    assert controller.state.threshold == CLOSED > 1.0
    assert to_score(controller.state.u) < 1
    controller.update(Feedback(float(k), f"{k:03d}", 0.999, False, False, 0.1) for k in range(100, 1200))
    assert 0.9 <= controller.state.threshold < 0.999


# ---------------------------------------------------------------------------- what it keeps (Done when 2)


def mean_of(simulation, name: str, seeds: int, **sizes: int) -> dict[str, float]:
    found = [simulation.abrupt(name, seed, **sizes) for seed in range(seeds)]
    assert min(one["lowest"] for one in found) >= simulation.CERTIFIED
    return {key: float(np.mean([one[key] for one in found])) for key in found[0]}


def test_after_an_abrupt_shift_the_risk_is_kept_where_a_static_threshold_loses_it(simulation) -> None:
    """One seed of the controller, two of the static one; benchmarks/continual_monitor.py has twenty, all below .024."""
    sizes = {"before": 1000, "after": 6000}
    assert mean_of(simulation, "static", 2, **sizes)["risk"] >= 0.05
    every = mean_of(simulation, "all labels", 1, **sizes)
    assert every["risk"] <= 0.026
    assert every["exits"] >= 0.2


@pytest.mark.slow
def test_risk_after_an_abrupt_shift_over_ten_seeds(simulation) -> None:
    assert mean_of(simulation, "static", 10)["risk"] >= 0.05
    assert mean_of(simulation, "all labels", 10)["risk"] <= 0.026
    late = mean_of(simulation, "10% audited, late", 10)
    assert late["risk"] <= 0.035
    assert late["exits"] >= 0.2


def test_with_a_tenth_of_the_exits_audited_and_late_labels_the_risk_is_kept(simulation) -> None:
    late = mean_of(simulation, "10% audited, late", 3)
    assert late["risk"] <= 0.035
    assert late["exits"] >= 0.2


def test_a_simulated_log_replays_to_the_controller_that_served(simulation) -> None:
    rng = np.random.default_rng(9)
    one = simulation.join(simulation.stream(800, rng), simulation.stream(1500, rng, shift=simulation.HARD_SHIFT))
    config = ControllerConfig(alpha=0.02, certified=simulation.CERTIFIED, audit_rate=0.3, floor=0.3)
    _, inforce, served, log = simulation.follow(config, one, rng, exits=0.3, deferred=0.5, delay=100.0)
    assert inforce.min() >= simulation.CERTIFIED
    assert [item.event for item in log] != sorted(item.event for item in log)  # labels did come out of order
    rng.shuffle(log)
    assert ThresholdController.replay(config, log).state.fingerprint() == served.state.fingerprint()
