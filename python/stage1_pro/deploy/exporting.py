"""export and build: a bundle from a calibrated run, and one with engines of this machine from a received bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from stage1_pro import __version__
from stage1_pro.data.splits import Splits
from stage1_pro.deploy.bundle import MANIFEST, REFERENCE, Graphs, check_policy_belongs, load_bundle, write_bundle
from stage1_pro.deploy.engine import EngineRecipe, EngineTarget, build_engines, choose_recipe
from stage1_pro.deploy.manifest import Provenance
from stage1_pro.deploy.reference import write_reference
from stage1_pro.errors import InputError, need
from stage1_pro.files import atomic_directory, sha256_file
from stage1_pro.policies.policy import read_policy
from stage1_pro.progress import say
from stage1_pro.record import list_files
from stage1_pro.words import Precision, SplitName

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stage1_pro.data.images import PreprocessSpec

Target = Literal["onnx", "rtx", "tensorrt"]
# Images that precisions are compared on (val_select) and that blocks' largest values are measured on (train).
_REFERENCE_IMAGES = 32


def export(
    run: Path | str,
    out: Path | str | None = None,
    *,
    target: Target | None = None,
    recipe: Path | str | EngineRecipe | None = None,
    precisions: Sequence[Precision] = (),
    overwrite: bool = False,
) -> Path:
    """Write a run's best model and its one active policy as a bundle, all or nothing.

    Reads ``val_select`` images to compare precisions and runtimes, and ``train`` images to measure the blocks.

    Args:
        run: trained and calibrated run folder.
        out: bundle folder; ``RUN/bundle`` when None.
        target: ``onnx``; ``rtx`` to compile engines as well (no GPU needed); ``tensorrt`` to compile them with classic
            TensorRT for this machine's GPU; the run's configuration when None.
        recipe: engine recipe or its YAML file; the default one when None. Implies its target.
        precisions: graphs to write beside fp32. With engines the first is theirs and the others are fallbacks, in
            place of the recipe's; the recipe's when empty.
        overwrite: replace an existing bundle, which goes to ``<out>.before``.

    Returns:
        The bundle's folder.

    Raises:
        InputError: no policy in the run, ``out`` is taken, or a card or precision the builder refuses.
        ArtifactError: the policy is another model's, ONNX differs from torch, or a precision overflows.
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

        from stage1_pro.deploy.onnx import export_onnx, export_variants
        from stage1_pro.training.checkpoint import load_run_model
    except ImportError as error:
        raise need("train", error.name or "torch") from error
    model, run_config = load_run_model(run)
    config = run_config.config
    precisions = precisions or config.export.precisions
    engine_recipe = _recipe(target or (None if recipe is not None else config.export.target), recipe, precisions)
    wanted = precisions if engine_recipe is None else engine_recipe.ladder
    splits = Splits.read(run / "splits.json")
    architecture = model.architecture
    spec, fingerprint = architecture.preprocessing, model.fingerprint()
    # Before anything slow: a policy of other weights would decide on logits it has never seen.
    check_policy_belongs(policy, architecture, fingerprint)

    def graphs(folder: Path) -> Graphs:
        say(f"exporting ONNX, opset {config.export.opset}")
        shown, seen = _images(splits, spec, "val_select"), _images(splits, spec, "train")
        opset = config.export.opset
        stages = export_onnx(model, spec, folder, opset=opset, tolerance=config.export.tolerance, pixels=shown)
        for name, entry in stages.items():
            say(f"{name}.onnx agrees with torch: largest difference {entry.parity:.2g} of {config.export.tolerance:g}")
        write_reference(folder, stages, spec)
        stages = export_variants(
            model, stages, folder, wanted, pixels=shown, calibration=seen, policy=policy, opset=opset
        )
        for entry in stages.values():
            for precision, variant in entry.variants.items():
                if precision != "fp32":
                    say(
                        f"{variant.onnx} ({variant.judged_by}): largest difference of a logit {variant.parity:.2g}, "
                        f"{variant.flips} of {variant.images} decisions differ; block maximum "
                        f"{f'{max(variant.block_maxima):.4g}' if variant.block_maxima else 'none, it has no block'}"
                    )
        return stages, [] if engine_recipe is None else build_engines(stages, folder, engine_recipe)

    write_bundle(
        out, graphs, policy=policy, splits=splits, config=config, metrics=run / "metrics.csv",
        preprocessing=spec, backbone=architecture.backbone, tap=architecture.tap,
        provenance=Provenance(
            stage1_pro=__version__, torch=torch.__version__, transformers=transformers.__version__,
            checkpoint_sha256=sha256_file(run / "model_best.pth"), model_fingerprint=fingerprint,
            split_hashes=splits.hashes,
        ),
    )  # fmt: skip
    say(f"wrote {out}")
    return out


def build(
    bundle: Path | str,
    out: Path | str | None = None,
    *,
    target: EngineTarget | None = None,
    recipe: Path | str | EngineRecipe | None = None,
    precisions: Sequence[Precision] = (),
    overwrite: bool = False,
) -> Path:
    """Compile a received bundle's graphs on this machine into a new bundle; needs no torch and no run.

    The given bundle stays as it is; all but its engines is copied. One without reference outputs (format 1) gets those
    of its own fp32 graphs, or no engine could ever be held against them.

    Args:
        bundle: bundle folder; verified first.
        out: folder of the new bundle; ``BUNDLE-built`` when None.
        target: ``rtx`` (the default) or ``tensorrt``, which needs the GPU it builds for.
        recipe: engine recipe or its YAML file; the default one when None.
        precisions: the engines' precision and its fallbacks, in place of the recipe's; their graphs must be there.
        overwrite: replace an existing bundle at ``out``, which goes to ``<out>.before``.

    Returns:
        The new bundle's folder.

    Raises:
        InputError: ``out`` is taken or the bundle itself; a precision the bundle has no graph of; a refused card.
        ArtifactError: the bundle is damaged, or a graph cannot be built.
        DependencyError: the engine builder is missing.
    """
    bundle = Path(bundle)
    out = bundle.with_name(f"{bundle.resolve().name}-built") if out is None else Path(out)
    if out.resolve() == bundle.resolve() or bundle.resolve() in out.resolve().parents:
        raise InputError(f"out must lie outside the bundle it is built from, got {out}; choose another folder")
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        raise InputError(f"out must be a new folder or an older bundle, got {out}, which holds something else")
    if (out / MANIFEST).is_file() and not overwrite:
        raise InputError(f"out must be new, got {out}, which holds a bundle; replace it with --overwrite")
    chosen = choose_recipe(target, recipe, precisions)
    loaded = load_bundle(bundle)
    with atomic_directory(out, keep=True) as folder:
        built = {entry.path for entry in loaded.manifest.engines}
        built |= {str(PurePosixPath(name).with_suffix(".build.json")) for name in built}
        loaded.copy_to(folder, (name for name in loaded.manifest.files if name not in built))
        engines = build_engines(loaded.manifest.stages, folder, chosen)
        reference = loaded.manifest.reference
        if reference is None:
            write_reference(folder, loaded.manifest.stages, loaded.preprocessing)
            reference = REFERENCE
            say(f"wrote {REFERENCE}, which the bundle lacked: what its fp32 graphs give here")
        changed = {"engines": engines, "reference": reference, "files": list_files(folder)}
        manifest = loaded.manifest.model_copy(update=changed)
        manifest.write(folder / MANIFEST)
        # Sizes and relations are checked here; the hashes were taken from these very files.
        load_bundle(folder, verify=False)
    say(f"wrote {out}")
    return out


def _recipe(
    target: Target | None, recipe: Path | str | EngineRecipe | None, precisions: Sequence[Precision]
) -> EngineRecipe | None:
    for precision in precisions:
        if precision not in get_args(Precision):
            raise InputError(f"precisions must be of {', '.join(get_args(Precision))}, got '{precision}'")
    if target != "onnx":
        return choose_recipe(target, recipe, precisions)
    if recipe is not None:
        raise InputError("recipe must go with target rtx or tensorrt, got target onnx; drop one of the two")
    return None


def _images(splits: Splits, spec: PreprocessSpec, split: SplitName) -> NDArray[np.float32] | None:
    """Some real images of a split, preprocessed: noise exercises other activations than photos do."""
    from stage1_pro.data.images import ImageError, preprocess, read_image

    pixels: list[NDArray[np.float32]] = []
    for photo in splits.photos_of(splits.of(split)):
        try:
            pixels.append(preprocess(read_image(photo), spec))
        except ImageError:
            continue
        if len(pixels) == _REFERENCE_IMAGES:
            break
    if not pixels:
        say(f"no {split} image can be read where splits.json says; measuring on noise instead")
        return None
    return np.stack(pixels)
