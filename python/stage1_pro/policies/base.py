"""``Policy``: what decides which answers of Stage A stand; the base of every policy file."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Self

from stage1_pro.policies.target import Promise, Target
from stage1_pro.record import Record


class BasePolicy(Record):
    """An exit policy: an image exits at Stage A iff its score is at or above ``exit_threshold``."""

    steerable: ClassVar[bool] = True
    """Whether a loop may tighten the threshold by what audits of exits say."""

    if TYPE_CHECKING:
        # Fields of every policy, each where its file has it.
        policy: str
        classes: list[str]
        positive: str
        guarantee: str
        statement: str
        split_hashes: dict[str, str]
        model_fingerprint: str | None
        preprocessing_fingerprint: str | None

        @property
        def exit_threshold(self) -> float:
            """An image exits iff its score is at or above it."""

    @property
    @abstractmethod
    def target(self) -> Target:
        """What it was asked for; delta is that of its own claim."""

    @property
    def promises(self) -> tuple[Promise, ...]:
        """What it guarantees; nothing without a guarantee."""
        return () if self.guarantee == "none" else self.target.promises(self.positive)

    def at(self, threshold: float) -> Self:
        """The policy with a stricter exit threshold; itself at its own threshold or below, where nothing is certified.

        Exits only become fewer, but no share of them was certified there: whatever was promised is given up.
        """
        if threshold <= self.exit_threshold:
            return self
        return self._stricter(
            threshold, f"nothing is promised: the threshold was tightened from {self.exit_threshold:.6g} to "
            f"{threshold:.6g}, where nothing was certified"
        )  # fmt: skip

    @abstractmethod
    def _stricter(self, threshold: float, statement: str) -> Self:
        """A copy with that threshold and statement, and without a guarantee."""
