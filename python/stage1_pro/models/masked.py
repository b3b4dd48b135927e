"""Self-supervised objectives on a backbone: what is masked, how the rest is encoded, and what has to be predicted.

Masked patches are dropped, not replaced (He et al., 2111.06377): the encoder runs on CLS, registers and the visible
patches, each of which keeps the rotary angles of its own place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DINOv3ViTConfig

from stage1_pro.config import ExploraConfig
from stage1_pro.errors import InputError
from stage1_pro.models.backbone import Backbone, backbone_from_config

# DIET (Balestriero, 2302.10260) learns from one image a class only under heavy smoothing.
_SMOOTHING = 0.8


def draw_orders(n_patches: int, seed: int, epoch: int, rows: Sequence[int]) -> Tensor:
    """A permutation of the patches per row [N, P] int64, a function of (seed, epoch, row); its head is masked."""
    # The counter's last word sets the stream apart from augmentation, which has the same key.
    draws = [
        np.random.Generator(
            np.random.Philox(
                key=np.asarray([seed & (2**64 - 1), (epoch << 32) | row], dtype=np.uint64), counter=[0, 0, 0, 1]
            )
        ).permutation(n_patches)
        for row in rows
    ]
    return torch.from_numpy(np.stack(draws))


def part(order: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Cut permutations [N, P] into masked [N, M] and visible [N, P - M] patches, ascending; both have one or more.

    Raises:
        InputError: one patch alone.
    """
    patches = order.shape[1]
    if patches < 2:
        raise InputError(
            f"model.image_size must give two patches or more, got {patches}; there is nothing to mask in one"
        )
    count = min(patches - 1, max(1, round(ratio * patches)))
    return order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values


def encode(
    backbone: Backbone, pixels: Tensor, visible: Tensor | None = None, *, masked: Tensor | None = None
) -> Tensor:
    """Normed tokens [N, 1 + registers + V, D] of images of which only the patches ``visible`` [N, V] are seen.

    Without ``visible`` this is the backbone itself, with mask tokens where ``masked`` [N, P] is true; with all patches
    in order, too.
    """
    tokens, context = backbone.embed(pixels, masked)
    if visible is not None:
        prefix, patches = tokens[:, : backbone.n_prefix], tokens[:, backbone.n_prefix :]
        tokens = torch.cat((prefix, _pick(patches, visible)), dim=1)
        if context is not None:
            # [P, d] to [N, 1, V, d]: a table per row, the same for all heads.
            context = (context[0][visible].unsqueeze(1), context[1][visible].unsqueeze(1))
    normed: Tensor = backbone.norm(backbone.run_blocks(tokens, context, 0, backbone.n_blocks))
    return normed


def to_patches(pixels: Tensor, size: int) -> Tensor:
    """Images [N, 3, H, W] to patches [N, P, 3 * size * size], row by row as the backbone numbers them."""
    n, channels, height, width = pixels.shape
    grid = pixels.reshape(n, channels, height // size, size, width // size, size)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(n, -1, channels * size * size)


def to_pixels(patches: Tensor, size: int) -> Tensor:
    """The inverse of ``to_patches`` for square images."""
    n, count, width = patches.shape
    side, channels = round(count**0.5), width // (size * size)
    grid = patches.reshape(n, side, side, channels, size, size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(n, channels, side * size, side * size)


class Decoder(nn.Module):
    """Predicts ``outputs`` numbers of every patch from the tokens of the visible ones: a few narrow blocks with RoPE.

    Their ``width`` is a multiple of 32.
    """

    def __init__(self, backbone: Backbone, width: int, depth: int, outputs: int, seed: int) -> None:
        super().__init__()
        config = DINOv3ViTConfig(
            image_size=backbone.image_size,
            patch_size=backbone.patch_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=width // 32,
            num_register_tokens=0,
        )
        config.pos_embed_rescale = None
        self.body = backbone_from_config(config.to_dict(), backbone.image_size, seed)
        self.body.body.embeddings = nn.Identity()  # tokens come from the encoder
        self.n_prefix, self.n_patches = backbone.n_prefix, backbone.n_patches
        self.enter = nn.Linear(backbone.hidden_size, width)
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.leave = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Predictions of all patches [N, P, outputs] from tokens [N, prefix + V, D] of the patches ``visible``."""
        entered = self.enter(tokens)
        n, _, width = entered.shape
        patches = self.mask_token.to(entered.dtype).expand(n, self.n_patches, width)
        patches = patches.scatter(1, _across(visible, width), entered[:, self.n_prefix :])
        whole = torch.cat((entered[:, : self.n_prefix], patches), dim=1)
        whole = self.body.norm(self.body.run_blocks(whole, self.body.context(), 0, self.body.n_blocks))
        predicted: Tensor = self.leave(whole[:, self.n_prefix :])
        return predicted


class Pretext(nn.Module):
    """A backbone with one objective: the loss per image, and the head that is thrown away afterwards.

    Args:
        backbone: what learns.
        config: objective, masking and decoder.
        n_images: how many images there are to tell apart; for ``diet``.
        seed: of the head's starting weights.
        teacher: for ``latent``: a frozen copy of the backbone as it was.
    """

    def __init__(
        self, backbone: Backbone, config: ExploraConfig, *, n_images: int, seed: int, teacher: Backbone | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.teacher = backbone, teacher
        self.objective, self.mask_ratio = config.objective, config.mask_ratio
        self.patch, self.n_patches = backbone.patch_size, backbone.n_patches
        if teacher is not None:
            teacher.requires_grad_(False)
        if self.objective == "latent" and teacher is None:
            raise InputError("teacher must be a backbone for the objective latent, got none; give a copy of the start")
        numbers = 3 * self.patch**2
        width, depth = config.decoder_width, config.decoder_depth
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head: nn.Module
            if self.objective in ("mae", "latent"):
                outputs = numbers if self.objective == "mae" else backbone.hidden_size
                self.head = Decoder(backbone, width, depth, outputs, seed)
            elif self.objective == "simmim":
                if backbone.mask_token is None:
                    raise InputError(
                        "explora.objective simmim must have a backbone with a mask token, got one without; use mae"
                    )
                self.head = nn.Linear(backbone.hidden_size, numbers)
            else:
                self.head = nn.Linear(2 * backbone.hidden_size, n_images)

    def forward(self, pixels: Tensor, order: Tensor, index: Tensor, *, frozen: bool = False) -> Tensor:
        """The loss of every image [N]; lower is better.

        Args:
            pixels: [N, 3, H, W] as the backbone takes them.
            order: what to mask, see ``draw_orders`` [N, P].
            index: the number of every image [N], its class for ``diet``.
            frozen: let no gradient into the backbone.
        """
        learning = torch.is_grad_enabled() and not frozen
        if self.objective == "diet":
            with torch.set_grad_enabled(learning):
                features = self.backbone.pool(encode(self.backbone, pixels))
            logits = self.head(features).float()
            return nn.functional.cross_entropy(logits, index, label_smoothing=_SMOOTHING, reduction="none")
        masked, _ = part(order, self.mask_ratio)
        predicted = self._predict(pixels, order, learning=learning)
        target = self._target(pixels)
        return (_pick(predicted.float(), masked) - _pick(target, masked)).square().mean(dim=(1, 2))

    def reconstruct(self, pixels: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Images with the masked patches taken out (as zeros) and with them predicted, each [N, 3, H, W].

        A prediction is of a patch's pixels around their mean in units of their deviation; both are lent by the
        original, as in MAE's own pictures.

        Raises:
            InputError: an objective that predicts no pixels.
        """
        if self.objective not in ("mae", "simmim"):
            raise InputError(f"objective must be mae or simmim to show pictures, got {self.objective}")
        masked, _ = part(order, self.mask_ratio)
        patches = to_patches(pixels, self.patch)
        predicted = self._predict(pixels, order, learning=False).float()
        predicted = predicted * _deviation(patches) + patches.mean(dim=2, keepdim=True)
        where = _across(masked, patches.shape[2])
        filled = patches.scatter(1, where, _pick(predicted, masked))
        return to_pixels(patches.scatter(1, where, 0.0), self.patch), to_pixels(filled, self.patch)

    def _predict(self, pixels: Tensor, order: Tensor, *, learning: bool) -> Tensor:
        masked, visible = part(order, self.mask_ratio)
        if self.objective == "simmim":
            hidden = torch.zeros_like(order, dtype=torch.bool).scatter(1, masked, True)
            with torch.set_grad_enabled(learning):
                tokens = encode(self.backbone, pixels, masked=hidden)
            return cast("Tensor", self.head(tokens[:, self.backbone.n_prefix :]))
        with torch.set_grad_enabled(learning):
            tokens = encode(self.backbone, pixels, visible)
        return cast("Tensor", self.head(tokens, visible))

    @torch.no_grad()
    def _target(self, pixels: Tensor) -> Tensor:
        """What is to be predicted of every patch [N, P, ...], centred and of unit deviation per patch."""
        if self.teacher is not None:
            features = self.teacher(pixels)[:, self.teacher.n_prefix :].float()
            return nn.functional.layer_norm(features, features.shape[-1:])
        patches = to_patches(pixels, self.patch)
        return (patches - patches.mean(dim=2, keepdim=True)) / _deviation(patches)


def _deviation(patches: Tensor) -> Tensor:
    return (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()


def _across(index: Tensor, width: int) -> Tensor:
    return index.unsqueeze(-1).expand(-1, -1, width)


def _pick(patches: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` [N, V] of patches [N, P, D]."""
    return patches.gather(1, _across(index, patches.shape[2]))
