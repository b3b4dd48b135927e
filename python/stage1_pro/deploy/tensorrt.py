"""Compiled engines executed on an NVIDIA GPU: TensorRT for RTX and classic TensorRT behind one runtime.

Importing it needs neither; starting one without library, driver or GPU is an error that names what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import stat
import weakref
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from stage1_pro.deploy.bundle import STAGES, Bundle
from stage1_pro.deploy.engine import EngineTarget, import_builder, read_engine
from stage1_pro.deploy.manifest import EngineEntry
from stage1_pro.deploy.runtime import Arrays, How, Runtime, Source, bundle_of
from stage1_pro.errors import ArtifactError, DependencyError, DeviceError, need
from stage1_pro.files import home_folder, sha256_bytes, write_bytes
from stage1_pro.words import StageName

if TYPE_CHECKING:
    from stage1_pro.deploy.trained import Trained

# From the fastest to the surest; what a recipe builds for itself comes before all of its fallbacks.
LADDER = ("int8", "fp8", "res32", "fp16", "bf16", "fp32")


class Gpu:
    """The first CUDA device with a stream of its own, through the CUDA runtime that cuda-bindings brings.

    Raises:
        DependencyError: cuda-bindings, the NVIDIA driver or a GPU is missing; the message says which.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import runtime as cudart
        except ImportError as error:
            raise need("rtx", "cuda-bindings") from error
        self._cudart = cudart
        status, count = cudart.cudaGetDeviceCount()
        if status.value != 0 or count == 0:
            raise DependencyError(
                f"engines must have an NVIDIA GPU with its driver, got {status.name if status.value else 'no GPU'}; "
                "install the driver (nvidia-smi shows it), or use --runtime onnxruntime"
            )
        self.call("cudaSetDevice", 0)
        self.stream = int(self.call("cudaStreamCreateWithFlags", cudart.cudaStreamNonBlocking))
        self._events = tuple(self.call("cudaEventCreate") for _ in range(2))

    def call(self, function: str, *arguments: Any) -> Any:
        """One function of the CUDA runtime; its result, or DeviceError."""
        error, *results = getattr(self._cudart, function)(*arguments)
        if error.value != 0:
            raise DeviceError(f"the GPU must go on working, got {error.name} from {function}; see dmesg and nvidia-smi")
        return results[0] if results else None

    def identity(self) -> str:
        """Compute capability and driver, as part of a file's name; kernels compiled for one do not run on another."""
        properties = self.call("cudaGetDeviceProperties", 0)
        return f"sm{properties.major}{properties.minor}-cuda{self.call('cudaDriverGetVersion')}"

    def timed(self, work: Any) -> float:
        """Seconds between two events around what ``work`` enqueues; returns when the stream is through with it."""
        self.call("cudaEventRecord", self._events[0], self.stream)
        work()
        self.call("cudaEventRecord", self._events[1], self.stream)
        self.call("cudaStreamSynchronize", self.stream)
        return float(self.call("cudaEventElapsedTime", *self._events)) / 1e3


class _Buffer:
    """Memory of one tensor on both sides: pinned [rows, ...] on the host, and as much on the device."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._gpu = gpu
        size = math.prod(shape) * np.dtype(dtype).itemsize
        self.device = int(gpu.call("cudaMalloc", size))
        pinned = int(gpu.call("cudaHostAlloc", size, 0))
        for function, address in (("cudaFree", self.device), ("cudaFreeHost", pinned)):
            # At the interpreter's end the driver is gone first, and its memory with it.
            weakref.finalize(self, gpu.call, function, address).atexit = False
        self.host = np.ctypeslib.as_array((ctypes.c_byte * size).from_address(pinned)).view(dtype).reshape(shape)
        self._pinned = pinned

    def copy(self, rows: int, *, to_device: bool) -> None:
        """Enqueue the copy of the first rows."""
        kind = self._gpu._cudart.cudaMemcpyKind
        size = self.host[:rows].nbytes
        if to_device:
            kind, target, source = kind.cudaMemcpyHostToDevice, self.device, self._pinned
        else:
            kind, target, source = kind.cudaMemcpyDeviceToHost, self._pinned, self.device
        self._gpu.call("cudaMemcpyAsync", target, source, size, kind, self._gpu.stream)


class TensorRtRuntime(Runtime):
    """Both stages of a bundle as engines; rows are padded to buckets of the engine's batch profile.

    Every bucket is one shape, so that kernels are specialised and CUDA graphs captured a handful of times; buffers on
    both sides are allocated once, for the largest bucket seen.

    Whoever starts it with a verified bundle and an engine of each stage has asked whether these are trusted.

    Raises:
        ArtifactError: an engine was changed since the bundle was verified, is malformed, does not load on this
            GPU, or has other inputs and outputs than the bundle says.
        DependencyError: the library, the driver or a GPU is missing.
    """

    target: ClassVar[EngineTarget]

    def __init__(self, bundle: Bundle, engines: Mapping[StageName, EngineEntry]) -> None:
        trt = import_builder(self.target)
        plans = {stage: read_engine(bundle, engines[stage]) for stage in STAGES}
        self._gpu = Gpu()
        self._engines = {stage: _Engine(trt, self._gpu, bundle, engines[stage], plans[stage]) for stage in STAGES}
        self.device_seconds = 0.0

    @classmethod
    def sources(cls, bundle: Bundle) -> list[Source]:
        """The folders of engines for this library: the recipe's own precision, then its fallbacks from the fastest."""
        folders: dict[str, dict[StageName, EngineEntry]] = {}
        for entry in bundle.manifest.engines:
            folders.setdefault(str(PurePosixPath(entry.path).parent), {})[entry.stage] = entry
        found = []
        for folder, engines in folders.items():
            if {entry.target for entry in engines.values()} == {cls.target}:
                precision = next(iter(engines.values())).precision
                source = Source(folder, precision if "stage_a" in engines else "incomplete", precision, engines)
                found.append(((PurePosixPath(folder).name != cls.target, LADDER.index(precision)), source))
        return [source for _, source in sorted(found, key=lambda one: one[0])]

    @classmethod
    def open(cls, model: Bundle | Trained, how: How) -> Self:
        """Load the engines of the source that ``how`` names."""
        bundle = bundle_of(model, cls.name)
        source = how.source or next(iter(cls.sources(bundle)), None)
        if source is None or set(source.engines) != set(STAGES):
            raise ArtifactError(f"{cls.name} must get an engine of both stages, got none for one of them")
        return cls(bundle, source.engines)

    def run(self, stage: StageName, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """As ``Runtime.run`` says; a batch may be of any size."""
        outputs, seconds = self._engines[stage].run(inputs)
        self.device_seconds = (self.device_seconds or 0.0) + seconds
        return outputs

    def settle(self) -> None:
        """Keep what was compiled for this GPU so far in the user's cache folder, for the next start."""
        for engine in self._engines.values():
            engine.save_cache()


class TensorRtForRtx(TensorRtRuntime):
    """TensorRT for RTX."""

    name = "tensorrt_rtx"
    target = "rtx"


class ClassicTensorRt(TensorRtRuntime):
    """Classic TensorRT."""

    name = "tensorrt"
    target = "tensorrt"


def buckets(batch: tuple[int, int, int]) -> list[int]:
    """Batch sizes rows are padded to: powers of two within the profile, its smallest, optimal and largest batch.

    >>> buckets((1, 8, 48))
    [1, 2, 4, 8, 16, 32, 48]
    """
    low, best, high = batch
    powers = {2**power for power in range(high.bit_length()) if low <= 2**power <= high}
    return sorted(powers | {low, best, high})


def cache_folder() -> Path:
    """The user's own folder for kernels compiled on this machine: ``$XDG_CACHE_HOME/stage1_pro/kernels``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification asks for a relative one to be ignored.
    cache = Path(base) if Path(base).is_absolute() else home_folder("XDG_CACHE_HOME") / ".cache"
    return cache / "stage1_pro" / "kernels"


def read_cache(path: Path) -> bytes | None:
    """A cached file, or None: kernels run, so what another user could have written is left alone."""
    mine = os.getuid() if hasattr(os, "getuid") else 0
    try:
        with path.open("rb") as file:
            for info in (os.fstat(file.fileno()), path.parent.stat()):
                if info.st_uid != mine or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    return None
            return file.read()
    except OSError:
        return None


class _Engine:
    """One stage: its context, and a buffer a tensor."""

    def __init__(self, trt: Any, gpu: Gpu, bundle: Bundle, entry: EngineEntry, plan: bytes) -> None:
        self._gpu, self._entry = gpu, entry
        stage = bundle.manifest.stages[entry.stage]
        self._shapes = {**stage.inputs, **stage.outputs}
        self._inputs, self._outputs = list(stage.inputs), list(stage.outputs)
        self._buckets = buckets(entry.batch)
        # The engine dies with its runtime, and the runtime with its logger.
        self._keep: list[Any] = [trt.Logger(trt.Logger.ERROR)]
        self._keep.append(trt.Runtime(self._keep[0]))
        engine = self._keep[1].deserialize_cuda_engine(plan)
        if engine is None:
            raise ArtifactError(
                f"{entry.path} must load on this GPU, got nothing from {trt.__name__} {trt.__version__}; it was built "
                f"by {entry.builder} {entry.builder_version} for {', '.join(entry.compute_capabilities) or 'this card'}"
            )
        self._keep.append(engine)
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if names != set(self._shapes):
            raise ArtifactError(f"{entry.path} must have the tensors {sorted(self._shapes)}, got {sorted(names)}")
        try:
            self._dtypes = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        except TypeError as error:
            raise ArtifactError(f"{entry.path} must take and give numbers NumPy knows, got: {error}") from None
        self._cache: Any = None
        self._cache_path = cache_folder() / f"{sha256_bytes(plan)[:32]}-{trt.__version__}-{gpu.identity()}.cache"
        self._context = self._create_context(trt, engine)
        if self._context is None:
            raise ArtifactError(f"{entry.path} must start on this GPU, got no context; is its memory taken?")
        self._buffers: dict[str, _Buffer] = {}
        self._bucket = self._rows = 0

    def _create_context(self, trt: Any, engine: Any) -> Any:
        if not hasattr(trt, "CudaGraphStrategy"):
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = config.create_runtime_cache()
        stored = read_cache(self._cache_path)
        if stored:
            # Refuses by itself what another version, driver or card compiled.
            self._cache.deserialize(stored)
        config.set_runtime_cache(self._cache)
        self._keep.append(config)
        return engine.create_execution_context(config)

    def save_cache(self) -> None:
        if self._cache is None:
            return
        data = bytes(memoryview(self._cache.serialize()))
        if data and data != read_cache(self._cache_path):
            # A home that cannot be written to costs the next start some seconds, and this one nothing.
            with contextlib.suppress(OSError):
                self._cache_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                write_bytes(self._cache_path, data, mode=0o600)

    def run(self, inputs: Mapping[str, NDArray[np.float32]]) -> tuple[Arrays, float]:
        """Outputs by name and seconds between events on the device."""
        n = len(inputs[self._inputs[0]])
        outputs = {name: np.empty((n, *self._shapes[name][1:]), np.float32) for name in self._outputs}
        seconds = 0.0
        for start in range(0, n, self._buckets[-1]):
            rows = min(n - start, self._buckets[-1])
            bucket = next(size for size in self._buckets if size >= rows)
            self._select(bucket)
            for name in self._inputs:
                buffer = self._buffers[name]
                buffer.host[:rows] = inputs[name][start : start + rows]
                # Padded with a row that is there: zeros could be the one input that overflows.
                buffer.host[rows:bucket] = inputs[name][start + rows - 1]
                buffer.copy(bucket, to_device=True)
            seconds += self._gpu.timed(self._enqueue)
            for name in self._outputs:
                self._buffers[name].copy(rows, to_device=False)
            self._gpu.call("cudaStreamSynchronize", self._gpu.stream)
            for name in self._outputs:
                outputs[name][start : start + rows] = self._buffers[name].host[:rows]
        return outputs, seconds

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._gpu.stream):
            raise DeviceError(f"{self._entry.path} must run on this GPU, got a refusal at batch {self._bucket}")

    def _select(self, bucket: int) -> None:
        if bucket > self._rows:
            # Before the new ones are allocated: together they might not fit.
            self._buffers.clear()
            for name, (_, *rest) in self._shapes.items():
                self._buffers[name] = _Buffer(self._gpu, (bucket, *rest), self._dtypes[name])
                self._context.set_tensor_address(name, self._buffers[name].device)
            self._rows = bucket
        if bucket != self._bucket:
            for name in self._inputs:
                if not self._context.set_input_shape(name, (bucket, *self._shapes[name][1:])):
                    raise DeviceError(f"{self._entry.path} must take {bucket} rows as its profile says, got a refusal")
            self._bucket = bucket
