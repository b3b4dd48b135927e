"""Older formats of a bundle's manifest, told in today's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stage1_pro.errors import ArtifactError, printable

FORMAT = 2
_LACKS_1 = (
    "format 1 has no reference outputs: an engine's answers cannot be checked against them on start",
    "format 1 has its graphs in fp32 alone: no variants in other precisions",
)


def upgrade(values: Mapping[str, Any]) -> tuple[int, dict[str, Any], tuple[str, ...]]:
    """Give a manifest's format, its values as today's format has them, and what it lacks for being older.

    Args:
        values: ``bundle.json`` of any format, as parsed; it need not be valid.

    Raises:
        ArtifactError: no format, or one that is newer than this version knows.
    """
    found = values.get("format_version", 1)  # bundles that say nothing are the first ones
    if type(found) is not int or found < 1:
        raise ArtifactError(f"format_version must be a number from 1 to {FORMAT}, got {printable(repr(found), 80)}")
    if found > FORMAT:
        raise ArtifactError(
            f"format_version must be at most {FORMAT}, got {printable(str(found), 20)}: a newer stage1_pro wrote this "
            "bundle; update this one, or export it with the older version"
        )
    current = dict(values)
    if found == FORMAT:
        return found, current, ()
    # Format 1 lacks the variants and the reference, whose defaults say "none"; all else is as it was.
    stages = current.get("stages")
    entries = list(stages.values()) if isinstance(stages, dict) else []
    if "reference" in current or any(isinstance(entry, dict) and "variants" in entry for entry in entries):
        raise ArtifactError("format 1 must not hold variants or reference, which came with format 2; it is damaged")
    current["format_version"] = FORMAT
    return found, current, _LACKS_1
