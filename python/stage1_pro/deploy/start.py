"""Starting a bundle: validity, then parity on its reference inputs, then ready; one step down where a step fails."""

from __future__ import annotations

from dataclasses import dataclass

from stage1_pro.deploy.bundle import REFERENCE, STAGES, Bundle
from stage1_pro.deploy.reference import Reference, check_parity, read_reference
from stage1_pro.deploy.runtime import AUTO, OF_RUNS, RUNTIMES, How, Runtime
from stage1_pro.errors import ArtifactError, DependencyError, DeviceError, InputError, Stage1Error, printable


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


def start(
    bundle: Bundle, runtime: str = "onnxruntime", *, threads: int = 0, trust_engines: bool = False
) -> tuple[Runtime, tuple[Step, ...]]:
    """Start a runtime that gives a verified bundle's reference outputs; gives it, and every step up to its own.

    ``auto`` tries the bundle's engines, each target's own precision first and then its fallbacks, and onnxruntime
    last. A named runtime goes through its own engines and never becomes another runtime.

    Args:
        bundle: a verified bundle.
        runtime: ``auto``, or a name in ``RUNTIMES``.
        threads: threads inside an operator; 0 = as the runtime has them, of onnxruntime as many as there are cores.
        trust_engines: run engines that were neither built here nor signed by a trusted key.

    Raises:
        InputError: no such runtime, none of its engines in the bundle, or torch, which runs no bundle.
        ArtifactError: nothing started, or the graphs do not give the reference outputs: the reasons of every step.
        DependencyError: nothing started for want of a library, a driver or a GPU.
    """
    if threads < 0:
        raise InputError(f"threads must be 0 (all cores) or more, got {threads}")
    if runtime == OF_RUNS:
        raise InputError(
            f"runtime must be auto, onnxruntime or an engine's for the bundle {bundle.path}, got '{runtime}': a bundle "
            "holds graphs and no weights torch could load; use Cascade.from_run(RUN), or `stage1 infer --run RUN`"
        )
    kinds = [RUNTIMES.find(name, also=("auto",)) for name in (AUTO if runtime == "auto" else (runtime,))]
    reference = read_reference(bundle)
    steps: list[Step] = []
    errors: list[Stage1Error] = []
    ladder = [(kind, source) for kind in kinds for source in kind.sources(bundle)]
    for kind, source in ladder:
        try:
            found, reason = _open(kind, bundle, How(threads, source=source), reference, trust_engines)
        except (ArtifactError, DependencyError, DeviceError) as error:
            errors.append(error)
            steps.append(Step(kind.name, source.place, source.precision, ready=False, reason=str(error)))
        else:
            ready = Step(kind.name, source.place, source.precision, ready=True, reason=reason)
            return found, (*steps, ready)
    if not ladder:
        here = sorted({entry.target for entry in bundle.manifest.engines}) or ["none"]
        raise InputError(
            f"runtime must have an engine in the bundle {bundle.path}, got '{runtime}' and engines for "
            f"{', '.join(here)}; export one with --target, or use --runtime auto or onnxruntime"
        )
    if not ladder[-1][1].engines:
        raise type(errors[-1])(str(errors[-1]) + "".join(f"; before it {step}" for step in steps[:-1]))
    worst = DependencyError if all(isinstance(error, DependencyError) for error in errors) else ArtifactError
    raise worst(
        f"runtime must start on one of the bundle's engines, got '{runtime}' and no start: "
        f"{'; '.join(map(str, steps))}; use --runtime auto to answer with onnxruntime then"
    )


def _open(
    kind: type[Runtime], bundle: Bundle, how: How, reference: Reference | None, trust_engines: bool
) -> tuple[Runtime, str]:
    """A runtime on its source, and why it may answer: whom its engines come from, and how near it is."""
    source = how.source
    assert source is not None
    if source.engines and set(source.engines) != set(STAGES):
        raise ArtifactError(f"{source.place} must hold an engine of both stages, got {', '.join(source.engines)}")
    if reference is None and not kind.answers_unchecked:
        raise ArtifactError(
            f"{'engines' if source.engines else kind.name} must be held against {REFERENCE}, which this bundle lacks; "
            "`stage1 build` makes one that has it"
        )
    from stage1_pro.deploy.trust import engine_trust

    why: set[str] = set()
    for entry in source.engines.values():
        trust = engine_trust(bundle, entry, trust_engines=trust_engines)
        if not trust.allowed:
            raise ArtifactError(f"{entry.path} must be trusted before it runs, got: {trust.reason}")
        why.add(trust.reason)
    try:
        runtime = kind.open(bundle, how)
        if reference is None:
            return runtime, f"not held against {REFERENCE}, which this bundle lacks"
        parity = check_parity(runtime, bundle, reference, source.tolerance)
        runtime.settle()
    except (Stage1Error, MemoryError):
        raise
    except Exception as error:
        # Bindings raise kinds of their own where library and driver do not fit.
        got = f"{type(error).__name__}: {printable(str(error))}"
        raise DeviceError(f"{source.place} must start in {kind.name} here, got {got}; see `stage1 doctor`") from error
    return runtime, "; ".join([*([" and ".join(sorted(why))] if why else []), str(parity)])
