"""``Backbone``: what every family of backbones offers, and one door to them: preset, folder or hub id."""

from __future__ import annotations

import contextlib
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import logging as hf_logging

from stage1_pro.config import Target
from stage1_pro.data.images import PreprocessSpec
from stage1_pro.errors import ArtifactError, InputError, nearest
from stage1_pro.files import permit, write_text
from stage1_pro.models.architecture import BackboneInfo
from stage1_pro.models.processor import PROCESSOR, RESAMPLE, Processor
from stage1_pro.models.weights import check_loaded, find_file, find_weights
from stage1_pro.registry import Registry

Context = tuple[Tensor, Tensor] | None

# Small DINOv3 configurations that train from scratch on two CPU cores.
_SMALL = {"image_size": 48, "patch_size": 8, "num_register_tokens": 4}
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {**_SMALL, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    # Twelve blocks, so that one of them and LoRA of rank 8 on the rest stay below 10% of the weights (ExPLoRA).
    "narrow": {
        **_SMALL, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3,
    },
}  # fmt: skip
# Facts of a backbone that this package wrote, beside its weights: a folder's name says nothing of a licence.
INFO_FILE = "backbone_info.json"


@dataclass(frozen=True)
class BlockParts:
    """The parts of one transformer block by what they do.

    Attributes:
        norms: before the attention and before the MLP.
        projections: linear layers by the configuration's words; ``gate`` is there in gated MLPs only.
        activation: of the MLP.
        scales: of the two branches [D], None without.
        joint_gate: ``up`` holds the gate and, below it, up.
    """

    norms: tuple[nn.Module, nn.Module]
    projections: Mapping[Target, nn.Linear]
    activation: nn.Module
    scales: tuple[Tensor, Tensor] | None
    joint_gate: bool


class Backbone(nn.Module, ABC):
    """A transformers model whose blocks can be run in two parts, bit-identical to the whole.

    A family is a subclass: it names its transformers classes and says where blocks and final norm lie; what differs
    from the usual (registers, rotary tables, no CLS token) it overrides.

    Args:
        hf: the transformers model; its parameters keep their own names below ``hf.``.
        image_size: side of the square input in pixels, a multiple of the patch size.

    Attributes:
        family, licence: what manifests say of it.
        resample: how its pixels are resized unless a processor file says otherwise.
        mean, std: of its pixels, likewise.
        n_prefix: tokens before the patches; the first of them is the CLS token.
        reader: pools normed tokens [N, T, D] to [N, D] where there is no CLS token.
        any_size: no table of positions fixes the size it was trained at.
        transformer: its blocks are a transformer's: patches can be left out (ExPLoRA), blocks rewritten (res32).
        adapted: projections that adapters change unless the configuration names others.

    Raises:
        InputError: an image size that is no multiple of the patch.
    """

    model_class: ClassVar[Any]
    config_class: ClassVar[Any]
    model_options: ClassVar[dict[str, Any]] = {}
    family: ClassVar[str]
    licence: ClassVar[str]
    resample: ClassVar[Literal["bilinear", "bicubic"]] = "bilinear"
    mean: ClassVar[tuple[float, float, float]] = (0.485, 0.456, 0.406)
    std: ClassVar[tuple[float, float, float]] = (0.229, 0.224, 0.225)
    any_size: ClassVar[bool] = False
    transformer: ClassVar[bool] = True
    adapted: ClassVar[tuple[Target, ...]] = ("q", "k", "v", "o")

    def __init__(self, hf: Any, image_size: int) -> None:
        super().__init__()
        config = hf.config
        patch, width, heads = self.sizes(config)
        if image_size % patch or image_size < patch:
            lower = max(patch, image_size // patch * patch)
            raise InputError(
                f"model.image_size must be a multiple of the patch size {patch}, got {image_size}; "
                f"use {lower} or {image_size // patch * patch + patch}"
            )
        self.hf = hf
        self.image_size, self.patch_size, self.hidden_size, self.n_heads = image_size, patch, width, heads
        self.n_prefix = 1 + int(getattr(config, "num_register_tokens", 0))
        self.n_blocks = len(self.blocks)
        self.n_patches = (image_size // patch) ** 2

    # ---------------------------------------------------------------------------- what a family says

    @classmethod
    def sizes(cls, config: Any) -> tuple[int, int, int]:
        """Side of a patch in pixels, width of a token after the last block, and attention heads."""
        return int(config.patch_size), int(config.hidden_size), int(config.num_attention_heads)

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """Transformer blocks in order."""

    @property
    @abstractmethod
    def norm(self) -> nn.Module:
        """The final LayerNorm."""

    @abstractmethod
    def tokens(self, pixels: Tensor, masked: Tensor | None) -> Tensor:
        """Tokens [N, T, D] before the first block, of pixels of the right size."""

    def context(self, pixels: Tensor | None = None) -> Context:  # noqa: ARG002 - families with rotary tables read it
        """What blocks share besides tokens: rotary tables, or None."""
        return None

    def width(self, tap: int) -> int:  # noqa: ARG002 - blocks of a transformer are of one width
        """Width of tokens after block ``tap``, counted from 1."""
        return self.hidden_size

    def run_block(self, block: nn.Module, tokens: Tensor, context: Context) -> Tensor:
        """One block on tokens [N, T, D]."""
        out = block(tokens) if context is None else block(tokens, position_embeddings=context)
        # Blocks of older transformers give tuples.
        return cast("Tensor", out[0] if isinstance(out, tuple) else out)

    @property
    def reader(self) -> nn.Module | None:
        """What reads normed tokens in place of a CLS token."""
        return None

    @property
    def mask_token(self) -> nn.Parameter | None:
        """What stands in a masked patch's place; None without."""
        return cast("nn.Parameter | None", getattr(self.hf.embeddings, "mask_token", None))

    @property
    def patch_projection(self) -> nn.Conv2d:
        """The convolution that makes a token of a patch."""
        return next(m for m in self.hf.embeddings.modules() if isinstance(m, nn.Conv2d))

    # ---------------------------------------------------------------------------- what every family offers

    @property
    def body(self) -> nn.Module:
        """The transformers model itself, in which adapters are put."""
        return cast("nn.Module", self.hf)

    @property
    def layout(self) -> str:
        """Where the blocks lie in the transformers model, such as ``model.layer``."""
        blocks = self.blocks
        return next(str(name) for name, module in self.body.named_modules() if module is blocks)

    def embed(self, pixels: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Context]:
        """Turn pixels [N, 3, H, W] into tokens [N, T, D] and what the blocks share.

        Where ``masked`` [N, P] bool is true, the mask token stands in a patch's place.

        Raises:
            InputError: pixels of another size.
        """
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise InputError(
                f"pixels must be [N, 3, {self.image_size}, {self.image_size}], got {list(pixels.shape)}; "
                "preprocess with the run's own specification"
            )
        return self.tokens(pixels, masked), self.context(pixels if self.training else None)

    def run_blocks(self, tokens: Tensor, context: Context, start: int, stop: int) -> Tensor:
        """Tokens [N, T, D] after blocks ``start`` to ``stop`` - 1, counted from 0; ``context`` as ``embed`` gave it."""
        for block in self.blocks[start:stop]:
            tokens = self.run_block(block, tokens, context)
        return tokens

    def pool(self, normed: Tensor) -> Tensor:
        """CLS token (or what the reader reads) and mean patch token of normed tokens [N, T, D]: [N, 2D]."""
        first = normed[:, 0] if self.reader is None else self.reader(normed)
        return torch.cat((first, normed[:, self.n_prefix :].mean(dim=1)), dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normed tokens [N, T, D], as the transformers model gives them."""
        tokens, context = self.embed(pixels)
        normed: Tensor = self.norm(self.run_blocks(tokens, context, 0, self.n_blocks))
        return normed

    def parts(self, index: int) -> BlockParts:
        """The parts of a block, whatever its family and version of transformers call them.

        Raises:
            InputError: a block that lacks one.
        """
        block = self.blocks[index]
        mlp = {word: _find(block, *names) for word, names in _MLP.items()}
        projections = {word: _find(block, *names) for word, names in _ATTENTION.items()}
        missing = [word for word, found in {**projections, **mlp}.items() if found is None and word != "gate"]
        norms = tuple(_find(block, *names) for names in _NORMS)
        if missing or None in norms:
            raise InputError(
                f"the backbone's blocks must have {', '.join(missing) or 'two norms'}, got {type(block).__name__} "
                "without; its layout is not known"
            )
        scales = [_find(block, f"layer_scale{place}") for place in (1, 2)]
        activation = _find(block, "act_fn", "activation", "activation_fn", "intermediate_act_fn")
        joint = _find(block, "weights_in") is not None
        return BlockParts(
            norms=cast("Any", norms),
            projections=cast("Any", {k: v for k, v in {**projections, **mlp}.items() if v is not None}),
            activation=nn.SiLU() if joint else cast("nn.Module", activation),
            scales=None if None in scales else cast("Any", tuple(one.lambda1 for one in cast("Any", scales))),
            joint_gate=joint,
        )

    def targets(self, index: int) -> dict[Target, str]:
        """Names in ``body`` of a block's projections, by the configuration's words."""
        found = {id(module): word for word, module in self.parts(index).projections.items()}
        place = f"{self.layout}.{index}"
        named = {found[id(m)]: f"{place}.{name}" for name, m in self.blocks[index].named_modules() if id(m) in found}
        return {word: named[word] for word in (*_ATTENTION, *_MLP) if word in named}

    def checkpoint_activations(self) -> None:
        """From now on keep only every block's input in training, and compute the rest again on the way back."""
        # The reentrant kind gives no gradient where a block's input needs none, as above a frozen embedding.
        options = {"use_reentrant": False}
        if hasattr(self.hf, "activation_checkpointing_enable"):
            self.hf.activation_checkpointing_enable(options)
        else:  # its name in older versions
            self.hf.gradient_checkpointing_enable(options)

    def fingerprint(self) -> str:
        """Hex sha256 over the name, shape and value of every weight that is used."""
        # A base may lack the mask token, which is then random and never read.
        return hash_tensors({k: v for k, v in self.body.state_dict().items() if not k.endswith("mask_token")})

    def info(self, source: str) -> BackboneInfo:
        """Facts for manifests; ``source`` is where the weights came from."""
        preset = source in PRESETS
        written = None if preset else find_file(str(Path(source).expanduser()), INFO_FILE)
        if written is not None:
            return BackboneInfo.read(written)
        return BackboneInfo(
            source=source if preset else Path(source).name if Path(source).is_dir() else source,
            family=self.family,
            licence="trained from scratch: the owner's own" if preset else self.licence,
            hidden_size=self.hidden_size,
            n_blocks=self.n_blocks,
            patch_size=self.patch_size,
        )


# What the configuration's words are called in all these families, now and in older versions of transformers.
_ATTENTION: dict[Target, tuple[str, ...]] = {
    "q": ("q_proj", "query"),
    "k": ("k_proj", "key"),
    "v": ("v_proj", "value"),
    "o": ("o_proj", "out_proj", "attention.output.dense"),
}
_MLP: dict[Target, tuple[str, ...]] = {
    "up": ("up_proj", "fc1", "weights_in", "intermediate.dense"),
    "down": ("down_proj", "fc2", "weights_out", "=output.dense"),
    "gate": ("gate_proj",),
}
_NORMS = (("norm1", "layernorm_before", "layer_norm1"), ("norm2", "layernorm_after", "layer_norm2"))
# Families by transformers' name of a model's type. SigLIP's whole models are read for their vision tower.
BACKBONES: Registry[type[Backbone]] = Registry(
    "the type of model.backbone",
    "stage1_pro.backbones",
    {
        "dinov3_vit": "stage1_pro.models.transformers_vit:Dinov3",
        "dinov3_convnext": "stage1_pro.models.convnext:Dinov3ConvNext",
        "dinov2": "stage1_pro.models.transformers_vit:Dinov2",
        "dinov2_with_registers": "stage1_pro.models.transformers_vit:Dinov2Registers",
        "vit": "stage1_pro.models.transformers_vit:Vit",
        "siglip": "stage1_pro.models.transformers_vit:Siglip",
        "siglip_vision_model": "stage1_pro.models.transformers_vit:Siglip",
    },
)


def _find(block: nn.Module, *names: str) -> Any:
    """The part of a block that is called one of these, whatever it lies in (``=name``: directly in it); else None."""
    for name, module in block.named_modules():
        if any(f"={name}" == one or f".{name}".endswith(f".{one}") for one in names):
            return module
    return None


def hash_tensors(tensors: Mapping[str, Tensor], start: str = "") -> str:
    """Hex sha256 over ``start`` and names, shapes, types and values, in the order of the names."""
    digest = hashlib.sha256(start.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' loading bar for a while; ours is the only progress shown."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def load_backbone(source: str, image_size: int | None, *, pos_embed_rescale: float | None, seed: int) -> Backbone:
    """Load a preset, a local folder or a hub id.

    Args:
        source: which.
        image_size: side of the square input in pixels; None is the source's own.
        pos_embed_rescale: DINOv3's random rescaling of rotary positions in training; None = off.
        seed: of a preset's random weights.

    Raises:
        InputError: no such preset or folder, or a model of a type that no family reads.
        ArtifactError: weights that are not whole, or not exactly those of the model in the configuration.
    """
    if source in PRESETS:
        size = image_size or int(PRESETS[source]["image_size"])
        values = {"model_type": "dinov3_vit", **PRESETS[source], "image_size": size}
        return backbone_from_config({**values, "pos_embed_rescale": pos_embed_rescale}, size, seed)
    local = Path(source).expanduser()
    if not local.is_dir() and (source.count("/") != 1 or source.startswith((".", "/", "~"))):
        raise InputError(
            f"model.backbone must be a preset ({', '.join(PRESETS)}), an existing folder or a hub id like "
            f"facebook/dinov3-vits16-pretrain-lvd1689m, got '{source}'{nearest(source, PRESETS)}"
        )
    name = str(local) if local.is_dir() else source
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model.backbone '{source}' must be readable by transformers, got: {str(error).splitlines()[0]}; "
            "DINOv3 weights are gated: accept their licence on the hub and log in, or give a local folder"
        ) from None
    family = BACKBONES.find(config.model_type)
    config = getattr(config, "vision_config", config)
    if hasattr(config, "pos_embed_rescale"):
        config.pos_embed_rescale = pos_embed_rescale
    kind, paths = family.model_class, find_weights(name)
    try:
        with _quiet():
            hf, report = kind.from_pretrained(
                name, config=config, dtype=torch.float32, output_loading_info=True, **family.model_options
            )
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                plain = kind(config, **family.model_options)
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"weights of '{source}' cannot be loaded from {paths[0]}: {str(error).splitlines()[0]}; take config.json "
            "and weights of one and the same model"
        ) from None
    # A classifier checkpoint's own head may be left over; a missing key would silently stay random.
    missing = sorted(k for k in report["missing_keys"] if "mask_token" not in k)
    if missing or report["mismatched_keys"]:
        raise ArtifactError(
            f"weights of '{source}' in {paths[0]} must fit {kind.__name__}: missing {missing[:5]}, "
            f"other shapes {[str(k) for k in sorted(report['mismatched_keys'])[:5]]}; take config.json and weights of "
            "one and the same model"
        )
    check_loaded(hf, plain, sorted(report["unexpected_keys"]), paths)
    if not image_size:
        # Of its processor file, else the multiple of the patch nearest to 224.
        patch = family.sizes(config)[0]
        image_size = Processor(name).side() or round(224 / patch) * patch
    return family(hf, image_size)


def backbone_from_config(values: dict[str, Any], image_size: int, seed: int = 0) -> Backbone:
    """Build a backbone with random weights from a transformers configuration as a dict.

    Raises:
        InputError: a ``model_type`` that no family reads.
    """
    family = BACKBONES.find(str(values["model_type"]))
    # Initialisation draws from the global generator; keep it from the caller's stream.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = family.model_class(family.config_class.from_dict(values), **family.model_options)
        return family(hf, image_size)


def stated_pixels(source: str, family: type[Backbone] | Backbone, resize: str | None) -> dict[str, Any]:
    """Arguments of ``PreprocessSpec`` besides its size: of a backbone's processor file, else its family's.

    Args:
        source: preset, folder or hub id.
        family: its class.
        resize: ``stretch`` or ``crop`` whatever the file says; None leaves it to the file, ``stretch`` without one.

    Raises:
        ArtifactError: a processor file that cannot be followed.
    """
    values: dict[str, Any] = {"resample": family.resample, "mean": family.mean, "std": family.std}
    if source not in PRESETS:
        if "sat493m" in source:
            values |= {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}
        values |= Processor(str(Path(source).expanduser())).spec(resize)
    return {**values, "resize": resize or values.get("resize", "stretch")}


def save_backbone(folder: Path, backbone: Backbone, info: BackboneInfo, spec: PreprocessSpec) -> None:
    """Write a plain backbone into an empty folder as a transformers folder that ``load_backbone`` reads.

    It says what pixels must be (``spec``) and its origin (``info``). The bytes are a function of weights and arguments.
    """
    if backbone.any_size:
        backbone.hf.config.image_size = backbone.image_size
    with _quiet():
        backbone.hf.save_pretrained(folder)
    for file in folder.iterdir():
        permit(file)  # safetensors writes for the owner alone
    size = {"height": spec.height, "width": spec.width}
    shorter = {"shortest_edge": round(spec.height * spec.crop_ratio)}
    crop = {"do_center_crop": True, "crop_size": size, "size": shorter} if spec.resize == "crop" else {"size": size}
    processor = {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255,
        "image_mean": list(spec.mean), "image_std": list(spec.std),
        "resample": next(number for number, name in RESAMPLE.items() if name == spec.resample),
        **crop,
    }  # fmt: skip
    write_text(folder / PROCESSOR, json.dumps(processor, indent=2) + "\n")
    info.write(folder / INFO_FILE)
