"""``bundle.json``: what a bundle holds, with the hash of every file; older formats of it, told in today's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from stage1_pro.data.images import PreprocessSpec
from stage1_pro.errors import ArtifactError, printable
from stage1_pro.models.architecture import BackboneInfo
from stage1_pro.record import FileEntry, Record
from stage1_pro.words import Precision, StageName

FORMAT = 2
_LACKS_1 = (
    "format 1 has no reference outputs: an engine's answers cannot be checked against them on start",
    "format 1 has its graphs in fp32 alone: no variants in other precisions",
)


class GraphVariant(Record):
    """One stage's graph in one precision, judged beside torch in fp32 on ``val_select`` images."""

    onnx: str
    parity: float = Field(ge=0, description="largest absolute difference of a logit from torch in fp32")
    judged_by: str = Field(
        pattern=r"^[a-z0-9_]{1,40}$", description="a runtime; torch where onnxruntime's CPU cannot load the type"
    )
    images: int = Field(ge=0, description="images compared")
    flips: int = Field(ge=0, description="of these, decisions that differ: who answers, or what")
    near_threshold: int = Field(ge=0, description="of the flips, those within 1e-3 of a threshold in fp32")
    block_maxima: list[float] = Field(
        description="per block of the stage, the largest absolute value this precision holds in its narrow type, on "
        "train images; fp32: in what res32 would hold in fp16"
    )
    calibration_images: int = Field(ge=0, description="train images behind block_maxima")


class StageEntry(Record):
    """One stage of a bundle: its fp32 graph, input and output names with shapes (-1 = batch), other precisions."""

    onnx: str = Field(description="in fp32, what onnxruntime runs")
    inputs: dict[str, list[int]]
    outputs: dict[str, list[int]]
    parity: float = Field(description="largest absolute difference from torch when exported")
    variants: dict[Precision, GraphVariant] = Field(default={}, description="graphs by precision, fp32 among them")


class EngineEntry(Record):
    """One compiled engine of a bundle."""

    stage: StageName
    path: str
    target: str
    builder: str
    builder_version: str
    compute_capabilities: list[Annotated[str, Field(pattern=r"^SM[0-9]{2,3}$")]]
    precision: Precision
    batch: tuple[int, int, int] = Field(description="smallest, optimal and largest batch")
    onnx_sha256: str
    layers: int
    attention_layers: int
    build_seconds: float
    validated: str


class Provenance(Record):
    """Where a bundle came from."""

    stage1_pro: str
    torch: str
    transformers: str
    checkpoint_sha256: str
    model_fingerprint: str
    split_hashes: dict[str, str]


class BundleManifest(Record):
    """``bundle.json``: what is deployed, with the hash of every other file in the folder."""

    format_version: Literal[2] = 2
    active_exit_policy: str
    policy_file: str
    classes: list[str]
    positive: str | None
    preprocessing: PreprocessSpec
    backbone: BackboneInfo
    tap: int
    stages: dict[StageName, StageEntry]
    engines: list[EngineEntry] = Field([])
    reference: str | None = Field(None, description="file of seeded inputs and the fp32 outputs of every stage")
    files: dict[str, FileEntry]
    provenance: Provenance


def upgrade(values: Mapping[str, Any]) -> tuple[int, dict[str, Any], tuple[str, ...]]:
    """Give a manifest's format, its values as today's format has them, and what it lacks for being older.

    Args:
        values: ``bundle.json`` of any format, as parsed; it need not be valid.

    Raises:
        ArtifactError: no format, or one that is newer than this version knows.
    """
    found = values.get("format_version", 1)
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
