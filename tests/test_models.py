"""Models: the split is the whole, real weights load, and what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from transformers import Dinov2Model

from stage1_pro.config import ModelConfig
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.models.backbone import PRESETS, load_backbone
from stage1_pro.models.model import Architecture, Stage1Model, create_model, rebuild_model
from stage1_pro.training import checkpoint


def tiny(tap: int | None = None, seed: int = 0) -> Stage1Model:
    return create_model(ModelConfig(tap=tap), ["none", "roadwork"], "roadwork", seed).eval()


def pixels(model: Stage1Model, rows: int = 3) -> torch.Tensor:
    side = model.architecture.image_size
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tap", [1, 2, 3, 4])
def test_split_at_any_block_is_bit_identical_to_the_whole(tap: int) -> None:
    model = tiny(tap)
    x = pixels(model, 5)
    with torch.no_grad():
        whole = model(x)
        logits, gate, hidden = model.stage_a(x)
        assert torch.equal(logits, whole.logits_a)
        assert torch.equal(gate, whole.gate_logit)
        assert torch.equal(model.stage_b(hidden), whole.logits_b)
        deferred = torch.tensor([0, 3])
        torch.testing.assert_close(model.stage_b(hidden[deferred]), whole.logits_b[deferred], rtol=0, atol=1e-6)
        assert torch.equal(model.backbone(x), model.backbone.hf(x).last_hidden_state)


def test_training_mode_shares_one_rope_draw_between_both_stages() -> None:
    model = create_model(ModelConfig(tap=2, pos_embed_rescale=2.0), ["a", "b"], "b", 0).train()
    x = pixels(model)
    torch.manual_seed(5)
    whole = model(x).logits_b
    torch.manual_seed(5)
    tokens, context = model.backbone.embed(x)
    features = model.backbone.pool(model.backbone.norm(model.backbone.run_blocks(tokens, context, 0, 4)))
    assert torch.equal(model.heads.auxiliary(features), whole)
    assert not torch.equal(model.eval()(x).logits_b, whole)


def test_stage_a_features_are_cls_and_mean_patch_token() -> None:
    model = tiny()
    x = pixels(model)
    with torch.no_grad():
        last = model.backbone.hf(x).last_hidden_state
        features, _ = model.features(x)
    registers = PRESETS["tiny"]["num_register_tokens"]
    assert torch.equal(features[:, :128], last[:, 0])
    torch.testing.assert_close(features[:, 128:], last[:, 1 + registers :].mean(1), rtol=0, atol=1e-6)


def test_dinov2_weights_load_by_the_same_door(shared) -> None:  # type: ignore[no-untyped-def]
    folder = shared("weights/dinov2-small")
    model = create_model(ModelConfig(backbone=str(folder), image_size=56, tap=6), ["a", "b", "c"], "c", 0).eval()
    x = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mine = model.backbone(x)
        theirs = Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()(x).last_hidden_state
        assert torch.equal(mine, theirs)
        _, _, hidden = model.stage_a(x)
        assert torch.equal(model.stage_b(hidden), model(x).logits_b)
    assert model.architecture.preprocessing.resample == "bicubic"
    assert str(folder) not in model.architecture.model_dump_json()


def test_rebuilt_model_has_the_same_fingerprint_and_outputs() -> None:
    model = tiny(2, seed=3)
    again = rebuild_model(Architecture.parse(model.architecture.model_dump_json(), "text"))
    assert again.fingerprint() != model.fingerprint()
    again.load_state_dict(model.state_dict())
    assert again.fingerprint() == model.fingerprint()
    x = pixels(model)
    with torch.no_grad():
        assert torch.equal(again.eval()(x).logits_a, model(x).logits_a)


def test_heads_and_backbone_start_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = tiny(seed=7).state_dict()
    torch.manual_seed(2)
    stream = torch.get_rng_state()
    second = tiny(seed=7).state_dict()
    assert torch.equal(stream, torch.get_rng_state()), "building a model must not use the caller's stream"
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = tiny(seed=8).state_dict()
    assert not torch.equal(first["heads.classifier.1.weight"], other["heads.classifier.1.weight"])
    assert not torch.equal(first["backbone.hf.embeddings.cls_token"], other["backbone.hf.embeddings.cls_token"])


def test_gate_passes_no_gradient_back() -> None:
    model = tiny(2).train()
    torch.nn.init.ones_(model.heads.gate.linear.weight)
    model(pixels(model)).gate_logit.sum().backward()
    touched = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert touched == ["heads.gate.linear.weight", "heads.gate.linear.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backbone": "tinny"},
            r"must be a preset \(tiny, narrow\), an existing folder or a hub id .*did you mean 'tiny'",
        ),
        ({"backbone": "./nowhere"}, "must be a preset"),
        ({"image_size": 50}, "must be a multiple of the patch size 8, got 50; use 48 or 56"),
        ({"tap": 5}, "model.tap must be a block from 1 to 4, got 5"),
    ],
)
def test_wrong_model_options_are_told(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        create_model(ModelConfig(**options), ["a", "b"], "b", 0)


def test_a_foreign_model_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="dinov3_vit, .*got 'bert'"):
        load_backbone(str(tmp_path), None, pos_embed_rescale=None, seed=0)


def test_weights_with_missing_keys_are_refused(tmp_path: Path) -> None:
    backbone = load_backbone("tiny", None, pos_embed_rescale=None, seed=0)
    state = {k: v for k, v in backbone.hf.state_dict().items() if "norm2" not in k}
    backbone.hf.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ArtifactError, match="missing .*norm2"):
        load_backbone(str(tmp_path), 48, pos_embed_rescale=None, seed=0)


def test_a_saved_dinov3_folder_loads_bit_identical(tmp_path: Path) -> None:
    backbone = load_backbone("tiny", None, pos_embed_rescale=None, seed=4).eval()
    backbone.hf.save_pretrained(tmp_path)
    again = load_backbone(str(tmp_path), 48, pos_embed_rescale=None, seed=0).eval()
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(backbone(x), again(x))


def test_checkpoint_roundtrip_is_byte_reproducible(tmp_path: Path) -> None:
    model = tiny(2)
    for name in ("a.pth", "b.pth"):
        checkpoint.save_model(tmp_path / name, model, model.state_dict(), epoch=1, figures={"augrc": 0.1})
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    loaded = checkpoint.load(tmp_path / "a.pth")
    checkpoint.save(tmp_path / "c.pth", loaded)
    assert (tmp_path / "c.pth").read_bytes() == (tmp_path / "a.pth").read_bytes()
    assert checkpoint.load_model(tmp_path / "a.pth").fingerprint() == model.fingerprint()


def test_a_foreign_checkpoint_names_what_differs(tmp_path: Path) -> None:
    two, four = tiny(2), tiny(4)
    path = tmp_path / "model_best.pth"
    checkpoint.save_model(path, two, two.state_dict())
    with pytest.raises(ArtifactError, match=r"it differs in tap: 2 instead of 4"):
        checkpoint.load_model(path, four.architecture)
    state = dict(two.state_dict())
    state["heads.classifier.1.weight"] = torch.zeros(3, 256)
    del state["norm_a.bias"]
    state["extra"] = torch.zeros(1)
    checkpoint.save_model(path, two, state)
    with pytest.raises(ArtifactError) as error:
        checkpoint.load_model(path)
    assert "missing keys: norm_a.bias" in str(error.value)
    assert "unexpected keys: extra" in str(error.value)
    assert "heads.classifier.1.weight [3, 256] instead of [2, 256]" in str(error.value)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ArtifactError, match=r"must be a stage1_pro checkpoint .* got \['state_dict'\]"):
        checkpoint.load_model(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="must be a checkpoint that loads"):
        checkpoint.load_model(path)
    with pytest.raises(ArtifactError, match="run `stage1 train` first"):
        checkpoint.load_model(tmp_path / "none.pth")


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(tmp_path / "ran"),))

    torch.save({"architecture": Evil(), "model_state_dict": {}}, tmp_path / "evil.pth")
    with pytest.raises(ArtifactError):
        checkpoint.load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()
