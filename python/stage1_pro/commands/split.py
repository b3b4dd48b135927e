"""``stage1 split``."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from stage1_pro.command import Columns, Command, Part, Place, Result, Words, keywords, option, table_columns
from stage1_pro.errors import InputError, Stage1Error
from stage1_pro.progress import say

if TYPE_CHECKING:
    from stage1_pro.data.photos import Found
    from stage1_pro.data.splits import Given, Splits


def _shares(value: Any) -> Any:
    """Shares of splits from ``train=.6,val_select=.1,...``."""
    if not isinstance(value, str):
        return value
    try:
        return {key.strip(): float(share) for key, _, share in (part.partition("=") for part in value.split(","))}
    except ValueError:
        raise ValueError(f"must be like train=.6,val_select=.1,val_calib=.15,val_test=.15, got '{value}'") from None


Fractions = Annotated[dict[str, float], BeforeValidator(_shares)]


class Split(Command, topic="photos"):
    """Cut labelled images into train, val_select, val_calib and val_test.

    Rows of one group, and near-duplicates across groups, stay together, so that the splits cannot leak. Of a run that
    was trained on the same splits, photos may have moved: it is told where they lie now, and stays as it is.
    """

    labels: Place = option(
        ...,
        "CSV with file,label[,label_name,group,source,split], or a folder or tar with one sub-folder per class, also "
        "below train, val and test",
    )
    columns: Columns | None = table_columns()
    images: Place | None = option(None, "folder or tar that `file` is relative to; the CSV's own folder by default")
    out: Path = option(..., "run folder to write")
    positive: str | None = option(
        None,
        "name of the positive class; two classes of which one has a negative name (none, no, 0, …) need no flag, more "
        "than two need none at all",
    )
    classes: Words | None = option(None, "comma-separated class names that are allowed; all found by default")
    fractions: Fractions | None = option(
        None, "share of rows per split; train=.6,val_select=.1,val_calib=.15,val_test=.15 by default"
    )
    seed: int = option(0, "another seed, other splits")
    folds: int | None = option(None, "cut into K folds by group; val_test is one of them")
    fold: int | None = option(None, "which of the K folds (0..K-1) is val_test")
    max_component: Part = option(0.05, "largest share of rows that near-duplicates may join across groups")
    max_quarantine: Part = option(0.02, "largest share of unreadable images")
    overwrite: bool = option(False, "replace the splits of a run that has been trained, which goes to OUT/.before")

    def execute(self) -> Result:
        """Print rows and groups of every split by class."""
        from stage1_pro.policies.standing import in_reach

        splits, beside = self.cut()
        width = max(8, *map(len, splits.classes)) + 2
        lines = [f"{'split':<12}{'groups':>8}" + "".join(f"{name:>{width}}" for name in splits.classes)]
        for name, counts in splits.counts.items():
            cells = "".join(f"{counts[label]:>{width}}" for label in splits.classes)
            lines.append(f"{name:<12}{splits.groups[name]:>8}{cells}")
        merging = splits.merging
        lines.append(
            f"positive class: {splits.positive or 'none'}; {merging.pairs} near-duplicate pairs across groups, largest "
            f"joined component {merging.largest_rows} rows ({100 * merging.largest_share:.1f}%); "
            f"{splits.quarantined} images in quarantine"
        )
        if splits.given is not None:
            lines.append(_told(splits.given))
        lines += [in_reach(splits), f"next: stage1 train --run {self.out}"]
        record = {**splits.model_dump(mode="json", exclude={"rows"}), "run": str(self.out)}
        record["passed_over"] = beside.record()
        return Result("\n".join(lines), record)

    def cut(self) -> tuple[Splits, Found]:
        """Write ``splits.json`` and ``quarantine.csv``; where too many files are broken, the latter in a new run alone.

        Gives the splits, and what lies in the labels' folder and is in neither.
        """
        from stage1_pro.data.images import write_quarantine
        from stage1_pro.data.labels import left_out
        from stage1_pro.data.splits import QuarantineError, Splits, make_splits
        from stage1_pro.policies.standing import few_groups
        from stage1_pro.training.run import exclusive, forget_training

        out = self.out
        if out.exists() and not out.is_dir():
            raise InputError(f"--out must be a folder, got the file {out}")
        trained = next((name for name in ("model_best.pth", "last.pth", "config.json") if (out / name).exists()), None)
        try:
            splits, quarantined = make_splits(**self.model_dump(exclude={"out", "overwrite"}))
        except QuarantineError as error:
            if (out / "splits.json").exists():  # a refusal leaves what belongs to them as it is
                raise InputError(f"{error}; the whole list is written where --out has no splits yet") from None
            write_quarantine(out / "quarantine.csv", error.quarantined)
            raise InputError(f"{error}; the whole list is in {out / 'quarantine.csv'}") from None
        moved = None
        if trained:
            with contextlib.suppress(Stage1Error):  # damaged splits are none that anything can be kept of
                moved = _moved(Splits.read(out / "splits.json").verify(), splits)
        if trained and moved is None and not self.overwrite:
            raise InputError(
                f"--out must be a run of these very splits or one that has not been trained, got {out} with "
                f"{trained}; name another folder, or replace its splits with --overwrite and train again"
            )
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out):
            if moved is not None:
                splits = moved
                say(f"the splits are those that {out} was trained on, so all of it is kept")
            else:
                # What was trained on other splits must not be taken for these: some of its rows may be tests now.
                forget_training(out)
            write_quarantine(out / "quarantine.csv", quarantined)
            splits.write(out / "splits.json")
        say(f"wrote {out / 'splits.json'} and {out / 'quarantine.csv'}")
        if warning := few_groups(splits):
            say(warning)
        known = {row.file for row in splits.rows} | {one.file for one in quarantined}
        beside = left_out(self.labels, self.images, known)
        if beside.passed:
            say(beside.words())
        return splits, beside


def _told(given: Given) -> str:
    became = ", ".join(f"{name} became {' and '.join(parts)}" for name, parts in given.became.items())
    n = given.shared_groups + given.near_copies
    return (
        f"given splits: {became}; {n} images in quarantine as they would leak ({given.shared_groups} by their group, "
        f"{given.near_copies} as near-copies)"
    )


def _moved(old: Splits, new: Splits) -> Splits | None:
    """The old splits with the photos where they lie now; None where these are other splits."""
    if (old.hashes, old.classes, old.positive) != (new.hashes, new.classes, new.positive):
        return None
    files: dict[str, list[str]] = defaultdict(list)
    for row in reversed(new.rows):
        files[row.sha256].append(row.file)
    rows = [row.model_copy(update={"file": files[row.sha256].pop()}) for row in old.rows]
    return old.model_copy(update={"root": new.root, "rows": rows})


@keywords(Split)
def split(labels: Path | str, out: Path | str, **options: Any) -> Splits:
    """Cut labelled images into splits that cannot leak; writes ``splits.json`` and ``quarantine.csv`` into ``out``.

    Raises:
        InputError: wrong labels, too many broken files, a class that cannot be in every split, or a run that has been
            trained on its splits already and ``overwrite`` is not set.
    """
    return Split.of(labels=labels, out=out, **options).cut()[0]
