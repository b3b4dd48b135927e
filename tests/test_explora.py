"""ExPLoRA: masking is what it says, the share has limits, killed is normal, and what does not help is not kept."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from transformers import Dinov2Config

import stage1_pro
from stage1_pro.config import Config, ExploraConfig, ModelConfig, load_config
from stage1_pro.data.photos import open_photos
from stage1_pro.data.pool import read_pool
from stage1_pro.data.splits import Splits
from stage1_pro.data.synthetic import render_pool
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import sha256_file, write_csv
from stage1_pro.models.backbone import Backbone, backbone_from_config, load_backbone, save_backbone
from stage1_pro.models.masked import Pretext, draw_orders, encode, part, to_patches, to_pixels
from stage1_pro.models.model import input_spec
from stage1_pro.training import explora as room
from stage1_pro.training.epochs import TIMINGS
from stage1_pro.training.explora import make_trainable, merge
from stage1_pro.training.probes import judge, probe, verdict
from stage1_pro.training.run import ExploraRecord

SIZE, PATCH = 32, 8
DEEP = {
    "model_type": "dinov3_vit", "image_size": SIZE, "patch_size": PATCH, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 16, "num_attention_heads": 2, "num_register_tokens": 2, "pos_embed_rescale": None,
}  # fmt: skip
QUICK = ["train.workers=0", "explora.epochs=3", "explora.decoder_warmup_epochs=1", "explora.decoder_width=32",
         "explora.decoder_depth=1", "explora.rank=2", "explora.batch_size=16", "explora.held_out=0.2",
         "explora.save_every_steps=2"]  # fmt: skip


def dinov3(seed: int = 0) -> Backbone:
    return backbone_from_config(DEEP, SIZE, seed).eval()


def dinov2(seed: int = 0) -> Backbone:
    config = Dinov2Config(
        hidden_size=64, num_hidden_layers=12, num_attention_heads=2, image_size=SIZE, patch_size=PATCH
    )
    return backbone_from_config(config.to_dict(), SIZE, seed).eval()


def pixels(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def orders(n: int, backbone: Backbone, epoch: int = 0) -> torch.Tensor:
    return draw_orders((backbone.image_size // PATCH) ** 2, 7, epoch, range(n))


# ------------------------------------------------------------------------------------------------
# Masking


@pytest.mark.parametrize("make", [dinov3, dinov2])
def test_with_nothing_masked_it_is_the_plain_backbone(make) -> None:
    backbone, images = make(), pixels()
    everything = torch.arange((SIZE // PATCH) ** 2).expand(len(images), -1)
    with torch.no_grad():
        plain = backbone(images)
        torch.testing.assert_close(encode(backbone, images, everything), plain, rtol=0, atol=1e-6)
        torch.testing.assert_close(backbone.hf(images).last_hidden_state, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [dinov3, dinov2])
def test_every_row_keeps_the_places_of_its_own_visible_patches(make) -> None:
    backbone, images = make(), pixels(4)
    _, visible = part(orders(4, backbone), 0.75)
    assert len({tuple(row) for row in visible.tolist()}) == 4, "rows must be masked differently for this to say much"
    with torch.no_grad():
        found = encode(backbone, images, visible)
        for image, row, own in zip(images, found, visible, strict=True):
            tokens, context = backbone.embed(image[None])
            keep = [*range(backbone.n_prefix), *(backbone.n_prefix + own).tolist()]
            shared = None if context is None else (context[0][own], context[1][own])
            slow = backbone.norm(backbone.run_blocks(tokens[:, keep], shared, 0, backbone.n_blocks))
            torch.testing.assert_close(row[None], slow, rtol=0, atol=1e-5)
            if context is not None:
                first = (context[0][: len(own)], context[1][: len(own)])
                misplaced = backbone.norm(backbone.run_blocks(tokens[:, keep], first, 0, backbone.n_blocks))
                assert (misplaced - slow).abs().max() > 1e-4, "other places must be told apart, or this says nothing"


def test_what_is_masked_is_never_seen() -> None:
    backbone, images = dinov3(), pixels()
    masked, visible = part(orders(3, backbone), 0.5)
    patches = to_patches(images, PATCH)
    torch.testing.assert_close(to_pixels(patches, PATCH), images, rtol=0, atol=0)
    other = patches.scatter(1, masked.unsqueeze(-1).expand(-1, -1, patches.shape[2]), 9.0)
    with torch.no_grad():
        a, b = (encode(backbone, x, visible) for x in (images, to_pixels(other, PATCH)))
        assert torch.equal(a, b)
        assert not torch.equal(encode(backbone, images, masked), encode(backbone, to_pixels(other, PATCH), masked))


def test_the_loss_is_of_masked_patches_alone() -> None:
    backbone, images = dinov3(), pixels()
    pretext = Pretext(backbone, ExploraConfig(mask_ratio=0.5), n_images=3, seed=0)
    order, index = orders(3, backbone), torch.arange(3)
    masked, visible = part(order, 0.5)
    torch.nn.init.zeros_(pretext.head.leave.weight)  # what is predicted no longer depends on what is seen
    torch.nn.init.normal_(pretext.head.leave.bias, generator=torch.Generator().manual_seed(1))
    patches = to_patches(images, PATCH)
    noise = torch.randn(patches.shape, generator=torch.Generator().manual_seed(2))

    def loss(changed: torch.Tensor) -> torch.Tensor:
        where = changed.unsqueeze(-1).expand(-1, -1, patches.shape[2])
        with torch.no_grad():
            return pretext(to_pixels(patches.scatter(1, where, noise), PATCH), order, index)

    with torch.no_grad():
        plain = pretext(images, order, index)
    assert torch.equal(loss(visible), plain)
    assert (loss(masked) != plain).all()
    # by hand: normalised pixels of the masked patches
    wanted = patches.gather(1, masked.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
    wanted = (wanted - wanted.mean(2, keepdim=True)) / (wanted.var(2, keepdim=True) + 1e-6).sqrt()
    by_hand = (pretext.head.leave.bias.detach() - wanted).square().mean((1, 2))
    torch.testing.assert_close(plain, by_hand)


def test_masks_are_a_function_of_seed_epoch_and_row() -> None:
    first = draw_orders(16, 3, 2, [0, 1, 2])
    assert torch.equal(first[1:], draw_orders(16, 3, 2, [1, 2])), "the batch decides nothing"
    assert all(sorted(row) == list(range(16)) for row in first.tolist())
    for other in (draw_orders(16, 4, 2, [0, 1, 2]), draw_orders(16, 3, 1, [0, 1, 2]), draw_orders(16, 3, 2, [5, 6, 7])):
        assert not torch.equal(first, other)
    masked, visible = part(first, 0.999)
    assert masked.shape == (3, 15) and visible.shape == (3, 1), "one patch always stays"


# ------------------------------------------------------------------------------------------------
# What is trained


def test_lora_starts_as_the_base_and_merges_into_a_plain_backbone() -> None:
    backbone, images = dinov3(), pixels()
    keys = set(backbone.state_dict())
    with torch.no_grad():
        before = backbone(images)
        found = make_trainable(backbone, ExploraConfig(rank=2), seed=1)
        assert torch.equal(backbone(images), before)
    learned = {name for name, p in backbone.hf.named_parameters() if p.requires_grad}
    last = len(backbone.blocks) - 1
    assert found.n_trained == sum(p.numel() for p in backbone.hf.parameters() if p.requires_grad)
    for name in learned:
        assert (
            f"layer.{last}." in name or "norm" in name or ("lora_" in name and ("q_proj" in name or "v_proj" in name))
        )
    assert sum("lora_A" in name for name in learned) == 2 * last
    assert all(p.requires_grad for p in backbone.blocks[last].parameters())
    with torch.no_grad():
        for p in backbone.hf.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.05)
        moved = backbone(images)
        merged = merge(backbone, found)
        torch.testing.assert_close(merged(images), moved, rtol=0, atol=1e-4)
    assert not torch.allclose(moved, before, atol=1e-2)
    assert set(merged.state_dict()) == keys


def test_the_share_has_limits_and_says_the_number() -> None:
    tiny = load_backbone("tiny", None, pos_embed_rescale=None, seed=0)
    with pytest.raises(
        InputError, match=r"from 0.1% to 10% of the encoder, got 2\d\.\d\d% .* a backbone of more blocks"
    ):
        make_trainable(tiny, ExploraConfig(rank=2), seed=0)
    with pytest.raises(InputError, match=r"got 1\d\.\d\d% .*lower explora.rank, which is 16"):
        make_trainable(dinov3(), ExploraConfig(rank=16), seed=0)
    narrow = load_backbone("narrow", None, pos_embed_rescale=None, seed=0)
    assert 0.09 < make_trainable(narrow, ExploraConfig(), seed=0).share < 0.10
    assert make_trainable(dinov3(), ExploraConfig(train="full"), seed=0).share > 0.99


# ------------------------------------------------------------------------------------------------
# The pool


@pytest.fixture(scope="module")
def scenes(streets: Path, streets_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 120 rendered scenes, a pool of 60 others, and a deep narrow backbone."""
    folder = tmp_path_factory.mktemp("explora")
    shutil.copytree(streets, folder / "labelled")
    shutil.copytree(streets_run, folder / "run")
    render_pool(folder / "pool", 60, seed=2, size=48)
    backbone = dinov3()
    spec = input_spec(ModelConfig(), backbone)
    save_backbone(folder / "base", backbone, backbone.info("tests/base"), spec)
    return folder


@pytest.fixture
def run(scenes: Path, tmp_path: Path) -> Path:
    shutil.copytree(scenes / "run", tmp_path / "run")
    return tmp_path / "run"


def config(scenes: Path, *overrides: str) -> Config:
    return load_config(None, [f"model.backbone={scenes / 'base'}", *QUICK, *overrides])


def test_a_pool_leaves_out_what_must_stay_unseen(scenes: Path, tmp_path: Path, capsys) -> None:
    unseen = Splits.read(scenes / "run" / "splits.json").of("val_test")
    root = Path(Splits.read(scenes / "run" / "splits.json").root)
    images = sorted((scenes / "pool" / "images").iterdir())[:6]
    for k, path in enumerate(images):
        shutil.copy(path, tmp_path / f"{k}.png")
    shutil.copy(images[0], tmp_path / "again.png")
    shutil.copy(root / unseen[0].file, tmp_path / "test_row.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    pool = read_pool(tmp_path, unseen, open_photos(root))
    assert [photo.key for photo in pool.photos] == [f"{k}.png" for k in range(6)]
    assert (pool.n_copies, pool.n_left_out, [q.file for q in pool.quarantined]) == (1, 1, ["broken.png"])
    assert "left out broken.png: not an image" in capsys.readouterr().err
    # other frames of a test clip: not the same content, but the same group
    rows = [{"file": f"{k}.png", "group": unseen[0].group if k < 2 else "elsewhere"} for k in range(6)]
    write_csv(tmp_path / "labels.csv", rows, ["file", "group"])
    pool = read_pool(tmp_path, unseen, open_photos(root))
    assert pool.n_left_out == 2 and len(pool.photos) == 4
    write_csv(tmp_path / "labels.csv", rows[:2], ["file", "group"])
    with pytest.raises(InputError, match="two usable images or more, got 0 of 2"):
        read_pool(tmp_path, unseen, open_photos(root))
    with pytest.raises(InputError, match="must be a folder, a tar or a CSV"):
        read_pool(tmp_path / "nowhere", unseen, open_photos(root))


def test_a_pool_leaves_out_altered_copies_and_their_clips(scenes: Path, tmp_path: Path, capsys) -> None:
    splits = Splits.read(scenes / "run" / "splits.json")
    unseen = splits.of("val_test")
    images = sorted((scenes / "pool" / "images").iterdir())[:5]
    rows = [{"file": f"{k}.png", "group": "clip" if k < 2 else "elsewhere"} for k in range(5)]
    for row, path in zip(rows, images, strict=True):
        shutil.copy(path, tmp_path / row["file"])
    with Image.open(splits.path(unseen[0])) as image:
        image.convert("RGB").resize((90, 90), Image.Resampling.BICUBIC).save(tmp_path / "copy.jpg", quality=85)
    write_csv(tmp_path / "labels.csv", [*rows, {"file": "copy.jpg", "group": "clip"}], ["file", "group"])
    pool = read_pool(tmp_path, unseen, splits.photos())
    assert [photo.key for photo in pool.photos] == ["2.png", "3.png", "4.png"], "the copy's clip goes with it"
    assert (pool.n_left_out, pool.n_not_compared) == (3, 0)
    (tmp_path / "labels.csv").unlink()
    assert read_pool(tmp_path, unseen, splits.photos()).n_left_out == 1
    capsys.readouterr()
    pool = read_pool(tmp_path, unseen, open_photos(tmp_path / "nowhere"))
    assert (pool.n_left_out, pool.n_not_compared) == (0, len(unseen))
    assert f"{len(unseen)} rows that must stay unseen cannot be read" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# The station


@pytest.fixture(scope="module")
def explored(scenes: Path) -> tuple[Path, ExploraRecord]:
    """One adaptation from start to end; its masked loss is given time to fall."""
    folder = shutil.copytree(scenes / "run", scenes / "explored")
    record = stage1_pro.explora(
        scenes / "pool" / "images", folder, config(scenes, "explora.epochs=8", "explora.lr=0.003")
    )
    return folder, record


def test_an_adaptation_writes_everything_and_learns(explored: tuple[Path, ExploraRecord], scenes: Path) -> None:
    run, record = explored
    folder = run / "explora"
    assert ExploraRecord.read(folder / "explora.json") == record
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["encoder"] for row in rows] == ["frozen"] + ["trained"] * 7
    held = [float(row["held_out_loss"]) for row in rows]
    assert held == record.held_out_loss
    assert held[-1] < held[0] - 0.01, "pool images that were not trained on must be rebuilt better, too"
    assert record.pool.n_held_out == 12 and record.pool.n_trained == 48
    assert 0.001 <= record.share <= 0.10
    with Image.open(folder / "reconstructions.png") as image:
        assert image.size[1] > 6 * SIZE
    kept = load_backbone(str(folder / "backbone"), None, pos_embed_rescale=None, seed=0)
    assert kept.image_size == SIZE and kept.fingerprint() == record.backbone_fingerprint
    assert (record.backbone_fingerprint == record.base_fingerprint) == (record.kept == "base")
    assert len(record.figures) == 6
    linear = next(f for f in record.figures if (f.probe, f.metric) == ("linear", "balanced_accuracy"))
    assert linear.difference is not None
    with pytest.raises(InputError, match="--resume .*--overwrite"):
        stage1_pro.explora(scenes / "pool" / "images", run, config(scenes))
    assert stage1_pro.explora(scenes / "pool" / "images", run, resume=True) == record


def test_training_takes_the_adapted_backbone_by_one_flag(explored: tuple[Path, ExploraRecord], run: Path) -> None:
    shutil.copytree(explored[0] / "explora", run / "explora")
    options = load_config(None, ["train.mode=linear", "train.epochs=1", "train.workers=0"])
    stage1_pro.train(run, options, explora=True)
    state = torch.load(run / "model_best.pth", weights_only=True)["model_state_dict"]
    adapted = load_backbone(str(run / "explora" / "backbone"), None, pos_embed_rescale=None, seed=0).state_dict()
    assert all(torch.equal(state[f"backbone.{name}"], value) for name, value in adapted.items())
    stage1_pro.train(run, resume=True, explora=True)
    weights = run / "explora" / "backbone" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ArtifactError, match=r"must be as explora.json says"):
        stage1_pro.train(run, options, overwrite=True, explora=True)


def test_training_without_an_adaptation_or_beside_other_splits(
    explored: tuple[Path, ExploraRecord], scenes: Path, run: Path
) -> None:
    with pytest.raises(InputError, match="--explora needs .* run `stage1 explora"):
        stage1_pro.train(run, explora=True)
    shutil.copytree(explored[0] / "explora", run / "explora")
    stage1_pro.split(scenes / "labelled" / "labels.csv", run, seed=9, overwrite=True)
    with pytest.raises(ArtifactError, match="adapted beside other splits"):
        stage1_pro.train(run, explora=True)


def test_an_adaptation_that_ruins_features_is_rejected(scenes: Path, run: Path) -> None:
    ruin = ["explora.lr=1", "explora.warmup_epochs=0", "explora.decoder_warmup_epochs=0"]
    record = stage1_pro.explora(scenes / "pool" / "images", run, config(scenes, *ruin))
    assert record.kept == "base"
    assert "must be above 0" in record.reason or "finite" in record.reason
    base = load_backbone(str(scenes / "base"), None, pos_embed_rescale=None, seed=0)
    kept = load_backbone(str(run / "explora" / "backbone"), None, pos_embed_rescale=None, seed=0)
    assert kept.fingerprint() == base.fingerprint() == record.backbone_fingerprint
    assert kept.info(str(run / "explora" / "backbone")) == base.info(str(scenes / "base"))
    with pytest.raises(InputError, match="--base must be outside"):
        stage1_pro.explora(
            scenes / "pool" / "images", run, config(scenes), base=str(run / "explora" / "backbone"), overwrite=True
        )
    asked = config(scenes, *ruin, "explora.keep=adapted")
    overruled = stage1_pro.explora(scenes / "pool" / "images", run, asked, overwrite=True)
    assert (overruled.kept, overruled.better) == ("adapted", False)
    assert overruled.backbone_fingerprint != overruled.base_fingerprint
    assert overruled.reason.startswith("kept because explora.keep=adapted asks for it, although")


def test_the_guard_wants_better_features_of_held_out_groups() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 240)
    groups = [f"g{i // 3}" for i in range(240)]
    signal, noise = (2 * labels[:, None] - 1) * np.ones(8), rng.normal(size=(240, 8))
    weak, strong = (probe(signal * share + noise, labels, groups, 2, seed=0) for share in (0.1, 0.6))
    ruined = probe(rng.permutation(signal * 0.6 + noise), labels, groups, 2, seed=0)
    for before, after, kept in (
        (weak, strong, True),
        (strong, weak, False),
        (strong, ruined, False),
        (weak, weak, False),
    ):
        figures = judge(before, after, labels, groups, positive=1, seed=0, n_replicates=200)
        assert verdict(figures)[0] == kept
    figures = judge(weak, strong, labels, groups, positive=1, seed=0, n_replicates=200)
    assert all(one.low < one.difference < one.high for one in figures)
    assert all(one.low > 0 for one in figures if one.probe == "linear")
    with pytest.raises(InputError, match="two groups or more"):
        probe(noise, labels, ["one"] * 240, 2, seed=0)


def test_only_train_rows_are_needed(scenes: Path, run: Path) -> None:
    splits = Splits.read(run / "splits.json")
    copy = run.parent / "train_alone"
    for row in splits.of("train"):
        (copy / row.file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(splits.path(row), copy / row.file)
    splits.model_copy(update={"root": str(copy)}).write(run / "splits.json")
    record = stage1_pro.explora(
        scenes / "pool" / "images", run, config(scenes, "explora.epochs=1", "explora.decoder_warmup_epochs=0")
    )
    assert record.n_rows == len(splits.of("train"))
    assert record.pool.n_not_compared == len(splits.rows) - record.n_rows


def test_a_configuration_mistake_costs_nothing(explored: tuple[Path, ExploraRecord], scenes: Path, run: Path) -> None:
    finished = explored[0] / "explora"
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    wrong = config(scenes, "explora.blocks=6", "explora.epochs=8")
    for folder, overwrite in ((explored[0], True), (run, False)):
        with pytest.raises(InputError, match="the trainable share must be from"):
            stage1_pro.explora(scenes / "pool" / "images", folder, wrong, overwrite=overwrite)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert [path.name for path in (run / "explora").iterdir()] == [".lock"]


def test_no_setting_of_the_process_changes_an_adaptation_unseen(
    explored: tuple[Path, ExploraRecord], scenes: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert explored[1].environment["device"]
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "inductor")
    with pytest.raises(InputError, match="ACCELERATE_DYNAMO_BACKEND"):
        stage1_pro.explora(scenes / "pool" / "images", run, config(scenes))
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(InputError, match="float32"):
            stage1_pro.explora(scenes / "pool" / "images", run, config(scenes))
    finally:
        torch.set_default_dtype(torch.float32)
    assert not (run / "explora" / "last.pth").exists()


@pytest.mark.parametrize("objective", ["simmim", "latent", "diet"])
def test_other_objectives_run(scenes: Path, run: Path, objective: str) -> None:
    record = stage1_pro.explora(
        scenes / "pool" / "images", run, config(scenes, f"explora.objective={objective}", "explora.epochs=2")
    )
    assert record.objective == objective and np.isfinite(record.loss).all()
    assert (record.held_out_loss[0] is None) == (objective == "diet"), "an image not trained on is no class"
    assert (run / "explora" / "reconstructions.png").exists() == (objective == "simmim")


def test_dinov2_weights_are_adapted(scenes: Path, run: Path, shared) -> None:
    base = shared("weights/dinov2-small")
    options = config(
        scenes, f"model.backbone={base}", "model.image_size=56", "explora.epochs=2", "explora.batch_size=24"
    )
    record = stage1_pro.explora(scenes / "pool" / "images", run, options)
    assert record.base.family == "dinov2" and 0.08 < record.share < 0.10
    assert load_backbone(str(run / "explora" / "backbone"), None, pos_embed_rescale=None, seed=0).image_size == 56


# ------------------------------------------------------------------------------------------------
# The study


def test_the_study_resamples_groups_alike_in_both_arms_and_all_seeds(repository, monkeypatch) -> None:
    judge_mcc = pytest.importorskip("sklearn.metrics").matthews_corrcoef
    monkeypatch.syspath_prepend(repository / "benchmarks")
    import explora as study

    rng = np.random.default_rng(1)
    groups = np.asarray([f"rw_{i // 10}" for i in range(80)])
    labels = rng.integers(0, 2, 80)
    better, worse = ([np.where(rng.random(80) < p, labels, 1 - labels) for _ in range(3)] for p in (0.9, 0.6))

    def answers(given) -> list:
        return [study.Answers(groups, labels, one) for one in given]

    rows = np.ones(80, dtype=bool)
    found = study.measure({"none": answers(worse), "explora": answers(better)}, rows)
    for metric, reference in (("accuracy", lambda a: np.mean(a == labels)), ("mcc", lambda a: judge_mcc(labels, a))):
        for arm, given in (("none", worse), ("explora", better)):
            assert found[metric]["per_seed"][arm] == pytest.approx([reference(one) for one in given])
        assert found[metric]["interval"][0] < found[metric]["difference"] < found[metric]["interval"][1]
    same = study.measure({"none": answers(better), "explora": answers(better)}, rows)
    assert same["accuracy"]["interval"] == same["mcc"]["interval"] == [0, 0], "what both arms share must cancel"


# ------------------------------------------------------------------------------------------------
# Killed is normal

ARTEFACTS = ("explora.json", "config.json", "last.pth", "reconstructions.png", "quarantine.csv",
             "backbone/model.safetensors", "backbone/config.json", "backbone/preprocessor_config.json",
             "backbone/backbone_info.json")  # fmt: skip


def same(a: Path, b: Path) -> None:
    for name in ARTEFACTS:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    found = []
    for folder in (a, b):
        with (folder / "metrics.csv").open(newline="") as file:
            found.append([{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)])
    assert found[0] == found[1]


def test_stopped_inside_an_epoch_it_ends_as_if_it_had_not_been(
    scenes: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shutil.copytree(scenes / "run", tmp_path / "whole")
    stage1_pro.explora(scenes / "pool" / "images", whole, config(scenes))
    learn, steps = room.Explorer._learn, []

    def stop(self, *arguments, **options) -> None:
        steps.append(self.at.global_step)
        if self.at.global_step == 5:
            raise KeyboardInterrupt
        learn(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(room.Explorer, "_learn", stop)
        with pytest.raises(KeyboardInterrupt):
            stage1_pro.explora(scenes / "pool" / "images", run, config(scenes))
    assert not (run / "explora" / "explora.json").exists()
    with pytest.raises(InputError, match="--resume must keep .* explora.lr = 0.5"):
        stage1_pro.explora(scenes / "pool" / "images", run, config(scenes, "explora.lr=0.5"), resume=True)
    with pytest.raises(ArtifactError, match="base, pool and configuration"):
        stage1_pro.explora(scenes / "labelled" / "images", run, resume=True)
    stage1_pro.explora(scenes / "pool" / "images", run, resume=True)
    same(whole / "explora", run / "explora")


@pytest.mark.slow
def test_kill_9_changes_no_byte(scenes: Path, run: Path, tmp_path: Path) -> None:
    def command(folder: Path, *options: str) -> list[str]:
        words = [sys.executable, "-m", "stage1_pro.cli", "explora", "--images", str(scenes / "pool" / "images")]
        return [*words, "--run", str(folder), *options]

    given = [p for item in (f"model.backbone={scenes / 'base'}", *QUICK, "explora.epochs=12") for p in ("--set", item)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = shutil.copytree(scenes / "run", tmp_path / "whole")
    subprocess.run(command(whole, *given), env=environment, check=True, capture_output=True)
    last = run / "explora" / "last.pth"
    for change in range(1, 4):
        before = sha256_file(last) if last.exists() else ""
        process = subprocess.Popen(
            command(run, *(["--resume"] if before else given)),
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline:
            if last.exists() and sha256_file(last) != before:
                time.sleep(0.02 * change)
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (run / "explora" / "explora.json").exists(), "it must have been killed before its end"
    subprocess.run(command(run, "--resume"), env=environment, check=True, capture_output=True)
    same(whole / "explora", run / "explora")
