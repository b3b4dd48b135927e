"""Every kernel against its twin, and both against brute force, public functions and NumPy's own multinomial."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import itertools
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from stage1_pro import metrics, native
from stage1_pro.errors import InputError
from stage1_pro.native.suite import _cell_laws, count_tables

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
    assert native.backend() == "compiled"
    assert "_core" in native.why()


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
    with native.use("reference"):
        expected = native.bootstrap_augrc(confidence, error, group, **arguments)
        value = native.augrc(confidence, error)
    assert expected.value == value
    for threads in (1, 2, 8):
        found = native.bootstrap_augrc(confidence, error, group, threads=threads, **arguments)
        assert found.replicates.tobytes() == expected.replicates.tobytes()
        assert found.value == value
        assert found.second == pytest.approx(expected.second, rel=1e-9, abs=1e-18)
        assert found.third == pytest.approx(expected.third, rel=1e-6, abs=1e-18)
    moved = None if group is None else group[order]
    again = native.bootstrap_augrc(confidence[order], error[order], moved, **arguments)
    assert again.replicates.tobytes() == expected.replicates.tobytes()
    assert native.augrc(confidence, error) == native.augrc(confidence[order], error[order]) == value


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(-4, 4), st.floats(0, 1, width=32)), min_size=1, max_size=14),
    binary=st.booleans(),
)
def test_augrc_is_the_pairwise_definition(backend, rows, binary):
    confidence = np.array([c for c, _ in rows], dtype=np.float64)
    error = np.array([r >= 0.5 if binary else r for _, r in rows])
    with native.use(backend):
        assert native.augrc(confidence, error) == pytest.approx(pairwise(confidence, error), abs=1e-12)
        assert native.augrc(np.exp(confidence), error) == native.augrc(confidence, error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("losses", [False, True], ids=["errors", "losses"])
def test_a_replicate_is_augrc_of_its_resample(backend, losses):
    rng = np.random.default_rng(3)
    confidence, error, group = draw_rows(rng, 40, losses=losses, groups=True)
    order = np.lexsort((error, -confidence))
    owner = native.cluster_numbers(group, 40)
    with native.use(backend):
        by_row = native.bootstrap_augrc(confidence, error, n_replicates=5, seed=11)
        by_group = native.bootstrap_augrc(confidence, error, group, n_replicates=5, seed=11)
    n_groups = int(owner.max()) + 1
    for replicate in range(5):
        counts = native.resample_counts([40], 1, first=replicate, seed=11)[0]
        assert by_row.replicates[replicate] == pytest.approx(
            pairwise(confidence[order], error[order], counts), abs=1e-12
        )
        counts = native.resample_counts([n_groups], 1, first=replicate, seed=11)[0][owner]
        assert by_group.replicates[replicate] == pytest.approx(pairwise(confidence, error, counts), abs=1e-12)


# ------------------------------------------------------------------------------------------------- resamples


@needs_core
@pytest.mark.parametrize("sizes", [[1], [2], [16], [17], [18], [1000], [1023, 1, 16], [1025, 4096], [70_000]])
def test_kernel_and_twin_draw_the_same_counts(sizes):
    arguments = {"n_replicates": 3 if sum(sizes) > 10_000 else 40, "first": 5, "seed": 2**63 + 1}
    compiled = native.resample_counts(sizes, **arguments)
    with native.use("reference"):
        assert (native.resample_counts(sizes, **arguments) == compiled).all()
    ends = np.cumsum(sizes)
    within = np.add.reduceat(compiled.astype(int), np.append(0, ends[:-1]), axis=1)
    assert (within == sizes).all(), "every stratum keeps its size"


@needs_core
@pytest.mark.parametrize("n", [20, 50, 200, 1000])
def test_counts_are_exactly_multinomial(n):
    """40,000 resamples beside NumPy's, by statistics that see single counts, ties, extremes and neighbours."""
    draws = 40_000
    counts = native.resample_counts([n], draws, seed=2024).astype(np.int32)
    assert (counts.sum(1) == n).all()
    judge = np.random.default_rng(7).multinomial(n, np.full(n, 1 / n), size=draws)
    statistics = {
        "a weighted sum": lambda c: c @ (np.arange(n) ** 2 / n),
        "the sum of squares": lambda c: (c**2).sum(1),
        "units left out": lambda c: (c == 0).sum(1),
        "the largest count": lambda c: c.max(1),
        "neighbours": lambda c: (c[:, 1:] * c[:, :-1]).sum(1),
        "the first unit": lambda c: c[:, 0],
        "the last unit": lambda c: c[:, -1],
    }
    for name, statistic in statistics.items():
        assert ks_2samp(statistic(counts), statistic(judge)).pvalue > 0.001, name
    # Var = 1 - 1/n and Cov = -1/n. Tolerances are five standard errors of the estimates, taken over units and draws.
    assert np.var(counts, axis=0).mean() == pytest.approx(1 - 1 / n, abs=5 * np.sqrt(2 / (draws * n)))
    left, right = counts[:, : n // 2], counts[:, n // 2 : 2 * (n // 2)]
    covariance = ((left - 1) * (right - 1)).mean()
    assert covariance == pytest.approx(-1 / n, abs=5 / np.sqrt(draws * (n // 2)))
    assert np.corrcoef(counts[:-1, 0], counts[1:, 0])[0, 1] == pytest.approx(0, abs=5 / np.sqrt(draws))


@needs_core
def test_poisson_alone_would_be_seen():
    """Counts without the fixed sum are another law (SD of their sum is not 0): the test above can fail."""
    n, draws = 20, 40_000
    poisson = np.random.default_rng(3).poisson(1, (draws, n))
    judge = np.random.default_rng(7).multinomial(n, np.full(n, 1 / n), size=draws)
    weights = np.arange(n) ** 2 / n
    assert ks_2samp(poisson @ weights, judge @ weights).pvalue < 0.001


def test_the_table_is_the_poisson_law():
    """Codes and remainders together give each count its probability, to 2**-63."""
    import decimal

    for n in (17, 200, 100_000, 2**31 - 1):
        table = count_tables([n])[0].astype(object)
        cuts, rest = table[:6], table[6:]
        with decimal.localcontext() as context:
            context.prec = 60
            mean = 1 - decimal.Decimal("2.5") / decimal.Decimal(n).sqrt()
            share = (-mean).exp()
            for count in range(20):
                codes = (cuts[count] - (cuts[count - 1] if count else 0)) if count < 6 else 0
                left = rest[count] - (rest[count - 1] if count else 0)
                assert abs(decimal.Decimal(int(codes << 48) + int(left)) / 2**64 - share) < decimal.Decimal(2) ** -63
                share *= mean / (count + 1)


@needs_core
def test_rejected_draws_agree_too():
    # One draw in 2**32 / (2**32 % n) is rejected: of the some 8,000 for this n several are, in every resample.
    n = 11_184_811
    assert (1 << 32) % n > 2**32 / 400
    compiled = native.resample_counts([n], 1, seed=1)
    with native.use("reference"):
        assert (native.resample_counts([n], 1, seed=1) == compiled).all()


def few_errors(n, errors, levels, dtype):
    rng = np.random.default_rng(n)
    confidence = rng.integers(0, levels, n) / levels
    error = np.zeros(n, dtype=bool)
    error[rng.choice(n, errors, replace=False)] = True
    return confidence.astype(dtype), error


@needs_core
@pytest.mark.parametrize(
    ("n", "errors", "levels"),
    [(257, 0, 9), (257, 1, 3), (600, 1, 10**6), (3000, 11, 12), (3000, 11, 500), (70_000, 250, 10**6)],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cells_of_few_errors_are_drawn_the_same_by_kernel_and_twin(n, errors, levels, dtype):
    confidence, error = few_errors(n, errors, levels, dtype)
    found = native.bootstrap_augrc(confidence, error, n_replicates=25, seed=3, threads=2)
    with native.use("reference"):
        expected = native.bootstrap_augrc(confidence, error, n_replicates=25, seed=3)
    assert found.replicates.tobytes() == expected.replicates.tobytes()
    moved = np.random.default_rng(1).permutation(n)
    again = native.bootstrap_augrc(confidence[moved], error[moved], n_replicates=25, seed=3, threads=8)
    assert again.replicates.tobytes() == found.replicates.tobytes()


@needs_core
@pytest.mark.parametrize("levels", [6, 10**6], ids=["tied", "distinct"])
def test_cells_and_rows_follow_one_law(levels, monkeypatch):
    confidence, error = few_errors(1100, 4, levels, np.float64)
    by_cells = native.bootstrap_augrc(confidence, error, n_replicates=40_000, seed=1).replicates
    monkeypatch.setattr("stage1_pro.native.suite.ROWS_PER_ERROR", 1_000)
    by_rows = native.bootstrap_augrc(confidence, error, n_replicates=40_000, seed=2).replicates
    assert not np.array_equal(by_cells[:100], by_rows[:100])
    assert ks_2samp(by_cells, by_rows).pvalue > 0.001


def test_the_laws_of_cells_are_poisson():
    from scipy.stats import poisson

    for n in (300, 100_000):
        reach, starts, lowest = _cell_laws(n)
        assert lowest.size == n.bit_length()
        for law, (begin, end) in enumerate(itertools.pairwise(starts)):
            through = reach[begin:end].astype(np.float64) / 2**64
            counts = lowest[law] + np.arange(through.size)
            # SciPy's own error at means of thousands is some 1e-12.
            assert through == pytest.approx(poisson.cdf(counts, (1 - 2.5 / np.sqrt(n)) * 2**law), abs=1e-11)


# ------------------------------------------------------------------------------------------------- the suite

# .07 of 300 rows and .55 of 40 are a hair above 21 and 22 in floats.
TARGETS = {"coverages": [0.05, 0.07, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9, 1.0], "risks": [0.0, 0.01, 0.05, 0.3, 1.0]}


def draw_columns(rng, n, *, levels=None, losses=False, threshold=0.1, dtype=np.float64):
    confidence, error, _ = draw_rows(rng, n, levels=levels, losses=losses, dtype=dtype)
    scores, errors = native.rows(confidence, error)
    positive = rng.random(n) < 0.4
    missed = positive & (rng.random(n) < 0.3)
    return native.Columns(scores, errors, positive, missed, rng.exponential(1, n), rng.random(n), threshold)


def mapped(columns, change):
    """The columns with every array changed."""
    arrays = {name: change(values) for name, values in vars(columns).items() if isinstance(values, np.ndarray)}
    return dataclasses.replace(columns, **arrays)


def resampled(columns, times):
    """The columns with each row as often as it was drawn."""
    return mapped(columns, lambda values: np.repeat(values, times))


def by_definition(columns):
    """The suite of rows, each metric from its own public function."""
    confidence, error = columns.confidence, columns.error
    exited = confidence >= columns.threshold
    found = [metrics.augrc(confidence, error), metrics.aurc(confidence, error), 1 - error.mean()]
    found += [columns.nll.mean(), columns.brier.mean(), exited.mean()]
    found.append(error[exited].mean() if exited.any() else np.nan)
    found.append(metrics.fnr_on_exited(columns.positive, ~columns.missed, exited))
    found += [metrics.risk_at_coverage(confidence, error, c).selective_risk for c in TARGETS["coverages"]]
    return found + [metrics.coverage_at_risk(confidence, error, r).coverage for r in TARGETS["risks"]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("losses", [False, True], ids=["errors", "losses"])
@pytest.mark.parametrize(("n", "levels"), [(1, 3), (7, 3), (40, 5), (40, 1000), (300, 40), (1500, 8), (1500, 10**6)])
def test_every_replicate_is_the_suite_of_its_resample(backend, losses, n, levels):
    rng = np.random.default_rng(n + (levels or 0))
    columns = draw_columns(rng, n, levels=levels, losses=losses)
    other = draw_columns(rng, n, levels=levels)
    groups = rng.integers(0, max(n // 6, 1), n)
    strata = rng.integers(0, 2, n)
    for models, arguments in (
        ([columns], {}),
        ([columns], {"groups": groups}),
        ([columns], {"strata": strata}),
        ([columns, other], {}),
        ([columns, other], {"groups": groups}),
    ):
        with native.use(backend):
            suite = native.Suite(models, **arguments, **TARGETS)
            found = suite.resample(3, seed=4)
            values = suite.values()
        assert values[0] == pytest.approx(np.array(by_definition(columns)), abs=1e-12, nan_ok=True)
        drawn = native.resample_counts(suite.sizes, 3, seed=4)
        for k, model in enumerate(models):
            ranked = suite.models[k]
            for replicate in range(3):
                times = np.empty(n, dtype=int)
                times[ranked.order] = drawn[replicate][ranked.unit] if ranked.unit.size else drawn[replicate]
                expected = by_definition(resampled(model, times))
                assert found[k][replicate] == pytest.approx(np.array(expected), abs=1e-12, nan_ok=True)
        if len(models) == 2:
            # Paired: both models see the same rows equally often.
            times = [np.empty(n, dtype=int) for _ in models]
            for ranked, out in zip(suite.models, times, strict=True):
                out[ranked.order] = drawn[0][ranked.unit]
            assert (times[0] == times[1]).all()


@needs_core
@pytest.mark.parametrize("n", [1, 9, 64, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("levels", [4, 10**6], ids=["tied", "distinct"])
@pytest.mark.parametrize("threshold", [-1.0, 0.1, 9.0], ids=["all exit", "some exit", "none exits"])
def test_the_suites_kernel_and_twin_agree(n, levels, threshold):
    rng = np.random.default_rng(n)
    columns = draw_columns(rng, n, levels=levels, threshold=threshold, dtype=np.float32)
    suite = native.Suite([columns], **TARGETS)
    compiled = suite.resample(6, seed=9, threads=2)[0]
    for threads in (1, 8):
        assert suite.resample(6, seed=9, threads=threads)[0].tobytes() == compiled.tobytes()
    with native.use("reference"):
        twin = suite.resample(6, seed=9)[0]
    assert compiled == pytest.approx(twin, rel=1e-12, abs=1e-12, nan_ok=True)
    # Integers all the way: the same bits.
    exact = [native.SUITE.index(name) for name in ("augrc", "accuracy", "coverage", "exit_error", "fnr_on_exited")]
    assert compiled[:, exact].tobytes() == twin[:, exact].tobytes()
    assert compiled[:, len(native.SUITE) :].tobytes() == twin[:, len(native.SUITE) :].tobytes()
    alone = native.bootstrap_augrc(columns.confidence, columns.error, n_replicates=6, seed=9)
    assert alone.replicates.tobytes() == compiled[:, 0].tobytes()


@needs_core
def test_the_fast_and_the_general_pass_agree():
    """Losses of 0 and 1 as float64 go through the pass that takes any loss and any count."""
    rng = np.random.default_rng(8)
    columns = draw_columns(rng, 4000, levels=30)
    groups = rng.integers(0, 40, 4000)
    floats = dataclasses.replace(columns, error=columns.error.astype(np.float64))
    fast, general = (native.Suite([one], groups=groups, **TARGETS) for one in (columns, floats))
    assert (fast.models[0].error.dtype, general.models[0].error.dtype) == (np.uint8, np.float64)
    found, expected = fast.resample(30, seed=0)[0], general.resample(30, seed=0)[0]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_order_never_matters_to_the_suite(backend):
    rng = np.random.default_rng(2)
    columns, other = draw_columns(rng, 500, levels=6), draw_columns(rng, 500, levels=6)
    strata, moved = rng.integers(0, 2, 500), rng.permutation(500)

    def permuted(one):
        return mapped(one, lambda values: values[moved])

    with native.use(backend):
        for models, arguments in (([columns], {}), ([columns, other], {}), ([columns], {"strata": strata})):
            expected = native.Suite(models, **arguments, **TARGETS).resample(4, seed=1)
            same = {key: value[moved] for key, value in arguments.items()}
            found = native.Suite([permuted(m) for m in models], **same, **TARGETS).resample(4, seed=1)
            assert [f.tobytes() for f in found] == [e.tobytes() for e in expected]


def test_groups_and_strata_exclude_each_other():
    columns = draw_columns(np.random.default_rng(0), 10)
    with pytest.raises(InputError, match="groups and strata must not be given together"):
        native.Suite([columns], groups=np.zeros(10), strata=np.zeros(10))


@pytest.mark.parametrize("backend", BACKENDS)
def test_close_float64_confidences_are_not_ties(backend):
    confidence = np.array([0.9, np.nextafter(0.9, 1)])
    with native.use(backend):
        assert native.augrc(confidence, [1, 0]) == 0.125
        assert native.augrc(confidence.astype(np.float32), [1, 0]) == 0.25
        assert native.augrc([np.inf, -np.inf], [0, 1]) == 0.125


@pytest.mark.parametrize("backend", BACKENDS)
def test_seeds_and_replicates_have_streams_of_their_own(backend):
    confidence, error, _ = draw_rows(np.random.default_rng(0), 300)
    with native.use(backend):
        one = native.bootstrap_augrc(confidence, error, n_replicates=50, seed=1).replicates
        longer = native.bootstrap_augrc(confidence, error, n_replicates=60, seed=1).replicates
        largest = native.bootstrap_augrc(confidence, error, n_replicates=50, seed=2**64 - 1).replicates
    assert (one == longer[:50]).all()
    assert np.unique(one).size > 40
    assert not np.intersect1d(one, largest).size > 25


@needs_core
def test_concurrent_calls_give_the_serial_answers():
    rng = np.random.default_rng(1)
    rows = [draw_rows(rng, 4000) for _ in range(8)]
    suites = [native.Suite([draw_columns(rng, 3000, levels=40 + i)], **TARGETS) for i in range(8)]

    def answer(i, threads):
        c, e, _ = rows[i]
        alone = native.bootstrap_augrc(c, e, n_replicates=20, seed=i, threads=threads)
        return alone.replicates.tobytes() + suites[i].resample(20, seed=i, threads=threads)[0].tobytes()

    serial = [answer(i, 1) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, range(8), [2] * 8)) == serial


@needs_core
def test_ctrl_c_stops_the_core_within_a_second():
    code = (
        "import numpy as np, signal, threading, time, os\n"
        "from stage1_pro import native\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a runner in the background has it ignored\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "begin = time.monotonic()\n"
        "try:\n"
        "    native.bootstrap_augrc(np.random.default_rng(0).random(100_000), np.arange(100_000) % 9 == 0,"
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
        native.augrc(confidence, error)


def test_wrong_arguments_are_named():
    rows = ([0.5, 0.6], [0, 1])
    for arguments, message in [
        ({"n_replicates": 0}, "n_replicates must be from 1"),
        ({"n_replicates": 1, "seed": -1}, "seed must be from 0"),
        ({"n_replicates": 1, "threads": -2}, "threads must be 0 or more, got -2"),
    ]:
        with pytest.raises(InputError, match=message):
            native.bootstrap_augrc(*rows, **arguments)
    with pytest.raises(InputError, match=r"groups must .*2.*got \[3\]"):
        native.bootstrap_augrc(*rows, ["a", "b", "c"], n_replicates=1)


def run_python(code, **environment):
    """Run code in a fresh interpreter with more environment."""
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def test_the_environment_chooses_the_backend():
    show = "from stage1_pro import native; print(native.backend(), '|', native.why())"
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
        "import stage1_pro.native"
    )
    assert broken.returncode != 0
    assert "No module named 'inner'" in broken.stderr
