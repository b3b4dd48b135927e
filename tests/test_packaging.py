"""What an install brings: the base without torch, a core that is built or honestly missing, types and templates."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import stage1_pro

TRAIN_ONLY = [
    "torch",
    "torchvision",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "sklearn",
    "onnx",
    "onnxscript",
]
BASE_MODULES = [
    "cli", "config", "errors", "files", "record", "words", "metrics", "metrics.figures", "metrics.measured",
    "arguments", "policies", "policies.fitting",
    "policies.softmax", "policies.gate", "policies.claims", "continual.serving.events", "continual.serving.served",
    "data.images", "data.predictions", "data.protocols", "data.splits", "integrations.streetvision",
    "deploy.bundle", "deploy.manifest", "deploy.runtime", "deploy.cascade", "deploy.bench", "report", "deploy.timing",
    "deploy.openvino", "commands.bench",
    "training.calibration", "training.evaluation", "training.robustness", "integrations.streetvision.tuning",
    "deploy.inspection", "studies.measuring", "deploy.prediction", "commands.doctor",
]  # fmt: skip


@pytest.fixture(scope="module")
def project(repository: Path) -> dict:
    """pyproject.toml."""
    return tomllib.loads((repository / "pyproject.toml").read_text())


def test_the_base_imports_without_the_train_extra():
    """Each module in a fork, which has imported nothing of the package, of one interpreter without the extra."""
    code = (
        "import importlib, importlib.abc, os, sys, traceback\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name.split('.')[0] in {TRAIN_ONLY}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import matplotlib.figure, numpy, onnxruntime, pydantic, scipy.stats\n"
        f"for module in {BASE_MODULES}:\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        try:\n"
        "            importlib.import_module(f'stage1_pro.{module}')\n"
        "        except BaseException:\n"
        "            traceback.print_exc()\n"
        "            print(module, flush=True)\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_importing_the_package_is_quick_and_loads_nothing_heavy():
    code = "import sys, stage1_pro; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "scipy", "torch", "matplotlib", "onnxruntime"} & set(loaded)


def test_dependencies_are_those_of_the_design(project):
    def names(lines):
        return {re.split(r"[^A-Za-z0-9_-]", line)[0].lower() for line in lines}

    base = {
        "numpy",
        "scipy",
        "pillow",
        "pydantic",
        "pyyaml",
        "rich",
        "onnxruntime",
        "matplotlib",
        "jinja2",
        "jsonschema",
        "filelock",
    }
    assert names(project["project"]["dependencies"]) == base
    assert {"torch", "transformers", "peft", "accelerate"} <= names(
        project["project"]["optional-dependencies"]["train"]
    )


def test_every_dependency_is_pinned_in_the_constraints(project, repository):
    def canonical(name):
        return re.sub(r"[-_.]+", "-", name).lower()

    lines = [line for line in (repository / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = dict(line.split("==") for line in lines)
    assert pinned["torch"] == "2.13.0"
    names = {canonical(name) for name in pinned}
    extras = project["project"]["optional-dependencies"]
    wanted = [
        *project["project"]["dependencies"],
        *(line for key, lines in extras.items() if key != "dev" for line in lines),
    ]
    wanted += project["build-system"]["requires"]
    for line in wanted:
        name = canonical(re.split(r"[^A-Za-z0-9_.-]", line)[0])
        assert name == "stage1-pro" or name in names, f"{line} has no pin"


@pytest.mark.parametrize("lock", ["constraints.serve.lock", "constraints.lock"])
def test_locks_have_the_hashes_of_the_pinned_versions(project, repository, lock):
    def pins(text):
        found = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", text, re.MULTILINE)
        return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}

    text = (repository / lock).read_text()
    pinned, locked = pins((repository / "constraints.txt").read_text()), pins(text)
    assert not {name: version for name, version in locked.items() if pinned.get(name, version) != version}
    entries = re.split(r"\n(?=[A-Za-z0-9])", text.partition("\n")[2].strip())
    assert len(entries) == len(locked)
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    extras = project["project"]["optional-dependencies"]
    asked = ["sign", "heif", *([] if "serve" in lock else ["continual", "openvino", "rtx", "train"])]
    for line in [*project["project"]["dependencies"], *(one for key in asked for one in extras[key])]:
        name = re.sub(r"[-_.]+", "-", re.split(r"[^A-Za-z0-9_.-]", line)[0]).lower()
        assert name in locked, line
    assert "://" not in text


def test_the_installed_package_is_whole():
    folder = Path(stage1_pro.__file__).parent
    for name in ("py.typed", "_core.pyi", "studies/modes.yaml", "studies/explora.yaml"):
        assert (folder / name).is_file(), name
    assert importlib.metadata.version("stage1_pro") == stage1_pro.__version__
    scripts = importlib.metadata.entry_points(group="console_scripts", name="stage1")
    assert [script.value for script in scripts] == ["stage1_pro.cli:main"]


def install(repository: Path, target: Path, **environment: str) -> subprocess.CompletedProcess:
    """Install the checkout into a folder, building with what the tests' own environment holds."""
    pytest.importorskip("scikit_build_core", reason="the build backend comes with the test extra")
    clean = {name: value for name, value in os.environ.items() if name not in ("CXX", "STAGE1_PURE", "CMAKE_ARGS")}
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--target", target, repository],
        capture_output=True, text=True, timeout=300, env={**clean, **environment},
    )  # fmt: skip


NO_COMPILER = {"CXX": "/nonexistent/c++"}


def test_without_a_compiler_the_message_names_the_way_out(repository, tmp_path):
    done = install(repository, tmp_path / "site", **NO_COMPILER)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert "the compiled core could not be built" in said
    assert "STAGE1_PURE=1 pip install ." in said


def test_a_pure_install_needs_no_compiler_and_says_so(repository, tmp_path):
    done = install(repository, tmp_path / "site", STAGE1_PURE="1", **NO_COMPILER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((tmp_path / "site").rglob("_core*.so"))
    code = (
        "import stage1_pro; from stage1_pro import native; from stage1_pro.metrics import augrc, bootstrap_augrc\n"
        "print(stage1_pro.__file__); print(native.backend(), '|', native.why())\n"
        "print(augrc([.9, .8, .7, .6], [0, 1, 0, 1]), bootstrap_augrc([.9, .8, .7, .6], [0, 1, 0, 1]).low >= 0)\n"
        "from stage1_pro.deploy.engine import load_recipe, recipes\n"
        "print(load_recipe('rtx-res32') == load_recipe('engines/rtx-res32.yaml'), *recipes().values(), sep='|')\n"
    )
    # -S leaves out the editable finder of a development install, which would win over the path.
    paths = os.pathsep.join([str(tmp_path / "site"), *(p for p in sys.path if p.endswith("-packages"))])
    ran = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    where, backend, figures, recipes = ran.stdout.splitlines()
    assert where.startswith(str(tmp_path)), ran.stderr
    assert backend == "reference | stage1_pro._core is not built; NumPy computes the same, more slowly"
    assert figures == "0.1875 True"
    same, *files = recipes.split("|")
    assert same == "True"
    # Those of the checkout came along.
    assert {Path(one).name for one in files} == {one.name for one in (repository / "engines").glob("*.yaml")}
    assert all(one.startswith(str(tmp_path)) for one in files)


def test_modules_of_the_loop_are_found_under_their_first_names():
    pytest.importorskip("sqlalchemy")
    from stage1_pro.continual import _MOVED

    code = "\n".join(
        f"import {home}, stage1_pro.continual.{name} as old; assert old is {home}, old; "
        f"assert old.__spec__.name == '{home}'"
        for name, home in _MOVED.items()
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("DeprecationWarning: stage1_pro.continual.") == len(_MOVED)
