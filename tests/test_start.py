"""Starting a bundle: parity on its own reference, trust, and a ladder whose every step says why it was left."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from kit.tiny import copy_run, make_images, rehash, rewrite

from stage1_pro.cli import main
from stage1_pro.commands.bench import BenchLatency
from stage1_pro.commands.doctor import doctor
from stage1_pro.deploy.bench import bench_latency, peers
from stage1_pro.deploy.bundle import Bundle, load_bundle
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.deploy.onnxruntime import OnnxRuntime
from stage1_pro.deploy.reference import REFERENCE, TOLERANCES, check_parity, read_reference, write_reference
from stage1_pro.deploy.runtime import RUNTIMES, How, Runtime
from stage1_pro.deploy.start import start
from stage1_pro.deploy.tensorrt import (
    LADDER,
    ClassicTensorRt,
    Gpu,
    TensorRtForRtx,
    _Engine,
    buckets,
    cache_folder,
    read_cache,
)
from stage1_pro.errors import ArtifactError, DependencyError, DeviceError, InputError
from stage1_pro.files import save_npz, sha256_file
from stage1_pro.integrations.streetvision import Settings


def gpu_missing() -> str:
    """Why no engine can run here; empty when one can."""
    try:
        Gpu()
    except DependencyError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(tiny, tmp_path_factory.mktemp("start") / "run")


@pytest.fixture(scope="module")
def bundle(run: Path, request: pytest.FixtureRequest) -> Path:
    """With engines where their builder is installed: nothing below needs another export."""
    try:
        import tensorrt_rtx  # noqa: F401
    except ImportError:
        return run / "bundle"
    engines: Path = request.getfixturevalue("tiny_engines")
    return engines


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture
def engines(copy: Path) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx cannot be imported: no engine can be built here")
    return copy


def tamper(bundle: Path, stage: str, *, by: float) -> None:
    """Move one bias of a graph and make every hash right again, as somebody who means harm would."""
    path = bundle / f"{stage}.onnx"
    graph = onnx.load(str(path))
    # The last bias of two numbers is the head's.
    biases = [
        one for one in graph.graph.initializer if list(one.dims) == [2] and one.data_type == onnx.TensorProto.FLOAT
    ]
    tensor = biases[-1]
    values = onnx.numpy_helper.to_array(tensor) + np.float32([by, 0])
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(graph, str(path))
    rehash(bundle, path.name)
    digest = sha256_file(path)

    def point(values: dict[str, Any]) -> None:
        for engine in values["engines"]:
            if engine["stage"] == stage:
                engine["onnx_sha256"] = digest

    rewrite(bundle, point)


def drop_reference(bundle: Path) -> None:
    (bundle / REFERENCE).unlink()
    rewrite(bundle, lambda v: (v["files"].pop(REFERENCE), v.update(reference=None)))


class TestReference:
    def test_same_seed_same_bytes_and_nobodys_photos(self, bundle: Path, tmp_path: Path) -> None:
        loaded = load_bundle(bundle)
        assert loaded.manifest.reference == REFERENCE and REFERENCE in loaded.manifest.files
        for name in ("stage_a.onnx", "stage_b.onnx"):
            shutil.copy(bundle / name, tmp_path)
        write_reference(tmp_path, loaded.manifest.stages, loaded.preprocessing)
        assert (tmp_path / REFERENCE).read_bytes() == (bundle / REFERENCE).read_bytes()
        write_reference(tmp_path, loaded.manifest.stages, loaded.preprocessing, seed=1)
        assert (tmp_path / REFERENCE).read_bytes() != (bundle / REFERENCE).read_bytes()

    def test_onnxruntime_gives_it(self, bundle: Path) -> None:
        loaded = load_bundle(bundle)
        reference = read_reference(loaded)
        assert reference is not None and reference.pixels.dtype == np.uint8
        # Rows differ, or a runtime that answers the first row for all would pass.
        assert np.abs(np.diff(reference.stage_b["logits"], axis=0)).max() > 10 * TOLERANCES["fp32"]
        parity = check_parity(OnnxRuntime(loaded), loaded, reference, "onnxruntime")
        assert parity.logit < 1e-5 and parity.flips == 0
        cascade = Cascade.load(bundle)
        assert cascade.runtime.name == "onnxruntime"
        assert [step.ready for step in cascade.steps] == [True]
        assert "off the reference, 0 flips" in cascade.steps[0].reason

    @pytest.mark.parametrize("stage", ["stage_a", "stage_b"])
    @pytest.mark.parametrize(("runtime", "by"), [("onnxruntime", 0.1), ("auto", -0.1)])
    def test_changed_graph_with_right_hashes_does_not_start(
        self, copy: Path, stage: str, runtime: str, by: float
    ) -> None:
        tamper(copy, stage, by=by)
        load_bundle(copy)
        with pytest.raises(ArtifactError, match="onnxruntime must give the reference outputs of the bundle within"):
            Cascade.load(copy, runtime, trust_engines=True)

    @pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
    def test_a_graph_that_gives_other_rows_than_it_declares_gives_none(self, copy: Path, runtime: str) -> None:
        """Twice the rows under a declared shape of one batch: no library holds a graph to it, and no reference here."""
        if importlib.util.find_spec(runtime) is None:
            pytest.skip(f"{runtime} is not installed: the runtime cannot be run here")
        path = copy / "stage_a.onnx"
        model = onnx.load(str(path))
        for node in model.graph.node:
            node.output[:] = ["logits_once" if name == "logits" else name for name in node.output]
            node.input[:] = ["logits_once" if name == "logits" else name for name in node.input]
        model.graph.node.append(onnx.helper.make_node("Concat", ["logits_once"] * 2, ["logits"], axis=0))
        onnx.save(model, str(path))
        rehash(copy, path.name)
        rewrite(copy, lambda v: v.update(engines=[e for e in v["engines"] if e["stage"] != "stage_a"]))
        spec = load_bundle(copy).preprocessing
        pixels = np.zeros((3, 3, spec.height, spec.width), dtype=np.float32)
        with pytest.raises(ArtifactError, match="logits of stage_a must be float32"):
            RUNTIMES.find(runtime)(load_bundle(copy)).run("stage_a", {"pixels": pixels})  # type: ignore[call-arg]

    def test_rounding_is_no_change(self, copy: Path) -> None:
        tamper(copy, "stage_b", by=1e-5)
        assert Cascade.load(copy).steps[-1].ready

    def test_bundle_without_one_says_so(self, copy: Path) -> None:
        drop_reference(copy)
        cascade = Cascade.load(copy)
        assert cascade.steps[0].reason == "not held against reference.npz, which this bundle lacks"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda a: a.update(pixels=a["pixels"].astype(np.float64)), r"pixels of .* must be uint8 \[R, 3"),
            (lambda a: a.update(pixels=a["pixels"][:, :, 1:]), "pixels of reference.npz must be uint8"),
            (lambda a: a.pop("stage_a.gate_logit"), r"stage_a.gate_logit .* got none"),
            (lambda a: a.update({"stage_b.logits": a["stage_b.logits"][:1]}), r"got float32 \[1, 2\]"),
            (lambda a: a["stage_a.logits"].__setitem__(0, np.nan), "must be finite"),
            (lambda a: a.update({k: v[:0] for k, v in a.items()}), "must be"),
        ],
    )  # fmt: skip
    def test_damaged_one_is_refused(self, copy: Path, change: Any, message: str) -> None:
        with np.load(copy / REFERENCE) as data:
            arrays = dict(data)
        change(arrays)
        save_npz(copy / REFERENCE, arrays)
        rehash(copy, REFERENCE)
        with pytest.raises(ArtifactError, match=message):
            Cascade.load(copy)

    def test_more_rows_than_any_has(self, copy: Path) -> None:
        with np.load(copy / REFERENCE) as data:
            many = {name: np.repeat(values, 30, axis=0) for name, values in data.items()}
        save_npz(copy / REFERENCE, many)
        rehash(copy, REFERENCE)
        with pytest.raises(ArtifactError, match="at most 64 rows, got 90"):
            Cascade.load(copy)

    def test_softmax_needs_no_gate(self, copy: Path) -> None:
        photos = make_images(copy.parent, 3)
        expected = Cascade.load(copy).predict(photos).to_dict()
        graph = onnx.load(str(copy / "stage_a.onnx"))
        graph.graph.output.remove(next(one for one in graph.graph.output if one.name == "gate_logit"))
        onnx.save(graph, str(copy / "stage_a.onnx"))
        rehash(copy, "stage_a.onnx")
        rewrite(copy, lambda v: (v["stages"]["stage_a"]["outputs"].pop("gate_logit"), v.update(engines=[])))
        cascade = Cascade.load(copy)
        assert cascade.steps[-1].reason.endswith("0 flips")
        assert cascade.predict(photos).to_dict() == expected

    def test_pickles_and_compression_are_refused(self, copy: Path) -> None:
        with np.load(copy / REFERENCE) as data:
            arrays = dict(data)
        np.savez(copy / REFERENCE, **{**arrays, "pixels": np.array([{"a": 1}], dtype=object)}, allow_pickle=True)
        rehash(copy, REFERENCE)
        with pytest.raises(ArtifactError, match="plain, unpacked numbers"):
            Cascade.load(copy)
        np.savez_compressed(copy / REFERENCE, **arrays)
        rehash(copy, REFERENCE)
        with pytest.raises(ArtifactError, match="plain, unpacked numbers"):
            Cascade.load(copy)


class TestLadder:
    def test_names(self, bundle: Path) -> None:
        with pytest.raises(InputError, match="did you mean 'tensorrt_rtx'"):
            start(load_bundle(bundle), "tensorrt_rxt")

    def test_order(self, engines: Path) -> None:
        """The recipe's own precision, then fallbacks from fast to sure, of one target before the next."""
        loaded = load_bundle(engines)
        entries = []
        for folder, precision in (
            ("rtx-fp32", "fp32"), ("tensorrt", "fp16"), ("rtx-fp16", "fp16"), ("rtx", "bf16"), ("rtx-res32", "res32"),
        ):  # fmt: skip
            entries += [
                entry.model_copy(
                    update={"path": f"engines/{folder}/{entry.stage}.engine", "precision": precision,
                            "target": folder.partition("-")[0]}
                )
                for entry in loaded.manifest.engines
            ]  # fmt: skip
        wanted = ["rtx", "rtx-res32", "rtx-fp16", "rtx-fp32", "tensorrt"]
        for order in (entries, entries[::-1]):
            many = SimpleNamespace(manifest=SimpleNamespace(engines=order))
            found = [source.place for kind in (TensorRtForRtx, ClassicTensorRt) for source in kind.sources(many)]
            assert found == [f"engines/{name}" for name in wanted]
        assert set(LADDER) <= set(TOLERANCES)

    @pytest.mark.skipif(not gpu_missing(), reason="a GPU is here: the engine starts")
    def test_auto_steps_down_and_says_why(self, engines: Path, capsys: pytest.CaptureFixture[str]) -> None:
        cascade = Cascade.load(engines, "auto", trust_engines=True)
        engine, graphs = cascade.steps
        assert (engine.runtime, engine.source, engine.precision, engine.ready) == (
            "tensorrt_rtx", "engines/rtx", "fp32", False,
        )  # fmt: skip
        assert "NVIDIA GPU with its driver" in engine.reason
        assert graphs.ready and cascade.runtime.name == graphs.runtime == "onnxruntime"
        images = engines.parent / "photos"
        make_images(images, 2)
        code = main(
            ["predict", "--json", "--bundle", str(engines), "--runtime", "auto", "--trust-engines", str(images)]
        )
        streams = capsys.readouterr()
        found = json.loads(streams.out)
        assert code == 0 and found["runtime"] == "onnxruntime"
        assert [step["ready"] for step in found["steps"]] == [False, True]
        assert "stepped down from tensorrt_rtx on engines/rtx (fp32)" in streams.err
        assert "answers with onnxruntime" in streams.err

    @pytest.mark.skipif(not gpu_missing(), reason="a GPU is here: the engine starts")
    def test_whatever_the_bindings_raise_is_a_step_down(self, engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object) -> None:
            raise TypeError("pybind11::init(): factory function returned nullptr")

        monkeypatch.setattr(TensorRtForRtx, "open", refuse)
        cascade = Cascade.load(engines, "auto", trust_engines=True)
        assert cascade.runtime.name == "onnxruntime"
        assert "got TypeError: pybind11::init(): factory function returned nullptr" in cascade.steps[0].reason
        with pytest.raises(ArtifactError, match="must start on one of the bundle's engines"):
            Cascade.load(engines, "tensorrt_rtx", trust_engines=True)

    def test_named_runtime_never_becomes_another(self, engines: Path) -> None:
        with pytest.raises(DependencyError, match="got 'tensorrt_rtx' and no start: tensorrt_rtx on engines/rtx"):
            Cascade.load(engines, "tensorrt_rtx", trust_engines=True)

    def test_engine_nobody_vouches_for_is_not_run(
        self, engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("STAGE1_CONFIG", str(tmp_path / "config"))
        first, last = Cascade.load(engines, "auto").steps
        assert "must be trusted before it runs" in first.reason and last.ready
        with pytest.raises(ArtifactError, match="was not built here"):
            Cascade.load(engines, "tensorrt_rtx")

    def test_runtime_without_engines(self, copy: Path) -> None:
        with pytest.raises(InputError, match="must have an engine in the bundle .* got 'tensorrt' and engines for"):
            Cascade.load(copy, "tensorrt", trust_engines=True)

    def test_engine_is_not_run_without_reference(self, engines: Path) -> None:
        drop_reference(engines)
        first, last = Cascade.load(engines, "auto", trust_engines=True).steps
        assert "held against reference.npz, which this bundle lacks" in first.reason and last.ready

    def test_one_stage_alone_is_no_engine(self, engines: Path) -> None:
        rewrite(engines, lambda v: v.update(engines=v["engines"][:1]))
        first, _ = Cascade.load(engines, "auto", trust_engines=True).steps
        assert "must hold an engine of both stages, got stage_a" in first.reason

    def test_malformed_engine(self, engines: Path) -> None:
        path = engines / "engines/rtx/stage_b.engine"
        path.write_bytes(b"\0" * 64 + path.read_bytes()[64:])
        rehash(engines, "engines/rtx/stage_b.engine")
        first, last = Cascade.load(engines, "auto", trust_engines=True).steps
        assert "malformed" in first.reason and last.ready

    def test_engine_exchanged_after_verification(self, engines: Path) -> None:
        loaded = load_bundle(engines)
        path = engines / "engines/rtx/stage_a.engine"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        _, (first, last) = start(loaded, "auto", trust_engines=True)
        assert "it was changed" in first.reason and last.ready

    @pytest.mark.gpu
    @pytest.mark.skipif(bool(gpu_missing()), reason=gpu_missing() or "a GPU is here")
    def test_engine_answers_as_onnxruntime_does(self, engines: Path) -> None:
        cascade, plain = Cascade.load(engines, "tensorrt_rtx", trust_engines=True), Cascade.load(engines)
        spec = cascade.bundle.preprocessing
        pixels = np.random.default_rng(0).normal(size=(70, 3, spec.height, spec.width)).astype(np.float32)
        ours, theirs = (one.runtime.run("stage_a", {"pixels": pixels}) for one in (cascade, plain))
        np.testing.assert_allclose(ours["logits"], theirs["logits"], atol=5e-3)
        assert cascade.runtime.device_seconds > 0


class HostGpu:
    """Stands in for a device where none is: its memory is the host's, its copies are real."""

    stream = 7

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self._cudart = SimpleNamespace(
            cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
        )

    def call(self, function: str, *arguments: Any) -> Any:
        if function in ("cudaMalloc", "cudaHostAlloc"):
            block = (ctypes.c_byte * arguments[0])()
            address = ctypes.addressof(block)
            self.blocks[address] = block
            return address
        if function in ("cudaFree", "cudaFreeHost"):
            del self.blocks[arguments[0]]
        if function == "cudaMemcpyAsync":
            target, source, size, *_ = arguments
            ctypes.memmove(target, source, size)
        return None

    def identity(self) -> str:
        return "host"

    def timed(self, work: Any) -> float:
        work()
        return 0.25


class Doubler:
    """A library whose engine gives twice the sum of each row, and notes the batches it was given."""

    __name__, __version__ = "doubler", "1"

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None: ...

    def __init__(self, gpu: HostGpu, *, refuses: bool = False) -> None:
        self.gpu, self.refuses, self.batches = gpu, refuses, []
        self.addresses: dict[str, int] = {}
        self.num_io_tensors, self.shape = 2, (0,)

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: None if plan == b"" else self)

    def get_tensor_name(self, index: int) -> str:
        return ("hidden", "logits")[index]

    def get_tensor_dtype(self, name: str) -> str:
        return name

    def nptype(self, name: str) -> Any:
        return np.float16 if name == "logits" else np.float32

    def create_execution_context(self) -> Any:
        return self

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == HostGpu.stream
        n, width = self.shape
        self.batches.append(n)
        given = np.frombuffer((ctypes.c_byte * (4 * n * width)).from_address(self.addresses["hidden"]), np.float32)
        answer = (2 * given.reshape(n, width).sum(axis=1, keepdims=True)).astype(np.float16)
        ctypes.memmove(self.addresses["logits"], answer.tobytes(), answer.nbytes)
        return not self.refuses


def make_engine(trt: Doubler, gpu: HostGpu, plan: bytes = b"plan") -> _Engine:
    stage = SimpleNamespace(inputs={"hidden": [-1, 3]}, outputs={"logits": [-1, 1]})
    bundle = SimpleNamespace(manifest=SimpleNamespace(stages={"stage_b": stage}))
    entry = SimpleNamespace(
        stage="stage_b", path="engines/x/stage_b.engine", batch=(1, 4, 12), builder="doubler", builder_version="1",
        compute_capabilities=[],
    )  # fmt: skip
    return _Engine(trt, gpu, bundle, entry, plan)  # type: ignore[arg-type]


class TestEngine:
    def test_rows_are_padded_to_buckets_and_cut_where_the_profile_ends(self) -> None:
        gpu = HostGpu()
        trt = Doubler(gpu)
        engine = make_engine(trt, gpu)
        rng = np.random.default_rng(0)
        for n in (3, 1, 12, 31, 5):
            rows = rng.integers(-9, 9, (n, 3)).astype(np.float32)
            outputs, seconds = engine.run({"hidden": rows})
            np.testing.assert_array_equal(outputs["logits"], 2 * rows.sum(axis=1, keepdims=True))
            assert outputs["logits"].dtype == np.float32
            assert seconds == 0.25 * -(-n // 12)
        assert trt.batches == [4, 1, 12, 12, 12, 8, 8]

    def test_buffers_are_reused(self) -> None:
        gpu = HostGpu()
        engine = make_engine(Doubler(gpu), gpu)
        engine.run({"hidden": np.ones((12, 3), np.float32)})
        before = set(gpu.blocks)
        for n in range(13):
            engine.run({"hidden": np.ones((n, 3), np.float32)})
        assert set(gpu.blocks) == before and len(before) == 4

    def test_nothing_given_back_is_an_error(self) -> None:
        gpu = HostGpu()
        with pytest.raises(ArtifactError, match="must load on this GPU, got nothing from doubler 1"):
            make_engine(Doubler(gpu), gpu, plan=b"")
        with pytest.raises(DeviceError, match="got a refusal at batch 2"):
            make_engine(Doubler(gpu, refuses=True), gpu).run({"hidden": np.ones((2, 3), np.float32)})

    def test_without_a_driver_the_error_names_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if not gpu_missing():
            pytest.skip("a GPU is here")
        with pytest.raises(DependencyError, match="NVIDIA GPU with its driver|cuda-bindings is not installed"):
            Gpu()
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        with pytest.raises(DependencyError, match=r"cuda-bindings is not installed; .*stage1_pro\[rtx\]"):
            Gpu()

    def test_module_imports_in_a_process_without_libraries(self) -> None:
        code = (
            "import sys\n"
            "for name in ('cuda', 'tensorrt_rtx', 'tensorrt', 'torch'): sys.modules[name] = None\n"
            "import stage1_pro.deploy.start, stage1_pro.deploy.tensorrt, stage1_pro.deploy.timing"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("batch", [(1, 8, 64), (1, 1, 1), (2, 3, 100), (5, 6, 7)])
    def test_buckets(self, batch: tuple[int, int, int]) -> None:
        found = buckets(batch)
        assert found == sorted(set(found)) and found[0] == batch[0] and found[-1] == batch[2] and batch[1] in found
        for n in range(1, batch[2] + 1):
            bucket = next(size for size in found if size >= n)
            assert bucket == batch[0] or bucket < 2 * n

    def test_cache_is_the_users_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_folder() == tmp_path / "stage1_pro" / "kernels"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert cache_folder() == Path.home() / ".cache" / "stage1_pro" / "kernels"
        folder = tmp_path / "kernels"
        folder.mkdir(mode=0o700)
        file = folder / "a.cache"
        assert read_cache(file) is None
        file.write_bytes(b"kernels")
        file.chmod(0o644)
        assert read_cache(file) == b"kernels"
        for mode in (0o664, 0o646):
            file.chmod(mode)
            assert read_cache(file) is None
        file.chmod(0o644)
        for mode in (0o770, 0o707):
            folder.chmod(mode)
            assert read_cache(file) is None


class Evaluator(Runtime):
    """onnx's own reference evaluator, a runtime that this package does not know."""

    name = "evaluator"

    def __init__(self, bundle: Bundle, shift: float = 0.0) -> None:
        from onnx.reference import ReferenceEvaluator

        self.shift = np.float32(shift)
        self.stages = bundle.manifest.stages
        self.sessions = {stage: ReferenceEvaluator(str(bundle.graph(stage))) for stage in self.stages}

    @classmethod
    def open(cls, model: Any, how: How) -> Any:
        return cls(model)

    def run(self, stage: Any, inputs: Any) -> Any:
        names = list(self.stages[stage].outputs)
        found = dict(zip(names, self.sessions[stage].run(names, dict(inputs)), strict=True))
        return {**found, "logits": found["logits"] + self.shift}


class Wrong(Evaluator):
    """The same, and wrong by more than its tolerance."""

    name = "wrong"

    @classmethod
    def open(cls, model: Any, how: How) -> Any:
        return cls(model, 0.1)


def same_answers(one: Cascade, other: Cascade, pixels: np.ndarray) -> None:
    """By both stages, whatever the policy says of these images."""
    for exited in (None, np.arange(len(pixels)) % 2 == 0):
        ours, theirs = (cascade.decide(pixels, exited=exited) for cascade in (one, other))
        assert ours.label.tolist() == theirs.label.tolist() and ours.stage.tolist() == theirs.stage.tolist()
        np.testing.assert_allclose(ours.prob, theirs.prob, atol=1e-5)


class TestDoor:
    """A runtime of somebody else's: one module, and its name in the registry."""

    @pytest.fixture
    def names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(RUNTIMES, "_known", dict(RUNTIMES._known))
        for kind in (Evaluator, Wrong):
            RUNTIMES.register(kind.name, kind)

    def test_it_answers_as_onnxruntime_does(
        self, names: None, run: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        cascade, plain = Cascade.load(bundle, "evaluator"), Cascade.load(bundle)
        images = sorted((run / "images").iterdir())
        pixels = np.stack([plain.pixels(image) for image in images])
        same_answers(cascade, plain, pixels)
        (step,) = cascade.steps
        assert step.ready and step.runtime == "evaluator" and "flips" in step.reason
        assert main(["predict", "--json", "--runtime", "evaluator", "--bundle", str(bundle), str(images[0])]) == 0
        assert json.loads(capsys.readouterr().out)["runtime"] == "evaluator"

    def test_lists_have_it(self, names: None, bundle: Path) -> None:
        assert "evaluator" in peers() and "evaluator" in doctor()["runtimes"]
        asked = BenchLatency(
            bundle=bundle, batch=[2], rates=[0.5], samples=10, warmup=0, quick=True, against=["evaluator"]
        )
        (peer,) = bench_latency(asked).peers
        assert peer.skipped is None and peer.flips == 0 and peer.logit is not None and peer.logit < 1e-4
        assert Settings.of({"bundle": str(bundle), "runtime": "evaluator"}).runtime == "evaluator"

    def test_it_must_give_the_reference_outputs(self, names: None, bundle: Path, copy: Path) -> None:
        with pytest.raises(ArtifactError, match="wrong must give the reference outputs of the bundle within 0.001"):
            Cascade.load(bundle, "wrong")
        drop_reference(copy)
        with pytest.raises(ArtifactError, match="evaluator must be held against reference.npz"):
            Cascade.load(copy, "evaluator")

    def test_an_entry_point_brings_it(self, bundle: Path, tmp_path: Path) -> None:
        """Installed beside this package, with nothing registered by hand."""
        info = tmp_path / "evaluator-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evaluator\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[stage1_pro.runtimes]\nelsewhere = outside:Elsewhere\n")
        (tmp_path / "outside.py").write_text(
            "from stage1_pro.deploy.onnxruntime import OnnxRuntime\n"
            "class Elsewhere(OnnxRuntime):\n    name = 'elsewhere'\n"
        )
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "from stage1_pro.deploy.cascade import Cascade\n"
            "print(Cascade.load(sys.argv[2], 'elsewhere').steps[-1])"
        )
        arguments = [sys.executable, "-c", code, str(tmp_path), str(bundle)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.startswith("elsewhere on stage_a.onnx"), done.stderr

    def test_names_are_light_and_a_typo_gets_the_nearest(self) -> None:
        code = "import sys, stage1_pro.deploy.runtime; print({'numpy', 'onnxruntime', 'torch'} & {*sys.modules})"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
        with pytest.raises(InputError, match="did you mean 'openvino'"):
            RUNTIMES.find("openvinno")


class TestOpenVino:
    def test_without_it_the_error_names_the_extra(self, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "openvino", None)
        with pytest.raises(DependencyError, match=r"stage1_pro\[openvino\]"):
            Cascade.load(bundle, "openvino")

    @pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
    def test_negative_threads_are_no_fault_of_the_graph(self, bundle: Path, runtime: str) -> None:
        with pytest.raises(InputError, match="threads must be 0"):
            RUNTIMES.find(runtime)(load_bundle(bundle), -1)  # type: ignore[call-arg]

    def test_it_answers_as_onnxruntime_does(self, run: Path, bundle: Path, copy: Path) -> None:
        if importlib.util.find_spec("openvino") is None:
            pytest.skip("openvino is not installed: the runtime cannot be run here")
        images = sorted((run / "images").iterdir())
        cascade, plain = Cascade.load(bundle, "openvino", threads=1), Cascade.load(bundle)
        assert cascade.runtime.name == "openvino" and cascade.steps[-1].ready
        pixels = np.stack([plain.pixels(image) for image in images])
        for rows in (1, 3, len(images)):
            first, second = (one.runtime.run("stage_a", {"pixels": pixels[:rows]}) for one in (cascade, plain))
            for name, value in second.items():
                np.testing.assert_allclose(first[name], value, atol=1e-4)
        same_answers(cascade, plain, pixels)
        # What an answer holds is not what the next one overwrites.
        kept = cascade.runtime.run("stage_a", {"pixels": pixels[:2]})["logits"]
        before = kept.copy()
        cascade.runtime.run("stage_a", {"pixels": pixels[2:4]})
        np.testing.assert_array_equal(kept, before)
        tamper(copy, "stage_b", by=0.1)
        with pytest.raises(ArtifactError, match="openvino must give the reference outputs"):
            Cascade.load(copy, "openvino")

    def test_a_runtime_freed_in_another_thread_leaves_signals_alone(self, bundle: Path) -> None:
        if importlib.util.find_spec("openvino") is None:
            pytest.skip("openvino is not installed: the runtime cannot be run here")
        # Python's handlers run on the stack for signals where there is one; faulthandler makes one.
        code = (
            "import faulthandler, gc, os, signal, sys, threading\n"
            "from stage1_pro.deploy.cascade import Cascade\n"
            "faulthandler.enable()\n"
            "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
            "held = [Cascade.load(sys.argv[1], 'openvino', threads=1)]\n"
            "thread = threading.Thread(target=lambda: (held.clear(), gc.collect()))\n"
            "thread.start()\n"
            "thread.join()\n"
            "os.kill(os.getpid(), signal.SIGUSR1)\n"
        )
        done = subprocess.run([sys.executable, "-c", code, bundle], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr

    def test_weights_beside_the_graph(self, copy: Path) -> None:
        if importlib.util.find_spec("openvino") is None:
            pytest.skip("openvino is not installed: the runtime cannot be run here")
        # Engines are of the graph that is written anew here.
        rewrite(
            copy,
            lambda v: v.update(
                engines=[], files={name: one for name, one in v["files"].items() if not name.startswith("engines/")}
            ),
        )
        shutil.rmtree(copy / "engines", ignore_errors=True)
        path = copy / "stage_a.onnx"
        graph = onnx.load(str(path))
        path.unlink()
        onnx.save(graph, str(path), save_as_external_data=True, location="stage_a.onnx.data", size_threshold=0)
        rehash(copy, "stage_a.onnx")
        rehash(copy, "stage_a.onnx.data")
        assert Cascade.load(copy, "openvino").steps[-1].ready
