"""Adapters: exact at the start, the same when merged, reloaded and exported, and refused where they do not belong."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import stage1_pro
from stage1_pro import cli
from stage1_pro.config import ADAPTER_MODES, AdapterConfig, ModelConfig, load_config
from stage1_pro.data.synthetic import render_pool
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import sha256_file
from stage1_pro.models.adapters import (
    PEFT_WEIGHTS,
    RECORD,
    TRAINED,
    Adaptation,
    AdapterRecord,
    adapt,
    load_adapted,
    load_adapter,
    merge,
    read_adapter,
    save_adapter,
)
from stage1_pro.models.backbone import backbone_from_config, load_backbone
from stage1_pro.models.model import Stage1Model, create_model
from stage1_pro.record import FileEntry
from stage1_pro.training import checkpoint

LOW_RANK = ("lora", "rslora", "dora")
SMALL = ["model.image_size=32", "train.epochs=2", "train.batch_size=16", "train.workers=0", "train.save_every_steps=2",
         "adapter.rank=4"]  # fmt: skip


def model_of(config: ModelConfig | None = None, seed: int = 0) -> Stage1Model:
    return create_model(config or ModelConfig(tap=2), ["none", "roadwork"], "roadwork", seed).eval()


def pixels(model: Stage1Model, rows: int = 3, seed: int = 1) -> torch.Tensor:
    side = model.architecture.image_size
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def outputs(model: Stage1Model, x: torch.Tensor) -> torch.Tensor:
    """Everything a model says, side by side."""
    with torch.no_grad():
        out = model.eval()(x)
    return torch.cat([out.logits_a, out.logits_b, out.gate_logit[:, None], out.features_a, out.features_b], dim=1)


def learn(model: Stage1Model, steps: int = 3, *, lr: float = 1e-2, bf16: bool = False) -> list[float]:
    """A few optimizer steps on noise; the losses."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    x, labels = pixels(model, 8, seed=2), torch.tensor([0, 1] * 4)
    losses = []
    model.train()
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = model(x)
        loss = sum(torch.nn.functional.cross_entropy(z.float(), labels) for z in (out.logits_a, out.logits_b))
        loss = loss + torch.nn.functional.binary_cross_entropy_with_logits(out.gate_logit.float(), labels.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def adapted(mode: str, options: AdapterConfig | None = None, seed: int = 0) -> tuple[Stage1Model, Adaptation]:
    model = model_of(seed=seed)
    return model, adapt(model, mode, options or AdapterConfig(rank=4), seed)


@pytest.fixture(params=["dinov3", "dinov2"])
def family(request: pytest.FixtureRequest, shared: Callable[[str], Path]) -> ModelConfig:
    if request.param == "dinov3":
        return ModelConfig(tap=2)
    return ModelConfig(backbone=str(shared("weights/dinov2-small")), image_size=56, tap=6)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    """Two blocks of width 32 on 32 pixels, for what is as true of a small model as of a large one."""
    folder = tmp_path_factory.mktemp("small")
    config = {
        "model_type": "dinov3_vit", "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_register_tokens": 4, "pos_embed_rescale": None,
    }  # fmt: skip
    backbone_from_config(config, 32, 0).hf.save_pretrained(folder)
    return ModelConfig(backbone=str(folder), image_size=32, tap=1)


# ------------------------------------------------------------------------------------------------
# At the start, and after a few steps


@pytest.mark.parametrize("mode", LOW_RANK)
@pytest.mark.parametrize("init", ["default", "gaussian"])
def test_an_adapter_starts_at_exactly_the_bases_outputs(family: ModelConfig, mode: str, init: str) -> None:
    model = model_of(family)
    x = pixels(model, 2)
    before = outputs(model, x)
    adaptation = adapt(model, mode, AdapterConfig(init=init, targets=("q", "k", "v", "o", "up", "down")), 0)
    assert torch.equal(outputs(model, x), before)
    per_projection = 3 if mode == "dora" else 2
    assert len(adaptation.peft_keys) == 6 * per_projection * model.backbone.n_blocks


@pytest.mark.parametrize("mode", ["apla", "partial"])
def test_the_same_words_name_the_same_parts_of_both_families(family: ModelConfig, mode: str) -> None:
    model = model_of(family)
    blocks, width = model.backbone.n_blocks, model.backbone.hidden_size
    x = pixels(model, 2)
    before = outputs(model, x)
    adaptation = adapt(model, mode, AdapterConfig(), 0)
    assert torch.equal(outputs(model, x), before)
    own = [k for k in adaptation.keys if k.startswith("backbone.") and k not in adaptation.peft_keys]
    if mode == "apla":
        assert not adaptation.peft_keys
        assert len(own) == 2 * blocks
        assert all(re.search(r"\.o_proj\.(weight|bias)$", k) for k in own)
        assert sum(model.state_dict()[k].numel() for k in own) == blocks * (width * width + width)
    else:
        inside = f".{blocks - 1}."
        assert len(adaptation.peft_keys) == 4 * 2 * (blocks - 1)
        assert not any(inside in k for k in adaptation.peft_keys)
        assert {k for k in own if inside not in k} == {k for k in own if k.split(".")[2] in {"norm", "layernorm"}}
        whole = sum(p.numel() for p in model.backbone.blocks[-1].parameters())
        norm = sum(p.numel() for p in model.backbone.norm.parameters())
        assert sum(model.state_dict()[k].numel() for k in own) == whole + norm


@pytest.mark.parametrize("mode", ADAPTER_MODES)
def test_only_what_the_mode_names_changes(mode: str) -> None:
    model, adaptation = adapted(mode)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    learn(model)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == set(adaptation.keys)
    expected = {
        "apla": r"(heads|norm_a)\.|.*\.o_proj\.(weight|bias)$",
        "partial": r"(heads|norm_a)\.|backbone\.hf\.(model\.layer\.3\.|norm\.)|.*\.[012]\..*\.lora_[AB]\.",
        "dora": r"(heads|norm_a)\.|.*\.lora_(A|B|magnitude_vector)\.",
    }.get(mode, r"(heads|norm_a)\.|.*\.lora_[AB]\.")
    assert all(re.match(expected, name) for name in changed), changed
    assert adaptation.trainable == sum(model.state_dict()[name].numel() for name in changed)
    assert adaptation.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("mode", "init"),
    [
        (mode, init)
        for mode in ADAPTER_MODES
        for init in ("default", "gaussian", "pissa", "olora")
        if mode != "apla" or init == "default"  # which has nothing to initialise
    ],
)
def test_merged_equals_unmerged(small: ModelConfig, mode: str, init: str) -> None:
    model = model_of(small)
    adapt(model, mode, AdapterConfig(rank=4, init=init), 0)
    start = outputs(model, pixels(model))
    learn(model, 5)
    x = pixels(model, 4)
    wanted = outputs(model, x)
    assert float((outputs(model, pixels(model)) - start).abs().max()) > 1e-2, "nothing was learned"
    state = {k: v.clone() for k, v in model.state_dict().items()}
    plain = merge(model)
    torch.testing.assert_close(outputs(plain, x), wanted, rtol=0, atol=1e-4)
    assert set(plain.state_dict()) == set(model_of(small).state_dict())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), "merging must leave the model alone"


@pytest.mark.parametrize("mode", LOW_RANK)
def test_pefts_own_merge_agrees(mode: str) -> None:
    model, adaptation = adapted(mode)
    learn(model, 5)
    ours = merge(model).backbone.hf.state_dict()
    theirs = adaptation.handle.merge_and_unload(safe_merge=True).state_dict()
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-6)


def test_a_merged_model_is_the_same_in_onnx(tmp_path: Path) -> None:
    from stage1_pro.deploy.onnx import export_onnx

    model, _ = adapted("dora")
    learn(model, 5)
    plain = merge(model)
    stages = export_onnx(plain, plain.architecture.preprocessing, tmp_path, pixels=pixels(plain, 4).numpy())
    assert all(entry.parity <= 1e-3 for entry in stages.values())
    import onnxruntime

    x = pixels(model, 3)
    session = onnxruntime.InferenceSession(tmp_path / "stage_a.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = model(x).logits_a.numpy()
    np.testing.assert_allclose(session.run(["logits"], {"pixels": x.numpy()})[0], wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("mode", ["full", *ADAPTER_MODES])
def test_gradient_checkpointing_and_bf16_work_in_every_mode(small: ModelConfig, mode: str) -> None:
    def start(*, saving: bool) -> Stage1Model:
        model = model_of(small)
        if mode != "full":
            adapt(model, mode, AdapterConfig(rank=4, dropout=0.1), 0)
        model.backbone.hf.embeddings.mask_token.requires_grad_(False)
        if saving:
            model.backbone.checkpoint_activations()
        return model

    plain, saving = start(saving=False), start(saving=True)
    calls = {id(model): 0 for model in (plain, saving)}
    for model in (plain, saving):

        def count(*_: object, own: int = id(model)) -> None:
            calls[own] += 1

        model.backbone.blocks[1].mlp.register_forward_hook(count)
    assert learn(plain, 2) == learn(saving, 2)
    assert [calls[id(plain)], calls[id(saving)]] == [2, 4], "every block must be computed again on the way back"
    assert all(torch.equal(v, saving.state_dict()[k]) for k, v in plain.state_dict().items())
    low = start(saving=True)
    assert learn(low, 2, bf16=True) == pytest.approx(learn(start(saving=False), 2), rel=0.05)
    assert all(p.dtype == torch.float32 for p in low.parameters())


def test_adapters_draw_from_a_stream_of_their_own() -> None:
    torch.manual_seed(1)
    stream = torch.get_rng_state()
    models = {mode: adapted(mode, seed=7)[0].state_dict() for mode in ADAPTER_MODES}
    assert torch.equal(stream, torch.get_rng_state()), "adapting must not use the caller's stream"
    first = models["lora"]
    for mode, state in models.items():
        heads = [k for k in first if k.startswith("heads.")]
        assert all(torch.equal(state[k], first[k]) for k in heads), f"heads of {mode}"
    again = adapted("lora", seed=7)[0].state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    name = next(k for k in first if ".lora_A." in k)
    assert torch.equal(models["dora"][name], first[name])
    assert not torch.equal(adapted("lora", seed=8)[0].state_dict()[name], first[name])


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        (
            "lora",
            {"targets": ("q", "gate")},
            r"adapter.targets must be projections .* \(q, k, v, o, up, down\), got gate",
        ),
        ("apla", {"targets": ("q",)}, "adapter.targets must be null with mode apla"),
        ("partial", {"blocks": 4}, "adapter.blocks must be fewer than the 4 blocks, got 4; .* use mode full"),
        ("lora", {"rank": 200}, "adapter.rank must be at most the 128 features of a projection, got 200"),
    ],
)
def test_options_without_a_use_are_told(mode: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        adapt(model_of(), mode, AdapterConfig(**options), 0)


def test_rank_zero_names_mode_linear() -> None:
    with pytest.raises(InputError, match="rank must .*1.*got 0.*mode linear"):
        load_config(None, ["train.mode=lora", "adapter.rank=0"])


def test_a_model_is_adapted_once() -> None:
    model, _ = adapted("lora")
    with pytest.raises(InputError, match="must be in its plain form"):
        adapt(model, "dora", AdapterConfig(), 0)


# ------------------------------------------------------------------------------------------------
# The folder


def save(folder: Path, model: Stage1Model, adaptation: Adaptation) -> None:
    save_adapter(
        folder, adaptation, model.architecture, model.state_dict(), model_fingerprint=merge(model).fingerprint()
    )


RELOAD = """\
import pathlib, sys, torch
from stage1_pro.models.adapters import load_adapted
for folder in pathlib.Path(sys.argv[1]).iterdir():
    with torch.no_grad():
        out = load_adapted(folder / "adapter", "tiny")(torch.load(folder / "x.pt", weights_only=True))
    torch.save([out.logits_a, out.logits_b, out.gate_logit], folder / "y.pt")
"""


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_outputs(tmp_path: Path) -> None:
    wanted = {}
    for mode, init in (*((mode, "default") for mode in ADAPTER_MODES), ("lora", "pissa"), ("lora", "olora")):
        model, adaptation = adapted(mode, AdapterConfig(rank=4, init=init), seed=5)
        learn(model, 5)
        folder = tmp_path / f"{mode}-{init}"
        save(folder / "adapter", model, adaptation)
        x = pixels(model, 4)
        torch.save(x, folder / "x.pt")
        with torch.no_grad():
            out = model(x)
        wanted[folder] = (out.logits_a, out.logits_b, out.gate_logit)
    subprocess.run([sys.executable, "-c", RELOAD, tmp_path], check=True)
    for folder, values in wanted.items():
        for found, value in zip(torch.load(folder / "y.pt"), values, strict=True):
            torch.testing.assert_close(found, value, rtol=0, atol=1e-5)


def test_the_folder_is_byte_reproducible_and_small(tmp_path: Path) -> None:
    model, adaptation = adapted("lora")
    for name in ("a", "b"):
        save(tmp_path / name, model, adaptation)
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {RECORD, "adapter_config.json", PEFT_WEIGHTS, TRAINED}
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    record = read_adapter(tmp_path / "a")
    tensors = {**load_file(tmp_path / "a" / PEFT_WEIGHTS), **load_file(tmp_path / "a" / TRAINED)}
    assert sum(t.numel() for t in tensors.values()) == record.trainable_parameters < 0.2 * record.parameters
    assert str(tmp_path) not in (tmp_path / "a" / RECORD).read_text()


def test_peft_itself_reads_the_folder(tmp_path: Path) -> None:
    model, adaptation = adapted("dora", seed=4)
    learn(model, 5)
    save(tmp_path / "adapter", model, adaptation)
    hf = load_backbone("tiny", None, pos_embed_rescale=None, seed=4).hf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that is about to go
        theirs = PeftModel.from_pretrained(hf, tmp_path / "adapter").eval()
    x = pixels(model)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).last_hidden_state, model.backbone(x), rtol=0, atol=1e-5)


def reseal(folder: Path, **changes: object) -> None:
    """Make a folder whose hashes are right again after a change, as another program or version would write it."""
    record = AdapterRecord.read(folder / RECORD)
    files = {
        p.name: FileEntry(sha256=sha256_file(p), size=p.stat().st_size) for p in folder.iterdir() if p.name != RECORD
    }
    record.model_copy(update={"files": files, **changes}).sealed().write(folder / RECORD)


def rename(folder: Path, file: str, change: Callable[[str], str | None]) -> dict[str, list[int]]:
    tensors = {change(k): v for k, v in load_file(folder / file).items()}
    kept = {k: v for k, v in tensors.items() if k is not None}
    save_file(kept, folder / file, metadata={"format": "pt"})
    return {k: list(v.shape) for k, v in kept.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, adaptation = adapted("lora")
    learn(model, 1)
    save(tmp_path / "adapter", model, adaptation)
    return tmp_path / "adapter"


def refused(folder: Path, message: str, model: Stage1Model | None = None) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_adapter(folder, model or model_of())


def test_the_folder_as_written_is_taken(folder: Path) -> None:
    load_adapter(folder, model_of())
    reseal(folder)
    load_adapter(folder, model_of())


@pytest.mark.parametrize("name", [PEFT_WEIGHTS, TRAINED, "adapter_config.json", RECORD])
def test_a_flipped_byte_is_refused(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    place = data.index(b'"epoch": null') + 9 if name == RECORD else len(data) // 2
    data[place : place + 4] = b"   7" if name == RECORD else bytes([data[place] ^ 1, *data[place + 1 : place + 4]])
    (folder / name).write_bytes(data)
    refused(folder, "was changed")


def test_missing_and_extra_files_are_refused(folder: Path) -> None:
    (folder / "more.bin").write_bytes(b"")
    refused(folder, "extra: more.bin")
    (folder / "more.bin").unlink()
    (folder / TRAINED).unlink()
    refused(folder, f"missing: {TRAINED}")
    shutil.rmtree(folder)
    refused(folder, f"must be a folder that holds {RECORD}")


@pytest.mark.parametrize("file", [PEFT_WEIGHTS, TRAINED])
def test_missing_and_unexpected_keys_are_refused(folder: Path, file: str) -> None:
    field = "adapter" if file == PEFT_WEIGHTS else "trained"
    first = min(load_file(folder / file))
    reseal(folder, **{field: rename(folder, file, lambda key: None if key == first else key)})
    refused(folder, f"missing keys: {re.escape(first)}")
    reseal(folder, **{field: rename(folder, file, lambda key: f"{key}.extra" if key.endswith("weight") else key)})
    refused(folder, "unexpected keys: .*extra")


def test_another_layout_of_the_blocks_is_refused(folder: Path) -> None:
    shapes = rename(folder, PEFT_WEIGHTS, lambda key: key.replace("model.model.layer.", "model.layer."))
    reseal(folder, adapter=shapes)
    refused(folder, "missing keys: base_model.model.model.layer.0")
    reseal(folder, adapter=shapes, layout="layer")
    refused(folder, r"whose blocks lie at model.layer, got layer \(transformers")


def test_another_base_is_refused(folder: Path) -> None:
    refused(folder, "must be put on the weights it was trained on", model_of(seed=1))
    touched = model_of()
    with torch.no_grad():
        touched.backbone.blocks[3].mlp.up_proj.weight[0, 0] += 1e-6
    refused(folder, "must be put on the weights it was trained on", touched)


def test_another_architecture_is_refused(folder: Path) -> None:
    refused(folder, "differs in tap: 2 instead of 3", model_of(ModelConfig(tap=3)))
    other = create_model(ModelConfig(tap=2), ["a", "b"], "b", 0)
    refused(folder, r"differs in classes: \['none', 'roadwork'\] instead of \['a', 'b'\]", other)


def test_a_base_may_move_to_another_folder(tmp_path: Path) -> None:
    for name in ("here", "there"):
        load_backbone("tiny", None, pos_embed_rescale=None, seed=4).hf.save_pretrained(tmp_path / name)
    model = model_of(ModelConfig(backbone=str(tmp_path / "here"), image_size=48, tap=2))
    save(tmp_path / "adapter", model, adapt(model, "lora", AdapterConfig(), 0))
    load_adapted(tmp_path / "adapter", str(tmp_path / "there"))


# ------------------------------------------------------------------------------------------------
# Training


@pytest.fixture
def run(streets_run: Path, tmp_path: Path) -> Path:
    """A fresh copy of the split run."""
    return shutil.copytree(streets_run, tmp_path / "run")


def trained(run: Path, mode: str, *overrides: str, **options: bool) -> Path:
    stage1_pro.train(run, load_config(None, [*SMALL, f"train.mode={mode}", *overrides]), **options)
    return run


def same_artefacts(a: Path, b: Path) -> None:
    for name in ("model_best.pth", "model_best_acc.pth", "last.pth", "val_calib.npz", "gate.json",
                 *(f"adapter/{p.name}" for p in (a / "adapter").iterdir())):  # fmt: skip
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.parametrize("mode", ["dora", "partial"])
def test_a_run_holds_the_merged_model_and_its_adapter(run: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    trained(run, mode, "model.tap=2", "adapter.dropout=0.1")
    record = read_adapter(run / "adapter")
    share = 100 * record.trainable_parameters / record.parameters
    assert f"mode {mode}:" in (said := capsys.readouterr().err)
    assert f"trained ({share:.1f}%)" in said
    plain, _ = checkpoint.load_run_model(run)
    # the refitted gate too
    assert plain.fingerprint() == record.model_fingerprint
    assert torch.load(run / "model_best.pth", weights_only=True)["joint_gate_state_dict"]
    back = load_adapted(run / "adapter", "tiny")
    x = pixels(plain, 6)
    torch.testing.assert_close(outputs(back, x), outputs(plain, x), rtol=0, atol=1e-4)
    last = torch.load(run / "last.pth", weights_only=True)
    assert sum(v.numel() for v in last["model_state_dict"].values()) == record.trainable_parameters
    base = create_model(ModelConfig(tap=2), ["none", "roadwork"], "roadwork", 0).state_dict()
    state = plain.state_dict()
    touched = {k for k in base if k.startswith("backbone.") and not torch.equal(state[k], base[k])}
    inside = r".*\.attention\.[qkvo]_proj\.weight$"
    whole = r"backbone\.hf\.(model\.layer\.3|norm)\." if mode == "partial" else "never"
    assert touched
    assert all(re.match(rf"{inside}|{whole}", k) for k in touched), touched


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["lora", "apla"])
def test_a_resumed_training_reaches_the_same_bytes(
    run: Path, streets_run: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("adapter.dropout=0.1", "train.epochs=3")
    trained(run, mode, *options)
    other = shutil.copytree(streets_run, tmp_path / "other")
    from stage1_pro.training import loop, validate

    adapter, last, refit = validate.save_adapter, validate.save_last, validate.replace_trained
    calls = iter(range(100))

    def killed(place: object, name: str, act: Callable[..., object]) -> None:
        again = (other / "last.pth").exists()
        with monkeypatch.context() as patch:
            patch.setattr(place, name, act)
            with pytest.raises(KeyboardInterrupt):
                trained(other, mode, *options, resume=again)

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def second(*arguments: object) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        last(*arguments)

    def after(*arguments: object) -> None:
        refit(*arguments)
        raise KeyboardInterrupt

    killed(validate, "save_adapter", dies)  # model_best.pth stands, its adapter does not
    assert not (other / "adapter").exists()
    killed(loop, "save_last", second)  # inside a later epoch
    killed(validate, "replace_trained", after)  # the adapter's gate is refitted, that of model_best.pth is not
    record = read_adapter(other / "adapter")
    assert record.model_fingerprint != checkpoint.load_model(other / "model_best.pth").fingerprint()
    assert validate.save_adapter is adapter
    trained(other, mode, *options, resume=True)
    same_artefacts(run, other)


@pytest.mark.parametrize("mode", ["lora", "linear"])
def test_a_resume_on_another_base_is_refused(run: Path, tmp_path: Path, mode: str) -> None:
    base = tmp_path / "base"
    load_backbone("tiny", None, pos_embed_rescale=None, seed=4).hf.save_pretrained(base)
    options = (f"model.backbone={base}", "model.image_size=48", "train.epochs=1")
    trained(run, mode, *options)
    stage1_pro.train(run, resume=True)
    load_backbone("tiny", None, pos_embed_rescale=None, seed=5).hf.save_pretrained(base)
    with pytest.raises(ArtifactError, match="must be resumed on the base it was trained on"):
        stage1_pro.train(run, resume=True)


def test_checkpointing_changes_no_byte(run: Path, streets_run: Path, tmp_path: Path) -> None:
    trained(run, "lora", "train.epochs=1")
    other = shutil.copytree(streets_run, tmp_path / "other")
    trained(other, "lora", "train.epochs=1", "train.gradient_checkpointing=true")
    same_artefacts(run, other)
    stage1_pro.train(run, load_config(None, ["train.gradient_checkpointing=true"]), resume=True)


def test_a_new_training_forgets_the_adapter(run: Path) -> None:
    trained(run, "lora", "train.epochs=1")
    left = run / ".adapter.x.tmp"
    left.mkdir()
    trained(run, "full", "train.epochs=1", overwrite=True)
    assert not (run / "adapter").exists()
    assert not left.exists()


def test_bf16_training_merges_in_fp32(run: Path) -> None:
    trained(run, "lora", "train.epochs=1", "train.precision=bf16")
    plain, _ = checkpoint.load_run_model(run)
    x = pixels(plain)
    torch.testing.assert_close(outputs(load_adapted(run / "adapter", "tiny"), x), outputs(plain, x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("own", [True, False])
def test_merge_writes_a_plain_backbone(tmp_path: Path, own: bool, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    load_backbone("tiny", None, pos_embed_rescale=None, seed=4).hf.save_pretrained(base)
    if own:
        values = {"image_mean": [0.4, 0.4, 0.4], "image_std": [0.2, 0.2, 0.2], "image_processor_type": "own"}
        (base / "preprocessor_config.json").write_text(json.dumps(values))
    model = model_of(ModelConfig(backbone=str(base), image_size=48, tap=2))
    adaptation = adapt(model, "dora", AdapterConfig(rank=4), 0)
    learn(model, 5)
    save(tmp_path / "adapter", model, adaptation)
    capsys.readouterr()
    facts = stage1_pro.merge(tmp_path / "adapter", str(base), tmp_path / "out")
    assert "Writing model shards" not in capsys.readouterr().err, "a bar of its own"
    for path in (tmp_path / "out" / "model.safetensors", tmp_path / "adapter" / "trained.safetensors"):
        assert path.stat().st_mode & 0o777 == 0o644, path.name
    plain = AutoModel.from_pretrained(tmp_path / "out").eval()
    x = pixels(model)
    with torch.no_grad():
        torch.testing.assert_close(plain(x).last_hidden_state, model.backbone(x), rtol=0, atol=1e-4)
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "dinov3_vit"
    again = create_model(ModelConfig(backbone=str(tmp_path / "out")), ["a", "b"], "b", 0)
    assert again.backbone.fingerprint() == facts["fingerprint"] != facts["base_fingerprint"]
    assert again.architecture.image_size == 48, "it is read at the size it was trained at"
    assert again.architecture.preprocessing == model.architecture.preprocessing
    origin, start = again.architecture.backbone, model.architecture.backbone
    assert (origin.source, origin.licence) == (f"{start.source} + dora", start.licence)
    assert "may be passed on only together with the DINOv3 License" in (
        tmp_path / "out" / "LICENCE-BACKBONE.txt"
    ).read_text().replace("\n", " ")
    with pytest.raises(InputError, match="must be a new folder.*--overwrite"):
        stage1_pro.merge(tmp_path / "adapter", str(base), tmp_path / "out")
    stage1_pro.merge(tmp_path / "adapter", str(base), tmp_path / "out", overwrite=True)
    with pytest.raises(InputError, match="holds something; choose another folder"):
        stage1_pro.merge(tmp_path / "adapter", str(base), tmp_path, overwrite=True)
    with pytest.raises(ArtifactError, match="must be put on the weights it was trained on"):
        stage1_pro.merge(tmp_path / "adapter", str(tmp_path / "out"), tmp_path / "twice")


@pytest.mark.slow
def test_the_manuals_page_runs_and_merges_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(stage1_pro.__file__).parent / "manual" / "adapters.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["yaml", "sh", "python"]
    monkeypatch.chdir(tmp_path)
    labels = render_pool(Path("pool"), 240, seed=1, size=64)
    stage1_pro.split(labels, "run", seed=0)
    # Nothing but the size is other than as printed.
    little = {
        "train": ["--set", "train.epochs=4", "--set", "train.batch_size=32", "--set", "train.workers=0"],
        "calibrate": ["--fnr", "0.99"],
    }
    for kind, block in blocks:
        if kind == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", block)
            assert name is not None
            Path(name[1]).write_text(block)
        elif kind == "sh":
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                assert words[0] == "stage1"
                assert cli.main([*words[1:], *little.get(words[1], [])]) == 0, (line, capsys.readouterr().err)
        else:
            names: dict[str, object] = {}
            exec(compile(block, "adapters.md", "exec"), names)
    assert json.loads(Path("run/bundle/bundle.json").read_text())["provenance"]["model_fingerprint"] == (
        read_adapter("run/adapter").model_fingerprint
    )
    merged = create_model(ModelConfig(backbone="backbone", image_size=48), ["a", "b"], "b", 0)
    kept = checkpoint.load_run_model(Path("run"))[0]
    assert merged.backbone.fingerprint() == kept.backbone.fingerprint()
    plain = names["plain"]
    assert isinstance(plain, Stage1Model)
    x = pixels(plain)
    torch.testing.assert_close(outputs(plain, x), outputs(kept, x), rtol=0, atol=1e-4)


def test_every_mode_draws_the_same_heads_and_batches(
    streets_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stage1_pro.training import loop

    seen: dict[str, list[torch.Tensor]] = {}

    def look(session: loop.Session, _: loop.State, batch: loop.Batch) -> None:
        mode = session.config.train.mode
        found = seen.setdefault(mode, [p.detach().clone() for p in session.model.heads.parameters()])
        found += [*batch.inputs, batch.labels, torch.get_rng_state()]
        if len(found) > 2 * 3 + len(list(session.model.heads.parameters())):
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "learn", look)
    for mode in ("full", *ADAPTER_MODES):
        with pytest.raises(KeyboardInterrupt):
            trained(shutil.copytree(streets_run, tmp_path / mode), mode)
    for mode, found in seen.items():
        assert len(found) == len(seen["full"])
        assert all(torch.equal(a, b) for a, b in zip(found, seen["full"], strict=True)), mode
