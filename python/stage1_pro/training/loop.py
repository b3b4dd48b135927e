"""Training: one ``train`` that builds every component itself, survives being killed, and resumes exactly."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import itertools
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from stage1_pro.config import ADAPTER_MODES, Config
from stage1_pro.data.images import PreprocessSpec
from stage1_pro.data.loader import TrainLoader, epoch_order
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Row, Splits
from stage1_pro.errors import ArtifactError, InputError, TrainingError
from stage1_pro.files import load_npz, save_npz, sha256_bytes, write_bytes, write_csv
from stage1_pro.metrics.figures import BAND_METRICS, risk_band, risk_coverage_png
from stage1_pro.metrics.intervals import Intervals, bootstrap, metric_names
from stage1_pro.metrics.measured import Metric
from stage1_pro.metrics.probabilistic import accuracy, auroc, balanced_accuracy
from stage1_pro.metrics.selective import augrc
from stage1_pro.models.adapters import Adaptation, adapt, merged_state, replace_trained, save_adapter
from stage1_pro.models.backbone import PRESETS
from stage1_pro.models.model import (
    Architecture,
    Outputs,
    Stage1Model,
    check_architecture,
    check_tensors,
    create_model,
    fingerprint,
)  # fmt: skip
from stage1_pro.policies.ranking import DIFFERENCE, GATE, JOINT, SOFTMAX, GateChoice, rank_answers
from stage1_pro.policies.softmax import confidence, softmax
from stage1_pro.progress import say
from stage1_pro.training import checkpoint
from stage1_pro.training.gate_head import fit_gate
from stage1_pro.training.inference import Arrays, infer, named_logits, run_over, save_calibration
from stage1_pro.training.losses import as_share, balanced_weights, joint_loss, selective_loss, selective_sums
from stage1_pro.training.run import Start, check_run, exclusive, forget_training, versions, write_config
from stage1_pro.training.schedule import seed_everything, uses_bf16, warm_cosine
from stage1_pro.training.taps import (
    TapChoice,  # fmt: skip
    candidates,
    choose_tap,
    table,
)

SMALLEST_MICRO_BATCH = 16
# Stage A's suite on val_select, each with the ends of its interval.
SUITE = metric_names(exits=False)
N_REPLICATES = 500
# How much of what a training draws is hashed into start.json.
START_EPOCHS = 3
START_BATCHES = 2
COLUMNS = [
    "epoch", "step", "lr", "train_loss", "train_accuracy", "balanced_accuracy", "auroc",
    *(f"{name}{end}" for name in SUITE for end in ("", "_low", "_high")),
    "accuracy_b", "augrc_b", "gate_augrc", "best", "seconds", "images_per_second",
]  # fmt: skip
LAST_KEYS = ("model_state_dict", "optimizer_state_dict", "scheduler_state_dict", "epoch", "global_step",
             "sampler_state", "best_acc", "best_augrc", "patience_counter", "ema_state_dict", "rng_state", "world",
             "split_hashes", "progress")  # fmt: skip
TIMINGS = ("seconds", "images_per_second")


@dataclass(frozen=True)
class TrainResult:
    """What a finished training gives: where it is and its best epoch's figures on ``val_select``.

    ``peak_memory`` is in bytes: what the GPU's allocator held at most, or without one the largest resident size of
    this process; processes that decode images are not in it.
    """

    run: Path
    epochs: int
    best_epoch: int
    best: dict[str, Any]
    seconds: float
    peak_memory: int
    device: str


@dataclass(frozen=True)
class Batch:
    """Inputs of the trained module (one tensor or several, rows first), labels [N], file names."""

    inputs: tuple[Tensor, ...]
    labels: Tensor
    files: list[str]


class Source(Protocol):
    """Where an epoch's batches of this process come from."""

    steps_per_epoch: int

    def batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        """Batches of one epoch from a step on, the same whenever asked."""

    def close(self) -> None:
        """Stop workers."""


@dataclass
class State:
    """All that changes while training and is not inside a torch object; stored in ``last.pth``."""

    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    best_augrc: float = math.inf
    best_nll: float = math.inf
    best_acc: float = -1.0
    best_epoch: int = -1
    patience_counter: int = 0
    micro_batch: int = 0
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


def train(
    run: Path | str,
    config: Config | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    explora: bool = False,
) -> TrainResult:
    """Train the configured model on the splits in a run folder.

    Builds model, loaders, heads, optimizer and schedule itself. Reads ``train`` rows for learning and
    ``val_select`` rows for choosing; writes ``val_calib``'s outputs at the end; never touches ``val_test``.

    Args:
        run: folder with ``splits.json``.
        config: the configuration; with ``resume`` it defaults to the run's own.
        resume: go on from ``last.pth`` (or from the start when none was written yet).
        overwrite: forget an earlier training in this folder.
        explora: start from the backbone that ``stage1 explora`` left in the run; a resumed training keeps its own.

    Raises:
        InputError: no splits, an earlier training in the way, or a resumed configuration that differs.
        ArtifactError: a checkpoint that does not fit.
        TrainingError: out of memory at the smallest batch, or a loss that is not finite.
    """
    run = Path(run)
    splits, config = check_run(run, config, resume=resume, overwrite=overwrite, explora=explora)
    with exclusive(run) if int(os.environ.get("RANK", "0")) == 0 else contextlib.nullcontext():
        trainer = _Trainer(run, splits, config)
        trainer.begin(resume=resume)
        return trainer.fit()


class _Images:
    """Augmented training images."""

    def __init__(self, splits: Splits, rows: list[Row], labels: np.ndarray[Any, Any], spec: PreprocessSpec,
                 config: Config, rank: int, world: int) -> None:  # fmt: skip
        self._loader = TrainLoader(
            [splits.path(row) for row in rows], labels, spec, config.augment, seed=config.seed,
            batch_size=config.train.batch_size, rank=rank, world=world, workers=config.train.workers,
        )  # fmt: skip
        self.steps_per_epoch = self._loader.steps_per_epoch

    def batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        for item in self._loader.epoch(epoch, start_step):
            yield Batch((item.pixels,), item.labels, item.files)

    def close(self) -> None:
        self._loader.close()


class _Features:
    """Cached features of a frozen backbone, in the same order the images would come."""

    def __init__(self, arrays: Arrays, rows: list[Row], labels: np.ndarray[Any, Any], config: Config,
                 rank: int, world: int) -> None:  # fmt: skip
        self._inputs = [torch.from_numpy(arrays[name]) for name in ("features_a", "features_b")]
        self._labels = torch.from_numpy(labels)
        self._files = [row.file for row in rows]
        self._seed, self._rank, self._world = config.seed, rank, world
        self._batch = min(config.train.batch_size, len(rows))
        self.steps_per_epoch = len(rows) // self._batch

    def batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        order = torch.from_numpy(epoch_order(len(self._files), self._seed, epoch))
        for step in range(start_step, self.steps_per_epoch):
            index = order[step * self._batch : (step + 1) * self._batch][self._rank :: self._world]
            yield Batch(
                tuple(array[index] for array in self._inputs),
                self._labels[index],
                [self._files[i] for i in index.tolist()],
            )

    def close(self) -> None:
        """Nothing to stop."""


class _Log:
    """``train.log``: what the process was doing, line by line; timings live here, not in artefacts."""

    def __init__(self, path: Path, active: bool) -> None:
        self._path = path if active else None

    def __call__(self, event: str) -> None:
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {os.getpid()} {event}\n")


class _Trainer:
    """The components of one training and the loop over them."""

    def __init__(self, run: Path, splits: Splits, config: Config) -> None:
        self.run, self.splits, self.config = run, splits, config
        options = config.train
        seed_everything(config.seed, deterministic=options.deterministic)
        # It would hold a process to the precision of its first training.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="bf16" if uses_bf16(options.precision) else "no",
            log_with="tensorboard" if options.tensorboard else None,
            project_dir=str(run),
        )
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main = self.accelerator.is_main_process
        if options.batch_size % self.world:
            raise InputError(
                f"train.batch_size must be a multiple of the {self.world} processes, got {options.batch_size}"
            )
        self.device = self.accelerator.device
        self.log = _Log(run / "train.log", self.main)
        self.rows = {name: splits.of(name) for name in ("train", "val_select")}
        self.labels = {
            name: np.asarray([splits.classes.index(row.label) for row in rows], dtype=np.int64)
            for name, rows in self.rows.items()
        }
        self.model: Stage1Model = create_model(config.model, splits.classes, splits.positive, config.seed)
        self.tap_choice = self._measure_taps() if config.model.tap == "auto" else None
        if self.tap_choice is not None:
            chosen = config.model.model_copy(update={"tap": self.tap_choice.tap})
            self.model = create_model(chosen, splits.classes, splits.positive, config.seed)
        self._resolve_config()
        self.adaptation: Adaptation | None = None
        # Of a base that last.pth does not hold.
        self.base_fingerprint: str | None = None
        if options.mode == "linear":
            self.base_fingerprint = self.model.backbone.fingerprint()
            self.model.requires_grad_(False)
            self.model.heads.requires_grad_(True)
        elif options.mode in ADAPTER_MODES:
            self.adaptation = adapt(self.model, options.mode, config.adapter, config.seed)
            self.base_fingerprint = self.adaptation.base_fingerprint
        # Without a loss on it the gate stays as it starts.
        self.selective = options.selective_weight > 0 or options.coverage_weight > 0
        self.model.heads.gate.requires_grad_(self.selective)
        self.model.heads.gate.stop_features = config.gate.stop_features
        if (mask_token := self.model.backbone.hf.embeddings.mask_token) is not None:
            mask_token.requires_grad_(False)
        if options.gradient_checkpointing:
            self.model.backbone.checkpoint_activations()
        self.model.to(self.device)
        self._build()

    # ---------------------------------------------------------------------------- building

    @property
    def architecture(self) -> Architecture:
        return self.model.architecture

    def _resolve_config(self) -> None:
        model = self.config.model.model_copy(
            update={"image_size": self.architecture.image_size, "tap": self.architecture.tap}
        )
        self.config = self.config.model_copy(update={"model": model})

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
                with self.accelerator.autocast():
                    return {str(tap): x for tap, x in model.features_at(pixels, taps).items()}

            found = {}
            for name, rows in self.rows.items():
                paths = [self.splits.path(row) for row in rows]
                arrays = run_over(
                    forward, paths, model.architecture.preprocessing, device=self.device,
                    workers=self.config.train.workers, description=f"{name} rows for the tap",
                )  # fmt: skip
                found[name] = {int(tap): x for tap, x in arrays.items()}
            measured = choose_tap(
                found["train"], found["val_select"], (self.labels["train"], self.labels["val_select"]),
                self._class_weights().numpy(), self.splits.hashes,
            )  # fmt: skip
            for line in table(measured):
                self._say(line)
            choice[0] = measured
        if self.world > 1:
            broadcast_object_list(choice)
        assert choice[0] is not None
        return choice[0]

    def _class_weights(self) -> Tensor:
        labels, classes = torch.from_numpy(self.labels["train"]), len(self.splits.classes)
        balanced = self.config.train.class_weights == "balanced"
        return balanced_weights(labels, classes) if balanced else torch.ones(classes)

    def _build(self) -> None:
        options = self.config.train
        self.source: Source
        self.trained: nn.Module
        if options.mode == "linear":
            self.model.eval()
            self.features = {name: self._cached_features(name) for name in self.rows}
            self.trained = self.model.heads
        else:
            self.trained = self.model
        self.source = self._open_source(self.config, self.rank, self.world)
        self.weights = self._class_weights().to(self.device)
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=options.lr, betas=(0.9, 0.999))
        total = options.epochs * self.source.steps_per_epoch
        warmup = max(1, round(options.warmup_epochs * self.source.steps_per_epoch))
        self.scheduler = LambdaLR(self.optimizer, lambda step: warm_cosine(step, warmup, total, options.min_lr_ratio))
        self.ema = AveragedModel(self.trained, multi_avg_fn=_ema(options.ema_decay)) if options.ema_decay > 0 else None
        if self.ema is not None:
            for averaged, parameter in zip(self.ema.module.parameters(), self.trained.parameters(), strict=True):
                if not parameter.requires_grad:
                    averaged.data = parameter.data  # frozen: one copy serves both, and is not averaged
            self.ema.requires_grad_(False)
        self.net: nn.Module = self.accelerator.prepare_model(self.trained)
        self.state = State(micro_batch=options.micro_batch or options.batch_size // self.world)
        self.total_steps = total
        gate = [p for p in self.model.heads.gate.parameters() if p.requires_grad]
        rest = [p for p in self.trained.parameters() if not any(p is own for own in gate)]
        self.clipped = [rest, gate] if gate and self.config.gate.stop_features else [[*rest, *gate]]
        trainable = sum(p.numel() for p in self.trained.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in self.model.parameters())
        self._say(
            f"{self.architecture.backbone.source}, mode {options.mode}: {whole / 1e6:.2f} M parameters, "
            f"{trainable / 1e6:.2f} M trained ({100 * trainable / whole:.1f}%), {len(self.rows['train'])} train rows, "
            f"{self.source.steps_per_epoch} steps an epoch, device {self.device.type}, {self.world} process(es)"
        )

        # Building an adapter draws from the global stream too: dropout starts from the seed whatever was built.
        torch.manual_seed(self.config.seed)

    def _open_source(self, config: Config, rank: int, world: int) -> Source:
        rows, labels = self.rows["train"], self.labels["train"]
        if config.train.mode == "linear":
            return _Features(self.features["train"], rows, labels, config, rank, world)
        return _Images(self.splits, rows, labels, self.architecture.preprocessing, config, rank, world)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        options = self.config.train
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                decays = parameter.ndim > 1 and not name.endswith(
                    ("cls_token", "register_tokens", "position_embeddings")
                )
                groups.setdefault((name.startswith("heads."), decays), []).append(parameter)
        return [
            {
                "params": parameters,
                "lr": (options.head_lr or options.lr) if is_head else options.lr,
                "weight_decay": options.weight_decay if decays else 0.0,
            }
            for (is_head, decays), parameters in sorted(groups.items())
        ]

    def _cached_features(self, split: Any) -> Arrays:
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
        rows = self.rows[split][self.rank :: self.world]
        self._say(f"features of {len(self.rows[split])} {split} rows (once)")

        def forward(pixels: Tensor) -> dict[str, Tensor]:
            with self.accelerator.autocast():
                features_a, features_b = self.model.features(pixels)
            return {"features_a": features_a, "features_b": features_b}

        own = run_over(forward, [self.splits.path(row) for row in rows], spec, device=self.device,
                       workers=self.config.train.workers, description=f"features {split}")  # fmt: skip
        arrays = self._join(own, len(self.rows[split]))
        if self.main:
            save_npz(path, {**arrays, "key": np.asarray(key)})
        self.accelerator.wait_for_everyone()
        return arrays

    def _join(self, own: Arrays, total: int) -> Arrays:
        """Put the processes' interleaved shares back into row order."""
        if self.world == 1:
            return own
        shares: list[Arrays] = gather_object([own])
        joined: Arrays = {}
        for name, first in shares[0].items():
            out = np.empty((total, *first.shape[1:]), dtype=first.dtype)
            for rank, share in enumerate(shares):
                out[rank :: self.world] = share[name]
            joined[name] = out
        return joined

    # ---------------------------------------------------------------------------- the loop

    def begin(self, *, resume: bool) -> None:
        """Take over the folder, once everything is built: an earlier training is given up no sooner."""
        if self.main:
            if not resume:
                forget_training(self.run)
            if self.tap_choice is not None:
                self.tap_choice.write(self.run / "tap.json")
            write_config(self.run, self.config, self.splits)
            if not (self.run / "start.json").is_file():
                self._describe_start().write(self.run / "start.json")
        self.accelerator.wait_for_everyone()
        if resume and (self.run / "last.pth").is_file():
            self._restore()

    def _describe_start(self) -> Start:
        """Hashes of what a comparison holds equal; reads the first batches as training will, and draws nothing."""
        rows = self.rows["train"]
        drawn = [rows[i].id for epoch in range(START_EPOCHS) for i in epoch_order(len(rows), self.config.seed, epoch)]
        ids = {name: row.id for row in rows for name in (row.file, str(self.splits.path(row)))}
        alone = self.config.train.model_copy(update={"workers": 0})
        source = self._open_source(self.config.model_copy(update={"train": alone}), 0, 1)
        batches = (batch for epoch in range(START_BATCHES) for batch in source.batches(epoch, 0))
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
            base_fingerprint=self.model.backbone.fingerprint()
            if self.adaptation is None
            else self.adaptation.base_fingerprint,
            versions=versions(),
        )

    def fit(self) -> TrainResult:
        """Train to the end, and write what calibration reads."""
        began = time.monotonic()
        try:
            if self.config.train.tensorboard:
                self.accelerator.init_trackers("tensorboard")
            while not self.state.finished:
                self._epoch()
        finally:
            self.source.close()
            if self.config.train.tensorboard:
                self.accelerator.end_training()
        if self.main:
            self._finish()
        self.accelerator.wait_for_everyone()
        best = self.state.history[self.state.best_epoch]
        seconds = time.monotonic() - began
        return TrainResult(
            self.run, len(self.state.history), self.state.best_epoch, best, seconds, peak_memory(self.device),
            self.device.type,
        )  # fmt: skip

    def _epoch(self) -> None:
        state, options = self.state, self.config.train
        self.log(f"epoch {state.epoch} train from step {state.step_in_epoch}")
        self.trained.train()
        if options.mode == "linear":
            self.model.backbone.eval()
        began, rows_before = time.monotonic(), state.seen
        with self._progress() as advance:
            for batch in self.source.batches(state.epoch, state.step_in_epoch):
                self._step(batch)
                advance()
                done = state.step_in_epoch == self.source.steps_per_epoch
                if not done and state.step_in_epoch % options.save_every_steps == 0:
                    self._save_last()
        seconds = time.monotonic() - began
        rate = (state.seen - rows_before) * self.world / max(seconds, 1e-9)
        self._validate(seconds, rate)

    def _step(self, batch: Batch) -> None:
        """One optimizer step on one effective batch, in as many micro-batches as memory needs."""
        state = self.state
        before = torch.get_rng_state()
        while True:
            try:
                loss, correct = self._accumulate(batch)
                break
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                self._shrink(error)
                torch.set_rng_state(before)
                self.optimizer.zero_grad(set_to_none=True)
        # Apart from the rest: the hinge pulls the gate hard, and that must not shorten everybody's step.
        for parameters in self.clipped:
            self.accelerator.clip_grad_norm_(parameters, self.config.train.grad_clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.trained)
        state.loss_sum += loss
        state.correct += correct
        state.seen += len(batch.labels)
        state.step_in_epoch += 1
        state.global_step += 1

    def _accumulate(self, batch: Batch) -> tuple[float, int]:
        """Gradients of one effective batch; gives this process's summed loss and right answers."""
        options, size = self.config.train, self.state.micro_batch
        rows = len(batch.labels)
        total, correct = 0.0, 0
        labels = batch.labels.to(self.device)
        starts = range(0, rows, size)
        # The selective risk is a ratio over the whole batch: several micro-batches need its sums before the first step
        # back, which takes a forward pass more.
        whole = self._selective_sums(batch, labels) if self.selective and len(starts) > 1 else None
        for start in starts:
            part = slice(start, start + size)
            last = start + size >= rows
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.net):
                with self.accelerator.autocast():
                    outputs: Outputs = self.net(*(x[part].to(self.device) for x in batch.inputs))
                loss = joint_loss(
                    outputs, labels[part], self.weights, classifier_weight=options.classifier_weight,
                    auxiliary_weight=options.auxiliary_weight, label_smoothing=options.label_smoothing,
                )  # fmt: skip
                value = float(loss.detach())
                # DDP averages over processes: a sum over rows divided by this process's rows is the mean over all.
                loss = loss / rows
                if self.selective:
                    sums = selective_sums(outputs, labels[part], self.weights, label_smoothing=options.label_smoothing)
                    value += 0.0 * float(sums.detach().sum())  # its NaN is this micro-batch's, not another's
                    self._check_finite(value, batch.files[part])
                    if whole is None:
                        whole = self._over_processes(sums.detach())
                    shared = selective_loss(
                        as_share(sums, whole), selective_weight=options.selective_weight,
                        coverage_weight=options.coverage_weight, target_coverage=options.target_coverage,
                    )  # fmt: skip
                    value += float(shared.detach()) * len(labels[part])
                    loss = loss + self.world * shared
                self._check_finite(value, batch.files[part])
                self.accelerator.backward(loss)
            total += value
            correct += int((outputs.logits_a.argmax(1) == labels[part]).sum())
        return total, correct

    def _check_finite(self, value: float, files: list[str]) -> None:
        if not math.isfinite(value):
            names = ", ".join(files)
            self.log(f"loss {value} at step {self.state.global_step}: {names}")
            raise TrainingError(
                f"loss must be finite, got {value} at epoch {self.state.epoch}, step {self.state.global_step}; "
                f"the batch was: {names}; lower train.lr or look at these images (last.pth is as it was)"
            )

    def _selective_sums(self, batch: Batch, labels: Tensor) -> Tensor:
        """Sums of the whole effective batch [3] over micro-batches and processes, with the draws of the real pass."""
        size, smoothing = self.state.micro_batch, self.config.train.label_smoothing
        devices = [self.device] if self.device.type == "cuda" else []
        found = []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            for start in range(0, len(labels), size):
                part = slice(start, start + size)
                with self.accelerator.autocast():
                    outputs: Outputs = self.trained(*(x[part].to(self.device) for x in batch.inputs))
                found.append(selective_sums(outputs, labels[part], self.weights, label_smoothing=smoothing))
        return self._over_processes(torch.stack(found).sum(0))

    def _over_processes(self, sums: Tensor) -> Tensor:
        if self.world == 1:
            return sums
        reduced: Tensor = self.accelerator.reduce(sums.clone(), "sum")
        return reduced

    def _shrink(self, error: Exception) -> None:
        size = self.state.micro_batch
        if self.world > 1:
            raise TrainingError(
                f"out of memory at {size} rows a process; "
                f"set train.micro_batch to {max(SMALLEST_MICRO_BATCH, size // 2)}"
            ) from error
        if size <= SMALLEST_MICRO_BATCH:
            raise TrainingError(
                f"out of memory at {size} rows, the smallest micro-batch; use a smaller model.image_size or backbone"
            ) from error
        self.state.micro_batch = max(SMALLEST_MICRO_BATCH, size // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.log(f"out of memory at {size} rows; micro-batch {self.state.micro_batch}")
        self._say(
            f"out of memory at {size} rows; going on with micro-batches of {self.state.micro_batch}, "
            "same effective batch"
        )

    # ---------------------------------------------------------------------------- validation and files

    def _evaluated(self) -> nn.Module:
        """The weights that are validated and kept: the moving average when there is one."""
        return self.trained if self.ema is None else self.ema.module

    def _predict_select(self) -> Arrays:
        module = self._evaluated().eval()
        mine = slice(self.rank, None, self.world)

        def forward(*inputs: Tensor) -> dict[str, Tensor]:
            with self.accelerator.autocast():
                return named_logits(module(*inputs))

        rows = self.rows["val_select"]
        if self.config.train.mode == "linear":
            inputs = [torch.from_numpy(self.features["val_select"][n][mine]) for n in ("features_a", "features_b")]
            with torch.inference_mode():
                own = {k: v.float().cpu().numpy() for k, v in forward(*(x.to(self.device) for x in inputs)).items()}
        else:
            own = run_over(forward, [self.splits.path(row) for row in rows[mine]], self.architecture.preprocessing,
                           device=self.device, workers=self.config.train.workers)  # fmt: skip
        return self._join(own, len(rows))

    def _validate(self, seconds: float, rate: float) -> None:
        state = self.state
        self.log(f"epoch {state.epoch} validate begin")
        arrays = self._predict_select()
        figures, intervals = self._figures(arrays)
        self.log(f"epoch {state.epoch} validate end")
        better = (figures["augrc"], figures["nll"]) < (state.best_augrc, state.best_nll)
        better_acc = figures["accuracy"] > state.best_acc
        sums = torch.tensor([state.loss_sum, state.correct, state.seen], dtype=torch.float64)
        if self.world > 1:
            sums = self.accelerator.reduce(sums.to(self.device), "sum").cpu()
        row = {
            "epoch": state.epoch, "step": state.global_step, "lr": self.scheduler.get_last_lr()[0],
            "train_loss": float(sums[0] / sums[2]), "train_accuracy": float(sums[1] / sums[2]),
            **figures, "best": int(better), "seconds": round(seconds, 3), "images_per_second": round(rate, 1),
        }  # fmt: skip
        state.history.append(row)
        state.patience_counter = 0 if better else state.patience_counter + 1
        if better:
            state.best_augrc, state.best_nll, state.best_epoch = figures["augrc"], figures["nll"], state.epoch
        state.best_acc = max(state.best_acc, figures["accuracy"])
        epoch = state.epoch
        state.epoch, state.step_in_epoch = epoch + 1, 0
        state.loss_sum, state.correct, state.seen = 0.0, 0, 0
        stopped = state.patience_counter >= self.config.train.patience
        state.finished = state.epoch == self.config.train.epochs or stopped
        # Order matters when killed: best files first, last.pth last. Whatever is lost is made again, the same.
        for name, wanted in (("model_best.pth", better), ("model_best_acc.pth", better_acc)):
            if wanted and self.main:
                self._save_best(name, epoch, figures)
        if self.main:
            self._draw(arrays, intervals, epoch, best=better)
            write_csv(self.run / "metrics.csv", state.history, COLUMNS)
        self._save_last()
        if self.config.train.tensorboard:
            self.accelerator.log({k: v for k, v in row.items() if isinstance(v, float)}, step=state.global_step)
        self._say(
            f"epoch {epoch + 1}/{self.config.train.epochs}: loss {row['train_loss']:.4f}, val_select accuracy "
            f"{figures['accuracy']:.4f}, AUROC {figures['auroc']:.4f}, AUGRC {figures['augrc']:.5f} "
            f"[{figures['augrc_low']:.5f}, {figures['augrc_high']:.5f}], {rate:.0f} images/s"
            f"{' *' if better else ''}{'; stopped early' if stopped else ''}"
        )

    def _figures(self, arrays: Arrays) -> tuple[dict[str, float], Intervals]:
        """Both stages' figures on ``val_select``, and Stage A's suite with its intervals by group."""
        labels = self.labels["val_select"]
        probs_a, probs_b = softmax(arrays["logits_a"]), softmax(arrays["logits_b"])
        if not np.isfinite(probs_a).all() or not np.isfinite(probs_b).all():
            raise TrainingError("logits on val_select must be finite, got NaN; lower train.lr (last.pth is as it was)")
        given_a, given_b = probs_a.argmax(1), probs_b.argmax(1)
        positive = self.splits.classes.index(self.splits.positive)
        intervals = bootstrap(
            probs_a, labels, confidence=confidence(probs_a),
            groups=np.asarray([row.group for row in self.rows["val_select"]]),
            metrics=[*SUITE, *BAND_METRICS], n_replicates=N_REPLICATES, seed=self.config.seed, positive=positive,
        )  # fmt: skip
        figures = {
            "balanced_accuracy": balanced_accuracy(given_a, labels),
            "auroc": auroc(probs_a[:, positive], labels == positive),
            "accuracy_b": accuracy(given_b, labels),
            "augrc_b": augrc(confidence(probs_b), given_b != labels),
            "gate_augrc": augrc(arrays["gate_logits"], given_a != labels),
        }
        for name in SUITE:
            one = intervals[name]
            figures |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
        return figures, intervals

    def _draw(self, arrays: Arrays, intervals: Intervals, epoch: int, *, best: bool) -> None:
        """Refresh the run's own risk-coverage curve: Stage A on ``val_select`` after this epoch."""
        probs = softmax(arrays["logits_a"])
        png = risk_coverage_png(
            confidence(probs), probs.argmax(1) != self.labels["val_select"], band=risk_band(intervals),
            title=f"Stage A on val_select, epoch {epoch + 1}{' (best so far)' if best else ''}",
        )  # fmt: skip
        write_bytes(self.run / "metrics" / "risk_coverage_curve.png", png)

    def _save_best(self, name: str, epoch: int, figures: dict[str, float]) -> None:
        module = self._evaluated()
        weights = own = module.state_dict()
        if self.config.train.mode == "linear":
            weights = {**self.model.state_dict(), **{f"heads.{k}": v for k, v in own.items()}}
        elif self.adaptation is not None:
            weights = merged_state(module)
        self.log(f"checkpoint {name} writing")
        checkpoint.save_model(
            self.run / name, self.model, weights, split_hashes=self.splits.hashes, epoch=epoch, figures=figures
        )
        self.log(f"checkpoint {name} replaced")
        if self.adaptation is not None and name == "model_best.pth":
            self.log("adapter writing")
            save_adapter(
                self.run / "adapter", self.adaptation, self.architecture, own, epoch=epoch,
                split_hashes=self.splits.hashes, model_fingerprint=fingerprint(self.architecture, weights),
            )  # fmt: skip
            self.log("adapter replaced")

    def _save_last(self) -> None:
        """Write ``last.pth``: always at an optimizer step, so no half-accumulated gradient exists."""
        self.accelerator.wait_for_everyone()
        rng = torch.get_rng_state()
        rng_states = [rng] if self.world == 1 else gather_object([rng])
        sums = [self.state.loss_sum, self.state.correct, self.state.seen]
        all_sums = [sums] if self.world == 1 else gather_object([sums])
        if not self.main:
            return
        state = self.state
        plain = {k: getattr(state, k) for k in ("best_nll", "best_epoch", "finished", "micro_batch", "history")}
        # Timings differ from run to run; artefacts must not.
        plain["history"] = [{k: v for k, v in row.items() if k not in TIMINGS} for row in state.history]
        self.log("checkpoint last.pth writing")
        checkpoint.save(
            self.run / "last.pth",
            {
                "architecture": self.architecture.model_dump_json(),
                **({} if self.base_fingerprint is None else {"base_fingerprint": self.base_fingerprint}),
                "model_state_dict": self._learned(self.trained.state_dict()),
                "optimizer_state_dict": self.optimizer.state_dict(),
                "scheduler_state_dict": self.scheduler.state_dict(),
                "epoch": state.epoch,
                "global_step": state.global_step,
                "sampler_state": {
                    "epoch": state.epoch, "step_in_epoch": state.step_in_epoch, "seed": self.config.seed,
                    "accumulated_micro_batches": 0, "sums": all_sums,
                },
                "best_acc": state.best_acc,
                "best_augrc": state.best_augrc,
                "patience_counter": state.patience_counter,
                "ema_state_dict": self._averaged() if self.ema is not None else None,
                "rng_state": rng_states,
                "world": self.world,
                "split_hashes": self.splits.hashes,
                "progress": plain,
            },
        )  # fmt: skip
        self.log("checkpoint last.pth replaced")

    def _learned(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of the trained module's weights ``last.pth`` holds: with an adapter not the base, which is at hand."""
        return state if self.adaptation is None else self.adaptation.learned(state)

    def _averaged(self) -> dict[str, Tensor]:
        """The same of the moving average."""
        assert self.ema is not None
        own = {f"module.{key}": value for key, value in self._learned(self.ema.module.state_dict()).items()}
        return {"n_averaged": self.ema.n_averaged, **own}

    def _restore(self) -> None:
        path = self.run / "last.pth"
        content = checkpoint.load(path)
        missing = [key for key in LAST_KEYS if key not in content]
        if missing:
            raise ArtifactError(f"{path} must be a checkpoint of this version, missing keys: {', '.join(missing)}")
        if content["split_hashes"] != self.splits.hashes:
            raise ArtifactError(f"{path} was trained on other splits than {self.run}/splits.json; use --overwrite")
        check_architecture(path, Architecture.parse(str(content["architecture"]), str(path)), self.architecture)
        if content.get("base_fingerprint") != self.base_fingerprint:
            raise ArtifactError(
                f"{path} must be resumed on the base it was trained on, got other weights in "
                f"'{self.config.model.backbone}'; put those back or start anew with --overwrite"
            )
        check_tensors(path, self._learned(self.trained.state_dict()), content["model_state_dict"])
        if content["world"] != self.world:
            raise InputError(
                f"--resume must use the {content['world']} process(es) the run was started with, got {self.world}"
            )
        self.trained.load_state_dict({**self.trained.state_dict(), **content["model_state_dict"]})
        try:
            self.optimizer.load_state_dict(content["optimizer_state_dict"])
            self.scheduler.load_state_dict(content["scheduler_state_dict"])
            if self.ema is not None:
                check_tensors(path, self._averaged(), content["ema_state_dict"])
                self.ema.load_state_dict({**self.ema.state_dict(), **content["ema_state_dict"]})
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise ArtifactError(f"{path} must hold this run's optimizer, schedule and average, got: {error}") from None
        torch.set_rng_state(content["rng_state"][self.rank])
        sampler = content["sampler_state"]
        loss_sum, correct, seen = sampler["sums"][self.rank]
        self.state = State(
            epoch=content["epoch"], step_in_epoch=sampler["step_in_epoch"], global_step=content["global_step"],
            loss_sum=loss_sum, correct=correct, seen=seen, best_acc=content["best_acc"],
            best_augrc=content["best_augrc"], patience_counter=content["patience_counter"], **content["progress"],
        )  # fmt: skip
        self._restore_timings()
        self._say(f"resumed at epoch {self.state.epoch}, step {self.state.step_in_epoch}")
        self.log(f"resumed at epoch {self.state.epoch} step {self.state.step_in_epoch}")

    def _restore_timings(self) -> None:
        """Take earlier epochs' timings from ``metrics.csv``; they are not in the checkpoint."""
        if (self.run / "metrics.csv").is_file():
            with (self.run / "metrics.csv").open(newline="", encoding="utf-8") as file:
                for row, stored in zip(self.state.history, csv.DictReader(file), strict=False):
                    row.update({k: float(stored[k]) for k in TIMINGS if stored.get(k)})

    def _finish(self) -> None:
        """Outputs on ``val_calib``, from the best checkpoint as it stands on disk."""
        write_csv(self.run / "metrics.csv", self.state.history, COLUMNS)
        workers = self.config.train.workers
        if self.config.gate.fit == "out_of_fold":
            self._refit_gate()
        model, _ = checkpoint.load_run_model(self.run)
        joint = checkpoint.load_joint_gate(self.run / "model_best.pth", model)
        self.log("gate.json begin")
        selected = infer(model, self.splits, "val_select", workers=workers, joint_gate=joint)
        self._choose_confidence(selected)
        selected.save(self.run / "val_select.npz")
        self.log("val_calib begin")
        save_calibration(self.run, infer(model, self.splits, "val_calib", workers=workers))
        self.log("finished")
        best = self.state.history[self.state.best_epoch]
        self._say(
            f"best epoch {self.state.best_epoch + 1}: AUGRC {best['augrc']:.5f}, accuracy {best['accuracy']:.4f}; "
            f"wrote {self.run}/model_best.pth, metrics.csv, val_calib.npz"
        )

    def _refit_gate(self) -> None:
        """Put the gate of ``model_best.pth`` anew, from train rows alone; a second time changes nothing."""
        path = self.run / "model_best.pth"
        content = checkpoint.load(path)
        if "joint_gate_state_dict" in content:
            return
        self.log("gate refit begin")
        model = checkpoint.load_model(path, self.architecture).to(self.device)
        rows, options = self.rows["train"], self.config.gate
        with torch.inference_mode():
            views = self._views(model)
            logits = [model.heads.classifier(torch.from_numpy(x).to(self.device)).float().cpu().numpy() for x in views]
        fit = fit_gate(
            views, logits, self.labels["train"], [row.group for row in rows], self.weights.cpu().numpy(),
            folds=options.folds, seed=self.config.seed,
        )  # fmt: skip
        state = content["model_state_dict"]
        joint = {k: state[f"heads.gate.{k}"] for k in model.heads.gate.state_dict()}
        fitted = {
            "linear.weight": torch.from_numpy(fit.weight.astype(np.float32)[None]),
            "linear.bias": torch.tensor([fit.bias], dtype=torch.float32),
        }
        whole = {**state, **{f"heads.gate.{k}": v for k, v in fitted.items()}}
        facts = {k: getattr(fit, k) for k in ("form", "reason", "strength", "n_rows", "n_groups", "n_errors")}
        content |= {
            "model_state_dict": whole,
            "joint_gate_state_dict": joint,
            "gate_fit": {**facts, "folds": options.folds, "views": len(views)},
        }
        if self.adaptation is not None:
            # First: while model_best.pth is as it was, all of this is done again, to the same bytes.
            own = {f"heads.gate.{k}": v for k, v in fitted.items()}
            replace_trained(self.run / "adapter", own, fingerprint(self.architecture, whole))
        checkpoint.save(path, content)
        self.log(f"gate refitted: {fit.form}, {fit.n_errors} errors of {fit.n_rows}{fit.reason and '; ' + fit.reason}")
        if fit.reason:
            self._say(f"the gate reads the margin alone: {fit.reason}")

    def _views(self, model: Stage1Model) -> list[np.ndarray[Any, Any]]:
        """Features of the train rows at the tap, once per view; a frozen backbone has learned none of them by heart."""
        if self.config.train.mode == "linear":
            return [self.features["train"]["features_a"]]
        augment, options = self.config.augment, self.config.gate
        draws = options.views if augment.enabled else 0
        # Epochs that training cannot have drawn.
        first = self.config.train.epochs
        epochs: list[int | None] = [*range(first, first + draws)] or [None]

        def forward(pixels: Tensor) -> dict[str, Tensor]:
            with self.accelerator.autocast():
                return {"features": model.features(pixels)[0]}

        return [
            run_over(
                forward, [self.splits.path(row) for row in self.rows["train"]], self.architecture.preprocessing,
                device=self.device, workers=self.config.train.workers, description="train rows for the gate",
                draw=None if epoch is None else (augment, self.config.seed, epoch),
            )["features"]
            for epoch in epochs
        ]  # fmt: skip

    def _choose_confidence(self, predictions: Predictions) -> None:
        """Write ``gate.json``: what ranks answers better on ``val_select``."""
        found = rank_answers(predictions, seed=self.config.seed)
        better = "gate" if found[GATE].value < found[SOFTMAX].value else "softmax"
        asked = self.config.gate.confidence
        facts = checkpoint.load(self.run / "model_best.pth").get("gate_fit", {"form": "joint"})
        record = GateChoice.model_validate({
            "fit": self.config.gate.fit, **facts, "split_hash": predictions.split_hash,
            "model_fingerprint": predictions.model_fingerprint, "gate_augrc": Metric.of(GATE, found[GATE]),
            "softmax_augrc": Metric.of(SOFTMAX, found[SOFTMAX]),
            "joint_gate_augrc": Metric.of(JOINT, found[JOINT]) if JOINT in found else None,
            "difference": Metric.of(DIFFERENCE, found[DIFFERENCE]), "asked": asked,
            "confidence": better if asked == "auto" else asked,
        })  # fmt: skip
        record.write(self.run / "gate.json")
        gate, sure, difference = found[GATE], found[SOFTMAX], found[DIFFERENCE]
        self._say(
            f"AUGRC on val_select: gate {gate.value:.5f}, max softmax {sure.value:.5f}, difference "
            f"{difference.value:+.5f} [{difference.low:+.5f}, {difference.high:+.5f}]; confidence: {record.confidence}"
        )

    # ---------------------------------------------------------------------------- small things

    def _say(self, message: str) -> None:
        if self.main:
            say(message)

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Callable[[], None]]:
        """A bar with loss and images/s on a terminal; nothing elsewhere."""
        state = self.state
        if not (self.main and sys.stderr.isatty()):
            yield lambda: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TextColumn("loss {task.fields[loss]:.4f}, {task.fields[rate]:.0f} images/s"),
                   TimeRemainingColumn())  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(f"epoch {state.epoch + 1}", total=self.source.steps_per_epoch,
                                completed=state.step_in_epoch, loss=0.0, rate=0.0)  # fmt: skip
            began, seen = time.monotonic(), state.seen

            def advance() -> None:
                rate = (state.seen - seen) * self.world / max(time.monotonic() - began, 1e-9)
                bar.update(task, completed=state.step_in_epoch, loss=state.loss_sum / state.seen, rate=rate)

            yield advance


def peak_memory(device: torch.device) -> int:
    """Largest memory so far in bytes: of the GPU's allocator, or this process's resident size."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # ru_maxrss of a started process begins at the size of the one that started it; VmHWM is this program's own.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest << 10


def _ema(decay: float) -> Callable[[Any, Any, Any], None]:
    """Moving average whose decay grows with the steps, so that early weights do not linger."""

    @torch.no_grad()
    def update(averaged: Any, current: Any, count: Any) -> None:
        steps = int(count)
        weight = 1 - min(decay, (1 + steps) / (10 + steps))
        apart = [(a, b) for a, b in zip(averaged, current, strict=True) if a.data_ptr() != b.data_ptr()]
        torch._foreach_lerp_([a for a, _ in apart], [b for _, b in apart], weight)

    return update


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
