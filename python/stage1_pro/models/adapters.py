"""Adapters: a backbone trained in a small part (peft, or some of its own weights), and how that part travels.

An adapted model is the same ``Stage1Model``: peft puts its layers into the transformers model in place, and its handle
is kept beside the model, not in it. What leaves training is either the merged plain model (``merge``), which is what
every later station reads, or the adapter's folder (``save_adapter``), a few per cent of its size, which
``load_adapter`` puts back on the same base.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stage1_pro.config import AdapterConfig, AdapterMode, ModelConfig, Target
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import atomic_directory, permit, recover_directory, sha256_file
from stage1_pro.models.backbone import Backbone
from stage1_pro.models.model import (
    Architecture,
    Stage1Model,
    check_architecture,
    check_tensors,
    create_model,
    rebuild_model,
)
from stage1_pro.record import FileEntry, Record, list_files

RECORD = "adapter.json"
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRAINED = "trained.safetensors"
_BODY = "backbone.hf."
_PEFT = "base_model.model."


class AdapterRecord(Record):
    """``adapter.json``: what an adapter holds, which base it belongs on, and the hash of every other file."""

    format_version: Literal[1] = 1
    mode: AdapterMode
    options: AdapterConfig
    seed: int
    architecture: Architecture
    base_fingerprint: str
    layout: str
    adapter: dict[str, list[int]]
    trained: dict[str, list[int]]
    trainable_parameters: int
    parameters: int
    epoch: int | None
    split_hashes: dict[str, str]
    model_fingerprint: str
    versions: dict[str, str]
    files: dict[str, FileEntry]
    seal: str = ""

    def sealed(self) -> AdapterRecord:
        """The same with the hash of everything else in ``seal``."""
        plain = self.model_copy(update={"seal": ""})
        return plain.model_copy(update={"seal": plain.fingerprint()})


@dataclass(frozen=True)
class Adaptation:
    """What was done to a model: which of its weights learn, and peft's handle on them where it is used.

    ``keys`` are the names in the model's ``state_dict`` of all that is trained, heads included; ``peft_keys`` those
    that peft added. ``parameters`` counts all of the adapted model, ``trainable`` those that learn.
    """

    mode: AdapterMode
    options: AdapterConfig
    seed: int
    base_fingerprint: str
    layout: str
    keys: tuple[str, ...]
    peft_keys: tuple[str, ...]
    parameters: int
    trainable: int
    handle: PeftModel | None

    def learned(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The part of a state dict that training changes."""
        return {key: state[key] for key in self.keys}


def adapt(model: Stage1Model, mode: AdapterMode, options: AdapterConfig, seed: int) -> Adaptation:
    """Freeze a model but for what the mode trains; in place, with no draw from the caller's generator.

    Heads and Stage A's own norm are always trained. The rest of the backbone stays as it is; its dropout, dropped paths
    and RoPE rescaling, where its configuration has any, act in ``.train()`` as they do in mode full. Options that the
    mode has no use for are not read: arms of a comparison may share a section. ``model`` is on the CPU and plain.

    Raises:
        InputError: a target that this backbone lacks, more blocks than it has, or a model that has an adapter already.
    """
    if any(isinstance(module, LoraLayer) for module in model.modules()):
        raise InputError("model must be in its plain form, got one with an adapter in it; merge it first")
    backbone = model.backbone
    base, layout = backbone.fingerprint(), backbone.layout
    model.requires_grad_(False)
    handle = None
    if mode == "apla":
        if options.targets is not None:
            raise InputError(
                "adapter.targets must be null with mode apla, which trains the attentions' output projections, "
                f"got {', '.join(options.targets)}; choose mode lora for others"
            )
        for name in _projections(backbone, ("o",), backbone.n_blocks):
            backbone.body.get_submodule(name).requires_grad_(True)
    else:
        whole = options.blocks if mode == "partial" else 0
        if whole >= backbone.n_blocks:
            raise InputError(
                f"adapter.blocks must be fewer than the {backbone.n_blocks} blocks, got {whole}; "
                "to train every weight use mode full"
            )
        handle = _insert(backbone, mode, options, backbone.n_blocks - whole, seed)
        if whole:
            backbone.norm.requires_grad_(True)
            for block in backbone.blocks[-whole:]:
                block.requires_grad_(True)
    model.heads.requires_grad_(True)
    model.norm_a.requires_grad_(True)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    added = tuple(name for name in trained if ".lora_" in name)
    return Adaptation(
        mode, options, seed, base, layout, tuple(trained), added,
        sum(p.numel() for p in model.parameters()), sum(trained.values()), handle,
    )  # fmt: skip


def _insert(backbone: Backbone, mode: AdapterMode, options: AdapterConfig, blocks: int, seed: int) -> PeftModel:
    """Put peft's layers into the first ``blocks`` blocks."""
    names = _projections(backbone, options.targets or backbone.adapted, blocks)
    narrow = min(min(cast("nn.Linear", backbone.body.get_submodule(name)).weight.shape) for name in names)
    if options.rank > narrow:
        raise InputError(f"adapter.rank must be at most the {narrow} features of a projection, got {options.rank}")
    handle = insert_lora(
        backbone, names, options.rank, options.alpha, seed + 2, lora_dropout=options.dropout,
        init_lora_weights=True if options.init == "default" else options.init, use_rslora=mode == "rslora",
        use_dora=mode == "dora",
    )  # fmt: skip
    # A folder of this machine otherwise; which base it is, the record says by its weights.
    handle.peft_config["default"].base_model_name_or_path = None
    return handle


def insert_lora(
    backbone: Backbone, names: Sequence[str], rank: int, alpha: float | None, seed: int, **options: Any
) -> PeftModel:
    """Put low-rank updates into linear layers of a backbone, in place; outputs stay unless ``options`` say otherwise.

    An update is scaled by alpha / rank, where alpha is 2 * rank when it is None. Starting values have a stream of their
    own; ``options`` are further ones of peft's ``LoraConfig``.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        # One pattern: peft stores a list as a set, whose order differs between processes.
        target_modules="|".join(map(re.escape, names)),
        **options,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # peft asks transformers by a name that is about to go.
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(seed)
        return get_peft_model(backbone.body, config)


def _projections(backbone: Backbone, targets: tuple[Target, ...], blocks: int) -> list[str]:
    """Names in the transformers model of these projections in the first ``blocks`` blocks."""
    found: list[str] = []
    for here in map(backbone.targets, range(blocks)):
        if missing := [word for word in targets if word not in here]:
            raise InputError(
                f"adapter.targets must be projections of this backbone ({', '.join(here)}), got {', '.join(missing)}"
            )
        found += [here[word] for word in dict.fromkeys(targets)]
    return found


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the plain model that an adapted one amounts to, in float32 on the CPU; ``model`` stays as it is.

    Raises:
        ValueError: the merged weights are not finite.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    state = {
        name: tensor.detach().to("cpu", torch.float32, copy=True)
        for name, tensor in model.state_dict().items()
        if not any(name.startswith(f"{layer}.") for layer in layers)
    }
    for name, layer in layers.items():
        # In fp32 whatever the model computes in: bf16 weights would lose 3-5e-2 of the outputs here.
        own = copy.deepcopy(layer).to("cpu", torch.float32)
        own.merge(safe_merge=True)
        state |= {f"{name}.{key}": tensor.detach() for key, tensor in own.get_base_layer().state_dict().items()}
    return state


def merge(model: Stage1Model) -> Stage1Model:
    """The plain float32 model that an adapted one amounts to, on the CPU, in evaluation mode; a new one."""
    plain = rebuild_model(model.architecture)
    plain.load_state_dict(merged_state(model))
    return plain.eval()


# --------------------------------------------------------------------------------------------
# The folder


def save_adapter(
    folder: Path | str,
    adaptation: Adaptation,
    architecture: Architecture,
    state: Mapping[str, Tensor],
    *,
    model_fingerprint: str,
    split_hashes: Mapping[str, str] | None = None,
    epoch: int | None = None,
) -> None:
    """Write everything that was trained, atomically as one folder; equal values give equal bytes.

    ``state`` is that of the adapted model or of its moving average, ``model_fingerprint`` of the merged plain model. An
    earlier adapter in the folder is replaced.
    """
    own = {key: state[key].detach().to("cpu", torch.float32).contiguous() for key in adaptation.keys}
    trained = {key: tensor for key, tensor in own.items() if key not in adaptation.peft_keys}
    added: dict[str, Tensor] = {}
    with atomic_directory(folder) as staging:
        if adaptation.handle is not None:
            added = _peft_form(adaptation, own)
            _write_tensors(staging / PEFT_WEIGHTS, added)
            adaptation.handle.peft_config["default"].save_pretrained(str(staging))
        _write_tensors(staging / TRAINED, trained)
        AdapterRecord(
            mode=adaptation.mode,
            options=adaptation.options,
            seed=adaptation.seed,
            architecture=architecture,
            base_fingerprint=adaptation.base_fingerprint,
            layout=adaptation.layout,
            adapter={key: list(tensor.shape) for key, tensor in added.items()},
            trained={key: list(tensor.shape) for key, tensor in trained.items()},
            trainable_parameters=adaptation.trainable,
            parameters=adaptation.parameters,
            epoch=epoch,
            split_hashes=dict(split_hashes or {}),
            model_fingerprint=model_fingerprint,
            versions={name: version(name) for name in ("peft", "torch", "transformers")},
            files=list_files(staging),
        ).sealed().write(staging / RECORD)


def replace_trained(folder: Path | str, tensors: Mapping[str, Tensor], model_fingerprint: str) -> None:
    """Write an adapter anew with other values for some of its trained tensors, such as a refitted gate's."""
    folder = Path(folder)
    record = read_adapter(folder)
    trained = _tensors(folder / TRAINED, record.trained)
    assert trained.keys() >= tensors.keys()
    with atomic_directory(folder) as staging:
        for name in sorted(set(record.files) - {TRAINED}):
            (staging / name).write_bytes((folder / name).read_bytes())
        _write_tensors(staging / TRAINED, {**trained, **tensors})
        changed = {"model_fingerprint": model_fingerprint, "files": list_files(staging)}
        record.model_copy(update=changed).sealed().write(staging / RECORD)


def read_adapter(folder: Path | str) -> AdapterRecord:
    """The record of an adapter's folder, once every file was found to be as written.

    Raises:
        ArtifactError: no adapter, or a file that is missing, extra or changed.
    """
    folder = Path(folder)
    recover_directory(folder)
    if not (folder / RECORD).is_file():
        raise ArtifactError(f"adapter must be a folder that holds {RECORD}, got {folder}; RUN/adapter is one")
    record = AdapterRecord.read(folder / RECORD)
    if record.sealed().seal != record.seal:
        raise ArtifactError(f"{folder / RECORD} must be as training wrote it, got other values; it was changed")
    present = {path.name for path in folder.iterdir()} - {RECORD}
    for what, names in (("missing", set(record.files) - present), ("extra", present - set(record.files))):
        if names:
            raise ArtifactError(f"{folder} must hold the files of {RECORD}, {what}: {', '.join(sorted(names))}")
    for name, entry in record.files.items():
        if (folder / name).stat().st_size != entry.size or sha256_file(folder / name) != entry.sha256:
            raise ArtifactError(
                f"{folder / name} must have the sha256 it was written with, got another; it was changed"
            )
    return record


def load_adapter(folder: Path | str, model: Stage1Model) -> Adaptation:
    """Put an adapter back on a plain model of the same base, in place; nothing that does not fit is passed over.

    Raises:
        ArtifactError: a damaged folder; another base, layout of the blocks or architecture; missing or unexpected keys.
        InputError: the model has an adapter already.
    """
    folder = Path(folder)
    record = read_adapter(folder)
    backbone = model.backbone
    if backbone.layout != record.layout:
        raise ArtifactError(
            f"{folder} must belong to a model whose blocks lie at {backbone.layout}, got {record.layout} (transformers "
            f"{record.versions['transformers']} then, {version('transformers')} now); merge it with that version"
        )
    # A base may lie in a folder of another name, and a later transformers may know more keys.
    found, own = record.architecture, model.architecture
    common = {key: own.hf_config.get(key) for key in found.hf_config if key in own.hf_config}
    likened = {"backbone": found.backbone, "hf_config": {**found.hf_config, **common}}
    check_architecture(folder / RECORD, found, own.model_copy(update=likened))
    if backbone.fingerprint() != record.base_fingerprint:
        raise ArtifactError(
            f"{folder} must be put on the weights it was trained on, got others for "
            f"'{record.architecture.backbone.source}' ({backbone.fingerprint()[:12]}… instead of "
            f"{record.base_fingerprint[:12]}…)"
        )
    trained = _tensors(folder / TRAINED, record.trained)
    added = _tensors(folder / PEFT_WEIGHTS, record.adapter) if record.adapter else {}
    adaptation = adapt(model, record.mode, record.options, record.seed)
    state = model.state_dict()
    wanted = {key: tensor for key, tensor in adaptation.learned(state).items() if key not in adaptation.peft_keys}
    check_tensors(folder / TRAINED, wanted, trained)
    if adaptation.handle is not None:
        check_tensors(folder / PEFT_WEIGHTS, _peft_form(adaptation, state), added)
        refused = set_peft_model_state_dict(adaptation.handle, added).unexpected_keys
        if refused:
            raise ArtifactError(f"{folder / PEFT_WEIGHTS} does not fit the model; peft refused {refused[:4]}")
    model.load_state_dict({**model.state_dict(), **trained})
    return adaptation


def load_adapted(folder: Path | str, base: str) -> Stage1Model:
    """The adapted model: the base (preset, folder or hub id) with an adapter's folder put on it, in evaluation mode.

    Raises:
        InputError: no such base.
        ArtifactError: as ``load_adapter``.
    """
    record = read_adapter(folder)
    wanted = record.architecture
    config = ModelConfig(
        backbone=base,
        image_size=wanted.image_size,
        resize=wanted.preprocessing.resize,
        tap=wanted.tap,
        auxiliary_hidden=wanted.auxiliary_hidden,
        dropout=wanted.dropout,
        pos_embed_rescale=wanted.hf_config.get("pos_embed_rescale"),
    )
    # A preset's weights are drawn from the seed.
    model = create_model(config, wanted.classes, wanted.positive, record.seed)
    load_adapter(folder, model)
    return model.eval()


def _peft_form(adaptation: Adaptation, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What peft added, under the names it has in peft's own files."""
    named = {f"{_PEFT}{key.removeprefix(_BODY)}": state[key] for key in adaptation.peft_keys}
    found: dict[str, Tensor] = get_peft_model_state_dict(
        adaptation.handle, state_dict=named, save_embedding_layers=False
    )
    return found


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), path, metadata={"format": "pt"})
    permit(path)  # safetensors writes for the owner alone


def _tensors(path: Path, shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Tensors of a file, exactly those that the record names."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} must be a safetensors file, got: {error}") from None
    if {key: list(tensor.shape) for key, tensor in tensors.items()} != dict(shapes):
        raise ArtifactError(f"{path} must hold the tensors that {RECORD} names, got others")
    return tensors
