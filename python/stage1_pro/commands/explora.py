"""``stage1 explora``."""

from __future__ import annotations

from pathlib import Path

from stage1_pro.command import Place, Result, option
from stage1_pro.commands.train import Configured


class Explora(Configured, topic="explora"):
    """Adapt the backbone to unlabelled images, and keep it where that helps."""

    images: Place = option(..., "the pool: a folder or tar, or a CSV with file[,group]")
    run: Path = option(..., "run folder with splits.json")
    base: Place | None = option(None, "backbone to adapt: preset, folder or hub id; model.backbone otherwise")
    overwrite: bool = option(False, "forget an earlier adaptation of this run")

    def execute(self) -> Result:
        """Print what the judges said and which backbone was kept."""
        from stage1_pro.training.exploration import explora, render

        record = explora(
            self.images, self.run, self.given(), base=self.base, resume=self.resume, overwrite=self.overwrite
        )
        return Result(render(record, self.run), record.model_dump(mode="json"))
