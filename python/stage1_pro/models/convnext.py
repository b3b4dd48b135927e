"""DINOv3 ConvNeXt: convolutions over shrinking maps of growing width, offered as blocks over tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

from stage1_pro.config import Target
from stage1_pro.errors import InputError
from stage1_pro.models.backbone import Backbone, BlockParts, Context
from stage1_pro.models.transformers_vit import Dinov3


class Dinov3ConvNext(Backbone):
    """DINOv3 ConvNeXt. A block is one of its layers, with the downsampling before it where a stage begins.

    Tokens [N, 1 + H * W, C] are the map's mean, which stands where a transformer has its CLS token, and its places row
    by row; H, W and C change with the stage.
    """

    model_class, config_class = DINOv3ConvNextModel, DINOv3ConvNextConfig
    family, licence, any_size, transformer = Dinov3.family, Dinov3.licence, True, False
    adapted: ClassVar[tuple[Target, ...]] = ("up", "down")
    # Stages after the first halve the map: below this side nothing is left of it.
    LEAST = 32

    def __init__(self, hf: Any, image_size: int) -> None:
        super().__init__(hf, image_size)
        if image_size < self.LEAST:
            raise InputError(f"model.image_size must be at least {self.LEAST} for a ConvNeXt, got {image_size}")
        self.n_prefix = 1
        self.again = False

    @classmethod
    def sizes(cls, config: Any) -> tuple[int, int, int]:
        """Pixels of a side that the stem reads at once, width of the last stage, and no heads."""
        return 4, int(config.hidden_sizes[-1]), 0

    @property
    def _stages(self) -> Any:
        # transformers up to 5.3 kept them at `stages`, later ones at `model.stages`.
        return (self.hf.model if hasattr(self.hf, "model") else self.hf).stages

    @property
    def blocks(self) -> nn.ModuleList:
        """Layers of all stages in order."""
        return nn.ModuleList(layer for stage in self._stages for layer in stage.layers)

    @property
    def layout(self) -> str:
        """Where the stages lie in the transformers model."""
        return next(str(name) for name, module in self.body.named_modules() if module is self._stages)

    @property
    def norm(self) -> nn.Module:
        """The final LayerNorm."""
        return cast("nn.Module", self.hf.layer_norm)

    @property
    def mask_token(self) -> nn.Parameter | None:
        """None: a map has no places to leave out."""
        return None

    def width(self, tap: int) -> int:
        """Channels after a block, counted from 1."""
        return int(cast("Any", self.blocks[tap - 1]).layer_norm.normalized_shape[0])

    def tokens(self, pixels: Tensor, masked: Tensor | None) -> Tensor:
        """Tokens [N, 1 + H * W, C] after the stem; raises InputError where ``masked``."""
        if masked is not None:
            raise InputError("masked must be None for a ConvNeXt, got places to mask")
        for part in self._stages[0].downsample_layers:
            pixels = part(pixels)
        return _tokens(pixels)

    def run_blocks(self, tokens: Tensor, context: Context, start: int, stop: int) -> Tensor:  # noqa: ARG002
        """Tokens after blocks ``start`` to ``stop`` - 1, counted from 0."""
        if start == stop:
            return tokens
        side = round((tokens.shape[1] - 1) ** 0.5)
        found = tokens[:, 1:].transpose(1, 2)
        found = found.reshape(*found.shape[:2], side, side)
        for before, block in list(self._steps())[start:stop]:
            for part in before:
                found = part(found)
            again = self.again and self.training
            found = checkpoint(block, found, use_reentrant=False) if again else block(found)
        return _tokens(found)

    def _steps(self) -> Iterator[tuple[list[nn.Module], nn.Module]]:
        """Every block, and the downsampling to be done before it."""
        for number, stage in enumerate(self._stages):
            for index, layer in enumerate(stage.layers):
                yield list(stage.downsample_layers) if number and not index else [], layer

    def parts(self, index: int) -> BlockParts:
        """Never: convolutions have no parts of a transformer's block."""
        raise InputError(
            f"precision res32 must have a vision transformer, got block {index} of a ConvNeXt; use fp16 or bf16"
        )

    def targets(self, index: int) -> dict[Target, str]:
        """Names in ``body`` of a block's two linear layers."""
        block = self.blocks[index]
        place = next(name for name, module in self.body.named_modules() if module is block)
        return {"up": f"{place}.pointwise_conv1", "down": f"{place}.pointwise_conv2"}

    def checkpoint_activations(self) -> None:
        """From now on keep only every block's input in training, and compute the rest again on the way back."""
        self.again = True


def _tokens(found: Tensor) -> Tensor:
    """A map [N, C, H, W] as its mean and its places [N, 1 + H * W, C]."""
    return torch.cat((found.mean(dim=(2, 3), keepdim=True).flatten(2), found.flatten(2)), dim=2).transpose(1, 2)
