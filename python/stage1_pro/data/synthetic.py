"""Rendered street scenes with labels: the demo's embedded data and a synthetic pool.

``roadwork`` shows one to several cones, barrels, barriers or diamond signs on or beside the road; ``none`` shows the
same streets with things that look alike: orange cars and awnings, red round signs, traffic lights, brick walls,
delivery boxes. Scenes come in clips of one to three frames, the unit that must not be split.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from stage1_pro.errors import InputError
from stage1_pro.files import atomic_directory, write_csv
from stage1_pro.progress import track

Colour = tuple[int, int, int]
Draw = ImageDraw.ImageDraw
Thing = Callable[[Draw, float], None]

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
                buffer = io.BytesIO()
                scene.frame(frame).save(buffer, "JPEG", quality=90)
                (folder / name).write_bytes(buffer.getvalue())
                rows.append(
                    {
                        "file": name,
                        "label": int(scene.roadwork),
                        "label_name": "roadwork" if scene.roadwork else "none",
                        "group": f"clip_{clip:05d}",
                        "source": scene.light,
                    }
                )
            clip += 1
        next(progress, None)  # to its end, which takes the bar away
        write_csv(folder / "labels.csv", rows, ["file", "label", "label_name", "group", "source"])
    return out / "labels.csv"


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
        draw = ImageDraw.Draw(image)
        self.horizon = side * rng.uniform(0.36, 0.5)
        self.vanish = side * rng.uniform(0.35, 0.65)
        self._sky(draw)
        self._buildings(draw)
        self._road(draw)
        items: list[Thing] = []
        for thing, most in ((self._tree, 4), (self._car, 4), (self._lookalike, 4), (self._lamp, 3)):
            items += [thing] * int(rng.integers(0, most))
        first: Thing | None = None
        if self.roadwork:
            first, *more = self._roadwork_items()
            items += more
        # Far things first, so that near ones cover them.
        placed = sorted(
            ((float(rng.beta(1.2, 2.0)), k, draw_item) for k, draw_item in enumerate(items)), key=lambda x: x[:2]
        )
        for nearness, _, draw_item in placed:
            draw_item(draw, nearness)
        if first is not None:  # the one that makes the label true: in every frame, behind nothing
            self._inside = True
            first(draw, 0.15 + 0.85 * float(rng.beta(2.2, 1.4)))
        return image

    def _roadwork_items(self) -> list[Thing]:
        kinds = (self._cone, self._cone, self._barrel, self._barrier, self._diamond)
        first = kinds[int(self._rng.integers(len(kinds)))]
        others = [kinds[int(self._rng.integers(len(kinds)))] for _ in range(int(self._rng.integers(0, 3)))]
        return [first, *([first] * int(self._rng.integers(0, 3))), *others]

    # ---------------------------------------------------------------------------- backdrop

    def _sky(self, draw: Draw) -> None:
        top = np.array([self._rng.integers(90, 190), self._rng.integers(140, 210), self._rng.integers(200, 250)])
        for y in range(0, int(self.horizon) + 1, _SCALE):
            share = y / self.horizon
            colour = tuple(int(v) for v in top * (1 - 0.3 * share) + 70 * share)
            draw.rectangle((0, y, self._side, y + _SCALE), fill=colour)

    def _buildings(self, draw: Draw) -> None:
        rng, x = self._rng, -self._side * 0.1
        while x < self._side:
            width, height = self._side * rng.uniform(0.1, 0.28), self._side * rng.uniform(0.06, 0.34)
            brick = rng.random() < 0.3
            base = (150, 78, 58) if brick else tuple(int(v) for v in rng.integers(90, 200) + rng.integers(-18, 18, 3))
            draw.rectangle((x, self.horizon - height, x + width, self.horizon), fill=base)
            dark = tuple(int(v * 0.6) for v in base)
            step = self._side * 0.045
            for wx in np.arange(x + step * 0.4, x + width - step * 0.6, step):
                for wy in np.arange(self.horizon - height + step * 0.4, self.horizon - step * 0.6, step):
                    draw.rectangle((wx, wy, wx + step * 0.5, wy + step * 0.55), fill=dark)
            if rng.random() < 0.25:  # an awning over a shop, orange now and then
                fill = (
                    _ORANGE[int(rng.integers(3))]
                    if rng.random() < 0.5
                    else tuple(int(v) for v in rng.integers(60, 220, 3))
                )
                y = self.horizon - step
                draw.polygon(
                    ((x, y), (x + width, y), (x + width * 0.95, y + step * 0.6), (x + width * 0.05, y + step * 0.6)),
                    fill=fill,
                )
            x += width * rng.uniform(0.9, 1.3)

    def _road(self, draw: Draw) -> None:
        rng, side = self._rng, self._side
        ground = tuple(
            int(v) for v in ((95, 120, 70) if rng.random() < 0.5 else (150, 145, 140)) + rng.integers(-12, 12, 3)
        )
        draw.rectangle((0, self.horizon, side, side), fill=ground)
        grey = int(rng.integers(75, 120))
        self.road = side * rng.uniform(0.45, 0.8)
        edge = self.vanish - side * 0.03, self.vanish + side * 0.03
        centre = side * 0.5
        draw.polygon(
            ((edge[0], self.horizon), (edge[1], self.horizon), (centre + self.road, side), (centre - self.road, side)),
            fill=(grey, grey, grey + 4),
        )
        line = (225, 222, 205) if rng.random() < 0.7 else (225, 185, 60)
        for k in range(9):
            a, b = (k / 9) ** 1.6, ((k + 0.5) / 9) ** 1.6
            ya, yb = (self.horizon + (side - self.horizon) * v for v in (a, b))
            xa, xb = (self.vanish + (centre - self.vanish) * v for v in (a, b))
            wa, wb = (side * 0.004 + side * 0.016 * v for v in (a, b))
            draw.polygon(((xa - wa, ya), (xa + wa, ya), (xb + wb, yb), (xb - wb, yb)), fill=line)

    # ---------------------------------------------------------------------------- things

    def _place(self, nearness: float, *, roadside: bool = False) -> tuple[float, float, float]:
        """(x, y of the foot, scale in pixels of a one-metre thing) for a nearness 0 (far) .. 1."""
        depth = 0.06 + 0.85 * nearness
        y = self.horizon + (self._side - self.horizon) * depth
        centre = self.vanish + (self._side * 0.5 - self.vanish) * depth
        half = self.road * depth
        offset = (
            self._rng.uniform(1.02, 1.5) * self._rng.choice([-1, 1]) if roadside else self._rng.uniform(-1.15, 1.15)
        )
        x, unit = centre + half * offset, self._side * (0.02 + 0.19 * depth)
        if self._inside:
            x = min(max(x, self._side * 0.2), self._side * 0.8)
            y = min(y, self._side * 0.88)
        return x, y, unit

    def _tree(self, draw: Draw, nearness: float) -> None:
        x, y, unit = self._place(nearness, roadside=True)
        draw.rectangle((x - unit * 0.12, y - unit * 1.6, x + unit * 0.12, y), fill=(92, 66, 44))
        for _ in range(4):
            dx, dy, r = self._rng.uniform(-0.5, 0.5), self._rng.uniform(1.5, 2.6), self._rng.uniform(0.45, 0.8)
            green = (int(self._rng.integers(30, 80)), int(self._rng.integers(90, 140)), 45)
            draw.ellipse(
                (x + (dx - r) * unit, y - (dy + r) * unit, x + (dx + r) * unit, y - (dy - r) * unit), fill=green
            )

    def _lamp(self, draw: Draw, nearness: float) -> None:
        x, y, unit = self._place(nearness, roadside=True)
        draw.rectangle((x - unit * 0.05, y - unit * 3.2, x + unit * 0.05, y), fill=(70, 70, 74))
        draw.rectangle((x - unit * 0.05, y - unit * 3.2, x + unit * 0.6, y - unit * 3.1), fill=(70, 70, 74))

    def _car(self, draw: Draw, nearness: float) -> None:
        x, y, unit = self._place(nearness)
        paint = (
            _ORANGE[int(self._rng.integers(3))]
            if self._rng.random() < 0.2
            else tuple(int(v) for v in self._rng.integers(20, 235, 3))
        )
        self._box_car(draw, x, y, unit, paint)

    def _box_car(self, draw: Draw, x: float, y: float, unit: float, paint: tuple[int, ...]) -> None:
        w, h = unit * 1.9, unit * 1.3
        draw.rounded_rectangle((x - w / 2, y - h * 0.62, x + w / 2, y - h * 0.12), radius=unit * 0.16, fill=paint)
        roof = ((x - w * 0.34, y - h * 0.6), (x - w * 0.24, y - h), (x + w * 0.24, y - h), (x + w * 0.34, y - h * 0.6))
        draw.polygon(roof, fill=paint)
        draw.polygon(
            [(x + (px - x) * 0.8, y - h * 0.6 + (py - y + h * 0.6) * 0.8) for px, py in roof], fill=(52, 64, 74)
        )
        for side in (-1, 1):
            draw.rectangle(
                (x + side * w * 0.36 - unit * 0.12, y - h * 0.2, x + side * w * 0.36 + unit * 0.12, y),
                fill=(22, 22, 24),
            )
            draw.rectangle(
                (x + side * w * 0.4 - unit * 0.1, y - h * 0.5, x + side * w * 0.4 + unit * 0.1, y - h * 0.38),
                fill=(215, 40, 35),
            )

    def _lookalike(self, draw: Draw, nearness: float) -> None:
        kind = int(self._rng.integers(5))
        x, y, unit = self._place(nearness, roadside=kind != 0)
        orange = _ORANGE[int(self._rng.integers(3))]
        if kind == 0:
            self._box_car(draw, x, y, unit, orange)
        elif kind == 1:  # a red round sign
            self._pole(draw, x, y, unit, 2.0)
            draw.ellipse((x - unit * 0.42, y - unit * 2.4, x + unit * 0.42, y - unit * 1.56), fill=(205, 35, 35))
            draw.ellipse((x - unit * 0.28, y - unit * 2.26, x + unit * 0.28, y - unit * 1.7), fill=(240, 240, 240))
        elif kind == 2:  # a traffic light
            self._pole(draw, x, y, unit, 2.1)
            draw.rectangle((x - unit * 0.2, y - unit * 2.9, x + unit * 0.2, y - unit * 2.0), fill=(30, 30, 32))
            lamps = (
                ((220, 40, 35), (70, 60, 20), (20, 70, 30))
                if self._rng.random() < 0.5
                else ((70, 20, 20), (240, 150, 40), (20, 70, 30))
            )
            for k, lamp in enumerate(lamps):
                top = y - unit * (2.84 - 0.29 * k)
                draw.ellipse((x - unit * 0.12, top, x + unit * 0.12, top + unit * 0.24), fill=lamp)
        elif kind == 3:  # an orange box or bin on the pavement
            draw.rectangle((x - unit * 0.3, y - unit * 0.75, x + unit * 0.3, y), fill=orange)
            draw.rectangle((x - unit * 0.33, y - unit * 0.82, x + unit * 0.33, y - unit * 0.72), fill=(90, 60, 40))
        else:  # a yellow or orange square advertisement
            self._pole(draw, x, y, unit, 1.6)
            fill = orange if self._rng.random() < 0.5 else (235, 200, 50)
            draw.rectangle((x - unit * 0.5, y - unit * 2.3, x + unit * 0.5, y - unit * 1.5), fill=fill)

    def _pole(self, draw: Draw, x: float, y: float, unit: float, height: float) -> None:
        draw.rectangle((x - unit * 0.05, y - unit * height, x + unit * 0.05, y), fill=(120, 120, 122))

    def _cone(self, draw: Draw, nearness: float) -> None:
        x, y, unit = self._place(nearness)
        orange = _ORANGE[int(self._rng.integers(3))]
        for k in range(int(self._rng.integers(1, 4))):
            cx, u = x + k * unit * 1.1, unit * 0.95
            draw.rectangle((cx - u * 0.36, y - u * 0.1, cx + u * 0.36, y), fill=tuple(int(v * 0.8) for v in orange))
            draw.polygon(
                (
                    (cx - u * 0.26, y - u * 0.1),
                    (cx + u * 0.26, y - u * 0.1),
                    (cx + u * 0.05, y - u * 0.95),
                    (cx - u * 0.05, y - u * 0.95),
                ),
                fill=orange,
            )
            draw.polygon(
                (
                    (cx - u * 0.19, y - u * 0.36),
                    (cx + u * 0.19, y - u * 0.36),
                    (cx + u * 0.13, y - u * 0.58),
                    (cx - u * 0.13, y - u * 0.58),
                ),
                fill=(240, 240, 238),
            )

    def _barrel(self, draw: Draw, nearness: float) -> None:
        x, y, unit = self._place(nearness)
        orange = _ORANGE[int(self._rng.integers(3))]
        draw.rounded_rectangle((x - unit * 0.32, y - unit * 1.05, x + unit * 0.32, y), radius=unit * 0.08, fill=orange)
        for top in (0.85, 0.45):
            draw.rectangle(
                (x - unit * 0.32, y - unit * top, x + unit * 0.32, y - unit * (top - 0.18)), fill=(242, 242, 240)
            )

    def _barrier(self, draw: Draw, nearness: float) -> None:
        x, y, unit = self._place(nearness)
        w, top, bottom = unit * 1.1, y - unit * 0.95, y - unit * 0.6
        red = (214, 42, 38) if self._rng.random() < 0.5 else _ORANGE[0]
        for side in (-0.8, 0.8):
            draw.rectangle((x + side * w - unit * 0.06, bottom, x + side * w + unit * 0.06, y), fill=(95, 95, 98))
        draw.rectangle((x - w, top, x + w, bottom), fill=(244, 244, 242))
        stripe = unit * 0.3
        for sx in np.arange(x - w, x + w - stripe, stripe * 2):
            draw.polygon(
                ((sx, bottom), (sx + stripe, bottom), (min(x + w, sx + stripe * 1.6), top), (sx + stripe * 0.6, top)),
                fill=red,
            )

    def _diamond(self, draw: Draw, nearness: float) -> None:
        x, y, unit = self._place(nearness, roadside=True)
        self._pole(draw, x, y, unit, 1.4)
        cy, r = y - unit * 1.75, unit * 0.62
        draw.polygon(((x - r, cy), (x, cy - r), (x + r, cy), (x, cy + r)), fill=(20, 20, 20))
        r *= 0.88
        draw.polygon(((x - r, cy), (x, cy - r), (x + r, cy), (x, cy + r)), fill=_ORANGE[int(self._rng.integers(3))])
        draw.line(
            (x - r * 0.3, cy + r * 0.25, x, cy - r * 0.35, x + r * 0.3, cy + r * 0.25),
            fill=(25, 25, 25),
            width=max(1, int(unit * 0.09)),
        )
