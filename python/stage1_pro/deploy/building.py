"""build: engines for this machine, from the graphs of a bundle that came from another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from stage1_pro.deploy.bundle import MANIFEST, REFERENCE, list_files, load_bundle
from stage1_pro.deploy.engine import EngineRecipe, EngineTarget, build_engines, choose_recipe
from stage1_pro.deploy.reference import write_reference
from stage1_pro.errors import InputError
from stage1_pro.files import atomic_directory
from stage1_pro.progress import say
from stage1_pro.words import Precision


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
        overwrite: replace an existing bundle at ``out``.

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
    with atomic_directory(out) as folder:
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
