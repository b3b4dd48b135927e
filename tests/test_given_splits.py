"""Splits that are given stay what they are, and nothing leaks from one into a better protected one."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stage1_pro.cli import main
from stage1_pro.data.splits import Splits, make_splits, resplit
from stage1_pro.errors import InputError

LEVEL = {"train": 0, "val_select": 1, "valid": 2, "val": 2, "val_calib": 2, "test": 3, "val_test": 3}


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((40, 40), Image.Resampling.BICUBIC)


def put(path: Path, seed: int, *, quality: int | None = None) -> Path:
    """A picture of a seed; with a quality a near-copy of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture(seed)
    image.save(path, **({} if quality is None else {"quality": quality}))
    return path


def tree(root: Path, sizes: dict[str, int], classes: tuple[str, ...] = ("none", "work")) -> Path:
    seed = 0
    for split, count in sizes.items():
        for name in classes:
            for number in range(count):
                put(root / split / name / f"{number}.png", seed)
                seed += 1
    return root


@pytest.mark.parametrize(
    ("sizes", "became"),
    [
        ({"train": 12, "val": 8, "test": 4},
         {"train": ["train"], "val": ["val_select", "val_calib"], "test": ["val_test"]}),
        ({"Train": 12, "valid": 8}, {"train": ["train", "val_test"], "val": ["val_select", "val_calib"]}),
        ({"train": 20, "testing": 4}, {"train": ["train", "val_select", "val_calib"], "test": ["val_test"]}),
        ({"training": 24}, {"train": ["train", "val_select", "val_calib", "val_test"]}),
        ({"train": 16, "val_select": 4, "test": 4},
         {"train": ["train", "val_calib"], "val_select": ["val_select"], "test": ["val_test"]}),
        ({"train": 16, "val_select": 3, "validation": 6},
         {"train": ["train", "val_test"], "val_select": ["val_select"], "val": ["val_calib"]}),
    ],
)  # fmt: skip
def test_folders_of_splits_are_understood(tmp_path, capsys, sizes, became):
    root = tree(tmp_path / "set", sizes)
    splits, quarantined = make_splits(root)
    assert "as given splits" in capsys.readouterr().err
    assert splits.classes == ["none", "work"] and not quarantined and len(splits.rows) == 2 * sum(sizes.values())
    assert splits.given is not None and splits.given.became == became
    names = {"Train": "train", "training": "train", "valid": "val", "validation": "val", "testing": "test"}
    for row in splits.rows:
        top = row.file.split("/")[0]
        assert row.split in became[names.get(top, top)] and row.label == row.file.split("/")[1]
    assert Splits.parse(splits.model_dump_json(), "x").verify() == splits
    # The same as a column, in any order.
    rows = [{"file": row.file, "label": row.label, "split": row.file.split("/")[0]} for row in splits.rows]
    random.Random(1).shuffle(rows)
    with (root / "labels.csv").open("w", newline="") as file:
        csv.DictWriter(file, rows[0]).writeheader()
        csv.DictWriter(file, rows[0]).writerows(rows)
    assert make_splits(root / "labels.csv")[0] == splits


def test_classes_may_be_called_train_and_val(tmp_path, capsys):
    for name, start in (("train", 0), ("val", 100)):
        for number in range(8):
            put(tmp_path / "direct" / name / f"{number}.png", start + number)
            put(tmp_path / "nested" / name / f"clip{number}" / "0.png", start + number)
            put(
                tmp_path / "mixed" / name / ("" if name == "val" else f"clip{number}") / f"{number}.png", start + number
            )
    put(tmp_path / "other" / "train" / "cat" / "0.png", 1)
    put(tmp_path / "other" / "val" / "cat" / "0.png", 2)
    put(tmp_path / "other" / "docs" / "0.png", 3)
    splits, _ = make_splits(tmp_path / "direct", positive="train")
    assert splits.classes == ["train", "val"] and splits.given is None
    assert "as classes" in capsys.readouterr().err and "given" not in splits.model_dump()
    named, _ = make_splits(tmp_path / "nested", positive="train", classes=["train", "val"])
    assert named.classes == ["train", "val"] and named.given is None
    for name, what in (("mixed", "in val photos that are in no folder"), ("other", "in docs no name of a split")):
        with pytest.raises(InputError, match=f"{what}.*--classes"):
            make_splits(tmp_path / name, positive="train")


def write_table(folder: Path, rows: list[dict[str, str]]) -> Path:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    (folder / "t.csv").write_text(buffer.getvalue())
    return folder / "t.csv"


@pytest.mark.parametrize("seed", range(8))
def test_nothing_leaks_between_given_splits(tmp_path, seed):
    """Groups in several splits and near-copies across them: the better protected one keeps its rows."""
    rng = random.Random(seed)
    names = rng.choice([("train", "val", "test"), ("train", "val_select", "val_calib", "test"), ("train", "valid")])
    rows: list[dict[str, str]] = []
    shown: dict[str, int] = {}
    for number in range(90):
        split = rng.choices(names, weights=[3, *([2] * (len(names) - 1))])[0]
        label = ("none", "work")[number % 2]
        file, group = f"{number}.png", f"g{number}"
        shown[file] = number
        kind = rng.random()
        if kind < 0.15 and rows:  # of the clip of a row that may be elsewhere
            other = rng.choice(rows)
            group = other["group"]
        elif kind < 0.3 and rows:  # a near-copy of a row that may be elsewhere
            other = rng.choice(rows)
            label, file = other["label"], f"{number}.jpg"
            shown.pop(f"{number}.png")
            shown[file] = shown[other["file"]]
        put(tmp_path / file, shown[file], quality=92 if file.endswith("jpg") else None)
        rows.append({"file": file, "label": label, "group": group, "split": split})
    splits, quarantined = make_splits(write_table(tmp_path, rows), max_component=1.0)
    given = {row["file"]: row for row in rows}
    taken, gone = {row.file for row in splits.rows}, {one.file for one in quarantined}
    assert taken | gone == set(given) and not taken & gone and len(quarantined) == len(gone)
    splits.apart()
    assert splits.given is not None
    assert splits.given.shared_groups + splits.given.near_copies == len(gone) == splits.quarantined
    # Brute force: what ties rows together, from the generator's own knowledge.
    tied = {file: file for file in given}

    def root(file: str) -> str:
        while tied[file] != file:
            file = tied[file]
        return file

    for a in given:
        for b in given:
            if given[a]["group"] == given[b]["group"] or shown[a] == shown[b]:
                tied[root(a)] = root(b)
    best: dict[str, int] = {}
    for file, row in given.items():
        best[root(file)] = max(best.get(root(file), 0), LEVEL[row["split"]])
    assert gone == {file for file, row in given.items() if LEVEL[row["split"]] < best[root(file)]}
    for row in splits.rows:
        level = LEVEL[given[row.file]["split"]]
        assert level == 0 or LEVEL[row.split] <= level
        assert given[row.file]["split"] != "test" or row.split == "val_test"
    for other in (resplit(splits, 1), resplit(splits, 2)):
        for old, new in zip(splits.rows, other.rows, strict=True):
            assert any({old.split, new.split} <= set(parts) for parts in splits.given.became.values())
            assert new.split == old.split or "val_test" not in (old.split, new.split)


def test_the_command_counts_what_would_leak(tmp_path, capsys):
    root = tree(tmp_path / "set", {"train": 12, "val": 8, "test": 4})
    put(root / "train" / "none" / "copy.jpg", 40, quality=92)  # test/none/0.png
    shutil.copy(root / "val" / "work" / "0.png", root / "train" / "work" / "same.png")
    assert main(["split", "--labels", str(root), "--out", str(tmp_path / "run"), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["given"] == {
        "became": {"test": ["val_test"], "train": ["train"], "val": ["val_select", "val_calib"]},
        "shared_groups": 0, "near_copies": 2,
    }  # fmt: skip
    reasons = (tmp_path / "run" / "quarantine.csv").read_text()
    assert "near-copies tie it to photos of test" in reasons and "near-copies tie it to photos of val" in reasons
    assert Counter(row.split for row in Splits.read(tmp_path / "run" / "splits.json").rows)["val_test"] == 8
    assert main(["split", "--labels", str(root), "--out", str(tmp_path / "run")]) == 0
    assert "2 images in quarantine as they would leak" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["train", "val", "dev2"], "split must be one of train, .* got 'dev2' in t.csv line 4.*--columns split="),
        (["train", "val", ""], "split must be one of .* got '' in t.csv line 4"),
        (["val", "test", "val"], "must have train, got test, val"),
        (["train", "val", "val_select", "val_calib"], "got all three"),
        (
            ["train", "train", "train", "test"],
            "class 'none' must be in at least 1 groups, so that val_test of the given test",
        ),
    ],
)
def test_given_splits_that_cannot_be(tmp_path, splits, message):
    rows = [
        {"file": f"{number}.png", "label": "work" if number % 2 else "none", "split": split}
        for number, split in enumerate(splits)
    ]
    for number, row in enumerate(rows):
        put(tmp_path / row["file"], number)
    with pytest.raises(InputError, match=message):
        make_splits(write_table(tmp_path, rows))


def test_a_column_split_can_be_passed_over_and_goes_with_no_folds(tmp_path):
    rows = [{"file": f"{number}.png", "label": str(number % 2), "split": "train"} for number in range(16)]
    for number, row in enumerate(rows):
        put(tmp_path / row["file"], number)
    table = write_table(tmp_path, rows)
    with pytest.raises(InputError, match="--folds must go with photos whose splits are not given"):
        make_splits(table, folds=4, fold=0)
    plain, _ = make_splits(table, columns={"split": ""}, folds=4, fold=0)
    assert plain.given is None and len(plain.rows) == 16
