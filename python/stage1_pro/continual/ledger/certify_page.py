"""The page on which a person labels until it is proven: blind, with how far it is in plain words."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, ClassVar

from stage1_pro.continual.ledger.page import Page, Request
from stage1_pro.errors import InputError

if TYPE_CHECKING:
    from stage1_pro.training.certifying import Certification


class CertifyPage(Page):
    """The page of one reviewer; when something is proven it says so and waits to be told to go on or to end.

    Args:
        work: the certificate.
        reviewer: who answers.
        port: 0: any free one.

    Raises:
        InputError: no name of a reviewer, or the port is taken.
    """

    known: ClassVar[tuple[str, ...]] = ("next", "answer", "skip", "undo", "more", "end")

    def __init__(self, work: Certification, reviewer: str, port: int = 0) -> None:
        if not reviewer.strip():
            raise InputError(f"reviewer must be a name, got '{reviewer}'")
        self.work, self.reviewer = work, reviewer
        self._told = work.won is not None
        self._alone = threading.Lock()
        super().__init__(port)

    def act(self, what: str, request: Request) -> dict[str, Any]:
        """Do what the page asks for, and give what it shows next."""
        with self._alone:
            work, note, photo = self.work, "", request.event_id
            if what in ("answer", "skip"):
                if photo != work.photo:
                    note = "That one has been answered already; nothing was changed."
                else:
                    self._told |= work.answer(photo, request.label if what == "answer" else None, self.reviewer)
                    told = "Counted as a wrong answer, since nobody could tell."
                    note = f"Answered {request.label}." if what == "answer" else told
            elif what == "undo":
                undone = work.undo(self.reviewer)
                note = "Undone; answer again." if undone else "That answer stands: what came of it has been shown."
            elif what == "more":
                self._told = False
            elif what == "end":
                self.stop()
            return self._shown(note, ended=what == "end")

    def photo(self, event_id: str) -> bytes | None:
        """The photo asked for."""
        return self.work.read(event_id)

    def _shown(self, note: str, *, ended: bool) -> dict[str, Any]:
        work, shown, plan = self.work, self.work.shown, self.work.plan
        left = work.photo
        done = None
        if ended or self._told or left is None:
            done = {"title": self._title(ended=ended), "text": self._found(), "more": left is not None and not ended,
                    "end": not ended}  # fmt: skip
        item = None
        if done is None:
            item = {"event_id": left, "classes": work.classes, "facts": f"photo {left[:16] if left else ''}"}
        more, about = shown["more"], "proven"
        if not shown["labels"]:
            about = "after some labels it is shown how many it takes"
        elif more is None:
            about = "so many wrong answers that labels may prove nothing: end here, or train a better Stage A"
        elif more:
            about = f"about {more:,} more"
        return {
            "item": item, "note": note, "reviewer": self.reviewer, "blind": True, "done": done, "title": "Certify",
            "goal": (
                f"To prove: of the photos that Stage A answers, at most {100 * plan.exit_error:g} in 100 are answered "
                "wrongly. You do not see its answers, so that they sway nobody. A photo that you cannot tell counts as "
                "a wrong answer."
            ),
            "progress": {
                "said": f"{self.reviewer}: {work.labels:,} labelled · {about}", "share": shown["share"],
                "can_undo": work.can_undo,
            },
        }  # fmt: skip

    def _title(self, *, ended: bool) -> str:
        if self.work.won is not None:
            return "Proven"
        return "Ended; nothing is proven yet" if ended else "No photo is left, and nothing is proven"

    def _found(self) -> str:
        found, plan = self.work.stands(), self.work.plan
        if not found.proven or found.coverage is None:
            return (
                "Every answer is kept; the same command goes on." if found.can_go_on
                else "Bring more photos of this kind: these do not suffice."
            )  # fmt: skip
        said = (
            f"Of the photos that Stage A answers, at most {100 * plan.exit_error:g} in 100 are answered wrongly, with "
            f"{100 * (1 - plan.delta / plan.claims):g}% certainty. It answers {found.coverage:.0%} of photos like "
            f"these. The policy is written ({found.labels:,} labels)."
        )
        at = self.work.coverage
        if found.can_go_on and at is not None and found.more is not None:
            said += f" About {found.more:,} more labels may prove it for {at:.0%}."
        return said
