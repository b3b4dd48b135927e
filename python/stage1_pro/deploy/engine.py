"""Compiled engines: an ONNX graph and a recipe in, an engine with its audit out; no GPU needed."""

from __future__ import annotations

import contextlib
import importlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from stage1_pro.artifacts import EngineEntry, Record, StageName, atomic_path, sha256_file
from stage1_pro.errors import ArtifactError, InputError, nearest, need
from stage1_pro.progress import say

# Target → Python module of its builder and the extra that installs it.
BUILDERS: dict[str, tuple[str, str]] = {"rtx": ("tensorrt_rtx", "rtx")}
HEADER_SIZE = 64
_AUDIT_LINES = 200
_DATA_CENTRE = ("SM90", "SM100", "SM103")


class EngineRecipe(Record):
    """What an engine is built for; ``engines/*.yaml`` holds these."""

    target: Literal["rtx"] = "rtx"
    precision: Literal["fp32"] = Field(default="fp32", description="type of the graph; engines are strongly typed")
    compute_capabilities: tuple[str, ...] = Field(default=(), description="like SM86, SM120; empty = Ampere and later")
    batch: tuple[int, int, int] = Field(default=(1, 8, 64), description="smallest, optimal and largest batch")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        low, best, high = self.batch
        if not 1 <= low <= best <= high:
            raise ValueError(f"batch must rise from 1 on (smallest, optimal, largest), got {list(self.batch)}")
        return self


class LayerRecord(Record):
    """One layer of the final, fused engine."""

    name: str
    kind: str


class BuildRecord(Record):
    """``<stage>.build.json``: what was built from what, and what the builder made of it."""

    format_version: Literal[1] = 1
    stage: StageName
    recipe: EngineRecipe
    builder: str
    builder_version: str
    onnx_sha256: str
    engine_sha256: str
    engine_size: int
    layers: list[LayerRecord]
    attention_layers: int = Field(description="layers that are one fused multi-head attention kernel")
    log: list[str] = Field(description="the builder's messages from INFO up, without folders of the machine")


def load_recipe(path: Path | str) -> EngineRecipe:
    """Read a recipe; raise InputError naming the wrong key and the nearest right one."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"recipe must name an existing file, got {path}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"recipe {path} must be YAML, got: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"recipe {path} must hold a mapping, got {type(values).__name__}")
    try:
        return EngineRecipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "recipe"
        if first["type"] == "extra_forbidden":
            options = list(EngineRecipe.model_fields)
            raise InputError(
                f"unknown key '{key}' in {path}{nearest(key, options)}; known here: {', '.join(options)}"
            ) from None
        raise InputError(f"'{key}' in {path} must be valid, got {first['input']!r}; {first['msg']}") from None


def import_builder(target: str) -> Any:
    """The builder's module; DependencyError names the extra that brings it."""
    if target not in BUILDERS:
        raise InputError(f"target must be one of {', '.join(BUILDERS)}, got '{target}'{nearest(target, BUILDERS)}")
    module, extra = BUILDERS[target]
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise need(extra, module) from error


def engine_path(recipe: EngineRecipe, stage: StageName) -> str:
    """Place of an engine inside its bundle."""
    return f"engines/{recipe.target}/{stage}.engine"


def check_recipe(recipe: EngineRecipe) -> list[str]:
    """Names of the compute capabilities an engine of this recipe is for.

    Raises:
        InputError: the builder refuses one of them; the message names those that work.
        DependencyError: the builder is not installed.
    """
    trt = import_builder(recipe.target)
    if not hasattr(trt, "ComputeCapability"):
        return []
    known = [name for name in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", name)]
    # Turing has no fp32 matrix multiplication in this builder, and a build ends with an error after minutes.
    works = sorted((name for name in known if name != "SM75"), key=lambda name: int(name[2:]))
    for name in recipe.compute_capabilities:
        if name not in works:
            reason = (
                "data-centre cards are refused by TensorRT for RTX: serve them with the bundle's ONNX graphs"
                if name in _DATA_CENTRE
                else "Turing has no fp32 matrix multiplication in TensorRT for RTX"
                if name == "SM75"
                else "name cards as SM and their compute capability"
            )
            raise InputError(f"compute_capabilities must be among {', '.join(works)}, got '{name}'; {reason}")
    return list(recipe.compute_capabilities) or works


def build_engine(onnx: Path, out: Path, recipe: EngineRecipe, stage: StageName) -> EngineEntry:
    """Compile one stage's graph for the recipe's cards.

    Args:
        onnx: the graph; its external data, if any, is found beside it.
        out: bundle folder; the engine is written to ``engines/<target>/<stage>.engine`` in it, with its
            ``BuildRecord`` beside it.
        recipe: cards, precision and batch profile.
        stage: which stage the graph is.

    Returns:
        The manifest entry; ``validated`` says what was checked here, and whether it ever ran.

    Raises:
        InputError: a card the builder refuses.
        ArtifactError: the graph cannot be built, or the engine's header is malformed.
        DependencyError: the builder is not installed.
    """
    trt = import_builder(recipe.target)
    capabilities = check_recipe(recipe)
    digest = sha256_file(onnx)
    logger = _logger(trt)
    say(f"building {stage} with {trt.__name__} {trt.__version__}")
    started = time.perf_counter()
    plan = _build(trt, Path(onnx), recipe, stage, logger)
    seconds = time.perf_counter() - started
    layers = parse_layers(logger.lines)
    if not layers:
        raise ArtifactError(f"the builder's log of {stage} must end with its layer list, got none")
    attention = sum("mha" in layer.name.lower() for layer in layers)
    validated = check_header(bytes(memoryview(plan)[:HEADER_SIZE]), recipe.target)
    relative = engine_path(recipe, stage)
    engine = Path(out) / relative
    with atomic_path(engine) as temporary:
        temporary.write_bytes(memoryview(plan))
    BuildRecord(
        stage=stage,
        recipe=recipe,
        builder=trt.__name__,
        builder_version=trt.__version__,
        onnx_sha256=digest,
        engine_sha256=sha256_file(engine),
        engine_size=engine.stat().st_size,
        layers=layers,
        attention_layers=attention,
        log=_audit(logger.lines),
    ).write(engine.with_suffix(".build.json"))
    return EngineEntry(
        stage=stage,
        path=relative,
        target=recipe.target,
        builder=trt.__name__,
        builder_version=trt.__version__,
        compute_capabilities=capabilities,
        precision=recipe.precision,
        batch=recipe.batch,
        onnx_sha256=digest,
        layers=len(layers),
        attention_layers=attention,
        build_seconds=round(seconds, 3),
        validated=validated,
    )


def check_header(header: bytes, target: str = "rtx") -> str:
    """Say what the builder's runtime thinks of an engine's first 64 bytes, without loading it.

    Raises:
        ArtifactError: the header is malformed.
        DependencyError: the builder is not installed.
    """
    trt = import_builder(target)
    if not hasattr(trt, "EngineValidity"):
        return "header not checked: this runtime cannot"
    if len(header) < HEADER_SIZE:
        raise ArtifactError(f"an engine must start with a header of {HEADER_SIZE} bytes, got {len(header)}")
    validity, mask = trt.Runtime(_logger(trt)).get_engine_validity(header[:HEADER_SIZE])
    reasons = [flag.name for flag in trt.EngineInvalidityDiagnostics.__members__.values() if int(flag) & mask]
    if "MALFORMED_ENGINE" in reasons:
        raise ArtifactError(f"an engine must start with a {trt.__name__} header, got one that is malformed")
    if validity == trt.EngineValidity.INVALID:
        # No driver gives INVALID without any reason.
        why = ", ".join(reasons).lower().replace("_", " ") or "no GPU driver"
        return f"header well formed; not run here ({why})"
    return f"header well formed, {validity.name.lower()} on the GPU here; not run"


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


def _logger(trt: Any) -> Any:
    """A logger that keeps every message as (severity, text) and prints none."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append((severity.name, message))

    return Logger()


def _build(trt: Any, onnx: Path, recipe: EngineRecipe, stage: str, logger: Any) -> Any:
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
        rest = list(tensor.shape)[1:]
        profile.set_shape(tensor.name, *([size, *rest] for size in recipe.batch))
    if config.add_optimization_profile(profile) < 0:
        raise ArtifactError(f"batch {list(recipe.batch)} must fit the graph of {stage}, got a profile it refuses")
    if hasattr(trt, "ComputeCapability") and recipe.compute_capabilities:
        config.num_compute_capabilities = len(recipe.compute_capabilities)
        for index, name in enumerate(recipe.compute_capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    with _progress(trt, config, stage):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        reasons = [message for severity, message in logger.lines if severity == "ERROR"]
        raise ArtifactError(f"{stage} could not be built by {trt.__name__}: {_first(reasons)}")
    return plan


def _first(reasons: list[str]) -> str:
    return sanitise(reasons[0].splitlines()[0])[:400] if reasons else "no reason given"


def _audit(lines: list[tuple[str, str]]) -> list[str]:
    """The last messages from INFO up. Driver complaints are left out: they say only that no GPU is here."""
    kept = [
        f"{severity}: {sanitise(message)}"
        for severity, message in lines
        if severity in ("INFO", "WARNING", "ERROR") and "CUDA" not in message
    ]
    return kept[-_AUDIT_LINES:]


@contextlib.contextmanager
def _progress(trt: Any, config: Any, stage: str) -> Iterator[None]:
    """Show the builder's phases on a terminal."""
    import sys

    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
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
