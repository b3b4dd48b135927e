"""continual simulate: the whole loop on a simulated clock, the same on every database."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sqlalchemy", reason="the loop needs [continual]")
pytest.importorskip("torch", reason="bundles are exported with [train]")

from kit.tiny import CLASSES, make_images, make_model, make_policy
from PIL import Image

from stage1_pro.cli import main
from stage1_pro.commands.simulate import simulate
from stage1_pro.config import Config, ModelConfig
from stage1_pro.continual.loop.world import World
from stage1_pro.deploy.exporting import export
from stage1_pro.errors import InputError
from stage1_pro.studies.simulation import Simulation
from stage1_pro.training.checkpoint import save_model
from stage1_pro.training.run import write_config

SMALL = {
    "days": 3,
    "per_day": 16,
    "shift_day": 1,
    "looks_per_day": 2,
    "judged": 10,
    "delay_days": 0.3,
    "past_share": 0.45,
    "least_certify": 10,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise whose brightness is its class, a folder per class."""
    folder = tmp_path_factory.mktemp("photos")
    for index, path in enumerate(make_images(folder / "all", 240, 3)):
        with Image.open(path) as image:
            pixels = np.asarray(image) // 2 + 127 * (index % 2)
        target = folder / "data" / CLASSES[index % 2] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(target)
    return folder / "data"


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first champion whose heads know nothing, so that it is soon found to be wrong."""
    folder, model = tmp_path_factory.mktemp("first") / "run", make_model(tap=4)
    splits = World(photos, past_share=0.45, judged=10).past
    folder.mkdir()
    splits.write(folder / "splits.json")
    a = model.architecture
    write_config(folder, Config(model=ModelConfig(backbone="tiny", tap=a.tap, image_size=a.image_size)), splits)
    save_model(folder / "model_best.pth", model, model.state_dict(), split_hashes=splits.hashes)
    (folder / "metrics.csv").write_text("epoch,loss\n1,0.5\n")
    make_policy(model, splits.hashes, 0.6).model_copy(update={"target_fnr": 0.5}).write(folder / "thresholds.json")
    export(folder)
    return folder


def test_a_world_cuts_past_and_stream_apart(photos: Path) -> None:
    world = World(photos, past_share=0.45, judged=30, level=3)
    past, stream = {row.sha256 for row in world.past.rows}, {row.sha256 for row in world.stream}
    judging = {row.sha256 for row in world.judged}
    assert not past & stream and not judging & (past | stream) and len(judging) == 30
    assert len(past) + len(stream) + len(judging) == 240
    n = len(world.stream)
    plain = [world.photo(number, shifted=False)[0] for number in range(2 * n)]
    assert len(set(plain[:n])) == n and set(plain[:n]) == set(plain[n:]) and plain[:n] != plain[n:]
    changed = [world.photo(number, shifted=True) for number in (0, 0, n, 2 * n)]
    assert changed[0] == changed[1] and len({image for image, _ in changed}) == 3
    held = {world.photo(number, shifted=False, judged=True)[0] for number in range(60)}
    assert len(held) == 30 and not held & set(plain)
    again = World(photos, past_share=0.45, judged=30, level=3)
    assert again.past.hashes == world.past.hashes and again.photo(5, shifted=True) == world.photo(5, shifted=True)
    assert World(photos, past_share=0.45, judged=30, seed=1).past.hashes != world.past.hashes


@pytest.mark.slow
def test_same_seed_same_record_on_every_database(photos: Path, run: Path, tmp_path: Path, store_url: str) -> None:
    first = simulate(photos, tmp_path / "one", run=run, alpha=0.1, **SMALL)
    again = simulate(photos, tmp_path / "two", run=run, alpha=0.1, store=store_url, **SMALL)
    assert (tmp_path / "one/simulation.json").read_bytes() == (tmp_path / "two/simulation.json").read_bytes()
    assert first == again == Simulation.read(tmp_path / "one/simulation.json")
    assert [day.shifted for day in first.days] == [False, True, True] and first.audit_whole
    assert all(day.wrong_exits <= day.exits <= day.served == 16 for day in first.days)
    assert first.days[0].static_exits == first.days[0].exits or first.alarms
    # Heads that know nothing are found out, and the threshold tightens in that very step.
    assert first.alarms and all(one.after >= one.before for one in first.alarms)
    checks = {check.name: check for check in first.checks}
    assert checks["never past the certificate"].passed
    for name in ("risk", "coverage", "threshold"):
        with Image.open(tmp_path / "one" / f"{name}.png") as image:
            assert image.width > 300


@pytest.mark.slow
def test_real_photos_give_the_same_on_both_databases(
    shared: Callable[[str], Path], tmp_path: Path, postgres_url: str
) -> None:
    options = {"days": 3, "per_day": 80, "shift_day": 1, "looks_per_day": 1, "min_labels": 80, "judged": 40,
               "least_certify": 40, "alpha": 0.2}  # fmt: skip
    signs, kept = shared("data/roadwork_signs"), tmp_path / "labels.csv"
    (tmp_path / "images").symlink_to(signs / "images")
    with (signs / "labels.csv").open(newline="") as file, kept.open("w", newline="") as out:
        rows = list(csv.DictReader(file))
        groups = set(sorted({row["group"] for row in rows})[::2])
        writer = csv.writer(out)
        writer.writerow(["file", "label", "group"])
        writer.writerows([row["file"], row["label_name"], row["group"]] for row in rows if row["group"] in groups)
    first = simulate(kept, tmp_path / "one", positive="roadwork", backbone=str(shared("weights/dinov2-small")),
                     image_size=56, **options)  # fmt: skip
    again = simulate(kept, tmp_path / "two", positive="roadwork", run=tmp_path / "one/run", store=postgres_url,
                     **options)  # fmt: skip
    assert first == again
    assert {check.name: check for check in first.checks}["never past the certificate"].passed


def test_bad_input_says_what_to_do(photos: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shift_day must be before the last day"):
        simulate(photos, tmp_path / "out", run=run, days=3, shift_day=3)
    with pytest.raises(InputError, match="per_day must .*8.*0.*got 2"):
        simulate(photos, tmp_path / "out", run=run, per_day=2)
    with pytest.raises(InputError, match="data must have 8 photos"):
        simulate(photos, tmp_path / "out", run=run, past_share=0.45, judged=10, per_day=0)
    with pytest.raises(InputError, match="run must be of the same photos and seed"):
        simulate(photos, tmp_path / "out", run=run, seed=1, **SMALL)
    (tmp_path / "out/loop").mkdir(parents=True)
    with pytest.raises(InputError, match="out must be a new folder"):
        simulate(photos, tmp_path / "out", run=run, **SMALL)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["continual", "simulate", "--help"])
    out = capsys.readouterr().out
    assert "--delay" in out and "simulation.json" in out and "stage1 help loop" in out
