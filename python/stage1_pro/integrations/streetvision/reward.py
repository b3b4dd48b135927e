"""What StreetVision would pay: its reward simulated, and the threshold and abstain band that earn most.

The reward of a round is ``(0.5 * max(0, MCC of the last 100 rounds) + 0.5 * accuracy of the last 10 rounds) ** 3``; an
answer of -1 is paid 0 for its round and leaves both metrics. Scores are moving averages of rewards (weight .05 for the
newest). What that leaves open is settled so, as the subnet's public tracker has it: windows count rounds, abstained
ones among them, so that who abstains is measured on fewer answers; MCC is 0 while the answers know one label alone;
with no answer in the last 10 rounds accuracy is 0. Rounds are independent, and a positive photo comes with probability
``prior``.

In the steady state the moving average has the mean of the rewards, whatever its weight; the weight decides how far it
strays, so that spread is simulated and the mean is taken of the rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.signal import lfilter
from scipy.special import expit, logit

from stage1_pro.continual.learn.rewards import mcc_reward
from stage1_pro.errors import InputError
from stage1_pro.record import Record

MCC_WINDOW = 100
ACCURACY_WINDOW = 10
POWER = 3
EMA_WEIGHT = 0.05

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rates:
    """How often a miner is right and does not answer, for [negative, positive] photos; the rest is wrong."""

    right: tuple[float, float]
    abstained: tuple[float, float]


@dataclass(frozen=True)
class Reward:
    """``mean`` reward of a round in the steady state, its standard ``error`` of simulation, ``spread`` of the score.

    ``spread`` is the standard deviation of the moving average: how far a score strays from its mean by luck.
    """

    mean: float
    error: float
    spread: float


class Simulator:
    """Many miners side by side through the same rounds; every question is asked of the same draws.

    Two settings compared on one simulator differ by what they are, hardly by luck.

    Args:
        prior: chance that a photo is positive, in (0, 1).
        miners: chains of rounds, at least 2.
        rounds: rounds of each that are paid, after 100 to fill the windows.
        seed: of photos and luck.
    """

    def __init__(self, prior: float = 0.5, *, miners: int = 64, rounds: int = 500, seed: int = 0) -> None:
        if not 0 < prior < 1:
            raise InputError(f"prior must be in (0, 1), got {prior}")
        if miners < 2 or rounds < 1:
            raise InputError(f"miners must be at least 2 and rounds at least 1, got {miners} and {rounds}")
        rng = np.random.default_rng(seed)
        shape = (miners, MCC_WINDOW + rounds)
        self._positive = rng.random(shape) < prior
        self._luck = rng.random(shape)

    def run(self, rates: Rates) -> Reward:
        """The steady state of a miner that is right and abstains so often."""
        place = self._positive.astype(np.intp)
        right_share, abstained_share = np.asarray(rates.right)[place], np.asarray(rates.abstained)[place]
        right = self._luck < right_share
        abstained = ~right & (self._luck < right_share + abstained_share)
        wrong = ~right & ~abstained
        paid = np.where(abstained[:, MCC_WINDOW:], 0.0, _rewards(right, wrong, self._positive))
        means = paid.mean(axis=1)
        score = lfilter([EMA_WEIGHT], [1, EMA_WEIGHT - 1], paid - means.mean(), axis=1)[:, -1]
        return Reward(float(means.mean()), float(means.std(ddof=1) / np.sqrt(means.size)), float(score.std(ddof=1)))


def _rewards(right: NDArray[np.bool_], wrong: NDArray[np.bool_], positive: NDArray[np.bool_]) -> Floats:
    """Rewards [miners, rounds] of answered rounds, from outcomes [miners, 100 + rounds]."""

    def last(n: int, among: NDArray[np.bool_]) -> Floats:
        # Every paid round with itself as the newest of its window.
        counts = np.cumsum(among, axis=1, dtype=np.float64)
        counts = np.concatenate([np.zeros((len(counts), 1)), counts], axis=1)
        return counts[:, MCC_WINDOW + 1 :] - counts[:, MCC_WINDOW + 1 - n : counts.shape[1] - n]

    tp, tn, fp, fn = (
        last(MCC_WINDOW, part) for part in (right & positive, right & ~positive, wrong & ~positive, wrong & positive)
    )
    correct, answered = last(ACCURACY_WINDOW, right), last(ACCURACY_WINDOW, right | wrong)
    accuracy = np.divide(correct, answered, out=np.zeros_like(answered), where=answered > 0)
    rewards: Floats = (0.5 * np.maximum(mcc_reward(tp, fp, fn, tn), 0) + 0.5 * accuracy) ** POWER
    return rewards


# --------------------------------------------------------------------------------------------
# Settings


class Setting(Record):
    """When a miner says what: ``threshold`` on P(positive), and the confidence from which on it answers.

    P(positive) is shifted on the logit scale so that the threshold lands on .5, to r; above .5 the answer is positive.
    ``answer_above`` is compared with max(r, 1 - r); .5 answers everything. ``on_abstain`` says whether -1 is given at
    all, also where the bundle's own policy does not accept an image.
    """

    threshold: float = Field(gt=0, lt=1, description="on P(positive) at the serving prior")
    answer_above: float = Field(ge=0.5, lt=1)
    on_abstain: Literal["answer", "minus_one"]


def _answers_all(threshold: float) -> Setting:
    """The setting that answers everything at a threshold."""
    return Setting(threshold=threshold, answer_above=0.5, on_abstain="answer")


PLAIN = _answers_all(0.5)


def shifted(probs: ArrayLike, threshold: float, shift: float = 0.0) -> Floats:
    """P(positive) [N] with its logit moved by ``shift``, and then so that ``threshold`` lands on .5; NaN stays NaN."""
    values: Floats = expit(logit(np.asarray(probs, dtype=np.float64)) + shift - logit(threshold))
    return values


def prior_shift(train_prior: float, serve_prior: float) -> float:
    """What a change of the share of positives adds to logits; 4:1 to 1:1 is -1.39."""
    return float(logit(serve_prior) - logit(train_prior))


def outcomes(probs: ArrayLike, positive: ArrayLike, accepted: ArrayLike, setting: Setting) -> NDArray[np.int8]:
    """What a setting does on rows [N]: 1 right, 0 no answer, -1 wrong.

    Args:
        probs: [N] P(positive) at the serving prior; NaN is never answered.
        positive: bool [N].
        accepted: bool [N]: the bundle's policy accepts the image.
        setting: to be tried.
    """
    r = shifted(probs, setting.threshold)
    known = ~np.isnan(r)
    if setting.on_abstain == "minus_one":
        known &= np.asarray(accepted, dtype=bool) & (np.fmax(r, 1 - r) >= setting.answer_above)
    right = (r > 0.5) == np.asarray(positive, dtype=bool)
    return np.where(known, np.where(right, 1, -1), 0).astype(np.int8)


def rates_of(outcome: NDArray[np.int8], positive: NDArray[np.bool_], weights: NDArray[Any] | None = None) -> Rates:
    """Rates by label from outcomes [N], every row ``weights`` [N] times; each label must have a row."""
    times = np.ones(outcome.size) if weights is None else weights

    def share(code: int, label: bool) -> float:
        among = positive == label
        return float(times[among & (outcome == code)].sum() / times[among].sum())

    return Rates((share(1, False), share(1, True)), (share(0, False), share(0, True)))


def best_setting(
    probs: Floats,
    positive: NDArray[np.bool_],
    accepted: NDArray[np.bool_],
    simulator: Simulator,
    *,
    thresholds: Sequence[float],
    bands: Sequence[float],
) -> Setting:
    """The setting with the largest simulated reward on these rows; the plainest one on ties."""

    def worth(setting: Setting) -> float:
        return simulator.run(rates_of(outcomes(probs, positive, accepted, setting), positive)).mean

    plain = [PLAIN, *map(_answers_all, thresholds)]
    banded = [
        Setting(threshold=one.threshold, answer_above=band, on_abstain="minus_one") for one in plain for band in bands
    ]
    return max([*plain, *banded], key=worth)
