"""What the benchmark compares us with computes AUGRC and the right law, or the comparison is worth nothing."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stage1_pro import metrics

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ["plain", "blocked", "poisson"]


@pytest.fixture
def room(repository, monkeypatch):
    """Import a script of benchmarks/ by name; skip where a peer of it is not installed."""
    monkeypatch.syspath_prepend(repository / "benchmarks")

    def load(name):
        if name == "numba_presort":
            pytest.importorskip("numba", reason="numba is not installed; pip install -c constraints.txt '.[bench]'")
        return importlib.import_module(name)

    return load


def draw_rows(n, levels, rate=0.3):
    rng = np.random.default_rng(n + levels)
    return (rng.integers(0, levels, n) / levels).astype(np.float32), rng.random(n) < rate


@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 1000, 4099])
@pytest.mark.parametrize("levels", [1, 5, 2**24])
def test_numba_value_is_ours_exactly(room, n, levels):
    presort = room("numba_presort")
    confidence, error = draw_rows(n, levels)
    rows = presort.presort(confidence - np.float32(0.5), error)
    assert presort.augrc(rows) == metrics.augrc(confidence - np.float32(0.5), error)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n", [1, 16, 17, 33, 1000])
def test_numba_replicate_is_augrc_of_the_rows_it_drew(room, variant, n):
    presort = room("numba_presort")
    confidence, error = draw_rows(n, 7)
    counts = presort.resample_counts(n, seed=3, variant=variant)
    assert counts.sum() == n
    if variant != "plain":  # counts lie as the interleaved rows do
        length = n // presort.LANES
        row = np.arange(n)
        inside = row < length * presort.LANES
        counts = counts[np.where(inside, row % max(length, 1) * presort.LANES + row // max(length, 1), row)]
    order = np.lexsort((error, -confidence))
    resample = np.repeat(order, counts)
    (replicate,) = presort.bootstrap_augrc(presort.presort(confidence, error), 1, seed=3, variant=variant)
    assert replicate == metrics.augrc(confidence[resample], error[resample])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n", "replicates"), [(20, 40_000), (1000, 4_000)])
def test_numba_replicates_spread_as_ours(room, variant, n, replicates):
    """At n = 20 the tolerance would catch plain Poisson(1) counts: their standard deviation is 3.5% larger."""
    presort = room("numba_presort")
    confidence, error = draw_rows(n, 50)
    ours = metrics.bootstrap_augrc(confidence, error, n_replicates=replicates).replicates
    theirs = presort.bootstrap_augrc(presort.presort(confidence, error), replicates, seed=1, variant=variant)
    # Five standard errors of the difference of two means, and of two standard deviations (kurtosis near a normal's).
    assert abs(ours.mean() - theirs.mean()) < 5 * ours.std() * (2 / replicates) ** 0.5
    assert abs(theirs.std() / ours.std() - 1) < 5 * replicates**-0.5


@pytest.mark.parametrize("name", ["NumPy presort", "NumPy presort, 2 threads", "scipy percentile"])
def test_numpy_peers_compute_augrc_with_its_interval(room, name):
    contestants = room("contestants")
    confidence, error = draw_rows(400, 50)
    data = contestants.Data(confidence + np.float32(0.5), error)
    value, low, high = contestants.CONTESTANTS[name](data, 2)(4000, 0)
    ours = metrics.bootstrap_augrc(data.confidence, data.error, n_replicates=4000)
    assert value == pytest.approx(ours.value, abs=1e-15)
    ends = np.quantile(ours.replicates, (0.025, 0.975))
    # An end of 4,000 replicates wanders by about .04 standard deviations.
    assert np.abs(np.array([low, high]) - ends).max() < 0.2 * ours.std


def test_peers_say_why_they_are_not_run(room):
    contestants = room("contestants")
    data = contestants.make_data(96, 0.1, seed=0)
    if importlib.util.find_spec("torch_uncertainty") is None:
        with pytest.raises(contestants.UnavailableError, match="torch-uncertainty is not installed"):
            contestants.CONTESTANTS["torch-uncertainty loop"](data, 1)


def test_benchmark_rows_have_the_error_rate_asked_for(room):
    data = room("contestants").make_data(100_000, 0.1, seed=0)
    assert data.error.mean() == pytest.approx(0.1, abs=0.005)
    assert (data.probabilities().argmax(axis=1) == 1).all()
    assert ((data.probabilities().argmax(axis=1) != data.labels()) == data.error).all()


def clustered(resplits, n=150, seed=0):
    """Groups of 1 to 30 rows that are near-copies: half of them are hard, with errors and low gate scores."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n), rng.integers(1, 31, n))
    # What a group's rows share weighs more than what each has of its own.
    hard = rng.normal(size=n)[groups] + 0.3 * rng.normal(size=groups.size)
    labels = (rng.random(n) < 0.5).astype(int)[groups]
    right = 1 / (1 + np.exp(1.3 * hard - 1.6))
    probs = np.where(np.arange(2) == labels[:, None], right[:, None], 1 - right[:, None])
    return resplits.Rows(probs, -hard + 0.5 * rng.normal(size=groups.size), labels, groups)


def test_resplits_show_what_ignoring_groups_does(room):
    resplits = room("resplits")
    draws = 100
    table = resplits.resplit(clustered(resplits), 0.5, 0.12, draws=draws, world=True)
    noise = 3 * (0.05 * 0.95 / draws) ** 0.5
    for method in ("gate, ltt", "scrc pac"):
        by_group, by_row = table[method]["groups"], table[method]["rows"]
        assert by_group["broken"] <= 0.05 + noise, method
        assert by_row["broken"] > 0.15 and by_row["broken"] > 3 * by_group["broken"], method
    assert table["scrc pac"]["groups"]["feasible"] == 1
    # A shipped file is one draw: expectations and the naive choice break often, by group too.
    assert table["scrc naive"]["groups"]["broken"] > 0.3
    # Rows of the calibrated groups themselves cannot tell.
    assert table["scrc pac"]["rows"]["deceived"] > 0.02


def test_a_world_of_the_menu_knows_what_is_promised_and_what_is_false(room):
    """One law in units of 1 to 12 copies, the wrong ones larger: rates of groups and of photos, by hand."""
    menu = room("menu")
    first, second, _, uneven = menu.laws()["uneven groups"]
    assert first is second and uneven
    rows = menu.draw_units(second, 4000, np.random.default_rng(0), uneven, False, "world")
    size = np.unique(rows.groups, return_counts=True)[1]
    assert size.size == 4000 and size.min() == 1 and size.max() == menu.LARGEST
    everyone = np.ones(rows.wrong.size, dtype=bool)
    of_groups, of_photos = menu.World.of(rows, False), menu.World.of(rows, True)
    assert rows.wrong.mean() > 0.1 > of_groups.weights @ rows.wrong / 4000
    assert of_photos.above(rows.wrong, everyone, 0.08) and not of_groups.above(rows.wrong, everyone, 0.08)
    assert of_groups.above(rows.wrong, everyone, 0.04)
    # 3% can be had of some exits, and not of all.
    target = menu.parse_target({"policy": "softmax", "allow_useless": True, "exit_error": 0.03, "guarantee": "none"})
    policy = menu.calibrate(target, menu.draw_units(second, 400, np.random.default_rng(1), uneven, False, "new"))
    assert 0 < of_groups.breaks(target, policy)[1] < 1
    assert of_groups.breaks(target, policy.model_copy(update={"exit_threshold": 0.0}))[0]


def test_recuts_of_agreement_draw_clips_as_new_ones_and_count_as_certificates_do(room):
    agreement, menu = room("agreement"), room("menu")
    parts = [
        menu.draw_units(menu.laws()["steep"][1], n, np.random.default_rng(n), True, False, name)
        for n, name in ((300, "order"), (900, "new"))
    ]
    halves = np.repeat(menu.HALVES, [part.labels.size for part in parts])
    rows = menu.replace(menu.joined(parts), halves=halves, halved=False)
    photos = np.flatnonzero(halves == "certify")
    clips = [photos[rows.groups[photos] == name] for name in np.unique(rows.groups[photos])]
    again = agreement.some(rows, [clips[0], clips[1], clips[0]])
    assert np.unique(again.groups[again.halves == "certify"]).size == 3
    assert (again.halves == "fit").sum() == parts[0].labels.size
    policy = agreement.certify(agreement.some(rows, clips), 0.08)
    coverage, rate, k, m = agreement.measure(policy, rows, clips)
    (check,) = policy.check(rows.where(halves == "certify")).promises
    assert check.trials == m and 0 < coverage < 1
    # Copies of a group are one answer.
    assert (check.errors, rate) == (k, pytest.approx(k / m))
    assert agreement.certify(agreement.some(rows, clips[:20]), 0.08) is None
    assert agreement.measure(None, rows, clips) == (0.0, 0.0, 0, 0)


def test_a_draw_of_resplits_calibrates_and_tells_the_truth_on_other_groups(room):
    resplits = room("resplits")
    pool = clustered(resplits)
    rows, names, truth, others = resplits.cut(pool, np.random.default_rng(0), world=False)
    assert not np.intersect1d(pool.groups[rows], pool.groups[truth]).size
    assert np.array_equal(np.unique(pool.groups[truth]), np.sort(pool.groups[others]))
    assert np.array_equal(np.sort(np.concatenate([rows, truth])), np.arange(len(pool)))
    assert np.unique(names).size == np.unique(pool.groups[rows]).size == 75
    rows, names, truth, _ = resplits.cut(pool, np.random.default_rng(0), world=True)
    assert truth.size == len(pool)
    # A group that is drawn twice is two groups.
    assert np.unique(names).size == 75 > np.unique(pool.groups[rows]).size
    deployed = resplits.methods(0.5, 0.2)["gate, ltt"](pool, pool, True, 0)
    risk, coverage, size = deployed.measure(truth, resplits.alike(pool.groups))
    wrong = [(pool.wrong & deployed.accepted)[member].mean() for member in pool.members()]
    share = [deployed.accepted[member].mean() for member in pool.members()]
    assert (risk, coverage, size) == pytest.approx((np.mean(wrong) / np.mean(share), np.mean(share), 1.0))


def test_resplits_write_what_cannot_be_certified(room):
    resplits = room("resplits")
    facts = resplits.limits(clustered(resplits), ((0.5, 0.1),))
    assert facts["groups"] == 150
    assert facts["least risk with half of the groups: 75"] == pytest.approx(1 - 0.05 ** (1 / 75))
    table = resplits.resplit(clustered(resplits), 0.9, 0.01, draws=2)
    found = {"limits": facts, "wishes": {"a wish": {"other half": table, "pool as the world": table}}}
    text = resplits.render({"simulated": found}, 2)
    assert "| gate, ltt, by groups | infeasible in every draw | infeasible in every draw |" in text


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu_and_says_so(repository, tmp_path):
    """Its Python, part by part; no figure in it is a GPU's."""
    pytest.importorskip(
        "transformers", reason="transformers is not installed; pip install -c constraints.txt '.[test]'"
    )
    out = tmp_path / "gpu.json"
    done = subprocess.run(
        [repository / "benchmarks/gpu.sh", out, "--dry"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["dry"] and "gpu" not in found["machine"]
    assert found["parity"]["rows"] == 4 * (4 * 1000 + 200) and found["parity"]["differences"] == 0
    assert found["router"]["batch 4"]["ours"]["p50_us"] > 0
    (cascade,) = (entry for name, entry in found["cascade"].items() if name.startswith("tiny"))
    assert cascade["cascade 0.5"]["ideal"] == pytest.approx(1 / 0.75, abs=1e-3)
    assert {name.split()[0] for name in found["runtimes"]} == {"tiny", "seconds"}
    assert not [name for name, part in found.items() if isinstance(part, dict) and "failed" in part]


def test_the_gpu_script_names_a_wrong_option(repository):
    done = subprocess.run([repository / "benchmarks/gpu.sh", "--fast"], capture_output=True, text=True)
    assert done.returncode == 2 and "usage: benchmarks/gpu.sh" in done.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "benchmarks").glob("*.py")))
def test_what_a_script_takes_from_the_package_is_there(script):
    """A benchmark that nobody ran since a name moved would fail when its figure is asked for."""
    pytest.importorskip("torch", reason="some of what they measure trains")
    tree = ast.parse((ROOT / "benchmarks" / script).read_text(encoding="utf-8"))
    taken = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    for node in taken:
        if node.module.split(".")[0] == "stage1_pro":
            home = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(home, name) or importlib.util.find_spec(f"{node.module}.{name}"), (node.module, name)
