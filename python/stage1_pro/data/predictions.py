"""Both stages' outputs on the rows of one split, as a file."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stage1_pro.errors import ArtifactError
from stage1_pro.files import load_npz, save_npz


@dataclass(frozen=True)
class Predictions:
    """Both stages' outputs on the rows of one split; ``val_calib.npz`` is one of these.

    Shapes: ``row_ids, groups, sources, halves`` [N] str; ``logits_a, logits_b`` [N, K] float32;
    ``gate_logits`` [N] float32; ``labels`` [N] int64 indices into ``classes`` [K] str.
    ``positive``, ``split``, ``split_hash``, ``model_fingerprint`` and
    ``preprocessing_fingerprint`` are 0-d strings when stored; ``positive`` is not there where it is None: no class is
    the positive one. ``halves`` is empty text outside ``val_calib``.
    ``joint_gate_logits`` [N] are of the gate before it was refitted; None where it was not.
    """

    row_ids: NDArray[np.str_]
    groups: NDArray[np.str_]
    sources: NDArray[np.str_]
    halves: NDArray[np.str_]
    logits_a: NDArray[np.float32]
    logits_b: NDArray[np.float32]
    gate_logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    classes: list[str]
    positive: str | None
    split: str
    split_hash: str
    model_fingerprint: str
    preprocessing_fingerprint: str
    joint_gate_logits: NDArray[np.float32] | None = None

    def save(self, path: Path | str) -> None:
        """Write as an uncompressed ``.npz``, atomically and with reproducible bytes."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        save_npz(path, {name: np.asarray(value) for name, value in values.items() if value is not None})

    @classmethod
    def load(cls, path: Path | str) -> Predictions:
        """Read a file written by ``save``; nothing in it can run code."""
        arrays = load_npz(path)
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in (*arrays, "positive")]
        if missing:
            raise ArtifactError(f"{path} must hold the arrays of a prediction file, missing: {', '.join(missing)}")
        values: dict[str, Any] = {f.name: arrays[f.name] for f in fields(cls) if f.name in arrays}
        for name in ("split", "split_hash", "model_fingerprint", "preprocessing_fingerprint"):
            values[name] = str(values[name])
        values["positive"] = str(values["positive"]) if "positive" in values else None
        values["classes"] = [str(name) for name in values["classes"]]
        return cls(**values)
