"""Which kernels are in use: the compiled ones where they are built, or their NumPy twin.

``STAGE1_BACKEND=compiled`` or ``reference`` in the environment forces a backend. Both draw the same resamples and give
the same integer sums, bit for bit.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Literal

from stage1_pro.errors import DependencyError, InputError
from stage1_pro.native import _reference

Backend = Literal["compiled", "reference"]


def _load(wanted: str | None) -> tuple[ModuleType, Backend, str]:
    if wanted not in (None, "", "compiled", "reference"):
        raise InputError(f"STAGE1_BACKEND must be compiled or reference, got '{wanted}'; unset it to choose by itself")
    if wanted == "reference":
        return _reference, "reference", "the NumPy twin was asked for"
    try:
        core = importlib.import_module("stage1_pro._core")
    except ModuleNotFoundError as error:
        # Only the absence of _core itself is a choice of installation; anything else in it is a defect to be seen.
        if error.name != "stage1_pro._core":
            raise
        if wanted == "compiled":
            raise DependencyError(
                "stage1_pro._core is not built; with a C++20 compiler at hand, install again without STAGE1_PURE"
            ) from None
        return _reference, "reference", "stage1_pro._core is not built; NumPy computes the same, more slowly"
    return core, "compiled", f"stage1_pro._core {core.__version__}"


_kernels, _backend, _why = _load(os.environ.get("STAGE1_BACKEND"))


def kernels() -> ModuleType:
    """The module whose functions compute."""
    return _kernels


def backend() -> Backend:
    """Which kernels are in use."""
    return _backend


def why() -> str:
    """One line that says why, for ``stage1 doctor``."""
    return _why


@contextlib.contextmanager
def use(name: Backend) -> Iterator[None]:
    """Use one backend inside a ``with`` block (tests and benchmarks; not for use from several threads)."""
    global _kernels, _backend, _why
    before = _kernels, _backend, _why
    _kernels, _backend, _why = _load(name)
    try:
        yield
    finally:
        _kernels, _backend, _why = before
