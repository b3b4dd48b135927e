"""``explora.json``: how a backbone was adapted to unlabelled images. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stage1_pro.data.images import PreprocessSpec
from stage1_pro.models.architecture import BackboneInfo
from stage1_pro.record import Record


class ProbeFigure(Record):
    """A figure of one probe on held-out groups of train rows: with the base, with the adapted backbone, and apart."""

    probe: Literal["linear", "knn"]
    metric: Literal["accuracy", "balanced_accuracy", "auroc"]
    before: float | None = Field(description="null where it is undefined")
    after: float | None
    difference: float | None = Field(description="after minus before; higher is better")
    low: float | None = Field(description="of the difference, on the same resamples of groups")
    high: float | None
    method: str


class PoolInfo(Record):
    """The unlabelled images a backbone was adapted to."""

    contents_sha256: str = Field(description="of the contents of all images used, in the order of their names")
    n_trained: int
    n_held_out: int = Field(description="not trained on; their loss is in metrics.csv")
    n_quarantined: int = Field(description="unreadable, see quarantine.csv")
    n_copies: int = Field(description="of an image that is in the pool already, byte for byte")
    n_left_out: int = Field(
        description="images of val_select, val_calib or val_test, near-duplicates of them, and images of their groups"
    )
    n_not_compared: int | None = Field(
        None, description="rows of those splits that could not be read, whose near-duplicates may be in the pool"
    )


class ExploraRecord(Record):
    """``explora/explora.json``: how a backbone was adapted to unlabelled images, and whether that made it better."""

    format_version: Literal[1] = 1
    kept: Literal["base", "adapted"] = Field(description="whose weights are in backbone/")
    better: bool = Field(description="by linear probe and neighbours, on held-out groups of train rows")
    reason: str
    objective: Literal["mae", "simmim", "latent", "diet"]
    train: Literal["explora", "full"]
    blocks: int = Field(description="last blocks that were trained whole")
    rank: int | None = Field(description="of LoRA on the other blocks; null without")
    n_parameters: int = Field(description="of the encoder")
    n_trained: int = Field(description="of them, LoRA's own counted in")
    share: float = Field(description="n_trained / n_parameters")
    steps: int
    loss: list[float] = Field(description="per epoch, on what was trained on")
    held_out_loss: list[float | None] = Field(description="per epoch, on pool images that were not; null without any")
    figures: list[ProbeFigure] = Field(description="both probes on held-out groups of train rows")
    n_rows: int
    n_groups: int
    pool: PoolInfo
    base: BackboneInfo
    base_fingerprint: str
    backbone_fingerprint: str = Field(description="of the weights in backbone/")
    weights_sha256: str = Field(description="of backbone/model.safetensors")
    preprocessing: PreprocessSpec
    split_hashes: dict[str, str]
    seed: int
    versions: dict[str, str]

    def figure(self, probe: str, metric: str) -> ProbeFigure:
        """One figure.

        Raises:
            KeyError: it was not measured.
        """
        for found in self.figures:
            if (found.probe, found.metric) == (probe, metric):
                return found
        raise KeyError((probe, metric))
