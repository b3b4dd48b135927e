"""Proposing a better policy without forgetting the old: regularised policy gradients, then a line search in weights.

What is learned from are new rows and replayed ones; what holds the policy are two KL terms on inputs without labels:
to a moving average of itself on the anchor (the domain that must not be forgotten), and to the champion on recent
inputs. The result is a direction more than a place: of the steps along it that keep within a KL budget on the anchor,
the one that earns most on the selecting rows is proposed, or none.

With one action an episode a trust region promises nothing: what makes progress monotone is the promotion test on fresh
labels that this module cannot see. It knows neither guard nor store.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from stage1_pro.continual.learn.rlvr import BanditRows, clipped_loss, kl, log_probs_of, mean_reward
from stage1_pro.errors import InputError
from stage1_pro.record import Record

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
