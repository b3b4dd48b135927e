"""One table reader: the same file means the same to every command, in every dialect and encoding."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stage1_pro.data.labels import read_labels, read_list
from stage1_pro.data.tables import read_table
from stage1_pro.errors import InputError
from stage1_pro.studies.measuring import Labelled, read_predictions

FORMS = [(delimiter, encoding) for delimiter in ",;\t" for encoding in ("utf-8", "utf-8-sig", "utf-16")]


def meaning(path: Path) -> tuple:
    """What ``split``, ``predict`` and ``metrics`` take a table for."""
    _, labelled = read_labels(path, None)
    listed, predicted = read_list(path), read_predictions(path)
    assert isinstance(predicted.answers, Labelled)
    return (
        [(one.file, one.label, one.group) for one in labelled],
        [(row["file"], row["label"], row["group"]) for row in listed],
        predicted.answers.labels.tolist(),
        predicted.answers.probs.tolist(),
    )


@pytest.mark.parametrize(("delimiter", "encoding"), FORMS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_table_means_the_same_to_every_command(tmp_path, delimiter, encoding, end):
    rows = [["file", " label", "group ", "prob"], ["a, b.png", "0", "ä;x", ".1"], ["clip\\c.png", "1", "y", " .9"]]

    def write(name: str, delimiter: str, encoding: str, end: str) -> Path:
        buffer = io.StringIO(newline="")
        csv.writer(buffer, delimiter=delimiter, lineterminator=end).writerows(rows)
        (tmp_path / name).write_bytes(buffer.getvalue().encode(encoding))
        return tmp_path / name

    found = meaning(write("this.csv", delimiter, encoding, end))
    assert found == meaning(write("plain.csv", ",", "utf-8", "\n"))
    assert found[0] == found[1] == [("a, b.png", "0", "ä;x"), ("clip/c.png", "1", "y")]


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
