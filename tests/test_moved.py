"""Photos that moved are found again, and photos that changed are not taken for those that were split."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("torch")

from stage1_pro.cli import main
from stage1_pro.data.splits import Splits
from stage1_pro.deploy.prediction import infer
from stage1_pro.errors import InputError


@pytest.fixture
def project(tiny: Path, tmp_path: Path) -> Path:
    """A folder with ``run`` and, beside it, ``photos``."""
    run = shutil.copytree(tiny, tmp_path / "project" / "run")
    photos = (run / "images").rename(run.parent / "photos")
    splits = Splits.read(run / "splits.json")
    splits.model_copy(update={"root": str(photos)}).write(run / "splits.json")
    return run.parent


def answers(run: Path) -> list[tuple[str, float]]:
    rows, failures = infer(run, split="val_test")
    assert failures == 0
    return [(row["decision"], row["probability"]) for row in rows]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


def test_run_and_photos_may_move_together(project: Path) -> None:
    before = answers(project / "run")
    moved = project.rename(project.parent / "elsewhere")
    assert answers(moved / "run") == before
    assert Path(Splits.read(moved / "run" / "splits.json").root) == moved / "photos"


def test_where_photos_lie_is_said_once(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, before = project / "run", answers(project / "run")
    old = everything(run)
    # Other names, other folders, another photo among them: what was split is found by its content.
    there = project.parent / "there"
    for number, photo in enumerate(sorted((project / "photos").iterdir())):
        (there / str(number % 3)).mkdir(parents=True, exist_ok=True)
        photo.rename(there / str(number % 3) / f"{99 - number}.png")
    (project / "photos").rmdir()
    assert main(["infer", "--run", str(run), "--split", "val_test"]) == 2
    assert "--images" in capsys.readouterr().err
    assert everything(run) == old
    for command in (["infer", "--split", "val_test"], ["evaluate", "--replicates", "20"], ["export", "--overwrite"]):
        (run / "splits.json").write_bytes(old["splits.json"])
        assert main([command[0], "--run", str(run), "--images", str(there), *command[1:]]) == 0, command
        assert answers(run) == before
    splits = Splits.read(run / "splits.json").verify()
    assert splits.hashes == Splits.parse(old["splits.json"].decode(), "old").hashes
    # What is refused for another reason changes nothing either.
    (run / "splits.json").write_bytes(old["splits.json"])
    before_refusals = everything(run)
    for command in (
        ["export"],
        ["evaluate", "--beside", str(project / "nowhere")],
        ["infer", "--split", "val_test", "--resume"],
    ):
        assert main([command[0], "--run", str(run), "--images", str(there), *command[1:]]) in (2, 4), command
        assert everything(run) == before_refusals, command
    assert main(["infer", "--run", str(run), "--images", str(there), "--split", "val_test"]) == 0
    # One photo is lost: nothing is changed.
    lost = next(there.rglob("*.png"))
    lost.rename(project / "lost.png")
    old = everything(run)
    assert main(["infer", "--run", str(run), "--images", str(there), "--split", "val_test"]) == 2
    assert "without 1 of them" in capsys.readouterr().err
    assert everything(run) == old


def test_a_photo_that_changed_is_not_taken_for_the_one_that_was_split(project: Path) -> None:
    run = project / "run"
    splits = Splits.read(run / "splits.json")
    row = splits.of("val_test")[0]
    Image.new("RGB", (60, 60), "red").save(splits.path(row))
    rows, failures = infer(run, split="val_test")
    assert failures == 1
    assert [one["file"] for one in rows if one["error"]] == [row.file]
    with pytest.raises(InputError, match="without 1 of them"):
        splits.moved_to(project / "photos")


def test_a_place_beside_is_never_preferred_to_the_one_that_is_there(project: Path) -> None:
    """A copied run reads the photos it was split from while they are there."""
    copy = shutil.copytree(project / "run", project.parent / "copy" / "run")
    assert Path(Splits.read(copy / "splits.json").root) == project / "photos"
    (project.parent / "copy" / "photos").symlink_to(project / "photos")
    assert Path(Splits.read(copy / "splits.json").root) == project / "photos"
