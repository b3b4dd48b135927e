"""``stage1 merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stage1_pro.command import Command, Place, Result, keywords, option


class Merge(Command, topic="adapters"):
    """Write the plain backbone that an adapter makes of its base."""

    adapter: Path = option(..., "the adapter's folder, such as RUN/adapter")
    base: Place = option(..., "what it was trained on: a preset, a folder or a hub id")
    out: Path = option(..., "folder to write; model.backbone and transformers read it")
    overwrite: bool = option(False, "replace a backbone that is there")

    def execute(self) -> Result:
        """Print what was merged, and the command that trains on it."""
        from stage1_pro.models.merging import merge

        found = merge(self)
        text = (
            f"merged {self.adapter} (mode {found['mode']}) into {self.base}, in float32; heads stay with the run\n"
            f"wrote {found['out']}; next: stage1 train --run RUN --set model.backbone={found['out']}"
        )
        return Result(text, found)


@keywords(Merge)
def merge(adapter: Path | str, base: str, out: Path | str, **options: Any) -> dict[str, Any]:
    """Write the backbone that an adapter makes of its base, merged in float32, as a plain transformers folder.

    Returns:
        ``out``, ``mode`` and the ``fingerprint`` of the merged backbone beside its base's.

    Raises:
        InputError: no such base, or ``out`` is taken.
        ArtifactError: a damaged adapter, or one of another base.
        DependencyError: torch, transformers or peft are missing.
    """
    from stage1_pro.models.merging import merge as work

    return work(Merge.of(adapter=adapter, base=base, out=out, **options))
