"""What executes a model's stages: the ``Runtime`` base class and its registry. Importing it loads no library."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias

from stage1_pro.errors import ArtifactError, InputError
from stage1_pro.registry import Registry

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from stage1_pro.deploy.bundle import Bundle
    from stage1_pro.deploy.manifest import EngineEntry
    from stage1_pro.deploy.trained import Trained
    from stage1_pro.words import StageName

Arrays: TypeAlias = "dict[str, NDArray[np.float32]]"
FullPass: TypeAlias = "Callable[[NDArray[np.float32]], NDArray[np.float32]]"


@dataclass(frozen=True)
class Source:
    """The files of a bundle that a runtime would execute.

    ``place`` names them to people; ``tolerance`` is a key of ``reference.TOLERANCES``; ``engines`` are code, which is
    trusted before it is opened, and empty where graphs are executed.
    """

    place: str
    precision: str
    tolerance: str
    engines: Mapping[StageName, EngineEntry] = field(default_factory=dict)


@dataclass(frozen=True)
class How:
    """How a runtime is opened: threads of an operator (0: as the library has them), its device, and on which files."""

    threads: int = 0
    device: str = "cpu"
    source: Source | None = None


class Runtime(ABC):
    """Executes the stages of one bundle or run.

    A new one is a subclass with ``name``, ``open`` and ``run``, and a line in ``RUNTIMES`` or an entry point of the
    group ``stage1_pro.runtimes``. It answers only where it reproduces the bundle's reference outputs (``start``).
    """

    name: ClassVar[str]
    answers_unchecked: ClassVar[bool] = False
    """Whether it may answer for a bundle without reference outputs, which nothing can be held against."""
    device_seconds: float | None = None
    """Seconds that the device's own clock has measured so far; None without one."""

    @classmethod
    def sources(cls, bundle: Bundle) -> Sequence[Source]:
        """What it can execute of a bundle, the fastest first: the fp32 graphs, unless a subclass says otherwise."""
        return [Source(", ".join(stage.onnx for stage in bundle.manifest.stages.values()), "fp32", "onnxruntime")]

    @classmethod
    @abstractmethod
    def open(cls, model: Bundle | Trained, how: How) -> Self:
        """Load the stages of a verified bundle, or of a run's model.

        Raises:
            InputError: ``how`` asks for what it cannot do.
            ArtifactError: the files cannot be loaded, or are not what the manifest describes.
            DependencyError: a library, a driver or a device is missing.
        """

    @abstractmethod
    def run(self, stage: StageName, inputs: Mapping[str, NDArray[np.float32]]) -> Arrays:
        """Outputs by name, float32 [N, ...], for inputs by name, float32 [N, ...]; the first axis is the batch.

        Raises:
            ArtifactError: the stage cannot be run, or gives something else than the manifest says.
        """

    def settle(self) -> None:  # noqa: B027 - most runtimes have nothing to keep
        """Keep what was compiled for this machine, once the reference outputs were right; nothing by default."""

    def full_pass(self, folder: Path) -> FullPass:
        """Stage B's logits [N, K] from pixels [N, 3, H, W], without Stage A's heads where that can be left out.

        Args:
            folder: for files of its own, as long as the pass is used.
        """
        del folder

        def both(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
            hidden = self.run("stage_a", {"pixels": pixels})["hidden"]
            return self.run("stage_b", {"hidden": hidden})["logits"]

        return both

    def shares(self, pixels: NDArray[np.float32], folder: Path, seconds: float) -> dict[str, float]:
        """Shares of ``embedding`` and ``heads`` in a full pass on these pixels; empty where they are not known.

        Args:
            pixels: [N, 3, H, W].
            folder: the one that ``full_pass`` was given.
            seconds: of a full pass on them.
        """
        del pixels, folder, seconds
        return {}


def bundle_of(model: Bundle | Trained, name: str) -> Bundle:
    """The bundle whose files a runtime executes; InputError for a run's model, which has no such files yet."""
    from stage1_pro.deploy.bundle import Bundle

    if not isinstance(model, Bundle):
        raise InputError(f"runtime must be {OF_RUNS} for a run, got '{name}', which needs its bundle; export it first")
    return model


def check_outputs(found: Arrays, stage: StageName, expected: Mapping[str, Sequence[int]], rows: int) -> None:
    """Raise ArtifactError when a stage's outputs, by name, are not float32 of the manifest's shapes after the batch."""
    for name, shape in expected.items():
        value = found[name]
        if value.dtype != "float32" or list(value.shape) != [rows, *shape[1:]]:
            raise ArtifactError(
                f"{name} of {stage} must be float32 {[rows, *shape[1:]]}, got {value.dtype} {list(value.shape)}"
            )


RUNTIMES: Registry[type[Runtime]] = Registry(
    "runtime",
    "stage1_pro.runtimes",
    {
        "onnxruntime": "stage1_pro.deploy.onnxruntime:OnnxRuntime",
        "tensorrt_rtx": "stage1_pro.deploy.tensorrt:TensorRtForRtx",
        "tensorrt": "stage1_pro.deploy.tensorrt:ClassicTensorRt",
        "openvino": "stage1_pro.deploy.openvino:OpenVinoRuntime",
        "torch": "stage1_pro.deploy.trained:TorchRuntime",
    },
)
# What ``auto`` tries, from the fastest to the surest.
AUTO = ("tensorrt_rtx", "tensorrt", "onnxruntime")
# Runs the weights of a run, which a bundle does not hold.
OF_RUNS = "torch"
# For help, which looks for no entry points.
NAMES = ", ".join((*(name for name in RUNTIMES.built_in if name != OF_RUNS), "auto"))
