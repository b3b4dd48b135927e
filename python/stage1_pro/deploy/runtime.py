"""What executes a model's stages: one ``run`` whatever is behind it. Importing it loads no torch, no transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from stage1_pro.deploy.bundle import Bundle
from stage1_pro.errors import ArtifactError, InputError, printable
from stage1_pro.words import StageName

Arrays = dict[str, NDArray[np.float32]]


class Runtime(Protocol):
    """Executes the stages of one bundle or run."""

    name: str

    def run(self, stage: StageName, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """Outputs by name for inputs by name; the first axis of each is the batch."""


class OnnxRuntime:
    """The CPU default: both graphs on onnxruntime.

    Args:
        bundle: a verified bundle.
        threads: threads inside an operator; 0 = as many as there are cores.

    Raises:
        InputError: ``threads`` is negative.
        ArtifactError: a graph cannot be loaded, or is not the one the manifest describes.
    """

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, threads: int = 0) -> None:
        if threads < 0:
            raise InputError(f"threads must be 0 (all cores) or more, got {threads}")
        self.bundle, self.threads = bundle, threads
        self._sessions = {stage: _session(bundle, stage, threads) for stage in bundle.manifest.stages}

    def run(self, stage: StageName, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """Outputs by name for inputs by name; the first axis of each is the batch.

        Raises:
            ArtifactError: the graph cannot be run, or gives something else than the manifest says.
        """
        expected = self.bundle.manifest.stages[stage].outputs
        try:
            values = self._sessions[stage].run(list(expected), dict(inputs))
        except Exception as error:  # noqa: BLE001 - onnxruntime raises a kind of its own per status code
            raise ArtifactError(f"{stage} must be a graph onnxruntime can run, got: {_reason(error)}") from None
        rows = len(next(iter(inputs.values())))
        # What a graph declares is a promise of its own, which onnxruntime does not hold it to.
        for (name, shape), value in zip(expected.items(), values, strict=True):
            if value.dtype != np.float32 or list(value.shape) != [rows, *shape[1:]]:
                raise ArtifactError(
                    f"{name} of {stage} must be float32 {[rows, *shape[1:]]}, got {value.dtype} {list(value.shape)}"
                )
        return dict(zip(expected, values, strict=True))

    def stage_a(self, pixels: NDArray[np.float32]) -> Arrays:
        """``logits`` [N, K], ``gate_logit`` [N] and ``hidden`` from pixels [N, 3, H, W]."""
        return self.run("stage_a", {"pixels": pixels})

    def stage_b(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [N, K] from the hidden rows that Stage A deferred."""
        return self.run("stage_b", {"hidden": hidden})["logits"]


def open_session(
    graph: Path, threads: int = 0, profile: Path | None = None, *, data: bytes | None = None
) -> onnxruntime.InferenceSession:
    """A graph in onnxruntime on the CPU, with the options everything of this package is served and measured with.

    Args:
        graph: ONNX file; external weights are found beside it.
        data: its bytes where they are known already: then these are run, whatever the file holds by now.
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
    if data is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(graph.parent))
    try:
        return onnxruntime.InferenceSession(
            str(graph) if data is None else data, options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # noqa: BLE001 - onnxruntime raises a kind of its own per status code
        raise ArtifactError(f"{graph.name} must be a graph onnxruntime can load, got: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0])


def _session(bundle: Bundle, stage: StageName, threads: int) -> onnxruntime.InferenceSession:
    graph, entry = bundle.graph(stage), bundle.manifest.stages[stage]
    session = open_session(graph, threads, data=bundle.read(entry.onnx))
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
