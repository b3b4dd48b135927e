"""The bundle: one folder that is deployed, written whole or not at all, verified before it is used."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import mmap
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from stage1_pro.classes import check_names
from stage1_pro.data.images import PreprocessSpec
from stage1_pro.data.photos import hidden
from stage1_pro.data.splits import SplitsSummary
from stage1_pro.deploy.graphs import check_graph
from stage1_pro.deploy.manifest import FORMAT, BundleManifest, EngineEntry, Provenance, StageEntry, upgrade
from stage1_pro.errors import ArtifactError, InputError, printable
from stage1_pro.files import atomic_directory, npz_arrays, recover_directory, sha256_bytes, write_text
from stage1_pro.models.architecture import BackboneInfo
from stage1_pro.policies.policy import Policy
from stage1_pro.policies.target import POLICIES
from stage1_pro.record import FileEntry, list_files, parse_json, parts_of
from stage1_pro.words import StageName

if TYPE_CHECKING:
    from stage1_pro.config import Config
    from stage1_pro.data.splits import Splits
    from stage1_pro.models.model import Architecture

MANIFEST = "bundle.json"
SIGNATURE = "bundle.sig"
REFERENCE = "reference.npz"
LICENCE = "LICENCE-BACKBONE.txt"
REQUIRED = ("config.json", "splits.json", "metrics.csv")
STAGES: tuple[StageName, ...] = ("stage_a", "stage_b")
# What a received bundle may ask of the machine before anybody has looked at it. JSON is parsed whole into memory and
# into many small objects, so both its bytes and its values are counted; real manifests have a few thousand.
JSON_BYTES = 4 * 2**20
# Of all files together, before any is hashed: three precisions and engines of the largest backbones. Protobuf holds no
# larger graph.
BYTES = 2**37
_BYTES_OF = {".json": JSON_BYTES, ".csv": 2**26, ".txt": 2**24, ".onnx": 2**31}
_SPARSE = 2**20
JSON_VALUES = 50_000
JSON_DEPTH = 32
_TEXT_LENGTH = 2**16
FILES = 1000
_DEPTH = 6
_TENSOR_NUMBERS = 2**28
# What a terminal obeys, what turns text around, and halves of characters: messages and reports show these texts.
# A line break would let a text stand for a line of `stage1 verify`.
_UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What hubs, systems and people put beside a bundle's files.
_BESIDE = re.compile(r"(readme|licen[cs]e|notice)(\.md|\.txt)?", re.IGNORECASE)
# Where files are made up when they are read: some have no end, some wait.
_MADE_UP = {"proc", "sys"}
# They are run at once on every start: what a stranger sends must not take the machine's memory.
_REFERENCE_ROWS, _REFERENCE_NUMBERS = 64, 2**26

Graphs = tuple[Mapping[StageName, StageEntry], Sequence[EngineEntry]]


class Described(ABC):
    """What serves, a bundle or the model of a run, and what it says about itself."""

    @property
    @abstractmethod
    def about(self) -> BundleManifest | Architecture:
        """Where the facts are."""

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return self.about.classes

    @property
    def positive(self) -> str | None:
        """The class that must not be missed."""
        return self.about.positive

    @property
    def preprocessing(self) -> PreprocessSpec:
        """What turns an image into pixels for Stage A."""
        return self.about.preprocessing

    @property
    def backbone(self) -> BackboneInfo:
        """Facts about the backbone."""
        return self.about.backbone

    @property
    def tap(self) -> int:
        """Block whose tokens Stage A reads."""
        return self.about.tap


@dataclass(frozen=True)
class Bundle(Described):
    """A verified bundle: where it is, what it says about itself, and its policy."""

    path: Path
    manifest: BundleManifest
    policy: Policy
    splits: SplitsSummary
    raw: bytes = field(default=b"", repr=False)
    """The manifest's bytes, as read: what a signature covers."""
    notes: tuple[str, ...] = ()
    """What an older format lacks."""
    format_version: int = FORMAT
    """As it lies there; the manifest is always of today's."""
    beside: tuple[str, ...] = ()
    """What lies in its folder and is no part of it: never read."""

    def read(self, name: str) -> bytes:
        """A file's bytes, checked: what is given is what was hashed, whatever becomes of the file.

        Raises:
            ArtifactError: the manifest does not list it, or it has another size or sha256 than there.
        """
        entry = self.manifest.files.get(name)
        if entry is None:
            raise ArtifactError(f"{MANIFEST} must list {printable(name)!r} among its files, but it does not")
        data = io.BytesIO()
        check_hash(self.path, name, entry, data)
        return data.getvalue()

    def copy_to(self, folder: Path, names: Iterable[str]) -> None:
        """Copy files as plain ones, checked again: the originals could have been changed since they were verified."""
        for name in names:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as copy:
                check_hash(self.path, name, self.manifest.files[name], copy)

    def graph(self, stage: StageName) -> Path:
        """The ONNX file of one stage."""
        return self.path / self.manifest.stages[stage].onnx

    @property
    def about(self) -> BundleManifest:
        """The manifest."""
        return self.manifest


def write_bundle(
    out: Path | str,
    graphs: Callable[[Path], Graphs],
    *,
    policy: Policy,
    splits: Splits,
    config: Config,
    metrics: Path,
    preprocessing: PreprocessSpec,
    backbone: BackboneInfo,
    tap: int,
    provenance: Provenance,
) -> Bundle:
    """Write a bundle all or nothing, and verify it before it takes its place.

    Given the folder to fill, ``graphs`` writes both ONNX graphs (engines, reference outputs) and describes them. Of the
    splits only hashes and counts are written; of the configuration a local backbone folder is reduced to its last name;
    the backbone's licence is written beside the weights.

    Raises:
        InputError: ``out`` holds something that is no bundle.
        ArtifactError: the parts do not belong together.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and ((out / MANIFEST).is_file() or not any(out.iterdir()))):
        raise InputError(
            f"out must be a new folder or an existing bundle, got {out}, which holds something else; "
            "choose another folder"
        )
    with atomic_directory(out, keep=True) as folder:
        stages, engines = graphs(folder)
        policy.write(folder / policy.file)
        splits.summary().write(folder / "splits.json")
        write_text(folder / "config.json", json.dumps(_portable(config), indent=2) + "\n")
        try:
            write_text(folder / "metrics.csv", metrics.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(f"run must hold metrics.csv, but there is no {metrics}; train it again") from None
        licence = licence_note(config.model.backbone, backbone)
        if licence:
            write_text(folder / LICENCE, licence)
        BundleManifest(
            active_exit_policy=policy.policy,
            policy_file=policy.file,
            classes=policy.classes,
            positive=policy.positive,
            preprocessing=preprocessing,
            backbone=backbone,
            tap=tap,
            stages=dict(stages),
            engines=list(engines),
            reference=REFERENCE if (folder / REFERENCE).is_file() else None,
            files=list_files(folder),
            provenance=provenance,
        ).write(folder / MANIFEST)
        # Sizes and relations are checked here; the hashes were taken from these very files.
        written = load_bundle(folder, verify=False)
    return replace(written, path=out)


def load_bundle(path: Path | str, *, verify: bool = True) -> Bundle:
    """Read ``bundle.json``, check every file against it, and give the bundle.

    Nothing in the folder is deserialised before its name, size and sha256 were found right; graphs are walked
    (``graphs.check_graph``) before any runtime sees them. Files may be links to plain files, as hubs and volumes have
    them: what counts is what they hold. Of what lies beside them, hidden names and a README pass and stand in
    ``beside``. A bundle of an older format is read as what it is today, and ``notes`` says what it lacks. A signature
    is not asked for here: see ``trust``.

    Args:
        path: the bundle's folder.
        verify: compute every sha256; without it only names, sizes and relations are checked.

    Raises:
        ArtifactError: not a bundle; a file is missing, extra, changed, or no plain file nor a link to one;
            a second policy file or none; a policy, engine or split of another model; a graph that is not plain;
            something larger than any bundle has reason to be; a format newer than this version knows.
    """
    path = Path(path)
    recover_directory(path)
    if not path.is_dir():
        raise ArtifactError(f"bundle must be a folder that holds {MANIFEST}, got {printable(str(path))}")
    raw = read_plain(path, MANIFEST)
    found, current, notes = upgrade(_check_json(raw, MANIFEST))
    manifest = BundleManifest.parse(json.dumps(current), MANIFEST)
    _check_names(manifest)
    present, beside = _scan(path, manifest.files)
    _check_policy_files(manifest, present)
    _check_files(path, manifest, present, verify)
    _check_relations(manifest)
    _check_contents(path, manifest)
    policy = _policy_kind(manifest).parse(_read_record(path, manifest, manifest.policy_file), manifest.policy_file)
    splits = SplitsSummary.parse(_read_record(path, manifest, "splits.json"), "splits.json")
    check_policy_belongs(policy, manifest, manifest.provenance.model_fingerprint)
    if splits.hashes != manifest.provenance.split_hashes:
        raise ArtifactError(f"splits.json must have the hashes of {MANIFEST}, got others")
    for name, digest in policy.split_hashes.items():
        if splits.hashes.get(name) != digest:
            raise ArtifactError(
                f"{manifest.policy_file} must be calibrated on this run's {name}, got other rows"
                f"{policy.void()}; run `stage1 calibrate` again and export once more"
            )
    return Bundle(path, manifest, policy, splits, raw, notes, found, beside)


def check_policy_belongs(policy: Policy, about: BundleManifest | Architecture, model_fingerprint: str) -> None:
    """Raise ArtifactError when a policy was calibrated for other classes, weights or preprocessing."""
    for what, ours, theirs in (
        ("classes", about.classes, policy.classes),
        ("positive class", about.positive, policy.positive),
        ("model fingerprint", model_fingerprint, policy.model_fingerprint),
        ("preprocessing fingerprint", about.preprocessing.fingerprint(), policy.preprocessing_fingerprint),
    ):
        if ours != theirs:
            raise ArtifactError(
                f"{policy.file} must belong to this model, got another {what}: {_short(theirs)} instead of "
                f"{_short(ours)}{policy.void()}; run `stage1 calibrate` again and export once more"
            )


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else printable(text)


def _open_plain(folder: Path, name: str) -> io.BufferedReader:
    """Open a plain file, or one that a link leads to, and never wait on a pipe."""
    path = folder / name
    try:
        # A device may act when it is opened, so it is looked at first, and once more when it is open.
        if stat.S_ISREG(path.stat().st_mode) and Path(os.path.realpath(path)).parts[1] not in _MADE_UP:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                return os.fdopen(descriptor, "rb")
            os.close(descriptor)
    except FileNotFoundError:
        raise ArtifactError(f"bundle must hold {name}, but {folder} does not; it is incomplete or no bundle") from None
    except OSError as error:
        raise ArtifactError(f"{name} must be a plain file that can be read, got: {error.strerror}") from None
    raise ArtifactError(f"{name} must be a plain file, or a link to one, got something else")


def read_plain(folder: Path, name: str, limit: int = JSON_BYTES) -> bytes:
    """A file's bytes; raise ArtifactError where it is no plain file, or longer than ``limit``."""
    with _open_plain(folder, name) as file:
        try:
            data = file.read(limit + 1)
        except OSError as error:
            raise ArtifactError(f"{name} must be a file that can be read, got: {error.strerror}") from None
    if len(data) > limit:
        raise ArtifactError(f"{name} must be at most {limit} bytes, got more")
    return data


def _read_record(folder: Path, manifest: BundleManifest, name: str) -> str:
    """A JSON file of the manifest as text: the very bytes that were hashed."""
    data = read_plain(folder, name)
    if sha256_bytes(data) != manifest.files[name].sha256:
        raise ArtifactError(f"{name} must have the sha256 it was exported with, got another; it was changed")
    _check_json(data, name)
    return data.decode("utf-8")


def _check_json(data: bytes, name: str) -> dict[str, Any]:
    """JSON that means one thing to every reader: an object, bounded, no key twice, no NaN, no control characters."""
    values = parse_json(data, name, ArtifactError, values=JSON_VALUES, depth=JSON_DEPTH)
    if not isinstance(values, dict):
        raise ArtifactError(f"{name} must hold a JSON object, got another value")
    for text, _ in parts_of(values):
        if isinstance(text, str) and len(text) > _TEXT_LENGTH:
            raise ArtifactError(f"{name} must hold texts of at most {_TEXT_LENGTH} characters, got {len(text)}")
        if isinstance(text, str) and _UNFIT.search(text):
            raise ArtifactError(f"{name} must hold plain text, got control characters: {printable(text, 80)}")
    return values


def _safe(name: str) -> bool:
    """Whether a name is a plain relative POSIX path that stays inside the folder, on every system."""
    parts = name.split("/")
    return (
        bool(name)
        and len(name) <= 512
        and not any(part in ("", ".", "..") for part in parts)
        and not re.search(r"[\x00-\x1f\x7f\\:]", name)
    )


def _check_names(manifest: BundleManifest) -> None:
    if len(manifest.files) > FILES:
        raise ArtifactError(f"{MANIFEST} must list at most {FILES} files, got {len(manifest.files)}")
    parts = [manifest.policy_file, *_graphs(manifest), *(engine.path for engine in manifest.engines)]
    parts += [] if manifest.reference is None else [manifest.reference]
    for name in (*manifest.files, *parts):
        if not _safe(name) or name in (MANIFEST, SIGNATURE):
            raise ArtifactError(f"{MANIFEST} must name files inside the bundle, got {printable(repr(name))}")
    for name in (*parts, *REQUIRED):
        # The policy file has a message of its own.
        if name not in manifest.files and name != manifest.policy_file:
            raise ArtifactError(f"{MANIFEST} must list {name} among its files, but it does not")


def _graphs(manifest: BundleManifest) -> list[str]:
    """Every ONNX graph that the manifest names."""
    stages = manifest.stages.values()
    return [*(stage.onnx for stage in stages), *(v.onnx for stage in stages for v in stage.variants.values())]


def _scan(folder: Path, listed: Collection[str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Sizes of every file below the folder but manifest and signature, and names beside them that nobody enters."""
    folders = {str(above) for name in listed for above in PurePosixPath(name).parents}
    found: dict[str, int] = {}
    beside: list[str] = []
    pending, seen = [(folder, "", 0)], 0
    try:
        while pending:
            below, prefix, depth = pending.pop()
            with os.scandir(below) as entries:
                for entry in entries:
                    seen += 1
                    if seen > 2 * FILES or depth > _DEPTH:
                        raise ArtifactError(f"bundle must hold at most {FILES} files, {_DEPTH} folders deep, got more")
                    name = prefix + entry.name
                    if name not in listed and name not in folders and (hidden(entry.name) or _BESIDE.fullmatch(name)):
                        beside.append(printable(name))
                        continue
                    kind, size = _look(entry, name)
                    if kind == stat.S_IFDIR and (name in folders or not entry.is_symlink()):
                        pending.append((Path(entry.path), f"{name}/", depth + 1))
                    elif name not in (MANIFEST, SIGNATURE):
                        found[name] = size
    except OSError as error:
        raise ArtifactError(f"bundle must be a folder that can be read, got: {error.strerror}") from None
    return found, tuple(sorted(beside))


def _look(entry: os.DirEntry[str], name: str) -> tuple[int, int]:
    """Kind and size of a file or folder, or of what a link leads to; anything else is refused."""
    link = "a link to " if entry.is_symlink() else ""
    try:
        info = entry.stat()
    except OSError as error:
        raise ArtifactError(f"bundle must hold plain files, got {printable(name)}: {link}{error.strerror}") from None
    kind = stat.S_IFMT(info.st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        raise ArtifactError(f"bundle must hold plain files, got {link}something else: {printable(name)}")
    return kind, info.st_size


def _policy_kind(manifest: BundleManifest) -> type[Policy]:
    try:
        return POLICIES.find(manifest.active_exit_policy)
    except InputError:
        raise ArtifactError(
            "active_exit_policy must be a policy that is installed here, got "
            f"{printable(manifest.active_exit_policy)}; install the package that brings it"
        ) from None


def _check_policy_files(manifest: BundleManifest, present: Mapping[str, int]) -> None:
    expected = _policy_kind(manifest).file
    if manifest.policy_file != expected:
        raise ArtifactError(
            f"policy_file must be {expected} for active_exit_policy '{manifest.active_exit_policy}', "
            f"got {printable(manifest.policy_file)}"
        )
    # Of policies from elsewhere only the active one is looked for: others are not read.
    names = {expected, *(POLICIES.find(name).file for name in POLICIES.built_in)}
    policies = sorted(n for n in {*present, *manifest.files} if PurePosixPath(n).name.lower() in names)
    if not policies:
        raise ArtifactError(f"bundle must hold exactly one policy file, got none; {expected} is missing")
    if policies != [expected]:
        raise ArtifactError(
            f"bundle must hold exactly one policy file ({expected}), got {printable(', '.join(policies))}; "
            "export it anew instead of adding files"
        )


def _check_files(folder: Path, manifest: BundleManifest, present: Mapping[str, int], verify: bool) -> None:
    if missing := sorted(set(manifest.files) - set(present)):
        raise ArtifactError(f"bundle must hold every file of {MANIFEST}, missing: {printable(', '.join(missing))}")
    if extra := sorted(set(present) - set(manifest.files)):
        raise ArtifactError(f"bundle must hold only the files of {MANIFEST}, extra: {printable(', '.join(extra))}")
    for name, entry in manifest.files.items():
        if present[name] != entry.size:
            raise ArtifactError(f"{name} must have {entry.size} bytes as exported, got {present[name]}; it was changed")
        limit = _BYTES_OF.get(PurePosixPath(name).suffix.lower(), BYTES)
        if entry.size > limit:
            raise ArtifactError(f"{name} must have at most {limit} bytes, got {entry.size}")
        if entry.size > _SPARSE and 2 * _stored(folder, name, entry.size) < entry.size:
            raise ArtifactError(
                f"{name} must hold all of its bytes, got {entry.size} that are mostly holes; get it anew"
            )
    total = sum(entry.size for entry in manifest.files.values())
    if total > BYTES:
        raise ArtifactError(f"bundle must have at most {BYTES} bytes, got {total}")
    for name, entry in manifest.files.items() if verify else ():
        check_hash(folder, name, entry)


def _stored(folder: Path, name: str, size: int) -> int:
    """Bytes of a file that lie on the disk; all of them where the system does not tell its holes."""
    if not hasattr(os, "SEEK_DATA"):
        return size
    stored, place = 0, 0
    with _open_plain(folder, name) as file:
        while place < size:
            try:
                start = os.lseek(file.fileno(), place, os.SEEK_DATA)
                place = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            except OSError as error:
                return stored if error.errno == errno.ENXIO else size
            stored += place - start
    return stored


def check_hash(folder: Path, name: str, entry: FileEntry, copy: IO[bytes] | None = None) -> None:
    """Read a file piece by piece, into ``copy`` too; raises ArtifactError when it is not what the manifest says."""
    digest, left = hashlib.sha256(), entry.size + 1
    try:
        with _open_plain(folder, name) as file:
            while piece := file.read(min(left, 2**20)):
                digest.update(piece)
                left -= len(piece)
                if copy is not None:
                    copy.write(piece)
    except OSError as error:
        if copy is not None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ArtifactError(f"{name} must be a file that can be read, got: {error.strerror}") from None
    if left != 1 or digest.hexdigest() != entry.sha256:
        raise ArtifactError(f"{name} must have the sha256 it was exported with, got another; it was changed")


def _check_relations(manifest: BundleManifest) -> None:
    classes = manifest.classes
    if len(classes) < 2 or len(set(classes)) != len(classes) or manifest.positive not in (None, *classes):
        raise ArtifactError(
            f"classes must be two or more different names with the positive one, got {printable(str(classes))}, "
            f"positive '{printable(str(manifest.positive))}'"
        )
    try:
        check_names(classes, stored=True)
    except InputError as error:
        raise ArtifactError(str(error)) from None
    if set(manifest.stages) != set(STAGES):
        raise ArtifactError(f"stages must be {' and '.join(STAGES)}, got {', '.join(manifest.stages) or 'none'}")
    if not 1 <= manifest.tap <= manifest.backbone.n_blocks:
        raise ArtifactError(
            f"tap must be a block of the backbone (1 to {manifest.backbone.n_blocks}), got {manifest.tap}"
        )
    spec, first, second = manifest.preprocessing, manifest.stages["stage_a"], manifest.stages["stage_b"]
    gate = {"gate_logit": [-1]} if "gate_logit" in first.outputs else {}
    # What else the graphs take or give nobody would feed or ask for.
    hidden = {"hidden": first.outputs.get("hidden", [])}
    wanted: tuple[tuple[StageName, dict[str, list[int]], dict[str, list[int]]], ...] = (
        ("stage_a", first.inputs, {"pixels": [-1, 3, spec.height, spec.width]}),
        ("stage_a", first.outputs, {"logits": [-1, len(classes)], **gate, **hidden}),
        ("stage_b", second.inputs, hidden),
        ("stage_b", second.outputs, {"logits": [-1, len(classes)]}),
    )
    for stage, shapes, expected in wanted:
        for name in sorted({*shapes, *expected}):
            ours, theirs = expected.get(name, "absent"), shapes.get(name, "absent")
            if ours != theirs:
                raise ArtifactError(
                    f"{printable(name)} of {stage} must be {printable(str(ours))}, got {printable(str(theirs))}"
                )
    for stage, entry in manifest.stages.items():
        wide = entry.variants.get("fp32")
        if wide is not None and wide.onnx != entry.onnx:
            raise ArtifactError(
                f"{stage} must have one graph in fp32, got {printable(entry.onnx)} and {printable(wide.onnx)}"
            )
    shape = hidden["hidden"]
    if len(shape) < 2 or shape[0] != -1 or min(shape[1:]) < 1 or math.prod(shape[1:]) > _TENSOR_NUMBERS:
        raise ArtifactError(f"hidden must have a shape of -1 and sizes from 1 on, got {printable(str(shape))}")
    if POLICIES.find(manifest.active_exit_policy).needs_gate and not gate:
        raise ArtifactError(
            f"stage_a must give gate_logit for the policy {manifest.active_exit_policy}, but it does not"
        )
    for engine in manifest.engines:
        _check_engine(manifest, engine)


def _check_engine(manifest: BundleManifest, engine: EngineEntry) -> None:
    stage = manifest.stages[engine.stage]
    variant = stage.variants.get(engine.precision)
    graph = stage.onnx if engine.precision == "fp32" else None if variant is None else variant.onnx
    if graph is None:
        raise ArtifactError(f"{engine.path} must be built from a graph of this bundle, got none in {engine.precision}")
    if engine.onnx_sha256 != manifest.files[graph].sha256:
        raise ArtifactError(f"{engine.path} must be built from {graph} of this bundle, got another graph's engine")
    low, best, high = engine.batch
    if not 1 <= low <= best <= high:
        raise ArtifactError(f"batch of {engine.path} must rise from 1 on, got {printable(str(list(engine.batch)))}")


def _check_contents(folder: Path, manifest: BundleManifest) -> None:
    """Look into what a runtime will read: graphs and arrays, by their bytes alone."""
    sizes = {name: entry.size for name, entry in manifest.files.items()}
    # A graph that no stage names is opened by nobody today, and must be harmless all the same.
    for name in sorted({*_graphs(manifest), *(name for name in sizes if name.lower().endswith(".onnx"))}):
        if sizes[name] == 0:
            raise ArtifactError(f"{name} must be a plain ONNX graph, got an empty file")
        with (
            _open_plain(folder, name) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as data,
        ):
            check_graph(data, name, sizes)
    arrays = {name for name in sizes if name.lower().endswith((".npz", ".npy"))}
    if manifest.reference is not None:
        arrays.add(manifest.reference)
    for name in sorted(arrays):
        with _open_plain(folder, name) as file:
            try:
                found = npz_arrays(file, plain=True)
            except Exception as error:  # noqa: BLE001 - zipfile and NumPy each raise kinds of their own on damage
                raise ArtifactError(
                    f"{name} must be an .npz of plain, unpacked numbers, got: {printable(str(error))}"
                ) from None
        if name == manifest.reference:
            _check_reference(name, found, manifest)


def _check_reference(
    name: str, found: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], manifest: BundleManifest
) -> None:
    """Inputs and outputs of this model's shapes, of a few rows, and nothing else."""
    spec, k = manifest.preprocessing, len(manifest.classes)
    pixels, logits = (3, spec.height, spec.width), (k,)
    wanted: dict[str, tuple[int, ...]] = {"pixels": pixels, "stage_a.logits": logits, "stage_b.logits": logits}
    # A Stage A that gave up its gate may have its logits here still.
    if {"gate_logit", "stage_a.gate_logit"} & {*manifest.stages["stage_a"].outputs, *found}:
        wanted["stage_a.gate_logit"] = ()
    shape = found["pixels"][1] if "pixels" in found else ()
    rows = shape[0] if shape else 0
    for array in sorted({*wanted, *found}):
        kind = np.dtype(np.uint8 if array == "pixels" else np.float32)
        expected = f"{kind} [R, {', '.join(map(str, wanted[array]))}]" if array in wanted else "absent"
        if array not in found or array not in wanted or found[array] != (kind, (rows, *wanted[array])) or not rows:
            got = f"{found[array][0]} {list(found[array][1])}" if array in found else "none"
            raise ArtifactError(f"{printable(array)} of {name} must be {expected}, got {printable(got)}")
    held = sum(math.prod(shape) * kind.itemsize for kind, shape in found.values())
    if manifest.files[name].size > held + len(found) * 2**12:
        raise ArtifactError(f"{name} must be as large as its arrays, got {manifest.files[name].size} bytes")
    # Where pixels are many, the three rows of an export.
    limit = min(_REFERENCE_ROWS, max(3, _REFERENCE_NUMBERS // math.prod(pixels)))
    if rows > limit:
        raise ArtifactError(f"{name} must have at most {limit} rows, got {rows}; export the bundle anew")


def _portable(config: Config) -> dict[str, Any]:
    values: dict[str, Any] = config.model_dump(mode="json")
    source = str(values["model"]["backbone"])
    if Path(source).expanduser().is_dir() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        values["model"]["backbone"] = Path(source).expanduser().resolve().name
    return values


def licence_note(base: str, backbone: BackboneInfo) -> str | None:
    """What has to travel with weights that derive from ``base`` (folder or hub id); None for own ones."""
    if backbone.licence.startswith("trained from scratch"):
        return None
    lines = [
        f"The weights in this folder derive from the backbone '{backbone.source}' ({backbone.family}).",
        f"Its licence: {backbone.licence}.",
    ]
    if backbone.family == "dinov3":
        lines += [
            "Weights derived from Meta's DINOv3 may be passed on only together with the DINOv3 License and under",
            "its terms: https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
        ]
    folder = Path(base).expanduser()
    texts = sorted(folder.glob("LICEN[CS]E*")) if folder.is_dir() else []
    for text in texts:
        if text.is_file():
            lines += ["", f"--- {text.name}, as it came with the backbone ---", "", text.read_text("utf-8", "replace")]
    if not texts:
        lines += ["The licence's text did not come with the backbone: add it when you pass this folder on outside it."]
    return "\n".join(lines) + "\n"
