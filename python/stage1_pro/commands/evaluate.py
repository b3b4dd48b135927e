"""``stage1 evaluate``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from stage1_pro.command import Command, Count, Place, Result, option
from stage1_pro.errors import PROMISE_FAILED, InputError
from stage1_pro.words import ProtocolName


class OfRun(Command):
    """What commands share that read the photos of a run."""

    run: Path = option(..., "trained run folder")
    images: Place | None = option(None, "where the run's photos lie now, if they moved; the run remembers it")

    def settled(self) -> AbstractContextManager[None]:
        """Have the run look there for its photos, unless what is done then is refused."""
        if self.images is None:
            return nullcontext()
        from stage1_pro.training.run import settled

        return settled(self.run, self.images)


class Evaluate(OfRun, topic="certificates"):
    """Measure the best model and its policy on val_test, once it is final."""

    n_replicates: Count = option(1000, "bootstrap replicates of an interval", name="--replicates")
    seed: int = option(0, "seed of the bootstrap")
    beside: tuple[Path, ...] = option(
        (),
        "evaluated runs on the same splits with other taps, whose cost and risk are drawn beside these",
        metavar="RUN",
    )
    protocol: ProtocolName | None = option(
        None,
        "instead: photos as StreetVision's validator would send them, by level, into RUN/protocols; no "
        "promise is about them",
    )
    photo_seed: int | None = option(None, "with --protocol: seed of what is drawn for each photo; 0 by default")

    def execute(self) -> Result:
        """Print figures and verdicts; the exit code says whether a promise fails."""
        if self.protocol is None and self.photo_seed is not None:
            raise InputError(
                "--photo-seed must stand beside --protocol, got no protocol; photos are not changed without one"
            )
        if self.protocol is not None and self.beside:
            raise InputError("--beside must stand without --protocol, got both; costs do not depend on the photos")
        with self.settled():
            return self._evaluated() if self.protocol is None else self._changed(self.protocol)

    def _evaluated(self) -> Result:
        from stage1_pro.training.evaluation import evaluate, render

        found = evaluate(self.run, n_replicates=self.n_replicates, seed=self.seed, beside=self.beside)
        broken = any(one.outcome == "FAIL" for one in found.exit_promises) or (
            found.verification is not None and found.verification.outcome == "FAIL"
        )
        return Result(render(found), found.model_dump(mode="json"), PROMISE_FAILED if broken else 0)

    def _changed(self, protocol: str) -> Result:
        from stage1_pro.training.robustness import evaluate_protocol, render

        found = evaluate_protocol(
            self.run, protocol, n_replicates=self.n_replicates, seed=self.seed, photo_seed=self.photo_seed or 0
        )
        return Result(render(found), found.model_dump(mode="json"))
