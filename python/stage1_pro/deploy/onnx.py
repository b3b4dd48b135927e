"""Both stages of a model as ONNX graphs, checked against torch before anybody relies on them."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stage1_pro.artifacts import PreprocessSpec, StageEntry, StageName
from stage1_pro.deploy.runtime import shapes
from stage1_pro.errors import ArtifactError, InputError, need

PARITY_BATCHES = (1, 2, 5)
OUTPUTS: dict[StageName, tuple[str, ...]] = {"stage_a": ("logits", "gate_logit", "hidden"), "stage_b": ("logits",)}
# A protobuf ends at 2 GiB; graphs and names need a little of it.
_INLINE_LIMIT = 2**31 - 2**25


class TwoStages(Protocol):
    """What a model must offer to be exported; ``Stage1Model`` does, and it is an ``nn.Module``."""

    def stage_a(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, K], gate logit [N] and what Stage B goes on from."""

    def stage_b(self, hidden: Tensor) -> Tensor:
        """Logits [N, K]."""


class _StageA(nn.Module):
    def __init__(self, model: TwoStages) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.model.stage_a(pixels)


class _StageB(nn.Module):
    def __init__(self, model: TwoStages) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden: Tensor) -> Tensor:
        return self.model.stage_b(hidden)


def export_onnx(
    model: TwoStages,
    spec: PreprocessSpec,
    folder: Path,
    *,
    opset: int = 20,
    tolerance: float = 1e-3,
    pixels: NDArray[np.float32] | None = None,
) -> dict[StageName, StageEntry]:
    """Write ``stage_a.onnx`` and ``stage_b.onnx`` and compare them with torch through onnxruntime.

    The batch is dynamic, the resolution is the specification's. Weights of 2 GB and more go to
    ``<stage>.onnx.data`` beside the graph. Stage B is judged behind ONNX's own Stage A, as it is served.

    Args:
        model: an ``nn.Module`` with both stages; its mode and weights are left as they were.
        spec: gives the input's height and width.
        folder: existing folder to write to.
        opset: ONNX operator set, 20 to 23.
        tolerance: largest absolute difference allowed between a logit of torch and of ONNX.
        pixels: preprocessed reference images [M, 3, H, W] to compare on; seeded noise when None.

    Returns:
        An entry per stage; ``parity`` is the largest difference over batches of 1, 2 and 5 rows.

    Raises:
        ArtifactError: the difference is above ``tolerance``, or not a number.
        DependencyError: onnx or onnxscript are missing.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be an nn.Module with stage_a and stage_b, got {type(model).__name__}")
    shape = (3, spec.height, spec.width)
    if pixels is None:
        pixels = np.random.default_rng(0).normal(size=(max(PARITY_BATCHES), *shape)).astype(np.float32)
    if pixels.ndim != 4 or pixels.shape[1:] != shape or len(pixels) == 0:
        raise InputError(f"pixels must be [M, 3, {spec.height}, {spec.width}] with M >= 1, got {list(pixels.shape)}")
    folder = Path(folder)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            reference = torch.from_numpy(_rows(pixels, 2)).to(device)
            hidden = model.stage_a(reference)[2]
            _write(_StageA(model), "stage_a", "pixels", reference, folder, opset)
            _write(_StageB(model), "stage_b", "hidden", hidden, folder, opset)
            parity = _parity(model, folder, pixels, device)
    finally:
        model.train(was_training)
    for stage, difference in parity.items():
        # Written so that NaN fails too.
        if not difference <= tolerance:
            raise ArtifactError(
                f"{stage}.onnx must agree with torch within {tolerance:g}, got a difference of {difference:.3g}; "
                "nothing was exported"
            )
    return {stage: _entry(folder, stage, parity[stage]) for stage in OUTPUTS}


def _rows(pixels: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """The first n rows, going round when there are fewer."""
    return np.ascontiguousarray(pixels[np.arange(n) % len(pixels)], dtype=np.float32)


def _write(module: nn.Module, stage: StageName, name: str, example: Tensor, folder: Path, opset: int) -> None:
    path = folder / f"{stage}.onnx"
    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    with _quiet():
        try:
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[name],
                output_names=list(OUTPUTS[stage]),
                dynamic_shapes={name: {0: torch.export.Dim("batch")}},
                verbose=False,
            )
        except ImportError as error:
            raise need("train", "onnxscript") from error
        assert program is not None
        _strip(program.model)
        program.save(str(path), external_data=size >= _INLINE_LIMIT)


def _strip(model: Any) -> None:
    """Drop what the exporter notes for debugging: stack traces name folders of this machine."""
    model.metadata_props.clear()
    model.doc_string = None
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's notes about its own insides and about torchvision from the user."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _parity(
    model: TwoStages, folder: Path, pixels: NDArray[np.float32], device: torch.device
) -> dict[StageName, float]:
    session_a, session_b = (_session(folder / f"{stage}.onnx") for stage in OUTPUTS)
    worst: dict[StageName, float] = {"stage_a": 0.0, "stage_b": 0.0}
    for batch in PARITY_BATCHES:
        rows = _rows(pixels, batch)
        logits, gate, hidden = model.stage_a(torch.from_numpy(rows).to(device))
        expected_b = model.stage_b(hidden)
        onnx_logits, onnx_gate, onnx_hidden = session_a.run(list(OUTPUTS["stage_a"]), {"pixels": rows})
        onnx_b = session_b.run(["logits"], {"hidden": onnx_hidden})[0]
        pairs: tuple[tuple[StageName, Tensor, Any], ...] = (
            ("stage_a", logits, onnx_logits),
            ("stage_a", gate, onnx_gate),
            ("stage_b", expected_b, onnx_b),
        )
        for stage, ours, theirs in pairs:
            if tuple(ours.shape) != theirs.shape:
                raise ArtifactError(f"{stage}.onnx must give shape {tuple(ours.shape)}, got {theirs.shape}")
            # np.maximum keeps NaN, max() would lose it.
            difference = np.abs(ours.cpu().numpy().astype(np.float64) - theirs).max()
            worst[stage] = float(np.maximum(worst[stage], difference))
    return worst


def _entry(folder: Path, stage: StageName, parity: float) -> StageEntry:
    session = _session(folder / f"{stage}.onnx")
    inputs, outputs = shapes(session.get_inputs()), shapes(session.get_outputs())
    if any(shape[0] != -1 for shape in (*inputs.values(), *outputs.values())):
        raise ArtifactError(f"{stage}.onnx must have a dynamic batch, got {inputs} -> {outputs}")
    return StageEntry(onnx=f"{stage}.onnx", inputs=inputs, outputs=outputs, parity=parity)
