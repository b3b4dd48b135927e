"""The manual and the README: every code block runs, every link leads somewhere, every page is reached."""

from __future__ import annotations

import re
import shlex
import shutil
from importlib.resources import files
from pathlib import Path
from typing import get_args

import pytest
import yaml

from stage1_pro import cli
from stage1_pro.continual.watch.monitor import Estimate
from stage1_pro.metrics.estimate import Interval
from stage1_pro.metrics.intervals import Method as Resampling
from stage1_pro.policies.certificate import Method, Outcome
from stage1_pro.policies.target import POLICIES, Promise, kind_of_target

MANUAL = Path(str(files("stage1_pro"))) / "manual"
PAGES = sorted(path.name for path in MANUAL.glob("*.md"))
# Their blocks train a model. Adapters: tests/test_adapters.py runs that page, and looks at what it made.
TRAIN = {"compare.md", "train.md", "configuration.md", "explora.md", "python.md", "tutorial.md"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_pages_are_there_and_the_index_names_each():
    named = set(re.findall(r"\]\(([\w-]+\.md)\)", (MANUAL / "index.md").read_text()))
    assert named == set(PAGES) - {"index.md"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_pages_and_lines_are_short(page):
    text = (MANUAL / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (MANUAL / target).exists(), target
    assert text.startswith("# ")
    assert {kind for kind, _ in BLOCK.findall(text)} <= {"sh", "python", "yaml", "text"}


def test_every_promise_stands_in_the_table_with_a_test_that_is_there(repository):
    text = (MANUAL / "promises.md").read_text(encoding="utf-8")
    tests = re.findall(r"`(test_\w+\.py)::(\w+)`", text)
    for file, name in tests:
        assert f"\ndef {name}(" in (repository / "tests" / file).read_text(encoding="utf-8"), (file, name)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "| test |" not in line]
    assert all("::test_" in row for row in rows) and len(rows) > 20
    first = {cell for row in rows for cell in re.findall(r"`([^`]+)`", row.split("|")[1])}
    quantities = {word.strip() for word in Promise.model_fields["quantity"].description.split(",")}
    asked = {one.quantity for kind in POLICIES for one in kind_of_target(kind).of().promises("")}
    tests_of_a_verdict = {"guard reward", "anchor reward", "anchor FNR", "certificate"}
    methods = re.findall(r'"([\w -]+)"', re.search(r"``method`` is (.*?\.)", Interval.__doc__, re.DOTALL)[1])
    methods += get_args(Estimate.model_fields["method"].annotation)
    assert {"bca", "exact", "by bin", "betting"} <= set(methods) >= set(get_args(Resampling))
    wanted = {*quantities, *asked, *get_args(Method), *get_args(Outcome), *methods, *tests_of_a_verdict}
    assert wanted <= first, wanted - first


def test_the_readme_is_a_page_and_its_links_lead_somewhere(repository):
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert (repository / target).exists(), target
    python = [block for kind, block in BLOCK.findall(text) if kind == "python"]
    assert len(python) == 1
    exec(compile(python[0], "README.md", "exec", dont_inherit=True), {})


@pytest.mark.slow
def test_the_readmes_six_commands_run(world, repository, tmp_path, monkeypatch, capsys):
    """As they stand but for the backbone, which is no download here, and for a promise that 240 photos cannot keep."""
    block = [block for kind, block in BLOCK.findall((repository / "README.md").read_text()) if kind == "sh"][2]
    shutil.copytree(world / "photos", tmp_path / "photos")
    first, second = block.split("stage1 evaluate")
    split, train, calibrate = first.strip().replace("facebook/dinov2-small", "tiny").splitlines()
    text = f"{split}\n{train}\n{calibrate}  # exit code 3\n{calibrate} --guarantee none\nstage1 evaluate{second}"
    assert run_page(f"```sh\n{text}```", monkeypatch, tmp_path, capsys) == 1
    assert (tmp_path / "run" / "report.html").is_file()


def run_page(text: str, monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]) -> int:
    """Run the blocks of a page in order in one folder; the number of blocks that were run."""
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    done = 0
    for kind, block in BLOCK.findall(text):
        if kind == "yaml":
            (name,) = re.findall(r"\A# ([\w.-]+\.yaml)$", block, re.MULTILINE)
            assert isinstance(yaml.safe_load(block), dict)
            (folder / name).write_text(block)
        elif kind == "sh":
            for line in block.strip().replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                assert words[0] == "stage1", line
                code = cli.main(words[1:])
                assert code == int((re.findall(r"# exit code (\d)", line) or [0])[0]), (line, capsys.readouterr().err)
        elif kind == "python":
            exec(compile(block, "manual", "exec", dont_inherit=True), names)
        done += kind != "text"
    return done


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=[pytest.mark.slow] if p in TRAIN else []) for p in PAGES if p != "adapters.md"]
)
def test_every_block_of_the_manual_runs(page, world, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "here"
    shutil.copytree(world, folder)
    if page in {"tutorial.md", "python.md"}:
        shutil.rmtree(folder / "run")
    text = (MANUAL / page).read_text(encoding="utf-8")
    assert run_page(text, monkeypatch, folder, capsys) == len([k for k, _ in BLOCK.findall(text) if k != "text"])
