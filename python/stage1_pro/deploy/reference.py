"""A bundle's seeded reference inputs: what its fp32 graphs gave when exported, and whether a runtime still gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stage1_pro.data.images import PreprocessSpec, normalise
from stage1_pro.deploy.bundle import REFERENCE, Bundle
from stage1_pro.deploy.manifest import StageEntry
from stage1_pro.deploy.onnxruntime import open_session
from stage1_pro.deploy.runtime import Arrays, Runtime
from stage1_pro.errors import ArtifactError
from stage1_pro.files import load_npz, save_npz
from stage1_pro.policies.softmax import softmax
from stage1_pro.words import StageName

# An odd number, which no bucket of an engine has: padding is checked as well.
ROWS = 3
# Largest difference of a logit, as a share of one plus the largest logit. Some ten times what was measured on a ViT-S
# (res32 1.0e-3, fp16 1.2e-3, bf16 1.5e-2); fp32 leaves room for TF32. onnxruntime is held to what export asked for.
TOLERANCES = {"onnxruntime": 1e-3, "fp32": 5e-3, "res32": 1e-2, "fp16": 1e-2, "bf16": 0.1, "int8": 0.5, "fp8": 0.5}


@dataclass(frozen=True)
class Reference:
    """Inputs ``pixels`` uint8 [R, 3, H, W] and the fp32 outputs for them, by stage; logits [R, K], gate logit [R].

    A Stage A without a gate, which the policy softmax does not need, has no gate logit here either.
    """

    pixels: NDArray[np.uint8]
    stage_a: Arrays
    stage_b: Arrays


@dataclass(frozen=True)
class Parity:
    """How far a runtime is from the reference: largest differences (NaN where it gives none), decisions that differ."""

    logit: float
    prob: float
    flips: int
    tolerance: float

    def __str__(self) -> str:
        """In one line."""
        return f"logits {self.logit:.2g} and probabilities {self.prob:.2g} off the reference, {self.flips} flips"


def write_reference(folder: Path, stages: Mapping[StageName, StageEntry], spec: PreprocessSpec, seed: int = 0) -> None:
    """Write ``reference.npz`` into a bundle's folder from its fp32 graphs; the same seed gives the same pixels."""
    rng = np.random.default_rng(seed)
    # Coarse colours with grain: nobody's photos, and nearer to them than noise is.
    coarse = rng.integers(0, 256, (ROWS, 6, 8, 3), dtype=np.uint8)
    size = (spec.width, spec.height)
    smooth = np.stack([np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BICUBIC)) for one in coarse])
    grain = rng.integers(-12, 13, smooth.shape)
    pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8).transpose(0, 3, 1, 2)
    sessions = {stage: open_session(folder / entry.onnx) for stage, entry in stages.items()}
    names = list(stages["stage_a"].outputs)
    first = dict(zip(names, sessions["stage_a"].run(names, {"pixels": _input(pixels, spec)}), strict=True))
    second = sessions["stage_b"].run(["logits"], {"hidden": first["hidden"]})[0]
    outputs = {f"stage_a.{name}": value for name, value in first.items() if name != "hidden"}
    save_npz(folder / REFERENCE, {"pixels": pixels, **outputs, "stage_b.logits": second})


def read_reference(bundle: Bundle) -> Reference | None:
    """The bundle's reference, or None where it was exported without one.

    Raises:
        ArtifactError: it was changed since the bundle was loaded, or holds NaN.
    """
    if bundle.manifest.reference is None:
        return None
    # Names, kinds, shapes and rows were found right in these very bytes when the bundle was loaded.
    arrays = load_npz(bundle.read(bundle.manifest.reference))
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ArtifactError(f"{name} of {REFERENCE} must be finite, got NaN or infinity")
    outputs = bundle.manifest.stages["stage_a"].outputs
    first = {name: arrays[f"stage_a.{name}"] for name in outputs if name != "hidden"}
    return Reference(arrays["pixels"], first, {"logits": arrays["stage_b.logits"]})


def check_parity(runtime: Runtime, bundle: Bundle, reference: Reference, precision: str) -> Parity:
    """Run the reference through both stages as they are served, and compare; ``precision`` is of ``TOLERANCES``.

    Raises:
        ArtifactError: outputs are not numbers, further off than the precision explains, or decide differently.
    """
    parity = measure_parity(runtime, bundle, reference, precision)
    if not parity.logit <= parity.tolerance:
        raise ArtifactError(
            f"{runtime.name} must give the reference outputs of the bundle within {parity.tolerance:g}, got logits "
            f"{parity.logit:.3g} off; the graph was changed, or this runtime computes it wrongly here"
        )
    if parity.flips:
        raise ArtifactError(
            f"{runtime.name} must decide as the reference does, got {parity.flips} of {len(reference.pixels)} rows "
            "that exit otherwise"
        )
    return parity


def measure_parity(runtime: Runtime, bundle: Bundle, reference: Reference, precision: str) -> Parity:
    """What ``check_parity`` compares, whatever comes out."""
    first = runtime.run("stage_a", {"pixels": _input(reference.pixels, bundle.preprocessing)})
    second = runtime.run("stage_b", {"hidden": first["hidden"]})
    pairs = [(first[name], expected) for name, expected in reference.stage_a.items()]
    pairs.append((second["logits"], reference.stage_b["logits"]))
    # Compared in double and written so that NaN fails.
    differences = [np.abs(ours.astype(np.float64) - theirs) / (1 + np.abs(theirs).max()) for ours, theirs in pairs]
    logit = float(np.max([one.max() for one in differences]))
    tolerance = TOLERANCES[precision]
    if not np.isfinite(logit):
        return Parity(logit, logit, 0, tolerance)
    probs = [softmax(one) for one in (first["logits"], second["logits"])]
    expected = [softmax(reference.stage_a["logits"]), softmax(reference.stage_b["logits"])]
    gates = first.get("gate_logit"), reference.stage_a.get("gate_logit")
    scores = bundle.policy.scores(expected[0], gates[1])
    # A score that lies within the tolerance of the threshold says nothing about the runtime.
    far = np.abs(scores - bundle.policy.exit_threshold) > tolerance
    ours, theirs = (bundle.policy.exits(one, gate) for one, gate in zip((probs[0], expected[0]), gates, strict=True))
    prob = float(max(np.abs(a - b).max() for a, b in zip(probs, expected, strict=True)))
    return Parity(logit, prob, int(((ours != theirs) & far).sum()), tolerance)


def _input(pixels: NDArray[np.uint8], spec: PreprocessSpec) -> NDArray[np.float32]:
    return np.stack([normalise(one.astype(np.float32), spec) for one in pixels])
