"""``stage1 continual simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stage1_pro.command import Columns, Command, Count, Place, Result, keywords, option, table_columns
from stage1_pro.studies.simulated import Simulation, SimulationConfig

QUICK: dict[str, Any] = {"days": 6, "per_day": 120, "shift_day": 2, "min_labels": 150, "least_certify": 100}


class Simulate(SimulationConfig, Command, topic="loop"):
    """Let the loop live through days of your photos on a simulated clock."""

    data: Path = option(..., "folder with labels.csv, a CSV, or a folder per class")
    columns: Columns | None = table_columns()
    out: Path = option(..., "new folder for simulation.json, figures, run and loop")
    run: Path | None = option(None, "OUT/run of an earlier simulation of these photos and seed; not trained")
    positive: str | None = option(None, "name of the positive class, where it cannot be found")
    backbone: Place = option("tiny", "tiny: learns from nothing; a folder: frozen under new heads")
    image_size: Count | None = option(None, "side that the model sees; the backbone's own by default")
    store: Place | None = option(None, "postgresql://… of an empty database; SQLite in OUT/loop by default")
    quick: bool = option(False, "6 days of 120 photos, shift on day 2: a look, no evidence")

    def execute(self) -> Result:
        """Print every day's risk, alarms, rounds and what promotions were worth."""
        from stage1_pro.studies.simulation import simulate

        given = {name: getattr(self, name) for name in self.model_fields_set}
        found = simulate(Simulate.of(**QUICK | given) if self.quick else self)
        return Result(found.render(), found.model_dump(mode="json"))


@keywords(Simulate)
def simulate(data: Path | str, out: Path | str, **options: Any) -> Simulation:
    """Let the loop live through a stretch of days, and write what came of it.

    Raises:
        InputError: an option out of range, a folder that is there, a store that is not empty, or a run of other photos.
        NotReachableError: the first champion cannot be certified at alpha.
    """
    from stage1_pro.studies.simulation import simulate as work

    return work(Simulate.of(data=data, out=out, **options))
