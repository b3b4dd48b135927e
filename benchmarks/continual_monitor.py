"""Do the monitors see harm, and does the threshold keep the risk? Simulated streams with a stated law and seeds.

    python benchmarks/continual_monitor.py --out /tmp/monitor [--runs 200] [--seeds 20]

Prints every table of benchmarks/LOG.md and writes monitor.json. No model and no photo: a stream is logits
z ~ N(4, 2) of Stage A's confidence and answers that are wrong with chance sigmoid(shift - z). At shift 0
confidences are calibrated, 72% exit at the certified threshold and 1.4% of those are wrong. A concept shift keeps the
scores and makes them wrong more often; a covariate shift moves z and keeps confidences calibrated.
"""

from __future__ import annotations

import argparse
import heapq
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from stage1_pro.continual.watch.monitor import (
    Evidence,
    ServedColumns,
    cbpe,
    drift,
    hajek_risk,
    horvitz_thompson_risk,
    naive_risk,
)
from stage1_pro.continual.watch.power import plan_audits, render
from stage1_pro.continual.watch.srt import ControllerConfig, Feedback, ThresholdController
from stage1_pro.files import write_text

ALPHA = 0.02
MEAN, SPREAD = 4.0, 2.0
# 72% of z lie above it.
CERTIFIED = float(expit(MEAN - 0.5828 * SPREAD))
# Risks of exits at the certified threshold: .068 and .106.
SHIFT, HARD_SHIFT = 1.66, 2.2
STABLE_ROWS, SHIFTED_ROWS = 2000, 1500


@dataclass(frozen=True)
class Stream:
    """Scores [N] and whether Stage A is wrong [N]."""

    score: NDArray[np.float64]
    wrong: NDArray[np.bool_]


def stream(
    n: int, rng: np.random.Generator, *, shift: float = 0.0, mean: float = MEAN, spread: float = SPREAD
) -> Stream:
    """Draw decisions after a concept shift (``shift``) or a covariate shift (``mean``, ``spread``)."""
    z = rng.normal(mean, spread, n)
    return Stream(expit(z), rng.random(n) < expit(shift - z))


def join(*parts: Stream) -> Stream:
    """One stream after another."""
    return Stream(np.concatenate([one.score for one in parts]), np.concatenate([one.wrong for one in parts]))


def audited(one: Stream, rng: np.random.Generator, *, exits: float, deferred: float = 0.0) -> ServedColumns:
    """Serve at the certified threshold and review exits and deferred rows at random, at these rates."""
    out = one.score >= CERTIFIED
    chance = np.where(out, exits, max(deferred, 1e-9))
    chosen = rng.random(out.size) < chance
    return ServedColumns(
        time=np.arange(out.size, dtype=np.float64),
        exited=out,
        wrong=np.where(chosen, one.wrong, np.nan),
        propensity=chance,
        score=one.score,
    )


# ---------------------------------------------------------------------------- monitors


def alarms(runs: int, *, audit_rate: float, shifted: bool, seed: int = 0) -> dict[str, float]:
    """Run the e-process over stable rows and, where asked, rows after a hard concept shift; count alarms of each.

    A found shift is an alarm within 1,500 decisions of it; without one the stable stream is as long.
    """
    before, found, took = 0, 0, []
    for run in range(runs):
        rng = np.random.default_rng([seed, run])
        parts = [stream(STABLE_ROWS, rng), stream(SHIFTED_ROWS, rng, shift=HARD_SHIFT if shifted else 0.0)]
        rows = audited(join(*parts), rng, exits=audit_rate)
        evidence = Evidence(alpha=ALPHA, reference=audit_rate, floor=min(audit_rate, 0.02)).after(
            rows.wrong[rows.audited], propensity=rows.propensity[rows.audited], time=rows.time[rows.audited]
        )
        if evidence.alarm_at is None:
            continue
        if shifted and evidence.alarm_at >= STABLE_ROWS:
            found += 1
            took.append(int(rows.audited[STABLE_ROWS : int(evidence.alarm_at) + 1].sum()))
        else:
            before += 1
    return {
        "audit_rate": audit_rate,
        "runs": runs,
        "false_alarms": before,
        "found": found,
        "median_audits": float(np.median(took)) if took else float("nan"),
    }


def blindness(runs: int, seed: int = 1) -> list[dict[str, Any]]:
    """Hold CBPE and river's detectors against a concept and a covariate shift: which of them move?"""
    table = []
    for title, kind in (("none", {}), ("concept", {"shift": HARD_SHIFT}), ("covariate", {"mean": 3.3, "spread": 0.6})):
        votes, high, estimates, risks = 0, 0, [], []
        single: dict[str, int] = {}
        for run in range(runs):
            rng = np.random.default_rng([seed, run])
            first, second = stream(STABLE_ROWS, rng), stream(SHIFTED_ROWS, rng, **kind)
            both = join(first, second)
            seen = drift(both.score)
            hits = {name: any(place >= STABLE_ROWS for place in places) for name, places in seen.changes.items()}
            votes += sum(hits.values()) >= 2
            for detector, hit in hits.items():
                single[detector] = single.get(detector, 0) + hit
            out = second.score >= CERTIFIED
            estimate = cbpe(second.score, out)
            high += estimate.low is not None and estimate.low > ALPHA
            estimates.append(np.nan if estimate.value is None else estimate.value)
            risks.append(float(second.wrong[out].mean()))
        table.append({
            "shift": title, "true_risk": float(np.mean(risks)), "cbpe": float(np.mean(estimates)),
            "cbpe_above_alpha": high, "drifting": votes, **single, "runs": runs,
        })  # fmt: skip
    return table


def biased_labels(runs: int, seed: int = 2) -> list[dict[str, Any]]:
    """Estimate Stage A's error over all rows from labels that come mostly from deferred ones; truth is known here."""
    found: dict[str, list[float]] = {"naive": [], "hajek": [], "horvitz-thompson": []}
    covered = dict.fromkeys(found, 0)
    truths = []
    for run in range(runs):
        rng = np.random.default_rng([seed, run])
        one = stream(2000, rng, shift=SHIFT)
        rows = audited(one, rng, exits=0.1, deferred=0.8)
        known = ~np.isnan(rows.wrong)
        truths.append(float(one.wrong.mean()))
        # The intervals speak of the law the rows were drawn from, not of these rows.
        for name, estimate in (
            ("naive", naive_risk(rows.wrong[known])),
            ("hajek", hajek_risk(rows.wrong[known], rows.propensity[known])),
            ("horvitz-thompson", horvitz_thompson_risk(rows.wrong, rows.propensity)),
        ):
            assert None not in (estimate.value, estimate.low, estimate.high)
            found[name].append(estimate.value)
            covered[name] += estimate.low <= true_error(SHIFT) <= estimate.high
    truth = true_error(SHIFT)
    return [
        {"estimate": name, "truth": truth, "mean": float(np.mean(values)), "bias": float(np.mean(values)) - truth,
         "sd": float(np.std(values)), "covered": covered[name] / runs, "runs": runs}
        for name, values in found.items()
    ]  # fmt: skip


def true_error(shift: float, *, threshold: float = 0.0) -> float:
    """P(wrong | score >= threshold) of the law itself, by a sum over z."""
    z = np.linspace(MEAN - 8 * SPREAD, MEAN + 8 * SPREAD, 200_001)
    weight = np.exp(-(((z - MEAN) / SPREAD) ** 2) / 2) * (expit(z) >= threshold)
    return float(weight @ expit(shift - z) / weight.sum())


# ---------------------------------------------------------------------------- the threshold


def follow(
    config: ControllerConfig,
    one: Stream,
    rng: np.random.Generator,
    *,
    exits: float = 1.0,
    deferred: float = 1.0,
    delay: float = 0.0,
) -> tuple[NDArray[np.bool_], NDArray[np.float64], ThresholdController, list[Feedback]]:
    """Serve a stream at the controller's threshold of the moment and feed it the labels as they become known.

    Labels come after an exponential delay of that mean, in decisions. Gives exits [N], thresholds [N] in force, the
    controller and its log.
    """
    controller = ThresholdController(config)
    threshold, log, waiting = controller.state.threshold, list[Feedback](), list[Feedback]()
    out, inforce = np.zeros(one.score.size, dtype=bool), np.empty(one.score.size)
    late = rng.exponential(delay, one.score.size) if delay else np.zeros(one.score.size)
    chosen = rng.random(one.score.size)
    for place, (score, wrong) in enumerate(zip(one.score.tolist(), one.wrong.tolist(), strict=True)):
        ready = []
        while waiting and waiting[0].known <= place:
            ready.append(heapq.heappop(waiting))
        if ready:
            controller.update(ready)
            log += ready
            threshold = controller.state.threshold
        out[place], inforce[place] = score >= threshold, threshold
        chance = exits if out[place] else deferred
        if chosen[place] < chance:
            known = place + 0.5 + float(late[place])
            heapq.heappush(waiting, Feedback(known, f"{place:08d}", score, wrong, bool(out[place]), chance))
    return out, inforce, controller, log


SCENARIOS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "static": ({}, {}),
    "all labels": ({"audit_rate": 1.0, "floor": 1.0}, {}),
    "all labels, no centre": ({"audit_rate": 1.0, "floor": 1.0, "pull": 0.0}, {}),
    "10% audited, late": ({"audit_rate": 0.1, "floor": 0.1}, {"exits": 0.1, "deferred": 0.3, "delay": 200.0}),
    "10% audited, late, no centre": (
        {"audit_rate": 0.1, "floor": 0.1, "pull": 0.0},
        {"exits": 0.1, "deferred": 0.3, "delay": 200.0},
    ),
}


def abrupt(name: str, seed: int, *, before: int = 2000, after: int = 10_000) -> dict[str, float]:
    """Risk and share of exits after an abrupt concept shift, under one way to set the threshold."""
    rng = np.random.default_rng([3, seed])
    one = join(stream(before, rng), stream(after, rng, shift=SHIFT))
    given, reviews = SCENARIOS[name]
    if name == "static":
        out, inforce, alarm_count = one.score >= CERTIFIED, np.full(one.score.size, CERTIFIED), 0
    else:
        config = ControllerConfig(alpha=ALPHA, certified=CERTIFIED, **given)
        out, inforce, controller, _ = follow(config, one, rng, **reviews)
        alarm_count = controller.state.alarms
    late = np.arange(one.score.size) >= before

    def risk(rows: NDArray[np.bool_]) -> float:
        return float(one.wrong[rows & out].mean()) if (rows & out).any() else 0.0

    return {
        "risk_before": risk(~late), "exits_before": float(out[~late].mean()),
        "risk": risk(late), "exits": float(out[late].mean()),
        "risk_whole": risk(np.ones_like(late)), "lowest": float(inforce.min()), "alarms": float(alarm_count),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=200, help="of each monitor's simulation")
    parser.add_argument("--seeds", type=int, default=20, help="of the threshold's simulation")
    options = parser.parse_args()
    began = time.perf_counter()
    result: dict[str, Any] = {"certified": CERTIFIED, "risk_at_shift_0": true_error(0.0, threshold=CERTIFIED)}
    result["risks_after"] = [true_error(shift, threshold=CERTIFIED) for shift in (SHIFT, HARD_SHIFT)]
    print(f"risk of exits: stable {result['risk_at_shift_0']:.4f}, shifted {result['risks_after']}")

    print("\ne-process, 2,000 stable decisions, then 1,500 stable or shifted (risk .014 -> .106)")
    result["alarms"] = []
    for rate in (0.05, 0.1, 0.15, 0.2, 0.3):
        stable = alarms(options.runs, audit_rate=rate, shifted=False)
        shifted = alarms(options.runs, audit_rate=rate, shifted=True)
        result["alarms"].append({"stable": stable, "shifted": shifted})
        print(
            f"  audits {rate:4.0%}: alarms in stable runs {stable['false_alarms']}/{options.runs}, shift found "
            f"{shifted['found']}/{options.runs} (alarms before it {shifted['false_alarms']}), "
            f"median audits {shifted['median_audits']:.0f}"
        )

    print("\nscores alone")
    result["blindness"] = blindness(min(options.runs, 40))
    for row in result["blindness"]:
        print("  ", row)
    print("\nStage A's error from reviewed rows (exits reviewed at .1, deferred at .8)")
    result["labels"] = biased_labels(options.runs)
    for row in result["labels"]:
        print("  ", {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})

    print("\nabrupt concept shift, alpha .02")
    result["threshold"] = {}
    for name in SCENARIOS:
        found = [abrupt(name, seed) for seed in range(options.seeds)]
        mean = {key: float(np.mean([one[key] for one in found])) for key in found[0]}
        worst = max(one["risk"] for one in found)
        result["threshold"][name] = {"mean": mean, "largest_risk": worst, "seeds": options.seeds,
                                     "lowest": min(one["lowest"] for one in found)}  # fmt: skip
        print(f"  {name:<30}" + " ".join(f"{key} {value:.3f}" for key, value in mean.items()) + f" largest {worst:.3f}")

    print("\nhow many audits see which harm")
    plan = plan_audits(ALPHA, exit_rate=0.72, audit_rate=0.1)
    result["plan"] = plan.model_dump(mode="json")
    print(render(plan))
    result["seconds"] = time.perf_counter() - began
    write_text(options.out / "monitor.json", json.dumps(result, indent=1) + "\n")
    print(f"\n{result['seconds']:.0f} s; written: {options.out / 'monitor.json'}")


if __name__ == "__main__":
    main()
