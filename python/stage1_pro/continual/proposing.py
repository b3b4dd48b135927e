"""A run's heads, proposed anew by ``mgrpo``: new rows and remembered ones in, a run without a policy out, or a refusal.

What the champion has learned from is remembered as features in a reservoir that goes from run to run, so that a round
costs a pass over its new images and not over all there ever were. An adapter or another backbone begins a new one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from stage1_pro.artifacts import Record, Row, Splits, atomic_directory
from stage1_pro.config import Config
from stage1_pro.continual.mgrpo import Proposal, ProposalOptions, Step, propose
from stage1_pro.continual.replay import Reservoir
from stage1_pro.continual.rewards import RewardSpec
from stage1_pro.continual.rlvr import STATEMENT, HeadsPolicy, Rows, labels_of, pay_rows, read_rows, write_run
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.models.model import Stage1Model, fingerprint
from stage1_pro.progress import say
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
    share: float = Field(description="of the way that is proposed")
    steps: list[Step]
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
    capacity: int = CAPACITY,
    source: str = "owner",
) -> ProposalRecord:
    """Propose Stage A's classifier and gate anew and write them as a new run, to be calibrated and certified again.

    ``train`` rows that are not ``known`` are learned from, known ones are replayed; ``val_select`` chooses the step.
    DEFER is paid by what Stage B answers. The new folder appears whole or not at all, with ``reservoir.npz`` for the
    next round.

    Args:
        run: a run, its splits as they are now.
        out: the new run's folder.
        known: sha256 of ``train`` rows that the run's model has learned from.
        anchor: sha256 of ``val_select`` rows of the domain that must not be forgotten; their labels hold nothing.
        recent: images served lately, no labels.
        spec: what actions earn.
        options: how.
        reservoir: of the parent's; one is made of the known rows where there is none or its features are others.
        capacity: rows of a new reservoir.
        source: where the labels of ``splits.json`` come from; only ``owner`` or ``review`` may be rewarded.

    Raises:
        InputError: the folder is there, labels that may not be rewarded, or nothing new, no anchor or no recent image.
        ArtifactError: a run that is not trained, or was changed; a damaged reservoir.
        NotReachableError: no step earns more on ``val_select`` within the anchor's budget; nothing was written.
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
    select = splits.of("val_select")
    held = [row for row in select if row.sha256 in anchor]
    for name, rows in (("train rows that are not known", new), ("anchor", held), ("recent", list(recent))):
        if not rows:
            raise InputError(f"{name} must be 1 or more, got none; label more, or name what is to hold the policy")

    def rewarded(rows: Sequence[Row], what: str) -> tuple[Rows, tuple[NDArray[np.float32], ...], NDArray[np.int64]]:
        labels, sources = labels_of(rows, splits, source)
        inputs, answers = read_rows(model, [splits.path(row) for row in rows], config, description=what)
        return pay_rows(inputs, answers, labels, sources, spec, splits, device), inputs, answers

    new_rows, new_inputs, new_answers = rewarded(new, "new rows")
    old = [row for row in learned if row.sha256 in known]
    remembered = _remember(model, splits, config, old, path=reservoir, capacity=capacity)
    replay = None
    if len(remembered):
        columns = remembered.columns
        replay = pay_rows(
            (columns["a"], columns["b"]), columns["answer_b"], columns["label"], [source] * len(remembered), spec,
            splits, device,
        )  # fmt: skip
    select_rows, *_ = rewarded(select, "val_select rows")
    at = torch.tensor([row.sha256 in anchor for row in select], device=device)
    lately, _ = read_rows(model, [Path(path) for path in recent], config, description="recent images")
    policy = HeadsPolicy(model.heads)
    found = propose(
        policy, new_rows, replay, select_rows,
        anchor=tuple(x[at] for x in select_rows.inputs),
        recent=tuple(torch.from_numpy(values).to(device) for values in lately),
        options=options,
        learns=[name for name, _ in policy.named_parameters() if name.startswith(("module.classifier", "module.gate"))],
    )  # fmt: skip
    if found.state is None or found.share is None:
        raise NotReachableError(_none(found))
    policy.load_state_dict(found.state)
    state = model.state_dict()
    strata, counts = np.unique(remembered.strata, return_counts=True)
    record = ProposalRecord(
        parent_fingerprint=before, model_fingerprint=fingerprint(model.architecture, state), spec=spec, options=options,
        n_new=len(new), replayed=dict(zip(strata.tolist(), counts.tolist(), strict=True)), n_select=len(select),
        n_anchor=len(held), n_recent=len(recent), share=found.share, steps=list(found.steps),
        reward_before=found.champion_reward,
        reward_after=next(step.select_reward for step in found.steps if step.share == found.share),
        split_hashes=splits.hashes,
    )  # fmt: skip
    remembered.add(
        [row.sha256 for row in new], _strata(new), _columns(new, splits, new_inputs, new_answers, _features_of(model))
    )
    with atomic_directory(out) as staging:
        write_run(staging, run, state)
        remembered.save(staging / RESERVOIR)
        record.write(staging / RECORD)
    say(
        f"reward on val_select {record.reward_before:.4f} -> {record.reward_after:.4f}, {record.share:g} of the way; "
        f"wrote {out}; {STATEMENT} (stage1 calibrate --run {out})"
    )
    return record


def _remember(
    model: Stage1Model, splits: Splits, config: Config, known: Sequence[Row], *, path: Path | str | None, capacity: int
) -> Reservoir:
    """The parent's reservoir, where its features are this model's; else one of the known rows.

    Rows that a backbone was trained on it knows by heart, so of those an augmented draw is remembered that training
    did not make.
    """
    features = _features_of(model)
    if path is not None and Path(path).is_file():
        there = Reservoir.load(path)
        if not len(there) or str(there.columns["features"][0]) == features:
            return there
    found = Reservoir(capacity, config.seed)
    # Who stays is drawn before anybody's features are read.
    drawn = Reservoir(capacity, config.seed)
    drawn.add([row.sha256 for row in known], _strata(known), {})
    ids = set(drawn.ids.tolist())
    kept = [row for row in known if row.sha256 in ids]
    if kept:
        by_heart = config.augment.enabled and config.train.mode != "linear"
        draw = (config.augment, config.seed, config.train.epochs) if by_heart else None
        paths = [splits.path(row) for row in kept]
        inputs, answers = read_rows(model, paths, config, draw, description="rows to remember")
        found.add([row.sha256 for row in kept], _strata(kept), _columns(kept, splits, inputs, answers, features))
    return found


def _columns(
    rows: Sequence[Row],
    splits: Splits,
    inputs: Sequence[NDArray[np.float32]],
    answers_b: NDArray[np.int64],
    features: str,
) -> dict[str, NDArray[Any]]:
    labels, _ = labels_of(rows, splits, "owner")
    a, b = inputs
    return {"a": a, "b": b, "answer_b": answers_b, "label": labels, "features": np.full(len(rows), features)}


def _strata(rows: Sequence[Row]) -> list[str]:
    return [f"{row.source}/{row.label}" for row in rows]


def _features_of(model: Stage1Model) -> str:
    """Hash of all that a reservoir remembers of: features and Stage B's answers; Stage A's own heads apart."""
    own = ("heads.classifier", "heads.gate")
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(own)}
    return fingerprint(model.architecture, state)


def _none(found: Proposal) -> str:
    near = [step.select_reward for step in found.steps if step.within_budget]
    got = f"{max(near):.4f} as the best of {len(near)} steps" if near else "no step within it"
    return (
        f"the reward on val_select must rise above {found.champion_reward:.4f} within the anchor's budget, got {got} "
        f"(KL {', '.join(f'{step.anchor_kl:.3g}' for step in found.steps)}); nothing was written"
    )
