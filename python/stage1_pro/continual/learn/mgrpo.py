"""Proposing a better policy without forgetting the old: regularised policy gradients, then a line search in weights.

What is learned from are new rows and replayed ones; what holds the policy are two KL terms on inputs without labels:
to a moving average of itself on the anchor (the domain that must not be forgotten), and to the champion on recent
inputs. The result is a direction more than a place: of the steps along it that keep within a KL budget on the anchor,
the one that earns most on the selecting rows is proposed, or none.

With one action an episode a trust region promises nothing: what makes progress monotone is the promotion test on fresh
labels that this module cannot see. It knows neither guard nor store.

``propose_run`` makes a run without a policy of new and remembered rows, or refuses. Stage B's head learns first, by
likelihood, as in its training, under the same KL terms. Then Stage A's classifier and gate learn by reward; DEFER earns
what that Stage B answers. Rows of earlier rounds are remembered as features in a reservoir that goes from run to run,
so that a round costs a pass over its new images alone. An adapter or another backbone begins a new reservoir.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from stage1_pro.continual.learn.replay import Reservoir
from stage1_pro.continual.learn.rewards import RewardSpec
from stage1_pro.continual.learn.rlvr import (
    STATEMENT,
    BanditRows,
    HeadsPolicy,
    Origin,
    clipped_loss,
    kl,
    log_probs_of,
    mean_reward,
    write_run,
)
from stage1_pro.data.splits import Row
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.files import atomic_directory, uniform
from stage1_pro.models.model import fingerprint
from stage1_pro.progress import say
from stage1_pro.record import Record

RECORD = "proposal.json"
RESERVOIR = "reservoir.npz"
CAPACITY = 4000

M = TypeVar("M", bound=nn.Module)


class ProposalOptions(Record):
    """How a candidate is proposed."""

    objective: Literal["reward", "likelihood"] = Field(
        "reward", description="reward: the clipped expectation; likelihood: cross entropy to exp(reward / temperature)"
    )
    temperature: float = Field(0.5, gt=0, description="likelihood: in units of reward")
    steps: int = Field(300, ge=1)
    batch_size: int = Field(256, ge=2)
    inner_epochs: int = Field(4, ge=1, description="steps on a batch before its old policy is taken anew")
    replay_share: float = Field(0.5, ge=0, lt=1, description="of a batch, where there is anything to replay")
    lr: float = Field(1e-3, gt=0)
    clip: float = Field(0.2, gt=0, lt=1)
    ema_weight: float = Field(1.0, ge=0, description="of KL to the moving average, on anchor inputs")
    champion_weight: float = Field(0.05, ge=0, description="of KL to the champion, on recent unlabelled inputs")
    ema_decay: float = Field(0.998, ge=0, lt=1)
    line: tuple[float, ...] = Field((1.0, 0.7, 0.4), min_length=1, description="shares of the way to try")
    anchor_budget: float = Field(0.1, gt=0, description="largest mean KL(candidate || champion) on anchor inputs")
    seed: int = Field(0, ge=0)


class PathPoint(Record):
    """One point of the line search."""

    share: float
    anchor_kl: float
    select_reward: float
    within_budget: bool


@dataclass(frozen=True)
class Proposal:
    """A candidate's weights, or None where no step earned more within the budget; and what was tried.

    ``state`` is a state dict of the policy that was given; ``champion_reward`` the champion's on the selecting rows.
    """

    state: dict[str, Tensor] | None
    share: float | None
    champion_reward: float
    steps: tuple[PathPoint, ...]


def likelihood_loss(log_probs: Tensor, rewards: Tensor, temperature: float) -> Tensor:
    """Cross entropy to the policy that is proportional to exp(reward / temperature), a scalar; both are [N, A].

    Reward-augmented maximum likelihood (Norouzi et al. 1609.00150). A policy that is sure and wrong has next to no
    gradient of its expected reward, and has one of this.
    """
    return -(torch.softmax(rewards / temperature, 1) * log_probs).sum(1).mean()


def propose(
    champion: M,
    new: BanditRows,
    replay: BanditRows | None,
    select: BanditRows,
    *,
    anchor: tuple[Tensor, ...],
    recent: tuple[Tensor, ...],
    options: ProposalOptions | None = None,
    learns: Sequence[str] | None = None,
) -> Proposal:
    """Propose weights that earn more on new rows and stay near the champion elsewhere; the champion is not changed.

    Args:
        champion: gives log-probabilities of actions [N, A], such as ``HeadsPolicy``.
        new: labelled rows since it was made; rewards from true labels (``rewards.verified``).
        replay: earlier labelled rows, from the reservoir; None at first.
        select: labelled rows that choose the step. Never guard rows: this function would train on them.
        anchor: inputs of the anchor, no labels.
        recent: inputs served lately, no labels.
        options: how.
        learns: names of the parameters that learn; None = all that require a gradient.

    Raises:
        InputError: rows with other numbers of actions, names of no parameter, or no inputs to hold it by.
    """
    options = options or ProposalOptions()
    if not anchor or not recent or not len(anchor[0]) or not len(recent[0]):
        raise InputError("anchor and recent must be inputs of 1 or more rows each, got none; they are what holds it")
    if any(rows is not None and rows.rewards.shape[1] != new.rewards.shape[1] for rows in (replay, select)):
        raise InputError("rows must be rewarded for the same actions, got other numbers of them; use one reward spec")
    policy, average = copy.deepcopy(champion).eval(), copy.deepcopy(champion).eval()
    named = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    unknown = sorted(set(learns or ()) - set(named))
    if unknown or not named:
        raise InputError(f"learns must name parameters that require a gradient, got {unknown or 'none of them'}")
    parameters = {name: named[name] for name in (named if learns is None else learns)}
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name in parameters)
    held_recent = log_probs_of(champion, recent)
    optimizer = torch.optim.AdamW(parameters.values(), lr=options.lr, weight_decay=0.0)
    rng = np.random.Generator(np.random.Philox(options.seed))
    averages = dict(average.named_parameters())

    def draw(n: int, size: int) -> Tensor:
        return torch.from_numpy(rng.integers(0, n, size))

    n_replay = 0 if replay is None else round(options.replay_share * options.batch_size)
    for step in range(options.steps):
        if step % options.inner_epochs == 0:
            index = draw(len(new.rewards), options.batch_size - n_replay)
            inputs, rewards = tuple(x[index] for x in new.inputs), new.rewards[index]
            if replay is not None and n_replay:
                index = draw(len(replay.rewards), n_replay)
                inputs = tuple(torch.cat([x, y[index]]) for x, y in zip(inputs, replay.inputs, strict=True))
                rewards = torch.cat([rewards, replay.rewards[index]])
            old = log_probs_of(policy, inputs)
        at, late = (draw(len(x[0]), options.batch_size) for x in (anchor, recent))
        own = tuple(x[at] for x in anchor)
        if options.objective == "reward":
            loss = clipped_loss(policy(*inputs), old, rewards, options.clip)
        else:
            loss = likelihood_loss(policy(*inputs), rewards, options.temperature)
        loss = loss + options.ema_weight * kl(policy(*own), log_probs_of(average, own))
        loss = loss + options.champion_weight * kl(policy(*(x[late] for x in recent)), held_recent[late])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            for name, parameter in parameters.items():
                averages[name].lerp_(parameter, 1 - options.ema_decay)
    return _line_search(champion, policy, parameters, select, anchor, options)


def _line_search(
    champion: nn.Module,
    policy: nn.Module,
    parameters: dict[str, nn.Parameter],
    select: BanditRows,
    anchor: tuple[Tensor, ...],
    options: ProposalOptions,
) -> Proposal:
    """The step towards the policy that earns most on the selecting rows within the anchor's budget, if any."""
    start = {name: value for name, value in champion.named_parameters() if name in parameters}
    end = {name: value.detach().clone() for name, value in parameters.items()}
    held = log_probs_of(champion, anchor)
    before = mean_reward(log_probs_of(champion, select.inputs), select.rewards)
    tried, best, best_state = [], before, None
    for share in options.line:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(torch.lerp(start[name].detach(), end[name], share))
        apart = float(kl(log_probs_of(policy, anchor), held))
        found = mean_reward(log_probs_of(policy, select.inputs), select.rewards)
        tried.append(
            PathPoint(share=share, anchor_kl=apart, select_reward=found, within_budget=apart <= options.anchor_budget)
        )
        if tried[-1].within_budget and found > best:
            best, best_state = found, copy.deepcopy(policy.state_dict())
    chosen = None if best_state is None else next(s.share for s in tried if s.within_budget and s.select_reward == best)
    return Proposal(best_state, chosen, before, tuple(tried))


# -------------------------------------------------------------------------------- a run


class ProposalRecord(Record):
    """``proposal.json``: from which model a run was proposed, by what rows, and every step that was tried."""

    format_version: Literal[1] = 1
    parent_fingerprint: str
    model_fingerprint: str
    spec: RewardSpec
    options: ProposalOptions
    n_new: int
    replayed: dict[str, int] = Field(description="rows of the reservoir by stratum: source/class")
    n_select: int
    n_anchor: int = Field(description="images that held it by the KL to its moving average, and by the budget")
    n_recent: int
    share: float | None = Field(description="of Stage A's way that is proposed; null: it stays as it is")
    steps: list[PathPoint]
    share_b: float | None = Field(description="the same of Stage B's head")
    steps_b: list[PathPoint]
    accuracy_b_before: float = Field(description="of Stage B on val_select")
    accuracy_b_after: float
    reward_before: float = Field(description="of the most likely action on val_select, before any threshold")
    reward_after: float
    split_hashes: dict[str, str]
    statement: str = STATEMENT


def propose_run(
    run: Path | str,
    out: Path | str,
    *,
    known: Collection[str],
    anchor: Collection[str],
    recent: Sequence[Path | str],
    spec: RewardSpec | None = None,
    options: ProposalOptions | None = None,
    reservoir: Path | str | None = None,
) -> ProposalRecord:
    """Train new heads for a run and write them as a new run, to be calibrated and certified again.

    The heads learn from ``train`` rows that are not ``known``; known rows are replayed. The steps are chosen on the new
    rows of ``val_select`` and at most as many known ones, so that new rows count. Stage B's head learns first, and the
    reward of DEFER is that of its new answers. The new folder appears whole or not at all, with ``reservoir.npz`` for
    the next round.

    Args:
        run: a run, its splits as they are now.
        out: the new run's folder.
        known: sha256 of ``train`` and ``val_select`` rows that an earlier round, or the first training, had.
        anchor: sha256 of ``val_select`` rows of the domain that must not be forgotten; their labels hold nothing.
        recent: images served lately, no labels.
        spec: what actions earn.
        options: how.
        reservoir: of the parent's; one is made of the known rows where there is none or its features are others.

    Raises:
        InputError: the folder is there, labels that may not be rewarded, or no anchor or no recent image.
        ArtifactError: a run that is not trained, or was changed; a damaged reservoir.
        NotReachableError: nothing is new, or no step earns more on ``val_select`` within the anchor's budget; nothing
            was written.
    """
    run, out, options = Path(run), Path(out), options or ProposalOptions()
    if out.exists():
        raise InputError(f"out must be a new folder, got {out}, which is there")
    parent = _Parent.load(run, spec)
    model, splits, device, before = parent.model, parent.splits, parent.device, parent.model.fingerprint()
    learned = splits.of("train")
    new = [row for row in learned if row.sha256 not in known]
    select = _select(splits.of("val_select"), known)
    held = [row for row in splits.of("val_select") if row.sha256 in anchor]
    if not new:
        raise NotReachableError("train must have rows that are not known, got none; have more labelled")
    for name, rows in (("anchor", held), ("recent", list(recent))):
        if not rows:
            raise InputError(f"{name} must be 1 or more, got none; name what is to hold the policy")

    fresh, chosen_by = parent.cached(new, "new rows"), parent.cached(select, "val_select rows")
    holding, _ = parent.inputs(splits.photos_of(held), description="anchor")
    lately, _ = parent.inputs([Path(path) for path in recent], description="recent")
    remembered = _remember(parent, [row for row in learned if row.sha256 in known], path=reservoir)
    columns = remembered.columns
    replayed = _Cached(columns["a"], columns["b"], columns["label"], ["owner"] * len(remembered)) if columns else None

    def ask(policy: HeadsPolicy | _AnswersB, options: ProposalOptions, width: int, *learns: str) -> Proposal:
        return propose(
            policy, parent.earns(fresh, width), None if replayed is None else parent.earns(replayed, width),
            parent.earns(chosen_by, width),
            anchor=tuple(torch.from_numpy(x).to(device) for x in holding),
            recent=tuple(torch.from_numpy(x).to(device) for x in lately),
            options=options, learns=[name for name, _ in policy.named_parameters() if name.startswith(learns)],
        )  # fmt: skip

    def reward(policy: HeadsPolicy) -> float:
        paid = parent.earns(chosen_by, classes + 2)
        return mean_reward(log_probs_of(policy, paid.inputs), paid.rewards)

    classes, policy, answers = len(splits.classes), HeadsPolicy(model.heads), _AnswersB(model.heads.auxiliary)
    before_b = parent.accuracy_b(chosen_by)
    found_b = ask(answers, options.model_copy(update={"objective": "likelihood"}), classes, "auxiliary")
    start = reward(policy)
    if found_b.state is not None:
        answers.load_state_dict(found_b.state)
    found = ask(policy, options, classes + 2, "module.classifier", "module.gate")
    if found.state is not None:
        policy.load_state_dict(found.state)
    reached = reward(policy)
    if reached <= start:
        raise NotReachableError(
            f"the reward on val_select must rise above {start:.4f} within the anchor's budget of KL, got steps of "
            f"Stage A that earn {_tried(found)}; Stage B's steps earn {_tried(found_b)}; nothing was written"
        )
    state = model.state_dict()
    strata, counts = np.unique(remembered.strata, return_counts=True)
    record = ProposalRecord(
        parent_fingerprint=before, model_fingerprint=fingerprint(model.architecture, state), spec=parent.spec,
        options=options, n_new=len(new), replayed=dict(zip(strata.tolist(), counts.tolist(), strict=True)),
        n_select=len(select), n_anchor=len(held), n_recent=len(recent), share=found.share, steps=list(found.steps),
        share_b=found_b.share, steps_b=list(found_b.steps), accuracy_b_before=before_b,
        accuracy_b_after=parent.accuracy_b(chosen_by), reward_before=start, reward_after=reached,
        split_hashes=splits.hashes,
    )  # fmt: skip
    parent.remember(remembered, new, fresh.a, fresh.b)
    with atomic_directory(out) as staging:
        write_run(staging, run, state)
        remembered.save(staging / RESERVOIR)
        record.write(staging / RECORD)
    say(
        f"reward on val_select {start:.4f} -> {reached:.4f}, Stage B's accuracy {before_b:.4f} -> "
        f"{record.accuracy_b_after:.4f}; wrote {out}; {STATEMENT} (stage1 calibrate --run {out})"
    )
    return record


def _select(rows: Sequence[Row], known: Collection[str]) -> list[Row]:
    """New rows and at most as many known ones, drawn by their hashes; all of these where nothing is new."""
    new = [row for row in rows if row.sha256 not in known]
    old = sorted((row for row in rows if row.sha256 in known), key=lambda row: uniform(0, "select", row.sha256))
    return new + old[: len(new) or len(old)]


@dataclass(frozen=True)
class _Cached:
    """Rows as heads see them: features of both stages, each [N, 2D], labels [N] and where those come from."""

    a: NDArray[np.float32]
    b: NDArray[np.float32]
    labels: NDArray[np.int64]
    sources: list[str]


class _Parent(Origin):
    """The run that is proposed from, its heads as they are by now."""

    def cached(self, rows: Sequence[Row], what: str) -> _Cached:
        labels, sources = self.labels(rows)
        (a, b), _ = self.inputs(self.splits.photos_of(rows), description=what)
        return _Cached(a, b, labels, sources)

    @torch.no_grad()
    def answers_b(self, rows: _Cached) -> NDArray[np.int64]:
        logits: Tensor = self.model.heads.auxiliary(torch.from_numpy(rows.b).to(self.device))
        return np.asarray(logits.argmax(1).cpu().numpy(), dtype=np.int64)

    def accuracy_b(self, rows: _Cached) -> float:
        return float((self.answers_b(rows) == rows.labels).mean())

    def earns(self, rows: _Cached, width: int) -> BanditRows:
        """What the first ``width`` actions earn with Stage B as it is: answers alone, or all."""
        paid = self.pay((rows.a, rows.b), self.answers_b(rows), rows.labels, rows.sources)
        return BanditRows(paid.inputs, paid.rewards[:, :width])

    def features(self) -> str:
        """Hash of all that makes features, heads apart."""
        state = {name: value for name, value in self.model.state_dict().items() if not name.startswith("heads.")}
        return fingerprint(self.model.architecture, state)

    def remember(
        self, reservoir: Reservoir, rows: Sequence[Row], a: NDArray[np.float32], b: NDArray[np.float32]
    ) -> None:
        made_by = np.full(len(rows), self.features())
        columns: dict[str, NDArray[Any]] = {"a": a, "b": b, "label": self.splits.indices(rows), "features": made_by}
        reservoir.add([row.sha256 for row in rows], _strata(rows), columns)


def _remember(parent: _Parent, known: Sequence[Row], *, path: Path | str | None) -> Reservoir:
    """The parent's reservoir, where its features are this model's; else one of the known rows.

    A backbone knows the rows it was trained on by heart, so an augmented draw that training did not make is remembered
    in their place.
    """
    if path is not None and Path(path).is_file():
        there = Reservoir.load(path)
        if not len(there) or str(there.columns["features"][0]) == parent.features():
            return there
    config = parent.config
    found, drawn = Reservoir(CAPACITY, config.seed), Reservoir(CAPACITY, config.seed)
    # Who stays is drawn before anybody's features are read.
    drawn.add([row.sha256 for row in known], _strata(known), {})
    ids = set(drawn.ids.tolist())
    kept = [row for row in known if row.sha256 in ids]
    if kept:
        by_heart = config.augment.enabled and config.train.mode != "linear"
        draw = (config.augment, config.seed, config.train.epochs) if by_heart else None
        (a, b), _ = parent.inputs(parent.splits.photos_of(kept), draw, description="rows to remember")
        parent.remember(found, kept, a, b)
    return found


class _AnswersB(nn.Module):
    """Stage B as a policy whose actions are its answers: log-probabilities [N, K]."""

    def __init__(self, auxiliary: nn.Module) -> None:
        super().__init__()
        self.auxiliary = auxiliary

    def forward(self, _features_a: Tensor, features_b: Tensor) -> Tensor:
        return torch.as_tensor(self.auxiliary(features_b)).float().log_softmax(1)


def _strata(rows: Sequence[Row]) -> list[str]:
    return [f"{row.source}/{row.label}" for row in rows]


def _tried(proposal: Proposal) -> str:
    return ", ".join(f"{step.select_reward:.4f} at KL {step.anchor_kl:.3g}" for step in proposal.steps)
