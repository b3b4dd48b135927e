"""The router: the kernel against its twin bit for bit, and both against the softmax policy's own float64 code."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.hard_rows import hard_gates, hard_logits

from stage1_pro import native
from stage1_pro.errors import InputError
from stage1_pro.native import _reference
from stage1_pro.policies.softmax import confidence, softmax

COMPILED = importlib.util.find_spec("stage1_pro._core") is not None
needs_core = pytest.mark.skipif(not COMPILED, reason="stage1_pro._core is not built (STAGE1_PURE, or no compiler)")
BACKENDS = ["reference", pytest.param("compiled", marks=needs_core)]


def copy(routed):
    return native.Routed(*(values.copy() for values in routed))


@needs_core
@pytest.mark.parametrize("k", [1, 2, 3, 7])
@pytest.mark.parametrize("platt", [None, (1.7, -0.3), (-1e300, 2.0)], ids=["probability", "gate", "steep gate"])
def test_kernel_and_twin_give_the_same_bits(k, platt):
    rng = np.random.default_rng(k)
    n = 100_000
    logits = hard_logits(rng, n, k)
    gate = None if platt is None else hard_gates(rng, n)
    scores = native.Router(n, threshold=0.5, platt=platt).route(logits, gate).score
    # One threshold is the very score of a row, with its neighbours on either side.
    exact = rng.choice(scores[scores < 1])
    for threshold in (
        0.5,
        exact,
        np.nextafter(exact, np.float32(0)),
        np.nextafter(exact, np.float32(1)),
        1.0,
        -math.inf,
    ):
        router = native.Router(n, threshold=threshold, platt=platt)
        with native.use("reference"):
            expected = copy(router.route(logits, gate))
        found = router.route(logits, gate)
        for name, ours, theirs in zip(native.Routed._fields, found, expected, strict=True):
            assert ours.dtype == theirs.dtype, name
            assert ours.tobytes() == theirs.tobytes(), name
    exiting = native.Router(n, threshold=exact, platt=platt).route(logits, gate).exited
    assert exiting[scores == exact].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_a_row_decides_as_the_softmax_policy_does(backend, k):
    rng = np.random.default_rng(k)
    logits = hard_logits(rng, 5000, k)
    both = np.concatenate([np.zeros_like(logits), logits], axis=1) if k == 1 else logits
    probs = softmax(both)
    sure = confidence(probs)
    if k == 1:
        sure[np.isneginf(logits[:, 0])] = np.nan  # the one deviation: an infinite difference is nobody's answer
    undefined = np.isnan(sure)
    assert 100 < undefined.sum() < 4000
    with native.use(backend):
        routed = native.Router(5000, threshold=0.8).route(logits)
    assert np.array_equal(np.isnan(routed.probability), undefined)
    assert np.array_equal(routed.label == -1, undefined)
    assert routed.score.tobytes() == routed.probability.tobytes()
    known = ~undefined
    # Within one rounding to float32 of the float64 value.
    assert np.abs(routed.probability[known].astype(np.float64) / sure[known] - 1).max() <= 2.0**-24 + 1e-14
    clear = known & ((probs >= sure[:, None] - 1e-12).sum(axis=1) == 1)
    assert np.array_equal(routed.label[clear], probs.argmax(axis=1)[clear])
    far = np.abs(sure - 0.8) > 1e-6
    assert np.array_equal(routed.exited[far], (sure >= 0.8)[far])
    assert routed.deferred.tolist() == np.flatnonzero(routed.exited == 0).tolist()
    assert not routed.exited[undefined].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_stated_cases(backend):
    inf, nan = np.inf, np.nan
    rows = np.array(
        [[0, 0], [1, 0], [0, 1], [nan, 5], [5, nan], [inf, 0], [inf, inf], [-inf, -inf], [-inf, 3], [0, -0.0]],
        np.float32,
    )
    with native.use(backend):
        routed = native.Router(10, threshold=0.5).route(rows)
        assert routed.label.tolist() == [0, 0, 1, -1, -1, -1, -1, -1, 1, 0]
        assert routed.exited.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 1, 1]
        assert routed.deferred.tolist() == [3, 4, 5, 6, 7]
        assert routed.score[[0, 8, 9]].tolist() == [0.5, 1, 0.5]
        single = np.array([[0], [1e-3], [-1e-3], [200], [-800], [nan], [inf], [-inf]], np.float32)
        routed = native.Router(8, threshold=0.9).route(single)
        assert routed.label.tolist() == [0, 1, 0, 1, 0, -1, -1, -1]
        assert routed.deferred.tolist() == [0, 1, 2, 5, 6, 7]
        gate = np.array([0, 4, -4, 9, nan, 9, inf, -inf], np.float32)
        answers = np.repeat(np.array([[2, 1]], np.float32), 8, axis=0)
        answers[3, 0] = nan
        routed = native.Router(8, threshold=0.5, platt=(2.0, -1.0)).route(answers, gate)
        assert routed.score[:3] == pytest.approx([1 / (1 + math.e), 1 / (1 + math.exp(-7)), 1 / (1 + math.exp(9))])
        # No answer, no exit, however sure the gate; and a gate that overflowed is sure of nothing.
        assert np.isnan(routed.score[3:5]).all() and np.isnan(routed.score[6:]).all()
        assert routed.exited.tolist() == [0, 1, 0, 0, 0, 1, 0, 0]
        assert routed.label.tolist() == [0, 0, 0, -1, 0, 0, 0, 0]
        nothing = native.Router(8, threshold=math.inf).route(rows[:8])
        assert nothing.deferred.tolist() == list(range(8))
        empty = native.Router(8, threshold=0.5).route(np.zeros((0, 3), np.float32))
        assert [values.size for values in empty] == [0] * 5


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 700), k=st.integers(1, 5))
def test_a_row_s_fate_is_its_own(seed, n, k):
    rng = np.random.default_rng(seed)
    logits = hard_logits(rng, n, k)
    router = native.Router(700, threshold=0.7)
    whole = copy(router.route(logits))
    order = rng.permutation(n)
    moved = copy(router.route(np.ascontiguousarray(logits[order])))
    for ours, theirs in zip(moved[:4], whole[:4], strict=True):
        assert ours.tobytes() == theirs[order].tobytes()
    alone = router.route(logits[n // 2 : n // 2 + 1])
    assert [values[0].tobytes() for values in alone[:4]] == [values[n // 2].tobytes() for values in whole[:4]]


def test_the_exponential_is_that_of_the_mathematics():
    x = np.concatenate([-np.logspace(-18, np.log10(707.9), 20_000), [0.0, -708.0, -708.1, -np.inf]])
    ours = _reference._exponential(x)
    assert np.abs(ours[:-2] / np.exp(x[:-2]) - 1).max() < 1e-14
    assert ours[-4] == 1 and (ours[-2:] < 1e-300).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_deferred_rows_go_through_stage_b_and_come_back(backend):
    rng = np.random.default_rng(0)
    logits, tokens = hard_logits(rng, 300, 2), rng.normal(size=(300, 5, 3)).astype(np.float32)
    router = native.Router(300, threshold=0.9)
    with native.use(backend):
        routed = router.route(logits)
        before = copy(routed)
        rows = before.deferred
        assert 0 < rows.size < 300
        gathered = router.gather(tokens, routed.deferred)
        assert gathered.tobytes() == tokens[rows].tobytes() and gathered.shape == (rows.size, 5, 3)
        label = rng.integers(0, 2, rows.size).astype(np.int32)
        probability, score = rng.random((2, rows.size)).astype(np.float32)
        router.merge(routed, label, probability, score)
    for name, answers in (("label", label), ("probability", probability), ("score", score)):
        expected = getattr(before, name).copy()
        expected[rows] = answers
        assert getattr(routed, name).tobytes() == expected.tobytes()
    assert routed.exited.tobytes() == before.exited.tobytes()
    nobody = router.gather(tokens, np.zeros(0, np.int32))
    assert nobody.shape == (0, 5, 3)


@needs_core
def test_a_warm_router_allocates_nothing():
    rng = np.random.default_rng(0)
    logits, tokens = hard_logits(rng, 256, 2), rng.normal(size=(256, 4000)).astype(np.float32)
    router = native.Router(256, threshold=0.9)

    def turn():
        return router.gather(tokens, router.route(logits).deferred)

    with native.use("compiled"):
        turn()
        tracemalloc.start()
        for _ in range(20):
            turn()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # Array objects alone: a buffer of this batch's tokens would be 4 MB, one of its scores 1 kB.
    assert peak < 4096


@needs_core
@pytest.mark.parametrize("platt", [None, (1.7, -0.3)], ids=["probability", "gate"])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_kernel_and_twin_agree_on_a_million_rows(k, platt):
    rng = np.random.default_rng(100 + k)
    n = 1_000_000
    logits = hard_logits(rng, n, k)
    gate = None if platt is None else hard_gates(rng, n)
    assert np.isnan(logits).any() and np.isposinf(logits).any() and np.isneginf(logits).any()
    router = native.Router(n, threshold=0.75, platt=platt)
    with native.use("reference"):
        expected = copy(router.route(logits, gate))
    for ours, theirs in zip(router.route(logits, gate), expected, strict=True):
        assert ours.tobytes() == theirs.tobytes()


ALLOCATIONS = """
import ctypes, sys
import numpy as np
from stage1_pro import native

counted = ctypes.CDLL(None).allocations
counted.restype = ctypes.c_long
rng = np.random.default_rng(0)
tokens, gate = rng.normal(size=(256, 40, 10)).astype(np.float32), rng.normal(size=256).astype(np.float32)
for k in (1, 2, 7):
    logits = rng.normal(size=(256, k)).astype(np.float32)
    for platt in (None, (1.0, 0.0)):
        router = native.Router(256, threshold=0.7, platt=platt)
        label, probability = np.zeros(256, np.int32), np.zeros(256, np.float32)

        def turn():
            routed = router.route(logits, None if platt is None else gate)
            router.gather(tokens, routed.deferred)
            m = routed.deferred.size
            router.merge(routed, label[:m], probability[:m], probability[:m])

        for _ in range(10):
            turn()
        blocks, before = sys.getallocatedblocks(), counted()
        for _ in range(1000):
            turn()
        made, left = counted() - before, sys.getallocatedblocks() - blocks
        assert made == 0 and left < 20, (k, platt, made, left)
control = counted()
native.Router(100_000, threshold=0.7)
assert counted() > control
print("nothing allocated")
"""


@needs_core
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="counting needs glibc and a C compiler"
)
def test_a_warm_router_never_calls_the_allocator(repository, tmp_path):
    """Python's own small objects come from its pools; of malloc, calloc and realloc a call makes not one."""
    library = tmp_path / "count.so"
    source = repository / "tests/count_malloc.c"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATIONS],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": str(library), "STAGE1_BACKEND": "compiled"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "nothing allocated"


@needs_core
def test_routers_of_several_threads_do_not_meet():
    rng = np.random.default_rng(2)
    batches = [hard_logits(rng, 20_000, 3) for _ in range(8)]
    serial = [[v.tobytes() for v in native.Router(20_000, threshold=0.7).route(batch)] for batch in batches]

    def work(batch):
        return [v.tobytes() for v in native.Router(20_000, threshold=0.7).route(batch)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, batches)) == serial


def test_wrong_arguments_are_named():
    good = np.zeros((4, 2), np.float32)
    gate = np.zeros(4, np.float32)
    plain, gated = native.Router(4, threshold=0.5), native.Router(4, threshold=0.5, platt=(1.0, 0.0))
    routed = plain.route(good)
    index = np.array([0, 4], np.int32)
    for call, message in [
        (lambda: native.Router(0, threshold=0.5), "max_rows must be 1 to"),
        (lambda: native.Router(4, threshold=float("nan")), "threshold must be a number, got NaN"),
        (lambda: native.Router(4, threshold=0.5, platt=(1.0, math.inf)), "platt must be two finite numbers"),
        (lambda: plain.route(good.astype(np.float64)), r"logits must be contiguous float32 \[N, K\], got float64"),
        (lambda: plain.route(good.T), "logits must be contiguous float32"),
        (lambda: plain.route(good[0]), "logits must be contiguous float32"),
        (lambda: plain.route(np.zeros((5, 2), np.float32)), "at most 4 rows"),
        (lambda: plain.route(np.zeros((4, 0), np.float32)), "at least one class"),
        (lambda: plain.route(good, gate), "gate must be None, got values"),
        (lambda: gated.route(good), "gate must be given, got None"),
        (lambda: gated.route(good, gate[:3]), r"gate must have shape \[4\]"),
        (lambda: plain.gather(good.T, index), "source must be contiguous float32"),
        (lambda: plain.gather(good, index), "index must be from 0 to 3, got 0 to 4"),
        (lambda: plain.gather(good, -index), "index must be from 0 to 3, got -4 to 0"),
        (lambda: plain.gather(good, index.astype(np.int64)), r"index must be contiguous int32 \[M\], got int64"),
        (
            lambda: plain.merge(routed, np.zeros(1, np.int32), gate[:1], gate[:1]),
            r"label must be contiguous int32 \[0\]",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            call()
