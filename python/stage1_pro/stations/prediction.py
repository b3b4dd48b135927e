"""predict: a bundle's answer for images, folders and CSV files. Needs no torch."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stage1_pro.artifacts import write_csv
from stage1_pro.data.images import SUFFIXES, ImageError
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.errors import InputError
from stage1_pro.progress import say, track

COLUMNS = ("file", "label", "probability", "confidence", "decision", "stage", "error")


def predict(
    bundle: Path | str,
    inputs: Sequence[Path | str],
    *,
    out: Path | str | None = None,
    batch_size: int = 32,
    runtime: str = "onnxruntime",
) -> tuple[list[dict[str, Any]], int]:
    """Answer for every image of the inputs, in order; an unreadable one gets an error and the others go on.

    Args:
        bundle: bundle folder.
        inputs: images, folders (searched through, in name order) and CSV files with a ``file`` column
            (relative to the CSV's folder).
        out: CSV to write, atomically.
        batch_size: images per batch.
        runtime: what executes the stages.

    Returns:
        A row per image with ``COLUMNS`` as keys, and how many failed. ``probability`` is P(positive) and
        ``confidence`` the largest probability of the stage that answered; ``decision`` is ``exited``,
        ``deferred``, or ``abstained`` when the model gave no number; what a row lacks is None.

    Raises:
        InputError: an input does not exist, is of no known kind, or nothing is in it.
        ArtifactError: the bundle is damaged.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be 1 or more, got {batch_size}")
    if out is not None and Path(out).is_dir():
        raise InputError(f"--out must be a CSV file to write, got the folder {out}")
    files = gather(inputs)
    cascade = Cascade.load(bundle, runtime)
    rows: list[dict[str, Any]] = []
    for chunk in _chunks(files, batch_size):
        rows += _answer(cascade, chunk)
    failures = sum(row["error"] is not None for row in rows)
    if out is not None:
        write_csv(out, rows, COLUMNS)
        say(f"wrote {out}")
    if failures:
        say(f"{failures} of {len(rows)} images could not be answered; see the column error")
    return rows, failures


def gather(inputs: Sequence[Path | str]) -> list[tuple[str, Path]]:
    """Name to show and path of every image of the inputs, in order; raises InputError."""
    files: list[tuple[str, Path]] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not found:
                raise InputError(f"inputs must hold images, got {path} with none ({' '.join(sorted(SUFFIXES))})")
            files += [(str(p), p) for p in found]
        elif not path.exists():
            raise InputError(f"inputs must exist, got {path}, and there is no such file or folder")
        elif path.suffix.lower() == ".csv":
            files += _listed(path)
        else:
            files.append((str(path), path))
    if not files:
        raise InputError("inputs must name at least one image, folder or CSV file, got none")
    return files


def render(rows: Sequence[dict[str, Any]], out: Path | str | None = None) -> str:
    """Lines for people: a row an image, or where the CSV is and what is in it."""
    counts = {kind: sum(row["decision"] == kind for row in rows) for kind in ("exited", "deferred", "abstained")}
    failed = sum(row["decision"] is None for row in rows)
    summary = (
        f"{len(rows)} images: {counts['exited']} exited at Stage A, {counts['deferred']} deferred to Stage B, "
        f"{counts['abstained']} abstained, {failed} unreadable"
    )
    if out is not None:
        return f"{summary}; wrote {out}"
    width = max((len(row["file"]) for row in rows), default=4)
    names = max([5, *(len(row["label"] or "") for row in rows)])
    lines = [f"{'file':<{width}}  {'label':<{names}}  probability  confidence  decision   stage"]
    for row in rows:
        if row["error"] is not None:
            lines.append(f"{row['file']:<{width}}  {row['error']}")
        else:
            lines.append(
                f"{row['file']:<{width}}  {row['label']:<{names}}  {row['probability']:>11.4f}  "
                f"{row['confidence']:>10.4f}  {row['decision']:<9}  {row['stage']}"
            )
    return "\n".join([*lines, summary])


def _listed(path: Path) -> list[tuple[str, Path]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if "file" not in (reader.fieldnames or ()):
                raise InputError(
                    f"{path} must have a column 'file', got {', '.join(reader.fieldnames or ()) or 'an empty file'}"
                )
            names = [row["file"] or "" for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} must be a readable UTF-8 CSV, got: {error}") from None
    if not names:
        raise InputError(f"{path} must list at least one image, got none")
    return [(name, path.parent / name) for name in names]


def _chunks(files: list[tuple[str, Path]], size: int) -> Iterator[list[tuple[str, Path]]]:
    """Parts of the list behind a progress bar that counts images."""
    chunk: list[tuple[str, Path]] = []
    for item in track(files, "predict", len(files)):
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _answer(cascade: Cascade, chunk: list[tuple[str, Path]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    pixels = []
    for name, path in chunk:
        row: dict[str, Any] = dict.fromkeys(COLUMNS)
        row["file"] = name
        rows.append(row)
        try:
            pixels.append(cascade.pixels(path))
        except ImageError as error:
            row["error"] = f"{error.reason}: {error.detail}"
    if not pixels:
        return rows
    answers = iter(cascade.decide(np.stack(pixels)))
    for row in rows:
        if row["error"] is not None:
            continue
        answer = next(answers)
        if math.isnan(answer["prob"]):
            row["decision"] = "abstained"
            row["error"] = "the model gave no number for this image"
            continue
        row["label"] = answer["label"]
        row["probability"] = answer["prob"]
        row["confidence"] = answer["confidence"]
        row["decision"] = "exited" if answer["exited"] else "deferred"
        row["stage"] = answer["stage"]
    return rows
