"""Plain vision transformers of transformers: ViT, and the vision tower of SigLIP and of SigLIP2 at fixed resolution."""

from __future__ import annotations

from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

from stage1_pro.models.backbone import Backbone, Context


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
