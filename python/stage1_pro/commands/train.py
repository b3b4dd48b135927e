"""``stage1 train`` and ``stage1 explora``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from stage1_pro.command import Columns, Command, Flag, Place, Result, option, table_columns
from stage1_pro.commands.evaluate import OfRun
from stage1_pro.config import Config, Mode, describe, load_config

Overrides = Annotated[tuple[str, ...], Flag("--set", metavar="KEY=VALUE", repeated=True)]


class Configured(Command):
    """A command that reads a configuration, whose keys its help lists."""

    config: Path | None = option(None, "YAML file with the keys below")
    overrides: Overrides = option((), "one key, for example train.epochs=4 (may be repeated)")
    resume: bool = option(False, "go on from last.pth; ends as if never interrupted")

    def given(self, *more: str) -> Config | None:
        """The configuration that file and keys make; None where neither is given."""
        overrides = [*self.overrides, *more]
        return load_config(self.config, overrides) if self.config is not None or overrides else None

    @classmethod
    def more_help(cls) -> str:
        """The table of keys and defaults."""
        rows = describe()
        width = max(len(name) for name, _, _ in rows)
        table = "\n".join(f"  {name:<{width}}  {default:<12} {text}" for name, default, text in rows)
        return f"configuration keys (YAML sections or --set KEY=VALUE) and their defaults:\n{table}\n"


class Train(OfRun, Configured, topic="train"):
    """Train both stages on the splits of a run.

    With --resume and more epochs (--set train.epochs=N) a finished training goes on: from its last weights, optimizer
    and average, with a warm-up and a schedule of their own for the added epochs. That is not the same as N epochs from
    the beginning. The best epoch of all is kept; what was made of the model before goes to RUN/.before.
    """

    run: Path = option(..., "run folder with splits.json", also="--run-folder")
    mode: Mode | None = option(None, "what of the backbone is trained; short for --set train.mode=MODE")
    overwrite: bool = option(False, "set an earlier training aside, in RUN/.before, in place of what lies there")
    explora: bool = option(False, "start from the backbone in RUN/explora/backbone")

    def execute(self) -> Result:
        """Print the best epoch's figures on ``val_select``."""
        config = self.given(*([] if self.mode is None else [f"train.mode={self.mode}"]))
        flags = {"resume": self.resume, "overwrite": self.overwrite, "explora": self.explora}
        # Tell mistakes before the seconds that torch takes to load.
        from stage1_pro.training.run import check_run

        check_run(self.run, config, **flags)
        from stage1_pro.data.splits import Splits
        from stage1_pro.policies.standing import in_reach
        from stage1_pro.training.loop import train
        from stage1_pro.training.validate import auroc_name

        with self.settled():
            result = train(self.run, config, **flags)
        best, splits = result.best, Splits.read(result.run / "splits.json")
        text = (
            f"trained {result.epochs} epochs in {result.seconds:.0f} s; best epoch {result.best_epoch + 1}: "
            f"accuracy {best['accuracy']:.4f}, {auroc_name(splits.positive)} {best['auroc']:.4f}, AUGRC "
            f"{best['augrc']:.5f} on val_select\n"
            f"{in_reach(splits)}\n"
            f"wrote {result.run}/model_best.pth; next: stage1 calibrate --run {result.run}"
        )
        return Result(text, {**asdict(result), "run": str(result.run)})


class Explora(Configured, topic="explora"):
    """Adapt the backbone to unlabelled images, and keep it where that helps."""

    images: Place = option(..., "the pool: a folder or tar, or a CSV with file[,group]")
    columns: Columns | None = table_columns()
    run: Path = option(..., "run folder with splits.json")
    base: Place | None = option(None, "backbone to adapt: preset, folder or hub id; model.backbone otherwise")
    overwrite: bool = option(False, "set an earlier adaptation of this run aside, in RUN/explora/.before")

    def execute(self) -> Result:
        """Print what the judges said and which backbone was kept."""
        from stage1_pro.training.exploration import explora, render

        record = explora(
            self.images, self.run, self.given(), columns=self.columns, base=self.base, resume=self.resume,
            overwrite=self.overwrite,
        )  # fmt: skip
        return Result(render(record, self.run), record.model_dump(mode="json"))
