"""Sort, sweep and dual-threshold search against brute force, NumPy and scikit-learn."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_pro import _native

COMPILED = importlib.util.find_spec("stage1_pro._core") is not None
needs_core = pytest.mark.skipif(not COMPILED, reason="stage1_pro._core is not built (STAGE1_PURE, or no compiler)")
BACKENDS = ["reference", pytest.param("compiled", marks=needs_core)]


def hard_confidences(rng, n):
    """Confidences of every kind that a radix sort could get wrong, by name."""
    exponents = rng.integers(-300, 300, n)
    return {
        "softmax": rng.uniform(0.5, 1, n),
        "float32 in float64": rng.random(n).astype(np.float32).astype(np.float64),
        "saturated": 1 - 10.0 ** rng.uniform(-17, -9, n),
        "two runs of close values": np.where(rng.random(n) < 0.5, 0.25, 0.75) + rng.integers(0, 9, n) * 2.0**-52,
        "levels": rng.integers(0, 7, n) / 7,
        "one": np.full(n, 0.3),
        "zeros": np.where(rng.random(n) < 0.5, -0.0, 0.0),
        "signs and sizes": rng.choice([-1, 1], n) * 10.0**exponents,
        "infinities": rng.choice([np.inf, -np.inf, 0.0, -0.0, 1.0, 5e-324, -5e-324], n),
    }


@needs_core
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33, 34, 500, 20_000])
@pytest.mark.parametrize("losses", [False, True], ids=["errors", "losses"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_order_is_that_of_the_twin(n, losses, dtype):
    rng = np.random.default_rng(n)
    with np.errstate(over="ignore", under="ignore"):
        kinds = {name: values.astype(dtype) for name, values in hard_confidences(rng, n).items()}
    for name, confidence in kinds.items():
        error = rng.choice([rng.random(n), rng.integers(0, 4, n) / 4]) if losses else rng.random(n) < 0.3
        with _native.use("reference"):
            expected = _native.order(confidence, error)
        found = _native.order(confidence, error)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == theirs.dtype == np.uint32
            assert np.array_equal(ours, theirs), name


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(st.floats(allow_nan=False), st.integers(0, 3)), min_size=1, max_size=70))
def test_the_order_is_python_s_own(backend, rows):
    confidence, error = np.array([c for c, _ in rows]), np.array([e / 3 for _, e in rows])
    with _native.use(backend):
        places, tie_ends = _native.order(confidence, error)
    expected = sorted(range(len(rows)), key=lambda row: (-confidence[row], error[row], row))
    assert places.tolist() == expected
    ends = [
        i + 1 for i in range(len(rows)) if i + 1 == len(rows) or confidence[expected[i]] != confidence[expected[i + 1]]
    ]
    assert tie_ends.tolist() == ends
