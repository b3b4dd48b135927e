"""``Policy``: any of the exit policies that a bundle can hold."""

from __future__ import annotations

from stage1_pro.policies.gate import GateParams
from stage1_pro.policies.sets import ScrcParams
from stage1_pro.policies.softmax import Thresholds

Policy = Thresholds | GateParams | ScrcParams
