"""One door to DINOv3 and DINOv2 backbones: preset, local folder or hub id."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, Dinov2Config, Dinov2Model, DINOv3ViTConfig, DINOv3ViTModel
from transformers.utils import logging as hf_logging

from stage1_pro.data.images import PreprocessSpec
from stage1_pro.errors import ArtifactError, InputError, nearest
from stage1_pro.files import write_text
from stage1_pro.models.architecture import BackboneInfo

Family = Literal["dinov3", "dinov2"]
Context = tuple[Tensor, Tensor] | None

# Small DINOv3 configurations that train from scratch on two CPU cores.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "image_size": 48,
        "patch_size": 8,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_register_tokens": 4,
    },
    # Twelve blocks, so that one of them and LoRA of rank 8 on the rest stay below 10% of the weights (ExPLoRA).
    "narrow": {
        "image_size": 48,
        "patch_size": 8,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 3,
        "num_register_tokens": 4,
    },
}
# Facts of a backbone that this package wrote, beside its weights: a folder's name says nothing of a licence.
INFO_FILE = "backbone_info.json"
_LICENCES = {"dinov3": "DINOv3 License (Meta): derived weights must ship it", "dinov2": "Apache-2.0 (DINOv2)"}


class Backbone(nn.Module):
    """A transformers DINO model whose blocks can be run in two parts, bit-identical to the whole.

    Args:
        hf: the transformers model; its parameters keep their own names below ``hf.``.
        image_size: side of the square input in pixels, a multiple of the patch size.
    """

    def __init__(self, hf: DINOv3ViTModel | Dinov2Model, image_size: int) -> None:
        super().__init__()
        config = hf.config
        self.family: Family = "dinov3" if config.model_type == "dinov3_vit" else "dinov2"
        patch = int(config.patch_size)
        if image_size % patch or image_size < patch:
            lower = max(patch, image_size // patch * patch)
            raise InputError(
                f"model.image_size must be a multiple of the patch size {patch}, got {image_size}; "
                f"use {lower} or {image_size // patch * patch + patch}"
            )
        self.hf = hf
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        self.image_size = image_size
        self.hidden_size = int(config.hidden_size)
        self.n_prefix = 1 + int(getattr(config, "num_register_tokens", 0))
        self.n_blocks = len(self.blocks)
        if self.family == "dinov3":
            # Fixed resolution: the rotary table is a constant, in eager and in the exported graph.
            rope = hf.rope_embeddings
            was_training = rope.training
            cos, sin = rope.eval()(torch.empty(1, 3, image_size, image_size))
            rope.train(was_training)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)

    @property
    def blocks(self) -> nn.ModuleList:
        """Transformer blocks in order; their place differs between families and versions."""
        if self.family == "dinov2":
            return cast("nn.ModuleList", self.hf.encoder.layer)
        # transformers up to 5.3 kept DINOv3's blocks at `layer`, later ones at `model.layer`.
        return cast("nn.ModuleList", (self.hf.model if hasattr(self.hf, "model") else self.hf).layer)

    @property
    def layout(self) -> str:
        """Where the blocks lie in the transformers model, such as ``model.layer``."""
        blocks = self.blocks
        return next(str(name) for name, module in self.hf.named_modules() if module is blocks)

    @property
    def norm(self) -> nn.Module:
        """The final LayerNorm."""
        return cast("nn.Module", self.hf.layernorm if self.family == "dinov2" else self.hf.norm)

    def embed(self, pixels: Tensor, masked: Tensor | None = None) -> tuple[Tensor, Context]:
        """Turn pixels [N, 3, H, W] into tokens [N, T, D] and what the blocks share (RoPE or None).

        Where ``masked`` [N, P] bool is true, the mask token stands in a patch's place.
        """
        if pixels.shape[-2:] != (self.image_size, self.image_size):
            raise InputError(
                f"pixels must be [N, 3, {self.image_size}, {self.image_size}], got {list(pixels.shape)}; "
                "preprocess with the run's own specification"
            )
        tokens: Tensor = self.hf.embeddings(pixels, bool_masked_pos=masked)
        return tokens, self.context(pixels if self.training else None)

    def context(self, pixels: Tensor | None = None) -> Context:
        """RoPE tables for the fixed resolution; drawn anew from ``pixels`` in training when the config asks."""
        if self.family == "dinov2":
            return None
        config = self.hf.config
        jitter = (config.pos_embed_rescale, config.pos_embed_shift, config.pos_embed_jitter)
        if pixels is not None and any(value is not None for value in jitter):
            cos, sin = self.hf.rope_embeddings(pixels)
            return cos, sin
        return self.rope_cos, self.rope_sin

    def run_blocks(self, tokens: Tensor, context: Context, start: int, stop: int) -> Tensor:
        """Run blocks ``start`` (0-based) up to but without ``stop``."""
        for block in self.blocks[start:stop]:
            tokens = block(tokens) if context is None else block(tokens, position_embeddings=context)
        return tokens

    def pool(self, normed: Tensor) -> Tensor:
        """CLS and mean patch token of normed tokens [N, T, D], side by side: [N, 2D]."""
        return torch.cat((normed[:, 0], normed[:, self.n_prefix :].mean(dim=1)), dim=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normed tokens [N, T, D], as the transformers model gives them."""
        tokens, context = self.embed(pixels)
        normed: Tensor = self.norm(self.run_blocks(tokens, context, 0, self.n_blocks))
        return normed

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
        return hash_tensors({k: v for k, v in self.hf.state_dict().items() if not k.endswith("mask_token")})

    def info(self, source: str) -> BackboneInfo:
        """Facts for manifests; ``source`` is where the weights came from."""
        preset = source in PRESETS
        written = Path(source).expanduser() / INFO_FILE
        if not preset and written.is_file():
            return BackboneInfo.read(written)
        return BackboneInfo(
            source=source if preset else Path(source).name if Path(source).is_dir() else source,
            family=self.family,
            licence="trained from scratch: the owner's own" if preset else _LICENCES[self.family],
            hidden_size=self.hidden_size,
            n_blocks=self.n_blocks,
            patch_size=int(self.hf.config.patch_size),
        )


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


def default_image_size(source: str, patch: int) -> int:
    """48 for presets; the height in a folder's processor file; else the multiple of the patch nearest to 224."""
    if source in PRESETS:
        return int(PRESETS[source]["image_size"])
    size = _processor(source).get("size")
    height = size.get("height") if isinstance(size, dict) else None
    return int(height) if height else round(224 / patch) * patch


def load_backbone(source: str, image_size: int | None, *, pos_embed_rescale: float | None, seed: int) -> Backbone:
    """Load a preset (random weights from ``seed``), a local folder or a hub id.

    Raises:
        InputError: no such preset or folder, or not a DINOv3 ViT or DINOv2 model.
        ArtifactError: the weights miss keys, have unexpected ones or other shapes.
    """
    if source in PRESETS:
        config = DINOv3ViTConfig(**{**PRESETS[source], "image_size": image_size or PRESETS[source]["image_size"]})
        config.pos_embed_rescale = pos_embed_rescale
        return backbone_from_config(config.to_dict(), image_size or default_image_size(source, 8), seed)
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
    model_class = {"dinov3_vit": DINOv3ViTModel, "dinov2": Dinov2Model}.get(config.model_type)
    if model_class is None:
        raise InputError(
            f"model.backbone '{source}' must be a DINOv3 ViT or DINOv2 model, got type '{config.model_type}'"
        )
    if config.model_type == "dinov3_vit":
        config.pos_embed_rescale = pos_embed_rescale
    try:
        with _quiet():
            hf, report = model_class.from_pretrained(name, config=config, dtype=torch.float32, output_loading_info=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(f"weights of '{source}' cannot be loaded: {str(error).splitlines()[0]}") from None
    # A classifier checkpoint's own head may be left over; a missing key would silently stay random.
    missing = sorted(k for k in report["missing_keys"] if "mask_token" not in k)
    if missing or report["mismatched_keys"]:
        raise ArtifactError(
            f"weights of '{source}' must fit {model_class.__name__}: missing {missing[:5]}, "
            f"other shapes {[str(k) for k in sorted(report['mismatched_keys'])[:5]]}"
        )
    return Backbone(hf, image_size or default_image_size(source, int(config.patch_size)))


def backbone_from_config(values: dict[str, Any], image_size: int, seed: int = 0) -> Backbone:
    """Build a backbone with random weights from a transformers configuration as a dict."""
    config = (DINOv3ViTConfig if values["model_type"] == "dinov3_vit" else Dinov2Config).from_dict(values)
    # Initialisation draws from the global generator; keep it from the caller's stream.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = (DINOv3ViTModel if values["model_type"] == "dinov3_vit" else Dinov2Model)(config)
    return Backbone(hf, image_size)


def normalisation(source: str) -> dict[str, tuple[float, float, float]]:
    """Mean and std a backbone expects: its own processor file, the SAT values, or ImageNet's."""
    values = _processor(source)
    if "image_mean" in values and "image_std" in values:
        return {"mean": tuple(values["image_mean"]), "std": tuple(values["image_std"])}
    if "sat493m" in source:
        return {"mean": (0.430, 0.411, 0.296), "std": (0.213, 0.156, 0.143)}
    return {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def save_backbone(folder: Path, backbone: Backbone, info: BackboneInfo, spec: PreprocessSpec) -> None:
    """Write a plain transformers folder that ``load_backbone`` reads, with what its pixels must be and its origin.

    The bytes are a function of weights and arguments.
    """
    hf = backbone.hf
    if backbone.family == "dinov3":
        hf.config.image_size = backbone.image_size
    with _quiet():
        hf.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone
    processor = {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255,
        "image_mean": list(spec.mean), "image_std": list(spec.std),
        "resample": {"bilinear": 2, "bicubic": 3}[spec.resample],
        "size": {"height": spec.height, "width": spec.width},
    }  # fmt: skip
    write_text(folder / _PROCESSOR, json.dumps(processor, indent=2) + "\n")
    info.write(folder / INFO_FILE)


_PROCESSOR = "preprocessor_config.json"


def _processor(source: str) -> dict[str, Any]:
    path = Path(source).expanduser() / _PROCESSOR
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} must be JSON, got: {error}") from None
    return values if isinstance(values, dict) else {}
