"""New heads for a run by ``mgrpo``: from new and remembered rows to a run without a policy, or a refusal.

Stage B's head learns first, by likelihood, as in its training, under the KL terms of ``mgrpo``. Then Stage A's
classifier and gate learn by reward; DEFER earns what that Stage B answers.

Rows of earlier rounds are remembered as features in a reservoir that goes from run to run, so that a round costs a pass
over its new images alone. An adapter or another backbone begins a new reservoir.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from stage1_pro.config import Config
from stage1_pro.continual.learn.mgrpo import PathPoint, Proposal, ProposalOptions, propose
from stage1_pro.continual.learn.replay import Reservoir
from stage1_pro.continual.learn.rewards import RewardSpec, verified
from stage1_pro.continual.learn.rlvr import (
    STATEMENT,
    BanditRows,
    HeadsPolicy,
    labels_of,
    log_probs_of,
    mean_reward,
    pay_rows,
    read_rows,
    write_run,
)
from stage1_pro.continual.serving.events import uniform
from stage1_pro.data.splits import Row, Splits
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.files import atomic_directory
from stage1_pro.models.model import Stage1Model, fingerprint
from stage1_pro.progress import say
from stage1_pro.record import Record
from stage1_pro.training import checkpoint
from stage1_pro.training.inference import pick_device

RECORD = "proposal.json"
RESERVOIR = "reservoir.npz"
CAPACITY = 4000


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
    source: str = "owner",
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
        source: where the labels of ``splits.json`` come from; only ``owner`` or ``review`` may be rewarded.

    Raises:
        InputError: the folder is there, labels that may not be rewarded, or no anchor or no recent image.
        ArtifactError: a run that is not trained, or was changed; a damaged reservoir.
        NotReachableError: nothing is new, or no step earns more on ``val_select`` within the anchor's budget; nothing
            was written.
    """
    run, out = Path(run), Path(out)
    spec, options = spec or RewardSpec(), options or ProposalOptions()
    if out.exists():
        raise InputError(f"out must be a new folder, got {out}, which is there")
    model, run_config = checkpoint.load_run_model(run)
    splits, config = Splits.read(run / "splits.json").verify(), run_config.config
    before, device = model.fingerprint(), pick_device()
    model = model.to(device).eval()
    learned = splits.of("train")
    new = [row for row in learned if row.sha256 not in known]
    select = _select(splits.of("val_select"), known)
    held = [row for row in splits.of("val_select") if row.sha256 in anchor]
    if not new:
        raise NotReachableError("train must have rows that are not known, got none; have more labelled")
    for name, rows in (("anchor", held), ("recent", list(recent))):
        if not rows:
            raise InputError(f"{name} must be 1 or more, got none; name what is to hold the policy")

    parent = _Parent(model, splits, config, spec, source, device)
    fresh, chosen_by = parent.read(new, "new rows"), parent.read(select, "val_select rows")
    (holding, _), (lately, _) = (
        read_rows(model, photos, config, description=what)
        for photos, what in ((splits.photos_of(held), "anchor"), ([Path(path) for path in recent], "recent"))
    )
    remembered = _remember(parent, [row for row in learned if row.sha256 in known], path=reservoir)
    columns = remembered.columns
    replayed = _Cached(columns["a"], columns["b"], columns["label"], [source] * len(remembered)) if columns else None

    def ask(policy: HeadsPolicy | _AnswersB, options: ProposalOptions, width: int, *learns: str) -> Proposal:
        return propose(
            policy, parent.pay(fresh, width), None if replayed is None else parent.pay(replayed, width),
            parent.pay(chosen_by, width),
            anchor=tuple(torch.from_numpy(x).to(device) for x in holding),
            recent=tuple(torch.from_numpy(x).to(device) for x in lately),
            options=options, learns=[name for name, _ in policy.named_parameters() if name.startswith(learns)],
        )  # fmt: skip

    def reward(policy: HeadsPolicy) -> float:
        paid = parent.pay(chosen_by, classes + 2)
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
        parent_fingerprint=before, model_fingerprint=fingerprint(model.architecture, state), spec=spec, options=options,
        n_new=len(new), replayed=dict(zip(strata.tolist(), counts.tolist(), strict=True)), n_select=len(select),
        n_anchor=len(held), n_recent=len(recent), share=found.share, steps=list(found.steps),
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


@dataclass(frozen=True)
class _Parent:
    """The run that is proposed from, its heads as they are by now, and what its labels earn."""

    model: Stage1Model
    splits: Splits
    config: Config
    spec: RewardSpec
    source: str
    device: torch.device

    def read(self, rows: Sequence[Row], what: str) -> _Cached:
        labels, sources = labels_of(rows, self.splits, self.source)
        verified(labels, sources, classes=self.splits.classes, positive=self.splits.positive)
        (a, b), _ = read_rows(self.model, self.splits.photos_of(rows), self.config, description=what)
        return _Cached(a, b, labels, sources)

    @torch.no_grad()
    def answers_b(self, rows: _Cached) -> NDArray[np.int64]:
        logits: Tensor = self.model.heads.auxiliary(torch.from_numpy(rows.b).to(self.device))
        return np.asarray(logits.argmax(1).cpu().numpy(), dtype=np.int64)

    def accuracy_b(self, rows: _Cached) -> float:
        return float((self.answers_b(rows) == rows.labels).mean())

    def pay(self, rows: _Cached, width: int) -> BanditRows:
        """What the first ``width`` actions earn with Stage B as it is: answers alone, or all."""
        answers = self.answers_b(rows)
        paid = pay_rows((rows.a, rows.b), answers, rows.labels, rows.sources, self.spec, self.splits, self.device)
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
        photos = parent.splits.photos_of(kept)
        (a, b), _ = read_rows(parent.model, photos, config, draw, description="rows to remember")
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
