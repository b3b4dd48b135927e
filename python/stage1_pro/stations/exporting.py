"""export: from a calibrated run to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from stage1_pro import __version__
from stage1_pro.artifacts import EngineEntry, Provenance, Splits
from stage1_pro.deploy.bundle import MANIFEST, STAGES, Graphs, check_policy_belongs, write_bundle
from stage1_pro.deploy.engine import EngineRecipe, build_engine, check_recipe, load_recipe
from stage1_pro.deploy.reference import REFERENCE, write_reference
from stage1_pro.errors import InputError, need
from stage1_pro.policies import read_policy
from stage1_pro.progress import say

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stage1_pro.artifacts import PreprocessSpec

Target = Literal["onnx", "rtx"]
_REFERENCE_IMAGES = 8


def export(
    run: Path | str,
    out: Path | str | None = None,
    *,
    target: Target | None = None,
    recipe: Path | str | EngineRecipe | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a run's best model and its one active policy as a bundle; reads ``val_select`` images to compare.

    All or nothing: an older bundle stays as it is until the new one stands.

    Args:
        run: trained and calibrated run folder.
        out: bundle folder; ``RUN/bundle`` when None.
        target: ``onnx``, or ``rtx`` to compile engines as well (no GPU needed); the run's configuration when None.
        recipe: engine recipe or its YAML file; the default one when None. Implies ``rtx``.
        overwrite: replace an existing bundle.

    Returns:
        The bundle's folder.

    Raises:
        InputError: no policy in the run, or ``out`` is taken.
        ArtifactError: the policy is another model's, or ONNX differs from torch.
        DependencyError: torch, onnx or the engine builder are missing.
    """
    run = Path(run)
    out = run / "bundle" if out is None else Path(out)
    if not run.is_dir():
        raise InputError(f"run must be a run folder, got {run}")
    if (out / MANIFEST).is_file() and not overwrite:
        raise InputError(f"out must be new, got {out}, which holds a bundle; replace it with --overwrite")
    policy = read_policy(run)
    if policy is None:
        raise InputError(f"run must hold a policy, got none in {run}; run `stage1 calibrate --run {run}` first")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
        import torch
        import transformers

        from stage1_pro.deploy.onnx import export_onnx
        from stage1_pro.training.checkpoint import checkpoint_hash, load_run_model
    except ImportError as error:
        raise need("train", error.name or "torch") from error
    model, run_config = load_run_model(run)
    config = run_config.config
    target = target or ("rtx" if recipe is not None else config.export.target)
    engine_recipe = _recipe(target, recipe)
    splits = Splits.read(run / "splits.json")
    architecture = model.architecture
    spec, fingerprint = architecture.preprocessing, model.fingerprint()
    # Before anything slow: a policy of other weights would decide on logits it has never seen.
    check_policy_belongs(
        policy,
        classes=architecture.classes,
        positive=architecture.positive,
        model_fingerprint=fingerprint,
        preprocessing=spec,
    )

    def graphs(folder: Path) -> Graphs:
        say(f"exporting ONNX, opset {config.export.opset}")
        stages = export_onnx(
            model,
            spec,
            folder,
            opset=config.export.opset,
            tolerance=config.export.tolerance,
            pixels=_reference(splits, spec),
        )
        for name, entry in stages.items():
            say(f"{name}.onnx agrees with torch: largest difference {entry.parity:.2g} of {config.export.tolerance:g}")
        write_reference(folder, stages, spec)
        engines: list[EngineEntry] = []
        if engine_recipe is not None:
            for name in STAGES:
                engine = build_engine(folder / stages[name].onnx, folder, engine_recipe, name)
                say(
                    f"{name}.engine: {engine.build_seconds:.1f} s, {engine.layers} fused layers, "
                    f"{engine.attention_layers} fused attentions; {engine.validated}"
                )
                engines.append(engine)
        return stages, engines

    write_bundle(
        out,
        graphs,
        policy=policy,
        splits=splits,
        config=config,
        metrics=run / "metrics.csv",
        preprocessing=spec,
        backbone=architecture.backbone,
        tap=architecture.tap,
        reference=REFERENCE,
        provenance=Provenance(
            stage1_pro=__version__,
            torch=torch.__version__,
            transformers=transformers.__version__,
            checkpoint_sha256=checkpoint_hash(run),
            model_fingerprint=fingerprint,
            split_hashes=splits.hashes,
        ),
    )
    say(f"wrote {out}")
    return out


def _recipe(target: str, recipe: Path | str | EngineRecipe | None) -> EngineRecipe | None:
    if target == "onnx":
        if recipe is not None:
            raise InputError("recipe must go with target rtx, got target onnx; drop one of the two")
        return None
    if recipe is None:
        recipe = EngineRecipe()
    elif not isinstance(recipe, EngineRecipe):
        recipe = load_recipe(recipe)
    if recipe.target != target:
        raise InputError(f"target must be the recipe's ({recipe.target}), got '{target}'")
    # Refused cards and a missing builder are found before the model is exported.
    check_recipe(recipe)
    return recipe


def _reference(splits: Splits, spec: PreprocessSpec) -> NDArray[np.float32] | None:
    """Some real images, preprocessed: noise exercises other activations than photos do."""
    from stage1_pro.data.images import ImageError, preprocess, read_image

    pixels: list[NDArray[np.float32]] = []
    for row in splits.of("val_select"):
        try:
            pixels.append(preprocess(read_image(splits.path(row)), spec))
        except ImageError:
            continue
        if len(pixels) == _REFERENCE_IMAGES:
            break
    if not pixels:
        say("no val_select image can be read where splits.json says; comparing on noise instead")
        return None
    return np.stack(pixels)
