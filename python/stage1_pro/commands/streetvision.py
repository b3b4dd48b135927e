"""``stage1 streetvision``: tune, answer and launch a miner."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Literal

from stage1_pro.command import Columns, Command, Count, Result, option, table_columns
from stage1_pro.errors import InputError, Stage1Error


class Tune(Command, topic="streetvision"):
    """Pick threshold and abstain band by the simulated reward."""

    run: Path | None = option(None, "calibrated run folder", one_of="source")
    bundle: Path | None = option(None, "bundle folder; needs --labels and --out", one_of="source")
    labels: Path | None = option(None, "with --bundle: CSV with file,label[,group] of photos not trained on")
    columns: Columns | None = table_columns()
    train_prior: float | None = option(None, "share of positives in training; the run's own by default")
    serve_prior: float = option(0.5, "share of positives that is asked")
    out: Path | None = option(None, "record to write; RUN/streetvision.json by default")
    settings: Path | None = option(None, "YAML of the miner to write")
    n_replicates: Count = option(300, "resamples of groups for the intervals", name="--replicates")
    seed: int = option(0, "seed of folds, resamples and simulated rounds")

    def execute(self) -> Result:
        """Print what the settings earn in simulation, and the miner's YAML."""
        from stage1_pro.integrations.streetvision.tuning import render, tune, yaml_of

        found = tune(self)
        return Result(render(found), {**found.model_dump(mode="json"), "yaml": yaml_of(found)})


class Answer(Command, topic="streetvision"):
    """Answer for photos as the miner would, to try its YAML."""

    settings: Path = option(..., "YAML of the miner")
    images: tuple[Path, ...] = option(..., "photos", positional=True, metavar="IMAGE")

    def execute(self) -> Result:
        """Print P(roadwork) of every photo, -1 for no answer."""
        from stage1_pro.integrations.streetvision import Settings, StreetVision

        absent = [path for path in self.images if not path.is_file()]
        if absent:
            raise InputError(f"images must be files, got {absent[0]}, which is none; nothing was answered")
        miner = StreetVision(Settings.read(self.settings))
        answers = {str(path): miner.answer(path.read_bytes()) for path in self.images}
        return Result("\n".join(f"{value:>9.6f}  {path}" for path, value in answers.items()), answers)


class Launch(Command, topic="streetvision"):
    """Register the detector, then run the miner's own entry point."""

    repo: Path = option(..., "checkout of the miner's code")
    layout: Literal["auto", "base_miner", "natix"] = option("auto", "where its registry is; auto looks")
    settings: Path | None = option(None, "YAML of the miner; names detector and YAML to the miner, too")
    entry: str = option("neurons/miner.py", "the miner's script, within its checkout")
    arguments: tuple[str, ...] = option((), "the miner's own", positional=True, metavar="-- ARGUMENT")

    def execute(self) -> Result:
        """Run the miner in this process until it ends."""
        from stage1_pro.integrations.streetvision import launch

        try:
            launch(self.repo, self.arguments, layout=self.layout, settings=self.settings, entry=self.entry)
        except Stage1Error:
            raise
        except Exception:  # noqa: BLE001  the miner's own, which no message of ours explains
            traceback.print_exc()
            return Result("", None, 1)
        return Result("", None)
