"""Rendered street scenes with labels: the demo's embedded data and a synthetic pool.

``roadwork`` shows one to several cones, barrels, barriers or diamond signs on or beside the road; ``none`` shows the
same streets with things that look alike: orange cars and awnings, red round signs, traffic lights, brick walls,
delivery boxes. Scenes come in clips of one to three frames, the unit that must not be split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from stage1_pro.errors import InputError
from stage1_pro.files import atomic_directory, write_csv
from stage1_pro.progress import track

Colour = tuple[int, int, int]
Thing = Callable[[float], None]

# Canvas of one frame before it is scaled down; drawing at three times the size smooths the edges.
_SCALE = 3
_LIGHT = {"day": (1.0, 0.0), "dusk": (0.68, 7.0), "night": (0.34, 6.0)}
_ORANGE: tuple[Colour, ...] = ((240, 110, 30), (228, 90, 22), (250, 130, 40))


def render_pool(out: Path | str, n: int, seed: int = 0, size: int = 96) -> Path:
    """Render ``n`` labelled scenes of ``size`` x ``size`` pixels; the same arguments give the same bytes.

    Args:
        out: folder to write (an earlier pool in it is replaced): ``labels.csv`` and ``images/``.
        n: number of images, at least 2; half of the clips show roadwork.
        seed: scenes are a function of (seed, clip).
        size: side in pixels, at least 32.

    Returns:
        Path of ``labels.csv`` (file, label, label_name, group, source).
    """
    if n < 2:
        raise InputError(f"n must be at least 2, got {n}")
    if size < 32:
        raise InputError(f"size must be at least 32 pixels, got {size}")
    out = Path(out)
    if out.exists() and not (out / "labels.csv").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(
            f"out must be new, empty or an earlier pool, got {out} with something else; name another folder"
        )
    columns = ("file", "label", "label_name", "group", "source")
    rows: list[dict[str, object]] = []
    with atomic_directory(out) as folder:
        (folder / "images").mkdir()
        clip = 0
        progress = track(range(n), "rendering scenes", total=n)
        while len(rows) < n:
            scene = _Scene(np.random.default_rng([seed, clip]), roadwork=clip % 2 == 1, size=size)
            for frame in range(min(scene.frames, n - len(rows))):
                next(progress, None)
                name = f"images/scene_{clip:05d}_{frame}.jpg"
                scene.frame(frame).save(folder / name, "JPEG", quality=90)
                label_name = "roadwork" if scene.roadwork else "none"
                cells = (name, int(scene.roadwork), label_name, f"clip_{clip:05d}", scene.light)
                rows.append(dict(zip(columns, cells, strict=True)))
            clip += 1
        next(progress, None)  # to its end, which takes the bar away
        write_csv(folder / "labels.csv", rows, columns)
    return out / "labels.csv"


@dataclass(frozen=True)
class _Spot:
    """Where a thing stands: its foot on the canvas, and how many pixels a metre is there, across and up."""

    pen: ImageDraw.ImageDraw
    x: float
    y: float
    wide: float
    high: float

    def at(self, right: float, up: float) -> tuple[float, float]:
        """The pixel so many metres right of the foot, and above it."""
        return self.x + right * self.wide, self.y - up * self.high

    def box(self, left: float, bottom: float, right: float, top: float) -> tuple[float, float, float, float]:
        return *self.at(left, top), *self.at(right, bottom)

    def rectangle(self, left: float, bottom: float, right: float, top: float, fill: tuple[int, ...]) -> None:
        self.pen.rectangle(self.box(left, bottom, right, top), fill=fill)

    def ellipse(self, left: float, bottom: float, right: float, top: float, fill: tuple[int, ...]) -> None:
        self.pen.ellipse(self.box(left, bottom, right, top), fill=fill)

    def polygon(self, corners: Iterable[tuple[float, float]], fill: tuple[int, ...]) -> None:
        self.pen.polygon([self.at(*corner) for corner in corners], fill=fill)

    def pole(self, height: float) -> None:
        self.rectangle(-0.05, 0, 0.05, height, (120, 120, 122))


def _colour(channels: Iterable[float]) -> tuple[int, ...]:
    return tuple(int(channel) for channel in channels)


class _Scene:
    """One street: what stands where is drawn once, frames differ by a small camera motion and noise."""

    def __init__(self, rng: np.random.Generator, *, roadwork: bool, size: int) -> None:
        self.roadwork = roadwork
        self.size = size
        self.frames = int(rng.integers(1, 4))
        self.light = str(rng.choice(list(_LIGHT), p=[0.65, 0.22, 0.13]))
        self._rng = rng
        self._inside = False
        # A margin around the canvas, so that the camera can move.
        self._side = int(size * 1.15) * _SCALE
        self._street = self._draw()

    def frame(self, number: int) -> Image.Image:
        """The scene at one moment, [size, size] RGB."""
        rng = self._rng
        room = self._side - self.size * _SCALE
        drift = min(room, number * int(rng.integers(1, 4)) * _SCALE)
        left, top = int(rng.integers(0, max(1, room - drift))) + drift if room > drift else 0, room // 2
        box = (left, top, left + self.size * _SCALE, top + self.size * _SCALE)
        view = self._street.resize((self.size, self.size), Image.Resampling.BOX, box=box)
        if rng.random() < 0.4:
            view = view.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.1)))
        gain, noise = _LIGHT[self.light]
        pixels = np.asarray(view, dtype=np.float32) * gain
        if self.light == "dusk":
            pixels *= np.array([1.1, 0.95, 0.9], dtype=np.float32)
        pixels += rng.normal(0, 3 + noise, size=pixels.shape)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))

    def _draw(self) -> Image.Image:
        rng, side = self._rng, self._side
        image = Image.new("RGB", (side, side))
        self._pen = ImageDraw.Draw(image)
        self.horizon = side * rng.uniform(0.36, 0.5)
        self.vanish = side * rng.uniform(0.35, 0.65)
        self._sky()
        self._buildings()
        self._road()
        items: list[Thing] = []
        for thing, most in ((self._tree, 4), (self._car, 4), (self._lookalike, 4), (self._lamp, 3)):
            items += [thing] * int(rng.integers(0, most))
        first: Thing | None = None
        if self.roadwork:
            first, *more = self._roadwork_items()
            items += more
        # Far things first, so that near ones cover them.
        nearness = [float(rng.beta(1.2, 2.0)) for _ in items]
        for near, item in sorted(zip(nearness, items, strict=True), key=lambda placed: placed[0]):
            item(near)
        if first is not None:  # the one that makes the label true: in every frame, behind nothing
            self._inside = True
            first(0.15 + 0.85 * float(rng.beta(2.2, 1.4)))
        return image

    def _roadwork_items(self) -> list[Thing]:
        kinds = (self._cone, self._cone, self._barrel, self._barrier, self._diamond)
        first = kinds[int(self._rng.integers(len(kinds)))]
        others = [kinds[int(self._rng.integers(len(kinds)))] for _ in range(int(self._rng.integers(0, 3)))]
        return [first, *([first] * int(self._rng.integers(0, 3))), *others]

    def _orange(self) -> Colour:
        return _ORANGE[int(self._rng.integers(3))]

    def _paint(self, orange: float, low: int, high: int) -> tuple[int, ...]:
        """Orange with this chance, else any colour with channels from ``low`` to ``high``."""
        return self._orange() if self._rng.random() < orange else _colour(self._rng.integers(low, high, 3))

    # ---------------------------------------------------------------------------- backdrop

    def _sky(self) -> None:
        top = np.array([self._rng.integers(90, 190), self._rng.integers(140, 210), self._rng.integers(200, 250)])
        for y in range(0, int(self.horizon) + 1, _SCALE):
            share = y / self.horizon
            self._pen.rectangle((0, y, self._side, y + _SCALE), fill=_colour(top * (1 - 0.3 * share) + 70 * share))

    def _buildings(self) -> None:
        rng, x, step = self._rng, -self._side * 0.1, self._side * 0.045
        while x < self._side:
            width, height = self._side * rng.uniform(0.1, 0.28), self._side * rng.uniform(0.06, 0.34)
            brick = rng.random() < 0.3
            base = (150, 78, 58) if brick else _colour(rng.integers(90, 200) + rng.integers(-18, 18, 3))
            self._pen.rectangle((x, self.horizon - height, x + width, self.horizon), fill=base)
            dark = _colour(channel * 0.6 for channel in base)
            for wx in np.arange(x + step * 0.4, x + width - step * 0.6, step):
                for wy in np.arange(self.horizon - height + step * 0.4, self.horizon - step * 0.6, step):
                    self._pen.rectangle((wx, wy, wx + step * 0.5, wy + step * 0.55), fill=dark)
            if rng.random() < 0.25:  # an awning over a shop, orange now and then
                top, bottom = self.horizon - step, self.horizon - step + step * 0.6
                awning = ((x, top), (x + width, top), (x + width * 0.95, bottom), (x + width * 0.05, bottom))
                self._pen.polygon(awning, fill=self._paint(0.5, 60, 220))
            x += width * rng.uniform(0.9, 1.3)

    def _road(self) -> None:
        rng, side = self._rng, self._side
        grass_or_stone = (95, 120, 70) if rng.random() < 0.5 else (150, 145, 140)
        ground = _colour(grass_or_stone + rng.integers(-12, 12, 3))
        self._pen.rectangle((0, self.horizon, side, side), fill=ground)
        grey = int(rng.integers(75, 120))
        self.road = side * rng.uniform(0.45, 0.8)
        far, centre = side * 0.03, side * 0.5
        corners = ((self.vanish - far, self.horizon), (self.vanish + far, self.horizon))
        road = (*corners, (centre + self.road, side), (centre - self.road, side))
        self._pen.polygon(road, fill=(grey, grey, grey + 4))
        line = (225, 222, 205) if rng.random() < 0.7 else (225, 185, 60)
        for k in range(9):
            a, b = (k / 9) ** 1.6, ((k + 0.5) / 9) ** 1.6
            ya, yb = (self.horizon + (side - self.horizon) * v for v in (a, b))
            xa, xb = (self.vanish + (centre - self.vanish) * v for v in (a, b))
            wa, wb = (side * 0.004 + side * 0.016 * v for v in (a, b))
            self._pen.polygon(((xa - wa, ya), (xa + wa, ya), (xb + wb, yb), (xb - wb, yb)), fill=line)

    # ---------------------------------------------------------------------------- things

    def _place(self, nearness: float, *, roadside: bool = False) -> _Spot:
        """Where something stands for a nearness 0 (far) .. 1."""
        rng, depth = self._rng, 0.06 + 0.85 * nearness
        y = self.horizon + (self._side - self.horizon) * depth
        centre = self.vanish + (self._side * 0.5 - self.vanish) * depth
        offset = rng.uniform(1.02, 1.5) * rng.choice([-1, 1]) if roadside else rng.uniform(-1.15, 1.15)
        x, unit = centre + self.road * depth * offset, self._side * (0.02 + 0.19 * depth)
        if self._inside:
            x = min(max(x, self._side * 0.2), self._side * 0.8)
            y = min(y, self._side * 0.88)
        return _Spot(self._pen, x, y, unit, unit)

    def _tree(self, nearness: float) -> None:
        spot = self._place(nearness, roadside=True)
        spot.rectangle(-0.12, 0, 0.12, 1.6, (92, 66, 44))
        for _ in range(4):
            dx, dy, r = self._rng.uniform(-0.5, 0.5), self._rng.uniform(1.5, 2.6), self._rng.uniform(0.45, 0.8)
            green = (int(self._rng.integers(30, 80)), int(self._rng.integers(90, 140)), 45)
            spot.ellipse(dx - r, dy - r, dx + r, dy + r, green)

    def _lamp(self, nearness: float) -> None:
        spot = self._place(nearness, roadside=True)
        spot.rectangle(-0.05, 0, 0.05, 3.2, (70, 70, 74))
        spot.rectangle(-0.05, 3.1, 0.6, 3.2, (70, 70, 74))

    def _car(self, nearness: float) -> None:
        self._box_car(self._place(nearness), self._paint(0.2, 20, 235))

    def _box_car(self, spot: _Spot, paint: tuple[int, ...]) -> None:
        pen, x, y, unit = spot.pen, spot.x, spot.y, spot.wide
        w, h = unit * 1.9, unit * 1.3
        body = _Spot(pen, x, y, w, h)
        pen.rounded_rectangle(body.box(-0.5, 0.12, 0.5, 0.62), radius=unit * 0.16, fill=paint)
        roof = [body.at(*corner) for corner in ((-0.34, 0.6), (-0.24, 1), (0.24, 1), (0.34, 0.6))]
        pen.polygon(roof, fill=paint)
        window = [(x + (px - x) * 0.8, y - h * 0.6 + (py - y + h * 0.6) * 0.8) for px, py in roof]
        pen.polygon(window, fill=(52, 64, 74))
        for side in (-1, 1):
            _Spot(pen, x + side * w * 0.36, y, unit, h).rectangle(-0.12, 0, 0.12, 0.2, (22, 22, 24))
            _Spot(pen, x + side * w * 0.4, y, unit, h).rectangle(-0.1, 0.38, 0.1, 0.5, (215, 40, 35))

    def _lookalike(self, nearness: float) -> None:
        kind = int(self._rng.integers(5))
        spot = self._place(nearness, roadside=kind != 0)
        orange = self._orange()
        if kind == 0:
            self._box_car(spot, orange)
        elif kind == 1:  # a red round sign
            spot.pole(2.0)
            spot.ellipse(-0.42, 1.56, 0.42, 2.4, (205, 35, 35))
            spot.ellipse(-0.28, 1.7, 0.28, 2.26, (240, 240, 240))
        elif kind == 2:  # a traffic light
            spot.pole(2.1)
            spot.rectangle(-0.2, 2.0, 0.2, 2.9, (30, 30, 32))
            red = ((220, 40, 35), (70, 60, 20), (20, 70, 30))
            amber = ((70, 20, 20), (240, 150, 40), (20, 70, 30))
            for k, lamp in enumerate(red if self._rng.random() < 0.5 else amber):
                left, top = spot.at(-0.12, 2.84 - 0.29 * k)
                spot.pen.ellipse((left, top, spot.x + spot.wide * 0.12, top + spot.wide * 0.24), fill=lamp)
        elif kind == 3:  # an orange box or bin on the pavement
            spot.rectangle(-0.3, 0, 0.3, 0.75, orange)
            spot.rectangle(-0.33, 0.72, 0.33, 0.82, (90, 60, 40))
        else:  # a yellow or orange square advertisement
            spot.pole(1.6)
            spot.rectangle(-0.5, 1.5, 0.5, 2.3, orange if self._rng.random() < 0.5 else (235, 200, 50))

    def _cone(self, nearness: float) -> None:
        spot = self._place(nearness)
        orange = self._orange()
        for k in range(int(self._rng.integers(1, 4))):
            unit = spot.wide * 0.95
            cone = _Spot(spot.pen, spot.x + k * spot.wide * 1.1, spot.y, unit, unit)
            cone.rectangle(-0.36, 0, 0.36, 0.1, _colour(channel * 0.8 for channel in orange))
            cone.polygon(((-0.26, 0.1), (0.26, 0.1), (0.05, 0.95), (-0.05, 0.95)), orange)
            cone.polygon(((-0.19, 0.36), (0.19, 0.36), (0.13, 0.58), (-0.13, 0.58)), (240, 240, 238))

    def _barrel(self, nearness: float) -> None:
        spot = self._place(nearness)
        spot.pen.rounded_rectangle(spot.box(-0.32, 0, 0.32, 1.05), radius=spot.wide * 0.08, fill=self._orange())
        for top in (0.85, 0.45):
            spot.rectangle(-0.32, top - 0.18, 0.32, top, (242, 242, 240))

    def _barrier(self, nearness: float) -> None:
        spot = self._place(nearness)
        w, top, bottom = spot.wide * 1.1, spot.y - spot.wide * 0.95, spot.y - spot.wide * 0.6
        red = (214, 42, 38) if self._rng.random() < 0.5 else _ORANGE[0]
        for side in (-0.8, 0.8):
            leg = _Spot(spot.pen, spot.x + side * w, spot.y, spot.wide, spot.wide)
            leg.rectangle(-0.06, 0, 0.06, 0.6, (95, 95, 98))
        spot.rectangle(-1.1, 0.6, 1.1, 0.95, (244, 244, 242))
        right, stripe = spot.x + w, spot.wide * 0.3
        for x in np.arange(spot.x - w, right - stripe, stripe * 2):
            corners = ((x, bottom), (x + stripe, bottom), (min(right, x + stripe * 1.6), top), (x + stripe * 0.6, top))
            spot.pen.polygon(corners, fill=red)

    def _diamond(self, nearness: float) -> None:
        spot = self._place(nearness, roadside=True)
        spot.pole(1.4)
        y, r = spot.y - spot.wide * 1.75, spot.wide * 0.62
        diamond = ((-1, 0), (0, 1), (1, 0), (0, -1))
        _Spot(spot.pen, spot.x, y, r, r).polygon(diamond, (20, 20, 20))
        sign = _Spot(spot.pen, spot.x, y, r * 0.88, r * 0.88)
        sign.polygon(diamond, self._orange())
        roof = [sign.at(-0.3, -0.25), sign.at(0, 0.35), sign.at(0.3, -0.25)]
        spot.pen.line(roof, fill=(25, 25, 25), width=max(1, int(spot.wide * 0.09)))
