"""Station ``compare``: arms trained alike but for their configuration, over several seeds, with paired intervals."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from stage1_pro.commands.split import Split
from stage1_pro.config import Config, build_config, load_config
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits, resplit
from stage1_pro.errors import ArtifactError, InputError, TrainingError, nearest
from stage1_pro.files import locked, sha256_bytes, sha256_file, sweep, write_bytes, write_csv, write_text
from stage1_pro.metrics.estimate import Interval
from stage1_pro.metrics.figures import differences_png, tradeoff_png
from stage1_pro.metrics.measured import Metric, known
from stage1_pro.metrics.seeds import ARM_METRICS, ArmIntervals, SeedRows, compare_seeds
from stage1_pro.metrics.table import METRICS
from stage1_pro.policies.gate import reach
from stage1_pro.policies.softmax import softmax
from stage1_pro.progress import say
from stage1_pro.record import Record, parse_yaml
from stage1_pro.tables import Sheet, grid
from stage1_pro.training.run import RunConfig, Start

if TYPE_CHECKING:
    from stage1_pro.commands.compare import Compare


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


STUDIES = ("modes", "explora")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = {"splits", "logs", "figures"}


def compare(asked: Compare, configs: Mapping[str, Config]) -> tuple[Comparison, Comparison | None]:
    """Train every arm in every seed, compare them on ``val_select``, choose one, and look at ``val_test`` once.

    Arms of a seed have the same splits byte for byte, and the same starting heads, row order and batches: the hashes
    that every training records are compared. ``val_test`` is the same rows in every seed, so that the choice has seen
    none of them; the other splits are cut anew in each. Runs are ``OUT/<arm>/seed<s>``, each trained in a process of
    its own; finished ones are skipped, killed ones resumed. After the choice ``test.json`` holds the chosen arm and the
    baseline on ``val_test``, which is never computed a second time unasked.

    Raises:
        Stage1Error: as ``stage1_pro.compare``.
    """
    out, numbers = asked.out, list(range(asked.seeds))
    _check(out, configs, asked.seeds, asked.metric)
    plan = _plan(asked)
    arms = [[name, _without_seed(config)] for name, config in configs.items()]
    chosen_from = sha256_bytes(json.dumps([arms, asked.seeds, asked.metric, plan.fingerprint()]).encode())
    earlier = _earlier(out) if asked.test else None
    if earlier is not None and earlier.chosen_from != chosen_from and not asked.second_look:
        raise InputError(
            f"val_test must be read once, after the choice, but {out}/test.json holds the choice of {earlier.chosen} "
            "from other arms, seeds or by another metric; leave val_test alone with --no-test, or look a second time "
            "with --second-look, which is recorded"
        )
    for name, config in configs.items():
        _keep_config(out / name, name, config)
    _split_all(asked, configs, numbers)
    exceptions = [*_train_all(out, configs, numbers), *_check_bases(out, configs, numbers)]
    runs = {name: [out / name / f"seed{seed}" for seed in numbers] for name in configs}
    trained = _Trained(asked, plan, chosen_from, runs, exceptions)
    found = _measure(trained, "val_select", list(configs), lambda run: Predictions.load(run / "val_select.npz"))
    found.write(out / "compare.json")
    _write_tables(out, found)
    return found, _look(trained, found) if asked.test else None


@dataclass(frozen=True)
class _Trained:
    """What was asked for, and the runs [seeds] of every arm that were trained for it."""

    asked: Compare
    plan: ComparisonPlan
    chosen_from: str
    runs: Mapping[str, Sequence[Path]]
    exceptions: list[str]


def _look(trained: _Trained, found: Comparison) -> Comparison:
    """The chosen arm and the baseline on ``val_test``: computed once, and read from ``test.json`` from then on."""
    out, looked = trained.asked.out, _earlier(trained.asked.out)
    names = list(dict.fromkeys([found.baseline, found.chosen]))
    weights = [sha256_file(run / "model_best.pth") for name in names for run in trained.runs[name]]
    models = sha256_bytes("".join(weights).encode())
    before = []
    if looked is not None:
        if looked.chosen_from == trained.chosen_from and looked.models == models:
            return looked
        if looked.chosen_from == trained.chosen_from and not trained.asked.second_look:
            raise InputError(
                f"{out}/test.json must be of these trainings, but it holds figures of others: a run was trained anew "
                "since. Leave val_test alone with --no-test, or look again with --second-look, which is recorded"
            )
        before = [*looked.looks, looked.chosen]
    from stage1_pro.training.inference import infer_split

    say(f"chosen by {found.metric} on val_select: {found.chosen}; reading val_test, once")
    new = _measure(trained, "val_test", names, lambda run: infer_split(run, "val_test"), found.chosen)
    new = new.model_copy(update={"looks": before, "models": models})
    new.write(out / "test.json")
    return new


def read_arms(
    paths: Sequence[Path | str], *, names: Sequence[str] | None = None, overrides: Sequence[str] = (),
    study: str | None = None,
) -> dict[str, Config]:  # fmt: skip
    """Arms from YAML files (named by them unless ``names`` says otherwise), or those of a standing study.

    Args:
        paths: one YAML file of ``stage1 train`` an arm.
        names: of the arms, in the order of ``paths``.
        overrides: ``KEY=VALUE`` for all arms, or ``ARM:KEY=VALUE`` for one.
        study: ``modes`` or ``explora``, instead of paths.

    Raises:
        InputError: no arms or both kinds of them, names that do not fit, or a wrong configuration, naming the arm.
    """
    if (study is None) == (not paths):
        raise InputError(f"compare must have either --config or --study, got {'neither' if not paths else 'both'}")
    raw: dict[str, Path | dict[str, Any]]
    if study is not None:
        if study not in STUDIES:
            raise InputError(f"--study must be {' or '.join(STUDIES)}, got '{study}'{nearest(study, STUDIES)}")
        text = (files("stage1_pro") / "studies" / f"{study}.yaml").read_text(encoding="utf-8")
        content = parse_yaml(text)
        raw = {name: _merged(content["common"], arm) for name, arm in content["arms"].items()}
    else:
        given = list(names) if names else [Path(path).stem for path in paths]
        if len(given) != len(paths):
            raise InputError(f"--names must name every --config, got {len(given)} names for {len(paths)} files")
        if len(set(given)) != len(given):
            raise InputError(f"arms must have different names, got {', '.join(given)}; name them with --names a,b")
        raw = {name: Path(path) for name, path in zip(given, paths, strict=True)}
    own: dict[str, list[str]] = {name: [] for name in raw}
    for item in overrides:
        arm, separator, _ = item.partition("=")[0].partition(":")
        if separator and arm not in own:
            raise InputError(f"--set must name an arm of {', '.join(own)}, got '{arm}' in '{item}'{nearest(arm, own)}")
        for name in [arm] if separator else list(own):
            own[name].append(item[len(arm) + 1 :] if separator else item)
    arms = {}
    for name, source in raw.items():
        try:
            if isinstance(source, Path):
                arms[name] = load_config(source, own[name])
            else:
                arms[name] = load_config(None, own[name], base=build_config(source))
        except InputError as error:
            raise InputError(f"arm {name}: {error}") from None
    return arms


# ---------------------------------------------------------------------------------------------- before training


def _check(out: Path, configs: Mapping[str, Config], seeds: int, metric: str) -> None:
    if len(configs) < 2:
        raise InputError(f"compare must have two arms or more, got {len(configs)}; give several to --config")
    if seeds < 1:
        raise InputError(f"seeds must be 1 or more, got {seeds}; 5 is usual")
    if metric not in ARM_METRICS:
        raise InputError(
            f"metric must be one of {', '.join(ARM_METRICS)}, got '{metric}'{nearest(metric, ARM_METRICS)}"
        )
    for name in configs:
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise InputError(
                f"arm names must be usable as folders and not {', '.join(sorted(_RESERVED))}, got '{name}'"
            )
    seen: dict[str, str] = {}
    for name, config in configs.items():
        other = seen.setdefault(_without_seed(config), name)
        if other != name:
            raise InputError(
                f"arms must differ, got the same configuration for {other} and {name}; "
                f"set what differs, as in --set {name}:model.backbone=FOLDER"
            )
    if out.exists() and not out.is_dir():
        raise InputError(f"--out must be a folder, got the file {out}")


def _without_seed(config: Config) -> str:
    return config.model_dump_json(exclude={"seed"})


def _merged(common: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    return {k: {**common.get(k, {}), **own.get(k, {})} for k in {**common, **own}}


def _plan(asked: Compare) -> ComparisonPlan:
    """Write what is compared on what, or check that it is what this folder has been used for."""
    out, data = asked.out, asked.data
    if not data.exists():
        raise InputError(f"--data must be a labels file or a folder per class, got {data}, which is not there")
    plan = ComparisonPlan(
        data=str(data.resolve()),
        data_sha256=sha256_file(data) if data.is_file() else None,
        splitting={
            "images": None if asked.images is None else str(asked.images.resolve()),
            "positive": asked.positive,
            **{f"fraction of {name}": share for name, share in (asked.fractions or {}).items()},
            # Plans of older versions know only the default.
            **({"max_component": asked.max_component} if asked.max_component != 0.05 else {}),
        },
        hold_split=asked.hold_split,
        min_coverage=asked.min_coverage,
        max_exit_error=asked.max_exit_error,
    )
    path = out / "plan.json"
    # Nothing was cut by a plan whose labels could not be used.
    if path.is_file() and (out / "splits").is_dir():
        stored = ComparisonPlan.read(path)
        differs = [name for name in ComparisonPlan.model_fields if getattr(stored, name) != getattr(plan, name)]
        if differs:
            name = differs[0]
            raise InputError(
                f"--out must be of this comparison, got {out}, whose {name} is {getattr(stored, name)} instead of "
                f"{getattr(plan, name)}; name another folder"
            )
    elif not path.is_file() and out.is_dir() and any(out.iterdir()):
        raise InputError(f"--out must be a new or empty folder, or a comparison's, got {out} with other files in it")
    plan.write(path)
    return plan


def _earlier(out: Path) -> Comparison | None:
    return Comparison.read(out / "test.json") if (out / "test.json").is_file() else None


def _keep_config(folder: Path, name: str, config: Config) -> None:
    """Write an arm's whole configuration, or check that it is the one its runs were trained with."""
    path, text = folder / "arm.json", json.dumps(config.model_dump(mode="json", exclude={"seed"}), indent=2) + "\n"
    if any(folder.glob("seed*/config.json")) and path.read_text(encoding="utf-8") != text:
        try:
            stored = build_config(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, InputError) as error:
            raise ArtifactError(f"{path} must be the configuration of arm {name}, got: {error}") from None
        changed = _differences(stored.model_dump(), config.model_copy(update={"seed": stored.seed}).model_dump())
        if changed:
            raise InputError(
                f"arm {name} must keep the configuration its runs in {folder} have, but {', '.join(changed[:4])} "
                "differ; give the arm another name, or remove that folder"
            )
        return
    write_text(path, text)


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], place: str = "") -> list[str]:
    found = []
    for key in a:
        if isinstance(a[key], Mapping) and isinstance(b.get(key), Mapping):
            found += _differences(a[key], b[key], f"{place}{key}.")
        elif a[key] != b.get(key):
            found.append(f"{place}{key}")
    return found


def _split_all(asked: Compare, arms: Mapping[str, Config], seeds: Sequence[int]) -> None:
    """One ``splits.json`` a seed, and the same bytes in every arm's run of it."""
    out = asked.out
    base = out / "splits" / "seed0"
    if not (base / "splits.json").is_file():
        given = asked.model_dump(include={"columns", "images", "positive", "fractions", "max_component"})
        Split(**given, labels=asked.data, out=base).cut()
    first = Splits.read(base / "splits.json").verify()
    for seed in seeds:
        path = out / "splits" / f"seed{seed}" / "splits.json"
        if not path.is_file():
            (first if asked.hold_split else resplit(first, seed)).write(path)
        content = path.read_bytes()
        for name in arms:
            own = out / name / f"seed{seed}" / "splits.json"
            if not own.is_file():
                write_bytes(own, content)
            elif own.read_bytes() != content and not _same(Splits.read(own), Splits.read(path)):
                raise ArtifactError(f"{own} must be the splits of {path}, but they differ; remove that run's folder")


def _same(one: Splits, other: Splits) -> bool:
    """Whether splits are the same, wherever their photos lie."""
    return (one.hashes, one.classes, one.positive) == (other.hashes, other.classes, other.positive)


# ---------------------------------------------------------------------------------------------- training


def _train_all(out: Path, configs: Mapping[str, Config], seeds: Sequence[int]) -> list[str]:
    """Train what is not finished yet, all arms of a seed before the next one; give the exceptions to fairness."""
    failed: dict[str, str] = {}
    exceptions: list[str] = []
    total = len(configs) * len(seeds)
    for k, seed in enumerate(seeds):
        for j, name in enumerate(configs):
            run = out / name / f"seed{seed}"
            if name in failed:
                continue
            # A training that a killed comparison began goes on by itself, to its end.
            with locked(run / ".lock"):
                sweep(run)
            if _finished(run):
                say(f"{name}, seed {seed}: finished before")
                continue
            say(f"{name}, seed {seed}: training, run {k * len(configs) + j + 1} of {total}")
            problem = _train(run, out / name / "arm.json", seed, out / "logs" / f"{name}-seed{seed}.log")
            if problem:
                failed[name] = f"arm {name}, seed {seed}: {problem}"
                say(failed[name])
        starts = {name: Start.read(out / name / f"seed{seed}" / "start.json") for name in configs if name not in failed}
        exceptions += [one for one in check_fairness(starts, seed) if one not in exceptions]
    if failed:
        raise TrainingError(
            f"every arm must train, but {len(failed)} of {len(configs)} did not: {'; '.join(failed.values())}. The "
            "other runs are finished and kept; mend the arm and run the same command again, or leave it out"
        )
    return exceptions


def _finished(run: Path) -> bool:
    # Training removes them when it starts and writes val_calib.npz last.
    return all((run / name).is_file() for name in ("start.json", "val_select.npz", "val_calib.npz"))


def _train(run: Path, config: Path, seed: int, log: Path) -> str:
    """Train one run in a process of its own; give what went wrong, or nothing."""
    resume = (run / "config.json").is_file()
    command = [sys.executable, "-m", "stage1_pro.cli", "train", "--json", "--run", str(run)]
    command += ["--resume"] if resume else ["--config", str(config), "--set", f"seed={seed}"]
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            printed, _ = process.communicate()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    seconds = time.monotonic() - began
    try:
        result = json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError):
        result = {}
    if process.returncode != 0:
        why = result.get("error") or f"ended with exit code {process.returncode}"
        return f"{why} (see {log})"
    cost = Cost(seconds=None if resume else seconds, peak_memory=result["peak_memory"], device=result["device"])
    cost.write(run / "cost.json")
    return ""


def _check_bases(out: Path, configs: Mapping[str, Config], seeds: Sequence[int]) -> list[str]:
    """Refuse an arm whose backbone changed between its seeds; note one that may have seen rows it is judged on."""
    notes = []
    for name, config in configs.items():
        folder = Path(config.model.backbone).expanduser()
        if not folder.is_dir():
            continue  # a preset is drawn anew in every seed, a hub id is the hub's
        bases = {Start.read(out / name / f"seed{seed}" / "start.json").base_fingerprint for seed in seeds}
        if len(bases) > 1:
            raise ArtifactError(
                f"arm {name} must start from the same backbone in every seed, but the weights in {folder} changed "
                f"between them; remove {out / name} and train it anew"
            )
        if (folder.parent / "explora.json").is_file():
            notes.append(
                f"{name} starts from a backbone adapted beside other splits: rows of val_select or val_test may have "
                "been in its pool"
            )
    return notes


def check_fairness(starts: Mapping[str, Start], seed: int) -> list[str]:
    """Refuse arms of one seed that did not start alike; give the exceptions, where they cannot.

    Seeds, splits and row order must be the same in all. Heads must be where they have the same shapes, rows of the
    first batches where the batch size is the same, and their pixels where preprocessing and augmentation are too. What
    of the environments differs is an exception as well.

    Raises:
        ArtifactError: naming two arms and what differs.
    """
    exceptions: list[str] = []

    def same(
        what: str,
        value: Callable[[Start], Hashable],
        key: Callable[[Start], Hashable] = lambda _: None,
        unlike: str = "",
    ) -> None:
        first: dict[Hashable, str] = {}
        for name, start in starts.items():
            other = first.setdefault(key(start), name)
            if value(starts[other]) != value(start):
                raise ArtifactError(
                    f"arms must have the same {what}, but in seed {seed} those of {other} and {name} differ; "
                    "remove the folder of the one that was not trained by this comparison"
                )
        if len(first) > 1:
            exceptions.append(f"{unlike}: {' | '.join(first.values())}")

    same("seed", lambda s: s.seed)
    same("splits", lambda s: json.dumps(s.split_hashes, sort_keys=True))
    same("row order", lambda s: s.order)
    same("starting heads", lambda s: s.heads, lambda s: json.dumps(s.head_shapes, sort_keys=True),
         "heads of other shapes cannot be the same")  # fmt: skip
    same("rows in the first batches", lambda s: s.batch_rows, lambda s: s.batch_size,
         "other batch sizes have other batches")  # fmt: skip
    told = [{**start.versions, **start.environment} for start in starts.values() if start.environment]
    unlike = sorted({key for one in told for key in one if len({json.dumps(other.get(key)) for other in told}) > 1})
    if unlike:
        exceptions.append(f"trained in environments that differ in {', '.join(unlike)}")
    seeing = {name: start for name, start in starts.items() if start.batch_inputs is not None}
    blind = [name for name in starts if name not in seeing]
    if blind:
        exceptions.append(f"cached features, no augmented pixels: {', '.join(blind)}")
    starts = seeing
    same("pixels in the first batches", lambda s: s.batch_inputs,
         lambda s: (s.batch_size, s.preprocessing, s.augmentation),
         "other batch sizes, preprocessing or augmentation have other pixels")  # fmt: skip
    return exceptions


# ---------------------------------------------------------------------------------------------- measuring


def _measure(
    trained: _Trained,
    split_name: Literal["val_select", "val_test"],
    names: Sequence[str],
    read: Callable[[Path], Predictions],
    chosen: str | None = None,
) -> Comparison:
    """Compare arms, the baseline first, on the answers to one split that ``read`` gives of a run.

    Without an arm that was ``chosen`` before, the best of these is.
    """
    asked = trained.asked
    runs, seeds = {name: trained.runs[name] for name in names}, list(range(asked.seeds))
    rows: dict[str, list[SeedRows]] = {name: [] for name in names}
    for name, paths in runs.items():
        for run in paths:
            got = read(run)
            if got.split != split_name or got.split_hash != Splits.read(run / "splits.json").hashes[split_name]:
                raise ArtifactError(
                    f"{run} must hold answers on its own {split_name}, got others; remove that run's folder"
                )
            gate = got.gate_logits.astype(np.float64)
            rows[name].append(SeedRows(softmax(got.logits_a), gate, got.labels, got.groups))
    compared = compare_seeds(rows, n_replicates=asked.n_replicates, level=asked.level)
    sign = -1 if METRICS[asked.metric].better == "higher" else 1
    best = min(compared, key=lambda name: sign * compared[name].means[asked.metric].value)
    baseline = names[0]
    arms = [_arm(name, runs[name], rows[name], found, trained.plan) for name, found in compared.items()]
    differences = [
        _difference(name, baseline, metric_name, one, found.seed_differences[metric_name])
        for name, found in compared.items()
        for metric_name, one in found.differences.items()
    ]
    groups = {group for one in rows[baseline] for group in one.groups.tolist()}
    return Comparison(
        split=split_name, baseline=baseline, metric=asked.metric, chosen=chosen or best, seeds=seeds, plan=trained.plan,
        n_groups=len(groups), n_replicates=asked.n_replicates, level=asked.level, arms=arms, differences=differences,
        exceptions=trained.exceptions, chosen_from=trained.chosen_from,
    )  # fmt: skip


def _arm(
    name: str, paths: Sequence[Path], rows: Sequence[SeedRows], found: ArmIntervals, plan: ComparisonPlan
) -> ArmFigures:
    start = Start.read(paths[0] / "start.json")
    costs = [Cost.read(run / "cost.json") for run in paths if (run / "cost.json").is_file()]
    timed = [cost.seconds for cost in costs if cost.seconds is not None]
    figures = []
    limits = {"min_coverage": plan.min_coverage, "max_exit_error": plan.max_exit_error}
    for seed, one in enumerate(rows):
        reached = reach(one.gate, one.probs.argmax(1) != one.labels, **limits)
        metrics = {metric: float(values[seed]) for metric, values in found.values.items()}
        figures.append(
            SeedFigures(
                seed=seed, n=len(one.labels), n_groups=len(set(one.groups.tolist())), feasible=reached.feasible,
                exit_error=known(reached.exit_error), coverage=reached.coverage, **metrics,
            )
        )  # fmt: skip
    errors = [one.exit_error for one in figures if one.exit_error is not None]
    return ArmFigures(
        name=name,
        mode=RunConfig.read(paths[0] / "config.json").config.train.mode,
        n_trainable=start.n_trainable,
        n_parameters=start.n_parameters,
        trainable_share=start.n_trainable / start.n_parameters,
        metrics=[Metric.of(metric, one) for metric, one in found.means.items()],
        sds={metric: _sd(values) for metric, values in found.values.items()},
        feasible_share=float(np.mean([one.feasible for one in figures])),
        exit_error=float(np.mean(errors)) if len(errors) == len(figures) else None,
        coverage=float(np.mean([one.coverage for one in figures])),
        seconds=float(np.mean(timed)) if timed else None,
        n_timed=len(timed),
        peak_memory=max((cost.peak_memory for cost in costs), default=None),
        seeds=figures,
    )


def _difference(arm: str, baseline: str, metric: str, one: Interval, values: Any) -> ArmDifference:
    better = values > 0 if METRICS[metric].better == "higher" else values < 0
    return ArmDifference.of(
        metric, one, arm=arm, baseline=baseline, sd=_sd(values), n_better=int(better.sum()), n_seeds=len(values)
    )


def _axis(metric: str) -> str:
    """A metric's name on an axis, with the good direction; AUGRC by itself is that of max softmax."""
    spec = METRICS["softmax_augrc" if metric == "augrc" else metric]
    name = spec.title if spec.title[1].isupper() else spec.title.lower()
    return f"{name} ({spec.better} is better)"


def _sd(values: Any) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


# ---------------------------------------------------------------------------------------------- tables and pictures


def rows_of(found: Comparison) -> list[dict[str, str]]:
    """The table of a comparison as text, an arm an entry; intervals stand on a second line."""
    table = []
    for arm in found.arms:
        metrics = {one.metric: one for one in arm.metrics}
        against = {one.metric: one for one in found.differences if one.arm == arm.name}
        row = {"arm": arm.name + (" *" if arm.name == found.chosen else "")}
        for name in ARM_METRICS:
            digits = METRICS[name].digits
            row[name] = _with_ends(metrics[name], arm.sds[name], digits)
            if len(found.arms) > 1:
                one = against.get(name)
                row[f"{name} - {found.baseline}"] = "" if one is None else _with_ends(one, one.sd, digits, sign="+")
        row |= {
            "gate: both constraints": f"{round(arm.feasible_share * len(arm.seeds))} of {len(arm.seeds)} seeds",
            f"exit error at coverage {found.plan.min_coverage:g}": _text(arm.exit_error, ".3f"),
            f"coverage at exit error {found.plan.max_exit_error:g}": _text(arm.coverage, ".3f"),
            "trained": f"{arm.n_trainable / 1e6:.3g} M ({100 * arm.trainable_share:.3g}%)",
            "seconds": _text(arm.seconds, ".0f"),
            "peak memory": "-" if arm.peak_memory is None else f"{arm.peak_memory / 2**20:.0f} MiB",
        }
        table.append(row)
    return table


def markdown(found: Comparison) -> str:
    """The comparison as a Markdown table, an arm a column, with what it says and does not say below."""
    table = rows_of(found)
    first, *names = list(table[0])
    lines = [f"| | {' | '.join(row[first] for row in table)} |", f"|---|{'---|' * len(table)}"]
    lines += [f"| {name} | {' | '.join(row[name] for row in table)} |".replace("\n", " ") for name in names]
    return "\n".join([*lines, "", *(f"- {line}" for line in _remarks(found))]) + "\n"


def render(found: Comparison, tested: Comparison | None) -> str:
    """Show a comparison as text: arms, differences, the choice, and ``val_test`` when it was read."""
    sheet = Sheet(120)
    for one in filter(None, (found, tested)):
        rows = rows_of(one)
        table = grid(("", *(row["arm"] for row in rows)), left=("",), no_wrap=(), title=f"Stage A on {one.split}")
        for name in list(rows[0])[1:]:
            table.add_row(name, *(row[name] for row in rows))
        sheet.add(table, *_remarks(one))
    return sheet.text()


def _remarks(found: Comparison) -> list[str]:
    seeds = len(found.seeds)
    spread = "; how much another seed changes a model is not known from one"
    if seeds > 1:
        spread = ", and ± the standard deviation over seeds, which no interval contains"
    what = (
        f"{found.split}, {seeds} seed{'s' if seeds > 1 else ''}: means over seeds, {100 * found.level:g}% intervals by "
        f"group ({found.n_groups} groups, each with one weight in all seeds and arms) for models like these{spread}."
    )
    lines = [what]
    chosen = f"* chosen by {found.metric} on val_select"
    if found.split == "val_select":
        lines.append(f"{chosen}, which also chose each arm's epoch, so figures lean to the good.")
    else:
        lines.append(f"{chosen} before val_test was read.")
    if found.looks:
        lines.append(f"val_test had been read before, for: {', '.join(found.looks)}; this is no first look.")
    lines += [f"Not the same in all arms: {one}." for one in found.exceptions]
    untimed = [f"{arm.name} ({arm.n_timed} of {seeds})" for arm in found.arms if arm.n_timed < seeds]
    if untimed:
        lines.append(f"Seconds are of the runs that were not resumed: {', '.join(untimed)}.")
    measured: list[Metric] = [*found.differences, *(one for arm in found.arms for one in arm.metrics)]
    return lines + [f"{note}." for note in dict.fromkeys(one.note for one in measured) if note]


def _with_ends(one: Metric, sd: float | None, digits: int, *, sign: str = "") -> str:
    style = f"{sign}.{digits}f"
    ends = "no interval" if one.low is None or one.high is None else f"[{one.low:{style}}, {one.high:{style}}]"
    return f"{_text(one.value, style)}{'' if sd is None else f' ± {sd:.{digits}f}'}\n{ends}"


def _text(value: float | None, style: str) -> str:
    return "-" if value is None else f"{value:{style}}"


def _write_tables(out: Path, found: Comparison) -> None:
    """``compare.csv`` (a row an arm and seed), ``compare.md`` and the figures."""
    rows: list[dict[str, object]] = []
    for arm in found.arms:
        fixed = arm.model_dump(include={"mode", "n_trainable", "n_parameters"})
        for one in arm.seeds:
            path = out / arm.name / f"seed{one.seed}" / "cost.json"
            cost = Cost.read(path).model_dump() if path.is_file() else {}
            rows.append({"arm": arm.name, **fixed, **one.model_dump(), **cost})
    columns = ["arm", "mode", *SeedFigures.model_fields, "n_trainable", "n_parameters", *Cost.model_fields]
    write_csv(out / "compare.csv", rows, columns)
    write_text(out / "compare.md", markdown(found))
    panels: dict[str, list[tuple[str, float, float, float]]] = {_axis(name): [] for name in ARM_METRICS}
    for difference in found.differences:
        panels[_axis(difference.metric)].append((difference.arm, *_numbers(difference)))
    png = differences_png(panels, baseline=found.baseline, level=found.level)
    write_bytes(out / "figures" / "differences.png", png)
    for metric in ("accuracy", "augrc"):
        shares, times = [], []
        for arm in found.arms:
            ends = _numbers(next(one for one in arm.metrics if one.metric == metric))
            shares.append((arm.name, 100 * arm.trainable_share, *ends))
            if arm.seconds is not None:
                times.append((arm.name, arm.seconds, *ends))
        png = tradeoff_png(shares, x="parameters trained, % of all", y=_axis(metric), log=True)
        write_bytes(out / "figures" / f"{metric}_trained.png", png)
        if times:
            png = tradeoff_png(times, x="seconds a run", y=_axis(metric))
            write_bytes(out / "figures" / f"{metric}_seconds.png", png)


def _numbers(one: Metric) -> tuple[float, float, float]:
    value, low, high = (math.nan if end is None else end for end in (one.value, one.low, one.high))
    return value, low, high
