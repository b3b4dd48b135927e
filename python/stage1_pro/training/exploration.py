"""Command ``explora``: a run's backbone adapted to unlabelled images, and kept only where that made it better."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stage1_pro.classes import index_of
from stage1_pro.config import Config
from stage1_pro.data.images import PreprocessSpec, write_quarantine
from stage1_pro.data.photos import ImageFile
from stage1_pro.data.pool import read_pool
from stage1_pro.data.splits import Splits
from stage1_pro.errors import InputError
from stage1_pro.files import atomic_directory, sha256_file
from stage1_pro.progress import say
from stage1_pro.training.run import (
    EXPLORA,
    ExploraRecord,
    PoolInfo,
    check_run,
    exclusive,
    set_aside,
    versions,
    write_config,
)

Probed = dict[str, NDArray[np.float64]]
OWN_FILES = ("explora.json", "config.json", "last.pth", "metrics.csv", "reconstructions.png", "quarantine.csv")


def explora(
    images: Path | str,
    run: Path | str,
    config: Config | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    base: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> ExploraRecord:
    """Adapt a backbone to unlabelled images without labels, judge it on ``train`` rows, and keep the better one.

    Learns and judges from no row of the run but those of ``train``; the other splits' images are looked at only to
    leave them and their near-duplicates out of the pool.
    Writes ``RUN/explora/``: ``explora.json``, ``backbone/`` (a transformers folder, the base's weights when adaptation
    did not help), ``metrics.csv``, ``reconstructions.png``, ``quarantine.csv``, ``config.json`` and ``last.pth``.

    Args:
        images: the pool: a folder or tar, or a CSV with ``file[,group]``.
        run: folder with ``splits.json``; its ``train`` rows are what the judgement is made on.
        config: the configuration; sections ``model``, ``explora``, ``seed`` and, of ``train``, workers and precision.
        columns: what the CSV calls its columns, where that is not so.
        base: preset, folder or hub id to adapt instead of ``config.model.backbone``.
        resume: go on from ``last.pth``; the result is that of a run never interrupted.
        overwrite: forget an earlier adaptation.

    Raises:
        InputError: a pool without images, a trainable share outside 0.1% to 10%, or an earlier adaptation in the way.
        ArtifactError: files of another adaptation, or splits that changed.
        TrainingError: the loss is not finite, or memory does not suffice.
    """
    run = Path(run)
    if base is not None:
        config = config or Config()
        config = config.model_copy(update={"model": config.model.model_copy(update={"backbone": base})})
    splits, config = check_run(run, config, resume=resume, overwrite=overwrite, adapts=True)
    folder = run / EXPLORA
    if not resume and Path(config.model.backbone).expanduser().resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"--base must be outside {folder}, which is written anew, got {config.model.backbone}; copy it first"
        )
    folder.mkdir(exist_ok=True)
    with exclusive(folder):
        # What a killed --overwrite had moved is back only now.
        check_run(run, config, resume=resume, overwrite=overwrite, adapts=True)
        if resume and (folder / "explora.json").is_file():
            say(f"{folder}/explora.json is finished; {images} was not read, and nothing was done")
            return ExploraRecord.read(folder / "explora.json")
        return _explore(images, folder, splits, config, columns=columns, resume=resume)


def _explore(
    images: Path | str, folder: Path, splits: Splits, config: Config, *, columns: Mapping[str, str] | None, resume: bool
) -> ExploraRecord:
    from stage1_pro.models.backbone import load_backbone, save_backbone
    from stage1_pro.models.model import input_spec
    from stage1_pro.training.environment import check_environment, describe_environment
    from stage1_pro.training.explora import Explorer
    from stage1_pro.training.probes import judge, probe, verdict

    check_environment()
    model, options = config.model, config.explora

    def load() -> Any:
        return load_backbone(model.backbone, model.image_size, pos_embed_rescale=None, seed=config.seed).eval()

    backbone = load()
    if options.objective == "latent" and options.train == "full":
        raise InputError(
            "explora.objective latent must have a pretrained start to predict features of, got explora.train=full; "
            "use mae"
        )
    spec = input_spec(model, backbone)
    info, start = backbone.info(model.backbone), backbone.fingerprint()
    pool = read_pool(images, [row for row in splits.rows if row.split != "train"], splits.photos(), columns)
    rows = splits.of("train")
    labels, groups = splits.indices(rows), [row.group for row in rows]

    def probed(one: Any, what: str) -> Probed:
        features = _features(one, splits.photos_of(rows), spec, config, f"train rows, {what}")
        return probe(features, labels, groups, len(splits.classes), seed=config.seed)

    before = probed(backbone, "base")
    say(
        f"pool of {len(pool.photos)} images; left out: {pool.n_left_out} of val_select, val_calib or val_test, "
        f"{pool.n_copies} copies, {len(pool.quarantined)} unreadable"
    )

    # What this adaptation is of; a last.pth with another text is refused.
    learned = options.model_dump(mode="json", exclude={"save_every_steps", "keep"})
    facts = {"base": start, "pool": pool.fingerprint, "preprocessing": spec.fingerprint()}
    identity = json.dumps({**facts, "seed": config.seed, "explora": learned})
    with contextlib.closing(Explorer(folder, backbone, pool.photos, spec, config, identity)) as explorer:
        # All that learns is built: no configuration is refused any more.
        if not resume:
            set_aside(folder, (*OWN_FILES, "backbone"))
        write_config(folder, config, splits)
        write_quarantine(folder / "quarantine.csv", pool.quarantined)
        adapted = explorer.run()
    environment = describe_environment(explorer.device)
    whole, history = explorer.trainable, explorer.at.history
    n_trained, n_held_out = len(explorer.trained_on), len(explorer.held_out)
    del explorer  # its decoder, teacher and moments would stay on the device beside the probe
    try:
        after = probed(adapted, "adapted")
        positive = index_of(splits.classes, splits.positive)
        figures = judge(before, after, labels, groups, positive=positive, seed=config.seed)
        better, reason = verdict(figures)
    except InputError as error:
        figures, better, reason = [], False, str(error)
    kept = better or options.keep == "adapted"
    if kept and not better:
        reason = f"kept because explora.keep=adapted asks for it, although {reason}"
    chosen = adapted if kept else load()
    how = f"{options.objective}{', every weight' if options.train == 'full' else ', ExPLoRA'}"
    with atomic_directory(folder / "backbone") as staging:
        written = info.model_copy(update={"source": f"{info.source} + {how}"}) if kept else info
        save_backbone(staging, chosen, written, spec)
    used = PoolInfo(
        contents_sha256=pool.fingerprint, n_trained=n_trained, n_held_out=n_held_out,
        n_quarantined=len(pool.quarantined), n_copies=pool.n_copies, n_left_out=pool.n_left_out,
        n_not_compared=pool.n_not_compared,
    )  # fmt: skip
    held_out = [row["held_out_loss"] for row in history]
    record = ExploraRecord(
        kept="adapted" if kept else "base", better=better, reason=reason,
        objective=options.objective, train=options.train,
        blocks=options.blocks if options.train == "explora" else chosen.n_blocks,
        rank=whole.rank, n_parameters=whole.n_parameters, n_trained=whole.n_trained, share=whole.share,
        steps=history[-1]["step"], loss=[row["loss"] for row in history],
        held_out_loss=[None if np.isnan(loss) else loss for loss in held_out],
        figures=figures, n_rows=len(rows), n_groups=len(set(groups)), pool=used,
        base=info, base_fingerprint=start, backbone_fingerprint=chosen.fingerprint(),
        weights_sha256=sha256_file(folder / "backbone" / "model.safetensors"),
        preprocessing=spec, split_hashes=splits.hashes, seed=config.seed, versions=versions(),
        environment=environment,
    )  # fmt: skip
    record.write(folder / "explora.json")
    say(f"kept the {'adapted backbone' if kept else 'base'}: {reason}")
    return record


def render(record: ExploraRecord, run: Path | str) -> str:
    """Lines for people: what was trained, both probes before and after, and what was kept."""
    plain = " (plain self-supervised training of every weight)" if record.train == "full" else ""
    summary = (
        f"{record.objective} on {record.pool.n_trained} images, {record.share:.2%} of the encoder trained{plain}; "
        f"loss {record.loss[0]:.4f} -> {record.loss[-1]:.4f}"
    )
    lines = [summary, f"{'held-out groups of train rows':<32}{'base':>8}{'adapted':>9}   difference [95%]"]
    for one in record.figures:
        cells = "".join(f"{'n/a' if x is None else format(x, '.4f'):>9}" for x in (one.before, one.after))
        low, high = (("n/a" if x is None else f"{x:+.4f}") for x in (one.low, one.high))
        change = "n/a" if one.difference is None else f"{one.difference:+.4f}"
        lines.append(f"{one.probe + ' ' + one.metric:<31}{cells}   {change} [{low}, {high}]")
    lines += [
        f"kept: {record.kept}; {record.reason}",
        f"wrote {Path(run) / EXPLORA}/backbone; next: stage1 train --run {run} --explora",
    ]
    return "\n".join(lines)


def _features(
    backbone: Any, photos: Sequence[ImageFile], spec: PreprocessSpec, config: Config, what: str
) -> NDArray[np.float32]:
    """What a Stage A at the last block reads of every image [N, 2D]."""
    from stage1_pro.training.inference import pick_device, run_over

    device = pick_device()
    backbone = backbone.to(device)
    found = run_over(
        lambda pixels: {"features": backbone.pool(backbone(pixels))}, photos, spec, device=device,
        workers=config.train.workers, description=what,
    )["features"]  # fmt: skip
    backbone.cpu()
    return found
