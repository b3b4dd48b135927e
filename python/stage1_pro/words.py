"""The vocabulary as types: names that files, flags and functions share."""

from __future__ import annotations

from typing import Literal

SplitName = Literal["train", "val_select", "val_calib", "val_test"]
SPLITS: tuple[SplitName, ...] = ("train", "val_select", "val_calib", "val_test")
# What a split may be called where it is given: what it becomes, less protected first.
GIVEN_SPLITS: dict[str, tuple[SplitName, ...]] = {
    **dict.fromkeys(("train", "training"), ("train",)),
    **dict.fromkeys(("val", "valid", "validation", "dev"), ("val_select", "val_calib")),
    **dict.fromkeys(("test", "testing"), ("val_test",)),
    "val_select": ("val_select",),
    "val_calib": ("val_calib",),
    "val_test": ("val_test",),
}
Half = Literal["fit", "certify"]
HALVES: tuple[Half, ...] = ("fit", "certify")
PolicyName = Literal["softmax", "gate", "scrc"]
StageName = Literal["stage_a", "stage_b"]
ProtocolName = Literal["crop224", "letterbox224", "native"]
Precision = Literal["fp32", "fp16", "bf16", "res32", "int8", "fp8"]
