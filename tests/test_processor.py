"""A backbone's processor file is followed, by folder and by hub id alike, or refused with a reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from PIL import Image
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model, ViTImageProcessorPil

from stage1_pro.config import ModelConfig
from stage1_pro.data.images import PreprocessSpec, preprocess
from stage1_pro.errors import ArtifactError
from stage1_pro.models.architecture import BackboneInfo
from stage1_pro.models.backbone import load_backbone, save_backbone
from stage1_pro.models.model import Architecture, create_model

STATED: dict[str, Any] = {
    "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 2,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.2, 0.3], "size": {"height": 48, "width": 48},
}  # fmt: skip
CROP = {"do_center_crop": True, "size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    return folder


@pytest.fixture
def base(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A snapshot in the hub's cache, which is all there is of the hub."""
    repository = tmp_path / "hub" / "models--org--base"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Path(shutil.copytree(plain, repository / "snapshots" / "abc"))


def architecture(source: str, **options: Any) -> Architecture:
    return create_model(ModelConfig(backbone=source, **options), ["none", "work"], "work", 0).architecture


def specs(base: Path, values: dict[str, Any], **options: Any) -> PreprocessSpec:
    """What a folder and its hub id say, which is the same."""
    (base / "preprocessor_config.json").write_text(json.dumps(values))
    by_id, by_folder = (architecture(source, **options).preprocessing for source in ("org/base", str(base)))
    assert by_id == by_folder
    return by_id


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (ViTImageProcessorPil, {}),
        (ViTImageProcessorPil, {"resample": 3, "size": {"height": 32, "width": 32}}),
        (ViTImageProcessorPil, {"do_normalize": False}),
        (ViTImageProcessorPil, {"do_rescale": False, "image_mean": [120.0, 110, 100], "image_std": [60.0, 61, 62]}),
        (ViTImageProcessorPil, {"rescale_factor": 1 / 127.5}),
        (ViTImageProcessorPil, {"do_rescale": False, "do_normalize": False}),
        (BitImageProcessorPil, CROP),
        (BitImageProcessorPil, {**CROP, "resample": 3, "size": {"shortest_edge": 60}}),
    ],
)
def test_pixels_are_those_of_transformers(kind: Any, changes: dict[str, Any], base: Path) -> None:
    values = {**STATED, **changes}
    spec = specs(base, values)
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    expected = kind(**values)(Image.fromarray(noise), return_tensors="np")["pixel_values"][0]
    got = preprocess(Image.fromarray(noise), spec)
    assert got.shape == expected.shape
    # Pillow's processor rounds to 8 bits after each direction.
    assert (np.abs(got - expected) * np.asarray(spec.std)[:, None, None] * 255).max() < 1.6


@pytest.mark.parametrize(
    "changes",
    [
        {"do_resize": False},
        {"resample": 0},
        {"resample": 1},
        {"size": {"shortest_edge": 48}},
        {"size": {"height": 48, "width": 64}},
        {"size": {"longest_edge": 48}},
        {"do_center_crop": True, "size": {"height": 48, "width": 48}},
        {"image_mean": 0.5},
        {"image_std": None},
        {"image_std": [0.0, 0.1, 0.1]},
        {"rescale_factor": 0},
        {"rescale_offset": True},
        {"do_pad": True},
        {"do_flip_channel_order": True},
    ],
)
def test_what_cannot_be_followed_is_refused(changes: dict[str, Any], base: Path) -> None:
    (base / "preprocessor_config.json").write_text(json.dumps({**STATED, **changes}))
    for source in ("org/base", str(base)):
        with pytest.raises(ArtifactError, match=r"preprocessor_config\.json") as caught:
            architecture(source)
        assert any(key in str(caught.value) for key in changes)


def test_the_configuration_overrules_the_file(base: Path) -> None:
    spec = specs(base, {**STATED, **CROP}, resize="stretch", image_size=32)
    assert (spec.height, spec.width, spec.resize) == (32, 32, "stretch")
    spec = specs(base, {**STATED, "size": {"shortest_edge": 48}}, resize="crop", image_size=32)
    assert (spec.height, spec.resize, spec.crop_ratio) == (32, "crop", 256 / 224)
    with pytest.raises(ArtifactError, match=r"model\.resize"):
        specs(base, {**STATED, "size": {"shortest_edge": 48}}, image_size=32)


def test_a_file_of_a_newer_processor_is_read(base: Path) -> None:
    (base / "processor_config.json").write_text(json.dumps({"image_processor": STATED}))
    for source in ("org/base", str(base)):
        spec = architecture(source).preprocessing
        assert (spec.height, spec.mean, spec.resample) == (48, (0.5, 0.4, 0.3), "bilinear")


@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_what_this_package_wrote_keeps_its_facts(resize: Any, base: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(base), 56, pos_embed_rescale=None, seed=0)
    info = BackboneInfo(source="far/away", family="dinov2", licence="CC0", hidden_size=32, n_blocks=1, patch_size=8)
    spec = PreprocessSpec(height=56, width=56, resize=resize, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    (tmp_path / "own").mkdir()
    save_backbone(tmp_path / "own", backbone, info, spec)
    shutil.copytree(tmp_path / "own", base, dirs_exist_ok=True)
    for source in ("org/base", str(base)):
        found = architecture(source)
        assert found.backbone == info
        assert found.preprocessing == spec


def test_a_preset_is_not_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = architecture("tiny").preprocessing
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "preprocessor_config.json").write_text(json.dumps(STATED))
    monkeypatch.chdir(tmp_path)
    assert architecture("tiny").preprocessing == before
