"""``preprocessor_config.json``: what pixels a backbone was trained on, as far as ``PreprocessSpec`` can say it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stage1_pro.errors import ArtifactError
from stage1_pro.models.weights import find_file, read_json

PROCESSOR = "preprocessor_config.json"
# Pillow's numbers.
RESAMPLE = {2: "bilinear", 3: "bicubic"}
_STEPS = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_center_crop")


class Processor:
    """A backbone's processor file, in a folder or in the hub's cache; without one nothing is stated.

    Attributes:
        path: the file; None without.

    Raises:
        ArtifactError: the file is no JSON object, or asks for a step that this package does not take.
    """

    def __init__(self, name: str) -> None:
        self.path: Path | None = find_file(name, PROCESSOR)
        if self.path is not None:
            self._values = read_json(self.path)
        else:
            # Newer versions of transformers keep it inside the file of a whole processor.
            self.path = find_file(name, "processor_config.json")
            found = read_json(self.path).get("image_processor") if self.path else None
            self._values = found if isinstance(found, dict) else {}
        for key, value in self._values.items():
            if (key.startswith("do_") and value and key not in _STEPS) or (key == "rescale_offset" and value):
                raise self._refused(key, "off", "no such step is taken here")

    def side(self) -> int | None:
        """Side of the square input in pixels; None where it is not stated."""
        crops, size = bool(self._values.get("do_center_crop")), self._values.get("size")
        if crops:
            size = self._values.get("crop_size") or size
        elif self._keeps_shape():
            raise self._refused("size", "a height and a width", "set model.image_size and model.resize")
        if not size:
            return None
        sides = set(size.values()) if isinstance(size, dict) else {size}
        if len(sides) != 1 or not all(type(one) is int and one > 0 for one in sides):
            raise self._refused("crop_size" if crops else "size", "a square", "set model.image_size")
        return int(sides.pop())

    def spec(self, resize: str | None) -> dict[str, Any]:
        """Arguments of ``PreprocessSpec`` that the file states, besides height and width.

        Args:
            resize: what the configuration asks for; None leaves it to the file.
        """
        return {**self._resize(resize), **self._resample(), **self._scale()}

    def _keeps_shape(self) -> bool:
        """Whether photos would be resized to inputs of all shapes."""
        size = self._values.get("size")
        whole = not isinstance(size, dict) or not size or {"height", "width"} <= size.keys()
        return not self._values.get("do_center_crop") and not whole

    def _resize(self, resize: str | None) -> dict[str, Any]:
        if self._values.get("do_resize", True) is False:
            raise self._refused("do_resize", "true", "every photo is resized here; say how in a copy of the folder")
        if resize is None and self._keeps_shape():
            raise self._refused("size", "a height and a width", "set model.resize to stretch or crop")
        if resize == "stretch" or not self._values.get("do_center_crop"):
            return {}
        side, shorter = self.side(), self._values.get("size")
        if isinstance(shorter, dict):
            shorter = shorter.get("shortest_edge")
        if side is None or type(shorter) is not int or not side <= shorter <= 16 * side:
            raise self._refused("size", "a shortest edge of at least the crop's side", "set model.resize=stretch")
        return {"resize": "crop", "crop_ratio": shorter / side}

    def _resample(self) -> dict[str, Any]:
        value = self._values.get("resample")
        if value is None:
            return {}
        if type(value) is not int or value not in RESAMPLE:
            raise self._refused("resample", "2 (bilinear) or 3 (bicubic)", "choose one in a copy of the folder")
        return {"resample": RESAMPLE[value]}

    def _scale(self) -> dict[str, Any]:
        """Mean and std of pixels in [0, 1], whatever range the file normalises them in."""
        values = self._values
        factor = values.get("rescale_factor", 1 / 255) if values.get("do_rescale", True) is not False else 1
        if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < math.inf:
            raise self._refused("rescale_factor", "a positive number", "correct it in a copy of the folder")
        # Exactly 1 where pixels are scaled to [0, 1], and then nothing is rounded.
        top = 1.0 if math.isclose(factor * 255, 1) else factor * 255
        if values.get("do_normalize", True) is False:
            return {"mean": (0.0,) * 3, "std": (1 / top,) * 3}
        found = {}
        for key, word in (("image_mean", "mean"), ("image_std", "std")):
            value = values.get(key)
            if value is None:
                continue
            numbers = isinstance(value, list) and all(type(one) in (int, float) and abs(one) <= 1e4 for one in value)
            if not numbers or len(value) != 3 or (word == "std" and min(value) / top < 1e-4):
                raise self._refused(key, "three numbers", "correct it in a copy of the folder")
            found[word] = tuple(one / top for one in value)
        if len(found) == 1 or (not found and top != 1):
            raise self._refused("image_std", "beside image_mean", "add both in a copy of the folder")
        return found

    def _refused(self, key: str, wanted: str, advice: str) -> ArtifactError:
        return ArtifactError(f"{key} in {self.path} must be {wanted}, got {self._values.get(key)!r}; {advice}")
