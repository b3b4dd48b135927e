"""What a run answers to predictions, and the rows that need a look: the wrong, the changed, and each group."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stage1_pro.classes import index_of
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits
from stage1_pro.errors import ArtifactError
from stage1_pro.metrics.answers import STAGES, Answered, Answers, Stage
from stage1_pro.policies.policy import Policy, read_policy
from stage1_pro.policies.softmax import confidence, softmax

# Columns of the lists, by the name of their file.
COLUMNS = {
    "predictions": ["id", "file", "label", "answer", "stage", "group", "source", "split"],
    "mistakes": ["file", "label", "predicted", "probability", "confidence", "stage", "group", "source", "id"],
    "changes": [
        "file", "label", "effect", "stage_a", "confidence_a", "stage_b", "confidence_b", "group", "source", "id",
    ],
    "groups": [
        "group", "source", "rows", "errors", "exits", "missed_positives", "abstained", "ambiguous", "missed_sets",
    ],
}  # fmt: skip


def answer(predictions: Predictions, policy: Policy | None) -> Answered:
    """Give both stages' answers and, under a policy, the cascade's: Stage A's where it exits, else Stage B's.

    Raises:
        ArtifactError: the policy is of another model, preprocessing or other classes, or a logit is NaN.
    """
    if policy is not None:
        _check_policy(predictions, policy)
    positive = index_of(predictions.classes, predictions.positive)
    probs = {"stage_a": softmax(predictions.logits_a), "stage_b": softmax(predictions.logits_b)}
    for stage, values in probs.items():
        broken = np.flatnonzero(np.isnan(values).any(axis=1))
        if broken.size:
            name, row = stage[-1].upper(), predictions.row_ids[broken[0]]
            raise ArtifactError(
                f"logits of Stage {name} must be finite, got NaN or infinity for row {row}; train again"
            )
    exits = {"stage_a": np.ones(predictions.labels.size, dtype=bool)}
    if policy is not None:
        exits["cascade"] = policy.exits(probs["stage_a"], predictions.gate_logits)
        probs["cascade"] = np.where(exits["cascade"][:, None], probs["stage_a"], probs["stage_b"])
    found: dict[Stage, Answers] = {}
    for stage in STAGES:
        if stage in probs:
            given = probs[stage].argmax(axis=1)
            found[stage] = Answers(
                probs=probs[stage],
                prediction=given,
                probability=None if positive is None else probs[stage][:, positive],
                confidence=confidence(probs[stage]),
                error=given != predictions.labels,
                exited=exits.get(stage, np.zeros(given.size, dtype=bool)),
            )
    return found


def _check_policy(predictions: Predictions, policy: Policy) -> None:
    """A policy speaks of the logits it was calibrated on, and of no others."""
    for name in ("model_fingerprint", "preprocessing_fingerprint"):
        promised, found = getattr(policy, name), getattr(predictions, name)
        what = name.replace("_fingerprint", "")
        if promised is None and policy.guarantee != "none":
            raise ArtifactError(
                f"a policy that promises something must say of which {what} it is, got none: what it promises is of "
                "somebody's logits; run `stage1 calibrate --run RUN`"
            )
        if promised is not None and promised != found:
            raise ArtifactError(
                f"the policy must be of this {what}, got one calibrated on {promised[:12]} instead of {found[:12]}"
                f"{policy.void()}; run `stage1 calibrate` again"
            )
    if policy.classes != predictions.classes or policy.positive != predictions.positive:
        raise ArtifactError(
            f"the policy must be of the classes {predictions.classes} with positive class {predictions.positive!r}, "
            f"got {policy.classes} with {policy.positive!r}; run `stage1 calibrate` again"
        )


def policy_of(run: Path, splits: Splits) -> Policy | None:
    """The active policy of a run, if any; raise ArtifactError when it was calibrated on other splits."""
    policy = read_policy(run)
    if policy is not None:
        other = [name for name, digest in policy.split_hashes.items() if splits.hashes.get(name) != digest]
        if other:
            raise ArtifactError(
                f"the policy in {run} must be of these splits, got one calibrated on another {', '.join(sorted(other))}"
                f"{policy.void()}; run `stage1 calibrate --run {run}` again"
            )
    return policy


def find_mistakes(predictions: Predictions, answers: Answered, files: list[str]) -> list[dict[str, object]]:
    """Give the wrong answers of what would be deployed, the most confident first, for relabelling.

    That is the cascade, or Stage A while there is no policy. ``probability`` is the positive class's, if there is one,
    ``confidence`` the given answer's.
    """
    deployed = answers.get("cascade", answers["stage_a"])
    wrong = np.flatnonzero(deployed.error)
    ordered = wrong[np.lexsort((wrong, -deployed.confidence[wrong]))]
    return [
        {
            **_facts(predictions, files, i),
            "predicted": predictions.classes[deployed.prediction[i]],
            "probability": None if deployed.probability is None else float(deployed.probability[i]),
            "confidence": float(deployed.confidence[i]),
            "stage": "stage_a" if deployed.exited[i] else "stage_b",
        }
        for i in ordered.tolist()
    ]


def list_answers(
    predictions: Predictions, answers: Answered, files: list[str], of_class: Sequence[str]
) -> list[dict[str, object]]:
    """Give a row a photo, in file order: its label, the answer of what would be deployed, and its probabilities.

    ``of_class`` are the columns of the classes' probabilities [K].
    """
    deployed = answers.get("cascade", answers["stage_a"])
    return [
        {
            **_facts(predictions, files, i),
            "answer": predictions.classes[deployed.prediction[i]],
            "stage": "stage_a" if deployed.exited[i] else "stage_b",
            "split": predictions.split,
            **dict(zip(of_class, deployed.probs[i].tolist(), strict=True)),
        }
        for i in range(predictions.labels.size)
    ]


def find_changes(predictions: Predictions, answers: Answered, files: list[str]) -> list[dict[str, object]]:
    """Give the deferred rows on which Stage B breaks what was right, then those it fixes, its surest answers first.

    ``effect`` is ``broken`` or ``fixed``; confidences are of each stage's own answer. Empty without a policy.
    """
    if "cascade" not in answers:
        return []
    a, b = answers["stage_a"], answers["stage_b"]
    changed = np.flatnonzero(~answers["cascade"].exited & (a.error != b.error))
    order = changed[np.lexsort((changed, -b.confidence[changed], a.error[changed]))]
    return [
        {
            **_facts(predictions, files, i),
            "effect": "fixed" if a.error[i] else "broken",
            "stage_a": predictions.classes[a.prediction[i]],
            "confidence_a": float(a.confidence[i]),
            "stage_b": predictions.classes[b.prediction[i]],
            "confidence_b": float(b.confidence[i]),
        }
        for i in order.tolist()
    ]


def _facts(predictions: Predictions, files: list[str], i: int) -> dict[str, object]:
    """What the lists of rows to look at have in common."""
    return {
        "file": files[i],
        "label": predictions.classes[predictions.labels[i]],
        "group": str(predictions.groups[i]),
        "source": str(predictions.sources[i]),
        "id": str(predictions.row_ids[i]),
    }


def count_groups(predictions: Predictions, answers: Answered, policy: Policy | None = None) -> list[dict[str, object]]:
    """Give a row a group with what went wrong in it, the most errors first.

    ``errors`` are of what would be deployed (the cascade, or Stage A while there is no policy); ``missed_positives``
    are positives that exited under another name; without a policy nothing exits and both counts are null, the latter
    also where no class is the positive one.
    Under scrc also rows that nobody answers, accepted ones with several classes, and accepted ones whose set lacks the
    label.
    """
    deployed, exits = answers.get("cascade", answers["stage_a"]), "cascade" in answers
    positive = index_of(predictions.classes, predictions.positive)
    missed = deployed.exited & (predictions.labels == positive) & (answers["stage_a"].prediction != positive)
    unknown = {
        *([] if exits else ["exits", "missed_positives"]),
        *([] if positive is not None else ["missed_positives"]),
    }
    names, first, member = np.unique(predictions.groups, return_index=True, return_inverse=True)
    counts = {
        "rows": np.bincount(member),
        "errors": np.bincount(member, deployed.error),
        "exits": np.bincount(member, deployed.exited),
        "missed_positives": np.bincount(member, missed),
    }
    if policy is not None and policy.abstains:
        given, accepted = policy.answer(deployed.probs, deployed.exited, predictions.gate_logits)
        holds = given[np.arange(given.shape[0]), predictions.labels]
        counts["abstained"] = np.bincount(member, ~accepted)
        counts["ambiguous"] = np.bincount(member, accepted & (given.sum(axis=1) > 1))
        counts["missed_sets"] = np.bincount(member, accepted & ~holds)
    order = np.lexsort((names, -counts["rows"], -counts["missed_positives"], -counts["errors"]))
    return [
        {
            "group": str(names[i]),
            "source": str(predictions.sources[first[i]]),
            **{name: None if name in unknown else int(count[i]) for name, count in counts.items()},
        }
        for i in order.tolist()
    ]
