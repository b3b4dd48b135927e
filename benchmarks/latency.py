"""From JPEG bytes to a decision: this package's base install beside transformers and torch, on the same backbone.

    python benchmarks/latency.py --backbone ../shared/weights/dinov2-small --photos ../shared/data/roadwork_scenes

Ours runs in a fresh virtual environment that has the base install and no torch (made here, or named by ``--python``):
``Cascade.pixels`` and ``Cascade.decide``, as ``stage1 predict`` calls them, on a bundle of the backbone with the tap at
``--tap`` and random heads, which need not have learned anything to be timed; of every ten requests seven are made to
exit. Theirs is ``Dinov2ForImageClassification`` in eager torch with its PIL processor, at the same input size. Both get
the same bytes and threads, one request at a time, turn about in random order, the other one idle meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from cascade import make_policy

from stage1_pro.commands.split import split
from stage1_pro.config import Config, ModelConfig
from stage1_pro.data.synthetic import render_pool
from stage1_pro.deploy.exporting import export
from stage1_pro.deploy.timing import ratios
from stage1_pro.models.model import create_model
from stage1_pro.training.checkpoint import save_model
from stage1_pro.training.run import write_config

ROOT = Path(__file__).resolve().parents[1]

OURS = """
import importlib.util, json, sys, time
import numpy as np
from stage1_pro.data.images import preprocess, read_image
from stage1_pro.deploy.cascade import Cascade
assert importlib.util.find_spec("torch") is None, "the base install must have no torch"
assert importlib.util.find_spec("transformers") is None
photos = [open(path, "rb").read() for path in json.loads(sys.argv[1])]
cascade = Cascade.load(sys.argv[2], threads=int(sys.argv[3]))
spec = cascade.bundle.preprocessing
print("ready", flush=True)
for line in sys.stdin:
    number, exits = json.loads(line)
    began = time.perf_counter()
    image = read_image(photos[number])
    decoded = time.perf_counter()
    pixels = preprocess(image, spec)[None]
    resized = time.perf_counter()
    cascade.decide(pixels, exited=np.array([exits]))
    done = time.perf_counter()
    print(json.dumps([decoded - began, resized - decoded, done - resized]), flush=True)
"""

THEIRS = """
import io, json, sys, time
import torch
from PIL import Image
from transformers import Dinov2ForImageClassification
try:
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil as Processor
except ImportError:
    from transformers import BitImageProcessor as Processor
photos = [open(path, "rb").read() for path in json.loads(sys.argv[1])]
side = int(sys.argv[4])
torch.set_num_threads(int(sys.argv[3]))
model = Dinov2ForImageClassification.from_pretrained(sys.argv[2], num_labels=2, dtype=torch.float32).eval()
# As facebook/dinov2-small's preprocessor_config.json has it, which the folder lacks.
processor = Processor(
    do_resize=True, size={"shortest_edge": round(side * 256 / 224)}, resample=3, do_center_crop=True,
    crop_size={"height": side, "width": side}, do_rescale=True, do_normalize=True, do_convert_rgb=True,
    image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
)
print("ready", flush=True)
for line in sys.stdin:
    number, _ = json.loads(line)
    began = time.perf_counter()
    image = Image.open(io.BytesIO(photos[number])).convert("RGB")
    decoded = time.perf_counter()
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    resized = time.perf_counter()
    with torch.inference_mode():
        model(pixel_values=pixels).logits.softmax(-1).numpy()
    done = time.perf_counter()
    print(json.dumps([decoded - began, resized - decoded, done - resized]), flush=True)
"""


class Side:
    """A process that answers one request a line, and says the seconds of its parts."""

    def __init__(self, python: Path, code: str, *arguments: str) -> None:
        clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self._process = subprocess.Popen(
            [str(python), "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean
        )
        if self._read() != "ready":
            raise SystemExit(f"a side did not start: {python}")

    def ask(self, number: int, *, exits: bool) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([number, exits]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def build_bundle(folder: Path, backbone: str, side: int, tap: int) -> Path:
    """A bundle of an untrained model on this backbone."""
    pool = render_pool(folder / "pool", 64, seed=0, size=64)
    run = folder / f"run{tap}"
    splits = split(pool, run)
    config = Config(model=ModelConfig(backbone=backbone, image_size=side, tap=tap))
    model = create_model(config.model, splits.classes, splits.positive, 0).eval()
    write_config(run, config, splits)
    save_model(run / "model_best.pth", model, model.state_dict(), split_hashes=splits.hashes)
    (run / "metrics.csv").write_text("epoch\n0\n", encoding="utf-8")
    make_policy(model, splits).write(run / "thresholds.json")
    return export(run)


def base_install(folder: Path) -> Path:
    """The Python of a fresh environment with this checkout's base install."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    constraints = str(ROOT / "constraints.txt")
    subprocess.run([str(python), "-m", "pip", "install", "-q", "-c", constraints, str(ROOT)], check=True)
    return python


def measure(ours: Side, theirs: Side, n_photos: int, rounds: int, exit_rate: float, seed: int) -> dict[str, Any]:
    """Seconds [rounds, 3] of decode, resize and model of each contestant."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[list[float]]] = {"cascade": [], "all deferred": [], "torch": []}
    for number in range(-5, rounds):
        # Exactly this share exits over the rounds.
        exits = int((number + 1) * exit_rate + 1e-9) > int(number * exit_rate + 1e-9)
        photo = int(rng.integers(n_photos))
        for name in rng.permutation(list(found)):
            # Idle threads of the side before spin for a moment, which must not be the next one's loss.
            time.sleep(0.01)
            side = theirs if name == "torch" else ours
            seconds = side.ask(photo, exits=exits and name == "cascade")
            if number >= 0:
                found[name].append(seconds)
    return {name: np.array(values) for name, values in found.items()}


def report(found: dict[str, Any], tap: int) -> str:
    """Rows of a Markdown table, and the ratios."""
    lines = [f"tap {tap}", "| | decode | resize | model | p50 | p90 | mean |", "|---|---|---|---|---|---|---|"]
    for name, seconds in found.items():
        total = 1e3 * seconds.sum(axis=1)
        parts = " | ".join(f"{value:.1f}" for value in 1e3 * np.median(seconds, axis=0))
        lines.append(
            f"| {name} | {parts} | {np.median(total):.1f} | {np.quantile(total, 0.9):.1f} | {total.mean():.1f} |"
        )
    for name in ("cascade", "all deferred"):
        values = ratios(found["torch"].sum(axis=1), found[name].sum(axis=1), paired=True)
        shown = {value.q: f"{value.ratio:.2f} [{value.low:.2f}, {value.high:.2f}]" for value in values}
        lines.append(f"torch over {name}: p50 {shown[0.5]}, mean {shown[None]}, p90 {shown.get(0.9, '-')}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", required=True, help="DINOv2 backbone folder")
    parser.add_argument("--photos", type=Path, required=True, help="folder of JPEGs")
    parser.add_argument("--size", type=int, default=224, help="input side in pixels")
    parser.add_argument("--tap", type=int, nargs="+", default=[6], help="blocks of Stage A, one bundle each")
    parser.add_argument("--exit-rate", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--python", type=Path, help="Python of an environment with the base install and no torch")
    parser.add_argument("--keep", type=Path, help="folder to leave run and environment in")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    photos = [str(path.resolve()) for path in sorted(options.photos.rglob("*.jp*g"))]
    chosen = np.random.default_rng(options.seed).permutation(photos)[:64].tolist()
    if not chosen:
        raise SystemExit(f"--photos must hold JPEGs, got none in {options.photos}")
    listed = json.dumps(chosen)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        python = options.python or base_install(folder / "venv")
        threads = str(options.threads)
        backbone = str(Path(options.backbone).resolve())
        theirs = Side(Path(sys.executable), THEIRS, listed, backbone, threads, str(options.size))
        for tap in options.tap:
            bundle = folder / f"run{tap}" / "bundle"
            if not bundle.is_dir():
                build_bundle(folder, options.backbone, options.size, tap)
            ours = Side(python, OURS, listed, str(bundle), threads)
            found = measure(ours, theirs, len(chosen), options.rounds, options.exit_rate, options.seed)
            ours.close()
            print(report(found, tap), flush=True)
        theirs.close()


if __name__ == "__main__":
    main()
