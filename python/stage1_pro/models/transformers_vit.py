"""DINOv3 and DINOv2, plain ViT, and the vision tower of SigLIP and of SigLIP2 at fixed resolution."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from stage1_pro.models.backbone import Backbone, Context


class _Dino(Backbone):
    def tokens(self, pixels: Tensor, masked: Tensor | None) -> Tensor:
        """Tokens [N, T, D], mask tokens where ``masked``."""
        return cast("Tensor", self.hf.embeddings(pixels, bool_masked_pos=masked))


class Dinov3(_Dino):
    """DINOv3: rotary positions, registers; its resolution is fixed when it is built."""

    model_class, config_class = DINOv3ViTModel, DINOv3ViTConfig
    family, any_size = "dinov3", True
    licence = "DINOv3 License (Meta): derived weights must ship it"

    def __init__(self, hf: Any, image_size: int) -> None:
        super().__init__(hf, image_size)
        self.rope_cos: Tensor
        self.rope_sin: Tensor
        # Fixed resolution: the rotary table is a constant, in eager and in the exported graph.
        rope = hf.rope_embeddings
        was_training = rope.training
        cos, sin = rope.eval()(torch.empty(1, 3, image_size, image_size))
        rope.train(was_training)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)

    @property
    def blocks(self) -> nn.ModuleList:
        """Transformer blocks in order."""
        # transformers up to 5.3 kept them at `layer`, later ones at `model.layer`.
        return cast("nn.ModuleList", (self.hf.model if hasattr(self.hf, "model") else self.hf).layer)

    @property
    def norm(self) -> nn.Module:
        """The final LayerNorm."""
        return cast("nn.Module", self.hf.norm)

    def context(self, pixels: Tensor | None = None) -> Context:
        """Rotary tables of the fixed resolution; drawn anew from ``pixels`` in training when the config asks."""
        config = self.hf.config
        jitter = (config.pos_embed_rescale, config.pos_embed_shift, config.pos_embed_jitter)
        if pixels is not None and any(value is not None for value in jitter):
            cos, sin = self.hf.rope_embeddings(pixels)
            return cos, sin
        return self.rope_cos, self.rope_sin


class Dinov2(_Dino):
    """DINOv2: learned positions, interpolated to the input."""

    model_class, config_class = Dinov2Model, Dinov2Config
    family, resample = "dinov2", "bicubic"
    licence = "Apache-2.0 (DINOv2)"

    @property
    def blocks(self) -> nn.ModuleList:
        """Transformer blocks in order."""
        return cast("nn.ModuleList", self.hf.encoder.layer)

    @property
    def norm(self) -> nn.Module:
        """The final LayerNorm."""
        return cast("nn.Module", self.hf.layernorm)


class Dinov2Registers(Dinov2):
    """DINOv2 with register tokens."""

    model_class, config_class = Dinov2WithRegistersModel, Dinov2WithRegistersConfig


class _Learned(Backbone):
    """Learned positions, interpolated where the input has another size than in pretraining."""

    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    licence = "of the model's own page: look there"

    def tokens(self, pixels: Tensor, masked: Tensor | None) -> Tensor:
        """Tokens [N, T, D], mask tokens where ``masked``."""
        options: dict[str, Any] = {"interpolate_pos_encoding": self.image_size != self._trained_size()}
        if masked is not None:
            options["bool_masked_pos"] = masked
        return cast("Tensor", self._root().embeddings(pixels, **options))

    def _trained_size(self) -> int:
        size = self.hf.config.image_size
        return int(size[0] if isinstance(size, list | tuple) else size)

    def _root(self) -> Any:
        # Older versions keep SigLIP's tower one level deeper.
        return getattr(self.hf, "vision_model", self.hf)


class Vit(_Learned):
    """ViT with a CLS token."""

    model_class, config_class = ViTModel, ViTConfig
    model_options: ClassVar[dict[str, Any]] = {"add_pooling_layer": False}
    family = "vit"

    @property
    def blocks(self) -> nn.ModuleList:
        """Transformer blocks in order."""
        return cast("nn.ModuleList", self.hf.layers if hasattr(self.hf, "layers") else self.hf.encoder.layer)

    @property
    def norm(self) -> nn.Module:
        """The final LayerNorm."""
        return cast("nn.Module", self.hf.layernorm)


class Siglip(_Learned):
    """SigLIP's vision tower: no CLS token; its own attention pooling reads the tokens."""

    model_class, config_class = SiglipVisionModel, SiglipVisionConfig
    family, resample = "siglip", "bicubic"

    def __init__(self, hf: Any, image_size: int) -> None:
        super().__init__(hf, image_size)
        self.n_prefix = 0

    @property
    def blocks(self) -> nn.ModuleList:
        """Transformer blocks in order."""
        return cast("nn.ModuleList", self._root().encoder.layers)

    @property
    def norm(self) -> nn.Module:
        """The final LayerNorm."""
        return cast("nn.Module", self._root().post_layernorm)

    @property
    def reader(self) -> nn.Module | None:
        """SigLIP's attention pooling head."""
        return cast("nn.Module", self._root().head)

    @property
    def mask_token(self) -> nn.Parameter | None:
        """None: SigLIP never masks."""
        return None

    @property
    def patch_projection(self) -> nn.Conv2d:
        """The convolution that makes a token of a patch."""
        return cast("nn.Conv2d", self._root().embeddings.patch_embedding)

    def run_block(self, block: nn.Module, tokens: Tensor, context: Context) -> Tensor:  # noqa: ARG002
        """One block on tokens [N, T, D]; nothing is masked from the attention."""
        out = block(tokens, attention_mask=None)
        return cast("Tensor", out[0] if isinstance(out, tuple) else out)
