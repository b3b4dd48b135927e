"""``Session``: what one training is built of, from splits and configuration to optimizer and moving average."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from stage1_pro.config import ADAPTER_MODES, Config
from stage1_pro.data.loader import Batch, TrainLoader, epoch_order
from stage1_pro.data.photos import ImageFile, Photo
from stage1_pro.data.splits import Row, Splits
from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.files import load_npz, save_npz, sha256_bytes
from stage1_pro.models.adapters import Adaptation, adapt
from stage1_pro.models.backbone import PRESETS
from stage1_pro.models.model import Architecture, create_model
from stage1_pro.progress import say
from stage1_pro.training.environment import check_environment, describe_environment
from stage1_pro.training.epochs import group_parameters, seed_everything, uses_bf16, warm_cosine
from stage1_pro.training.inference import Arrays, Draw, run_over
from stage1_pro.training.losses import Objective, balanced_weights
from stage1_pro.training.run import Start, versions
from stage1_pro.training.taps import TapChoice, candidates, choose_tap, table
from stage1_pro.training.trackers import Trackers

# How much of what a training draws is hashed into start.json.
START_EPOCHS = 3
START_BATCHES = 2
Trained = Literal["train", "val_select"]


class Log:
    """``train.log``: what the process was doing, line by line; timings live here, not in artefacts."""

    def __init__(self, path: Path, active: bool) -> None:
        self._path = path if active else None

    def __call__(self, event: str) -> None:
        """Append a line with the time and this process's number."""
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {os.getpid()} {event}\n")


class FeatureLoader:
    """Batches of a frozen backbone's cached features, in the order in which ``TrainLoader`` gives the images."""

    def __init__(
        self, arrays: Arrays, files: list[str], labels: NDArray[Any], config: Config, rank: int, world: int
    ) -> None:
        self._inputs = [torch.from_numpy(arrays[name]) for name in ("features_a", "features_b")]
        self._labels, self._files = torch.from_numpy(labels), files
        self._seed, self._rank, self._world = config.seed, rank, world
        self._batch = min(config.train.batch_size, len(files))
        self.steps_per_epoch = len(files) // self._batch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from ``start_step`` on."""
        order = torch.from_numpy(epoch_order(len(self._files), self._seed, epoch))
        for step in range(start_step, self.steps_per_epoch):
            index = order[step * self._batch : (step + 1) * self._batch][self._rank :: self._world]
            inputs = tuple(array[index] for array in self._inputs)
            yield Batch(inputs, self._labels[index], index, [self._files[i] for i in index.tolist()])

    def close(self) -> None:
        """Nothing to stop."""


class Session:
    """The components of one training, none of which changes the run's folder while it is built.

    Attributes:
        config: the configuration with image size and tap resolved.
        main: whether this is the process that writes.
        rows: of ``train`` and ``val_select``; ``labels`` are their class indices.
        model: the whole model; ``trained`` is what learns (the heads alone in mode linear), ``net`` the same as the
            accelerator wraps it, ``ema`` its moving average.
        adaptation: what an adapter mode did to the model.
        base_fingerprint: of a base that ``last.pth`` does not hold.
        tap_choice: what ``model.tap: auto`` measured.
        features: of a frozen backbone, by split, in mode linear.
        class_weights: [K].
        objective: the losses with their weights.
        clipped: parameters whose gradients' norm is limited together.

    Raises:
        InputError: a configuration that does not fit the model, the splits or the number of processes.
        ArtifactError: weights that do not fit, or a backbone that mode full would train in part.
        DependencyError: a tracker's library is missing.
    """

    def __init__(self, run: Path, splits: Splits, config: Config, legs: Sequence[int] = ()) -> None:
        check_environment()
        self.run, self.splits, self.config, self.legs = run, splits, config, tuple(legs)
        options = config.train
        self.trackers = Trackers(options.trackers, run)
        seed_everything(config.seed, deterministic=options.deterministic)
        self._open_accelerator()
        self.rows: dict[Trained, list[Row]] = {name: splits.of(name) for name in get_args(Trained)}
        self.labels = {name: splits.indices(rows) for name, rows in self.rows.items()}
        labels, classes = torch.from_numpy(self.labels["train"]), len(splits.classes)
        balanced = options.class_weights == "balanced"
        weights = balanced_weights(labels, classes) if balanced else torch.ones(classes)
        self.class_weights = weights.to(self.device)
        self._build_model()
        self.adaptation: Adaptation | None = None
        self.base_fingerprint: str | None = None
        if options.mode == "linear":
            self.base_fingerprint = self.model.backbone.fingerprint()
            self.model.requires_grad_(False)
            self.model.heads.requires_grad_(True)
        elif options.mode in ADAPTER_MODES:
            self.adaptation = adapt(self.model, options.mode, config.adapter, config.seed)
            self.base_fingerprint = self.adaptation.base_fingerprint
        self.objective = Objective(options)
        # Without a loss on it the gate stays as it starts.
        self.model.heads.gate.requires_grad_(self.objective.reads_gate)
        self.model.heads.gate.stop_features = config.gate.stop_features
        if (mask_token := self.model.backbone.mask_token) is not None:
            mask_token.requires_grad_(False)
        if options.mode == "full":
            self._check_all_is_trained()
        if options.gradient_checkpointing:
            self.model.backbone.checkpoint_activations()
        self.model.to(self.device)
        self.features: dict[str, Arrays] = {}
        self.trained: nn.Module = self.model
        if options.mode == "linear":
            self.model.eval()
            self.features = {name: self._cached_features(name) for name in self.rows}
            self.trained = self.model.heads
        self.source = self._open_source(options.workers, self.rank, self.world)
        self._build_optimizer()
        self._say_what_is_trained()
        # Building an adapter draws from the global stream too: dropout starts from the seed whatever was built.
        torch.manual_seed(config.seed)

    @property
    def architecture(self) -> Architecture:
        """The model's."""
        return self.model.architecture

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are validated and kept: the moving average where there is one."""
        return self.trained if self.ema is None else self.ema.module

    def say(self, message: str) -> None:
        """Tell people, once for all processes."""
        if self.main:
            say(message)

    def photos(self, split: Trained) -> list[Photo]:
        """Photos of a split's rows."""
        return self.splits.photos_of(self.rows[split])

    def over(
        self,
        forward: Callable[[Tensor], dict[str, Tensor]],
        photos: Sequence[ImageFile],
        description: str = "",
        draw: Draw | None = None,
    ) -> Arrays:
        """What ``run_over`` gives, under the training's precision."""

        def cast(pixels: Tensor) -> dict[str, Tensor]:
            with self.accelerator.autocast():
                return forward(pixels)

        return run_over(
            cast, photos, self.architecture.preprocessing, device=self.device, workers=self.config.train.workers,
            description=description, draw=draw,
        )  # fmt: skip

    def join(self, own: Arrays, total: int) -> Arrays:
        """Put the processes' interleaved shares back into row order."""
        shares: list[Arrays] = gather_object([own])
        joined = {name: np.empty((total, *one.shape[1:]), dtype=one.dtype) for name, one in shares[0].items()}
        for rank, share in enumerate(shares):
            for name, rows in share.items():
                joined[name][rank :: self.world] = rows
        return joined

    def describe_start(self) -> Start:
        """Hashes of what a comparison holds equal; reads the first batches as training will, and draws nothing."""
        rows = self.rows["train"]
        drawn = [rows[i].id for epoch in range(START_EPOCHS) for i in epoch_order(len(rows), self.config.seed, epoch)]
        names = zip(rows, self.photos("train"), strict=True)
        ids = {name: row.id for row, photo in names for name in (row.file, str(photo))}
        source = self._open_source(workers=0, rank=0, world=1)
        batches = (batch for epoch in range(START_BATCHES) for batch in source.epoch(epoch))
        read, pixels = [], hashlib.sha256()
        for batch in itertools.islice(batches, START_BATCHES):
            read += [f"{ids[file]} {y}" for file, y in zip(batch.files, batch.labels.tolist(), strict=True)]
            pixels.update(batch.inputs[0].numpy().tobytes())
        source.close()
        heads = {k: v.detach().cpu().contiguous() for k, v in sorted(self.model.heads.state_dict().items())}
        return Start(
            seed=self.config.seed,
            split_hashes=self.splits.hashes,
            head_shapes={name: list(tensor.shape) for name, tensor in heads.items()},
            heads=sha256_bytes(b"".join(name.encode() + tensor.numpy().tobytes() for name, tensor in heads.items())),
            order=sha256_bytes("\n".join(drawn).encode()),
            batch_size=self.config.train.batch_size,
            batch_rows=sha256_bytes("\n".join(read).encode()),
            batch_inputs=None if self.config.train.mode == "linear" else pixels.hexdigest(),
            preprocessing=self.architecture.preprocessing.fingerprint(),
            augmentation=sha256_bytes(self.config.augment.model_dump_json().encode()),
            n_trainable=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            n_parameters=sum(p.numel() for p in self.model.parameters()),
            base_fingerprint=self.base_fingerprint or self.model.backbone.fingerprint(),
            versions=versions(),
            environment=describe_environment(self.device),
        )

    # ---------------------------------------------------------------------------- building

    def _open_accelerator(self) -> None:
        options = self.config.train
        # It would hold a process to the precision of its first training.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="bf16" if uses_bf16(options.precision) else "no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main, self.device = self.accelerator.is_main_process, self.accelerator.device
        if options.batch_size % self.world:
            raise InputError(
                f"train.batch_size must be a multiple of the {self.world} processes, got {options.batch_size}"
            )
        self.log = Log(self.run / "train.log", self.main)

    def _build_model(self) -> None:
        asked = self.config.model
        of = (self.splits.classes, self.splits.positive, self.config.seed)
        self.model = create_model(asked, *of)
        self.tap_choice = None
        if asked.tap == "auto":
            self.tap_choice = self._measure_taps()
            self.model = create_model(asked.model_copy(update={"tap": self.tap_choice.tap}), *of)
        found = self.architecture
        resolved = {"image_size": found.image_size, "tap": found.tap, "resize": found.preprocessing.resize}
        self.config = self.config.model_copy(update={"model": asked.model_copy(update=resolved)})

    def _check_all_is_trained(self) -> None:
        own = self.model.backbone.named_parameters()
        frozen = [name for name, one in own if not one.requires_grad and one is not self.model.backbone.mask_token]
        if frozen:
            raise ArtifactError(
                f"all weights of {self.architecture.backbone.source} must be trained in mode full, got {len(frozen)} "
                f"frozen tensors such as {frozen[0]}; use train.mode=linear, or a backbone that freezes nothing"
            )

    def _measure_taps(self) -> TapChoice:
        """Probe the candidates on the starting backbone; the main process's choice holds for all."""
        if self.config.model.backbone in PRESETS:
            raise InputError(
                f"model.tap must be a block for the preset {self.config.model.backbone}, got auto; it starts from "
                "random weights, whose blocks say nothing of where a trained one can be read"
            )
        choice: list[TapChoice | None] = [None]
        if self.main:
            model = self.model.to(self.device).eval()
            taps = candidates(model.backbone.n_blocks)

            def forward(pixels: Tensor) -> dict[str, Tensor]:
                return {str(tap): x for tap, x in model.features_at(pixels, taps).items()}

            found = {}
            for name in self.rows:
                arrays = self.over(forward, self.photos(name), f"{name} rows for the tap")
                found[name] = {int(tap): x for tap, x in arrays.items()}
            labels, weights = (self.labels["train"], self.labels["val_select"]), self.class_weights.cpu().numpy()
            measured = choose_tap(found["train"], found["val_select"], labels, weights, self.splits.hashes)
            for line in table(measured):
                self.say(line)
            choice[0] = measured
        broadcast_object_list(choice)
        assert choice[0] is not None
        return choice[0]

    def _open_source(self, workers: int, rank: int, world: int) -> TrainLoader | FeatureLoader:
        labels, config = self.labels["train"], self.config
        if config.train.mode == "linear":
            files = [row.file for row in self.rows["train"]]
            return FeatureLoader(self.features["train"], files, labels, config, rank, world)
        return TrainLoader(
            self.photos("train"), labels, self.architecture.preprocessing, config.augment, seed=config.seed,
            batch_size=config.train.batch_size, rank=rank, world=world, workers=workers,
        )  # fmt: skip

    def _cached_features(self, split: Trained) -> Arrays:
        """Both stages' features of a split, computed once per backbone, preprocessing and rows."""
        backbone = sha256_bytes(
            "".join(
                f"{k}{sha256_bytes(v.detach().cpu().numpy().tobytes())}"
                for k, v in sorted(self.model.state_dict().items())
                if not k.startswith("heads.")
            ).encode()
        )
        spec = self.architecture.preprocessing
        key = sha256_bytes(f"{backbone}{spec.fingerprint()}{self.splits.hashes[split]}{self.model.tap}".encode())
        path = self.run / f"features_{split}.npz"
        if path.is_file():
            with contextlib.suppress(InputError):
                stored = load_npz(path)
                if str(stored.pop("key")) == key:
                    self.log(f"features {split} read")
                    return stored
        total = len(self.rows[split])
        self.say(f"features of {total} {split} rows (once)")

        def forward(pixels: Tensor) -> dict[str, Tensor]:
            features_a, features_b = self.model.features(pixels)
            return {"features_a": features_a, "features_b": features_b}

        own = self.over(forward, self.photos(split)[self.rank :: self.world], f"features {split}")
        arrays = self.join(own, total)
        if self.main:
            save_npz(path, {**arrays, "key": np.asarray(key)})
        self.accelerator.wait_for_everyone()
        return arrays

    def _build_optimizer(self) -> None:
        options, steps = self.config.train, self.source.steps_per_epoch
        groups = [
            {
                "params": found,
                "lr": (options.head_lr or options.lr) if is_head else options.lr,
                "weight_decay": options.weight_decay if decays else 0.0,
            }
            for is_head, decays, found in group_parameters(self.model.named_parameters(), "heads.")
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.999))
        self.total_steps = options.epochs * steps
        warmup = max(1, round(options.warmup_epochs * steps))
        began = self.legs[-1] * steps if self.legs else 0  # the leg at hand has a schedule of its own
        self.scheduler = LambdaLR(
            self.optimizer,
            lambda step: warm_cosine(max(0, step - began), warmup, self.total_steps - began, options.min_lr_ratio),
        )
        self.ema = AveragedModel(self.trained, multi_avg_fn=_ema(options.ema_decay)) if options.ema_decay > 0 else None
        if self.ema is not None:
            for averaged, parameter in zip(self.ema.module.parameters(), self.trained.parameters(), strict=True):
                if not parameter.requires_grad:
                    averaged.data = parameter.data  # frozen: one copy serves both, and is not averaged
            self.ema.requires_grad_(False)
        self.net: nn.Module = self.accelerator.prepare_model(self.trained)
        gate = [p for p in self.model.heads.gate.parameters() if p.requires_grad]
        rest = [p for p in self.trained.parameters() if not any(p is own for own in gate)]
        # The hinge pulls the gate hard, and that must not shorten everybody's step.
        self.clipped = [rest, gate] if gate and self.config.gate.stop_features else [[*rest, *gate]]

    def _say_what_is_trained(self) -> None:
        trainable = sum(p.numel() for p in self.trained.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in self.model.parameters())
        self.say(
            f"{self.architecture.backbone.source}, mode {self.config.train.mode}: {whole / 1e6:.2f} M parameters, "
            f"{trainable / 1e6:.2f} M trained ({100 * trainable / whole:.1f}%), {len(self.rows['train'])} train rows, "
            f"{self.source.steps_per_epoch} steps an epoch, device {self.device.type}, {self.world} process(es)"
        )


def _ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """Moving average whose decay grows with the steps, so that early weights do not linger."""

    @torch.no_grad()
    def update(averaged: Any, current: Any, count: Any) -> None:
        steps = int(count)
        weight = 1 - min(decay, (1 + steps) / (10 + steps))
        apart = [(a, b) for a, b in zip(averaged, current, strict=True) if a.data_ptr() != b.data_ptr()]
        torch._foreach_lerp_([a for a, _ in apart], [b for _, b in apart], weight)

    return update
