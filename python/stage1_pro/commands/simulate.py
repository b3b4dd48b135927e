"""``stage1 continual simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, model_validator

from stage1_pro.command import Command, Count, Flag, Place, Result, keywords, option
from stage1_pro.record import Record
from stage1_pro.words import ProtocolName

if TYPE_CHECKING:
    from stage1_pro.studies.simulation import Simulation

LEAST_PER_DAY = 8
QUICK: dict[str, Any] = {"days": 6, "per_day": 120, "shift_day": 2, "min_labels": 150, "least_certify": 100}


class SimulationConfig(Record):
    """What is simulated."""

    days: int = Field(30, ge=2, description="how many days pass")
    past_share: float = Field(0.3, gt=0, lt=1, description="of the photos, that the first champion learns from")
    per_day: int = Field(260, ge=0, description="photos served a day; 0: as many as let none come twice")
    shift_day: int = Field(5, ge=1, description="from this day on, counted from 0, photos are changed")
    protocol: ProtocolName = option("letterbox224", "what the validator does to changed photos")
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


class Simulate(SimulationConfig, Command, topic="loop"):
    """Let the loop live through days of your photos on a simulated clock."""

    data: Path = option(..., "folder with labels.csv, a CSV, or a folder per class")
    out: Path = option(..., "new folder for simulation.json, figures, run and loop")
    run: Path | None = option(None, "OUT/run of an earlier simulation of these photos and seed; not trained")
    positive: str | None = option(None, "name of the positive class, where it cannot be found")
    backbone: Place = option("tiny", "tiny: learns from nothing; a folder: frozen under new heads")
    image_size: Count | None = option(None, "side that the model sees; the backbone's own by default")
    store: Place | None = option(None, "postgresql://… of an empty database; SQLite in OUT/loop by default")
    quick: bool = option(False, "6 days of 120 photos, shift on day 2: a look, no evidence")

    def execute(self) -> Result:
        """Print every day's risk, alarms, rounds and what promotions were worth."""
        from stage1_pro.studies.simulation import render, simulate

        given = {name: getattr(self, name) for name in self.model_fields_set}
        found = simulate(Simulate.of(**QUICK | given) if self.quick else self)
        return Result(render(found), found.model_dump(mode="json"))


@keywords(Simulate)
def simulate(data: Path | str, out: Path | str, **options: Any) -> Simulation:
    """Let the loop live through a stretch of days, and write what came of it.

    Raises:
        InputError: an option out of range, a folder that is there, a store that is not empty, or a run of other photos.
        NotReachableError: the first champion cannot be certified at alpha.
    """
    from stage1_pro.studies.simulation import simulate as work

    return work(Simulate.of(data=data, out=out, **options))
