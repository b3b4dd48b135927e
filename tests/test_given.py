"""Predictions and names that people hand in: read where they are plain, else refused before they cost anything."""

from __future__ import annotations

import io
import json
import shutil
import struct
import time
import tracemalloc
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stage1_pro.classes import check_names, choose_positive, known_as, spelled
from stage1_pro.cli import main
from stage1_pro.commands.metrics import measure
from stage1_pro.data.given import read_arrays, read_predictions
from stage1_pro.data.splits import make_splits
from stage1_pro.errors import InputError
from stage1_pro.files import load_npz
from stage1_pro.training.calibration import file_rows

# ------------------------------------------------------------------------------------------ numbers


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "label;prob;confidence\n1;0,93;1,250\n0;0,07;0,5\n",
        'label,prob,confidence\n1,"0,93","1,25"\n0,"0,07",",5"\n',
        "label|prob|confidence\n1|,93|1,25e0\n0,0|,07|5,0e-1\n".replace("0,0|", "0|"),
        "label\tprob\tconfidence\n1\t0.93\t1.250\n0\t0.07\t0.5\n",
        "label;prob_0;prob_1;confidence\n1;0,07;0,93;1,25\n0;0,93;0,07;0,5\n",
    ],
)
def test_decimal_commas_are_read_where_they_can_be_nothing_else(tmp_path: Path, text: str) -> None:
    path = table(tmp_path / "p.csv", text)
    found = read_predictions(path)
    assert found.answers.probs[:, 1].tolist() == [0.93, 0.07]  # type: ignore[union-attr]
    assert found.confidence is not None and found.confidence.tolist() == [1.25, 0.5]
    assert read_arrays(path)["probs"][:, 1].tolist() == [0.93, 0.07]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("label;prob;confidence\n1;0,93;1.5\n", "numbers must be written one way, got '0,93' beside '1.5' in row 1"),
        ("error;confidence\n1;1\n0;1,234\n", "told from thousands, got '1,234', .* in row 2 .*decimal point"),
        ("label;prob;confidence\n1;0,93;1,234,567\n", "confidence must be a number, got '1,234,567' in row 1"),
        ("label,prob\n1,0,93\n", "2 cells in every row.*got 3 in line 2"),
        ("label;prob\n1;1_0\n", "prob must be a number, got '1_0' in row 1"),
        ("label;prob\n1;93%\n", "prob must be a number, got '93%' in row 1"),
    ],
)
def test_numbers_that_may_mean_two_things_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = table(tmp_path / "p.csv", text)
    for read in (read_predictions, read_arrays):
        with pytest.raises(InputError, match=message):
            read(path)


def rows(n: int = 400) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, n)
    return np.round(1 / (1 + np.exp(-6 * (labels - 0.5) + rng.normal(size=n))), 6), labels


def test_a_csv_calibrates_as_its_npz_does(tmp_path: Path) -> None:
    share, labels = rows()
    names = np.array(["none", "cone"])
    halves = np.where(np.arange(labels.size) % 4 < 2, "fit", "certify")
    groups = np.array([f"clip {i // 2}" for i in range(labels.size)])
    np.savez(tmp_path / "p.npz", probs=share, labels=labels, classes=names, groups=groups, half=halves)
    lines = [
        f"{names[y]};{p};{g};{h}".replace(".", ",") for y, p, g, h in zip(labels, share, groups, halves, strict=True)
    ]
    table(tmp_path / "p.csv", "Label;score;group;half\n" + "\n".join(lines) + "\n")
    aim = ["--policy", "softmax", "--fnr", ".2"]
    assert main(["calibrate", "--logits", str(tmp_path / "p.npz"), "--out", str(tmp_path / "a"), *aim]) == 0
    given = ["calibrate", "--logits", str(tmp_path / "p.csv"), "--out", str(tmp_path / "b"), *aim]
    assert main(given) == 2
    assert main([*given, "--columns", "prob=score"]) == 0
    ours, theirs = (json.loads((tmp_path / name / "thresholds.json").read_text()) for name in "ab")
    assert ours.pop("split_hashes") != theirs.pop("split_hashes") and ours == theirs
    plan = ["plan", "--policy", "softmax", "--alpha", ".2", "--seed", "1", "--logits"]
    assert main([*plan, str(tmp_path / "p.csv"), "--columns", "prob=score"]) == main([*plan, str(tmp_path / "p.npz")])
    with pytest.raises(InputError, match="a policy needs label and prob"):
        read_arrays(table(tmp_path / "e.csv", "error,confidence\n1,.5\n"))
    with pytest.raises(InputError, match="--columns must go with a CSV"):
        read_arrays(tmp_path / "p.npz", columns={"prob": "score"})


# ------------------------------------------------------------------------------------------ arrays


def npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header(shape: str, descr: str = "'<f8'") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def archive(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as opened:
        for name, data in members:
            opened.writestr(name, data)
    return path


LABELS = ("labels.npy", npy(np.array([0, 1])))
HALF = ("probs.npy", npy(np.array([0.2, 0.8])))


def zeros(path: Path) -> Path:
    """A small zip of 400 MB of zeros that are what their header says."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as opened,
        opened.open("probs.npy", "w") as file,
    ):
        file.write(header("(50000000,)"))
        for _ in range(25):
            file.write(bytes(16_000_000))
    return path


def sparse(path: Path) -> Path:
    """A file of 20 GB that takes no disk."""
    archive(path, [LABELS, HALF])
    data = path.read_bytes()
    path.write_bytes(b"")
    with path.open("rb+") as file:
        file.truncate(20 * 10**9)
        file.seek(20 * 10**9)
        file.write(data)
    return path


def directory(path: Path) -> Path:
    """A zip of 40,000 members, whose directory is larger than all that they hold."""
    return archive(path, [(f"{number:040}.npy", b"") for number in range(40_000)])


def cut(path: Path) -> Path:
    archive(path, [LABELS, HALF])
    path.write_bytes(path.read_bytes()[:-40])
    return path


def damaged(path: Path) -> Path:
    data = archive(path, [LABELS, HALF]).read_bytes()
    path.write_bytes(data.replace(npy(np.array([0.2, 0.8]))[-16:], bytes(16)))
    return path


STRUCTURED = np.zeros(2, dtype=[("a", "f8"), ("b", "i4")])
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "zeros": (zeros, "unpack to more than"),
    "directory": (directory, "a part of more than"),
    "cut": (cut, "npz file"),
    "damaged": (damaged, "CRC"),
    "huge shape": (lambda path: archive(path, [LABELS, ("probs.npy", header("(10**15,)"))]), "npz file"),
    "large shape": (lambda path: archive(path, [LABELS, ("probs.npy", header("(1000000000000,)"))]), "another size"),
    "negative": (
        lambda path: archive(path, [LABELS, ("probs.npy", header("(-2,)") + bytes(16))]),
        "something else|shape",
    ),
    "twice": (lambda path: archive(path, [LABELS, ("probs", HALF[1]), HALF]), "two arrays of the name"),
    "many": (lambda path: archive(path, [LABELS, *((f"a{i}.npy", HALF[1]) for i in range(300))]), "more than 256"),
    "structured": (lambda path: archive(path, [("labels.npy", npy(STRUCTURED)), HALF]), "something else than"),
    "objects": (
        lambda path: archive(path, [("labels.npy", npy(np.array([0, "x"], dtype=object))), HALF]),
        "something else than",
    ),
    "deep": (lambda path: archive(path, [LABELS, ("probs.npy", header("(" * 90 + ")" * 90))]), "npz file"),
    "no array": (lambda path: archive(path, [LABELS, HALF, ("readme.txt", b"hello")]), "npz file"),
    "lzma": (lambda path: archive(path, [LABELS, HALF], zipfile.ZIP_LZMA), "another way than deflate"),
    "empty": (lambda path: (path.write_bytes(b""), path)[1], "npz file"),
    "single": (lambda path: (path.write_bytes(HALF[1]), path)[1], "a single array"),
    "folder": (lambda path: (path.mkdir(), path)[1], "no plain file"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused_before_they_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    make, message = HOSTILE[kind]
    path = make(tmp_path / "p.npz")
    tracemalloc.start()
    with pytest.raises(InputError, match=message):
        load_npz(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20
    for arguments in (["metrics", str(path)], ["calibrate", "--logits", str(path), "--rows-independent"]):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said


def test_a_sparse_file_is_refused_unread(tmp_path: Path) -> None:
    # Nobody reads the hole: the archive begins behind it.
    with pytest.raises(InputError, match="npz file"):
        load_npz(sparse(tmp_path / "p.npz"))


def test_what_is_larger_than_stated_is_refused_and_what_is_not_is_read(tmp_path: Path) -> None:
    arrays = {
        "probs": np.random.default_rng(0).random((1000, 10)),
        "ids": np.array(["ä" * 200, "b"]),
        "one": np.array(3),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "p.npz", **arrays)  # type: ignore[arg-type]
        found = load_npz(tmp_path / "p.npz")
        assert list(found) == list(arrays)
        assert all(np.array_equal(found[name], array) and found[name].flags.writeable for name, array in arrays.items())
        with pytest.raises(InputError, match="1,000 are the most"):
            load_npz(tmp_path / "p.npz", most=1000)


@pytest.mark.parametrize("door", ["metrics", "calibrate"])
def test_classes_of_another_shape_are_told_by_their_shape(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], door: str
) -> None:
    np.savez(tmp_path / "p.npz", labels=[0, 1], probs=np.eye(2), classes=np.zeros((10**6, 2)))
    begun = time.process_time()
    given = {"metrics": ["metrics"], "calibrate": ["calibrate", "--rows-independent", "--logits"]}[door]
    assert main([*given, str(tmp_path / "p.npz")]) == 2
    assert "got shape [1000000, 2]" in capsys.readouterr().err
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("door", ["metrics", "calibrate", "csv"])
def test_a_hundred_thousand_classes_are_no_classes(tmp_path: Path, door: str) -> None:
    count = 100_000
    np.savez(tmp_path / "p.npz", labels=[0], probs=np.full((1, count), 1 / count))
    text = ",".join(f"prob_c{number}" for number in range(count))
    table(tmp_path / "p.csv", f"label,{text}\nc1,1{',0' * (count - 1)}\n")
    work: dict[str, Callable[[], object]] = {
        "metrics": lambda: measure(tmp_path / "p.npz"),
        "calibrate": lambda: file_rows(tmp_path / "p.npz", load_npz(tmp_path / "p.npz"), "softmax"),
        "csv": lambda: measure(tmp_path / "p.csv"),
    }
    with pytest.raises(InputError, match="classes must be at most 10,000, got 100,000"):
        work[door]()


# ------------------------------------------------------------------------------------------ names

UNFIT = {
    "a|b": "whose .* stands between",
    "x\x1b[31m": "does not print",
    "b\u202ea": "does not print",
    "no\u00a0break": "does not print",
    "l" * 201: "with 201",
    "wo\u200brk": "does not print",
}


def photos(folder: Path, name: str) -> Path:
    for label in ("none", name):
        for number in range(5):
            path = folder / "set" / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            seed = number + 10 * (label == "none")
            noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    return folder / "set"


@pytest.mark.parametrize("name", UNFIT)
def test_a_name_that_no_bundle_holds_is_refused_at_every_door(tmp_path: Path, name: str) -> None:
    """At the first one, so that no training is for nothing."""
    share, labels = rows(40)
    names = np.array(["none", name])
    np.savez(tmp_path / "p.npz", probs=share, labels=labels, classes=names)
    quoted = name.replace('"', '""')
    split = table(tmp_path / "s.csv", f'file,label\na.png,none\nb.png,"{quoted}"\n')
    named = table(tmp_path / "n.csv", f'file,label,label_name\na.png,0,none\nb.png,1,"{quoted}"\n')
    plain = table(tmp_path / "t.csv", "file,label\na.png,0\nb.png,1\n")
    one = table(tmp_path / "one.csv", f'label,prob\nnone,.1\n"{quoted}",.9\n')
    wide = table(tmp_path / "wide.csv", f'label,prob_none,"prob_{quoted}"\nnone,.5,.5\n')
    arrays = load_npz(tmp_path / "p.npz")
    doors: dict[str, Callable[[], object]] = {
        "split": lambda: make_splits(split, positive="none"),
        "label_name": lambda: make_splits(named, positive="none"),
        "--classes": lambda: make_splits(plain, classes=["none", name], positive="none"),
        "metrics": lambda: measure(one, positive="none"),
        "metrics wide": lambda: measure(wide),
        "metrics npz": lambda: measure(tmp_path / "p.npz"),
        "calibrate csv": lambda: read_arrays(one, positive="none"),
        "calibrate npz": lambda: file_rows(tmp_path / "p.npz", arrays, "softmax"),
        "calibrate --classes": lambda: file_rows(
            tmp_path / "p.npz", {k: v for k, v in arrays.items() if k != "classes"}, "softmax", ["none", name]
        ),
    }
    if "\0" not in name and len(name) < 200:
        folder = photos(tmp_path, name)
        doors["folder"] = lambda: make_splits(folder, positive="none")
    for door in doors.values():
        with pytest.raises(InputError, match=f"names of 1 to 200 characters.*{UNFIT[name]}") as error:
            door()
        assert str(error.value).isprintable()


def test_a_class_with_a_bar_of_an_older_bundle_still_opens(tiny: Path, tmp_path: Path) -> None:
    from kit.tiny import rehash

    from stage1_pro.deploy.bundle import load_bundle
    from stage1_pro.errors import ArtifactError

    for name, opens in (("a|b", True), ("x\u200bx", False)):
        bundle = tmp_path / name
        shutil.copytree(tiny / "bundle", bundle)
        for path in bundle.glob("*.json"):
            text = path.read_text().replace('"none"', f'"{name}"')
            path.write_text(text.replace(f'"guarantee": "{name}"', '"guarantee": "none"'))
            if path.name != "bundle.json":
                rehash(bundle, path.name)
        if opens:
            assert load_bundle(bundle).classes == [name, "roadwork"]
        else:
            with pytest.raises(ArtifactError, match="does not print"):
                load_bundle(bundle)


@given(st.text(max_size=12))
def test_spelling_is_one_rule(text: str) -> None:
    plain = spelled(text)
    assert spelled(plain) == plain == unicodedata.normalize("NFC", plain).strip()
    forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
    assert spelled(forms[0]) == spelled(forms[1])
    if plain:
        assert known_as(forms[1], [plain]) == plain and known_as(f" {text} ", [plain, plain + "x"]) == plain


@pytest.mark.parametrize(
    ("one", "other"),
    [("Work", "work"), ("stop sign", "stopsign"), ("a  b", "a b"), ("1", "01"), ("+1", "1"), ("STRASSE", "straße"),
     ("ｗｏｒｋ", "work"), ("7.", "007")],
)  # fmt: skip
def test_labels_that_nobody_tells_apart_are_refused_by_name(tmp_path: Path, one: str, other: str) -> None:
    path = table(tmp_path / "t.csv", f"file,label\na.png,{one}\nb.png,{other}\nc.png,none\n")
    with pytest.raises(InputError, match="spelled one way each, got .* and .*--classes"):
        make_splits(path, positive="none")
    if spelled(one) == one:
        # Listed, they are two; what is wrong now are the files, which are not there.
        with pytest.raises(InputError, match="must be readable"):
            make_splits(path, positive="none", classes=["none", one, other])
        check_names([one, other], stated=True)
    with pytest.raises(InputError, match="spelled one way"):
        measure(table(tmp_path / "p.csv", f"label,prob\n{one},.5\n{other},.4\n"), positive=one)


def test_one_and_the_same_spelled_otherwise_is_one(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "Größe") for form in ("NFC", "NFD"))
    path = table(tmp_path / "p.csv", f"label,prob_{decomposed},prob_1.0\n {composed},.8,.2\n1,.3,.7\n")
    found = read_predictions(path, positive=decomposed)
    assert found.answers.classes == [composed, "1"] and found.positive == composed  # type: ignore[union-attr]
    assert choose_positive(["0.0", "1.0"], "1") == "1.0"
    assert known_as("1", ["1.0", "1.", "x"]) is None
