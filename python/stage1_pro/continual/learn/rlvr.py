"""Reward tuning: a policy that answers well enough is moved to what earns most, by policy gradients on true labels.

A policy is any module that gives log-probabilities of actions [N, A] for inputs; ``HeadsPolicy`` makes one of Stage A's
heads. Cross entropy comes first and this is short: the policy is held near where it started by a KL term, and
``val_select`` says when to stop. Where rewards of all actions are known their expectation is exact and has no variance;
RLOO is for rewards that are seen of the drawn action alone. Advantages are never divided by a group's standard
deviation: that erases how much a wrong answer costs.

After tuning the policy is no probability of the label, so whatever threshold stood on it is void: calibrate and certify
again. ``tune`` writes a run that has no policy file, so nothing else can happen.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from stage1_pro.classes import index_of
from stage1_pro.config import AugmentConfig, Config
from stage1_pro.continual.learn.rewards import (
    UNPAID,
    RewardSpec,
    SetReward,
    action_rewards,
    difference_rewards,
    mcc_reward,
    validator_reward,
    verified,
)
from stage1_pro.data.photos import ImageFile
from stage1_pro.data.splits import Row, Splits
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.files import atomic_directory, write_csv
from stage1_pro.models.adapters import adapt, merged_state
from stage1_pro.models.model import Outputs, Stage1Model, fingerprint
from stage1_pro.policies.claims import CLAIMS_FILE
from stage1_pro.policies.ranking import GateChoice, rank_answers
from stage1_pro.progress import say
from stage1_pro.record import Record  # fmt: skip
from stage1_pro.training import checkpoint
from stage1_pro.training.inference import infer, pick_device, run_over, save_calibration

Method = Literal["exact", "clipped", "rloo", "mcc", "validator"]
_SETS: dict[str, SetReward] = {"mcc": mcc_reward, "validator": validator_reward}
STATEMENT = (
    "after reward tuning neither the gate nor Stage A's probabilities say how often an answer is right; every earlier "
    "threshold and certificate is void: calibrate and certify again"
)


class TuneOptions(Record):
    """How a policy is tuned."""

    method: Method = "exact"
    beta: float = Field(0.05, ge=0, description="weight of KL to the policy it started from")
    epochs: int = Field(60, ge=1)
    patience: int = Field(10, ge=1, description="epochs without a better val_select before it stops")
    batch_size: int = Field(256, ge=2)
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(0.2, gt=0, lt=1, description="clipped: how far a probability's ratio counts")
    inner_epochs: int = Field(4, ge=1, description="clipped: steps on a batch before its old policy is taken anew")
    draws: int = Field(8, ge=2, description="rloo: actions drawn a row; mcc, validator: sets drawn a batch")
    seed: int = Field(0, ge=0)


# -------------------------------------------------------------------------------- objectives


def exact_loss(log_probs: Tensor, rewards: Tensor) -> Tensor:
    """Minus the expected reward, exactly, a scalar; log-probabilities and rewards are [N, A]."""
    return -(log_probs.exp() * rewards).sum(1).mean()


def clipped_loss(log_probs: Tensor, old: Tensor, rewards: Tensor, clip: float) -> Tensor:
    """Minus the clipped gain over an old policy, exactly, a scalar: for several steps on one batch.

    Sum over actions of ``old * min(ratio * A, clip(ratio) * A)`` with A the reward less the old policy's expectation
    (PPO's surrogate, 1707.06347, without drawing actions). Its gradient at ``old`` is that of ``exact_loss``.

    Args:
        log_probs: [N, A].
        old: [N, A] log-probabilities of the policy at the batch's first step; no gradient.
        rewards: [N, A].
        clip: how far from 1 a ratio counts.
    """
    shares = old.exp()
    advantage = rewards - (shares * rewards).sum(1, keepdim=True)
    ratio = (log_probs - old).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    return -(shares * gain).sum(1).mean()


def rloo_loss(log_probs: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
    """A scalar whose gradient is, on average over draws, that of ``exact_loss``: leave-one-out REINFORCE (2402.14740).

    Args:
        log_probs: [N, A].
        actions: [N, G] drawn from it, G >= 2.
        rewards: [N, G] of the drawn actions.
    """
    drawn = rewards.shape[1]
    advantage = (rewards - rewards.mean(1, keepdim=True)) * drawn / (drawn - 1)
    return -(advantage * log_probs.gather(1, actions)).mean()


def set_loss(positive: Tensor, is_positive: NDArray[np.bool_], reward: SetReward, draws: int, rng: Any) -> Tensor:
    """A scalar whose gradient is, on average over draws, minus that of a set's expected reward: difference rewards.

    Args:
        positive: [N] probability that the row is answered positive.
        is_positive: [N] truth.
        reward: of a set from its counts.
        draws: how many sets of answers are drawn.
        rng: NumPy generator of the draws.
    """
    said = rng.random((draws, is_positive.size)) < positive.detach().cpu().numpy()
    worth = difference_rewards(said, is_positive, reward).mean(0)
    return -(positive * torch.as_tensor(worth, dtype=positive.dtype, device=positive.device)).sum()


def kl(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Mean KL(policy || reference) over rows, a scalar >= 0; both are log-probabilities [N, A]."""
    return (log_probs.exp() * (log_probs - reference)).sum(1).mean()


# -------------------------------------------------------------------------------- policies and rows


class HeadsPolicy(nn.Module):
    """Stage A as a policy: EXIT with class k has P(gate open) * P(k), DEFER has P(gate shut); ABSTAIN is not taken.

    Log-probabilities [N, K + 2], in the order of ``action_rewards``; the last column is the smallest finite number.
    The wrapped module gives ``Outputs``: heads on features, or a whole model on pixels.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        """Log-probabilities of actions."""
        outputs: Outputs = self.module(*inputs)
        gate = outputs.gate_logit.float()[:, None]
        exits = nn.functional.logsigmoid(gate) + outputs.logits_a.float().log_softmax(1)
        defer = nn.functional.logsigmoid(-gate)
        never = torch.full_like(defer, torch.finfo(defer.dtype).min / 4)
        return torch.cat([exits, defer, never], dim=1)


@dataclass(frozen=True)
class BanditRows:
    """Labelled rows for tuning: inputs of the policy (tensors, rows first) and rewards [N, A] of every action.

    For sets also ``says_positive`` [N, A], 1 where the action's answer is the positive class, and the truth
    ``is_positive`` [N].
    """

    inputs: tuple[Tensor, ...]
    rewards: Tensor
    says_positive: Tensor | None = None
    is_positive: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if self.rewards.ndim != 2 or any(len(x) != len(self.rewards) for x in self.inputs) or not len(self.rewards):
            raise InputError(
                f"rewards must have shape [N, A] for inputs of N >= 1 rows, got {list(self.rewards.shape)} for "
                f"{[len(x) for x in self.inputs]}"
            )
        if not torch.isfinite(self.rewards).all():
            raise InputError("rewards must be finite, got NaN or infinity; check the reward spec and the labels")


@dataclass(frozen=True)
class Tuned:
    """What tuning gave: the best epoch on the selecting rows (0: the start was best) and a row for every epoch."""

    best_epoch: int
    start: float
    best: float
    history: list[dict[str, float]]


@torch.no_grad()
def log_probs_of(policy: nn.Module, inputs: tuple[Tensor, ...], batch_size: int = 1024) -> Tensor:
    """A policy's log-probabilities on all rows, [N, A], in evaluation mode and without gradient."""
    was = policy.training
    policy.eval()
    starts = range(0, len(inputs[0]), batch_size)
    found = [policy(*(x[start : start + batch_size] for x in inputs)) for start in starts]
    policy.train(was)
    return torch.cat(found)


def mean_reward(log_probs: Tensor, rewards: Tensor) -> float:
    """What the most likely action earns on average; higher is better. Both are [N, A]."""
    return float(rewards.gather(1, log_probs.argmax(1, keepdim=True)).mean())


def fit_policy(
    policy: nn.Module, parameters: Sequence[nn.Parameter], rows: BanditRows, select: BanditRows, options: TuneOptions
) -> Tuned:
    """Tune some parameters of a policy in place; it ends at its best epoch on ``select``, or where it started.

    What is best is the mean reward of the most likely action (for sets the reward of the set of them), on a tie the
    expected one. Dropout is off: the policy that is compared with its reference is the one that is deployed.

    Args:
        policy: gives log-probabilities of actions [N, A]; tuned in place.
        parameters: which of its parameters learn: heads, an adapter's, anything.
        rows: to learn from.
        select: to stop by.
        options: how.

    Raises:
        InputError: no parameters, or no answers and truth for a set-level method.
    """
    if not parameters:
        raise InputError("parameters must be one or more, got none; nothing would learn")
    reward = _SETS.get(options.method)
    if reward is not None and any(one.says_positive is None or one.is_positive is None for one in (rows, select)):
        raise InputError(f"rows must hold says_positive and is_positive for method {options.method}, got none")
    policy.eval()
    reference = log_probs_of(policy, rows.inputs)
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=options.weight_decay)
    rng = np.random.Generator(np.random.Philox(options.seed))
    drawing = torch.Generator(device=rows.rewards.device).manual_seed(options.seed)
    best = first = _judge(log_probs_of(policy, select.inputs), select, reward)
    kept, best_epoch, history = copy.deepcopy([p.data for p in parameters]), 0, []
    for epoch in range(1, options.epochs + 1):
        order = torch.from_numpy(rng.permutation(len(rows.rewards)))
        for start in range(0, len(order), options.batch_size):
            index = order[start : start + options.batch_size]
            inputs, worth = [x[index] for x in rows.inputs], rows.rewards[index]
            old = None
            for _ in range(options.inner_epochs if options.method == "clipped" else 1):
                log_probs = policy(*inputs)
                old = log_probs.detach() if old is None else old
                if reward is not None:
                    assert rows.says_positive is not None
                    assert rows.is_positive is not None
                    positive = (log_probs.exp() * rows.says_positive[index]).sum(1)
                    loss = set_loss(positive, rows.is_positive[index.numpy()], reward, options.draws, rng)
                elif options.method == "clipped":
                    loss = clipped_loss(log_probs, old, worth, options.clip)
                elif options.method == "rloo":
                    actions = torch.multinomial(old.exp(), options.draws, replacement=True, generator=drawing)
                    loss = rloo_loss(log_probs, actions, worth.gather(1, actions))
                else:
                    loss = exact_loss(log_probs, worth)
                loss = loss + options.beta * kl(log_probs, reference[index])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        found = _judge(log_probs_of(policy, select.inputs), select, reward)
        history.append({"epoch": float(epoch), "select_reward": found[0], "select_expected": found[1]})
        if found > best:
            best, best_epoch = found, epoch
            kept = copy.deepcopy([p.data for p in parameters])
        elif epoch - best_epoch >= options.patience:
            break
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.data.copy_(value)
    return Tuned(best_epoch, first[0], best[0], history)


def _judge(log_probs: Tensor, rows: BanditRows, reward: SetReward | None) -> tuple[float, float]:
    """Reward of the most likely actions, and the expected one of single rows."""
    expected = float((log_probs.exp() * rows.rewards).sum(1).mean())
    if reward is None:
        return mean_reward(log_probs, rows.rewards), expected
    assert rows.says_positive is not None
    assert rows.is_positive is not None
    said = rows.says_positive.gather(1, log_probs.argmax(1, keepdim=True))[:, 0].cpu().numpy() > 0
    truth = rows.is_positive
    counts = [np.asarray(float(part.sum())) for part in (said & truth, said & ~truth, ~said & truth, ~said & ~truth)]
    return float(reward(*counts)), expected


# -------------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Origin:
    """A trained run that tuning starts from: its model in evaluation mode on a device, its rows, what they earn."""

    model: Stage1Model
    splits: Splits
    config: Config
    spec: RewardSpec

    @classmethod
    def load(cls, run: Path, spec: RewardSpec | None) -> Self:
        """A run from its folder; raises ArtifactError where it is not trained, or was changed."""
        model, run_config = checkpoint.load_run_model(run)
        splits = Splits.read(run / "splits.json").verify()
        return cls(model.to(pick_device()).eval(), splits, run_config.config, spec or RewardSpec())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def labels(self, rows: Sequence[Row]) -> tuple[NDArray[np.int64], list[str]]:
        """Class indices and label sources of rows that may be rewarded.

        They are the owner's, but for those of which the list says that a model or a mere match labelled them.

        Raises:
            InputError: a source whose labels may not be rewarded.
        """
        labels = self.splits.indices(rows)
        sources = [row.source if row.source in UNPAID else "owner" for row in rows]
        verified(labels, sources, classes=self.splits.classes, positive=self.splits.positive)
        return labels, sources

    def inputs(
        self,
        photos: Sequence[ImageFile],
        draw: tuple[AugmentConfig, int, int] | None = None,
        *,
        cached: bool = True,
        description: str = "",
    ) -> tuple[tuple[NDArray[np.float32], ...], NDArray[np.int64]]:
        """Inputs of ``HeadsPolicy`` for N images, and what Stage B answers on them [N].

        Inputs are both stages' features, each [N, 2D], where ``cached``; else the pixels [N, 3, H, W]. ``draw`` is an
        augmentation, as ``run_over`` takes it.
        """

        def forward(pixels: Tensor) -> dict[str, Tensor]:
            features_a, features_b = self.model.features(pixels)
            own = {"a": features_a, "b": features_b} if cached else {"pixels": pixels}
            return {**own, "logits_b": self.model.heads.auxiliary(features_b)}

        found = run_over(
            forward, photos, self.model.architecture.preprocessing, device=self.device,
            workers=self.config.train.workers, draw=draw, description=description,
        )  # fmt: skip
        answers_b = found.pop("logits_b").argmax(1).astype(np.int64)
        return tuple(found.values()), answers_b

    def pay(
        self,
        inputs: Sequence[NDArray[np.float32]],
        answers_b: NDArray[np.int64],
        labels: NDArray[np.int64],
        sources: Sequence[str],
    ) -> BanditRows:
        """What every action earns where Stage B answers ``answers_b`` [N] and the truth is ``labels`` [N]."""
        splits, device = self.splits, self.device
        truth = verified(labels, sources, classes=splits.classes, positive=splits.positive)
        positive, says = index_of(splits.classes, splits.positive), None
        if positive is not None:
            chances = np.zeros((answers_b.size, len(splits.classes) + 2), dtype=np.float32)
            chances[:, positive] = 1.0
            chances[:, len(splits.classes)] = answers_b == positive
            says = torch.from_numpy(chances).to(device)
        return BanditRows(
            tuple(torch.from_numpy(np.ascontiguousarray(values)).to(device) for values in inputs),
            torch.from_numpy(action_rewards(self.spec, truth, answers_b).astype(np.float32)).to(device),
            says,
            None if positive is None else truth.is_positive,
        )

    def rows(
        self,
        name: Literal["train", "val_select"],
        draws: Sequence[tuple[AugmentConfig, int, int] | None] = (None,),
        *,
        cached: bool,
    ) -> BanditRows:
        """Rows of one split, each draw after the other: features or images, and what every action earns on them."""
        rows = self.splits.of(name)
        labels, sources = self.labels(rows)  # Before an hour of features.
        photos, what = self.splits.photos_of(rows), f"{name} rows for tuning"
        found = [self.inputs(photos, draw, cached=cached, description=what) for draw in draws]
        inputs = [np.concatenate(parts) for parts in zip(*(inputs for inputs, _ in found), strict=True)]
        answers = np.concatenate([answers for _, answers in found])
        return self.pay(inputs, answers, np.tile(labels, len(draws)), sources * len(draws))


class TuningRecord(Record):
    """``tuning.json``: from which model a run was tuned, for which reward, and how that went on ``val_select``."""

    format_version: Literal[1] = 1
    parent_fingerprint: str
    model_fingerprint: str
    through: Literal["heads", "adapter"]
    spec: RewardSpec
    options: TuneOptions
    views: int = Field(description="augmented draws of every train row; 0: clean rows")
    n_rows: int
    best_epoch: int
    reward_before: float = Field(description="of the most likely action on val_select, before any threshold")
    reward_after: float
    split_hashes: dict[str, str]
    statement: str = STATEMENT


def tune(
    run: Path | str,
    out: Path | str,
    *,
    spec: RewardSpec | None = None,
    options: TuneOptions | None = None,
    through: Literal["heads", "adapter"] = "heads",
) -> TuningRecord:
    """Tune a trained run for a reward and write it as a new run, which must be calibrated and certified again.

    Reads ``train`` rows to learn (augmented draws that training did not make, as the gate's refit does: a backbone
    knows its clean rows by heart) and ``val_select`` to stop; ``val_calib`` is run, not read. DEFER is paid by what
    Stage B answers before tuning. ``through`` says what learns: Stage A's classifier and gate on cached features, or
    those and an adapter by the run's ``adapter`` options, on pixels (all held in memory). An adapter moves what Stage B
    reads, so what came of it is measured with the tuned model's own Stage B. The new folder appears whole or not at
    all; it takes the uses of the certify half along.

    Args:
        run: a trained run.
        out: the new run's folder.
        spec: what actions earn.
        options: how.
        through: what learns.

    Raises:
        InputError: the folder is there, or labels that may not be rewarded.
        ArtifactError: a run that is not trained, or was changed.
        NotReachableError: no epoch was better on ``val_select`` than the start; nothing was written.
    """
    run, out, options = Path(run), Path(out), options or TuneOptions()
    if out.resolve() == run.resolve():
        raise InputError(f"out must be another folder than the run, got {out}; the run stays as it is")
    if out.exists():
        raise InputError(f"out must be a new folder, got {out}, which is there")
    origin = Origin.load(run, spec)
    model, config, before = origin.model, origin.config, origin.model.fingerprint()
    adaptation = adapt(model, "lora", config.adapter, options.seed) if through == "adapter" else None
    model.to(origin.device).eval()
    if adaptation is None:
        learns = [*model.heads.classifier.parameters(), *model.heads.gate.parameters()]
    else:
        model.heads.auxiliary.requires_grad_(False)
        learns = [p for p in model.parameters() if p.requires_grad]
    for parameter in learns:
        parameter.requires_grad_(True)
    views = config.gate.views if config.augment.enabled and config.train.mode != "linear" else 0
    draws: list[tuple[AugmentConfig, int, int] | None] = [
        (config.augment, config.seed, config.train.epochs + view) for view in range(views)
    ] or [None]
    train = origin.rows("train", draws, cached=through == "heads")
    select = origin.rows("val_select", cached=through == "heads")
    policy = HeadsPolicy(model.heads if through == "heads" else model)
    tuned = fit_policy(policy, learns, train, select, options)
    model.eval()
    if adaptation is not None:
        select = origin.rows("val_select", cached=False)
    reward_after, _ = _judge(log_probs_of(policy, select.inputs), select, _SETS.get(options.method))
    if tuned.best_epoch == 0 or reward_after <= tuned.start:
        raise NotReachableError(
            f"the reward on val_select must rise above {tuned.start:.4f}, got {reward_after:.4f} as the best of "
            f"{len(tuned.history)} epochs; {run} stays the better one, nothing was written"
        )
    state = model.state_dict() if adaptation is None else merged_state(model)
    after = fingerprint(model.architecture, state)
    record = TuningRecord(
        parent_fingerprint=before, model_fingerprint=after, through=through, spec=origin.spec, options=options,
        views=views, n_rows=len(train.rewards), best_epoch=tuned.best_epoch, reward_before=tuned.start,
        reward_after=reward_after, split_hashes=origin.splits.hashes,
    )  # fmt: skip
    with atomic_directory(out) as staging:
        write_run(staging, run, state)
        write_csv(staging / "tuning.csv", tuned.history, ["epoch", "select_reward", "select_expected"])
        record.write(staging / "tuning.json")
    say(
        f"reward on val_select {tuned.start:.4f} -> {reward_after:.4f} at epoch {tuned.best_epoch}; wrote {out}; "
        f"{STATEMENT} (stage1 calibrate --run {out})"
    )
    return record


def write_run(staging: Path, run: Path, state: Mapping[str, Tensor]) -> None:
    """Into an empty folder: a run with these weights (of the model in its plain form) in place of another run's.

    It has the splits and configuration of that run, and no policy. Answers on ``val_select`` and ``val_calib`` are of
    the new weights; the certify half's uses come along.
    """
    Splits.read(run / "splits.json").write(staging / "splits.json")
    for name in ("config.json", "metrics.csv", CLAIMS_FILE):
        if (run / name).is_file():
            shutil.copy2(run / name, staging / name)
    content = checkpoint.load(run / "model_best.pth")
    content.pop("joint_gate_state_dict", None)
    checkpoint.save(staging / "model_best.pth", {**content, "model_state_dict": state})
    plain, run_config = checkpoint.load_run_model(staging)
    splits, config = Splits.read(staging / "splits.json"), run_config.config
    predictions = infer(plain, splits, "val_select", workers=config.train.workers)
    predictions.save(staging / "val_select.npz")
    save_calibration(staging, infer(plain, splits, "val_calib", workers=config.train.workers))
    found = rank_answers(predictions, seed=config.seed)
    choice = GateChoice.of(found, predictions, config.gate.confidence, fit="joint", form="joint: tuned for a reward")
    choice.write(staging / "gate.json")
