"""Photos without labels that certify how often Stage A answers otherwise than Stage B."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stage1_pro.data.duplicates import cluster_copies
from stage1_pro.data.pool import Pool, read_pool
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.softmax import softmax
from stage1_pro.progress import say
from stage1_pro.words import HALVES


@dataclass(frozen=True)
class Unlabelled:
    """Both stages' answers to photos that nothing was learned from.

    ``order`` says which rows fixed the order of thresholds, for the certificate.
    """

    rows: Rows
    fingerprint: str
    hashes: list[str]
    groups: list[str]
    order: str


@dataclass(frozen=True)
class Scored:
    """Photos of no split, of which none shows one of the run's, with both stages' answers to them."""

    pool: Pool
    groups: list[str]  # as the table names them, else the first photo of those that look alike
    grouped: bool  # by a table
    logits: dict[str, NDArray[np.float32]]  # as in ``Predictions``


def score_photos(
    run: Path,
    images: Path,
    splits: Splits,
    order: Predictions | None,
    *,
    columns: Mapping[str, str] | None,
    rows_independent: bool,
    said: str = "--unlabelled",
) -> Scored:
    """Let a run's model look at photos without labels.

    Left out are photos that show one of the run's, its training rows among them: what a model learned it answers more
    alike. Where there is no table with groups, photos that show the same picture are one group.

    Args:
        run: trained run folder.
        images: folder, tar, address, or a CSV with ``file[,group]``.
        splits: of the run.
        order: predictions of ``val_select``.
        columns: what the CSV calls its columns.
        rows_independent: the caller states that photos are independent of each other where no table groups them.
        said: what messages call the photos.

    Raises:
        InputError: no such photos, or nothing says which of them are independent.
        ArtifactError: the run has no predictions of ``val_select``.
    """
    from stage1_pro.training.checkpoint import load_run_model
    from stage1_pro.training.inference import named_logits, pick_device, run_over

    if order is None:
        raise ArtifactError(
            f"{run / 'val_select.npz'} must fix the order of thresholds where photos have no labels, but it may not or "
            "is not there; train into a new run"
        )
    pool = read_pool(images, splits.rows, splits.photos(), columns, said=said)
    grouped = all(pool.groups)
    if grouped == rows_independent:
        raise InputError(
            f"{said} must be a table with a column 'group', or --rows-independent must state that each photo is "
            f"one of its own, got {'both' if grouped else 'neither'}; photos of one clip are near-copies"
        )
    source = pool.photos[0].photos
    groups = pool.groups if grouped else cluster_copies(source, [photo.key for photo in pool.photos])
    model, config = load_run_model(run)
    if model.fingerprint() != order.model_fingerprint:
        raise ArtifactError(f"{run / 'val_select.npz'} must be of the model in {run}, got another's; train again")
    device, spec = pick_device(), model.architecture.preprocessing
    model = model.to(device).eval()
    seen = run_over(
        lambda pixels: named_logits(model(pixels)), pool.photos, spec, device=device,
        workers=config.config.train.workers, description=said.lstrip("-"),
    )  # fmt: skip
    say(
        f"{len(pool.photos)} photos without labels in {len(set(groups))} groups; left out: {pool.n_left_out} that show "
        f"photos of the run, {pool.n_copies} copies, {len(pool.quarantined)} unreadable"
    )
    return Scored(pool, list(groups), grouped, seen)


def beside_order(
    order: Predictions, logits: Mapping[str, NDArray[np.float32]], labels: NDArray[np.int64], groups: Sequence[str]
) -> Rows:
    """Rows of ``val_select``, which are the fit half, and photos of no split with their groups, which certify.

    Args:
        order: predictions of ``val_select``.
        logits: of the photos [N, K] and [N], as ``Predictions`` has them.
        labels: what stands where their labels would [N].
        groups: of the photos [N].
    """

    def joined(name: str) -> NDArray[np.float32]:
        return np.concatenate([getattr(order, name), logits[name]])

    rows = Rows.of(
        softmax(joined("logits_a")), np.concatenate([order.labels, labels]),
        classes=order.classes, positive=order.positive, gate=joined("gate_logits"), probs_b=softmax(joined("logits_b")),
        groups=[*(f"val_select {name}" for name in order.groups), *(f"unlabelled {name}" for name in groups)],
        halves=np.repeat(HALVES, [order.labels.size, len(groups)]), told_apart=True,
    )  # fmt: skip
    return replace(rows, halved=False, unlabelled=True)


def order_told(n_order: int, n: int) -> str:
    """Which rows fixed the order of thresholds for so many photos of no split, as an assumption of a certificate."""
    return (
        f"the order of thresholds comes from the {n_order} photos of val_select, which none of the "
        f"{n} photos without labels shows"
    )


def read_unlabelled(
    run: Path,
    images: Path,
    splits: Splits,
    order: Predictions | None,
    *,
    columns: Mapping[str, str] | None,
    rows_independent: bool,
) -> Unlabelled:
    """Let photos without labels certify, as ``score_photos`` gives them; rows of ``order`` are the fit half.

    Stage B's answer stands where a label would. Arguments and errors as of ``score_photos``.
    """
    found = score_photos(run, images, splits, order, columns=columns, rows_independent=rows_independent)
    assert order is not None
    rows = beside_order(order, found.logits, found.logits["logits_b"].argmax(axis=1), found.groups)
    pool = found.pool
    return Unlabelled(
        rows, pool.fingerprint, pool.hashes, found.groups, order_told(order.labels.size, len(pool.photos))
    )
