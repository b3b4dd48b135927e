"""OpenVINO on the CPU: both fp32 graphs of a bundle, executed in fp32. Importing it needs no OpenVINO."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from stage1_pro.deploy.bundle import Bundle
from stage1_pro.deploy.graphs import check_graph
from stage1_pro.deploy.runtime import Arrays, How, Runtime, bundle_of, check_outputs
from stage1_pro.errors import ArtifactError, InputError, need, printable
from stage1_pro.words import StageName

if TYPE_CHECKING:
    from stage1_pro.deploy.trained import Trained


class OpenVinoRuntime(Runtime):
    """Both graphs of a verified bundle compiled by OpenVINO for this machine's CPU; 0 threads: as many as it takes.

    Raises:
        InputError: ``threads`` is negative.
        ArtifactError: a graph cannot be compiled.
        DependencyError: OpenVINO is not installed.
    """

    name = "openvino"

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        if threads < 0:
            raise InputError(f"threads must be 0 (as OpenVINO has them) or more, got {threads}")
        core = _core(_library())
        # By itself OpenVINO computes in bf16 where the CPU can, which is further from the reference than it may be.
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": "f32",
            "EXECUTION_MODE_HINT": "ACCURACY",
            "PERFORMANCE_HINT": "LATENCY",
        }
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        self._stages, self._requests = bundle.manifest.stages, {}
        sizes = {file: entry.size for file, entry in bundle.manifest.files.items()}
        for stage, entry in self._stages.items():
            # The very bytes that were hashed, unless weights lie beside the graph, which a path alone tells of.
            data = bundle.read(entry.onnx)
            source = bundle.graph(stage) if check_graph(memoryview(data), entry.onnx, sizes) else data
            try:
                model = core.compile_model(core.read_model(source), "CPU", options)
                self._requests[stage] = model.create_infer_request()
            except RuntimeError as error:
                raise ArtifactError(
                    f"{entry.onnx} must be a graph OpenVINO can compile, got: {_first(error)}"
                ) from None

    @classmethod
    def open(cls, model: Bundle | Trained, how: How) -> Self:
        """Compile both graphs of a bundle."""
        return cls(bundle_of(model, cls.name), how.threads)

    def run(self, stage: StageName, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """As ``Runtime.run`` says."""
        request, expected = self._requests[stage], self._stages[stage].outputs
        try:
            request.infer({name: np.ascontiguousarray(value) for name, value in inputs.items()})
        except RuntimeError as error:
            raise ArtifactError(f"{stage} must be a graph OpenVINO can run, got: {_first(error)}") from None
        # Its buffers are reused by the next call.
        found = {name: np.array(request.get_tensor(name).data) for name in expected}
        check_outputs(found, stage, expected, len(next(iter(inputs.values()))))
        return found


def _library() -> Any:
    """Import OpenVINO without its telemetry package, which reports to a server."""
    there = sys.modules.get("openvino_telemetry")
    if there is None:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino
    except ImportError as error:
        raise need("openvino", "openvino") from error
    finally:
        if there is None:
            sys.modules.pop("openvino_telemetry", None)
    return openvino


@functools.cache
def _core(library: Any) -> Any:
    """OpenVINO's core: one for the process, and never freed.

    On a CPU with tile registers (AMX) a core gives the thread that makes it another stack for signal handlers, and
    unmaps that stack when the core is freed. Freed in another thread, by a garbage collection there say, it leaves the
    first thread with a stack that is gone, and the next signal kills the process.
    """
    return library.Core()


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[-1] if lines else type(error).__name__)
