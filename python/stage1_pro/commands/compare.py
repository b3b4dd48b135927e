"""``stage1 compare``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage1_pro.command import Columns, Command, Count, Part, Result, Share, Words, keywords, option, table_columns
from stage1_pro.commands.split import Fractions

if TYPE_CHECKING:
    from stage1_pro.config import Config
    from stage1_pro.studies.comparing import Comparison


class Compare(Command, topic="compare"):
    """Train configurations alike but for their keys, over seeds, and compare them."""

    config: tuple[Path, ...] = option(
        (), "one for each configuration, as for train; the first is the baseline", metavar="YAML"
    )
    study: str | None = option(None, "a standing study instead: modes (full, LoRA, DoRA, APLA, partial) or explora")
    data: Path = option(..., "labels, as for split --labels")
    out: Path = option(..., "folder of the comparison; run again, it goes on")
    seeds: int = option(5, "how many; each is one of splits and of training")
    names: Words | None = option(None, "comma-separated names of the configurations; those of the files by default")
    overrides: tuple[str, ...] = option(
        (),
        "one key of all configurations, or of one: lora:train.lr=5e-4 (may be repeated)",
        name="--set",
        metavar="[NAME:]KEY=VALUE",
        repeated=True,
    )
    columns: Columns | None = table_columns()
    images: Path | None = option(None, "folder that `file` is relative to; the CSV's own by default")
    positive: str | None = option(None, "name of the positive class, as for split")
    fractions: Fractions | None = option(None, "share of rows per split, as for split; its defaults otherwise")
    max_component: Part = option(0.05, "largest share of rows that near-duplicates may join, as for split")
    hold_split: bool = option(False, "one split for all seeds; only training differs")
    metric: str = option(
        "augrc", "what the best is chosen by, its mean over seeds on val_select: accuracy, mcc, augrc or gate_augrc"
    )
    min_coverage: Share = option(0.70, "of the gate's two constraints")
    max_exit_error: Share = option(0.01, "of the gate's two constraints", name="--alpha", also="--max-exit-error")
    n_replicates: Count = option(2000, "bootstrap resamples of whole groups", name="--replicates")
    level: Share = option(0.95, "nominal coverage of the intervals")
    test: bool = option(True, "leave val_test alone for now", name="--no-test")
    second_look: bool = option(False, "read val_test again though another choice has; it is recorded")

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
