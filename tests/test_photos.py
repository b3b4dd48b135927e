"""Photos in a folder, a tar or a source from outside: the same photos give the same splits, batches and answers."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
import tarfile
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stage1_pro.cli import main
from stage1_pro.data.images import ImageError, PreprocessSpec, read_image
from stage1_pro.data.labels import gather, left_out
from stage1_pro.data.photos import Folder, Passed, Photo, Photos, Tar, look, open_photos
from stage1_pro.data.pool import read_pool
from stage1_pro.data.splits import Splits, make_splits
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.deploy.prediction import predict
from stage1_pro.errors import InputError
from stage1_pro.files import sha256_bytes, sha256_file

SPEC = PreprocessSpec(height=48, width=48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """60 pictures of two classes, at two depths, and what is no picture."""
    root = tmp_path_factory.mktemp("photos") / "signs"
    rng = np.random.default_rng(0)
    for k in range(60):
        place = root / ("none", "work")[k % 2] / ("", "deep")[k % 3 == 0]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8) // 2 + 90 * (k % 2)
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).save(place / f"p{k:02d}.png")
    (root / "work" / "notes ä.txt").write_text("not a picture")
    (root / "work" / ".DS_Store").write_bytes(b"x")
    (root / "readme.md").write_text("beside the classes")
    return root


@pytest.fixture(scope="module")
def tar(folder) -> Path:
    """The same as a tar, as ``tar c -C FOLDER .`` makes it."""
    path = folder.parent / "signs.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(folder, ".")
    return path


# A source from outside, as one module: photos in a zip.
ZIP = """
import hashlib, zipfile
from dataclasses import dataclass

@dataclass(frozen=True)
class Zip:
    root: str

    def keys(self):
        with zipfile.ZipFile(self.root.removeprefix("zip://")) as archive:
            return sorted(name for name in archive.namelist() if not name.endswith("/"))

    def read(self, key):
        with zipfile.ZipFile(self.root.removeprefix("zip://")) as archive:
            return archive.read(key)

    def fingerprint(self):
        return hashlib.sha256("".join(self.keys()).encode()).hexdigest()
"""


@pytest.fixture
def zipped(folder, tmp_path, monkeypatch) -> str:
    """The same behind an entry point of another package."""
    site = tmp_path / "site"
    (site / "zip_photos-1.dist-info").mkdir(parents=True)
    (site / "zip_photos.py").write_text(ZIP)
    (site / "zip_photos-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: zip-photos\nVersion: 1\n")
    (site / "zip_photos-1.dist-info" / "entry_points.txt").write_text("[stage1_pro.photos]\nzip = zip_photos:Zip\n")
    monkeypatch.syspath_prepend(site)
    with zipfile.ZipFile(tmp_path / "signs.zip", "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                archive.write(path, path.relative_to(folder).as_posix())
    return f"zip://{tmp_path / 'signs.zip'}"


def facts(splits: Splits) -> dict:
    return splits.model_dump(exclude={"root"})


def test_splits_of_a_tar_are_those_of_its_folder(folder, tar):
    here, there = make_splits(folder), make_splits(tar)
    assert facts(here[0]) == facts(there[0]) and here[0].hashes == there[0].hashes
    assert here[1] == there[1] == []
    known = {row.file for row in here[0].rows}
    beside = left_out(folder, None, known)
    assert beside == left_out(tar, None, known)
    assert [(one.key, one.why) for one in beside.passed] == [
        ("readme.md", "no picture (.md)"),
        ("work/.DS_Store", "hidden"),
        ("work/notes ä.txt", "no picture (.txt)"),
    ]
    assert (here[0].root, there[0].root) == (str(folder), str(tar))
    for splits, _ in (here, there):
        photos = splits.photos_of(splits.rows)
        assert [sha256_bytes(photo.read()) for photo in photos] == [row.sha256 for row in splits.rows]
        assert sha256_bytes(splits.photos().read(splits.rows[0].file)) == splits.rows[0].sha256
    assert open_photos(folder).fingerprint() == open_photos(tar).fingerprint()
    assert list(open_photos(folder).keys()) == list(open_photos(tar).keys())


def test_a_source_from_outside_is_one_module(folder, zipped):
    here, there = make_splits(folder), make_splits(zipped)
    assert facts(here[0]) == facts(there[0]) and there[0].root == zipped
    names = [name for name, _ in gather([zipped]).files]
    assert len(names) == 60 and names[0] == f"{zipped}/none/deep/p00.png"
    photo = there[0].photos_of(there[0].rows)[0]
    assert np.array_equal(read_image(photo), read_image(folder / photo.key))
    with pytest.raises(ImageError, match="KeyError"):
        read_image(Photo(there[0].photos(), "none/nowhere.png"))
    with pytest.raises(InputError, match=r"copy them there first"):
        there[0].path(there[0].rows[0])
    with pytest.raises(InputError, match=r"one of file, zip, got 'zap'; did you mean 'zip'"):
        open_photos("zap://x")
    assert open_photos(f"file://{folder}") == Folder(str(folder))


def test_a_table_names_files_in_a_tar(folder, tar, tmp_path):
    rows = [f"{p.relative_to(folder).as_posix()},{p.relative_to(folder).parts[0]}" for p in folder.rglob("*.png")]
    text = "\n".join(["file,label", *rows])
    (tmp_path / "mine.csv").write_text(text)
    expected, _ = make_splits(tmp_path / "mine.csv", images=folder)
    assert facts(make_splits(tmp_path / "mine.csv", images=tar)[0]) == facts(expected)
    inside = shutil.copy(tar, tmp_path / "inside.tar")
    with tarfile.open(inside, "a") as archive:
        archive.add(tmp_path / "mine.csv", "labels.csv")
    assert facts(make_splits(inside)[0]) == facts(expected)
    (tmp_path / "out.csv").write_text("file,label\n../signs.tar,x\n")
    for file in ("../x.png", "/etc/passwd", "."):
        (tmp_path / "out.csv").write_text(f"file,label\n{file},x\n")
        with pytest.raises(InputError, match="file must be inside"):
            make_splits(tmp_path / "out.csv", images=tar)


def test_inputs_of_predict_are_the_same_photos(folder, tar, tmp_path):
    here, there = gather([folder]).files, gather([tar]).files
    assert [name.removeprefix(str(folder)) for name, _ in here] == [name.removeprefix(str(tar)) for name, _ in there]
    for (_, one), (_, other) in zip(here, there, strict=True):
        assert np.array_equal(read_image(one), read_image(other))
    # A member is named as if the tar were a folder, in a list or alone.
    (tmp_path / "list.csv").write_text(f"file\n{Path(os.path.relpath(tar, tmp_path), 'work', 'p01.png')}\n")
    for inputs in ([tar / "work" / "p01.png"], [tmp_path / "list.csv"]):
        ((_, one),) = gather(inputs).files
        assert np.array_equal(read_image(one), read_image(folder / "work" / "p01.png"))
    with pytest.raises(ImageError, match="No such file"):
        read_image(tar / "work" / "none.png")
    with pytest.raises(ImageError, match="Not a directory"):
        read_image(folder / "readme.md" / "none.png")


def test_a_pool_in_a_tar_is_the_folders(folder, tar):
    splits, _ = make_splits(folder)
    unseen = splits.of("val_test")
    here, there = (read_pool(place, unseen, splits.photos()) for place in (folder, tar))
    assert here.fingerprint == there.fingerprint and here.n_left_out == there.n_left_out >= len(unseen)
    assert [photo.key for photo in here.photos] == [photo.key for photo in there.photos]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_tar_are_the_folders(folder, tar, zipped, workers):
    pytest.importorskip("torch", reason="the train extra")
    from stage1_pro.config import AugmentConfig
    from stage1_pro.data.loader import TrainLoader, iterate

    batches = []
    for place in (folder, tar, zipped):
        splits, _ = make_splits(place)
        photos = splits.photos_of(splits.of("train"))
        loader = TrainLoader(
            photos, [0] * len(photos), SPEC, AugmentConfig(), seed=3, batch_size=8, workers=workers
        )  # fmt: skip
        found = [batch for epoch in range(2) for batch in loader.epoch(epoch)]
        loader.close()
        assert {file for batch in found for file in batch.files} <= {str(photo) for photo in photos}
        seen = [batch.pixels.numpy() for batch in found]
        batches.append((seen, [one.numpy() for one in iterate(photos, SPEC, 8, workers)]))
    for other in batches[1:]:
        for ours, theirs in zip(batches[0], other, strict=True):
            assert len(ours) == len(theirs) > 2
            assert all(np.array_equal(one, two) for one, two in zip(ours, theirs, strict=True))


def outcome(place: Path | str, run: Path) -> dict:
    """What split, train, evaluate and answering on photos somewhere give."""
    import stage1_pro
    from stage1_pro.cli import main
    from stage1_pro.data.predictions import Predictions
    from stage1_pro.deploy.prediction import infer

    assert main(["split", "--labels", str(place), "--out", str(run), "--max-quarantine", ".1"]) == 0
    keys = ["train.epochs=1", "model.image_size=32", "train.batch_size=16", "train.workers=2"]
    assert main(["train", "--run", str(run), *(word for key in keys for word in ("--set", key))]) == 0
    assert main(["calibrate", "--run", str(run), "--guarantee", "none", "--fnr", ".9"]) == 0
    evaluation = stage1_pro.evaluate(run, n_replicates=20)
    rows, _ = infer(run, [place])
    assert len(rows) == 60 and all(row["error"] is None for row in rows)
    return {
        "hashes": Splits.read(run / "splits.json").hashes,
        "weights": sha256_file(run / "model_best.pth"),
        "logits": Predictions.load(run / "val_calib.npz").logits_b.tolist(),
        "evaluation": evaluation.model_dump(),
        "decisions": [row | {"file": row["file"].removeprefix(str(place))} for row in rows],
        "split": infer(run, split="val_test"),
    }


@pytest.fixture(scope="module")
def on_folder(folder, tmp_path_factory) -> dict:
    pytest.importorskip("torch", reason="the train extra")
    return outcome(folder, tmp_path_factory.mktemp("runs") / "run")


def test_a_run_on_a_tar_is_the_run_on_its_folder(on_folder, tar, tmp_path):
    assert outcome(tar, tmp_path / "run") == on_folder


@pytest.mark.slow
def test_a_run_on_a_source_from_outside_is_the_run_on_a_folder(on_folder, zipped, tmp_path):
    assert outcome(zipped, tmp_path / "run") == on_folder


# --------------------------------------------------------------------------------------------
# Tars


def member(name: str, data: bytes = b"x", **changes) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, data


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (member("work/a.png", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link, a device"),
        (member("work/a.png", b"", type=tarfile.LNKTYPE, linkname="../../etc/passwd"), "a link, a device"),
        (member("work/a.png", b"", type=tarfile.CHRTYPE), "a link, a device"),
        (member("work/a.png", b"", type=tarfile.FIFOTYPE), "a link, a device"),
        (member("/etc/passwd"), "name its files inside it"),
        (member("work/../../a.png"), "name its files inside it"),
        (member(".."), "name its files inside it"),
        (member("./none/b.png"), "every file once"),
        (member("a\x1b[2J\n", type=tarfile.SYMTYPE), r"got a\\x1b\[2J\\n"),
    ],
)
def test_hostile_members_are_refused_by_name(tmp_path, bad, message):
    with pytest.raises(InputError, match=message) as error:
        Tar(str(write_tar(tmp_path / "t.tar", member("none/b.png"), bad)))
    assert "\x1b" not in str(error.value) and "\n" not in str(error.value)


def test_damaged_and_compressed_tars_are_refused(tmp_path, tar):
    whole = tar.read_bytes()
    with tarfile.open(tar) as archive:
        ends = [info.offset_data + -(-info.size // 512) * 512 for info in archive]
    for name, data in {
        "empty.tar": b"",
        "none.tar": b"no tar" * 500,
        "cut.tar": whole[: ends[-2] + 700],
        "between.tar": whole[: ends[-2]],
        "header.tar": whole[: ends[3]] + b"\xff" * 512 + whole[ends[3] + 512 :],
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            open_photos(tmp_path / name)
    with tarfile.open(tmp_path / "z.tar", "w:gz") as archive:
        archive.add(tar, "x")
    with pytest.raises(InputError, match="uncompressed"):
        open_photos(tmp_path / "z.tar")


def test_no_byte_that_is_changed_gives_a_traceback(tmp_path):
    path = write_tar(tmp_path / "t.tar", member("a/" + "n" * 150 + ".png", b"abc"), member("b/x.png", b"d" * 600))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(400):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            data[place] = rng.integers(0, 256)
        path.write_bytes(data[: rng.integers(0, len(data))] if rng.random() < 0.2 else data)
        try:
            photos = Tar(str(path))
        except InputError:
            continue
        for key in photos.keys():  # noqa: SIM118
            assert len(photos.read(key)) <= len(data)


def test_members_are_read_at_their_place(tmp_path):
    rng = np.random.default_rng(1)
    contents = {f"c/{k}": rng.bytes(int(size)) for k, size in enumerate(rng.integers(0, 5000, 40))}
    photos: Photos = Tar(str(write_tar(tmp_path / "t.tar", *(member(key, data) for key, data in contents.items()))))
    assert sorted(photos.keys()) == sorted(contents)
    assert all(photos.read(key) == contents[key] for key in reversed(list(contents)))
    with Photo(photos, "c/7").open() as file:
        data = contents["c/7"]
        for _ in range(50):
            place, size = (int(x) for x in rng.integers(0, len(data) + 20, 2))
            file.seek(place)
            assert file.read(size) == data[place : place + size]
        file.seek(-3, os.SEEK_END)
        assert file.read() == data[-3:] and file.tell() == len(data)
    again = pickle.loads(pickle.dumps(Photo(photos, "c/3")))
    assert again == Photo(photos, "c/3") and again.read() == contents["c/3"]
    # Another tar in its place is read by its own index.
    write_tar(tmp_path / "t.tar", member("c/3", b"new"))
    assert again.read() == b"new"
    with pytest.raises(FileNotFoundError):
        photos.read("c/4")


def test_a_folder_waits_for_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ImageError, match="not a regular file"):
        read_image(Photo(Folder(str(tmp_path)), "a.png"))


# -------------------------------------------------------------------------------- nothing is left out silently


def crowded(root: Path) -> Path:
    """A folder of two classes with everything that people's folders hold."""
    rng = np.random.default_rng(0)

    def save(path: Path, kind: str | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path, kind)

    for k in range(40):
        save(root / ("none", "work")[k % 2] / f"{k}.png")
    save(root / "work" / "no suffix", "JPEG")
    save(root / "work" / "wrong.dat", "PNG")
    save(root / "work" / "LOUD.JPEG", "JPEG")
    save(root / "work" / "a" / "b" / "c" / "deep.png")
    save(root / "work" / unicodedata.normalize("NFD", "Straße für.png"))
    for name in (".hidden.png", "._1.png", ".thumbnails/1.png", "@eaDir/1.png/2.png", "__MACOSX/3.png"):
        save(root / "work" / name)
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "clip.mp4", "empty"):
        (root / "none" / name).write_bytes(b"" if name == "empty" else b"x" * 40)
    (root / "readme.md").write_text("beside the classes")
    save(root.parent / "elsewhere" / "far.png")
    (root / "work" / "far").symlink_to(root.parent / "elsewhere")
    (root / "work" / "again").symlink_to(root.parent / "elsewhere")
    (root / "work" / "nearer").symlink_to(root / "none")
    (root / "work" / "up").symlink_to("..")
    (root / "work" / "self").symlink_to("self")
    (root / "work" / "one.png").symlink_to(root / "work" / "1.png")
    (root / "work" / "gone.png").symlink_to("nothing.png")
    os.mkfifo(root / "work" / "pipe.png")
    return root


def entries_of(root: Path) -> set[str]:
    """What ``find`` sees that is no folder, with what lies behind the one link that is entered."""
    found = set()
    for place, folders, files in os.walk(root):
        found |= {os.path.relpath(Path(place) / name, root) for name in files}
        found |= {os.path.relpath(path, root) for name in folders if (path := Path(place) / name).is_symlink()}
    return found


def test_what_is_taken_named_and_counted_is_all_there_is(tmp_path):
    root = crowded(tmp_path / "set")
    found = look(Folder(str(root)))
    held = [*found.keys, *(one.key for one in found.passed)]
    assert len(held) == len(set(held))
    # Of the two links to one folder the first is entered, so it is its photo that counts.
    assert set(held) == (entries_of(root) - {"work/again"}) | {"work/again/far.png"}
    pictures = [key for key in found.keys if not key.endswith(".png")]
    assert sorted(pictures) == ["work/LOUD.JPEG", "work/no suffix", "work/wrong.dat"]
    assert "work/a/b/c/deep.png" in found.keys and "work/one.png" in found.keys
    why = {one.key: one.why for one in found.passed}
    assert "already" in why["work/nearer"] and "around" in why["work/up"]
    assert found.counts() == {"hidden": 4, "no picture (.md)": 1, "no picture (.mp4)": 1, "no picture (.txt)": 1,
                              "no picture (no suffix)": 1, "of the system": 3}  # fmt: skip
    assert {one.key for one in found.passed if one.may_be_photos} == {"work/gone.png", "work/self"}
    assert all(printed.isprintable() for printed in [found.words()])


def test_commands_say_what_they_passed_over(tmp_path, tiny, capsys):
    root = crowded(tmp_path / "set")
    held = look(Folder(str(root)))
    assert main(["split", "--labels", str(root), "--out", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = len(Splits.read(tmp_path / "run" / "splits.json").rows)
    counted = sum(told["passed_over"]["counts"].values()) + len(told["passed_over"]["named"])
    assert rows + told["quarantined"] == len(held.keys) and counted == len(held.passed)
    assert main(["predict", "--bundle", str(tiny / "bundle"), str(root), "--json"]) == 1
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert len(told["rows"]) == len(held.keys) and told["failures"] == 0
    assert told["passed_over"] == {
        "counts": held.counts(),
        "named": [{"file": str(root / one.key), "why": one.why} for one in held.named()],
    }
    assert f"passed over {len(held.passed)}" in said.err


def test_a_folder_that_cannot_be_read_is_named_and_no_success(tmp_path, tiny):
    """As a user who is not root, whom no folder is closed to."""
    root = crowded(tmp_path / "set")
    closed = root / "none"
    before = os.scandir

    def scandir(path):
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return before(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.scandir", scandir)
        found = look(Folder(str(root)))
        assert Passed("none", "a folder that cannot be read: Permission denied") in found.passed
        assert main(["predict", "--bundle", str(tiny / "bundle"), str(root), "--out", str(tmp_path / "o.csv")]) == 1


def test_photos_beside_the_table_are_counted(tmp_path, capsys):
    root = crowded(tmp_path / "set")
    (root / "labels.csv").write_text(
        "file,label\n" + "".join(f"{('none', 'work')[k % 2]}/{k}.png,{k % 2}\n" for k in range(30))
    )
    assert main(["split", "--labels", str(root), "--out", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["passed_over"]
    assert told["counts"]["not in the table"] == len(look(Folder(str(root))).keys) - 30
    assert not any("csv" in one for one in told["counts"])


def test_a_name_is_found_in_either_composition(tmp_path, tiny):
    for form, other in (("NFC", "NFD"), ("NFD", "NFC")):
        place = tmp_path / form / unicodedata.normalize(form, "Größe")
        place.mkdir(parents=True)
        Image.new("RGB", (20, 20)).save(place / unicodedata.normalize(form, "für.png"))
        listed = tmp_path / form / "list.csv"
        listed.write_text(f"file\n{unicodedata.normalize(other, 'Größe/für.png')}\n", encoding="utf-8")
        rows, failures = predict(Cascade.load(tiny / "bundle"), [listed])
        assert failures == 0 and rows[0]["label"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("a.@~ é", min_size=1, max_size=3), st.sampled_from(["file", "folder", "link", "txt"])),
        max_size=9,
    )
)
def test_any_tree_is_told_whole(parts):
    with tempfile.TemporaryDirectory() as folder:
        root, place = Path(folder) / "root", Path(folder) / "root"
        root.mkdir()
        for name, kind in parts:
            path = place / name.strip(". ") if name.strip(". ") else place / "x"
            if os.path.lexists(path):
                continue
            if kind == "folder":
                path.mkdir()
                place = path
            elif kind == "link":
                path.symlink_to(root.parent / "nothing")
            else:
                path.write_bytes(b"\xff\xd8\xff" if kind == "file" else b"text")
        found = look(Folder(str(root)))
        assert {*found.keys, *(one.key for one in found.passed)} == entries_of(root)
        assert [*Folder(str(root)).keys()] == sorted(Folder(str(root)).keys(), key=lambda key: key.split("/"))
