"""What a backbone is, without loading one. No torch."""

from __future__ import annotations

from stage1_pro.record import Record


class BackboneInfo(Record):
    """Which backbone a model stands on."""

    source: str
    family: str
    licence: str
    hidden_size: int
    n_blocks: int
    patch_size: int
