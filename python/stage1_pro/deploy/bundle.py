"""The bundle: one folder that is deployed, written whole or not at all, verified before it is used."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stage1_pro.artifacts import (
    POLICY_FILES,
    BackboneInfo,
    BundleManifest,
    EngineEntry,
    FileEntry,
    Policy,
    PreprocessSpec,
    Provenance,
    Splits,
    SplitsSummary,
    StageEntry,
    StageName,
    atomic_directory,
    recover_directory,
    sha256_file,
    write_text,
)
from stage1_pro.config import Config
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.policies import POLICIES, void

MANIFEST = "bundle.json"
LICENCE = "LICENCE-BACKBONE.txt"
REQUIRED = ("config.json", "splits.json", "metrics.csv")
STAGES: tuple[StageName, ...] = ("stage_a", "stage_b")
# JSON is parsed whole into memory, so a hostile file must not be allowed to be huge.
_JSON_LIMIT = 64 * 2**20

Graphs = tuple[Mapping[StageName, StageEntry], Sequence[EngineEntry]]


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: where it is, what it says about itself, and its policy."""

    path: Path
    manifest: BundleManifest
    policy: Policy
    splits: SplitsSummary

    def graph(self, stage: StageName) -> Path:
        """The ONNX file of one stage."""
        return self.path / self.manifest.stages[stage].onnx

    @property
    def classes(self) -> list[str]:
        """Names of the classes, in the order of the logits."""
        return self.manifest.classes

    @property
    def positive(self) -> str:
        """The class that must not be missed."""
        return self.manifest.positive

    @property
    def preprocessing(self) -> PreprocessSpec:
        """What turns an image into the graphs' input."""
        return self.manifest.preprocessing

    @property
    def backbone(self) -> BackboneInfo:
        """Facts about the backbone."""
        return self.manifest.backbone

    @property
    def tap(self) -> int:
        """Block whose tokens Stage A reads."""
        return self.manifest.tap


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

    Args:
        out: the bundle's folder: new, empty, or an older bundle, which is replaced.
        graphs: given the folder to fill, writes both ONNX graphs (and engines) and describes them.
        policy: the one exit policy.
        splits: the run's splits; only hashes and counts are written.
        config: the run's configuration; a local backbone folder is reduced to its last name.
        metrics: the run's ``metrics.csv``, copied.
        preprocessing: what turns an image into the graphs' input.
        backbone: facts about the backbone; its licence is written beside the weights.
        tap: block whose tokens Stage A reads.
        provenance: versions and fingerprints.

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
    with atomic_directory(out) as folder:
        stages, engines = graphs(folder)
        policy.write(folder / POLICY_FILES[policy.policy])
        splits.summary().write(folder / "splits.json")
        write_text(folder / "config.json", json.dumps(_portable(config), indent=2) + "\n")
        write_text(folder / "metrics.csv", _read_metrics(metrics))
        licence = licence_note(config.model.backbone, backbone)
        if licence:
            write_text(folder / LICENCE, licence)
        BundleManifest(
            active_exit_policy=policy.policy,
            policy_file=POLICY_FILES[policy.policy],
            classes=policy.classes,
            positive=policy.positive,
            preprocessing=preprocessing,
            backbone=backbone,
            tap=tap,
            stages=dict(stages),
            engines=list(engines),
            files=list_files(folder),
            provenance=provenance,
        ).write(folder / MANIFEST)
        # Sizes and relations are checked here; the hashes were taken from these very files.
        written = load_bundle(folder, verify=False)
    return Bundle(out, written.manifest, written.policy, written.splits)


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Every file below a folder with its hash and size, as a manifest lists them."""
    return {
        path.relative_to(folder).as_posix(): FileEntry(sha256=sha256_file(path), size=path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def load_bundle(path: Path | str, *, verify: bool = True) -> Bundle:
    """Read ``bundle.json``, check every file against it, and give the bundle.

    Nothing in the folder is deserialised before its name, size and sha256 were found right.

    Args:
        path: the bundle's folder.
        verify: compute every sha256; without it only names, sizes and relations are checked.

    Raises:
        ArtifactError: not a bundle; a file is missing, extra, changed, a link or outside the folder;
            a second policy file or none; a policy, engine or split of another model.
    """
    path = Path(path)
    recover_directory(path)
    if not path.is_dir():
        raise ArtifactError(f"bundle must be a folder that holds {MANIFEST}, got {path}")
    manifest = BundleManifest.parse(_read_json(path, MANIFEST), f"{path.name}/{MANIFEST}")
    _check_names(manifest)
    present = _scan(path)
    _check_policy_files(manifest, present)
    _check_files(path, manifest, present, verify)
    _check_relations(manifest)
    policy = POLICIES[manifest.active_exit_policy].parse(_read_json(path, manifest.policy_file), manifest.policy_file)
    splits = SplitsSummary.parse(_read_json(path, "splits.json"), "splits.json")
    _check_policy(manifest, policy, splits)
    return Bundle(path, manifest, policy, splits)


def check_policy_belongs(
    policy: Policy, *, classes: Sequence[str], positive: str, model_fingerprint: str, preprocessing: PreprocessSpec
) -> None:
    """Raise ArtifactError when a policy was calibrated for other classes, weights or preprocessing."""
    name = POLICY_FILES[policy.policy]
    for what, ours, theirs in (
        ("classes", list(classes), policy.classes),
        ("positive class", positive, policy.positive),
        ("model fingerprint", model_fingerprint, policy.model_fingerprint),
        ("preprocessing fingerprint", preprocessing.fingerprint(), policy.preprocessing_fingerprint),
    ):
        if ours != theirs:
            raise ArtifactError(
                f"{name} must belong to this model, got another {what}: {_short(theirs)} instead of {_short(ours)}"
                f"{void(policy)}; run `stage1 calibrate` again and export once more"
            )


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return f"{text[:12]}…" if re.fullmatch(r"[0-9a-f]{64}", text) else text


def _read_json(folder: Path, name: str) -> str:
    path = folder / name
    try:
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode):
            raise ArtifactError(f"{name} must be a plain file, got a link or something else")
        if info.st_size > _JSON_LIMIT:
            raise ArtifactError(f"{name} must be at most {_JSON_LIMIT} bytes, got {info.st_size}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"bundle must hold {name}, but {folder} does not; it is incomplete or no bundle") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{name} must be readable UTF-8, got: {error}") from None


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
    stages, engines = manifest.stages, manifest.engines
    graphs = [name for s in stages.values() for name in (s.onnx, *(v.onnx for v in s.variants.values()))]
    listed = [*manifest.files, manifest.policy_file, *graphs, *(e.path for e in engines)]
    for name in listed:
        if not _safe(name) or name == MANIFEST:
            raise ArtifactError(f"{MANIFEST} must name files inside the bundle, got {name!r}")
    for name in (*listed[len(manifest.files) :], *REQUIRED):
        # The policy file has a message of its own.
        if name not in manifest.files and name != manifest.policy_file:
            raise ArtifactError(f"{MANIFEST} must list {name} among its files, but it does not")


def _scan(folder: Path) -> dict[str, int]:
    """Every file below the folder but the manifest, with its size; links are refused."""
    found: dict[str, int] = {}
    pending = [folder]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(folder).as_posix()
                if entry.is_symlink():
                    raise ArtifactError(f"bundle must hold plain files, got a link: {name}")
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif not entry.is_file(follow_symlinks=False):
                    raise ArtifactError(f"bundle must hold plain files, got something else: {name}")
                elif name != MANIFEST:
                    found[name] = entry.stat(follow_symlinks=False).st_size
    return found


def _check_policy_files(manifest: BundleManifest, present: Mapping[str, int]) -> None:
    expected = POLICY_FILES[manifest.active_exit_policy]
    if manifest.policy_file != expected:
        raise ArtifactError(
            f"policy_file must be {expected} for active_exit_policy '{manifest.active_exit_policy}', "
            f"got {manifest.policy_file}"
        )
    names = set(POLICY_FILES.values())
    policies = sorted(n for n in {*present, *manifest.files} if PurePosixPath(n).name.lower() in names)
    if not policies:
        raise ArtifactError(f"bundle must hold exactly one policy file, got none; {expected} is missing")
    if policies != [expected]:
        raise ArtifactError(
            f"bundle must hold exactly one policy file ({expected}), got {', '.join(policies)}; "
            "export it anew instead of adding files"
        )


def _check_files(folder: Path, manifest: BundleManifest, present: Mapping[str, int], verify: bool) -> None:
    missing = sorted(set(manifest.files) - set(present))
    if missing:
        raise ArtifactError(f"bundle must hold every file of {MANIFEST}, missing: {', '.join(missing)}")
    extra = sorted(set(present) - set(manifest.files))
    if extra:
        raise ArtifactError(f"bundle must hold only the files of {MANIFEST}, extra: {', '.join(extra)}")
    for name, entry in manifest.files.items():
        if present[name] != entry.size:
            raise ArtifactError(f"{name} must have {entry.size} bytes as exported, got {present[name]}; it was changed")
    if not verify:
        return
    for name, entry in manifest.files.items():
        if sha256_file(folder / name) != entry.sha256:
            raise ArtifactError(f"{name} must have the sha256 it was exported with, got another; it was changed")


def _check_relations(manifest: BundleManifest) -> None:
    classes = manifest.classes
    if len(classes) < 2 or len(set(classes)) != len(classes) or manifest.positive not in classes:
        raise ArtifactError(
            f"classes must be two or more different names with the positive one, got {classes}, "
            f"positive '{manifest.positive}'"
        )
    if set(manifest.stages) != set(STAGES):
        raise ArtifactError(f"stages must be {' and '.join(STAGES)}, got {', '.join(manifest.stages) or 'none'}")
    spec = manifest.preprocessing
    wanted: tuple[tuple[StageName, str, dict[str, list[int]], list[int]], ...] = (
        ("stage_a", "pixels", manifest.stages["stage_a"].inputs, [-1, 3, spec.height, spec.width]),
        ("stage_a", "logits", manifest.stages["stage_a"].outputs, [-1, len(classes)]),
        ("stage_b", "logits", manifest.stages["stage_b"].outputs, [-1, len(classes)]),
    )
    for stage, tensor, shapes, shape in wanted:
        if shapes.get(tensor) != shape:
            raise ArtifactError(f"{tensor} of {stage} must be {shape}, got {shapes.get(tensor)}")
    if manifest.stages["stage_b"].inputs.get("hidden") != manifest.stages["stage_a"].outputs.get("hidden"):
        raise ArtifactError("hidden must have one shape in both stages, got two")
    for engine in manifest.engines:
        stage_entry = manifest.stages[engine.stage]
        variant = stage_entry.variants.get(engine.precision)
        graph = stage_entry.onnx if variant is None else variant.onnx
        if variant is None and engine.precision != "fp32":
            raise ArtifactError(f"{engine.path} must be of a precision {engine.stage} has, got {engine.precision}")
        if engine.onnx_sha256 != manifest.files[graph].sha256:
            raise ArtifactError(f"{engine.path} must be built from {graph} of this bundle, got another graph's engine")


def _check_policy(manifest: BundleManifest, policy: Policy, splits: SplitsSummary) -> None:
    check_policy_belongs(
        policy,
        classes=manifest.classes,
        positive=manifest.positive,
        model_fingerprint=manifest.provenance.model_fingerprint,
        preprocessing=manifest.preprocessing,
    )
    if splits.hashes != manifest.provenance.split_hashes:
        raise ArtifactError(f"splits.json must have the hashes of {MANIFEST}, got others")
    for name, digest in policy.split_hashes.items():
        if splits.hashes.get(name) != digest:
            raise ArtifactError(
                f"{manifest.policy_file} must be calibrated on this run's {name}, got other rows"
                f"{void(policy)}; run `stage1 calibrate` again and export once more"
            )


def _portable(config: Config) -> dict[str, Any]:
    values: dict[str, Any] = config.model_dump(mode="json")
    source = str(values["model"]["backbone"])
    if Path(source).expanduser().is_dir() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        values["model"]["backbone"] = Path(source).expanduser().resolve().name
    return values


def _read_metrics(path: Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"run must hold metrics.csv, but there is no {path}; train it again") from None


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
