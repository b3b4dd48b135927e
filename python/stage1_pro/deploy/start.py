"""Starting a bundle: validity, then parity on its reference inputs, then ready; one step down where a step fails."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from stage1_pro.deploy.bundle import STAGES, Bundle
from stage1_pro.deploy.manifest import EngineEntry
from stage1_pro.deploy.reference import REFERENCE, Reference, check_parity, read_reference
from stage1_pro.deploy.runtime import OnnxRuntime, Runtime
from stage1_pro.deploy.tensorrt import ENGINE_RUNTIMES, TensorRtRuntime
from stage1_pro.errors import ArtifactError, DependencyError, DeviceError, InputError, Stage1Error, nearest, printable
from stage1_pro.words import StageName

RUNTIMES = ("auto", "onnxruntime", *ENGINE_RUNTIMES.values(), "torch")
# From the fastest to the surest; what a recipe builds for itself comes before all of its fallbacks.
LADDER = ("int8", "fp8", "res32", "fp16", "bf16", "fp32")


@dataclass(frozen=True)
class Step:
    """One runtime that was tried: on which files, whether it is the one that answers, and why (not)."""

    runtime: str
    source: str
    precision: str
    ready: bool
    reason: str

    def __str__(self) -> str:
        """In one line."""
        return f"{self.runtime} on {self.source} ({self.precision}): {self.reason}"


@dataclass(frozen=True)
class Started:
    """A runtime that gave the bundle's reference outputs, and every step on the way to it; the last is its own."""

    runtime: Runtime
    steps: tuple[Step, ...]


def start(bundle: Bundle, runtime: str = "onnxruntime", *, threads: int = 0, trust_engines: bool = False) -> Started:
    """Start a runtime on a verified bundle.

    ``auto`` tries the bundle's engines, each target's own precision first and then its fallbacks, and onnxruntime
    last. A named runtime goes through its own engines and never becomes another runtime.

    Args:
        bundle: a verified bundle.
        runtime: one of ``RUNTIMES``.
        threads: onnxruntime's threads inside an operator; 0 = as many as there are cores.
        trust_engines: run engines that were neither built here nor signed by a trusted key.

    Raises:
        InputError: no such runtime, none of its engines in the bundle, or torch, which runs no bundle.
        ArtifactError: nothing started, or the graphs do not give the reference outputs: the reasons of every step.
        DependencyError: nothing started for want of a library, a driver or a GPU.
    """
    if runtime not in RUNTIMES:
        raise InputError(f"runtime must be one of {', '.join(RUNTIMES)}, got '{runtime}'{nearest(runtime, RUNTIMES)}")
    if threads < 0:
        raise InputError(f"threads must be 0 (all cores) or more, got {threads}")
    if runtime == "torch":
        raise InputError(
            f"runtime must be auto, onnxruntime or an engine's for the bundle {bundle.path}, got 'torch': a bundle "
            "holds graphs and no weights torch could load; use Cascade.from_run(RUN), or `stage1 infer --run RUN`"
        )
    reference = read_reference(bundle)
    steps: list[Step] = []
    errors: list[Stage1Error] = []
    for name, folder, engines in _ladder(bundle):
        if runtime not in ("auto", name):
            continue
        precision = engines["stage_a"].precision if "stage_a" in engines else "incomplete"
        try:
            started = _start_engines(bundle, engines, folder, reference, trust_engines)
        except (ArtifactError, DependencyError, DeviceError) as error:
            errors.append(error)
            steps.append(Step(name, folder, precision, ready=False, reason=str(error)))
        else:
            found, reason = started
            return Started(found, (*steps, Step(name, folder, precision, ready=True, reason=reason)))
    if runtime in ("auto", "onnxruntime"):
        return _start_graphs(bundle, threads, reference, steps)
    if not steps:
        here = sorted({name for name, _, _ in _ladder(bundle)}) or ["none"]
        raise InputError(
            f"runtime must have an engine in the bundle {bundle.path}, got '{runtime}' and engines for "
            f"{', '.join(here)}; export one with --target, or use --runtime auto or onnxruntime"
        )
    kind = DependencyError if all(isinstance(error, DependencyError) for error in errors) else ArtifactError
    raise kind(
        f"runtime must start on one of the bundle's engines, got '{runtime}' and no start: "
        f"{'; '.join(map(str, steps))}; use --runtime auto to answer with onnxruntime then"
    )


def _ladder(bundle: Bundle) -> Iterator[tuple[str, str, dict[StageName, EngineEntry]]]:
    """Runtime, folder and engines by stage, in the order they are tried."""
    folders: dict[str, dict[StageName, EngineEntry]] = {}
    for entry in bundle.manifest.engines:
        folders.setdefault(str(PurePosixPath(entry.path).parent), {})[entry.stage] = entry

    def rank(folder: str) -> tuple[int, bool, int]:
        entry = next(iter(folders[folder].values()))
        own = PurePosixPath(folder).name == entry.target
        return list(ENGINE_RUNTIMES).index(entry.target), not own, LADDER.index(entry.precision)

    known = [name for name, engines in folders.items() if all(e.target in ENGINE_RUNTIMES for e in engines.values())]
    for folder in sorted(known, key=rank):
        yield ENGINE_RUNTIMES[next(iter(folders[folder].values())).target], folder, folders[folder]


def _start_engines(
    bundle: Bundle,
    engines: Mapping[StageName, EngineEntry],
    folder: str,
    reference: Reference | None,
    trust_engines: bool,
) -> tuple[Runtime, str]:
    if set(engines) != set(STAGES):
        raise ArtifactError(f"{folder} must hold an engine of both stages, got {', '.join(engines)}")
    if reference is None:
        raise ArtifactError(
            f"engines must be held against {REFERENCE}, which this bundle lacks; `stage1 build` makes one that has it"
        )
    why = {_trust(bundle, engines[stage], trust_engines) for stage in STAGES}
    try:
        runtime = TensorRtRuntime(bundle, engines)
        parity = check_parity(runtime, bundle, reference, engines["stage_a"].precision)
        runtime.settle()
    except Stage1Error:
        raise
    except Exception as error:
        # Bindings raise kinds of their own where library and driver do not fit.
        got = f"{type(error).__name__}: {printable(str(error))}"
        raise DeviceError(f"{folder} must start on this GPU, got {got}; see `stage1 doctor` and nvidia-smi") from error
    return runtime, f"{' and '.join(sorted(why))}; {parity}"


def _trust(bundle: Bundle, entry: EngineEntry, trust_engines: bool) -> str:
    """Why an engine may run; ArtifactError says why it may not."""
    from stage1_pro.deploy.trust import engine_trust

    trust = engine_trust(bundle, entry, trust_engines=trust_engines)
    if not trust.allowed:
        raise ArtifactError(f"{entry.path} must be trusted before it runs, got: {trust.reason}")
    return trust.reason


def _start_graphs(bundle: Bundle, threads: int, reference: Reference | None, steps: list[Step]) -> Started:
    """Onnxruntime, the last step: there is nothing below it."""
    source = ", ".join(bundle.manifest.stages[stage].onnx for stage in STAGES)
    runtime = OnnxRuntime(bundle, threads)
    if reference is None:
        reason = f"not held against {REFERENCE}, which this bundle lacks"
    else:
        try:
            reason = str(check_parity(runtime, bundle, reference, runtime.name))
        except ArtifactError as error:
            before = "".join(f"; before it {step}" for step in steps)
            raise ArtifactError(f"{error}{before}") from None
    return Started(runtime, (*steps, Step(runtime.name, source, "fp32", ready=True, reason=reason)))
