"""The vocabulary as types: names that files, flags and functions share."""

from __future__ import annotations

from typing import Literal

SplitName = Literal["train", "val_select", "val_calib", "val_test"]
SPLITS: tuple[SplitName, ...] = ("train", "val_select", "val_calib", "val_test")
Half = Literal["fit", "certify"]
HALVES: tuple[Half, ...] = ("fit", "certify")
PolicyName = Literal["softmax", "gate", "scrc"]
StageName = Literal["stage_a", "stage_b"]
ProtocolName = Literal["crop224", "letterbox224", "native"]
Precision = Literal["fp32", "fp16", "bf16", "res32", "int8", "fp8"]
