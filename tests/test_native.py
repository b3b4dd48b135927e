"""Every kernel against its twin, bit for bit, and the twin against brute force and NumPy's own multinomial."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from stage1_pro import _native, _reference
from stage1_pro.errors import InputError

COMPILED = importlib.util.find_spec("stage1_pro._core") is not None
needs_core = pytest.mark.skipif(not COMPILED, reason="stage1_pro._core is not built (STAGE1_PURE, or no compiler)")
BACKENDS = ["reference", pytest.param("compiled", marks=needs_core)]


def draw_rows(rng, n, *, dtype=np.float64, levels=None, losses=False, groups=False):
    """Random rows with ties (a signed zero among them), and groups of uneven sizes."""
    confidence = rng.integers(0, levels or max(n // 3, 1), n) / max(levels or n // 3, 1) - 0.5
    confidence[confidence == 0] *= rng.choice([-1, 1], int((confidence == 0).sum()))
    error = rng.random(n) if losses else (rng.random(n) < 0.3)
    return confidence.astype(dtype), error, rng.integers(0, max(n // 5, 1), n) ** 2 if groups else None


def pairwise(confidence, error, counts=None):
    """AUGRC by its definition over all ordered pairs of rows, exactly."""
    counts = np.ones(len(confidence), int) if counts is None else counts
    total = Fraction(0)
    for c_i, n_i in zip(confidence, counts, strict=True):
        for c_j, r_j, n_j in zip(confidence, error, counts, strict=True):
            total += int(n_i) * int(n_j) * Fraction(float(r_j)) * (2 if c_j > c_i else 1 if c_j == c_i else 0)
    return float(total / (2 * int(counts.sum()) ** 2))


@needs_core
def test_the_compiled_core_is_what_runs():
    assert _native.backend() == "compiled"
    assert "_core" in _native.why()


@needs_core
@pytest.mark.parametrize("n", [1, 2, 3, 17, 200, 2048, 2049, 5000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("losses", [False, True], ids=["errors", "losses"])
@pytest.mark.parametrize("groups", [False, True], ids=["rows", "groups"])
def test_kernel_and_twin_give_the_same_bits(n, dtype, losses, groups):
    rng = np.random.default_rng(n)
    confidence, error, group = draw_rows(rng, n, dtype=dtype, losses=losses, groups=groups)
    order = rng.permutation(n)
    arguments = {"n_replicates": 9, "seed": 5}
    with _native.use("reference"):
        expected = _native.bootstrap_augrc(confidence, error, group, **arguments).tobytes()
        value = _native.augrc(confidence, error)
    for threads in (1, 2, 8):
        assert _native.bootstrap_augrc(confidence, error, group, threads=threads, **arguments).tobytes() == expected
    moved = None if group is None else group[order]
    assert _native.bootstrap_augrc(confidence[order], error[order], moved, **arguments).tobytes() == expected
    assert _native.augrc(confidence, error) == _native.augrc(confidence[order], error[order]) == value


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(-4, 4), st.floats(0, 1, width=32)), min_size=1, max_size=14),
    binary=st.booleans(),
)
def test_augrc_is_the_pairwise_definition(backend, rows, binary):
    confidence = np.array([c for c, _ in rows], dtype=np.float64)
    error = np.array([r >= 0.5 if binary else r for _, r in rows])
    with _native.use(backend):
        assert _native.augrc(confidence, error) == pytest.approx(pairwise(confidence, error), abs=1e-12)
        assert _native.augrc(np.exp(confidence), error) == _native.augrc(confidence, error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("losses", [False, True], ids=["errors", "losses"])
def test_a_replicate_is_augrc_of_its_resample(backend, losses):
    rng = np.random.default_rng(3)
    confidence, error, group = draw_rows(rng, 40, losses=losses, groups=True)
    order = np.lexsort((error, -confidence))
    owner = _native.cluster_numbers(group, 40)
    with _native.use(backend):
        by_row = _native.bootstrap_augrc(confidence, error, n_replicates=5, seed=11)
        by_group = _native.bootstrap_augrc(confidence, error, group, n_replicates=5, seed=11)
    for replicate in range(5):
        counts = _reference.resample_counts(40, 11, replicate)
        assert by_row[replicate] == pytest.approx(pairwise(confidence[order], error[order], counts), abs=1e-12)
        counts = _reference.resample_counts(int(owner.max()) + 1, 11, replicate)[owner]
        assert by_group[replicate] == pytest.approx(pairwise(confidence, error, counts), abs=1e-12)


@pytest.mark.parametrize("n", [20, 50, 200])
def test_counts_are_exactly_multinomial(n):
    draws = 8000
    counts = np.stack([_reference.resample_counts(n, 2024, replicate) for replicate in range(draws)])
    assert (counts.sum(1) == n).all()
    judge = np.random.default_rng(7).multinomial(n, np.full(n, 1 / n), size=draws)
    statistic = np.arange(n) ** 2 / n
    assert ks_2samp(counts @ statistic, judge @ statistic).pvalue > 0.001
    # Var = 1 - 1/n and Cov = -1/n; the tolerance is five standard errors of the pooled estimates.
    assert np.var(counts, axis=0).mean() == pytest.approx(1 - 1 / n, abs=5 * np.sqrt(2 / (draws * n)))
    assert np.cov(counts[:, 0], counts[:, 1])[0, 1] == pytest.approx(-1 / n, abs=5 / np.sqrt(draws))
    assert np.corrcoef(counts[:-1, 0], counts[1:, 0])[0, 1] == pytest.approx(0, abs=5 / np.sqrt(draws))


@needs_core
def test_rejected_draws_agree_too():
    # About one draw in 2**32 / (2**32 % n) is rejected: for this n and seed some are, in every replicate.
    n, rejections = 1_300_003, 0
    for replicate in range(3):
        key = _reference._mix(_reference._mix(1 + _reference._GOLDEN) + _reference._GOLDEN * (replicate + 1))
        gamma = _reference._mix(key ^ _reference._GOLDEN) | 1
        words = _reference._hash(key, gamma, np.arange(1, (n + 1) // 2 + 1, dtype=np.uint64))
        halves = np.concatenate([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)])
        rejections += int((((halves * np.uint64(n)) & np.uint64(0xFFFFFFFF)) < (1 << 32) % n).sum())
    assert rejections > 10
    rng = np.random.default_rng(0)
    confidence, error = rng.random(n).astype(np.float32), rng.random(n) < 0.1
    compiled = _native.bootstrap_augrc(confidence, error, n_replicates=3, seed=1)
    with _native.use("reference"):
        assert _native.bootstrap_augrc(confidence, error, n_replicates=3, seed=1).tobytes() == compiled.tobytes()


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_float64_confidences_are_not_ties(backend):
    confidence = np.array([0.9, np.nextafter(0.9, 1)])
    with _native.use(backend):
        assert _native.augrc(confidence, [1, 0]) == 0.125
        assert _native.augrc(confidence.astype(np.float32), [1, 0]) == 0.25
        assert _native.augrc([np.inf, -np.inf], [0, 1]) == 0.125


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_and_replicates_have_streams_of_their_own(backend):
    confidence, error, _ = draw_rows(np.random.default_rng(0), 300)
    with _native.use(backend):
        one = _native.bootstrap_augrc(confidence, error, n_replicates=50, seed=1)
        longer = _native.bootstrap_augrc(confidence, error, n_replicates=60, seed=1)
        largest = _native.bootstrap_augrc(confidence, error, n_replicates=50, seed=2**64 - 1)
    assert (one == longer[:50]).all()
    assert np.unique(one).size > 40
    assert not np.intersect1d(one, largest).size > 25


@needs_core
def test_concurrent_calls_give_the_serial_answers():
    rng = np.random.default_rng(1)
    rows = [draw_rows(rng, 4000) for _ in range(8)]
    serial = [_native.bootstrap_augrc(c, e, n_replicates=20, seed=i).tobytes() for i, (c, e, _) in enumerate(rows)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(_native.bootstrap_augrc, c, e, n_replicates=20, seed=i, threads=2)
            for i, (c, e, _) in enumerate(rows)
        ]
        assert [job.result().tobytes() for job in jobs] == serial


@needs_core
def test_ctrl_c_stops_the_core_within_a_second():
    code = (
        "import numpy as np, signal, threading, time, os\n"
        "from stage1_pro import _native\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner in the background has it ignored\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "begin = time.monotonic()\n"
        "try:\n"
        "    _native.bootstrap_augrc(np.random.default_rng(0).random(100_000), np.arange(100_000) % 9 == 0,"
        " n_replicates=1_000_000)\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped after', time.monotonic() - begin)\n"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("stopped after"), done.stderr
    assert float(done.stdout.split()[-1]) < 1.5
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize(
    ("confidence", "error", "message"),
    [
        ([0.5, np.nan], [0, 1], "confidence must not be NaN, got NaN at row 1"),
        ([0.5, 0.6, 0.7], [0, 1, np.nan], "error must not be NaN, got NaN at row 2"),
        ([0.5, 0.6], [0, 1.5], r"error must be in \[0, 1\], got 1.5 at row 1"),
        ([0.5, 0.6], [0], r"must have one shape \[N\], got \[2\] and \[1\]"),
        ([[0.5]], [[0]], r"must have one shape \[N\]"),
        ([], [], "must hold 1 to 2147483647 rows, got 0"),
        (["a"], [0], "confidence must be numbers"),
    ],
)
def test_wrong_rows_are_named(confidence, error, message):
    with pytest.raises(InputError, match=message):
        _native.augrc(confidence, error)


def test_wrong_arguments_are_named():
    rows = ([0.5, 0.6], [0, 1])
    for arguments, message in [
        ({"n_replicates": 0}, "n_replicates must be at least 1, got 0"),
        ({"n_replicates": 1, "seed": -1}, "seed must be from 0"),
        ({"n_replicates": 1, "threads": -2}, "threads must be 0 or more, got -2"),
    ]:
        with pytest.raises(InputError, match=message):
            _native.bootstrap_augrc(*rows, **arguments)
    with pytest.raises(InputError, match=r"groups must have shape \[2\], one group per row, got \[3\]"):
        _native.bootstrap_augrc(*rows, ["a", "b", "c"], n_replicates=1)


def run_python(code, **environment):
    """Run code in a fresh interpreter with more environment."""
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def test_the_environment_chooses_the_backend():
    show = "from stage1_pro import _native; print(_native.backend(), '|', _native.why())"
    assert run_python(show, STAGE1_BACKEND="reference").stdout.startswith("reference | the NumPy twin was asked for")
    wrong = run_python(show, STAGE1_BACKEND="cuda")
    assert "STAGE1_BACKEND must be compiled or reference, got 'cuda'" in wrong.stderr
    absent = run_python(
        "import importlib.abc, sys\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'stage1_pro._core':\n"
        "            raise ModuleNotFoundError('absent', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n" + show
    )
    assert absent.stdout.startswith("reference | stage1_pro._core is not built"), absent.stderr


def test_a_broken_core_is_not_hidden():
    broken = run_python(
        "import importlib.abc, sys\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'stage1_pro._core':\n"
        "            raise ModuleNotFoundError(\"No module named 'inner'\", name='inner')\n"
        "sys.meta_path.insert(0, Broken())\n"
        "import stage1_pro._native"
    )
    assert broken.returncode != 0
    assert "No module named 'inner'" in broken.stderr
