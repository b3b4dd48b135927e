"""Both stages of a model as ONNX graphs, checked against torch before anybody relies on them."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stage1_pro.data.images import PreprocessSpec
from stage1_pro.deploy.manifest import GraphVariant, StageEntry
from stage1_pro.deploy.onnxruntime import open_session, shapes
from stage1_pro.deploy.precision import HALF_LIMIT, HALF_MARGIN, Peaks, in_precision, measure_peaks
from stage1_pro.errors import ArtifactError, InputError, need
from stage1_pro.models.model import Stage1Model
from stage1_pro.policies.policy import Policy
from stage1_pro.policies.softmax import softmax
from stage1_pro.progress import say
from stage1_pro.words import Precision, StageName

PARITY_BATCHES = (1, 2, 5)
OUTPUTS: dict[StageName, tuple[str, ...]] = {"stage_a": ("logits", "gate_logit", "hidden"), "stage_b": ("logits",)}
# A protobuf ends at 2 GiB; graphs and names need a little of it.
_INLINE_LIMIT = 2**31 - 2**25
_BATCH = 8
# A flip of a decision this near a threshold says nothing of a precision: the fp32 runtimes differ there, too.
NEAR_THRESHOLD = 1e-3


class Answers(NamedTuple):
    """What both stages say of the same rows: ``logits_a, logits_b`` [N, K], ``gate_logit`` [N]."""

    logits_a: NDArray[np.float32]
    gate_logit: NDArray[np.float32]
    logits_b: NDArray[np.float32]


Stages = Callable[[NDArray[np.float32]], Answers]


class TwoStages(Protocol):
    """What a model must offer to be exported; ``Stage1Model`` does, and it is an ``nn.Module``."""

    def stage_a(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, K], gate logit [N] and what Stage B goes on from."""

    def stage_b(self, hidden: Tensor) -> Tensor:
        """Logits [N, K]."""


class _Stage(nn.Module):
    """One stage as a module of its own, which the exporter asks for."""

    def __init__(self, model: TwoStages, stage: StageName) -> None:
        super().__init__()
        self.model, self.stage = model, stage

    def forward(self, rows: Tensor) -> Any:
        return getattr(self.model, self.stage)(rows)


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
        pixels = _noise(shape)
    if pixels.ndim != 4 or pixels.shape[1:] != shape or len(pixels) == 0:
        raise InputError(f"pixels must be [M, 3, {spec.height}, {spec.width}] with M >= 1, got {list(pixels.shape)}")
    with _evaluating(model) as device:
        _write_stages(model, "fp32", pixels, device, folder, opset)
        parity = _parity(_torch_stages(model, device), _onnx_stages(folder, "fp32"), pixels)
    for stage, difference in parity.items():
        # Written so that NaN fails too.
        if not difference <= tolerance:
            raise ArtifactError(
                f"{stage}.onnx must agree with torch within {tolerance:g}, got a difference of {difference:.3g}; "
                "nothing was exported"
            )
    entries: dict[StageName, StageEntry] = {}
    for stage, difference in parity.items():
        session = open_session(folder / f"{stage}.onnx")
        inputs, outputs = shapes(session.get_inputs()), shapes(session.get_outputs())
        if any(shape[0] != -1 for shape in (*inputs.values(), *outputs.values())):
            raise ArtifactError(f"{stage}.onnx must have a dynamic batch, got {inputs} -> {outputs}")
        entries[stage] = StageEntry(onnx=f"{stage}.onnx", inputs=inputs, outputs=outputs, parity=difference)
    return entries


def graph_name(stage: StageName, precision: Precision) -> str:
    """File of a stage's graph in a precision; fp32 has the plain name, which onnxruntime runs."""
    return f"{stage}.onnx" if precision == "fp32" else f"{stage}.{precision}.onnx"


def export_variants(
    model: Stage1Model,
    stages: dict[StageName, StageEntry],
    folder: Path,
    precisions: Sequence[Precision],
    *,
    pixels: NDArray[np.float32] | None = None,
    calibration: NDArray[np.float32] | None = None,
    policy: Policy | None = None,
    opset: int = 20,
) -> dict[StageName, StageEntry]:
    """Write both stages in other precisions beside the fp32 graphs and judge each against torch in fp32.

    Stage B is judged behind its own precision's Stage A. fp32, fp16 and res32 are judged through onnxruntime, whose CPU
    kernels may compute fp16 in fp32; that they stay finite is judged in torch, which rounds every result, and by
    the largest values of every block. bf16, which onnxruntime's CPU cannot load, is judged in torch.

    Args:
        model: the exported model; left as it was.
        stages: what ``export_onnx`` gave for it.
        folder: where its graphs lie.
        precisions: which to write; fp32 is described in any case.
        pixels: preprocessed ``val_select`` images [M, 3, H, W] to compare on; seeded noise when None, counted as none.
        calibration: preprocessed ``train`` images [C, 3, H, W] to measure the blocks' largest values on; likewise.
        policy: decisions are compared under it; the most probable class of both stages without one.
        opset: ONNX operator set, 20 to 23.

    Returns:
        The entries with their ``variants``.

    Raises:
        InputError: int8 or fp8, with the reason.
        ArtifactError: an output is not finite or a value passes fp16's limit; names the precision that would hold.
        DependencyError: onnx or onnxscript are missing.
    """
    images, calibrated = (0 if given is None else len(given) for given in (pixels, calibration))
    noise = _noise((3, model.backbone.image_size, model.backbone.image_size))
    pixels, calibration = (noise if given is None else given for given in (pixels, calibration))
    wanted: tuple[Precision, ...] = ("fp32", *(p for p in dict.fromkeys(precisions) if p != "fp32"))
    with _evaluating(model) as device:
        # Refused precisions first: nothing slow has happened yet.
        modules = {precision: in_precision(model, precision).eval() for precision in wanted}
        reference = answer(_torch_stages(model, device), pixels)
        peaks = measure_peaks(model, (torch.from_numpy(part).to(device) for part in _parts(calibration)))
        for precision in wanted:
            _check_peaks(precision, peaks)
        found: dict[StageName, dict[Precision, GraphVariant]] = {stage: {} for stage in OUTPUTS}
        for precision, module in modules.items():
            in_torch = precision == "bf16"
            if precision != "fp32":
                say(f"exporting {precision}")
                # Judged before a graph is written; torch rounds to the type after every operation.
                answers = answer(_torch_stages(module, device), pixels if in_torch else pixels[:_BATCH])
                _check_finite(precision, peaks, answers)
                _write_stages(module, precision, pixels, device, folder, opset)
            if not in_torch:
                answers = answer(_onnx_stages(folder, precision), pixels)
                _check_finite(precision, peaks, answers)
            flips, near = count_flips(reference, answers, policy)
            for stage, parity in _differences(reference, answers).items():
                found[stage][precision] = GraphVariant(
                    onnx=graph_name(stage, precision), parity=parity, judged_by="torch" if in_torch else "onnxruntime",
                    images=images, flips=flips, near_threshold=near,
                    block_maxima=[peak.of(precision) for peak in peaks[stage]], calibration_images=calibrated,
                )  # fmt: skip
    return {stage: entry.model_copy(update={"variants": found[stage]}) for stage, entry in stages.items()}


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[torch.device]:
    """The model's device, while it is in evaluation mode and gathers no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield next((p.device for p in model.parameters()), torch.device("cpu"))
    finally:
        model.train(was_training)


def answer(stages: Stages, pixels: NDArray[np.float32]) -> Answers:
    """Both stages' answers for all rows of pixels [M, 3, H, W], a few at a time."""
    parts = [stages(part) for part in _parts(pixels)]
    return Answers(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def count_flips(reference: Answers, found: Answers, policy: Policy | None) -> tuple[int, int]:
    """Count rows that are decided otherwise than in the reference, and those of them that are near a threshold there.

    Decided is who answers and what (for sets: which), under the policy; without one, the most probable class of
    both stages. Near is within 1e-3 of the exit threshold, or of a tie of the answer's two most probable classes.
    """
    ours, near = _decide(reference, policy)
    theirs, _ = _decide(found, policy)
    flipped = (ours != theirs).any(axis=1)
    return int(flipped.sum()), int((flipped & near).sum())


def _decide(answers: Answers, policy: Policy | None) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    first, second = softmax(answers.logits_a), softmax(answers.logits_b)
    if policy is None:
        near = _tied(first) | _tied(second)
        return np.stack((first.argmax(axis=1), second.argmax(axis=1)), axis=1).astype(np.int64), near
    exited = policy.exits(first, answers.gate_logit)
    final = np.where(exited[:, None], first, second)
    sets, accepted = policy.answer(final, exited, answers.gate_logit)
    near = np.abs(policy.scores(first, answers.gate_logit) - policy.exit_threshold) <= NEAR_THRESHOLD
    columns = (exited[:, None], final.argmax(axis=1)[:, None], sets, accepted[:, None])
    return np.concatenate(columns, axis=1).astype(np.int64), near | _tied(final)


def _tied(probs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Rows whose two largest probabilities are both within the tolerance of where they would tie."""
    second, first = np.sort(probs, axis=1)[:, -2:].T
    tied: NDArray[np.bool_] = first - second <= 2 * NEAR_THRESHOLD
    return tied


def _torch_stages(model: TwoStages, device: torch.device) -> Stages:
    def run(pixels: NDArray[np.float32]) -> Answers:
        logits, gate, hidden = model.stage_a(torch.from_numpy(pixels).to(device))
        return Answers(*(t.float().cpu().numpy() for t in (logits, gate, model.stage_b(hidden))))

    return run


def _onnx_stages(folder: Path, precision: Precision) -> Stages:
    first, second = (open_session(folder / graph_name(stage, precision)) for stage in OUTPUTS)

    def run(pixels: NDArray[np.float32]) -> Answers:
        logits, gate, hidden = first.run(list(OUTPUTS["stage_a"]), {"pixels": pixels})
        return Answers(logits, gate, second.run(["logits"], {"hidden": hidden})[0])

    return run


def _parts(pixels: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    return [np.ascontiguousarray(pixels[start : start + _BATCH]) for start in range(0, len(pixels), _BATCH)]


def _differences(reference: Answers, found: Answers) -> dict[StageName, float]:
    """Largest absolute difference of a stage's logits, the gate's among Stage A's."""
    apart = [np.abs(a.astype(np.float64) - b).max() for a, b in zip(reference, found, strict=True)]
    # np.maximum keeps NaN, max() would lose it.
    return {"stage_a": float(np.maximum(*apart[:2])), "stage_b": float(apart[2])}


def _check_peaks(precision: Precision, peaks: dict[StageName, list[Peaks]]) -> None:
    """Refuse what passes fp16's limit on images at hand; warn of what comes near."""
    if precision not in ("fp16", "res32"):
        return
    blocks = [peak.of(precision) for stage in peaks.values() for peak in stage]
    place = int(np.argmax(np.nan_to_num(blocks, nan=np.inf)))
    # Written so that NaN fails too.
    if not blocks[place] <= HALF_LIMIT:
        raise _overflow(precision, peaks, f"a value of {blocks[place]:.4g} in block {place + 1}")
    if blocks[place] > HALF_LIMIT / HALF_MARGIN:
        near = [f"{index} ({value:.4g})" for index, value in enumerate(blocks, 1) if value > HALF_LIMIT / HALF_MARGIN]
        say(
            f"warning: {precision} may overflow on other images: fp16 ends at {HALF_LIMIT:.0f}, and on the images "
            f"measured a quarter of it is passed in block {', '.join(near)}; {_holds(precision, peaks)} would hold"
        )


def _check_finite(precision: Precision, peaks: dict[StageName, list[Peaks]], answers: Answers) -> None:
    if precision != "fp32" and not all(np.isfinite(values).all() for values in answers):
        raise _overflow(precision, peaks, "an output that is not finite")


def _overflow(precision: Precision, peaks: dict[StageName, list[Peaks]], got: str) -> ArtifactError:
    return ArtifactError(
        f"precision must hold every value on the reference images, got {got} in {precision}; "
        f"export {_holds(precision, peaks)} instead"
    )


def _holds(precision: Precision, peaks: dict[StageName, list[Peaks]]) -> str:
    """The precision to take where another overflows."""
    largest = max(peak.branch for stage in peaks.values() for peak in stage)
    if precision == "fp16" and largest <= HALF_LIMIT / HALF_MARGIN:
        return "res32 (fp32 residual stream)"
    return "fp32" if precision == "bf16" else "bf16 or fp32"


def _noise(shape: tuple[int, int, int]) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(max(PARITY_BATCHES), *shape)).astype(np.float32)


def _rows(pixels: NDArray[np.float32], n: int) -> NDArray[np.float32]:
    """The first n rows, going round when there are fewer."""
    return np.ascontiguousarray(pixels[np.arange(n) % len(pixels)], dtype=np.float32)


def _write_stages(
    model: TwoStages, precision: Precision, pixels: NDArray[np.float32], device: torch.device, folder: Path, opset: int
) -> None:
    """Trace both stages on two rows and write their graphs."""
    rows = torch.from_numpy(_rows(pixels, 2)).to(device)
    hidden = model.stage_a(rows)[2]
    _write(_Stage(model, "stage_a"), "pixels", rows, folder / graph_name("stage_a", precision), opset)
    _write(_Stage(model, "stage_b"), "hidden", hidden, folder / graph_name("stage_b", precision), opset)


def _write(module: _Stage, name: str, example: Tensor, path: Path, opset: int) -> None:
    size = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
    with _quiet():
        try:
            program = torch.onnx.export(
                module.eval(), (example,), dynamo=True, opset_version=opset, input_names=[name],
                output_names=list(OUTPUTS[module.stage]), dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )  # fmt: skip
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


def _parity(ours: Stages, theirs: Stages, pixels: NDArray[np.float32]) -> dict[StageName, float]:
    """Largest differences of logits by stage, over several sizes of batch."""
    worst: dict[StageName, float] = dict.fromkeys(OUTPUTS, 0.0)
    for batch in PARITY_BATCHES:
        rows = _rows(pixels, batch)
        expected, found = ours(rows), theirs(rows)
        for stage, one, other in zip(("stage_a", "stage_a", "stage_b"), expected, found, strict=True):
            if one.shape != other.shape:
                raise ArtifactError(f"{stage}.onnx must give shape {one.shape}, got {other.shape}")
        for stage, difference in _differences(expected, found).items():
            worst[stage] = float(np.maximum(worst[stage], difference))
    return worst
