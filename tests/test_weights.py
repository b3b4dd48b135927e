"""A backbone's folder is believed in nothing: files are whole, and what was loaded is what they hold."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

import stage1_pro
from stage1_pro.config import load_config
from stage1_pro.data.synthetic import render_pool
from stage1_pro.errors import ArtifactError
from stage1_pro.models.backbone import BACKBONES, Backbone, load_backbone
from stage1_pro.models.transformers_vit import Dinov3

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
    "intermediate_size": 64,
}  # fmt: skip
TEXT: dict[str, Any] = {**SHAPE, "vocab_size": 64, "max_position_embeddings": 8, "projection_size": 32}
MODELS: dict[str, Callable[[], Any]] = {
    "dinov3_vit": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SHAPE)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SHAPE)),
    "dinov2_with_registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE)),
    "vit": lambda: ViTModel(ViTConfig(**SHAPE), add_pooling_layer=False),
    "siglip_vision_model": lambda: SiglipVisionModel(SiglipVisionConfig(**SHAPE)),
}
# What lies on the hub is often more than the backbone.
WHOLE: dict[str, Callable[[], Any]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**SHAPE)),
    "vit with a pooler": lambda: ViTModel(ViTConfig(**SHAPE)),
    "dinov2": lambda: Dinov2ForImageClassification(Dinov2Config(**SHAPE)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config=TEXT, vision_config=SHAPE)),
}


def saved(model: Any, folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(folder, **options)
    return folder


def load(folder: Path) -> Backbone:
    return load_backbone(str(folder), 32, pos_embed_rescale=None, seed=0)


def refused(folder: Path, names: str) -> str:
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    text = str(caught.value)
    assert caught.value.exit_code == 4
    assert names in text, text
    assert "\n" not in text
    return text


@pytest.fixture(params=list(MODELS))
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return saved(MODELS[request.param](), tmp_path / "base")


@pytest.mark.parametrize("kind", [*MODELS, *WHOLE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_whole_is_loaded_as_it_is(kind: str, dtype: Any, tmp_path: Path) -> None:
    for number, made in enumerate(table[kind] for table in (MODELS, WHOLE) if kind in table):
        folder = saved(made().to(dtype), tmp_path / str(number))
        stored = {t.float().numpy().tobytes() for t in load_file(folder / "model.safetensors").values()}
        state = load(folder).body.state_dict()
        assert state
        assert all(tensor.dtype == torch.float32 and tensor.numpy().tobytes() in stored for tensor in state.values())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_beside_the_weights_is_refused(base: Path, tmp_path: Path) -> None:
    hf = load(base).hf
    linear = {name.rpartition(".")[2] for name, one in hf.named_modules() if isinstance(one, torch.nn.Linear)}
    adapted = get_peft_model(hf, LoraConfig(r=2, target_modules=sorted(linear)[:2], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "both")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    shutil.copytree(tmp_path / "merged", tmp_path / "both", dirs_exist_ok=True)
    refused(tmp_path / "both", "adapter_config.json")
    load(tmp_path / "merged")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 88252528\n"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["pointer", "empty", "header", "cut", "short", "foreign"])
def test_a_file_that_is_not_whole_is_named(damage: str, file: str, base: Path) -> None:
    if file == "pytorch_model.bin":
        state = load_file(base / "model.safetensors")
        (base / "model.safetensors").unlink()
        torch.save(state, base / file)
        load(base)
    whole = (base / file).read_bytes()
    (base / file).write_bytes({
        "pointer": POINTER, "empty": b"", "header": whole[:20], "cut": whole[: len(whole) // 2], "short": whole[:-1],
        "foreign": b"<html>404</html>" * 9,
    }[damage])  # fmt: skip
    if (damage, file) == ("short", "pytorch_model.bin"):
        return  # the last byte of a zip file is its comment's length
    text = refused(base, str(base / file))
    assert ("git lfs pull" in text) == (damage == "pointer")


def test_no_weights_are_refused(base: Path) -> None:
    (base / "model.safetensors").unlink()
    refused(base, "model.safetensors")


@pytest.mark.parametrize("damage", ["missing", "pointer", "cut", "index", "outside"])
def test_every_shard_is_there_and_whole(damage: str, tmp_path: Path) -> None:
    folder = saved(MODELS["dinov3_vit"](), tmp_path / "base", max_shard_size="20KB")
    shard = min(folder.glob("*-00002-of-*.safetensors"))
    index = folder / "model.safetensors.index.json"
    load(folder)
    if damage == "missing":
        shard.unlink()
    elif damage == "pointer":
        shard.write_bytes(POINTER)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-9])
    elif damage == "index":
        index.write_bytes(POINTER)
    else:
        stated = json.loads(index.read_text())
        stated["weight_map"] = dict.fromkeys(stated["weight_map"], "../other.safetensors")
        index.write_text(json.dumps(stated))
    refused(folder, (index if damage in ("index", "outside") else shard).name)


def test_weights_of_another_model_are_refused(base: Path) -> None:
    weights, config = base / "model.safetensors", json.loads((base / "config.json").read_text())
    for word in ("stage_names", "out_features", "out_indices"):
        config.pop(word, None)
    state = load_file(weights)

    def stated(**changes: Any) -> None:
        (base / "config.json").write_text(json.dumps({**config, **changes}))

    for changes in ({"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 16}, {"patch_size": 16}):
        stated(**changes)
        refused(base, str(weights))
    stated()
    block = next(name for name in state if name.endswith(("q_proj.weight", "query.weight")))
    for extra in (
        {block.replace("weight", "lora_A.weight"): state[block].clone()},
        {block.replace("0", "7"): state[block].clone()},
    ):
        save_file({**state, **extra}, weights, metadata={"format": "pt"})
        refused(base, str(weights))
    for kind in (torch.int8, torch.float8_e4m3fn):
        save_file({**state, block: state[block].to(kind)}, weights, metadata={"format": "pt"})
        refused(base, str(weights))
    save_file({"a": torch.zeros(2)}, weights, metadata={"format": "pt"})
    refused(base, str(weights))
    save_file(state, weights, metadata={"format": "pt"})
    load(base)


def test_mode_full_trains_the_whole_backbone_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen(Dinov3):
        def __init__(self, hf: Any, image_size: int) -> None:
            super().__init__(hf, image_size)
            hf.embeddings.requires_grad_(False)

    stage1_pro.split(render_pool(tmp_path / "pool", 60, seed=1, size=32), tmp_path / "run", seed=0)
    base = saved(MODELS["dinov3_vit"](), tmp_path / "base")
    options = [f"model.backbone={base}", "model.image_size=32", "train.epochs=1", "train.workers=0"]
    monkeypatch.setitem(BACKBONES._known, "dinov3_vit", Frozen)
    with pytest.raises(ArtifactError, match="embeddings"):
        stage1_pro.train(tmp_path / "run", load_config(None, options))
    assert not (tmp_path / "run" / "start.json").exists()
