"""DINOv3 and DINOv2, the latter also with registers."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
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
