"""Station ``split``: labelled images to a run folder with ``splits.json`` and ``quarantine.csv``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from stage1_pro.data.images import write_quarantine
from stage1_pro.data.splits import QuarantineError, Splits, make_splits
from stage1_pro.errors import InputError
from stage1_pro.progress import say
from stage1_pro.training.run import exclusive, forget_training


def split(
    labels: Path | str,
    out: Path | str,
    *,
    images: Path | str | None = None,
    positive: str | None = None,
    classes: Sequence[str] | None = None,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
    folds: int | None = None,
    fold: int | None = None,
    max_component: float = 0.05,
    max_quarantine: float = 0.02,
    overwrite: bool = False,
) -> Splits:
    """Cut labelled images into splits that cannot leak; see ``data.splits.make_splits`` for the arguments.

    Writes ``splits.json`` and ``quarantine.csv`` (also when too many files are broken) into ``out``.

    Raises:
        InputError: wrong labels, too many broken files, a class that cannot be in every split, or a run that
            has been trained on its splits already and ``overwrite`` is not set.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out must be a folder, got the file {out}")
    trained = next((name for name in ("model_best.pth", "last.pth", "config.json") if (out / name).exists()), None)
    if trained and not overwrite:
        raise InputError(
            f"--out must be a run that has not been trained, got {out} with {trained}; "
            "name another folder, or replace its splits with --overwrite and train again"
        )
    try:
        splits, quarantined = make_splits(
            labels,
            images=images,
            positive=positive,
            classes=classes,
            fractions=fractions,
            seed=seed,
            folds=folds,
            fold=fold,
            max_component=max_component,
            max_quarantine=max_quarantine,
        )
    except QuarantineError as error:
        write_quarantine(out / "quarantine.csv", error.quarantined)
        raise InputError(f"{error}; the whole list is in {out / 'quarantine.csv'}") from None
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        # What was trained on other splits must not be taken for this split's: some of its rows may be tests now.
        forget_training(out)
        write_quarantine(out / "quarantine.csv", quarantined)
        splits.write(out / "splits.json")
    say(f"wrote {out / 'splits.json'} and {out / 'quarantine.csv'}")
    return splits
