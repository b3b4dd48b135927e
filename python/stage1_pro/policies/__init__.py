"""Exit policies: which answers of Stage A stand. NumPy only; exactly one policy is active in a folder."""

from __future__ import annotations

from pathlib import Path

from stage1_pro.artifacts import POLICY_FILES, Thresholds
from stage1_pro.errors import ArtifactError

__all__ = ["read_policy", "withdraw_policies"]


def read_policy(folder: Path | str) -> Thresholds | None:
    """Read the active policy of a run or bundle; None when there is none.

    Raises:
        ArtifactError: more than one policy file, a damaged one, or a kind this version cannot apply.
    """
    found = [name for name in POLICY_FILES.values() if (Path(folder) / name).is_file()]
    if len(found) > 1:
        raise ArtifactError(f"{folder} must hold exactly one policy file, got {', '.join(found)}; calibrate again")
    if not found:
        return None
    if found[0] != POLICY_FILES["softmax"]:
        raise ArtifactError(f"{folder} must hold a policy this version knows, got {found[0]}; calibrate again")
    return Thresholds.read(Path(folder) / found[0])


def withdraw_policies(folder: Path | str) -> list[str]:
    """Remove every policy file of a folder; give the names of those that were there."""
    found = [name for name in POLICY_FILES.values() if (Path(folder) / name).is_file()]
    for name in found:
        (Path(folder) / name).unlink()
    return found
