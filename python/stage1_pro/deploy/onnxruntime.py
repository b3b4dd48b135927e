"""onnxruntime on the CPU: the runtime that every bundle can be answered with. No torch, no transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from stage1_pro.deploy.bundle import Bundle
from stage1_pro.deploy.graphs import check_graph
from stage1_pro.deploy.runtime import Arrays, FullPass, How, Runtime, bundle_of, check_outputs
from stage1_pro.errors import ArtifactError, InputError, need, printable
from stage1_pro.words import StageName

if TYPE_CHECKING:
    from stage1_pro.deploy.trained import Trained

_JOINED = "full.onnx"
# The variable is read when onnxruntime is loaded, and somebody may have loaded it before stage1_pro was.
if os.environ["ORT_DISABLE_TELEMETRY"] == "1":
    onnxruntime.disable_telemetry_events()


class OnnxRuntime(Runtime):
    """The CPU default: both graphs of a verified bundle on onnxruntime; 0 threads: as many as there are cores.

    Raises:
        InputError: ``threads`` is negative.
        ArtifactError: a graph cannot be loaded, or is not the one the manifest describes.
    """

    name = "onnxruntime"
    answers_unchecked = True

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        if threads < 0:
            raise InputError(f"threads must be 0 (all cores) or more, got {threads}")
        self.bundle, self.threads = bundle, threads
        self._sessions = {stage: _session(bundle, stage, threads) for stage in bundle.manifest.stages}

    @classmethod
    def open(cls, model: Bundle | Trained, how: How) -> Self:
        """Load both graphs of a bundle."""
        return cls(bundle_of(model, cls.name), how.threads)

    def run(self, stage: StageName, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """As ``Runtime.run`` says."""
        expected = self.bundle.manifest.stages[stage].outputs
        try:
            values = self._sessions[stage].run(list(expected), dict(inputs))
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a kind of its own per status code
            raise ArtifactError(f"{stage} must be a graph onnxruntime can run, got: {reason(error)}") from None
        found = dict(zip(expected, values, strict=True))
        # What a graph declares is a promise of its own, which onnxruntime does not hold it to.
        check_outputs(found, stage, expected, len(next(iter(inputs.values()))))
        return found

    def full_pass(self, folder: Path) -> FullPass:
        """Both graphs joined into one from pixels to Stage B's logits, without Stage A's heads.

        Raises:
            DependencyError: onnx, which joins graphs, is not installed.
        """
        try:
            import onnx
            from onnx import compose
        except ImportError as error:
            raise need("train", "onnx") from error
        a = compose.add_prefix(onnx.load(str(self.bundle.graph("stage_a"))), "a/")
        b = compose.add_prefix(onnx.load(str(self.bundle.graph("stage_b"))), "b/")
        both = compose.merge_models(a, b, io_map=[("a/hidden", "b/hidden")], outputs=["b/logits"])
        onnx.save(both, str(folder / _JOINED))
        session = open_session(folder / _JOINED, self.threads)

        def joined(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
            logits: NDArray[np.float32] = session.run(None, {"a/pixels": pixels})[0]
            return logits

        return joined

    def shares(self, pixels: NDArray[np.float32], folder: Path, seconds: float) -> dict[str, float]:
        """Shares of the operators before the first and after the last LayerNorm of the joined graph, by its clock."""
        del seconds
        if not (folder / _JOINED).is_file():
            return {}
        session = open_session(folder / _JOINED, self.threads, folder / "profile")
        for _ in range(8):
            session.run(None, {"a/pixels": pixels})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
        kernels.sort(key=lambda event: event["ts"])
        names, spent = [event["name"] for event in kernels], np.array([event["dur"] for event in kernels], np.float64)
        norms = [name for name, event in zip(names, kernels, strict=True) if "LayerNorm" in event["args"]["op_name"]]
        starts = [place for place, name in enumerate(names) if name == names[0]]
        shares = []
        for start, end in pairwise([*starts, len(names)]):
            # The last LayerNorm still belongs to the blocks.
            opens, closes = names.index(norms[0], start), names.index(norms[-1], start) + 1
            whole = spent[start:end].sum() or 1.0
            shares.append((spent[start:opens].sum() / whole, spent[closes:end].sum() / whole))
        # Medians: the first pass is cold, and any may be interrupted.
        embedding, heads = np.median(shares, axis=0)
        return {"embedding": float(embedding), "heads": float(heads)}


def open_session(
    graph: Path,
    threads: int = 0,
    profile: Path | None = None,
    *,
    data: bytes | None = None,
    weights: Mapping[str, bytes] | None = None,
) -> onnxruntime.InferenceSession:
    """A graph in onnxruntime on the CPU, with the options everything of this package is served and measured with.

    Args:
        graph: ONNX file; external weights are found beside it.
        data: its bytes where they are known already: then these are run, whatever the file holds by now.
        weights: the same of its external weights, by their file names as the graph has them.
        threads: threads inside an operator; 0 = as many as there are cores.
        profile: prefix of a file to write the time of every operator to; ``end_profiling()`` finishes it.

    Raises:
        ArtifactError: onnxruntime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Errors are raised; printed as well, they would show a stranger's names on the terminal.
    options.log_severity_level = 4
    # The two sessions take turns with image decoding; idle threads that spin took 70% longer on two cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if weights:
        sizes = [len(one) for one in weights.values()]
        options.add_external_initializers_from_files_in_memory(list(weights), list(weights.values()), sizes)
    try:
        return onnxruntime.InferenceSession(
            str(graph) if data is None else data, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # noqa: BLE001 - onnxruntime raises a kind of its own per status code
        raise ArtifactError(f"{graph.name} must be a graph onnxruntime can load, got: {reason(error)}") from None


def reason(error: Exception) -> str:
    """The first line of a library's error, for a message."""
    return printable((str(error).splitlines() or [type(error).__name__])[0])


def _session(bundle: Bundle, stage: StageName, threads: int) -> onnxruntime.InferenceSession:
    graph, entry = bundle.graph(stage), bundle.manifest.stages[stage]
    data = bundle.read(entry.onnx)
    sizes = {name: one.size for name, one in bundle.manifest.files.items()}
    # As the graph names them, beside itself: what is run are the bytes that were hashed, and a link may lead anywhere.
    folder = f"{PurePosixPath(entry.onnx).parent}/".removeprefix("./")
    weights = {
        name.removeprefix(folder): bundle.read(name) for name in check_graph(memoryview(data), entry.onnx, sizes)
    }
    session = open_session(graph, threads, data=data, weights=weights)
    try:
        found = shapes(session.get_inputs()), shapes(session.get_outputs())
    except UnicodeDecodeError:
        raise ArtifactError(f"{graph.name} must name its inputs and outputs in UTF-8, got other bytes") from None
    if found != (entry.inputs, entry.outputs):
        raise ArtifactError(
            f"{graph.name} must have the inputs and outputs of bundle.json, got {found[0]} -> {found[1]}"
        )
    return session


def shapes(values: Sequence[Any]) -> dict[str, list[int]]:
    """Names and shapes of a session's inputs or outputs; -1 where an axis is dynamic."""
    return {value.name: [d if isinstance(d, int) else -1 for d in value.shape] for value in values}
