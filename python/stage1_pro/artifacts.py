"""Files that pass between stations: atomic writes and one pydantic model per JSON artefact.

JSON Schema is generated from the models (``Model.model_json_schema()``), never written twice.
No torch in here: the slim runtime reads bundles with this module alone.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stage1_pro.errors import ArtifactError, InputError

SplitName = Literal["train", "val_select", "val_calib", "val_test"]
SPLITS: tuple[SplitName, ...] = ("train", "val_select", "val_calib", "val_test")
Half = Literal["fit", "certify"]
HALVES: tuple[Half, ...] = ("fit", "certify")
PolicyName = Literal["softmax", "gate", "scrc"]
StageName = Literal["stage_a", "stage_b"]
Precision = Literal["fp32", "fp16", "bf16", "res32", "int8", "fp8"]
POLICY_FILES: dict[PolicyName, str] = {
    "softmax": "thresholds.json",
    "gate": "gateparams.json",
    "scrc": "scrcparams.json",
}
CLAIMS_FILE = "claims.json"


# --------------------------------------------------------------------------------------------
# Atomic writes


@contextlib.contextmanager
def atomic_path(path: Path | str, *, mode: int = 0o644) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed over it, with ``mode``.

    A process killed at any moment leaves either the old file or the new one. Leftovers of
    killed writers are named ``.<name>.*.tmp`` and never read.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
        _sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that takes its place on success.

    An existing folder at ``path`` is moved aside first and removed after the new one stands.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_directory(path)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield staging
        for file in staging.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        staging.chmod(0o755)
        if path.exists():
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".old"))
            path.replace(aside / path.name)
            staging.replace(path)
            shutil.rmtree(aside)
        else:
            staging.replace(path)
        _sync_directory(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def recover_directory(path: Path) -> None:
    """Put back a folder that a writer killed between its two renames had moved aside."""
    if path.exists():
        return
    for aside in path.parent.glob(f".{path.name}.*.old"):
        if (aside / path.name).is_dir():
            (aside / path.name).replace(path)
            aside.rmdir()
            return


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path | str, data: bytes, *, mode: int = 0o644) -> None:
    """Write bytes atomically."""
    with atomic_path(path, mode=mode) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path | str, text: str, *, mode: int = 0o644) -> None:
    """Write UTF-8 text atomically."""
    # File names on Linux are bytes: those that are not UTF-8 go out as they came in.
    write_bytes(path, text.encode(errors="surrogateescape"), mode=mode)


def write_csv(path: Path | str, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Write rows under the given columns atomically; ``None`` and NaN become empty cells."""
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _cell(row.get(key)) for key in columns})
    write_text(path, buffer.getvalue())


def _cell(value: object) -> object:
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, float):
        return repr(float(value))
    return value


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a file's content, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def printable(text: str, limit: int = 300) -> str:
    """Text of a file for a message: no control characters that a terminal obeys, and not a page of it."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return plain + "…" if len(text) > limit else plain


# --------------------------------------------------------------------------------------------
# Records

R = TypeVar("R", bound="Record")


class Record(BaseModel):
    """Base of every JSON artefact: unknown keys are refused, NaN is not JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def write(self, path: Path | str, *, mode: int = 0o644) -> None:
        """Write as indented JSON, atomically."""
        write_text(path, json.dumps(self.model_dump(mode="json"), indent=2) + "\n", mode=mode)

    @classmethod
    def read(cls, path: Path | str) -> Self:
        """Read and validate; raise ArtifactError naming the file and the first wrong key."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ArtifactError(f"{path} must exist, but there is no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} must be readable JSON, got: {error}") from None
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, name: str) -> Self:
        """Validate JSON text; ``name`` is what error messages call it."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            raise ArtifactError(
                f"{name} is not a valid {cls.__name__}: {printable(where)}: {printable(first['msg'])}"
            ) from None

    def fingerprint(self) -> str:
        """Hex sha256 of the canonical JSON form."""
        data = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return sha256_bytes(data.encode())


_Mean = Annotated[float, Field(ge=-1e4, le=1e4)]
_Std = Annotated[float, Field(ge=1e-4, le=1e4)]


class PreprocessSpec(Record):
    """How pixels become the model's input; shared by evaluation, export and serving.

    ``stretch`` resizes to (height, width) ignoring the aspect ratio (DINOv3's processor);
    ``crop`` resizes the shorter side to ``round(size * crop_ratio)`` and crops the centre (DINOv2's).
    Resampling is antialiased on float pixels; values are scaled to [0, 1], then normalised.
    """

    # Upper limits: a received spec must not ask for gigabytes, nor push pixels out of float32.
    height: int = Field(gt=0, le=4096)
    width: int = Field(gt=0, le=4096)
    resize: Literal["stretch", "crop"] = "stretch"
    crop_ratio: float = Field(default=256 / 224, ge=1.0, le=16.0)
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[_Mean, _Mean, _Mean] = (0.485, 0.456, 0.406)
    std: tuple[_Std, _Std, _Std] = (0.229, 0.224, 0.225)


class Row(Record):
    """One labelled image of a run."""

    id: str
    file: str
    label: str
    group: str
    source: str = ""
    split: SplitName
    half: Half | None = None
    sha256: str


class Merging(Record):
    """What near-duplicate detection joined across groups."""

    pairs: int
    components: int
    largest_rows: int
    largest_share: float
    largest_groups: list[str]


class Splits(Record):
    """``splits.json``: every row of a run, its split and the hash of every split.

    ``hashes`` has an entry per split and for ``val_calib.fit`` and ``val_calib.certify``.
    """

    format_version: Literal[1] = 1
    root: str
    classes: list[str]
    positive: str
    seed: int
    fractions: dict[SplitName, float]
    folds: int | None = None
    fold: int | None = None
    counts: dict[SplitName, dict[str, int]]
    groups: dict[SplitName, int]
    hashes: dict[str, str]
    quarantined: int = 0
    merging: Merging
    rows: list[Row]

    def of(self, split: SplitName, half: Half | None = None) -> list[Row]:
        """Rows of one split (or one half of ``val_calib``), in file order."""
        return [r for r in self.rows if r.split == split and (half is None or r.half == half)]

    def verify(self) -> Self:
        """Check that the rows are those the hashes were taken of, and that no two splits share any.

        Raises:
            ArtifactError: rows were moved, added, removed or relabelled since the split.
        """
        if hash_splits(self.rows) != self.hashes:
            raise ArtifactError(
                "splits.json must be as `stage1 split` wrote it, but its rows do not give its hashes; split again"
            )
        where: dict[str, str] = {}
        for row in self.rows:
            for key in (f"group {row.group}", f"content {row.sha256}"):
                if where.setdefault(key, row.split) != row.split:
                    raise ArtifactError(f"splits must not share images, got {key} in {where[key]} and {row.split}")
        return self

    def path(self, row: Row) -> Path:
        """Where the row's image is."""
        return Path(self.root) / row.file

    def summary(self) -> SplitsSummary:
        """The part that may leave the house: hashes and counts, no file names."""
        return SplitsSummary(
            classes=self.classes,
            positive=self.positive,
            seed=self.seed,
            fractions=self.fractions,
            counts=self.counts,
            groups=self.groups,
            hashes=self.hashes,
            group_shares=self._group_shares(),
        )

    def _group_shares(self) -> dict[str, float]:
        rows = self.of("val_calib")
        sizes: dict[str, int] = {}
        for row in rows:
            sizes[row.group] = sizes.get(row.group, 0) + 1
        shares = dict.fromkeys(self.classes, 0.0)
        for row in rows:
            shares[row.label] += 1 / (sizes[row.group] * len(sizes))
        return shares


def hash_splits(rows: Sequence[Row]) -> dict[str, str]:
    """The hash of every split and half: contents, labels and groups, in any order and under any file names."""
    parts: dict[str, list[Row]] = {split: [row for row in rows if row.split == split] for split in SPLITS}
    for half in HALVES:
        parts[f"val_calib.{half}"] = [row for row in rows if row.half == half]
    return {
        name: sha256_bytes("\n".join(sorted(f"{r.sha256} {r.label} {r.group}" for r in part)).encode())
        for name, part in parts.items()
    }


class SplitsSummary(Record):
    """``splits.json`` of a bundle: hashes and counts only."""

    format_version: Literal[1] = 1
    classes: list[str]
    positive: str
    seed: int
    fractions: dict[SplitName, float]
    counts: dict[SplitName, dict[str, int]]
    groups: dict[SplitName, int]
    hashes: dict[str, str]
    group_shares: dict[str, float] = Field(
        default={}, description="share of every label in val_calib where groups count alike, as certificates count them"
    )


class SweepRow(Record):
    """Exits at one threshold: an image exits iff its confidence is at or above it."""

    threshold: float
    coverage: float
    fnr_on_exited: float | None = Field(description="null when no positive exits")
    exit_accuracy: float | None = Field(description="null when nothing exits")
    n_exited: int
    n_positive_exited: int
    n_false_negative: int
    grid: bool = Field(description="whether the threshold belongs to the classic grid")


class RiskRecord(Record):
    """One risk of a certificate: exact counts at the threshold, upper bound at level 1 - delta, and p-value."""

    name: str
    alpha: float = Field(gt=0, lt=1)
    trials: int = Field(ge=0)
    errors: int = Field(ge=0)
    bound: float = Field(ge=0, le=1)
    p_value: float = Field(ge=0, le=1)


class CertificateRecord(Record):
    """What a policy promises, from which counts, by which method; accepted means score >= threshold."""

    method: Literal["ltt_fst", "bonferroni", "holm", "sgr", "rcps", "crc"]
    delta: float = Field(gt=0, lt=1, description="of this claim: what was declared, divided by claims")
    claims: int = Field(ge=1, description="how many claims delta was divided for, before the first")
    use: int | None = Field(description="which claim on the certify half this is; null when nobody counted")
    min_coverage: float | None
    risks: list[RiskRecord] = Field(min_length=1)
    unit: Literal["rows", "groups", "group_means"]
    n: int = Field(description="units of the certify half")
    accepted: int
    coverage: float = Field(ge=0, le=1, description="accepted / n")
    threshold: float
    first_candidate: float = Field(description="where the walk began, from the fit half alone")
    n_tested: int = Field(description="candidates tested, the first that failed among them")
    p_value: float | None = Field(
        ge=0, le=1, description="the largest of all constraints, at the threshold; null for crc"
    )
    seed: int = Field(description="of the row that speaks for its group")
    guarantee: str
    assumptions: list[str]


class Thresholds(Record):
    """``thresholds.json``: the softmax exit policy.

    An image exits at Stage A iff its confidence (largest softmax probability) is at or above
    ``exit_threshold``. For two classes that is P(positive) at or above ``exit_upper_threshold``
    or at or below ``exit_lower_threshold``; for more classes the lower one is null.
    """

    format_version: Literal[1] = 1
    policy: Literal["softmax"] = "softmax"
    classes: list[str] = Field(min_length=2)
    positive: str
    exit_threshold: float = Field(ge=0, le=1)
    exit_lower_threshold: float | None = Field(default=None, ge=0, le=1)
    exit_upper_threshold: float = Field(ge=0, le=1)
    fnr_on_exited: float = Field(ge=0, le=1)
    coverage: float = Field(ge=0, le=1)
    exit_accuracy: float = Field(ge=0, le=1)
    target_fnr: float = Field(gt=0, lt=1)
    guarantee: Literal["none", "ltt"]
    certificate: CertificateRecord | None = Field(default=None, description="null with guarantee none")
    statement: str
    fnr_upper_bound: float = Field(ge=0, le=1)
    bound_level: float = Field(gt=0, lt=1)
    bound_method: str
    n_rows: int
    n_exited: int
    n_positive_exited: int
    n_false_negative: int
    n_positive_groups: int
    grouped: bool
    sweep_results: list[SweepRow]
    split_hashes: dict[str, str]
    model_fingerprint: str | None = None
    preprocessing_fingerprint: str | None = None


class GateConstraints(Record):
    """What the gate policy was asked for; all at once, at one threshold."""

    min_coverage: float = Field(gt=0, lt=1)
    max_exit_error: float = Field(gt=0, lt=1)
    target_fnr_exit: float | None = Field(default=None, gt=0, lt=1, description="null = not asked for")


class GateParams(Record):
    """``gateparams.json``: the gate exit policy.

    An image exits at Stage A iff ``sigmoid(a * gate_logit + b)``, in float64, is at or above ``threshold``. Rates and
    counts are those of the calibration rows (with ``ltt`` of their certify half); ``a`` and ``b`` come from the fit
    half.
    """

    format_version: Literal[1] = 1
    policy: Literal["gate"] = "gate"
    classes: list[str] = Field(min_length=2)
    positive: str
    a: float
    b: float
    fitted: bool = Field(description="false: Platt scaling was impossible, a = 1 and b = 0 stand in; see platt")
    platt: str = Field(description="how a and b came about")
    threshold: float = Field(ge=0, le=1)
    coverage: float = Field(ge=0, le=1)
    exit_error: float = Field(ge=0, le=1)
    fnr_on_exited: float | None = Field(ge=0, le=1, description="null when no positive exits")
    constraints: GateConstraints
    guarantee: Literal["none", "ltt"]
    certificate: CertificateRecord | None = Field(description="null with guarantee none")
    certify_uses: int | None = Field(description="claims on the certify half so far, with this one; null: not counted")
    statement: str
    exit_error_upper_bound: float = Field(ge=0, le=1)
    fnr_upper_bound: float | None = Field(ge=0, le=1, description="null when no positive exits, or none was asked for")
    bound_level: float = Field(gt=0, lt=1)
    bound_method: str
    n_rows: int
    n_exited: int
    n_errors: int
    n_positive_exited: int
    n_false_negative: int
    n_exited_groups: int
    n_positive_groups: int
    n_fit_rows: int = Field(description="rows that Platt scaling saw")
    grouped: bool
    sweep_results: list[SweepRow]
    split_hashes: dict[str, str]
    model_fingerprint: str | None = None
    preprocessing_fingerprint: str | None = None

    @property
    def exit_threshold(self) -> float:
        """The threshold under the name that every policy has."""
        return self.threshold

    @property
    def target_fnr(self) -> float | None:
        """The wished FNR on exits; None when it was not asked for."""
        return self.constraints.target_fnr_exit


class ScrcCell(Record):
    """A limit on nonconformity, and the certify rows it comes from; a class is in the set iff it is at or below it."""

    name: str = Field(description="all, a stage (A or B), or a class")
    limit: float = Field(ge=0, description="a hair above the one certified, against rounding; that only enlarges sets")
    trials: int = Field(ge=0, description="accepted units of the cell")
    errors: int = Field(ge=0, description="of them, sets at the certified limit that miss the label")
    budget: int = Field(ge=0, description="the most that could be certified")
    delta: float | None = Field(gt=0, lt=1, description="of this cell; null where risk is an expectation or nothing")
    bound: float = Field(
        ge=0, le=1, description="Clopper-Pearson at 1 - delta (pac), (errors + 1) / (trials + 1) (I, T)"
    )


# Above every P(correct): a threshold here lets nobody exit.
NOBODY_EXITS = float(np.nextafter(1.0, 2.0))


class ScrcParams(Record):
    """``scrcparams.json``: selective conformal risk control after the cascade.

    An image exits at Stage A iff ``sigmoid(a * gate_logit + b)``, in float64, is at or above ``exit_threshold``; else
    Stage B answers. P(answer correct) is that score where it exits and ``sigmoid(a_b * logit + b_b)`` otherwise, of the
    logit of Stage B's largest probability. The image is accepted iff it is at or above ``lambda_1``, and then gets the
    set of classes whose nonconformity is at or below its cell's limit in ``lambda_2``; otherwise nobody answers.

    Both Platt scalings and the exit rule come from the fit half, ``lambda_1``, ``lambda_2`` and all counts and bounds
    from the certify half. ``calibrator_fingerprint`` is recomputed on reading: other numbers void the certificate.
    """

    format_version: Literal[1] = 1
    policy: Literal["scrc"] = "scrc"
    classes: list[str] = Field(min_length=2)
    positive: str
    a: float
    b: float
    fitted: bool = Field(description="false: Platt scaling was impossible, a = 1 and b = 0 stand in; see platt")
    platt: str = Field(description="how a and b came about")
    exit_threshold: float = Field(ge=0, le=NOBODY_EXITS, description="just above 1: nobody exits")
    max_exit_error: float = Field(gt=0, lt=1, description="what the exit rule was asked for, on the fit half")
    exit_error: float | None = Field(ge=0, le=1, description="of the fit half; null when nobody exits")
    exit_rate: float = Field(ge=0, le=1, description="of the fit half")
    a_b: float
    b_b: float
    platt_b: str = Field(description="how a_b and b_b came about")
    alpha: float = Field(gt=0, lt=1, description="largest risk among the accepted")
    xi: float = Field(gt=0, lt=1, description="least share accepted")
    delta: tuple[float, float] = Field(description="chance of failure of selection and risk, divided by claims")
    variant: Literal["pac", "I", "T", "naive"]
    loss: Literal["miscoverage", "fnr"] = Field(description="miscoverage: the set misses the label; fnr: of positives")
    score: Literal["lac", "aps", "raps"]
    cells: Literal["stage", "class"] | None = Field(description="what has a limit of its own; null: one for all")
    allow_empty: bool
    raps: tuple[float, int] = Field(description="penalty for each rank beyond the second number")
    lambda_1: float = Field(description="accepted iff P(answer correct) is at or above it")
    lambda_2: list[ScrcCell] = Field(min_length=1)
    rank: int = Field(
        ge=1, description="of the certify units' scores: the last one accepted (pac), or the first one that is not"
    )
    n: int = Field(ge=1, description="units of the certify half")
    unit: Literal["rows", "groups"]
    seed: int = Field(description="of the row that speaks for its group")
    accepted: int = Field(ge=0, description="units of the certify half")
    coverage: float = Field(ge=0, le=1, description="accepted / n")
    coverage_bound: float | None = Field(description="lower, at 1 - delta[0]; null for T and naive")
    risk_bound: float = Field(ge=0, le=1, description="the largest of all cells")
    fnr_bound: float | None = Field(
        ge=0, le=1, description="of accepted positives whose set lacks the positive; null where cells do not tell it"
    )
    guarantee: Literal["none", "pac", "expectation"]
    statement: str
    assumptions: list[str]
    claims: int = Field(ge=1, description="how many claims delta was divided for, before the first")
    certify_uses: int | None = Field(description="which claim on the certify half this is; null when nobody counted")
    n_fit_rows: int
    grouped: bool
    split_hashes: dict[str, str]
    model_fingerprint: str | None = Field(default=None, description="of all weights, the gate's among them")
    preprocessing_fingerprint: str | None = None
    calibrator_fingerprint: str = Field(description="sha256 over everything else here")

    @property
    def target_fnr(self) -> float | None:
        """The wished FNR on exits: none, the promise is on sets."""
        return None

    @classmethod
    def seal(cls, **values: Any) -> Self:
        """Make a record with the fingerprint of its own numbers."""
        return cls(**values, calibrator_fingerprint=cls.model_construct(**values).fingerprint_numbers())

    def fingerprint_numbers(self) -> str:
        """Hex sha256 over all else: what decides, what is promised and assumed, and of which model."""
        content = self.model_dump(mode="json", exclude={"calibrator_fingerprint"})
        data = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return sha256_bytes(data.encode())

    @model_validator(mode="after")
    def _sealed(self) -> Self:
        found = self.fingerprint_numbers()
        if self.calibrator_fingerprint != found:
            raise ValueError(
                f"calibrator_fingerprint must be of what stands beside it, got {self.calibrator_fingerprint[:12]} "
                f"instead of {found[:12]}; something was changed, so the certificate is void: calibrate again"
            )
        return self


Policy = Thresholds | GateParams | ScrcParams


class PromiseCheck(Record):
    """One promise held against rows that calibrated nothing: ``errors`` of ``trials`` should be at most ``limit``."""

    name: str
    source: str | None = Field(description="null = all rows; a source's own rows are information, nobody promised them")
    limit: float
    errors: int
    trials: int
    lower: float = Field(description="Clopper-Pearson, one-sided 99%; above the limit: FAIL")
    upper: float = Field(description="Clopper-Pearson, one-sided 95%; at or below the limit: PASS")
    outcome: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    n_to_settle: int | None = Field(description="units in all that would settle it if rates stay as seen")


class ShareOf(Record):
    """A share, or a mean set size, with its two-sided 95% interval; null where nothing was accepted."""

    value: float | None
    low: float
    high: float


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
    """Promises and rates of sets on ``val_test``. Shares of sets are of the accepted, the rejection rate of all."""

    outcome: Literal["PASS", "FAIL", "INCONCLUSIVE"] = Field(description="FAIL when any promise fails; sources aside")
    statement: str = Field(description="the outcome in words")
    promises: list[PromiseCheck]
    n: int
    unit: Literal["rows", "groups", "group_means"]
    accepted: int
    average_set_size: ShareOf
    ambiguous_rate: ShareOf
    empty_rate: ShareOf
    rejection_rate: ShareOf
    parts: list[SetRates] = Field(default=[], description="the same per stage that answered, and per source")


class Claim(Record):
    """One use of a certify half: which promise was sought on it."""

    key: str = Field(description="hash of model, preprocessing, policy and wish: the same key is the same claim")
    policy: PolicyName
    wish: str
    model_fingerprint: str
    outcome: Literal["open", "certified", "infeasible"] = "open"


class HalfClaims(Record):
    """What one certify half has been used for; delta and the number of claims are fixed by the first."""

    delta: float = Field(gt=0, lt=1, description="for all claims together")
    claims: int = Field(ge=1)
    uses: list[Claim]


class Claims(Record):
    """``claims.json``: every use of every certify half of a run, by the half's hash.

    It outlives policies and trainings: a certify half that was looked at stays looked at.
    """

    format_version: Literal[1] = 1
    halves: dict[str, HalfClaims] = {}
    looks: dict[str, int] = Field({}, description="empirical choices that saw a certify half, which promise nothing")


class Metric(Record):
    """One metric with its interval; what is undefined is null, and ``note`` says why."""

    metric: str
    value: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = Field(default=None, description="an upper bound alone when low is null")
    method: str = Field(default="none", description="of the interval: bca, percentile, logit, clopper-pearson or none")
    note: str = Field(default="", description="why there is no value or interval, or a caution to show with it")


class Measure(Metric):
    """One figure of an evaluation, with its interval and the data behind it; undefined ones are null."""

    source: str | None = Field(description="null = all rows")
    stage: Literal["stage_a", "stage_b", "cascade"] = Field(description="whose answers are measured")
    n: int = Field(description="rows that the figure is a mean over")
    n_groups: int


class FnrCheck(Record):
    """Whether FNR on exits keeps the policy's target on these rows, by its upper bound.

    ``holds``: the bound is at or below the target; ``not shown``: the value is, the bound is not (or no positive
    exited); ``exceeded``: the value itself is above the target.
    """

    outcome: Literal["holds", "not shown", "exceeded"]
    value: float | None = Field(description="null when no positive exited")
    upper_bound: float | None = Field(
        description="the larger of Clopper-Pearson on groups with a miss and the bootstrap by group"
    )
    target: float
    level: float = Field(gt=0, lt=1)
    n_missed: int = Field(description="exited positives that were answered otherwise")
    n_positives: int = Field(description="exited positives")
    n_groups_missed: int
    n_groups: int = Field(description="groups of the exited positives")
    statement: str = Field(description="the outcome in words")


class StageEffect(Record):
    """Stage A against Stage B on the rows that exit, or on those that are deferred, in counts.

    On deferred rows ``fixed`` and ``broken`` are what Stage B changes; on exited ones what it would have changed.
    """

    rows: Literal["exited", "deferred"]
    n: int
    both_right: int
    fixed: int = Field(description="Stage A is wrong, Stage B right")
    broken: int = Field(description="Stage A is right, Stage B wrong")
    both_wrong: int


class Evaluation(Record):
    """What ``evaluate`` found on ``val_test``: every figure, and the policy they were measured under."""

    format_version: Literal[1] = 1
    split: Literal["val_test"] = "val_test"
    split_hash: str
    model_fingerprint: str
    classes: list[str]
    positive: str
    n_rows: int
    n_groups: int
    n_exited: int | None = Field(description="null without a policy")
    n_mistakes: int = Field(description="wrong answers of the cascade; of Stage A without a policy")
    policy: PolicyName | None
    guarantee: str | None
    exit_threshold: float | None
    target_fnr: float | None
    statement: str = Field(description="what the policy promises, in words")
    fnr_check: FnrCheck | None = Field(description="null without a policy, or without a target on FNR")
    verification: SetCheck | None = Field(default=None, description="of policy scrc alone")
    exit_promises: list[PromiseCheck] = Field(
        default=[], description="of policies softmax and gate: each constraint held against these rows"
    )
    effects: list[StageEffect] = Field(default=[], description="exited, then deferred rows; empty without a policy")
    tap: int | None = Field(default=None, description="block that Stage A ends with; null when it is not known")
    n_blocks: int | None = Field(default=None, description="blocks of a full pass; null when it is not known")
    level: float = Field(gt=0, lt=1, description="of intervals and bounds")
    n_replicates: int
    seed: int
    measures: list[Measure]

    def value(self, metric: str, stage: str = "cascade", source: str | None = None) -> float | None:
        """The figure itself; null when it is undefined, KeyError when it was not measured."""
        return self.measure(metric, stage, source).value

    def measure(self, metric: str, stage: str = "cascade", source: str | None = None) -> Measure:
        """One figure with its interval; KeyError when it was not measured."""
        for found in self.measures:
            if (found.metric, found.stage, found.source) == (metric, stage, source):
                return found
        raise KeyError((metric, stage, source))


class ProtocolLevel(Record):
    """Figures of ``val_test`` as a validator would send it at one level; nobody promised anything of such photos."""

    level: Literal["unaltered", "L0", "L1", "L2", "L3", "mixed"] = Field(
        description="mixed: a level drawn for every row; unaltered: what `stage1 evaluate` measures, for comparison"
    )
    n_mistakes: int = Field(description="wrong answers of the cascade; of Stage A without a policy")
    accuracy_minus_unaltered: Metric = Field(description="of these answers, paired by photo")
    measures: list[Measure]

    def measure(self, metric: str, stage: str = "cascade") -> Measure:
        """One figure with its interval; KeyError when it was not measured."""
        for found in self.measures:
            if (found.metric, found.stage) == (metric, stage):
                return found
        raise KeyError((metric, stage))


class ProtocolEvaluation(Record):
    """``protocol.json``: ``val_test`` changed as StreetVision's validator changes photos, by level and mixed."""

    format_version: Literal[1] = 1
    protocol: Literal["crop224", "letterbox224", "native"]
    split: Literal["val_test"] = "val_test"
    split_hash: str
    model_fingerprint: str
    preprocessing_fingerprint: str
    classes: list[str]
    positive: str
    n_rows: int
    n_groups: int
    policy: PolicyName | None
    guarantee: str | None
    statement: str = Field(description="what these figures are, and what they are not")
    photos_sha256: str = Field(description="of all changed photos, level by level, in the order of the rows")
    photo_seed: int = Field(description="of what was drawn for the photos")
    level: float = Field(gt=0, lt=1, description="of intervals")
    n_replicates: int
    seed: int = Field(description="of the bootstrap")
    levels: list[ProtocolLevel]

    def at(self, level: str) -> ProtocolLevel:
        """Figures of one level; KeyError when the protocol has none such."""
        for found in self.levels:
            if found.level == level:
                return found
        raise KeyError(level)


class MinerSetting(Record):
    """When a StreetVision miner says what; see ``Settings`` of the integration."""

    threshold: float = Field(gt=0, lt=1, description="on P(positive) at the serving prior")
    answer_above: float = Field(ge=0.5, lt=1)
    on_abstain: Literal["answer", "minus_one"]


class SimulatedReward(Record):
    """Steady state of StreetVision's reward under one setting, simulated on held-out rows."""

    setting: MinerSetting
    mean: float = Field(description="of a round's reward, in [0, 1]; also of the score, its moving average")
    low: float = Field(description="over resamples of groups")
    high: float
    simulation_error: float = Field(description="standard error of the mean by the number of simulated rounds")
    spread: float = Field(description="standard deviation of the score by luck alone")
    answered: float = Field(description="share of rounds")
    accuracy: float | None = Field(description="of what is answered, at the serving prior; null: nothing is")


class MinerTuning(Record):
    """``streetvision.json``: which threshold and abstain band would earn most, and whether that is shown."""

    format_version: Literal[1] = 1
    source: str
    rows: str = Field(description="which rows: val_calib.fit of a run, or a file of labelled photos")
    n_rows: int
    n_groups: int
    n_positives: int
    model_fingerprint: str
    train_prior: float
    serve_prior: float
    plain: SimulatedReward = Field(description="threshold .5, everything answered")
    tuned: SimulatedReward = Field(description="the best setting of all rows; chosen on them, so flattered by them")
    gain: float = Field(description="mean reward minus the plain one's, on groups that the choice had not seen")
    gain_low: float
    gain_high: float
    chosen: Literal["plain", "tuned"]
    reason: str
    level: float = Field(gt=0, lt=1)
    folds: int
    n_replicates: int
    seed: int


class Measurement(Record):
    """What ``stage1 metrics`` found in a file of predictions, or of the difference of two files."""

    format_version: Literal[1] = 1
    file: str
    compared_with: str | None = Field(description="the other file; metrics are then those of this one minus its")
    n_rows: int
    n_units: int
    unit: Literal["rows", "groups"] = Field(description="what is resampled")
    classes: list[str] | None = Field(description="null when the file holds errors instead of labels")
    positive: str | None
    threshold: float | None
    level: float = Field(gt=0, lt=1)
    method: Literal["bca", "percentile", "logit"]
    n_replicates: int
    seed: int
    metrics: list[Metric]
    values: dict[str, tuple[float | None, float | None]] = Field(
        default_factory=dict, description="of a difference: the metric of this file and of the other one"
    )

    def metric(self, name: str) -> Metric:
        """One metric; KeyError when it was not measured."""
        for found in self.metrics:
            if found.metric == name:
                return found
        raise KeyError(name)


class BenchTiming(Record):
    """One contestant of ``stage1 bench cascade`` at one batch size: medians over rounds, with quartiles."""

    contestant: Literal["stage_a", "stage_b", "always_both", "full_pass", "cascade"]
    n_deferred: int | None = Field(description="rows of the batch that Stage B was made to answer; of a cascade alone")
    deferral_rate: float | None
    milliseconds: float = Field(description="of one batch")
    milliseconds_low: float
    milliseconds_high: float
    images_per_second: float
    speedup: float = Field(description="time of the full pass in the same round / own time; higher is better")
    speedup_low: float
    speedup_high: float
    processor_speedup: float = Field(
        description="the same of processor time over all threads, which neighbours on a busy machine stretch less"
    )
    ideal: float | None = Field(description="speed-up if only blocks took time; null where nothing is left to run")
    of_ideal: float | None = Field(description="speed-up / ideal")


class BenchBatch(Record):
    """What ``stage1 bench cascade`` measured at one batch size."""

    batch: int
    timings: list[BenchTiming]
    shares: dict[str, float] = Field(
        description="of a full pass's time: embedding, blocks and heads; python: deciding and gathering of a batch "
        "with half its rows deferred, which comes on top"
    )

    def cascade(self, n_deferred: int) -> BenchTiming:
        """The cascade with so many rows deferred; KeyError when it was not measured."""
        for found in self.timings:
            if found.n_deferred == n_deferred:
                return found
        raise KeyError(n_deferred)


class CascadeBench(Record):
    """What ``stage1 bench cascade`` found: latency and throughput over batch sizes and deferral rates."""

    format_version: Literal[1] = 1
    source: str = Field(description="last name of the bundle's or run's folder")
    runtime: str
    backbone: str
    tap: int
    n_blocks: int
    height: int
    width: int
    inputs: str = Field(description="what the pixels were")
    rounds: int
    warmup: int
    seed: int
    machine: dict[str, str | int | float | None]
    batches: list[BenchBatch]


class LatencyQuantile(Record):
    """A quantile of single calls with its interval; null where so few samples have none."""

    q: float
    milliseconds: float | None
    low: float | None
    high: float | None


class LatencySeries(Record):
    """Single calls of one contestant, one part of them, at one batch size."""

    contestant: str
    part: str = Field(description="host, device (between events), decode, resize, model or total")
    batch: int
    deferral_rate: float | None = Field(description="share of rows that Stage B was made to answer; of a cascade alone")
    n: int
    enough: bool = Field(description="1,000 samples or more, which a p99 takes")
    mean: float = Field(description="milliseconds")
    quantiles: list[LatencyQuantile]
    milliseconds: list[float] = Field(description="every sample, in the order it was taken")

    def key(self) -> tuple[str, str, int, float | None]:
        """What it is a series of."""
        return self.contestant, self.part, self.batch, self.deferral_rate

    def quantile(self, q: float) -> LatencyQuantile:
        """One quantile; KeyError when it is not there."""
        for found in self.quantiles:
            if found.q == q:
                return found
        raise KeyError(q)


class ColdStart(Record):
    """A fresh process up to its first answer, milliseconds, medians over repeats."""

    cache: Literal["none", "empty", "kept"] = Field(description="of kernels compiled on this machine")
    repeats: int
    total: float = Field(description="from starting the process to its end")
    load: float = Field(description="verifying the bundle, starting the runtime, parity")
    first: float = Field(description="the first answer, by both stages")


class LatencyRatio(Record):
    """A quantile of one series over that of another; ``q`` null: means."""

    q: float | None
    ratio: float
    low: float
    high: float


class LatencyPeer(Record):
    """Another runtime's full pass on the same inputs at the same moment, over the cascade's time; above 1: slower."""

    name: str
    batch: int | None = Field(description="null where it was skipped")
    skipped: str | None
    logit: float | None = Field(None, description="largest difference from the cascade's own Stage B")
    prob: float | None = None
    flips: int | None = Field(None, description="rows it labels otherwise")
    to_cascade: list[LatencyRatio] = []
    to_full_pass: list[LatencyRatio] = Field([], description="over this runtime's own full pass")


class LatencyThroughput(Record):
    """The cascade's throughput at one batch size, and whether its p99 keeps the budget; null without enough samples."""

    batch: int
    images_per_second: float
    p99: float | None
    within: bool | None


class LatencyBench(Record):
    """What ``stage1 bench latency`` found."""

    format_version: Literal[1] = 1
    source: str = Field(description="last name of the bundle's or run's folder")
    runtime: str = Field(description="what answered")
    steps: list[str] = Field(description="what was tried for it and why it stepped down")
    backbone: str
    tap: int
    n_blocks: int
    height: int
    width: int
    quick: bool = Field(description="fewer samples than a p99 takes, on purpose")
    samples: int = Field(description="asked for")
    limit: float = Field(description="seconds after which a series ends early")
    warmup: float = Field(description="milliseconds")
    deferral: float = Field(description="rate of requests, throughput and peers")
    budget: float = Field(description="milliseconds that p99 may take")
    inputs: str
    photos: str
    seed: int
    machine: dict[str, str | int | float | None]
    series: list[LatencySeries]
    cold: list[ColdStart]
    throughput: list[LatencyThroughput]
    peers: list[LatencyPeer]


class LatencyDifference(Record):
    """One series of two results: the second over the first."""

    contestant: str
    part: str
    batch: int
    deferral_rate: float | None
    n: tuple[int, int]
    ratios: list[LatencyRatio]


class LatencyComparison(Record):
    """What ``stage1 bench compare`` found: below 1 the second result is faster."""

    format_version: Literal[1] = 1
    first: str
    second: str
    level: float
    differences: list[LatencyDifference]
    cautions: list[str]


class GateChoice(Record):
    """``gate.json``: how the gate was fitted, and what ranks answers better on ``val_select``, it or max softmax."""

    format_version: Literal[1] = 1
    fit: Literal["out_of_fold", "joint"]
    form: str = Field(description="features and margin, margin alone, or joint: as training left it")
    reason: str = Field("", description="why the form is the margin alone")
    folds: int | None = None
    views: int | None = None
    strength: float | None = Field(None, description="penalty per row, the best on rows out of fold")
    n_rows: int = Field(0, description="rows it was fitted on, every view counted")
    n_groups: int = 0
    n_errors: int = Field(0, description="wrong answers among them")
    split: Literal["val_select"] = "val_select"
    split_hash: str
    model_fingerprint: str
    gate_augrc: Metric
    softmax_augrc: Metric
    joint_gate_augrc: Metric | None = Field(None, description="of the gate before it was refitted")
    difference: Metric = Field(description="AUGRC of the gate minus that of max softmax, paired, by group")
    asked: Literal["auto", "softmax", "gate"]
    confidence: Literal["softmax", "gate"] = Field(description="which one says how sure an answer is")


class BackboneInfo(Record):
    """Which backbone a model stands on."""

    source: str
    family: Literal["dinov3", "dinov2"]
    licence: str
    hidden_size: int
    n_blocks: int
    patch_size: int


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
        """One figure; KeyError when it was not measured."""
        for found in self.figures:
            if (found.probe, found.metric) == (probe, metric):
                return found
        raise KeyError((probe, metric))


class TapCandidate(Record):
    """One block that Stage A could read, measured by a linear probe on ``val_select``."""

    tap: int
    accuracy: float
    augrc: float
    exits: float = Field(description="largest exit rate at which the cascade errs no more than Stage B alone")
    cascade_error: float
    cost: float = Field(description="blocks run per photo at that rate, as a share of all")


class TapChoice(Record):
    """``tap.json``: what ``model.tap: auto`` measured and chose."""

    format_version: Literal[1] = 1
    n_blocks: int
    tap: int
    error_b: float = Field(description="error of the probe at the last block, the risk that is kept")
    candidates: list[TapCandidate]
    split_hashes: dict[str, str]


class Start(Record):
    """``start.json``: what a training drew and started from, as hashes; arms of a comparison must have the same.

    Written before the first step and left alone by ``--resume``. The batches are those of all processes together.
    """

    format_version: Literal[1] = 1
    seed: int
    split_hashes: dict[str, str]
    head_shapes: dict[str, list[int]] = Field(description="shape of every tensor of the heads")
    heads: str = Field(description="sha256 of the heads' starting weights")
    order: str = Field(description="sha256 of the row ids of the first epochs, in the order they are gone through")
    batch_size: int
    batch_rows: str = Field(description="sha256 of row ids and labels of the first batches")
    batch_inputs: str | None = Field(
        description="sha256 of their augmented pixels; null where a frozen backbone's cached features are read"
    )
    preprocessing: str = Field(description="fingerprint of what made the pixels, before augmentation")
    augmentation: str = Field(description="fingerprint of the augmentation's settings")
    n_trainable: int
    n_parameters: int
    base_fingerprint: str = Field(description="sha256 of the backbone's starting weights")
    versions: dict[str, str]


class Cost(Record):
    """``cost.json`` of a compared run: what the process that trained it took, start-up included."""

    seconds: float | None = Field(description="wall clock; null when the run was killed in between and resumed")
    peak_memory: int = Field(description="bytes; of the GPU's allocator, or the resident size of the main process")
    device: str


class SeedFigures(Record):
    """One arm in one seed: Stage A of its best checkpoint, on one split."""

    seed: int
    n: int
    n_groups: int
    accuracy: float
    mcc: float
    augrc: float
    gate_augrc: float
    feasible: bool = Field(description="one threshold of the gate meets both constraints on these rows")
    exit_error: float | None = Field(description="smallest by the gate at the coverage asked for")
    coverage: float = Field(description="largest by the gate within the exit error asked for")


class ArmFigures(Record):
    """One arm over all seeds; intervals are of means over seeds, by group, ``sds`` are over seeds."""

    name: str
    mode: str
    n_trainable: int
    n_parameters: int
    trainable_share: float
    metrics: list[Metric]
    sds: dict[str, float | None] = Field(description="standard deviation over seeds; null for one seed")
    feasible_share: float = Field(description="share of seeds in which the gate meets both constraints at once")
    exit_error: float | None = Field(description="mean over seeds of the smallest at the coverage asked for")
    coverage: float = Field(description="mean over seeds of the largest within the exit error asked for")
    seconds: float | None = Field(description="mean over the seeds that ran through; null when none did")
    n_timed: int
    peak_memory: int | None = Field(description="bytes, the largest of all seeds; null when none was measured")
    seeds: list[SeedFigures]


class ArmDifference(Metric):
    """One metric of an arm minus that of the baseline: mean over seeds, paired by group."""

    arm: str
    baseline: str
    sd: float | None = Field(description="standard deviation over seeds of the paired difference; null for one seed")
    n_better: int = Field(description="seeds in which the arm is better")
    n_seeds: int


class ComparisonPlan(Record):
    """``plan.json``: what is compared on what. Another plan needs another folder, or a second look at ``val_test``."""

    format_version: Literal[1] = 1
    data: str
    data_sha256: str | None = Field(description="of the labels file; null for a folder per class")
    splitting: dict[str, str | float | None]
    hold_split: bool
    min_coverage: float
    max_exit_error: float


class Comparison(Record):
    """``compare.json``: arms trained on the same splits, heads, order and batches, measured on ``val_select``."""

    format_version: Literal[1] = 1
    split: Literal["val_select", "val_test"]
    baseline: str
    metric: str = Field(description="what the best arm was chosen by, on val_select")
    chosen: str
    seeds: list[int]
    plan: ComparisonPlan
    n_groups: int = Field(description="groups that were resampled, of all seeds together")
    n_replicates: int
    level: float
    arms: list[ArmFigures]
    differences: list[ArmDifference]
    exceptions: list[str] = Field(description="where arms cannot have the same start, and what was compared instead")
    chosen_from: str = Field(description="hash of arms, seeds, metric and plan")
    models: str = Field("", description="hash of the best checkpoints that were measured")
    looks: list[str] = Field([], description="val_test: arms chosen in earlier looks at it, whose figures are gone")


class FileEntry(Record):
    """Size in bytes and sha256 of one file of a bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class GraphVariant(Record):
    """One stage's graph in one precision, judged beside torch in fp32 on ``val_select`` images."""

    onnx: str
    parity: float = Field(ge=0, description="largest absolute difference of a logit from torch in fp32")
    judged_by: Literal["onnxruntime", "torch"] = Field(description="torch where onnxruntime's CPU cannot load the type")
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

    stage: Literal["stage_a", "stage_b"]
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
    active_exit_policy: PolicyName
    policy_file: str
    classes: list[str]
    positive: str
    preprocessing: PreprocessSpec
    backbone: BackboneInfo
    tap: int
    stages: dict[Literal["stage_a", "stage_b"], StageEntry]
    engines: list[EngineEntry] = []
    reference: str | None = Field(None, description="file of seeded inputs and the fp32 outputs of every stage")
    files: dict[str, FileEntry]
    provenance: Provenance


# --------------------------------------------------------------------------------------------
# Predictions of both stages


@dataclass(frozen=True)
class Predictions:
    """Both stages' outputs on the rows of one split; ``val_calib.npz`` is one of these.

    Shapes: ``row_ids, groups, sources, halves`` [N] str; ``logits_a, logits_b`` [N, K] float32;
    ``gate_logits`` [N] float32; ``labels`` [N] int64 indices into ``classes`` [K] str.
    ``positive``, ``split``, ``split_hash``, ``model_fingerprint`` and
    ``preprocessing_fingerprint`` are 0-d strings when stored. ``halves`` is empty text outside ``val_calib``.
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
    positive: str
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
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in arrays]
        if missing:
            raise ArtifactError(f"{path} must hold the arrays of a prediction file, missing: {', '.join(missing)}")
        values: dict[str, Any] = {f.name: arrays[f.name] for f in fields(cls) if f.name in arrays}
        for name in ("positive", "split", "split_hash", "model_fingerprint", "preprocessing_fingerprint"):
            values[name] = str(values[name])
        values["classes"] = [str(name) for name in values["classes"]]
        return cls(**values)


def save_npz(path: Path | str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays as an uncompressed ``.npz``, atomically; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            item = io.BytesIO()
            np.lib.format.write_array(item, array, allow_pickle=False)
            # A fixed date: np.savez stamps the clock, and the same run must give the same bytes.
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)), item.getvalue())
    write_bytes(path, buffer.getvalue())


def load_npz(path: Path | str) -> dict[str, NDArray[Any]]:
    """Read every array of an ``.npz`` without pickle; raise InputError when it is not one."""
    try:
        data = np.load(path, allow_pickle=False)
        if isinstance(data, np.ndarray):
            raise InputError(f"{path} must be a NumPy .npz file with named arrays, got a single array")
        with data:
            return {name: data[name] for name in data.files}
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} must exist, but there is no such file") from None
    except Exception as error:  # noqa: BLE001 - zipfile, zlib and NumPy each raise kinds of their own on damage
        raise InputError(f"{path} must be a NumPy .npz file without pickled objects, got: {error}") from None
