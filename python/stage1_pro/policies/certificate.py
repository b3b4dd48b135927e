"""Records of evidence: sweeps over thresholds, certificates, and promises held against rows that calibrated nothing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stage1_pro.policies.rows import Unit
from stage1_pro.record import Record

Method = Literal["ltt_fst", "bonferroni", "holm", "sgr", "rcps", "crc"]
Outcome = Literal["PASS", "FAIL", "INCONCLUSIVE"]
LABELS_RIGHT = "the labels are right (labels that follow the model's own answers hide its errors)"
NOT_COUNTED = "no other claim was made on the same certify rows (nobody counted: they are of no run)"


def why_independent(*, grouped: bool, stated: bool) -> str:
    """Why rows count as units, as an assumption.

    Args:
        grouped: groups were given.
        stated: the caller stated that rows are independent.
    """
    if grouped:
        return (
            "rows of one group are independent, as the caller states" if stated else "every row is a group of its own"
        )
    if stated:
        return "every row is independent of the others, as the caller states"
    return "no groups were given, so every row is taken for independent of the others"


class PhotoCounts(Record):
    """What sets do on all photos kept for a certificate that speaks of groups."""

    n: int = Field(ge=0)
    accepted: int = Field(ge=0)
    trials: int = Field(ge=0, description="accepted photos that the risk is a share of")
    errors: int = Field(ge=0, description="of them, those whose set misses the label")


class SweepRow(Record):
    """Exits at one threshold: an image exits iff its confidence is at or above it."""

    threshold: float
    coverage: float
    fnr_on_exited: float | None = Field(description="null when no positive exits")
    exit_accuracy: float | None = Field(description="null when nothing exits")
    n_exited: int
    n_positive_exited: int = Field(description="0 where no class is the positive one")
    n_false_negative: int
    grid: bool = Field(description="whether the threshold belongs to the classic grid")


class RiskCounts(Record):
    """What one risk came to at a threshold: integer counts, the bound at level 1 - delta, and the p-value."""

    name: str
    alpha: float = Field(gt=0, lt=1)
    trials: int = Field(ge=0)
    errors: int = Field(ge=0)
    bound: float = Field(ge=0, le=1)
    p_value: float = Field(ge=0, le=1)


class CertificateRecord(Record):
    """What a policy promises, from which counts, by which method; accepted means score >= threshold."""

    method: Method | Literal["sequential"] = Field(description="sequential: looked at after every label")
    delta: float = Field(gt=0, lt=1, description="of this claim: what was declared, divided by claims")
    claims: int = Field(ge=1, description="how many claims delta was divided for, before the first")
    use: int | None = Field(
        description="which claim on the rows kept for the certificate this is; null when nobody counted"
    )
    min_coverage: float | None
    risks: list[RiskCounts] = Field(min_length=1)
    unit: Unit
    n: int = Field(description="units kept for the certificate")
    accepted: int
    coverage: float = Field(ge=0, le=1, description="accepted / n")
    threshold: float
    first_candidate: float = Field(description="where the walk began, from rows that certify nothing")
    n_tested: int = Field(description="candidates tested, the first that failed among them")
    p_value: float | None = Field(
        ge=0, le=1, description="the largest of all constraints, at the threshold; null for crc"
    )
    seed: int = Field(description="of the row that speaks for its group")
    largest_group: int | None = Field(None, description="with unit photos: rows of the largest group there is")
    labelled: int | None = Field(None, description="with method sequential: of the n that were looked through")
    log: str = Field("", description="with method sequential: hash of the row of certify/labels.jsonl that proved it")
    guarantee: str
    assumptions: list[str]
    mix: dict[str, float] | None = Field(
        None, description="share of each class that it is for; the coverage is that of this mix; null: as they come"
    )
    mix_of: str | None = Field(None, description="the class whose share was stated")


class PromiseCheck(Record):
    """One promise held against rows that calibrated nothing: ``errors`` of ``trials`` should be at most ``limit``."""

    name: str
    source: str | None = Field(
        default=None, description="null = all rows; a source's own rows are information, nobody promised them"
    )
    limit: float
    errors: int
    trials: int
    lower: float = Field(description="one-sided 99%, shared by the policy's own promises; above the limit: FAIL")
    upper: float = Field(description="one-sided 95%; at or below the limit: PASS")
    outcome: Outcome | None = Field(description="null: not promised, or on average alone, so nothing is judged")
    photo_errors: int | None = Field(
        None, description="the same of all photos, where a group counts once; null elsewhere"
    )
    photo_trials: int | None = None
    n_to_settle: int | None = Field(description="units in all that would settle it if rates stay as seen")


class ShareOf(Record):
    """A share, or a mean set size, with its two-sided 95% interval; null where nothing was accepted."""

    value: float | None
    low: float
    high: float


class Cell(Record):
    """A limit on nonconformity and the counts it comes from; a class is in the set iff it is at or below it."""

    name: str = Field(description="all, a stage (A or B), or a class")
    limit: float | None = Field(ge=0, description="null: none keeps the promise; stored a hair above the certified one")
    trials: int = Field(ge=0, description="accepted units of the cell")
    errors: int = Field(ge=0, description="of them, sets at the certified limit that miss the label")
    budget: int = Field(ge=-1, description="the most that could be certified; -1: none is few enough")
    delta: float | None = Field(gt=0, lt=1, description="of this cell; null where risk is an expectation or nothing")
    bound: float = Field(
        ge=0,
        le=1,
        description="Clopper-Pearson at 1 - delta (pac), (errors + 1) / (trials + 1) (I, T), as seen (naive)",
    )


class SetRates(Record):
    """What sets are like on the rows of one stage or source; for information, nobody promised it of them."""

    part: Literal["stage", "source"]
    name: str
    n: int = Field(description="units")
    accepted: int
    average_set_size: ShareOf
    ambiguous_rate: ShareOf
    rejection_rate: ShareOf


class SetCheck(Record):
    """Promises and rates of sets on rows that calibrated nothing, such as ``val_test``; intervals are 95%.

    Shares of sets are of the accepted, the rejection rate of all, by Clopper and Pearson. The interval of the mean set
    size follows from them for two classes that never give an empty set, and otherwise from betting on size / K.
    """

    outcome: Outcome | None = Field(
        description="FAIL when any promise fails, sources aside; null: nothing is promised but averages, or nothing"
    )
    statement: str = Field(description="the outcome in words")
    promises: list[PromiseCheck]
    n: int
    unit: Unit
    accepted: int
    average_set_size: ShareOf
    ambiguous_rate: ShareOf
    empty_rate: ShareOf
    rejection_rate: ShareOf
    parts: list[SetRates] = Field(default=[], description="the same per stage that answered, and per source")
