"""The router on a GPU, for whatever shows its device memory: torch, CuPy, Numba."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from stage1_pro.errors import DependencyError, InputError
from stage1_pro.native.router import check_batch, check_rule


def cuda_why() -> str | None:
    """One line on the CUDA router for ``stage1 doctor``: None where it is not built."""
    module = _load_cuda()
    if module is None:
        return None
    count, missing = module.devices()
    found = f"{count} device{'s' * (count != 1)}" if count else f"no device: {missing}"
    return f"stage1_pro._cuda {module.__version__} for sm {module.built()[0]}, {found}"


@functools.cache
def _load_cuda() -> ModuleType | None:
    try:
        return importlib.import_module("stage1_pro._cuda")
    except ModuleNotFoundError as error:
        if error.name != "stage1_pro._cuda":
            raise
        return None


def _cuda() -> ModuleType:
    """The CUDA module where it is built and has a device; DependencyError naming what is missing otherwise."""
    module = _load_cuda()
    if module is None:
        raise DependencyError(
            "stage1_pro._cuda is not built; with a CUDA toolkit at hand, install again with "
            "--config-settings=cmake.define.STAGE1_CUDA=ON"
        )
    count, missing = module.devices()
    if count == 0:
        raise DependencyError(
            f"the CUDA router needs a device, got none ({missing}); install or update the NVIDIA driver, or use Router"
        )
    return module


class DeviceArray:
    """Memory of a device that another object owns and keeps: what torch, CuPy and Numba read without a copy.

    ``torch.as_tensor(array, device="cuda")`` shares it. ``shape``, ``dtype``, ``address``; ``owner`` is kept alive.
    """

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str, owner: object) -> None:
        self.address, self.shape, self.dtype, self.owner = address, shape, np.dtype(dtype), owner

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False),
                "strides": None, "stream": None}  # fmt: skip


@dataclass(frozen=True, eq=False)
class CudaRouted:
    """``Routed`` on the device, of the router's ``max_rows``: rows of the last batch count, the others are older.

    ``count`` int32 [1] says how many of ``deferred`` are meant.
    """

    exited: DeviceArray
    score: DeviceArray
    label: DeviceArray
    probability: DeviceArray
    deferred: DeviceArray
    count: DeviceArray


class CudaRouter:
    """``Router`` on a GPU: ``route``, ``gather`` and ``merge`` are a launch each, on your stream, and wait for nothing.

    The bits are those of ``Router``. Arrays are C-contiguous and on the device: torch tensors, or anything with
    ``__cuda_array_interface__`` (CuPy, Numba). A stream is torch's or CuPy's object or its handle; 0 is the default
    stream. What is enqueued reads your arrays later: keep them until then. All three calls can be captured into a CUDA
    graph. Not for use from several threads or on several streams at once: give each its own.

    Stage B wants a batch that the host knows: ``mark`` after ``route``, then ``wait`` gives the count as soon as that
    launch is done, through pinned memory, and whatever was enqueued in between runs on.

    >>> router = CudaRouter(256, threshold=0.9)  # doctest: +SKIP
    >>> router.route(logits, stream=stream)  # doctest: +SKIP
    >>> router.gather(hidden, into, stream=stream)  # doctest: +SKIP
    >>> router.mark(stream)  # doctest: +SKIP
    >>> logits_b = stage_b(into[: bucket(router.wait())])  # doctest: +SKIP
    >>> router.merge(logits_b, stream=stream)  # doctest: +SKIP

    Args:
        max_rows: the largest batch; nothing is allocated after this.
        threshold: rounded up to float32, so that nothing exits below it; no NaN.
        platt: None decides by probability, (scale, offset) by sigmoid(scale * gate + offset).
        device: number of the device.

    Raises:
        DependencyError: the module is not built, or there is no device.
        InputError: arguments as for ``Router``.
    """

    def __init__(
        self, max_rows: int, *, threshold: float, platt: tuple[float, float] | None = None, device: int = 0
    ) -> None:
        self.max_rows = max_rows
        self.uses_gate = platt is not None
        self.threshold = check_rule(max_rows, threshold, platt)
        module = _cuda()
        scale, offset = platt or (0.0, 0.0)
        self._router = module.Router(max_rows, self.uses_gate, scale, offset, self.threshold, device)
        self.device = device
        dtypes = {"exited": "u1", "score": "f4", "label": "i4", "probability": "f4", "deferred": "i4"}
        made = self._router
        arrays = {name: DeviceArray(getattr(made, name), (max_rows,), dtype, made) for name, dtype in dtypes.items()}
        self.routed = CudaRouted(**arrays, count=DeviceArray(made.count_address, (1,), "i4", made))
        self._rows = 0

    def route(self, logits: Any, gate: Any = None, *, stream: Any = 0) -> CudaRouted:
        """Decide rows: logits [N, K] float32 (K = 1: the logit of the second of two classes), gate [N] float32."""
        address, shape = _on_device("logits", logits, ("float32",), 2)
        check_batch(shape, self.max_rows, self.uses_gate, gate)
        at = 0
        if gate is not None:
            at, rows = _on_device("gate", gate, ("float32",), 1)
            if rows[0] != shape[0]:
                raise InputError(f"gate must have shape [{shape[0]}] as logits has rows, got {list(rows)}; one per row")
        self._router.route(address, shape[0], shape[1], at, _stream(stream))
        self._rows = shape[0]
        return self.routed

    def gather(self, source: Any, out: Any, *, stream: Any = 0) -> None:
        """Copy the deferred rows of source [N, ...] to the front of out [N or more, ...], both of one dtype and width.

        Rows of ``out`` behind them stay as they were. Float32, float16, bfloat16, int8, uint8 or int32.
        """
        address, shape = _on_device("source", source, tuple(_SIZES), None)
        into, room = _on_device("out", out, (_dtype_name(source),), None)
        if shape[0] != self._rows or room[0] < shape[0] or room[1:] != shape[1:]:
            raise InputError(
                f"source must have {self._rows} rows as logits had, and out as many of the same width, got "
                f"{list(shape)} and {list(room)}; make out for the largest batch"
            )
        row_bytes = math.prod(shape[1:]) * _SIZES[_dtype_name(source)]
        self._router.gather(address, row_bytes, shape[0], into, _stream(stream))

    def merge(self, logits: Any, *, stream: Any = 0) -> CudaRouted:
        """Answer the deferred rows by Stage B's logits [M or more, K] float32, M the count; others are ignored.

        Label, probability and, as score, the probability are what ``Router`` gives of these logits; ``exited`` still
        tells whose they are. More rows than logits must not be deferred: the host that chose M has seen the count.
        """
        address, shape = _on_device("logits", logits, ("float32",), 2)
        if shape[1] == 0:
            raise InputError(f"logits must have at least one class, got shape {list(shape)}; give Stage B's")
        self._router.merge(address, shape[1], min(shape[0], self._rows), _stream(stream))
        return self.routed

    def mark(self, stream: Any = 0) -> None:
        """Note the place on the stream that ``wait`` waits for."""
        self._router.mark(_stream(stream))

    def wait(self) -> int:
        """How many rows are deferred, once the stream has come to the mark. Blocks the host, not the device."""
        return int(self._router.count())

    def switch(self, buckets: Sequence[int], graphs: Sequence[Any]) -> BucketSwitch:
        """Stage B captured once for each bucket, of which the device runs the smallest that holds the count.

        Args:
            buckets: increasing numbers of rows, the last at least ``max_rows``.
            graphs: torch's ``CUDAGraph(keep_graph=True)`` or a ``cudaGraph_t`` handle each, all of this device and
                without allocations. They are copied, the memory they name is not: torch's are kept alive.

        Raises:
            InputError: buckets that do not increase or hold too few rows, other numbers of graphs.
            RuntimeError: CUDA refuses; before 12.8 always.
        """
        sizes = [int(rows) for rows in buckets]
        if not 1 <= len(sizes) <= 32 or sizes[0] < 1 or sorted(set(sizes)) != sizes or sizes[-1] < self.max_rows:
            raise InputError(
                f"buckets must be 1 to 32 increasing numbers of rows up to {self.max_rows} or more, got {sizes}"
            )
        if len(graphs) != len(sizes):
            raise InputError(f"graphs must be one per bucket, got {len(graphs)} for {len(sizes)}; capture each")
        handles = [int(graph.raw_cuda_graph()) if hasattr(graph, "raw_cuda_graph") else int(graph) for graph in graphs]
        made = _cuda().BucketSwitch(sizes, handles, self.routed.count.address, self.device)
        return BucketSwitch(made, self, graphs)


class BucketSwitch:
    """What ``CudaRouter.switch`` gives; keeps router and graphs alive. Compiled, but run on no GPU so far."""

    def __init__(self, switch: Any, router: CudaRouter, graphs: Sequence[Any]) -> None:
        self._switch, self._kept = switch, (router, list(graphs))

    def launch(self, stream: Any = 0) -> None:
        """Enqueue: the host neither waits nor learns the count; nothing runs where nothing is deferred."""
        self._switch.launch(_stream(stream))


# torch names a dtype as NumPy does but for bfloat16, which NumPy lacks.
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int8": 1, "uint8": 1}


def _dtype_name(array: Any) -> str:
    if hasattr(array, "data_ptr"):
        return str(array.dtype).removeprefix("torch.")
    return str(np.dtype(array.__cuda_array_interface__["typestr"]))


def _on_device(name: str, array: Any, dtypes: tuple[str, ...], ndim: int | None) -> tuple[int, tuple[int, ...]]:
    """Address and shape of a contiguous array on a device."""
    wanted = f"contiguous {' or '.join(dtypes)} {'[N, ...]' if ndim is None else ['[N]', '[N, K]'][ndim - 1]} on a GPU"
    if hasattr(array, "data_ptr"):
        here, contiguous = bool(array.is_cuda), bool(array.is_contiguous())
        address, shape = int(array.data_ptr()), tuple(int(size) for size in array.shape)
    elif hasattr(array, "__cuda_array_interface__"):
        facts = array.__cuda_array_interface__
        address, shape = int(facts["data"][0]), tuple(int(size) for size in facts["shape"])
        here, strides = True, facts.get("strides")
        item = np.dtype(facts["typestr"]).itemsize
        packed = [item * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        contiguous = strides is None or list(strides) == packed
    else:
        raise InputError(f"{name} must be {wanted}, got {type(array).__name__}; move it there")
    dtype = _dtype_name(array)
    if not here or not contiguous or dtype not in dtypes or not shape or (ndim is not None and len(shape) != ndim):
        place = "on a GPU" if here else "in host memory"
        form = "" if contiguous else ", strided"
        raise InputError(f"{name} must be {wanted}, got {dtype} {list(shape)} {place}{form}; convert it first")
    return address, shape


def _stream(stream: Any) -> int:
    """Handle of a stream: torch's, CuPy's, or the number itself."""
    for name in ("cuda_stream", "ptr"):
        stream = getattr(stream, name, stream)
    return int(stream)
