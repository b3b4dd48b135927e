"""ExPLoRA: go on with self-supervised learning on unlabelled images of the new domain, in a small part of the weights.

The last blocks and all norms are trained whole, the other blocks by LoRA on q and v (Khanna et al., 2406.10973); the
result is merged in fp32. One process. No dropout, no random rotary scale: a step is a function of (seed, epoch, rows),
so a killed run ends as if it had not been.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn

from stage1_pro.config import AugmentConfig, Config, ExploraConfig
from stage1_pro.data.images import PreprocessSpec
from stage1_pro.data.loader import Batch, TrainLoader, iterate
from stage1_pro.data.photos import ImageFile
from stage1_pro.errors import ArtifactError, InputError, TrainingError, out_of_memory
from stage1_pro.files import write_bytes
from stage1_pro.models.adapters import insert_lora
from stage1_pro.models.backbone import Backbone
from stage1_pro.models.masked import Pretext, draw_orders
from stage1_pro.progress import say
from stage1_pro.stopping import Stop, between_steps
from stage1_pro.training import checkpoint
from stage1_pro.training.epochs import (
    TrainingPosition,
    group_parameters,
    run_epoch,
    seed_everything,
    uses_bf16,
    warm_cosine,
)
from stage1_pro.training.inference import pick_device
from stage1_pro.training.trackers import Trackers

LEAST_SHARE, LARGEST_SHARE = 0.001, 0.10
COLUMNS = ["epoch", "step", "encoder", "lr", "loss", "held_out_loss", "seconds", "images_per_second"]
_FLOOR = 0.01
# Masks of held-out images are those of an epoch that training never reaches, the same every time.
_HELD_OUT_EPOCH = (1 << 32) - 2
_SHOWN = 6


@dataclass(frozen=True)
class Trainable:
    """How much of an encoder is trained: LoRA's own parameters count as trained, not as the encoder's."""

    n_trained: int
    n_parameters: int
    rank: int | None
    lora: PeftModel | None = None

    @property
    def share(self) -> float:
        """``n_trained / n_parameters``."""
        return self.n_trained / self.n_parameters


def make_trainable(backbone: Backbone, config: ExploraConfig, seed: int) -> Trainable:
    """Freeze a backbone but for what is to be trained, and put LoRA into it; its outputs stay the same.

    Raises:
        InputError: a backbone without patches to leave out, or a trainable share outside 0.1% to 10%
            (``explora.train: full`` has no limit).
    """
    if not backbone.transformer:
        raise InputError(
            "explora must have a vision transformer, of which patches can be left out, got "
            f"{type(backbone.hf).__name__}; choose another model.backbone"
        )
    body = backbone.body
    total = sum(p.numel() for p in body.parameters())
    body.requires_grad_(config.train == "full")
    lora = None
    if config.train == "explora":
        whole, rest = list(backbone.blocks)[-config.blocks :], list(backbone.blocks)[: -config.blocks]
        norms = [m for block in rest for m in block.modules() if isinstance(m, nn.LayerNorm)]
        names = [backbone.targets(index)[word] for index in range(len(rest)) for word in ("q", "v")]
        lora = insert_lora(backbone, names, config.rank, config.alpha, seed) if rest else None
        for module in (*whole, backbone.norm, *norms):
            module.requires_grad_(True)
    if (mask_token := backbone.mask_token) is not None:
        mask_token.requires_grad_(config.objective == "simmim")
    trained = sum(p.numel() for p in body.parameters() if p.requires_grad)
    found = Trainable(trained, total, None if lora is None else config.rank, lora)
    if config.train == "explora" and not LEAST_SHARE <= found.share <= LARGEST_SHARE:
        alone = sum(p.numel() for block in backbone.blocks[-config.blocks :] for p in block.parameters()) / total
        advice = (
            f"{config.blocks} of its {backbone.n_blocks} blocks are {alone:.1%} alone: "
            f"{'use explora.blocks=1 or ' if config.blocks > 1 else ''}a backbone of more blocks"
            if alone > LARGEST_SHARE
            else f"{'lower' if found.share > LARGEST_SHARE else 'raise'} explora.rank, which is {config.rank}"
        )
        raise InputError(
            f"the trainable share must be from {LEAST_SHARE:.1%} to {LARGEST_SHARE:.0%} of the encoder, got "
            f"{found.share:.2%} ({trained} of {total}); {advice}; explora.train=full trains every weight"
        )
    return found


def merge(backbone: Backbone, trainable: Trainable) -> Backbone:
    """Fold LoRA into the weights in fp32 and take it out: a plain backbone on the CPU with the same outputs."""
    backbone = backbone.cpu().float()
    if trainable.lora is not None:
        trainable.lora.merge_and_unload()
    return backbone.requires_grad_(False).eval()


class Explorer:
    """One adaptation of a backbone to images; its folder is read and written from ``run`` on.

    Args:
        folder: working folder, of this adaptation alone.
        backbone: the start; it is changed.
        photos: the images.
        spec: what the backbone takes.
        config: ``explora`` and ``seed`` say what is learned.
        identity: what this adaptation is of; a ``last.pth`` with another one is refused.

    Raises:
        InputError: a trainable share outside its limits.
    """

    def __init__(self, folder: Path, backbone: Backbone, photos: Sequence[ImageFile], spec: PreprocessSpec,
                 config: Config, identity: str) -> None:  # fmt: skip
        options = config.explora
        self.folder, self.spec, self.config, self.options, self.identity = folder, spec, config, options, identity
        self.trackers = Trackers(config.train.trackers, folder)
        seed_everything(config.seed, deterministic=config.train.deterministic)
        self.device = pick_device()
        self.bf16 = uses_bf16(config.train.precision)
        held = 0 if options.objective == "diet" else min(len(photos) - 1, round(options.held_out * len(photos)))
        order = np.random.Generator(np.random.Philox(config.seed)).permutation(len(photos))
        self.held_out = [photos[i] for i in sorted(order[:held])]
        self.trained_on = [photos[i] for i in sorted(order[held:])]
        teacher = copy.deepcopy(backbone) if options.objective == "latent" else None
        self.trainable = make_trainable(backbone, options, config.seed + 2)
        self.pretext = Pretext(
            backbone, options, n_images=len(self.trained_on), seed=config.seed + 1, teacher=teacher
        ).to(self.device).eval()  # fmt: skip
        self.learned = {name: p for name, p in self.pretext.named_parameters() if p.requires_grad}
        self.loader = TrainLoader(
            self.trained_on, np.zeros(len(self.trained_on), dtype=np.int64), spec, _augmentation(options),
            seed=config.seed, batch_size=options.batch_size, workers=config.train.workers,
        )  # fmt: skip
        groups = [
            {"params": found, "encoder": encoder, "weight_decay": options.weight_decay if decays else 0.0}
            for encoder, decays, found in group_parameters(self.learned.items(), "backbone.")
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95))
        self.at = TrainingPosition()

    def close(self) -> None:
        """Stop the workers and the trackers."""
        self.loader.close()
        self.trackers.close()

    def run(self) -> Backbone:
        """Learn to the end, from ``last.pth`` where there is one, and merge: the adapted backbone.

        Writes ``last.pth``, ``metrics.csv`` and, for mae and simmim, ``reconstructions.png``.

        Raises:
            InputError: an image that cannot be read any more.
            ArtifactError: ``last.pth`` is of something else.
            TrainingError: the loss is not finite, or memory does not suffice.
        """
        whole = self.trainable
        say(
            f"{self.options.objective} on {len(self.trained_on)} images ({len(self.held_out)} held out), "
            f"{whole.n_trained} of {whole.n_parameters} encoder parameters trained ({whole.share:.2%}), "
            f"{self.loader.steps_per_epoch} steps an epoch, device {self.device.type}"
        )
        if (self.folder / "last.pth").is_file():
            self._restore()
        self.trackers.open()
        with between_steps() as stop:
            while self.at.epoch < self.options.epochs:
                self._epoch(stop)
                if stop:
                    stop.now()
        if self.options.objective in ("mae", "simmim"):
            write_bytes(self.folder / "reconstructions.png", self._picture())
        self.at.write(self.folder / "metrics.csv", COLUMNS)
        return merge(self.pretext.backbone, whole)

    def _epoch(self, stop: Stop) -> None:
        options, at = self.options, self.at
        frozen = at.epoch < options.decoder_warmup_epochs
        timings = run_epoch(
            self.loader.epoch(at.epoch, at.step_in_epoch), lambda batch: self._learn(batch, frozen=frozen), self._save,
            at, steps=self.loader.steps_per_epoch, save_every=options.save_every_steps, stop=stop,
        )  # fmt: skip
        loss, held = at.loss_sum / at.seen, self._held_out_loss()
        row = {
            "epoch": at.epoch,
            "step": at.global_step,
            "encoder": "frozen" if frozen else "trained",
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": loss,
            "held_out_loss": held,
            **timings,
        }
        at.history.append(row)
        at.begin_next()
        at.write(self.folder / "metrics.csv", COLUMNS)
        self._save()
        self.trackers.log(row, at.global_step)
        say(
            f"epoch {at.epoch}/{options.epochs}: loss {loss:.4f}"
            f"{'' if math.isnan(held) else f', held out {held:.4f}'}, {timings['images_per_second']:.0f} images/s"
            f"{' (encoder frozen)' if frozen else ''}"
        )

    def _learn(self, batch: Batch, *, frozen: bool) -> None:
        """Take one step."""
        self._set_rates()
        orders = draw_orders(self.pretext.n_patches, self.config.seed, self.at.epoch, batch.index.tolist())
        try:
            losses = self._losses(batch.pixels, orders, batch.index, frozen=frozen)
            value = float(losses.detach().sum())
            if not math.isfinite(value):
                raise TrainingError(
                    f"loss must be finite, got {value} at epoch {self.at.epoch}, step {self.at.global_step}; lower "
                    f"explora.lr (last.pth is as it was); the batch was: {', '.join(batch.files[:8])}"
                )
            torch.autograd.backward(losses.mean())
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise TrainingError(
                f"out of memory at {len(batch.pixels)} images; lower explora.batch_size or model.image_size"
            ) from error
        nn.utils.clip_grad_norm_(self.learned.values(), self.options.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.at.stepped(value, len(batch.pixels))

    def _losses(self, pixels: Tensor, orders: Tensor, index: Tensor, *, frozen: bool) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            losses: Tensor = self.pretext(
                pixels.to(self.device), orders.to(self.device), index.to(self.device), frozen=frozen
            )
        return losses

    def _set_rates(self) -> None:
        """Each part warms up when it begins to learn: the head at once, the encoder after the decoder's warm-up."""
        options, steps = self.options, self.loader.steps_per_epoch
        warmup = max(1, round(options.warmup_epochs * steps))
        for group in self.optimizer.param_groups:
            start = options.decoder_warmup_epochs * steps if group["encoder"] else 0
            group["lr"] = options.lr * warm_cosine(
                max(0, self.at.global_step - start), warmup, options.epochs * steps - start, _FLOOR
            )

    def _held_out_loss(self) -> float:
        if not self.held_out:
            return math.nan
        with torch.no_grad():
            losses = [self._losses(pixels, orders, index, frozen=True).cpu() for pixels, orders, index in self._fixed()]
        return float(torch.cat(losses).mean())

    def _fixed(self, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Held-out images (trained-on ones where there are none) as evaluation sees them, under unchanging masks."""
        photos = (self.held_out or self.trained_on)[:limit]
        start = 0
        for pixels in iterate(photos, self.spec, batch_size=self.options.batch_size):
            index = torch.arange(start, start + len(pixels))
            start += len(pixels)
            yield pixels, draw_orders(self.pretext.n_patches, self.config.seed, _HELD_OUT_EPOCH, index.tolist()), index

    def _picture(self) -> bytes:
        """Original, masked and reconstruction side by side, an image a line, as PNG."""
        pixels, orders, _ = next(self._fixed(_SHOWN))
        with torch.no_grad():
            shown = [x.cpu() for x in self.pretext.reconstruct(pixels.to(self.device), orders.to(self.device))]
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.spec.mean, self.spec.std))
        columns = [((x * std + mean).clamp(0, 1) * 255).round().byte().numpy() for x in (pixels, *shown)]
        scale, gap = max(1, 144 // self.spec.height), 4
        tiles = [np.repeat(np.repeat(x.transpose(0, 2, 3, 1), scale, 1), scale, 2) for x in columns]
        side = tiles[0].shape[1] + gap
        sheet = np.full((side * len(pixels) + gap, side * 3 + gap, 3), 255, dtype=np.uint8)
        for column, images in enumerate(tiles):
            for line, image in enumerate(images):
                top, left = gap + line * side, gap + column * side
                sheet[top : top + side - gap, left : left + side - gap] = image
        buffer = io.BytesIO()
        Image.fromarray(sheet).save(buffer, "PNG")
        return buffer.getvalue()

    def _save(self) -> None:
        """Write ``last.pth``: what was learned so far, between two steps."""
        at = self.at
        checkpoint.save(
            self.folder / "last.pth",
            {
                "architecture": self.identity,
                "model_state_dict": self.learned,
                "optimizer_state_dict": self.optimizer.state_dict(),
                "epoch": at.epoch,
                "step_in_epoch": at.step_in_epoch,
                "global_step": at.global_step,
                "loss_sum": at.loss_sum,
                "seen": at.seen,
                "history": at.without_timings(),
            },
        )

    def _restore(self) -> None:
        path = self.folder / "last.pth"
        content = checkpoint.load(path)
        if content["architecture"] != self.identity:
            raise ArtifactError(
                f"{path} must be of this base, pool and configuration, but one of them has changed; "
                "start anew with --overwrite"
            )
        state = content["model_state_dict"]
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in self.learned.items()}:
            raise ArtifactError(f"{path} does not fit what is trained; start anew with --overwrite")
        with torch.no_grad():
            for name, parameter in self.learned.items():
                parameter.copy_(state[name])
        self.optimizer.load_state_dict(content["optimizer_state_dict"])
        self.at = TrainingPosition(**{field.name: content[field.name] for field in fields(TrainingPosition)})
        self.at.restore_timings(self.folder / "metrics.csv")
        say(f"going on from epoch {self.at.epoch + 1}, step {self.at.step_in_epoch}")


def _augmentation(options: ExploraConfig) -> AugmentConfig:
    """Crops and mirror images: reconstruction needs no more, and colours carry what roadwork looks like."""
    return AugmentConfig(
        crop_scale=options.crop_scale, horizontal_flip=options.horizontal_flip, rotation_probability=0.0,
        brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, blur_probability=0.0,
    )  # fmt: skip
