"""What a simulation is asked for and what it found: records, and their text. No NumPy here."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stage1_pro.command import Flag
from stage1_pro.record import Record
from stage1_pro.words import ProtocolName

LEAST_PER_DAY = 8


class SimulationConfig(Record):
    """What is simulated."""

    days: int = Field(30, ge=2, description="how many days pass")
    past_share: float = Field(0.3, gt=0, lt=1, description="of the photos, that the first champion learns from")
    per_day: int = Field(260, ge=0, description="photos served a day; 0: as many as let none come twice")
    shift_day: int = Field(5, ge=1, description="from this day on, counted from 0, photos are changed")
    protocol: ProtocolName = Field("letterbox224", description="what the validator does to changed photos")
    level: int = Field(3, ge=0, le=3, description="of the protocol")
    alpha: float = Field(0.05, gt=0, lt=1, description="risk of exits that is promised")
    min_coverage: float = Field(0.2, gt=0, lt=1, description="least share of exits that a certificate must allow")
    audit_rate: float = Field(0.8, ge=0.02, le=1, description="chance with which any photo is reviewed")
    budget: int = Field(260, ge=1, description="answers a day that reviewers have time for")
    delay_days: Annotated[float, Flag("--delay")] = Field(
        2.0, ge=0, description="between a photo and its label, on average"
    )
    looks_per_day: int = Field(4, ge=1, description="how often the loop takes its steps")
    min_labels: int = Field(3000, ge=1, description="new labels that are worth a training without any alarm")
    judged: int = Field(500, ge=10, description="photos that are never served and judge promotions afterwards")
    least_certify: int = Field(800, ge=2, description="fewest labels since the last alarm to certify a candidate on")
    epochs: int = Field(0, ge=0, description="of the first champion's training; 0: 30 of a network, 200 of heads")
    seed: int = Field(0, ge=0, description="of all that is drawn")

    @model_validator(mode="after")
    def _shift_within(self) -> Self:
        if self.shift_day >= self.days:
            raise ValueError(f"shift_day must be before the last day, got {self.shift_day} of {self.days}")
        if 0 < self.per_day < LEAST_PER_DAY:
            raise ValueError(f"per_day must be {LEAST_PER_DAY} or more, or 0, got {self.per_day}")
        return self


class Day(Record):
    """One day as it was, by labels of all photos and not of reviewed ones alone."""

    day: int
    shifted: bool
    served: int
    exits: int
    wrong_exits: int
    wrong: int = Field(description="of all that was answered, by Stage A or B")
    static_exits: int = Field(description="the first champion at its own threshold on the same photos")
    static_wrong_exits: int
    answered: int = Field(description="reviews that came in")
    waiting: int = Field(description="reviews that wait for time or budget at the day's end")
    threshold: float = Field(description="in force at the day's end; above 1: nobody exits")
    certified: float
    champion: str


class RoundResult(Record):
    """One round: why, how it went, and what a promotion was worth on photos that nobody had seen."""

    number: int
    began: float = Field(description="day")
    reasons: list[str]
    outcome: Literal["promoted", "held", "rolled back", "open"]
    ended: float | None = Field(description="day; null while it is open")
    note: str
    candidate: str | None
    verdict: str | None = Field(description="fingerprint of verdict.json")
    gate: bool | None = Field(description="what the verdict said; null where it did not come to one")
    gain: float | None = Field(
        None, description="mean reward over the champion before it, on judged photos of that day's world; as the gate "
        "compares, each at the threshold of its certificate"
    )  # fmt: skip
    gain_as_served: float | None = Field(None, description="the same, the old one at the threshold then in force")


class Alarm(Record):
    """A step that first saw an alarm of the risk, and what the threshold did in it."""

    day: float
    at: float = Field(description="when the label became known that set it off; seconds since the epoch")
    before: float
    after: float


class Check(Record):
    """Something that was to be shown; passed or not, with its figure."""

    name: str
    passed: bool
    value: float | None
    limit: float | None
    note: str


class Simulation(Record):
    """``simulation.json``: every figure of one simulated stretch; nothing in it depends on clocks or databases."""

    format_version: Literal[1] = 1
    config: SimulationConfig
    real: list[str]
    simulated: list[str]
    limits: list[str]
    past: dict[str, int] = Field(description="photos by split of the first champion's run")
    stream: int = Field(description="photos that the stream is made of")
    first_champion: str
    days: list[Day]
    alarms: list[Alarm]
    rounds: list[RoundResult]
    checks: list[Check]
    audit_rows: int
    audit_whole: bool

    def render(self) -> str:
        """Lines for people."""
        photos, config = sum(one.served for one in self.days), self.config
        lines = [f"{len(self.days)} days, {photos} photos, shift on day {config.shift_day}, alpha {config.alpha:g}"]
        lines += [f"  alarm on day {one.day:g}: threshold {one.before:.4f} -> {one.after:.4f}" for one in self.alarms]
        for one in self.rounds:
            gain = "" if one.gain is None else f"; gain {one.gain:+.3f}"
            served = "" if one.gain_as_served is None else f", {one.gain_as_served:+.3f} over the tightened one"
            ended = "" if one.ended is None else f" on day {one.ended:g}"
            said = f"{', '.join(one.reasons)}: {one.outcome}{ended} ({one.note}){gain}{served}"
            lines.append(f"  round {one.number}, day {one.began:g}, {said}")
        for check in self.checks:
            value = "" if check.value is None else f" {check.value:.4g}"
            limit = "" if check.limit is None else f" (limit {check.limit:.4g})"
            lines.append(f"{'ok  ' if check.passed else 'FAIL'} {check.name}:{value}{limit} {check.note}")
        lines.append(f"audit: {self.audit_rows} rows, {'whole' if self.audit_whole else 'BROKEN'}")
        return "\n".join(lines)
