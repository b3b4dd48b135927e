"""Compiled engines: an ONNX graph and a recipe in, an engine with its audit out; no GPU needed."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from stage1_pro.deploy.bundle import Bundle
from stage1_pro.deploy.manifest import EngineEntry, StageEntry
from stage1_pro.deploy.trust import remember_built
from stage1_pro.errors import ArtifactError, InputError, nearest, need
from stage1_pro.files import atomic_path, sha256_file
from stage1_pro.progress import console, on_terminal, say
from stage1_pro.record import Record, read_yaml, wrong
from stage1_pro.words import Precision, StageName

if TYPE_CHECKING:
    # The classic bindings' published stubs: mypy holds the one code path against them. TensorRT for RTX has the same
    # names; what it alone has is asked for by `hasattr`.
    import tensorrt

EngineTarget = Literal["rtx", "tensorrt"]


class BuilderInfo(NamedTuple):
    """A builder: its Python module, the extra that installs it, and its name for people."""

    module: str
    extra: str
    title: str


BUILDERS: dict[str, BuilderInfo] = {
    "rtx": BuilderInfo("tensorrt_rtx", "rtx", "TensorRT for RTX"),
    "tensorrt": BuilderInfo("tensorrt", "tensorrt", "classic TensorRT"),
}
HEADER_SIZE = 64
_AUDIT_LINES = 200
_DATA_CENTRE = ("SM90", "SM100", "SM103")
# Cards from Ampere on compute the types that are not named here.
_UNSUPPORTED: dict[str, tuple[Precision, ...]] = {"SM75": ("fp32", "bf16", "fp8"), "SM80": ("fp8",), "SM86": ("fp8",)}
_EXPORTED: tuple[Precision, ...] = ("res32", "fp16", "bf16", "fp32")
UNQUANTISED = (
    "int8 and fp8 are not exported: calibrated by NVIDIA ModelOpt they erred 100 times more than res32 and had more "
    "layers, and ModelOpt's ONNX part pins other versions of onnx and onnxruntime than this package (engines/README.md)"
)
BatchProfile = tuple[int, int, int]
Batch = BatchProfile | dict[StageName, BatchProfile]


class EngineRecipe(Record):
    """What an engine is built for; ``engines/*.yaml`` holds these."""

    target: EngineTarget = "rtx"
    precision: Precision = Field(default="fp32", description="type of the graph; engines are strongly typed")
    fallbacks: tuple[Precision, ...] = Field(
        default=(),
        description="built as well, in the order in which a runtime steps down when parity fails on its card",
    )
    compute_capabilities: tuple[str, ...] = Field(
        default=(),
        description="like SM86, SM120; empty = Ampere and later (rtx), the building machine's card (tensorrt)",
    )
    batch: Batch = Field(
        default=(1, 8, 64), description="smallest, optimal and largest batch, for both stages or by stage"
    )

    @field_validator("batch")
    @classmethod
    def _ordered(cls, batch: Batch) -> Batch:
        profiles = batch if isinstance(batch, dict) else {"stage_a": batch, "stage_b": batch}
        if set(profiles) != {"stage_a", "stage_b"}:
            raise ValueError(f"batch by stage must have stage_a and stage_b, got {', '.join(profiles) or 'none'}")
        for low, best, high in profiles.values():
            if not 1 <= low <= best <= high:
                raise ValueError(f"batch must rise from 1 on (smallest, optimal, largest), got {[low, best, high]}")
        return batch

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        if len(set(self.ladder)) != len(self.ladder):
            raise ValueError(f"fallbacks must differ from the precision and each other, got {', '.join(self.ladder)}")
        return self

    @property
    def ladder(self) -> tuple[Precision, ...]:
        """The precision and its fallbacks, in the order in which they are tried."""
        return (self.precision, *self.fallbacks)

    def profile(self, stage: StageName) -> BatchProfile:
        """Smallest, optimal and largest batch of a stage."""
        return self.batch[stage] if isinstance(self.batch, dict) else self.batch


class LayerRecord(Record):
    """One layer of the final, fused engine."""

    name: str
    kind: str


class BuildRecord(Record):
    """``<stage>.build.json``: what was built from what, and what the builder made of it."""

    format_version: Literal[1] = 1
    stage: StageName
    precision: Precision
    recipe: EngineRecipe
    builder: str
    builder_version: str
    onnx_sha256: str
    engine_sha256: str
    engine_size: int
    layers: list[LayerRecord]
    attention_layers: int = Field(description="layers that are one fused multi-head attention kernel")
    log: list[str] = Field(description="the builder's messages from INFO up, without folders of the machine")


def recipes() -> dict[str, Path]:
    """The recipes that come along, by name: of the installed package, or of its checkout."""
    package = Path(__file__).parents[1]
    folder = next(one for one in (package / "engines", package.parents[1] / "engines") if one.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_recipe(path: Path | str) -> EngineRecipe:
    """Read a recipe, a file or one that comes along; raise InputError naming the wrong key and the nearest one."""
    named = Path(path)
    if not named.exists() and str(named.parent) in (".", "engines"):
        known = recipes()
        if named.stem not in known:
            raise InputError(
                f"--recipe must be a YAML file or one of {', '.join(known)}, got {path}{nearest(named.stem, known)}"
            )
        path = known[named.stem]
    values, options = read_yaml(path), list(EngineRecipe.model_fields)
    for key in values:
        if key not in options:
            raise InputError(f"unknown key '{key}' in {path}{nearest(str(key), options)}; known: {', '.join(options)}")
    try:
        return EngineRecipe.model_validate(values)
    except ValidationError as error:
        raise InputError(f"recipe {path}: {wrong(error, whole='recipe')}") from None


def choose_recipe(
    target: EngineTarget | None, recipe: Path | str | EngineRecipe | None, precisions: Sequence[Precision] = ()
) -> EngineRecipe:
    """The recipe that was asked for, checked: refused cards and a missing builder are found before anything slow.

    Args:
        target: builder; the recipe's when None.
        recipe: recipe, its YAML file or the name of one that comes along, such as ``rtx-res32``; None: the default.
        precisions: in place of the recipe's precision (the first) and its fallbacks (the others).

    Raises:
        InputError: target and recipe disagree, or as ``check_recipe``.
        DependencyError: the builder is not installed.
    """
    if recipe is None:
        recipe = EngineRecipe(target=target or "rtx")
    elif not isinstance(recipe, EngineRecipe):
        recipe = load_recipe(recipe)
    if target is not None and recipe.target != target:
        raise InputError(f"target must be the recipe's ({recipe.target}), got '{target}'")
    if precisions:
        first, *others = dict.fromkeys(precisions)
        recipe = recipe.model_copy(update={"precision": first, "fallbacks": tuple(others)})
    check_recipe(recipe)
    return recipe


def import_builder(target: str) -> Any:
    """The builder's module; DependencyError names the extra that brings it."""
    if target not in BUILDERS:
        raise InputError(f"target must be one of {', '.join(BUILDERS)}, got '{target}'{nearest(target, BUILDERS)}")
    name, extra, _ = BUILDERS[target]
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        raise need(extra, name) from error
    # Stubs without the library leave a folder of the module's name, which imports as an empty package.
    if not hasattr(module, "Builder"):
        raise need(extra, name)
    return module


def engine_path(recipe: EngineRecipe, stage: StageName, precision: Precision | None = None) -> str:
    """Place of an engine inside its bundle; a fallback's folder names its precision, the recipe's own does not."""
    fallback = "" if precision in (None, recipe.precision) else f"-{precision}"
    return f"engines/{recipe.target}{fallback}/{stage}.engine"


def check_recipe(recipe: EngineRecipe) -> list[str]:
    """Names of the compute capabilities an engine of this recipe is for.

    Raises:
        InputError: the builder refuses one of them, or a card cannot compute a precision; names what works.
        DependencyError: the builder is not installed.
    """
    for name in recipe.compute_capabilities:
        if not re.fullmatch(r"SM\d+", name):
            raise InputError(
                f"compute_capabilities must be named like SM86, got '{name}'; name cards as SM and their "
                "compute capability without the point"
            )
        _check_card(recipe, name)
    for precision in recipe.ladder:
        if precision not in _EXPORTED:
            raise InputError(f"precision must be one of {', '.join(_EXPORTED)}, got '{precision}'; {UNQUANTISED}")
    trt = import_builder(recipe.target)
    if not hasattr(trt, "ComputeCapability"):
        return list(recipe.compute_capabilities)
    known = [name for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    fit = [name for name in known if not set(_UNSUPPORTED.get(name, ())) & set(recipe.ladder)]
    works = sorted(fit, key=lambda name: int(name[2:]))
    for name in recipe.compute_capabilities:
        if name not in works:
            raise InputError(f"compute_capabilities must be among {', '.join(works)}, got '{name}'")
    # Without a choice the builder takes Ampere and later.
    return list(recipe.compute_capabilities) or [name for name in works if name != "SM75"]


def _check_card(recipe: EngineRecipe, name: str) -> None:
    title = BUILDERS[recipe.target].title
    if recipe.target == "rtx" and name in _DATA_CENTRE:
        raise InputError(
            f"compute_capabilities must be of RTX cards for target rtx, got '{name}', a data-centre card that {title} "
            "refuses; build with target tensorrt on that machine (engines/tensorrt.yaml), or serve the ONNX graphs"
        )
    for precision in recipe.ladder:
        if precision in _UNSUPPORTED.get(name, ()):
            works = [p for p in _EXPORTED if p not in _UNSUPPORTED[name]]
            cards = "SM89, SM120 or later" if precision == "fp8" else "SM80 or later"
            raise InputError(
                f"precision must be one that {name} computes in {title}, got '{precision}'; "
                f"use {' or '.join(works)} there, or {cards} for {precision}"
            )


def build_engines(stages: Mapping[StageName, StageEntry], folder: Path, recipe: EngineRecipe) -> list[EngineEntry]:
    """Compile every stage in the recipe's precision and its fallbacks, from the graphs of a bundle's folder into it.

    Raises:
        InputError: a precision that was not exported; names those that were, and how to get it.
        ArtifactError, DependencyError: as ``build_engine``.
    """
    check_recipe(recipe)
    # fp32 is there whatever else is.
    graphs: dict[StageName, dict[Precision, str]] = {
        stage: {"fp32": entry.onnx, **{precision: variant.onnx for precision, variant in entry.variants.items()}}
        for stage, entry in stages.items()
    }
    for stage, there in graphs.items():
        for precision in recipe.ladder:
            if precision not in there:
                raise InputError(
                    f"precision must be one {stage} was exported in ({', '.join(there)}), got '{precision}'; "
                    f"export the run with --precision {precision}"
                )
    engines = []
    for precision in recipe.ladder:
        for stage, there in graphs.items():
            engine = build_engine(folder / there[precision], folder, recipe, stage, precision)
            say(
                f"{stage} in {precision}: {engine.build_seconds:.1f} s, {engine.layers} fused layers, "
                f"{engine.attention_layers} fused attentions; {engine.validated}"
            )
            engines.append(engine)
    return engines


def build_engine(
    onnx: Path, out: Path, recipe: EngineRecipe, stage: StageName, precision: Precision | None = None
) -> EngineEntry:
    """Compile one stage's graph for the recipe's cards, into ``engine_path`` of a bundle's folder.

    Args:
        onnx: the graph; its external data, if any, is found beside it.
        out: bundle folder; the engine's ``BuildRecord`` is written beside it.
        recipe: cards and batch profile.
        stage: which stage the graph is.
        precision: of the graph, one of the recipe's ladder; the recipe's own when None.

    Returns:
        The manifest entry; ``validated`` says what was checked here, and whether it ever ran.

    Raises:
        InputError: a card or precision the builder refuses.
        ArtifactError: the graph cannot be built, or the engine's header is malformed.
        DependencyError: the builder is not installed.
    """
    trt = import_builder(recipe.target)
    capabilities = check_recipe(recipe)
    if not hasattr(trt, "ComputeCapability"):
        capabilities = _check_present(recipe)
    precision = precision or recipe.precision
    digest = sha256_file(onnx)
    logger = _logger(trt)
    say(f"building {stage} in {precision} with {trt.__name__} {trt.__version__}")
    started = time.perf_counter()
    plan = _build(trt, Path(onnx), recipe, stage, logger)
    seconds = time.perf_counter() - started
    layers = parse_layers(logger.lines) or _inspect(trt, plan, logger)
    if not layers:
        raise ArtifactError(f"the builder's log of {stage} must end with its layer list, got none")
    validated = check_header(bytes(memoryview(plan)[:HEADER_SIZE]), recipe.target)
    relative = engine_path(recipe, stage, precision)
    engine = Path(out) / relative
    with atomic_path(engine) as temporary:
        temporary.write_bytes(memoryview(plan))
    built = remember_built(engine)
    # From INFO up; driver complaints say only that no GPU is here.
    told = [
        f"{severity}: {sanitise(message)}"
        for severity, message in logger.lines
        if severity in ("INFO", "WARNING", "ERROR") and "CUDA" not in message
    ]
    # What the engine's own record and the manifest both say.
    facts: dict[str, Any] = {
        "stage": stage, "precision": precision, "builder": trt.__name__, "builder_version": trt.__version__,
        "onnx_sha256": digest, "attention_layers": sum("mha" in layer.name.lower() for layer in layers),
    }  # fmt: skip
    BuildRecord(
        **facts, recipe=recipe, engine_sha256=built, engine_size=engine.stat().st_size, layers=layers,
        log=told[-_AUDIT_LINES:],
    ).write(engine.with_suffix(".build.json"))  # fmt: skip
    return EngineEntry(
        **facts, path=relative, target=recipe.target, compute_capabilities=capabilities, batch=recipe.profile(stage),
        layers=len(layers), build_seconds=round(seconds, 3), validated=validated,
    )  # fmt: skip


def read_engine(bundle: Bundle, entry: EngineEntry) -> bytes:
    """An engine's bytes, which are the manifest's and have a well-formed header.

    Whether they may run at all is another question, which comes first: ``engine_trust``.

    Raises:
        ArtifactError: the file was changed, or is no engine.
        DependencyError: the engine's runtime is not installed.
    """
    data = bundle.read(entry.path)
    check_header(data[:HEADER_SIZE], entry.target)
    return data


def check_header(header: bytes, target: str = "rtx") -> str:
    """Say what the builder's runtime thinks of an engine's first 64 bytes, without loading it.

    Raises:
        ArtifactError: the header is malformed.
        DependencyError: the builder is not installed.
    """
    if len(header) < HEADER_SIZE:
        raise ArtifactError(f"an engine must start with a header of {HEADER_SIZE} bytes, got {len(header)}")
    trt = import_builder(target)
    if not hasattr(trt, "EngineValidity"):
        return "header not checked: this runtime cannot; not run"
    validity, mask = trt.Runtime(_logger(trt)).get_engine_validity(header[:HEADER_SIZE])
    reasons = [flag.name for flag in trt.EngineInvalidityDiagnostics.__members__.values() if int(flag) & mask]
    if "MALFORMED_ENGINE" in reasons:
        raise ArtifactError(f"an engine must start with a {trt.__name__} header, got one that is malformed")
    if validity == trt.EngineValidity.INVALID:
        # No driver gives INVALID without any reason.
        why = ", ".join(reasons).lower().replace("_", " ") or "no GPU driver"
        return f"header well formed; not run here ({why})"
    return f"header well formed, {validity.name.lower()} on the GPU here; not run"


def _check_present(recipe: EngineRecipe) -> list[str]:
    """The card of this machine, for which classic TensorRT builds; it has to be the recipe's."""
    card = _present_card()
    if card is None:
        raise ArtifactError(
            "classic TensorRT must build on the machine whose GPU will run the engine, got no GPU driver here; send "
            "the bundle there and run `stage1 build` on it, or build with target rtx, which needs no GPU"
        )
    if recipe.compute_capabilities and card not in recipe.compute_capabilities:
        raise InputError(
            f"compute_capabilities must hold this machine's card ({card}) for classic TensorRT, got "
            f"{', '.join(recipe.compute_capabilities)}; build on such a machine, or take a recipe for {card}"
        )
    _check_card(recipe, card)
    return [card]


def _present_card() -> str | None:
    """Compute capability of the first GPU as SM and digits, from the driver itself; None without one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, digits = ctypes.c_int(), []
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        digits.append(str(value.value))
    return "SM" + "".join(digits)


def parse_layers(lines: list[tuple[str, str]]) -> list[LayerRecord]:
    """The fused layers of the last layer list in a DETAILED, VERBOSE build log."""
    listed = [message for _, message in lines if message.startswith("Layers:")]
    if not listed:
        return []
    found = re.findall(r"^Name: (.+?), LayerType: ([^,\s]+)", listed[-1], flags=re.MULTILINE)
    return [LayerRecord(name=name, kind=kind) for name, kind in found]


def sanitise(message: str) -> str:
    """Cut absolute paths down to their last part: folders of the building machine do not travel."""
    message = re.sub(r"(?<![\w.:/])(?:/[^\s/'\":,;()\[\]]+)+/(?=[^\s/])", "", message)
    return re.sub(r"\b[A-Za-z]:\\(?:[^\s\\'\":,;()\[\]]+\\)+", "", message)


def _inspect(module: Any, plan: Any, logger: Any) -> list[LayerRecord]:
    """The fused layers of a new engine, where the log does not list them; none without a GPU."""
    if TYPE_CHECKING:
        trt = tensorrt
    else:
        trt = module
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan)
    if engine is None:
        return []
    told = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return inspected_layers(json.loads(told))


def inspected_layers(told: Mapping[str, Any]) -> list[LayerRecord]:
    """The layers of an inspector's JSON: records from a DETAILED build, mere names from others."""
    return [
        LayerRecord(name=str(layer["Name"]), kind=str(layer.get("LayerType", "")))
        if isinstance(layer, dict)
        else LayerRecord(name=str(layer), kind="")
        for layer in told.get("Layers", [])
    ]


def _logger(module: Any) -> Any:
    """A logger that keeps every message as (severity, text) and prints none."""
    if TYPE_CHECKING:
        trt = tensorrt
    else:
        trt = module

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append((severity.name, message))

    return Logger()


def _build(module: Any, onnx: Path, recipe: EngineRecipe, stage: StageName, logger: Any) -> Any:
    if TYPE_CHECKING:
        trt = tensorrt
    else:
        trt = module
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        raise ArtifactError(f"{onnx.name} must be a graph {trt.__name__} can parse, got: {_first(reasons)}")
    config = builder.create_builder_config()
    # Without it the log has no layer list, and the fusion audit nothing to read.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        low, best, high = (trt.Dims([size, *tensor.shape[1:]]) for size in recipe.profile(stage))
        profile.set_shape(tensor.name, low, best, high)
    if config.add_optimization_profile(profile) < 0:
        raise ArtifactError(
            f"batch {list(recipe.profile(stage))} must fit the graph of {stage}, got a profile it refuses"
        )
    if hasattr(module, "ComputeCapability") and recipe.compute_capabilities:
        _set_cards(module, config, recipe)
    with _progress(module, config, stage):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        reasons = [message for severity, message in logger.lines if severity == "ERROR"]
        raise ArtifactError(f"{stage} could not be built by {trt.__name__}: {_first(reasons)}")
    return plan


def _set_cards(module: Any, config: Any, recipe: EngineRecipe) -> None:
    """Name the cards to build for, which TensorRT for RTX alone can do: the classic stubs know no such thing."""
    config.num_compute_capabilities = len(recipe.compute_capabilities)
    for index, name in enumerate(recipe.compute_capabilities):
        config.set_compute_capability(getattr(module.ComputeCapability, name), index)


def _first(reasons: list[str]) -> str:
    return sanitise(reasons[0].splitlines()[0])[:400] if reasons else "no reason given"


@contextlib.contextmanager
def _progress(module: Any, config: Any, stage: str) -> Iterator[None]:
    """Show the builder's phases on a terminal."""
    if TYPE_CHECKING:
        trt = tensorrt
    else:
        trt = module
    if not on_terminal():
        yield
        return
    from rich.progress import Progress

    with Progress(console=console(), transient=True) as bar:
        tasks: dict[str, Any] = {}

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, name: str, _parent: str | None, steps: int) -> None:
                tasks[name] = bar.add_task(f"{stage}: {name}"[:60], total=steps)

            def step_complete(self, name: str, step: int) -> bool:
                if name in tasks:
                    bar.update(tasks[name], completed=step)
                return True

            def phase_finish(self, name: str) -> None:
                if name in tasks:
                    bar.remove_task(tasks.pop(name))

        monitor = Monitor()
        config.progress_monitor = monitor
        yield
