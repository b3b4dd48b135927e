"""Backbones of other families go the whole way: model, adapter, a step, both stages as ONNX in every precision."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ConvNextConfig,
    DINOv3ConvNextModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import stage1_pro
from stage1_pro.config import AdapterConfig, ExploraConfig, ModelConfig, load_config
from stage1_pro.data.synthetic import render_pool
from stage1_pro.deploy.onnx import export_onnx, export_variants
from stage1_pro.errors import InputError
from stage1_pro.models.adapters import adapt, merge
from stage1_pro.models.backbone import BACKBONES, load_backbone, save_backbone
from stage1_pro.models.model import Stage1Model, create_model, rebuild_model
from stage1_pro.models.transformers_vit import Dinov2
from stage1_pro.training.explora import make_trainable

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
}  # fmt: skip


def made(kind: str) -> torch.nn.Module:
    """A transformers model of random weights, all of them away from zero."""
    torch.manual_seed(0)
    wide = {**SHAPE, "intermediate_size": 64}
    model: torch.nn.Module = {
        "dinov2_with_registers": lambda: Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**SHAPE, mlp_ratio=2, num_register_tokens=3)
        ),
        "siglip_vision_model": lambda: SiglipVisionModel(SiglipVisionConfig(**wide)),
        "vit": lambda: ViTModel(ViTConfig(**wide), add_pooling_layer=False),
        "dinov3_convnext": lambda: DINOv3ConvNextModel(
            DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], layer_scale_init_value=0.5)
        ),
    }[kind]()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model.eval()


def model_of(kind: str, folder: Path, **options: Any) -> Stage1Model:
    made(kind).save_pretrained(folder / kind)
    config = ModelConfig(backbone=str(folder / kind), **{"image_size": 32, "tap": 1, "auxiliary_hidden": 8, **options})
    return create_model(config, ["none", "roadwork"], "roadwork", 0).eval()


KINDS = ["dinov2_with_registers", "siglip_vision_model", "vit"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_family_gives_its_own_features_and_is_rebuilt(kind: str, tmp_path: Path) -> None:
    model, plain = model_of(kind, tmp_path), made(kind)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = plain(x)
        assert torch.equal(model.backbone(x), outputs.last_hidden_state)
        if kind == "siglip_vision_model":
            assert torch.equal(model.features(x)[1][:, :32], outputs.pooler_output)
            assert model.backbone.n_prefix == 0
        else:
            assert torch.equal(model.features(x)[1][:, :32], outputs.last_hidden_state[:, 0])
        again = rebuild_model(model.architecture)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.eval()(x).logits_b, model(x).logits_b)
        other = model_of(kind, tmp_path, image_size=48)
        assert other(torch.zeros(1, 3, 48, 48)).logits_a.shape == (1, 2)
    info = model.architecture.backbone
    assert (info.hidden_size, info.n_blocks, info.patch_size) == (32, 2, 8)
    with pytest.raises(InputError, match="multiple of the patch size 8"):
        load_backbone(str(tmp_path / kind), 30, pos_embed_rescale=None, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_another_family_learns_by_an_adapter_and_exports(kind: str, tmp_path: Path) -> None:
    model = model_of(kind, tmp_path)
    draw = torch.Generator().manual_seed(2)
    x, y = torch.randn(6, 3, 32, 32, generator=draw), torch.tensor([0, 1, 0, 1, 1, 0])
    adapt(model, "lora", AdapterConfig(rank=2, targets=("q", "k", "v", "o", "up", "down")), 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(6):
        outputs = model.train()(x)
        loss = torch.nn.functional.cross_entropy(outputs.logits_a + outputs.logits_b, y)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        adapted = model.eval()(x).logits_b
        plain = merge(model)
        torch.testing.assert_close(plain(x).logits_b, adapted, rtol=0, atol=1e-4)
    pixels = x.numpy()
    stages = export_onnx(plain, plain.architecture.preprocessing, tmp_path, pixels=pixels)
    assert max(entry.parity for entry in stages.values()) < 1e-4
    stages = export_variants(plain, stages, tmp_path, ["res32"], pixels=pixels, calibration=pixels)
    for stage, entry in stages.items():
        assert (tmp_path / f"{stage}.res32.onnx").is_file()
        assert entry.variants["res32"].parity < 0.05, stage


@pytest.mark.parametrize(("tap", "width"), [(1, 8), (2, 16), (3, 16), (4, 24), (5, 32)])
def test_a_convnext_can_be_tapped_at_every_layer(tap: int, width: int, tmp_path: Path) -> None:
    model, plain = model_of("dinov3_convnext", tmp_path, tap=tap, image_size=56), made("dinov3_convnext")
    x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = plain(x, output_hidden_states=True)
        torch.testing.assert_close(model.backbone(x), outputs.last_hidden_state, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.features(x)[1][:, :32], outputs.pooler_output, rtol=0, atol=1e-5)
        found = model(x)
        logits, gate, hidden = model.stage_a(x)
        assert torch.equal(model.stage_b(hidden), found.logits_b)
        assert torch.equal(logits, found.logits_a)
        assert torch.equal(gate, found.gate_logit)
        assert found.features_a.shape == (2, 2 * width)
        ends = {1: 0, 3: 1, 4: 2}
        if tap in ends:  # what transformers itself gives after a stage, as mean and places
            stage = outputs.hidden_states[ends[tap] + 1]
            assert stage.shape[1] == width
            torch.testing.assert_close(hidden[:, 1:].transpose(1, 2), stage.flatten(2), rtol=0, atol=1e-5)
        assert {one: at.shape[1] for one, at in model.features_at(x, [1, 5]).items()} == {1: 16, 5: 64}
        again = rebuild_model(model.architecture)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again.eval()(x).logits_b, found.logits_b)
    if tap == 3:
        pixels = x.numpy()
        stages = export_onnx(model, model.architecture.preprocessing, tmp_path, pixels=pixels)
        assert max(entry.parity for entry in stages.values()) < 1e-4
        stages = export_variants(model, stages, tmp_path, ["fp16"], pixels=pixels, calibration=pixels)
        variants = [entry.variants["fp16"] for entry in stages.values()]
        assert max(one.parity for one in variants) < 0.05
        assert sum(len(one.block_maxima) for one in variants) == 5
        ends = [float(one.abs().max()) for one in outputs.hidden_states[1:]]
        assert min(max(one.block_maxima) for one in variants if one.block_maxima) >= min(ends) > 0


def test_a_convnext_says_what_it_cannot(tmp_path: Path) -> None:
    model = model_of("dinov3_convnext", tmp_path, image_size=32)
    backbone = model.backbone
    with pytest.raises(InputError, match="res32 must have a vision transformer"):
        backbone.parts(0)
    with pytest.raises(InputError, match="explora must have a vision transformer"):
        make_trainable(backbone, ExploraConfig(), 0)
    with pytest.raises(InputError, match="got q, v"):
        adapt(model, "lora", AdapterConfig(targets=("q", "v")), 0)
    with pytest.raises(InputError, match="at least 32"):
        load_backbone(str(tmp_path / "dinov3_convnext"), 28, pos_embed_rescale=None, seed=0)
    assert load_backbone(str(tmp_path / "dinov3_convnext"), None, pos_embed_rescale=None, seed=0).image_size == 224
    (tmp_path / "saved").mkdir()
    save_backbone(tmp_path / "saved", backbone, backbone.info(str(tmp_path)), model.architecture.preprocessing)
    again = load_backbone(str(tmp_path / "saved"), None, pos_embed_rescale=None, seed=0)
    assert (again.image_size, again.fingerprint()) == (32, backbone.fingerprint())


@pytest.mark.parametrize("mode", ["full", "linear", "lora", "partial"])
def test_a_convnext_trains(mode: str, tmp_path: Path) -> None:
    labels = render_pool(tmp_path / "pool", 60, seed=1, size=32)
    stage1_pro.split(labels, tmp_path / "run", seed=0)
    made("dinov3_convnext").save_pretrained(tmp_path / "base")
    result = stage1_pro.train(
        tmp_path / "run",
        load_config(None, [
            f"model.backbone={tmp_path / 'base'}", "model.image_size=32", "model.tap=3", f"train.mode={mode}",
            "train.epochs=1", "train.workers=0", "gate.views=0", "train.gradient_checkpointing=true",
        ]),
    )  # fmt: skip
    assert np.isfinite(result.best["augrc"])


def test_a_convnext_computes_again_what_it_kept(tmp_path: Path) -> None:
    found = []
    for again in (False, True):
        model = model_of("dinov3_convnext", tmp_path, tap=3).train()
        if again:
            model.backbone.checkpoint_activations()
        outputs = model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)))
        (outputs.logits_a.square().sum() + outputs.logits_b.square().sum()).backward()
        found.append({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
    assert len(found[0]) > 30
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-6)


def test_another_family_trains(tmp_path: Path) -> None:
    labels = render_pool(tmp_path / "pool", 90, seed=1, size=32)
    stage1_pro.split(labels, tmp_path / "run", seed=0)
    made("siglip_vision_model").save_pretrained(tmp_path / "base")
    result = stage1_pro.train(
        tmp_path / "run",
        load_config(None, [
            f"model.backbone={tmp_path / 'base'}", "model.image_size=32", "train.mode=dora", "train.epochs=1",
            "train.workers=0", "gate.views=0", "train.gradient_checkpointing=true",
        ]),
    )  # fmt: skip
    assert np.isfinite(result.best["augrc"])
    assert (tmp_path / "run" / "adapter" / "adapter.json").is_file()


def test_a_family_from_outside_is_one_class(tmp_path: Path) -> None:
    class OwnConfig(Dinov2Config):
        model_type = "own_vit"

    class OwnModel(Dinov2Model):
        config_class = OwnConfig

    class Own(Dinov2):
        model_class, config_class = OwnModel, OwnConfig
        family, licence = "own", "CC0"

    from transformers import AutoConfig

    AutoConfig.register("own_vit", OwnConfig)
    OwnModel(OwnConfig(**SHAPE)).save_pretrained(tmp_path / "own")
    config = ModelConfig(backbone=str(tmp_path / "own"), image_size=32)
    with pytest.raises(InputError, match="own_vit"):
        create_model(config, ["a", "b"], "b", 0)
    BACKBONES.register("own_vit", Own)
    model = create_model(config, ["a", "b"], "b", 0)
    assert model.architecture.backbone.family == "own"
    assert model.architecture.backbone.licence == "CC0"
    assert model(torch.zeros(1, 3, 32, 32)).logits_a.shape == (1, 2)
    shutil.rmtree(tmp_path / "own")
    assert type(rebuild_model(model.architecture).backbone) is Own
