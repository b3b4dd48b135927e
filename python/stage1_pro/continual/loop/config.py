"""How candidates of the loop are made and judged: the part of ``loop.json`` that ``rounds`` reads."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from stage1_pro.continual.learn.rewards import RewardSpec
from stage1_pro.continual.loop.promotion import Terms
from stage1_pro.continual.serving.events import ReviewPlan
from stage1_pro.continual.watch.status import MonitorConfig
from stage1_pro.record import Record

Role = Literal["guard", "certify", "learn"]


class RoundsConfig(Record):
    """What is watched and how candidates are made and judged; part of ``loop.json``."""

    monitor: MonitorConfig
    plan: ReviewPlan = ReviewPlan()
    novelty_events: int = Field(500, ge=2, description="first ones of a champion, which later ones are novel beside")
    steer: bool = Field(True, description="the threshold follows labels, never below the certificate")
    guard_share: float = Field(0.3, gt=0, lt=1, description="of random audits, that judge candidates")
    certify_share: float | None = Field(
        None, gt=0, lt=1, description="the same, that certify them; null: .4, or what is left. The others teach"
    )
    select_share: float = Field(0.2, gt=0, lt=1, description="of learned rows, to stop training by")
    least_rows: int = Field(50, ge=2, description="fewest new rows of each role")
    least_certify: int = Field(0, ge=0, description="fewest new rows that certify, where that is more")
    least_guard: int = Field(
        300, ge=0, description="the same of rows that judge: fewer see but the largest gains, and a look uses them up"
    )
    spec: RewardSpec = RewardSpec()
    mgrpo: tuple[dict[str, Any], ...] = Field(({},), description="options of mgrpo.propose, a proposal each")
    tuning: tuple[dict[str, Any], ...] = Field((), description="options of rlvr.tune, a proposal each")
    through: Literal["heads", "adapter"] = Field("heads", description="what tuning moves; mgrpo moves heads")
    recent: int = Field(512, ge=1, description="images served last whose policy mgrpo keeps near the champion's")
    terms: Terms = Terms()
    largest_growth: float = Field(1.1, gt=0, description="candidate's size over the champion's, at most")
    largest_slowdown: float | None = Field(
        1.25, gt=0, description="candidate's time of a decision over the champion's: upper end of its interval, at "
        "most; null: not asked, for what must come out the same twice, such as a simulation"
    )  # fmt: skip
    timed_photos: int = Field(200, ge=10, description="of the guard, at most, to time decisions on")
    timed_passes: int = Field(3, ge=1, description="over these photos; each counts with its fastest")
    timed_seconds: float = Field(300.0, gt=0, description="that timing may take, ten decisions apart")

    @model_validator(mode="after")
    def _some_proposal(self) -> Self:
        if not self.mgrpo and not self.tuning:
            raise ValueError("mgrpo or tuning must name the options of one proposal or more")
        if self.guard_share + self.certified_share > 1:
            raise ValueError("guard_share and certify_share must be at most 1 together")
        return self

    @property
    def certified_share(self) -> float:
        """Of random audits, that certify."""
        return min(0.4, 1 - self.guard_share) if self.certify_share is None else self.certify_share

    def least(self, part: Role) -> int:
        """Fewest new rows of a role."""
        more = {"guard": self.least_guard, "certify": self.least_certify, "learn": 0}
        return max(self.least_rows, more[part])
