"""streetvision tune: which threshold and abstain band StreetVision's reward pays best, on held-out rows. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import expit, logit

from stage1_pro.classes import known_as, need_positive
from stage1_pro.data.images import ImageError
from stage1_pro.data.labels import read_list
from stage1_pro.data.photos import Folder, Photo
from stage1_pro.data.splits import Splits
from stage1_pro.deploy.bundle import MANIFEST
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.errors import InputError, nearest, printable
from stage1_pro.files import write_text
from stage1_pro.integrations.streetvision.answering import Settings
from stage1_pro.integrations.streetvision.reward import (
    PLAIN,
    Rates,
    Setting,
    Simulator,
    best_setting,
    outcomes,
    prior_shift,
    rates_of,
    shifted,
)
from stage1_pro.policies.platt import fit_platt
from stage1_pro.progress import say, track
from stage1_pro.record import Record, parse_yaml
from stage1_pro.training.answers import answer, policy_of
from stage1_pro.training.calibration import read_calibration, read_order

if TYPE_CHECKING:
    from stage1_pro.commands.streetvision import Tune


class SimulatedReward(Record):
    """Steady state of StreetVision's reward under one setting, simulated on held-out rows."""

    setting: Setting
    mean: float = Field(description="of a round's reward, in [0, 1]; also of the score, its moving average")
    low: float = Field(description="over resamples of groups")
    high: float
    simulation_error: float = Field(description="standard error of the mean by the number of simulated rounds")
    spread: float = Field(description="standard deviation of the score by luck alone")
    answered: float = Field(description="share of rounds")
    accuracy: float | None = Field(description="of what is answered, at the serving prior; null: nothing is")


class MinerTuning(Record):
    """``streetvision.json``: which threshold and abstain band would earn most, and whether that is shown."""

    format_version: Literal[1] = 1
    source: str
    rows: str = Field(description="which rows: val_select (or val_calib.fit) of a run, or a file of labelled photos")
    n_rows: int
    n_groups: int
    n_positives: int
    model_fingerprint: str
    train_prior: float
    serve_prior: float
    plain: SimulatedReward = Field(description="threshold .5, everything answered")
    tuned: SimulatedReward = Field(description="the best setting of all rows; chosen on them, so flattered by them")
    gain: float = Field(description="mean reward minus the plain one's, on groups that the choice had not seen")
    gain_low: float
    gain_high: float
    chosen: Literal["plain", "tuned"]
    reason: str
    level: float = Field(gt=0, lt=1)
    folds: int
    n_replicates: int
    seed: int


RECORD = "streetvision.json"
BANDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99)
FOLDS = 5
LEVEL = 0.95


@dataclass(frozen=True)
class _HeldOut:
    """Rows that trained nothing: raw P(positive) [N], bool ``positive`` and ``accepted`` [N], ``groups`` [N] str."""

    probs: NDArray[np.float64]
    positive: NDArray[np.bool_]
    accepted: NDArray[np.bool_]
    groups: NDArray[np.str_]
    name: str
    model_fingerprint: str
    train_prior: float

    def part(self, rows: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
        return self.probs[rows], self.positive[rows], self.accepted[rows]


def tune(asked: Tune) -> MinerTuning:
    """Pick threshold and abstain band by the simulated steady state of the reward; keep the plain ones unless it shows.

    Rows are those of a run's ``val_select`` (its exit policy has seen them; ``val_calib`` keeps its one claim, and
    ``val_test`` is never read), or labelled photos that trained nothing, answered by a bundle. The threshold is .5
    or where Platt scaling of these rows puts even odds; it and the band are chosen by the simulated reward. Labels
    decide what was right, so probabilities that are too sure of themselves win nothing. The gain is measured on
    groups that the choice had not seen (five folds), its interval by resampling groups; the tuned setting is chosen
    when that interval lies above 0.

    Raises:
        InputError: an option out of range, rows of one label alone, or too few groups.
        ArtifactError: the run is not calibrated, or its parts are of different trainings.
    """
    for name, value in (("train_prior", asked.train_prior), ("serve_prior", asked.serve_prior)):
        if value is not None and not 0 < value < 1:
            raise InputError(f"{name} must be in (0, 1), got {value}")
    if asked.n_replicates < 20:
        raise InputError(f"n_replicates must be at least 20, got {asked.n_replicates}; 300 is usual")
    if asked.run is not None:
        if asked.labels is not None:
            raise InputError("labels must stand beside a bundle, got a run, which has rows of its own")
        source, rows, out = asked.run, _of_run(asked.run), asked.out or asked.run / RECORD
    else:
        if asked.bundle is None or asked.labels is None or asked.out is None:
            raise InputError("a bundle must come with labels and out, got one missing: it holds no rows of its own")
        source, rows, out = asked.bundle, _of_bundle(asked.bundle, asked.labels, asked.columns), asked.out
    record = _search(rows, str(source), asked)
    record.write(out)
    say(f"wrote {out}")
    if asked.settings is not None:
        write_text(asked.settings, yaml_of(record))
        say(f"wrote {asked.settings}")
    served = Path(parse_yaml(yaml_of(record))["bundle"])
    if not (served / MANIFEST).is_file():
        say(f"the YAML's bundle {served} is not there yet: stage1 export --run {record.source}")
    return record


def _of_run(run: Path) -> _HeldOut:
    if not run.is_dir():
        raise InputError(f"run must be a run folder, got {run}")
    splits = Splits.read(run / "splits.json")
    positive = need_positive(splits.positive, "a run for StreetVision")
    policy = policy_of(run, splits)
    if policy is None:
        raise InputError(f"run must be calibrated, got {run}; run `stage1 calibrate --run {run}` first")
    calibration = read_calibration(run)
    predictions = read_order(run, calibration, splits) or calibration
    cascade = answer(predictions, policy)["cascade"]
    _, accepted = policy.answer(cascade.probs, cascade.exited, predictions.gate_logits)
    fit = predictions.halves == ("" if predictions is not calibration else "fit")
    at = predictions.classes.index(positive)
    return _HeldOut(
        probs=cascade.probs[fit, at],
        positive=(predictions.labels == at)[fit],
        accepted=accepted[fit],
        groups=predictions.groups[fit],
        name=predictions.split if predictions is not calibration else "val_calib.fit",
        model_fingerprint=predictions.model_fingerprint,
        train_prior=_share(splits.counts["train"], positive),
    )


def _of_bundle(folder: Path, labels: Path, columns: Mapping[str, str] | None) -> _HeldOut:
    cascade = Cascade.load(folder)
    bundle, listed = cascade.bundle, read_list(labels, columns)
    positive = need_positive(bundle.positive, "a bundle for StreetVision")
    names = []
    for row in listed:
        name = row.get("label_name") or row.get("label", "")
        found = known_as(name, bundle.classes)
        if found is None:
            known = ", ".join(bundle.classes)
            got = f"'{printable(name)}'{nearest(name, bundle.classes)}"
            raise InputError(f"label in {labels} must be one of {known}, got {got}")
        names.append(found)
    parts, beside = [], Folder(str(labels.parent))
    for row in track(listed, "held-out photos"):
        try:
            parts.append(cascade.decide(cascade.pixels(Photo(beside, row["file"]))[None]))
        except ImageError as error:
            raise InputError(f"{error}; leave its row out of {labels}") from None
    return _HeldOut(
        probs=np.concatenate([part.prob for part in parts]),
        positive=np.asarray(names) == positive,
        accepted=np.concatenate([part.accepted for part in parts]),
        groups=np.asarray([row.get("group") or f"row {i}" for i, row in enumerate(listed)]),
        name=str(labels),
        model_fingerprint=bundle.manifest.provenance.model_fingerprint,  # type: ignore[union-attr]  # loaded above
        train_prior=_share(bundle.splits.counts["train"], positive),  # type: ignore[union-attr]
    )


def _share(counts: Mapping[str, int], positive: str) -> float:
    return counts[positive] / sum(counts.values())


def _search(raw: _HeldOut, source: str, asked: Tune) -> MinerTuning:
    train_prior, serve_prior, seed = asked.train_prior or raw.train_prior, asked.serve_prior, asked.seed
    rows = replace(raw, probs=shifted(raw.probs, 0.5, prior_shift(train_prior, serve_prior)))
    groups, member = np.unique(rows.groups, return_inverse=True)
    if not 0 < rows.positive.sum() < rows.positive.size:
        raise InputError(
            f"held-out rows must have both labels, got {rows.positive.sum()} of {rows.positive.size} positive"
        )
    simulator = Simulator(serve_prior, seed=seed)
    rng = np.random.default_rng(seed)

    def best(part: NDArray[np.bool_]) -> Setting:
        threshold = _even_threshold(rows.probs[part], rows.positive[part], serve_prior)
        return best_setting(*rows.part(part), simulator, thresholds=[threshold], bands=BANDS)

    fold = rng.permutation(len(groups))[member] % FOLDS
    unseen = np.zeros(rows.probs.size, dtype=np.int8)
    for k in range(FOLDS):
        inside, rest = fold == k, fold != k
        if len(groups) < FOLDS or not 0 < rows.positive[rest].sum() < rest.sum():
            raise InputError(
                f"held-out rows must have both labels in every four of {FOLDS} folds of groups, got {len(groups)} "
                "groups; label more photos"
            )
        unseen[inside] = outcomes(*rows.part(inside), best(rest))
    everything = np.ones(rows.probs.size, dtype=bool)
    plain, tuned = PLAIN, best(everything)
    found = [outcomes(*rows.part(everything), one) for one in (plain, tuned)]

    rewards: list[list[float]] = []
    for _ in range(asked.n_replicates):
        weights = rng.multinomial(len(groups), np.full(len(groups), 1 / len(groups)))[member]
        if weights[rows.positive].any() and weights[~rows.positive].any():
            rewards.append([simulator.run(rates_of(one, rows.positive, weights)).mean for one in (*found, unseen)])
    drawn = np.asarray(rewards)
    if len(drawn) < asked.n_replicates // 2:
        raise InputError(f"held-out rows must have both labels in more than a few groups, got {len(groups)} groups")
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.column_stack([drawn, drawn[:, 2] - drawn[:, 0]]), [tail, 1 - tail], axis=0).tolist()
    first, second = (
        _reward(simulator, rates_of(outcome, rows.positive), setting, serve_prior, low[i], high[i])
        for i, (outcome, setting) in enumerate(zip(found, (plain, tuned), strict=True))
    )
    gain = simulator.run(rates_of(unseen, rows.positive)).mean - first.mean
    shown = tuned != plain and low[3] > 0
    earns = f"on groups that the choice had not seen the tuned setting earns {gain:+.4f}"
    doubt = "" if shown else ": not shown to be more than chance, so everything is answered above .5"
    return MinerTuning(
        source=source, rows=rows.name, n_rows=rows.probs.size, n_groups=len(groups),
        n_positives=int(rows.positive.sum()), model_fingerprint=rows.model_fingerprint, train_prior=train_prior,
        serve_prior=serve_prior, plain=first, tuned=second, gain=gain, gain_low=low[3], gain_high=high[3],
        chosen="tuned" if shown else "plain", reason=f"{earns} [{low[3]:+.4f}, {high[3]:+.4f}]{doubt}", level=LEVEL,
        folds=FOLDS, n_replicates=len(drawn), seed=seed,
    )  # fmt: skip


def _even_threshold(probs: NDArray[np.float64], positive: NDArray[np.bool_], prior: float) -> float:
    """Where Platt's scaling of these rows says that positive is as likely as negative, at another share of positives.

    Two fitted numbers: a threshold searched for by the reward would follow the luck of a few rows.
    """
    with np.errstate(divide="ignore"):
        platt = fit_platt(logit(probs), positive)
    if not platt.fitted:
        return 0.5
    even = -(platt.b + prior_shift(float(positive.mean()), prior)) / platt.a
    # A thousandth is enough, and keeps the YAML readable.
    return float(np.clip(np.round(expit(even), 3), 0.001, 0.999))


def _reward(
    simulator: Simulator, rates: Rates, setting: Setting, prior: float, low: float, high: float
) -> SimulatedReward:
    reward = simulator.run(rates)
    shares = np.asarray([1 - prior, prior])
    answered = float(shares @ (1 - np.asarray(rates.abstained)))
    accuracy = float(shares @ np.asarray(rates.right)) / answered if answered > 0 else None
    return SimulatedReward(
        setting=setting, mean=reward.mean, low=low, high=high, simulation_error=reward.error, spread=reward.spread,
        answered=answered, accuracy=accuracy,
    )  # fmt: skip


def yaml_of(record: MinerTuning) -> str:
    """The YAML of a miner with the chosen setting."""
    folder = Path(record.source).resolve()
    setting = (record.tuned if record.chosen == "tuned" else record.plain).setting
    values: dict[str, Any] = {
        "bundle": str(folder / "bundle" if record.rows in ("val_select", "val_calib.fit") else folder),
        "runtime": "auto",
        "timeout_s": Settings.model_fields["timeout_s"].default,
        "train_prior": round(record.train_prior, 6),
        "serve_prior": record.serve_prior,
        **setting.model_dump(),
    }
    return yaml.safe_dump(values, sort_keys=False)


def render(record: MinerTuning) -> str:
    """Show both settings, what decided between them, and the YAML to use."""
    lines = [
        f"{record.rows}: {record.n_rows} rows, {record.n_groups} groups, {record.n_positives} positive",
        f"share of positives: {record.train_prior:.3f} in training, {record.serve_prior:g} asked",
        f"{'setting':<8}{'threshold':>10}{'above':>8}{'answered':>10}{'accuracy':>10}{'reward':>9}  by group",
    ]
    for name, one in (("plain", record.plain), ("tuned", record.tuned)):
        accuracy = "-" if one.accuracy is None else f"{one.accuracy:.4f}"
        lines.append(
            f"{name:<8}{one.setting.threshold:>10.3f}{one.setting.answer_above:>8.3f}{one.answered:>10.3f}{accuracy:>10}"
            f"{one.mean:>9.4f}  [{one.low:.4f}, {one.high:.4f}]"
        )
    lines += [
        f"chosen: {record.chosen}; {record.reason}",
        f"a score strays from its mean by luck alone: standard deviation {record.plain.spread:.3f}",
        "simulated; the subnet's forward pass was halted in May 2026, and nothing here promises earnings",
        "",
        yaml_of(record).rstrip(),
    ]
    return "\n".join(lines)
