"""Reward tuning, the promotion gate and forgetting, on seeded tasks that are stated here in full.

    python benchmarks/continual_learning.py tuning [--seeds 20]
    python benchmarks/continual_learning.py gate [--epochs 200]
    python benchmarks/continual_learning.py forgetting [--seeds 5]

Each prints a table for README.md, in single-threaded torch, in minutes. The tasks are drawn, not photographed: they
rank mechanisms and say nothing of a model on streets.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stage1_pro.continual.learn import rewards as r
from stage1_pro.continual.learn.mgrpo import ProposalOptions, propose
from stage1_pro.continual.learn.replay import Reservoir
from stage1_pro.continual.learn.rlvr import (
    BanditRows,
    HeadsPolicy,
    TuneOptions,
    fit_policy,
    kl,
    log_probs_of,
    mean_reward,
)
from stage1_pro.continual.ledger.guard import GuardVault
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.loop.promotion import Anchor, Side, Terms, evaluate
from stage1_pro.models.model import Heads

CLASSES = ("none", "roadwork")
SPEC = r.RewardSpec(defer_cost=0.4)


@dataclass(frozen=True)
class Draw:
    """Rows of a task: features [N, F], labels [N], Stage B's answers [N]."""

    x: Tensor
    y: NDArray[np.int64]
    b: NDArray[np.int64]

    def truth(self) -> r.Verified:
        return r.verified(self.y, "owner", classes=CLASSES, positive="roadwork")

    def rewards(self) -> Tensor:
        return torch.from_numpy(r.action_rewards(SPEC, self.truth(), self.b)).float()

    def rows(self, *, twice: bool = False) -> BanditRows:
        says = torch.zeros(len(self.y), 4)
        says[:, 1], says[:, 2] = 1.0, torch.from_numpy(self.b == 1).float()
        return BanditRows((self.x, self.x) if twice else (self.x,), self.rewards(), says, self.y == 1)

    def both(self, other: Draw) -> Draw:
        return Draw(torch.cat([self.x, other.x]), np.concatenate([self.y, other.y]), np.concatenate([self.b, other.b]))


def decisions(log_probs: Tensor, b: NDArray[np.int64]) -> r.Actions:
    """The most likely actions: EXIT none, EXIT roadwork, DEFER, ABSTAIN."""
    action = log_probs.argmax(1).numpy()
    answers = np.where(action < 2, action, np.where(action == 2, b, r.NOBODY)).astype(np.int64)
    return r.Actions(answers, action == 2)


# -------------------------------------------------------------------------------- tuning


def two_populations(n: int, rng: np.random.Generator, width: int = 8) -> Draw:
    """Seven rows of ten follow one rule, the others another that the linear Stage A cannot hold at the same time.

    x ~ N(0, 1); y = 1 with probability sigmoid(4 x1) where x0 < .52, else sigmoid(4 (x2 - x1)); Stage B is right 95%.
    """
    x = rng.normal(size=(n, width))
    score = np.where(x[:, 0] < 0.52, 4 * x[:, 1], 4 * (x[:, 2] - x[:, 1]))
    y = (rng.random(n) < 1 / (1 + np.exp(-score))).astype(np.int64)
    b = np.where(rng.random(n) < 0.95, y, 1 - y)
    return Draw(torch.from_numpy(x).float(), y, b)


def fit_ce(heads: Heads, draw: Draw, epochs: int = 150) -> None:
    """Cross entropy of the classifier, then the gate's own on "Stage A is right": where every method starts."""
    y = torch.from_numpy(draw.y)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.02, weight_decay=0.0)
    for _ in range(epochs):
        out = heads(draw.x, draw.x)
        right = (out.logits_a.argmax(1) == y).float()
        loss = nn.functional.cross_entropy(out.logits_a, y)
        loss = loss + nn.functional.binary_cross_entropy_with_logits(out.gate_logit, right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def tuned_threshold(heads: Heads, select: Draw, test: Draw) -> float:
    """Test reward of CE where what exits is chosen by reward on the selecting rows: by gate or by max softmax."""

    def parts(draw: Draw) -> tuple[list[Tensor], Tensor, Tensor]:
        with torch.no_grad():
            out = heads(draw.x, draw.x)
        table = draw.rewards()
        exits = table.gather(1, out.logits_a.argmax(1, keepdim=True))[:, 0]
        return [out.gate_logit, out.logits_a.softmax(1).amax(1)], exits, table[:, 2]

    scores, exits, defers = parts(select)
    found = []
    for k, score in enumerate(scores):
        order = score.argsort(descending=True)
        gain = torch.cat([torch.zeros(1), (exits - defers)[order].cumsum(0)])
        at = int(gain.argmax())
        limit = float("inf") if at == 0 else float(score[order[at - 1]])
        found.append((float(gain[at]), k, limit))
    _, k, limit = max(found)
    scores, exits, defers = parts(test)
    return float(torch.where(scores[k] >= limit, exits, defers).mean())


def fit_by(
    policy: nn.Module,
    rows: BanditRows,
    select: BanditRows,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    options: TuneOptions,
) -> None:
    """The loop of ``fit_policy`` for objectives that the package does not offer; ``loss_of(log_probs, index)``."""
    reference = log_probs_of(policy, rows.inputs)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=options.lr, weight_decay=0.0)
    rng = np.random.Generator(np.random.Philox(options.seed))
    best, kept, wait = mean_reward(log_probs_of(policy, select.inputs), select.rewards), policy.state_dict(), 0
    kept = copy.deepcopy(kept)
    for _ in range(options.epochs):
        order = torch.from_numpy(rng.permutation(len(rows.rewards)))
        for index in order.split(options.batch_size):
            log_probs = policy(*(x[index] for x in rows.inputs))
            loss = loss_of(log_probs, index) + options.beta * kl(log_probs, reference[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = mean_reward(log_probs_of(policy, select.inputs), select.rewards)
        if found > best:
            best, kept, wait = found, copy.deepcopy(policy.state_dict()), 0
        elif (wait := wait + 1) >= options.patience:
            break
    policy.load_state_dict(kept)


def grpo_loss(rewards: Tensor, draws: int, generator: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """REINFORCE with advantages divided by the group's standard deviation, which the package never does."""

    def loss(log_probs: Tensor, index: Tensor) -> Tensor:
        actions = torch.multinomial(log_probs.detach().exp(), draws, replacement=True, generator=generator)
        got = rewards[index].gather(1, actions)
        advantage = (got - got.mean(1, keepdim=True)) / (got.std(1, keepdim=True) + 1e-4)
        return -(advantage * log_probs.gather(1, actions)).mean()

    return loss


def surrogate_loss(y: Tensor, b: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Learning to defer (Mozannar and Sontag, 2006.01862): cross entropy over classes and "Stage B is right"."""

    def loss(log_probs: Tensor, index: Tensor) -> Tensor:
        own = log_probs.gather(1, y[index][:, None])[:, 0]
        return -(own + (b[index] == y[index]) * log_probs[:, 2]).mean()

    return loss


def tuning_seed(seed: int, n: int = 3000) -> dict[str, float]:
    """Test reward of every method from one checkpoint, and MCC of two."""
    rng = np.random.default_rng(seed)
    train, select, test = two_populations(n, rng), two_populations(n // 2, rng), two_populations(20000, rng)
    torch.manual_seed(seed)
    start = Heads(train.x.shape[1], 2, 4, 0.0)
    fit_ce(start, train)
    found = {"CE + tuned threshold": tuned_threshold(start, select, test)}
    judge = test.rewards()

    def run(name: str, fit: Callable[[HeadsPolicy, TuneOptions], Any], **changes: Any) -> HeadsPolicy:
        policy = HeadsPolicy(copy.deepcopy(start))
        fit(
            policy,
            TuneOptions(**{"lr": 0.03, "seed": seed, "epochs": 60, "patience": 20, "batch_size": 128, **changes}),
        )
        found[name] = mean_reward(log_probs_of(policy, (test.x, test.x)), judge)
        return policy

    def package(policy: HeadsPolicy, options: TuneOptions) -> None:
        heads = policy.module
        learns = [*heads.classifier.parameters(), *heads.gate.parameters()]
        fit_policy(policy, learns, train.rows(twice=True), select.rows(twice=True), options)

    def custom(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[HeadsPolicy, TuneOptions], None]:
        return lambda policy, options: fit_by(policy, train.rows(twice=True), select.rows(twice=True), loss, options)

    run("exact + KL", package)
    run("clipped", package, method="clipped")
    run("RLOO", package, method="rloo")
    generator = torch.Generator().manual_seed(seed)
    run("GRPO with /SD", custom(grpo_loss(train.rewards(), 8, generator)))
    run("learning to defer", custom(surrogate_loss(torch.from_numpy(train.y), torch.from_numpy(train.b))), beta=0.0)
    by_set = run("MCC", package, method="mcc", batch_size=100, lr=0.01)
    for name, policy in (("MCC of CE", HeadsPolicy(start)), ("MCC of MCC", by_set)):
        said = decisions(log_probs_of(policy, (test.x, test.x)), test.b).answers == 1
        t = test.y == 1
        found[name] = float(r.mcc_reward((said & t).sum(), (said & ~t).sum(), (~said & t).sum(), (~said & ~t).sum()))
    return found


def tuning(seeds: int) -> None:
    results = [tuning_seed(seed) for seed in range(seeds)]
    base = np.array([one["CE + tuned threshold"] for one in results])
    print(f"| {seeds} seeds | test reward | against CE + tuned threshold | better in |\n|---|---|---|---|")
    for name in results[0]:
        if name.startswith("MCC of"):
            continue
        values = np.array([one[name] for one in results])
        gain = values - base
        error = gain.std(ddof=1) / np.sqrt(seeds)
        print(f"| {name} | {values.mean():+.3f} | {gain.mean():+.3f} ± {error:.3f} | {(gain > 0).sum()}/{seeds} |")
    mcc = np.array([one["MCC of MCC"] - one["MCC of CE"] for one in results])
    print(f"MCC by difference rewards less MCC of CE: {mcc.mean():+.3f}, better in {(mcc > 0).sum()}/{seeds}")


# -------------------------------------------------------------------------------- the gate


def two_cascades(
    y: NDArray[np.int64], gain: float, rng: np.random.Generator, differ: float
) -> tuple[r.Actions, r.Actions]:
    """Champion and candidate, whose answers differ on a share of rows; the candidate earns ``gain`` more on average."""
    n = len(y)
    champion = np.where(rng.random(n) < 0.9, y, 1 - y)
    other = rng.random(n) < differ
    # A changed answer is worth +-(right + k): the share of good changes gives the gain.
    good = rng.random(n) < 0.5 + gain / (2 * differ * (SPEC.right + SPEC.k_fp))
    champion = np.where(other, np.where(good, 1 - y, y), champion)
    candidate = np.where(other, 1 - champion, champion)
    none = np.zeros(n, dtype=bool)
    return r.Actions(champion.astype(np.int64), none), r.Actions(candidate.astype(np.int64), none)


def gate_epoch(vault: GuardVault, name: str, gain: float, rng: np.random.Generator, *, n: int, looks: int,
               differ: float = 0.05) -> list[bool]:  # fmt: skip
    """Verdicts of ``looks`` candidates of one guard epoch; only the guard decides, the anchor is easy."""
    ids = [str(i) for i in range(n)]
    vault.open(name, ids, ids, now=0.0)
    y = rng.integers(0, 2, n)
    vault.label(name, {one: CLASSES[label] for one, label in zip(ids, y, strict=True)}, "owner")
    anchor_y = rng.integers(0, 2, 600)
    easy = r.Actions(anchor_y.astype(np.int64), np.zeros(600, dtype=bool))
    truth = r.verified(anchor_y, "owner", classes=CLASSES, positive="roadwork")
    anchor = Anchor(truth, np.arange(600).astype(np.str_))
    found = []
    for look in range(looks):
        champion, candidate = two_cascades(y, gain, rng, differ)
        verdict = evaluate(vault, name, Side("champion", champion, easy), Side(f"{name}.{look}", candidate, easy),
                           anchor, spec=SPEC, now=float(look),
                           terms=Terms(require_certificate=False, n_replicates=1000))  # fmt: skip
        found.append(verdict.promoted)
    return found


def gate(epochs: int) -> None:
    columns = ("candidates", "guard rows", "rows that differ", "epochs", "looks", "epochs with a promotion", "promoted")
    print(f"| {' | '.join(columns)} |\n|{'---|' * 7}")
    with tempfile.TemporaryDirectory() as folder:
        vault = GuardVault(Store(Path(folder) / "loop.db"))
        rng = np.random.default_rng(0)
        quarter, half = max(epochs // 4, 1), max(epochs // 2, 1)
        cases = ((0.0, 500, 0.2, epochs, 10), (0.1, 4000, 0.05, quarter, 1), (0.1, 1000, 0.05, half, 1))
        for gain, n, differ, times, looks in cases:
            runs = [gate_epoch(vault, f"{gain}.{n}.{k}", gain, rng, n=n, looks=looks, differ=differ)
                    for k in range(times)]  # fmt: skip
            once = np.mean([any(one) for one in runs])
            print(
                f"| gain {gain:g} | {n} | {differ:.0%} | {times} | {looks} | {once:.3f} | {np.mean(runs):.4f} |",
                flush=True,
            )


# -------------------------------------------------------------------------------- forgetting


class Domains:
    """Seven domains: each shifts the inputs and turns the rule; the first one is the anchor.

    In domain d inputs are N(3 m_d, 1), m_d a random direction (0 for the anchor), and y = 1 with probability
    sigmoid(4 w_d (x - 3 m_d)), w_d the anchor's rule turned by up to 60 degrees. Stage B is right 95%.
    """

    def __init__(self, seed: int, width: int = 16) -> None:
        rng = np.random.default_rng(1000 + seed)
        unit = [v / np.linalg.norm(v) for v in rng.normal(size=(14, width))]
        self.means = [np.zeros(width), *(3 * m for m in unit[1:7])]
        self.rules = [unit[0]]
        for turn in unit[7:13]:
            across = turn - (turn @ unit[0]) * unit[0]
            angle = rng.uniform(0.5, 1.0) * np.pi / 3
            self.rules.append(np.cos(angle) * unit[0] + np.sin(angle) * across / np.linalg.norm(across))

    def draw(self, domain: int, n: int, rng: np.random.Generator) -> Draw:
        x = rng.normal(size=(n, self.means[0].size))
        y = (rng.random(n) < 1 / (1 + np.exp(-4 * (x @ self.rules[domain])))).astype(np.int64)
        b = np.where(rng.random(n) < 0.95, y, 1 - y)
        return Draw(torch.from_numpy(x + self.means[domain]).float(), y, b)

    def mix(self, upto: int, n: int, rng: np.random.Generator) -> Draw:
        """The true mix of a round: half the anchor, half the domains since, evenly."""
        found = self.draw(0, n if upto == 0 else n // 2, rng)
        for domain in range(1, upto + 1):
            found = found.both(self.draw(domain, n // (2 * upto), rng))
        return found


class Policy(nn.Module):
    """A small network with a logit for every action."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x).log_softmax(1)
        return out


def forgetting_seed(seed: int, method: str, vault: GuardVault, rounds: int = 6) -> dict[str, Any]:
    """Six shifts in a row; rewards of the anchor and of the true mix after every round."""
    domains, rng = Domains(seed), np.random.default_rng(seed)
    torch.manual_seed(seed)
    champion = Policy(16)
    first = domains.draw(0, 4000, rng)
    surrogate = TuneOptions(lr=0.005, epochs=40, beta=0.0, seed=seed)

    def by_surrogate(policy: Policy, rows: Draw, select: Draw, options: TuneOptions) -> None:
        loss = surrogate_loss(torch.from_numpy(rows.y), torch.from_numpy(rows.b))
        fit_by(policy, rows.rows(), select.rows(), loss, options)

    by_surrogate(champion, first, domains.draw(0, 1500, rng), surrogate)
    fit_policy(champion, list(champion.parameters()), first.rows(), domains.draw(0, 1500, rng).rows(),
               TuneOptions(lr=0.002, seed=seed))  # fmt: skip
    tests = [domains.draw(d, 10000, rng) for d in range(rounds + 1)]
    memory = Reservoir(3000, seed)

    def remember(rows: Draw, domain: int) -> None:
        ids = [f"{domain}.{i}" for i in range(len(rows.y))]
        memory.add(ids, [f"{domain}.{y}" for y in rows.y], {"x": rows.x.numpy(), "y": rows.y, "b": rows.b})

    def figures(policy: Policy) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Reward and share answered right, by domain."""
        earned, right = [], []
        for test in tests:
            log_probs = log_probs_of(policy, (test.x,))
            earned.append(mean_reward(log_probs, test.rewards()))
            right.append(float((decisions(log_probs, test.b).answers == test.y).mean()))
        return np.array(earned), np.array(right)

    def true_mix(values: NDArray[np.float64], upto: int) -> float:
        return float(0.5 * values[0] + 0.5 * values[1 : upto + 1].mean())

    remember(first, 0)
    origin = copy.deepcopy(champion)
    start, changes, promotions = figures(champion), [], 0
    now = start
    for t in range(1, rounds + 1):
        new, select = domains.draw(t, 1500, rng), domains.mix(t, 2000, rng)
        before = true_mix(now[0], t)
        if method == "CE fine-tune":
            held = domains.draw(t, 500, rng)
            by_surrogate(champion, new, held, surrogate)
        elif method == "PG + KL":
            held = domains.draw(t, 500, rng)
            fit_policy(champion, list(champion.parameters()), new.rows(), held.rows(),
                       TuneOptions(lr=0.002, seed=seed))  # fmt: skip
        else:
            promotions += _round(champion, origin, domains, new, select, memory, vault, t, seed, rng)
        remember(new, t)
        now = figures(champion)
        changes.append(true_mix(now[0], t) - before)
    return {"start": start, "end": now, "changes": changes, "promotions": promotions}


def _round(champion: Policy, origin: Policy, domains: Domains, new: Draw, select: Draw, memory: Reservoir,
           vault: GuardVault, t: int, seed: int, rng: np.random.Generator) -> int:  # fmt: skip
    """One proposal and its verdict; the champion is replaced in place where it is promoted."""
    held = {name: memory.columns[name] for name in ("x", "y", "b")}
    replay = Draw(torch.from_numpy(held["x"]), held["y"], held["b"])
    anchor, recent, guard = domains.draw(0, 2000, rng), domains.mix(t, 2000, rng), domains.mix(t, 4000, rng)
    judged = domains.draw(0, 4000, rng)
    found = propose(champion, new.rows(), replay.rows(), select.rows(), anchor=(anchor.x,), recent=(recent.x,),
                    options=ProposalOptions(lr=0.002, seed=seed, steps=600))  # fmt: skip
    if found.state is None:
        return 0
    candidate = copy.deepcopy(champion)
    candidate.load_state_dict(found.state)
    epoch = f"{seed}.{t}"
    ids = [str(i) for i in range(len(guard.y))]
    vault.open(epoch, ids, ids, now=0.0)
    vault.label(epoch, {one: CLASSES[y] for one, y in zip(ids, guard.y, strict=True)}, "review")

    def side(name: str, policy: Policy) -> Side:
        return Side(name, *(decisions(log_probs_of(policy, (rows.x,)), rows.b) for rows in (guard, judged)))

    verdict = evaluate(
        vault, epoch, side("champion", champion), side("candidate", candidate),
        Anchor(judged.truth(), np.arange(len(judged.y)).astype(np.str_), origin=side("origin", origin).anchor),
        spec=SPEC, now=float(t),
        terms=Terms(require_certificate=False),
    )  # fmt: skip
    if verdict.promoted:
        champion.load_state_dict(found.state)
    return int(verdict.promoted)


METHODS = ("CE fine-tune", "PG + KL", "proposer + gate")


def forgetting(seeds: int, methods: tuple[str, ...] = METHODS) -> None:
    columns = ("anchor right, start", "anchor right, end", "all domains right", "all domains reward",
               "rounds that lower the true mix by > .01", "worst round", "promotions")  # fmt: skip
    print(f"| 6 shifts, {seeds} seeds | {' | '.join(columns)} |\n|{'---|' * 8}")
    for method in methods:
        with tempfile.TemporaryDirectory() as folder:
            vault = GuardVault(Store(Path(folder) / "loop.db"))
            runs = [forgetting_seed(seed, method, vault) for seed in range(seeds)]
        start, end = (np.array([one[k][1][0] for one in runs]) for k in ("start", "end"))
        hurt = np.array([[change < -0.01 for change in one["changes"]] for one in runs]).sum(1)
        promoted = f"{np.mean([one['promotions'] for one in runs]):.1f}" if method == METHODS[-1] else "6"
        print(f"| {method} | {start.mean():.3f} | {end.mean():.3f} (worst drop {(start - end).max():+.3f}) | "
              f"{np.mean([one['end'][1].mean() for one in runs]):.3f} | "
              f"{np.mean([one['end'][0].mean() for one in runs]):+.3f} | {hurt.mean():.1f} of 6 | "
              f"{min(min(one['changes']) for one in runs):+.3f} | {promoted} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["tuning", "gate", "forgetting"])
    parser.add_argument("--seeds", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "tuning":
        tuning(options.seeds or 20)
    elif options.part == "gate":
        gate(options.epochs)
    else:
        forgetting(options.seeds or 5, tuple(options.methods))


if __name__ == "__main__":
    main()
