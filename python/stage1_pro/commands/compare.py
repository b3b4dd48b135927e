"""``stage1 compare``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from stage1_pro.command import Command, Count, Flag, Result, Share, Words, keywords
from stage1_pro.commands.split import Fractions

if TYPE_CHECKING:
    from stage1_pro.config import Config
    from stage1_pro.studies.comparing import Comparison


class Compare(Command):
    """Train configurations alike but for their keys, over seeds, and compare them."""

    topic: ClassVar[str] = "compare"

    config: Annotated[tuple[Path, ...], Flag(metavar="YAML")] = Field(
        (), description="one for each configuration, as for train; the first is the baseline"
    )
    study: str | None = Field(
        None, description="a standing study instead: modes (full, LoRA, DoRA, APLA, partial) or explora"
    )
    data: Path = Field(description="labels, as for split --labels")
    out: Path = Field(description="folder of the comparison; run again, it goes on")
    seeds: int = Field(5, description="how many; each is one of splits and of training")
    names: Words | None = Field(
        None, description="comma-separated names of the configurations; those of the files by default"
    )
    overrides: Annotated[tuple[str, ...], Flag("--set", metavar="[NAME:]KEY=VALUE", repeated=True)] = Field(
        (), description="one key of all configurations, or of one: lora:train.lr=5e-4 (may be repeated)"
    )
    images: Path | None = Field(None, description="folder that `file` is relative to; the CSV's own by default")
    positive: str | None = Field(None, description="name of the positive class, as for split")
    fractions: Fractions | None = Field(
        None, description="share of rows per split, as for split; its defaults otherwise"
    )
    hold_split: bool = Field(False, description="one split for all seeds; only training differs")
    metric: str = Field(
        "augrc",
        description="what the best is chosen by, its mean over seeds on val_select: accuracy, mcc, augrc or gate_augrc",
    )
    min_coverage: Share = Field(0.70, description="of the gate's two constraints")
    max_exit_error: Annotated[Share, Flag("--alpha", also="--max-exit-error")] = Field(
        0.01, description="of the gate's two constraints"
    )
    n_replicates: Annotated[Count, Flag("--replicates")] = Field(
        2000, description="bootstrap resamples of whole groups"
    )
    level: Share = Field(0.95, description="nominal coverage of the intervals")
    test: Annotated[bool, Flag("--no-test")] = Field(True, description="leave val_test alone for now")
    second_look: bool = Field(False, description="read val_test again though another choice has; it is recorded")

    def execute(self) -> Result:
        """Print the table of configurations and their differences from the baseline."""
        from stage1_pro.studies.comparing import compare, read_arms, render

        arms = read_arms(self.config, names=self.names, overrides=self.overrides, study=self.study)
        found, tested = compare(self, arms)
        both = {"val_select": found.model_dump(mode="json"), "val_test": tested and tested.model_dump(mode="json")}
        text = f"{render(found, tested)}\nwrote {self.out}/compare.json, compare.csv, compare.md, figures"
        return Result(text, both)


@keywords(Compare, without=("config", "study", "names", "overrides"))
def compare(
    out: Path | str, data: Path | str, configs: Mapping[str, Config], **options: Any
) -> tuple[Comparison, Comparison | None]:
    """Train every configuration in every seed, compare them on ``val_select``, and look at ``val_test`` once.

    ``configs`` gives every name its configuration, the baseline first; seeds in them do not count.

    Returns:
        The comparison on ``val_select``, and that of the chosen configuration and the baseline on ``val_test``.

    Raises:
        InputError: configurations, seeds or names that make no comparison, a folder of another comparison, or a second
            look.
        ArtifactError: trainings that did not start alike, or a damaged run.
        TrainingError: a training that failed; the others were finished and are kept.
    """
    from stage1_pro.studies.comparing import compare as work

    return work(Compare.of(out=out, data=data, **options), configs)
