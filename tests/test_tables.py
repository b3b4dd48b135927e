"""One table reader: the same file means the same to every command, in every dialect and encoding."""

from __future__ import annotations

import csv
import io
import random
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stage1_pro.classes import spelled
from stage1_pro.commands.split import Split
from stage1_pro.continual.ledger.exchange import import_csv
from stage1_pro.continual.ledger.labels import add_events
from stage1_pro.continual.ledger.labels import read_labels as read_answers
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.serving.events import Event
from stage1_pro.data.given import COLUMNS as PREDICTION_COLUMNS
from stage1_pro.data.given import Labelled, read_arrays, read_predictions
from stage1_pro.data.labels import COLUMNS as LABEL_COLUMNS
from stage1_pro.data.labels import gather, read_labels, read_list
from stage1_pro.data.photos import Folder, read_file
from stage1_pro.data.pool import read_pool
from stage1_pro.data.tables import read_table
from stage1_pro.errors import InputError
from stage1_pro.training.calibration import file_rows

FORMS = [
    (delimiter, encoding)
    for delimiter in ",;\t|"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")
]
NAMES = ("a, b.png", "grün;x.png", 'c"d.png', "x y.png", "clip/e.png", "t|u.png", "tab\tx.png", "p.png")


def stored(path: Path) -> Store:
    store = Store(path)
    add_events(store, [
        Event(
            id=f"e{index}", time=float(index), bundle="b" * 64, image_sha256=f"{index:064x}", action="exit", stage="A",
            label="0", prob_a=0.1, prob_b=None, confidence=0.9, gate_logit=None, exit_score=0.9, threshold=0.8,
            propensity=0.5, selected=True, sketch=np.zeros(64),
        )
        for index in range(len(NAMES))
    ])  # fmt: skip
    return store


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a picture of every name, composed or decomposed."""
    folder = tmp_path_factory.mktemp("tables")
    rng = np.random.default_rng(0)
    for index, name in enumerate(NAMES):
        path = folder / unicodedata.normalize("NFD" if index % 2 else "NFC", name)
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    opened = stored(tmp_path_factory.mktemp("store") / "s.db")
    yield opened
    opened.close()


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def meaning(path: Path, columns: dict[str, str]) -> dict[str, object]:
    """What every command that reads a table takes it for."""
    of_photos = {name: one for name, one in columns.items() if name in LABEL_COLUMNS}
    of_answers = {name: one for name, one in columns.items() if name in PREDICTION_COLUMNS}
    photos, labelled = read_labels(path, None, columns=of_photos)
    listed, given = read_list(path, of_photos), gather([path], of_photos).files
    pool = read_pool(path, [], photos, of_photos)
    predicted = read_predictions(path, columns=of_answers)
    arrays = read_arrays(path, columns={name: one for name, one in columns.items() if name not in ("file", "source")})
    assert isinstance(predicted.answers, Labelled) and predicted.groups is not None
    rows = file_rows(path, arrays, "gate")
    split = {nfc(one.file): (one.label, one.name, one.group, one.source) for one in labelled}
    return {
        "split": split,
        "tune": {nfc(row["file"]): (row["label"], row["label"], row["group"], row["source"]) for row in listed},
        "predict": {nfc(name): read_file(photo) for name, photo in given},
        "explora": {nfc(photo.key): photo.read() for photo in pool.photos},
        "metrics": (predicted.answers.labels.tolist(), predicted.answers.probs.tolist(), predicted.groups.tolist()),
        "calibrate": (rows.labels.tolist(), rows.probs.tolist(), arrays["groups"].tolist()),
        "gate": arrays["gate_logits"].tolist(),
    }


class Hand:
    """One way to write a table: dialect, encoding, spelling, order and names of columns, drawn by a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.delimiter, self.encoding = rng.choice(FORMS)
        self.end, self.quoting = rng.choice(["\n", "\r\n", "\r"]), rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
        self.form = rng.choice(["NFC", "NFD"])
        self.comma, self.told = rng.random() < 0.3, rng.random() < 0.2
        self.columns: dict[str, str] = {}

    def head(self, name: str, can_be_named: bool) -> str:
        if can_be_named and self.rng.random() < 0.3:
            self.columns[name] = self.rng.choice([f"my {name}", f"{name.upper()}=x", f"größe {name}"])
            name = unicodedata.normalize(self.form, self.columns[name])
        elif can_be_named:
            name = self.rng.choice([name, name.upper(), name.capitalize()])
        return self.rng.choice(["", " "]) + name + self.rng.choice(["", "  "])

    def cell(self, name: str, value: str) -> str:
        rng = self.rng
        if name == "label" and value in "01":
            value = rng.choice([value, f"{value}.0", f"{value}."])
        elif name in ("prob", "gate_logits") and self.comma:
            value = value.replace(".", ",")
        elif name == "file" and rng.random() < 0.5:
            value = value.replace("/", "\\")
        return rng.choice(["", " "]) + unicodedata.normalize(self.form, value) + rng.choice(["", " "])

    def write(self, path: Path, rows: list[dict[str, str]], *, more: bool = True) -> Path:
        order = [*rows[0]]
        self.rng.shuffle(order)
        extra = ["note"] * (more and self.rng.random() < 0.5)
        buffer = io.StringIO(newline="")
        if self.told:
            buffer.write(f"sep={self.delimiter}{self.end}")
        writer = csv.writer(buffer, delimiter=self.delimiter, lineterminator=self.end, quoting=self.quoting)
        writer.writerow([*(self.head(name, True) for name in order), *extra])
        for row in rows:
            if self.rng.random() < 0.1:
                writer.writerow([""] * len(order))
            writer.writerow([*(self.cell(name, row[name]) for name in order), *(["x;y,z"] * len(extra))])
        path.write_bytes(buffer.getvalue().encode(self.encoding))
        return path


ROWS = [
    {"file": name, "label": "01"[index % 2], "group": f"ä{index // 2};x", "source": "Köln, Süd",
     "prob": f"0.{index + 1}5", "gate_logits": f"-1.{index}"}
    for index, name in enumerate(NAMES)
]  # fmt: skip
ANSWERS = [
    {"event_id": f"e{index}", "label": "01"[index % 2], "annotator": "Zoë", "source": "review", "time": f"{index}"}
    for index in range(len(NAMES))
]  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_a_table_means_the_same_to_every_command_in_any_hand(place: Path, store: Store, seed: int) -> None:
    hand, plain = Hand(seed), place / "plain.csv"
    with plain.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    expected = meaning(plain, {})
    assert expected["split"] == expected["tune"]
    assert expected["predict"] == expected["explora"] and len(expected["predict"]) == len(NAMES)
    assert expected["metrics"] == expected["calibrate"]
    assert meaning(hand.write(place / "hand.csv", ROWS), hand.columns) == expected
    # Imported before or not: these are the same answers.
    hand = Hand(seed + 1000)
    path = hand.write(place / "labels.csv", ANSWERS, more=False)
    import_csv(store, path, now=99.0, columns=hand.columns)
    assert [(one.event_id, one.label, one.annotator, one.time) for one in read_answers(store)] == [
        (row["event_id"], row["label"], row["annotator"], float(row["time"])) for row in ANSWERS
    ]


@pytest.mark.parametrize(
    "text",
    [
        "file,label,prob,event_id,label\na,1,.5,e0,0\n",
        "file,label,prob,event_id,Label\na,1,.5,e0,0\n",
        "file,label,prob,event_id\na,1,.5,e0,x\n",
        "file,label,prob,event_id\na,1\0,.5,e0\n",
        "file,label,prob,event_id\na,1,.5\n1",
        'file,label,prob,event_id\n"a,1,.5,e0\n',
        "",
        "\n\n",
        "file,label,prob,event_id\n",
    ],
)
def test_what_one_command_refuses_all_refuse(tmp_path: Path, text: str) -> None:
    path, store = tmp_path / "t.csv", stored(tmp_path / "s.db")
    path.write_text(text, newline="")
    readers: list[Callable[[], object]] = [
        lambda: read_labels(path), lambda: read_list(path), lambda: gather([path]),
        lambda: read_pool(path, [], Folder(str(tmp_path))), lambda: read_predictions(path), lambda: read_arrays(path),
        lambda: import_csv(store, path, now=1.0, source="review", annotator="a"),
    ]  # fmt: skip
    refused = 0
    for reader in readers:
        try:
            reader()
        except InputError:
            refused += 1
    # An import of no labels is none; all else is refused, and nothing was stored.
    assert refused >= len(readers) - text.endswith("event_id\n") and not read_answers(store)
    store.close()


def test_columns_can_be_named_and_only_once(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("Path,class,label,note\na.png,cat,7,x\n")
    named = read_table(path, ("file", "label", "group"), columns={"file": "path", "label": "class"})
    assert [cells for _, cells in named] == [{"file": "a.png", "label": "cat", "": "7", "note": "x"}]
    assert read_table(path, ("label", "note"), columns={"label": ""}).columns == ("Path", "class", "", "note")
    for columns, message in (
        ({"fiel": "Path"}, "must be of file, label, got 'fiel'; did you mean 'file'"),
        ({"file": "Pth"}, "got 'Pth' for file, which names 0 of .*did you mean 'Path'"),
        ({"file": "Path", "label": "PATH"}, "every column once, got 'PATH' for file and label"),
    ):
        with pytest.raises(InputError, match=message):
            read_table(path, ("file", "label"), columns=columns)
    path.write_text("fiel,label\n")
    with pytest.raises(InputError, match="column 'file'.*did you mean 'fiel'.*name it with --columns file=fiel"):
        read_table(path, ("file", "label"), required=("file",))
    assert Split.of_flags({"labels": "x", "out": "y", "columns": 'file=p,"label=a,b"'}).columns == {
        "file": "p", "label": "a,b"
    }  # fmt: skip
    for wrong in ("file", "file=a,file=b", "=a"):
        with pytest.raises(InputError, match="--columns must be like file=path,label=class"):
            Split.of_flags({"labels": "x", "out": "y", "columns": wrong})


# csv's own writer is the judge. It cannot write an empty only cell, and cells are stripped when they are read.
CELL = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).map(
    lambda text: text.strip() or "x"
)


@settings(max_examples=300, deadline=None)
@given(
    rows=st.lists(st.lists(CELL, min_size=3, max_size=3), max_size=5),
    form=st.sampled_from(FORMS),
    order=st.permutations(["file", "label", "what; else,\tnot"]),
)
def test_cells_come_back_as_they_were_written(tmp_path_factory, rows, form, order):
    delimiter, encoding = form
    buffer = io.StringIO(newline="")
    csv.writer(buffer, delimiter=delimiter).writerows([order, *rows])
    path = tmp_path_factory.mktemp("t") / "t.csv"
    path.write_bytes(buffer.getvalue().encode(encoding))
    table = read_table(path, ("file", "label"), required=("file", "label"))
    assert list(table.columns) == order
    # One rule for labels and names; what is looked up stays as it is.
    tidy = {"file": str, "label": spelled}
    rows = [[tidy.get(name, nfc)(cell) for name, cell in zip(order, row, strict=True)] for row in rows]
    assert table.cells == rows
    assert [cells for _, cells in table] == [dict(zip(order, row, strict=True)) for row in rows]


def read(tmp_path: Path, data: bytes):
    (tmp_path / "t.csv").write_bytes(data)
    return read_table(tmp_path / "t.csv", ("file", "label", "group"), required=("file",))


def test_short_rows_blank_lines_and_unnamed_columns(tmp_path):
    table = read(tmp_path, b",file,label,,\n0,a.png\n\n1,b.png,x,,\n")
    assert table.columns == ("", "file", "label", "", "")
    assert table.column("label") == ["", "x"] and table.lines == [2, 4]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "'file', got an empty file"),
        (b"flie;label\n", "'file', got flie, label; did you mean 'flie'"),
        (b"file,label,label\na,b,c\n", "every column once, got 'label'"),
        (b"file\tlabel\na\tb\tc\n", "2 cells in every row.*got 3 in line 2"),
        (b'file,label\n"a,b\n', "must be a CSV, got in line 2"),
        (b'file,label\n"a"b,c\n', "must be a CSV, got in line 2"),
        (b"file,label\na.png,\xe4\n", "must be UTF-8 text, got other bytes in line 2"),
        (b"file,label,group\na,b,c\nd,e", "last line 3 ends early"),
        (b"file," + b"x" * 200_000 + b"\n", "must be a CSV"),
        (b"\x1b[2J,label\n", r"got \\x1b\[2J, label"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(tmp_path, data, message):
    with pytest.raises(InputError, match=message) as error:
        read(tmp_path, data)
    assert "t.csv" in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(InputError, match=path.name):
            read_table(path, ("file",))


def test_a_list_names_a_file_in_every_row(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "l.csv").write_text("file,label\na.png,0\n,1\n")
    with pytest.raises(InputError, match="empty file in l.csv line 3"):
        read_list(tmp_path / "l.csv")


@pytest.mark.parametrize(
    "text",
    [
        "\x07ile,label\na,b\n", "file,label\na\x1b[2Jb,x\na\x1b[2Jb,x\n", "label,prob\n1,.5\x07\n", '"a\x1b"x,label\n',
        "file,label,label_name\na,1\x1b,x\nb,1\x1b,y\n", "file,label,split\na,1,tr\x1bain\n",
        "error,confid\x9bence\n1,1\n", "file,file\x1b\n", "label,label\u202e,label\u202e\n",
    ],
)  # fmt: skip
def test_messages_about_tables_hold_nothing_that_a_terminal_obeys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    said = []
    for reader in (read_labels, read_list, read_predictions, read_arrays):
        try:
            reader(path)
        except InputError as error:
            said.append(str(error))
    assert said and "".join(said).isprintable()
