"""ExPLoRA: go on with self-supervised learning on unlabelled images of the new domain, in a small part of the weights.

The last blocks and all norms are trained whole, the other blocks by LoRA on q and v (Khanna et al., 2406.10973); the
result is merged in fp32. One process. No dropout, no random rotary scale: a step is a function of (seed, epoch, rows),
so a killed run ends as if it had not been.
"""

from __future__ import annotations

import copy
import csv
import io
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import Tensor, nn

from stage1_pro.config import AugmentConfig, Config, ExploraConfig
from stage1_pro.data.images import PreprocessSpec
from stage1_pro.data.loader import TrainLoader, iterate
from stage1_pro.data.photos import ImageFile
from stage1_pro.errors import ArtifactError, InputError, TrainingError
from stage1_pro.files import write_bytes, write_csv
from stage1_pro.models.backbone import Backbone
from stage1_pro.models.masked import Pretext, draw_orders
from stage1_pro.progress import say
from stage1_pro.training import checkpoint
from stage1_pro.training.inference import pick_device
from stage1_pro.training.schedule import seed_everything, uses_bf16, warm_cosine

LEAST_SHARE, LARGEST_SHARE = 0.001, 0.10
COLUMNS = ["epoch", "step", "encoder", "lr", "loss", "held_out_loss", "seconds", "images_per_second"]
TIMINGS = ("seconds", "images_per_second")
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


@dataclass(frozen=True)
class Adapted:
    """An adaptation that has ended: the merged backbone and how it went, epoch by epoch."""

    backbone: Backbone
    trainable: Trainable
    history: list[dict[str, Any]]
    n_trained: int
    n_held_out: int


def make_trainable(backbone: Backbone, config: ExploraConfig, seed: int) -> Trainable:
    """Freeze a backbone but for what is to be trained, and put LoRA into it; its outputs stay the same.

    Raises:
        InputError: the trainable share is outside 0.1% to 10% (``explora.train: full`` has no limit).
    """
    body = backbone.body
    total = sum(p.numel() for p in body.parameters())
    rank, lora = None, None
    if config.train == "full":
        body.requires_grad_(True)
    else:
        body.requires_grad_(False)
        whole = list(backbone.blocks)[-config.blocks :]
        rest = list(backbone.blocks)[: -config.blocks]
        rank = config.rank if rest else None
        if rest:
            wanted = [backbone.targets(index) for index in range(len(rest))]
            names = [name for name, _ in body.named_modules() if any(name in (one["q"], one["v"]) for one in wanted)]
            # LoRA's start draws from the global generator.
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                # peft asks transformers for an attribute under its former name.
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
                torch.manual_seed(seed)
                lora = get_peft_model(
                    body,
                    LoraConfig(
                        r=config.rank,
                        lora_alpha=config.alpha if config.alpha is not None else 2 * config.rank,
                        target_modules=names,
                        lora_dropout=0.0,
                        bias="none",
                    ),
                )
        for module in [*whole, backbone.norm, *(m for b in rest for m in b.modules() if isinstance(m, nn.LayerNorm))]:
            module.requires_grad_(True)
    if (mask_token := backbone.mask_token) is not None:
        mask_token.requires_grad_(config.objective == "simmim")
    trained = sum(p.numel() for p in body.parameters() if p.requires_grad)
    found = Trainable(trained, total, rank, lora)
    if config.train == "explora" and not LEAST_SHARE <= found.share <= LARGEST_SHARE:
        alone = sum(p.numel() for block in whole for p in block.parameters()) / total
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


def adapt(folder: Path, backbone: Backbone, photos: Sequence[ImageFile], spec: PreprocessSpec, config: Config,
          identity: str, begin: Callable[[], None]) -> Adapted:  # fmt: skip
    """Adapt a backbone to images, from ``last.pth`` in ``folder`` where there is one.

    Writes ``last.pth``, ``metrics.csv`` and, for mae and simmim, ``reconstructions.png`` into ``folder``.

    Args:
        folder: working folder, of this adaptation alone.
        backbone: the start; it is changed.
        photos: the images.
        spec: what the backbone takes.
        config: ``explora`` and ``seed`` say what is learned.
        identity: what this adaptation is of; a ``last.pth`` with another one is refused.
        begin: called once when all that learns is built, and so no configuration is refused any more, before
            ``folder`` is read or written.

    Raises:
        InputError: a trainable share outside its limits, or an image that cannot be read any more.
        ArtifactError: ``last.pth`` is of something else.
        TrainingError: the loss is not finite, or memory does not suffice.
    """
    explorer = _Explorer(folder, backbone, photos, spec, config, identity)
    try:
        begin()
        return explorer.run()
    finally:
        explorer.loader.close()


class _Explorer:
    """The components of one adaptation and the loop over them."""

    def __init__(self, folder: Path, backbone: Backbone, photos: Sequence[ImageFile], spec: PreprocessSpec,
                 config: Config, identity: str) -> None:  # fmt: skip
        options = config.explora
        self.folder, self.spec, self.config, self.options, self.identity = folder, spec, config, options, identity
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
        self.optimizer = torch.optim.AdamW(self._groups(), lr=options.lr, betas=(0.9, 0.95))
        self.epoch = self.step_in_epoch = self.step = self.seen = 0
        self.loss_sum = 0.0
        self.history: list[dict[str, Any]] = []

    def run(self) -> Adapted:
        """Learn to the end, and merge."""
        whole = self.trainable
        say(
            f"{self.options.objective} on {len(self.trained_on)} images ({len(self.held_out)} held out), "
            f"{whole.n_trained} of {whole.n_parameters} encoder parameters trained ({whole.share:.2%}), "
            f"{self.loader.steps_per_epoch} steps an epoch, device {self.device.type}"
        )
        if (self.folder / "last.pth").is_file():
            self._restore()
        while self.epoch < self.options.epochs:
            self._epoch()
        if self.options.objective in ("mae", "simmim"):
            write_bytes(self.folder / "reconstructions.png", self._picture())
        write_csv(self.folder / "metrics.csv", self.history, COLUMNS)
        backbone = merge(self.pretext.backbone, whole)
        return Adapted(backbone, whole, self.history, len(self.trained_on), len(self.held_out))

    def _groups(self) -> list[dict[str, Any]]:
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.learned.items():
            decays = parameter.ndim > 1 and not name.endswith(("_token", "register_tokens", "position_embeddings"))
            groups.setdefault((name.startswith("backbone."), decays), []).append(parameter)
        return [
            {"params": found, "encoder": encoder, "weight_decay": self.options.weight_decay if decays else 0.0}
            for (encoder, decays), found in sorted(groups.items())
        ]

    def _epoch(self) -> None:
        options = self.options
        frozen = self.epoch < options.decoder_warmup_epochs
        began, before = time.monotonic(), self.seen
        for batch in self.loader.epoch(self.epoch, self.step_in_epoch):
            rows = batch.index.tolist()
            orders = draw_orders(self.pretext.n_patches, self.config.seed, self.epoch, rows)
            self._learn(batch.pixels, orders, batch.index, frozen=frozen, files=batch.files)
            self.step_in_epoch += 1
            if self.step_in_epoch < self.loader.steps_per_epoch and self.step_in_epoch % options.save_every_steps == 0:
                self._save()
        seconds = time.monotonic() - began
        rate = (self.seen - before) / max(seconds, 1e-9)
        loss, held = self.loss_sum / self.seen, self._held_out_loss()
        self.history.append(
            {
                "epoch": self.epoch, "step": self.step, "encoder": "frozen" if frozen else "trained",
                "lr": self.optimizer.param_groups[0]["lr"], "loss": loss, "held_out_loss": held,
                "seconds": round(seconds, 3), "images_per_second": round(rate, 1),
            }
        )  # fmt: skip
        self.epoch, self.step_in_epoch, self.loss_sum, self.seen = self.epoch + 1, 0, 0.0, 0
        write_csv(self.folder / "metrics.csv", self.history, COLUMNS)
        self._save()
        say(
            f"epoch {self.epoch}/{options.epochs}: loss {loss:.4f}"
            f"{'' if math.isnan(held) else f', held out {held:.4f}'}, {rate:.0f} images/s"
            f"{' (encoder frozen)' if frozen else ''}"
        )

    def _learn(self, pixels: Tensor, orders: Tensor, index: Tensor, *, frozen: bool, files: list[str]) -> None:
        self._set_rates()
        try:
            losses = self._losses(pixels, orders, index, frozen=frozen)
            value = float(losses.detach().sum())
            if not math.isfinite(value):
                raise TrainingError(
                    f"loss must be finite, got {value} at epoch {self.epoch}, step {self.step}; lower explora.lr "
                    f"(last.pth is as it was); the batch was: {', '.join(files[:8])}"
                )
            torch.autograd.backward(losses.mean())
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                f"out of memory at {len(pixels)} images; lower explora.batch_size or model.image_size"
            ) from error
        nn.utils.clip_grad_norm_(self.learned.values(), self.options.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss_sum += value
        self.seen += len(pixels)
        self.step += 1

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
                max(0, self.step - start), warmup, options.epochs * steps - start, _FLOOR
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
        checkpoint.save(
            self.folder / "last.pth",
            {
                "architecture": self.identity, "model_state_dict": self.learned,
                "optimizer_state_dict": self.optimizer.state_dict(), "epoch": self.epoch,
                "step_in_epoch": self.step_in_epoch, "global_step": self.step, "loss_sum": self.loss_sum,
                "seen": self.seen,
                # Without timings: a resumed run must end in the same bytes. metrics.csv has them.
                "history": [{k: v for k, v in row.items() if k not in TIMINGS} for row in self.history],
            },
        )  # fmt: skip

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
        self.epoch, self.step_in_epoch, self.step = (content[k] for k in ("epoch", "step_in_epoch", "global_step"))
        self.loss_sum, self.seen, self.history = (content[k] for k in ("loss_sum", "seen", "history"))
        if (self.folder / "metrics.csv").is_file():
            with (self.folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
                for row, stored in zip(self.history, csv.DictReader(file), strict=False):
                    row.update({name: float(stored[name]) for name in TIMINGS if stored.get(name)})
        say(f"going on from epoch {self.epoch + 1}, step {self.step_in_epoch}")


def _augmentation(options: ExploraConfig) -> AugmentConfig:
    """Crops and mirror images: reconstruction needs no more, and colours carry what roadwork looks like."""
    return AugmentConfig(
        crop_scale=options.crop_scale, horizontal_flip=options.horizontal_flip, rotation_probability=0.0,
        brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0, blur_probability=0.0,
    )  # fmt: skip
