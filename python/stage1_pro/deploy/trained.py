"""A run's model ready to answer in torch, before any export: the same cascade, the same decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from stage1_pro.deploy.bundle import Bundle, Described, check_policy_belongs
from stage1_pro.deploy.runtime import Arrays, FullPass, How, Runtime, Source
from stage1_pro.deploy.timing import median_seconds
from stage1_pro.errors import DependencyError, InputError
from stage1_pro.models.model import Architecture, Stage1Model
from stage1_pro.policies.policy import Policy, read_policy
from stage1_pro.training.checkpoint import load_run_model
from stage1_pro.words import StageName

# Rows of one CUDA graph at most: larger batches are cut.
LARGEST = 64


@dataclass(frozen=True)
class Trained(Described):
    """The best model of a run with its active policy; what ``Bundle`` is after export."""

    path: Path
    model: Stage1Model
    policy: Policy

    @property
    def about(self) -> Architecture:
        """The model's."""
        return self.model.architecture


def load_trained(run: Path | str) -> Trained:
    """Load ``model_best.pth`` and the active policy of a run, checked against each other.

    Raises:
        InputError: no such folder, or no exit policy in it.
        ArtifactError: an incomplete run, or a policy of another model.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError(f"run must be a run folder, got {run}; make one with `stage1 split --out {run}`")
    model, _ = load_run_model(run)
    policy = read_policy(run)
    if policy is None:
        raise InputError(f"run must hold a policy, got none in {run}; run `stage1 calibrate --run {run}` first")
    check_policy_belongs(policy, model.architecture, model.fingerprint())
    return Trained(run, model, policy)


class TorchRuntime(Runtime):
    """Both stages of a model in torch, on the device that holds it: eager on a CPU, as CUDA graphs on an NVIDIA GPU.

    On a GPU rows are padded to powers of two up to ``LARGEST``, a graph is captured for each, once, and replayed on
    the same buffers; ``device_seconds`` is what events measured around all replays so far. It is PyTorch, never
    called TensorRT.

    The model is put into evaluation mode; 0 threads leave torch's in this process as they are.

    Raises:
        InputError: ``threads`` is negative.
    """

    name = "torch"

    def __init__(self, model: Stage1Model, threads: int = 0) -> None:
        if threads < 0:
            raise InputError(f"threads must be 0 (as torch has them) or more, got {threads}")
        if threads:
            torch.set_num_threads(threads)
        self.model = model.eval()
        self._device = next(model.parameters()).device
        self._graphs: dict[tuple[StageName, int], _Captured] = {}
        # Without a device clock there is none to read.
        if self._device.type == "cuda":
            self.device_seconds = 0.0

    @classmethod
    def sources(cls, bundle: Bundle) -> list[Source]:
        """Nothing: a bundle holds no weights that torch could load."""
        del bundle
        return []

    @classmethod
    def open(cls, model: Bundle | Trained, how: How) -> Self:
        """Put a run's model on a device.

        Raises:
            InputError: a bundle, or a device that is neither ``cpu`` nor ``cuda``.
            DependencyError: ``cuda`` without an NVIDIA GPU that torch can use.
        """
        if not isinstance(model, Trained):
            raise InputError(f"torch must get a run, got the bundle {model.path}, which holds no weights for it")
        if how.device not in ("cpu", "cuda"):
            raise InputError(f"device must be cpu or cuda, got '{how.device}'")
        if how.device == "cuda" and not torch.cuda.is_available():
            raise DependencyError("device cuda must have an NVIDIA GPU that torch can use, got none; use cpu")
        return cls(model.model.to(how.device), how.threads)

    def run(self, stage: StageName, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """As ``Runtime.run`` says."""
        rows = inputs["pixels" if stage == "stage_a" else "hidden"]
        if self._device.type == "cuda" and len(rows):
            return self._replay(stage, rows)
        with torch.inference_mode():
            return {name: _array(value) for name, value in self._outputs(stage, self._tensor(rows)).items()}

    def _outputs(self, stage: StageName, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        if stage == "stage_a":
            return dict(zip(("logits", "gate_logit", "hidden"), self.model.stage_a(rows), strict=True))
        return {"logits": self.model.stage_b(rows)}

    def _replay(self, stage: StageName, rows: NDArray[np.float32]) -> Arrays:
        parts = []
        for start in range(0, len(rows), LARGEST):
            part = rows[start : start + LARGEST]
            bucket = 1 << (len(part) - 1).bit_length()
            if (stage, bucket) not in self._graphs:
                shape = (bucket, *rows.shape[1:])
                self._graphs[stage, bucket] = _Captured(lambda x: self._outputs(stage, x), shape, self._device)
            outputs, seconds = self._graphs[stage, bucket].run(part)
            self.device_seconds = (self.device_seconds or 0.0) + seconds
            parts.append(outputs)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def full_pass(self, folder: Path) -> FullPass:
        """Stage B's logits [N, K] from pixels [N, 3, H, W], with no Stage A on the way; eager."""
        del folder
        return self._called(self._pass)

    def compiled_full_pass(self) -> FullPass:
        """``full_pass`` through ``torch.compile``; a batch size is compiled when first seen, which takes a minute."""
        return self._called(torch.compile(self._pass, dynamic=False))

    def _pass(self, pixels: torch.Tensor) -> torch.Tensor:
        backbone = self.model.backbone
        logits: torch.Tensor = self.model.heads.auxiliary(backbone.pool(backbone(pixels)))
        return logits

    def _called(self, forward: Callable[[torch.Tensor], torch.Tensor]) -> FullPass:
        def call(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
            with torch.inference_mode():
                return _array(forward(self._tensor(pixels)))

        return call

    def shares(self, pixels: NDArray[np.float32], folder: Path, seconds: float) -> dict[str, float]:
        """Shares of ``embedding`` and ``heads`` (norm, pooling, head) in a full pass that takes so many seconds."""
        del folder
        backbone, images = self.model.backbone, self._tensor(pixels)

        def heads(tokens: torch.Tensor) -> object:
            return self.model.heads.auxiliary(backbone.pool(backbone.norm(tokens)))

        with torch.inference_mode():
            tokens, _ = backbone.embed(images)
            return {
                "embedding": median_seconds(lambda: backbone.embed(images)) / seconds,
                "heads": median_seconds(lambda: heads(tokens)) / seconds,
            }

    def _tensor(self, values: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)


class _Captured:
    """One function at one shape as a CUDA graph on buffers of its own."""

    def __init__(
        self, function: Callable[[torch.Tensor], dict[str, torch.Tensor]], shape: tuple[int, ...], device: torch.device
    ) -> None:
        self._input = torch.zeros(shape, device=device)
        self._pinned = torch.zeros(shape, pin_memory=True)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        self._graph = torch.cuda.CUDAGraph()
        # TF32 convolutions would move patches by 1e-3, and with them decisions.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            # Lazy initialisation must not be captured.
            with torch.cuda.stream(side):
                for _ in range(3):
                    function(self._input)
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph):
                self._outputs = function(self._input)

    def run(self, rows: NDArray[np.float32]) -> tuple[Arrays, float]:
        """Outputs of these rows, at most as many as the shape has, and seconds on the device."""
        with torch.inference_mode():
            self._pinned[: len(rows)] = torch.from_numpy(np.ascontiguousarray(rows))
            # Padded with a row that is there: zeros could be the one input that overflows.
            self._pinned[len(rows) :] = self._pinned[len(rows) - 1]
            self._input.copy_(self._pinned, non_blocking=True)
            self._events[0].record()
            self._graph.replay()
            self._events[1].record()
            outputs = {name: _array(value[: len(rows)]) for name, value in self._outputs.items()}
        self._events[1].synchronize()
        return outputs, self._events[0].elapsed_time(self._events[1]) / 1e3


def _array(values: torch.Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = values.float().cpu().numpy()
    return array
