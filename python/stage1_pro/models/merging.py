"""merge: an adapter and its base to one plain transformers backbone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stage1_pro.deploy.bundle import LICENCE, licence_note
from stage1_pro.errors import InputError, need
from stage1_pro.files import atomic_directory, write_text

if TYPE_CHECKING:
    from stage1_pro.commands.merge import Merge


def merge(asked: Merge) -> dict[str, Any]:
    """Write the backbone that an adapter makes of its base, merged in float32, as a plain transformers folder.

    ``from_pretrained`` and ``model.backbone`` read it, at the image size it was trained at, with the origin and licence
    of its base. Heads and Stage A's norm are no part of a backbone: they stay in
    the adapter and in the run's checkpoint.
    """
    out = asked.out
    backbone_there = out.is_dir() and (out / "config.json").is_file() and (out / "model.safetensors").is_file()
    if out.exists() and not (asked.overwrite and backbone_there) and not (out.is_dir() and not any(out.iterdir())):
        hint = "replace it with --overwrite" if backbone_there else "choose another folder"
        raise InputError(f"out must be a new folder, got {out}, which holds something; {hint}")
    try:
        from stage1_pro.models.adapters import load_adapted, read_adapter
        from stage1_pro.models.adapters import merge as merge_model
        from stage1_pro.models.backbone import save_backbone
    except ModuleNotFoundError as error:
        raise need("train", error.name or "peft") from error
    record = read_adapter(asked.adapter)
    plain = merge_model(load_adapted(asked.adapter, asked.base))
    info = record.architecture.backbone
    written = info.model_copy(update={"source": f"{info.source} + {record.mode}"})
    with atomic_directory(out) as folder:
        save_backbone(folder, plain.backbone, written, plain.architecture.preprocessing)
        note = licence_note(asked.base, info)
        if note:
            write_text(folder / LICENCE, note)
    return {
        "out": str(out),
        "mode": record.mode,
        "base_fingerprint": record.base_fingerprint,
        "fingerprint": plain.backbone.fingerprint(),
    }
