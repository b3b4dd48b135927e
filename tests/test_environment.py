"""Nothing from outside changes a training unseen: equal bytes, a refusal, or another start.json."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import accelerate

import stage1_pro
from stage1_pro.config import load_config
from stage1_pro.data.synthetic import render_pool
from stage1_pro.errors import InputError

SOURCE = Path(accelerate.__file__).parent
# As its own source spells them; two are only the beginning of names.
NAMES = sorted({
    name
    for path in SOURCE.rglob("*.py")
    for name in re.findall(r"\bACCELERATE_[A-Z0-9_]*[A-Z0-9]\b", path.read_text(encoding="utf-8"))
})  # fmt: skip
OPTIONS = [
    "train.epochs=1", "train.workers=0", "train.batch_size=16", "gate.views=0", "model.image_size=16", "model.tap=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    stage1_pro.split(render_pool(folder / "pool", 90, seed=1, size=32), folder / "run", seed=0)
    return folder / "run"


def trained(scenes: Path, run: Path) -> tuple[bytes, bytes]:
    """Bytes of a training's start and of its model."""
    shutil.copytree(scenes, run)
    stage1_pro.train(run, load_config(None, OPTIONS))
    return (run / "start.json").read_bytes(), (run / "model_best.pth").read_bytes()


@pytest.fixture(scope="module")
def plain(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    return trained(scenes, tmp_path_factory.mktemp("plain") / "run")


def told(scenes: Path, run: Path, plain: tuple[bytes, bytes]) -> bool:
    """Whether a training ended in the same bytes, or told that it may not."""
    try:
        start, model = trained(scenes, run)
    except InputError as error:
        return "\n" not in str(error) and not (run / "start.json").exists()
    return model == plain[1] or start != plain[0]


def test_the_same_environment_gives_the_same_bytes(scenes: Path, tmp_path: Path, plain: tuple[bytes, bytes]) -> None:
    assert trained(scenes, tmp_path / "run") == plain


@pytest.mark.parametrize("name", NAMES)
def test_no_variable_of_accelerate_changes_a_training_unseen(
    name: str, scenes: Path, tmp_path: Path, plain: tuple[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(NAMES) > 30
    for number, value in enumerate({
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ["16", "1"], "ACCELERATE_DYNAMO_BACKEND": ["inductor", "no"],
        "ACCELERATE_MIXED_PRECISION": ["bf16"], "ACCELERATE_LOG_LEVEL": ["INFO"],
    }.get(name, ["true"])):  # fmt: skip
        monkeypatch.setenv(name, value)
        assert told(scenes, tmp_path / str(number), plain)


@pytest.mark.parametrize(
    "given",
    [
        {"LOCAL_RANK": "0"},
        {"RANK": "1"},
        {"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"},
        {"WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_a_part_of_a_launchers_variables_is_refused(
    given: dict[str, str], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=next(iter(given))):
        trained(scenes, tmp_path / "run")


THREADS = torch.get_num_threads()
# What is set in a process, and how it is set back.
FLAGS: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
    "threads": (lambda: torch.set_num_threads(3 - min(2, THREADS)), lambda: torch.set_num_threads(THREADS)),
    "denormals": (lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False)),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)),
    "device": (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
    "precision": (
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: torch.set_float32_matmul_precision("highest"),
    ),
    "deterministic": (
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.use_deterministic_algorithms(False),
    ),
    "no_grad": (lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True)),
    "mkldnn": (
        lambda: setattr(torch.backends.mkldnn, "enabled", False),
        lambda: setattr(torch.backends.mkldnn, "enabled", True),
    ),
    "attention": (
        lambda: torch.backends.cuda.enable_flash_sdp(False),
        lambda: torch.backends.cuda.enable_flash_sdp(True),
    ),
    "autocast": (lambda: torch.set_autocast_enabled("cpu", True), lambda: torch.set_autocast_enabled("cpu", False)),
}


@pytest.fixture(params=list(FLAGS))
def flag(request: pytest.FixtureRequest, plain: tuple[bytes, bytes]) -> Iterator[str]:
    change, restore = FLAGS[request.param]
    change()
    yield request.param
    restore()


def test_no_switch_of_torch_changes_a_training_unseen(
    flag: str, scenes: Path, tmp_path: Path, plain: tuple[bytes, bytes]
) -> None:
    assert told(scenes, tmp_path / "run", plain), flag


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        "OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1", "MKL_CBWR=COMPATIBLE", "ATEN_CPU_CAPABILITY=default",
        "ONEDNN_MAX_CPU_ISA=SSE41", "ONEDNN_DEFAULT_FPMATH_MODE=BF16", "DNNL_DEFAULT_FPMATH_MODE=BF16",
        "TORCH_MKLDNN_MATMUL_MIN_DIM=1", "TORCH_LINEAR_FLATTEN_3D=1", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1",
        "MKL_ENABLE_INSTRUCTIONS=SSE4_2", "MKL_DISABLE_FAST_MM=1", "OMP_DYNAMIC=true", "PYTORCH_JIT=0",
    ],
)  # fmt: skip
def test_no_variable_of_torchs_libraries_changes_a_training_unseen(given: str, scenes: Path, tmp_path: Path) -> None:
    results = []
    for number, extra in enumerate(({}, dict([given.split("=")]))):
        run = Path(shutil.copytree(scenes, tmp_path / str(number)))
        command = [sys.executable, "-m", "stage1_pro.cli", "train", "--run", str(run)]
        command += [word for option in OPTIONS for word in ("--set", option)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, **extra})
        results.append([(run / name).read_bytes() for name in ("start.json", "model_best.pth")])
    (start, model), (other_start, other_model) = results
    assert model == other_model or start != other_start
