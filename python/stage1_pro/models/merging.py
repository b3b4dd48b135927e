"""merge: an adapter and its base to one plain transformers backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stage1_pro.deploy.bundle import LICENCE, licence_note
from stage1_pro.errors import InputError, need
from stage1_pro.files import atomic_directory, write_text


def merge(adapter: Path | str, base: str, out: Path | str, *, overwrite: bool = False) -> dict[str, Any]:
    """Write the backbone that an adapter makes of its base, merged in float32, as a plain transformers folder.

    ``from_pretrained`` and ``model.backbone`` read it, at the image size it was trained at, with the origin and licence
    of its base. Heads and Stage A's norm are no part of a backbone: they stay in
    the adapter and in the run's checkpoint.

    Args:
        adapter: the adapter's folder, such as ``RUN/adapter``.
        base: what it was trained on: a preset, a folder or a hub id.
        out: folder to write.
        overwrite: replace a backbone that is there.

    Returns:
        ``out``, ``mode`` and the ``fingerprint`` of the merged backbone beside its base's.

    Raises:
        InputError: no such base, or ``out`` is taken.
        ArtifactError: a damaged adapter, or one of another base.
        DependencyError: torch, transformers or peft are missing.
    """
    out = Path(out)
    backbone_there = out.is_dir() and (out / "config.json").is_file() and (out / "model.safetensors").is_file()
    if out.exists() and not (overwrite and backbone_there) and not (out.is_dir() and not any(out.iterdir())):
        hint = "replace it with --overwrite" if backbone_there else "choose another folder"
        raise InputError(f"out must be a new folder, got {out}, which holds something; {hint}")
    try:
        from stage1_pro.models.adapters import load_adapted, read_adapter
        from stage1_pro.models.adapters import merge as merge_model
        from stage1_pro.models.backbone import save_backbone
    except ModuleNotFoundError as error:
        raise need("train", error.name or "peft") from error
    record = read_adapter(adapter)
    plain = merge_model(load_adapted(adapter, base))
    info = record.architecture.backbone
    written = info.model_copy(update={"source": f"{info.source} + {record.mode}"})
    with atomic_directory(out) as folder:
        save_backbone(folder, plain.backbone, written, plain.architecture.preprocessing)
        note = licence_note(base, info)
        if note:
            write_text(folder / LICENCE, note)
    return {
        "out": str(out),
        "mode": record.mode,
        "base_fingerprint": record.base_fingerprint,
        "fingerprint": plain.backbone.fingerprint(),
    }
