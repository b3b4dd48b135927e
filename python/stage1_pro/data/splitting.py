"""``stage1 split``: labelled images to a run folder with ``splits.json`` and ``quarantine.csv``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stage1_pro.data.images import write_quarantine
from stage1_pro.data.splits import QuarantineError, Splits, make_splits
from stage1_pro.errors import InputError
from stage1_pro.progress import say
from stage1_pro.training.run import exclusive, forget_training

if TYPE_CHECKING:
    from stage1_pro.commands.split import Split


def split(asked: Split) -> Splits:
    """Cut labelled images into splits that cannot leak; ``splits.json`` and ``quarantine.csv`` are written.

    The latter also when too many files are broken.

    Raises:
        InputError: wrong labels, too many broken files, a class that cannot be in every split, or a run that
            has been trained on its splits already and ``overwrite`` is not set.
    """
    out = asked.out
    if out.exists() and not out.is_dir():
        raise InputError(f"--out must be a folder, got the file {out}")
    trained = next((name for name in ("model_best.pth", "last.pth", "config.json") if (out / name).exists()), None)
    if trained and not asked.overwrite:
        raise InputError(
            f"--out must be a run that has not been trained, got {out} with {trained}; "
            "name another folder, or replace its splits with --overwrite and train again"
        )
    try:
        splits, quarantined = make_splits(**asked.model_dump(exclude={"out", "overwrite"}))
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
