"""The CUDA router: its kernels run on the CPU behind stand-ins, what builds and loads without a driver, and a real GPU.

Tests marked ``gpu`` are the only ones that show what a GPU does. The others run the very source of the kernels: each
row's arithmetic bit for bit against the CPU kernel, and tickets, look-back and compaction with blocks as threads.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from kit.hard_rows import hard_gates, hard_logits

from stage1_pro import native
from stage1_pro.errors import DependencyError, InputError
from stage1_pro.native.cuda import _on_device, _stream

PLATTS = [None, (1.7, -0.3), (-1e300, 2.0)]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
BUILT = importlib.util.find_spec("stage1_pro._cuda") is not None


def find_nvcc():
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [Path(home) / "bin/nvcc" for home in [*homes, "/usr/local/cuda"] if home]
    return shutil.which("nvcc") or next((str(place) for place in places if place.exists()), None)


def no_device():
    """Why there is no device, or None where there is one."""
    if not BUILT:
        return "stage1_pro._cuda is not built (STAGE1_CUDA=ON builds it)"
    count, missing = importlib.import_module("stage1_pro._cuda").devices()
    return None if count else f"no CUDA device: {missing}"


@pytest.fixture(scope="session")
def emulator(tmp_path_factory, repository):
    """tests/emulator.cpp, compiled: the kernels on the CPU."""
    if COMPILER is None or not sys.platform.startswith("linux"):
        pytest.skip("the kernels' emulator needs a C++20 compiler on Linux (set CXX)")
    library = tmp_path_factory.mktemp("emulator") / "emulator.so"
    command = [COMPILER, "-std=c++20", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC",
               "-pthread", f"-I{repository / 'csrc/include'}", str(repository / "tests/emulator.cpp"),
               "-o", str(library)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def pointer(array):
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)


def doubles(platt):
    return [ctypes.c_double(value) for value in platt or (0.0, 0.0)]


class Emulated:
    """The kernels on the CPU, with the buffers a router has."""

    def __init__(self, library, capacity, *, threshold, platt=None, lanes=1, resident=4):
        self.library, self.lanes, self.resident = library, lanes, resident
        self.platt, self.threshold = platt, np.float32(threshold)
        self.exited = np.full(capacity, 9, np.uint8)
        self.score, self.probability = np.full((2, capacity), -1, np.float32)
        self.label, self.deferred = np.full((2, capacity), -9, np.int32)
        self.counts = np.full(2, -9, np.int32)
        self.scratch = np.zeros(2 + capacity * lanes // 256 + 1, np.int64)

    def buffers(self):
        arrays = (self.exited, self.score, self.label, self.probability, self.deferred, self.counts)
        return [pointer(array) for array in arrays]

    def route(self, logits, gate=None):
        n, k = logits.shape
        self.library.route(
            self.lanes, self.resident, pointer(logits), n, k, pointer(gate), *doubles(self.platt),
            ctypes.c_float(self.threshold), *self.buffers(), pointer(self.scratch),
        )  # fmt: skip
        assert not self.scratch.any()  # as it was found, or the next launch goes wrong
        assert self.counts[0] == self.counts[1]
        views = (self.exited, self.score, self.label, self.probability)
        return native.Routed(*(view[:n] for view in views), self.deferred[: self.counts[0]])

    def merge(self, logits, capacity):
        self.library.merge(self.lanes, pointer(logits), logits.shape[1], capacity, *self.buffers())


def same_bits(found, expected):
    for name, ours, theirs in zip(native.Routed._fields, found, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes(), name


@pytest.mark.parametrize("platt", PLATTS, ids=["probability", "gate", "steep gate"])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_the_row_function_gives_the_kernel_s_bits_on_a_million_rows(emulator, k, platt):
    rng = np.random.default_rng(k)
    n = 1_000_000
    logits = hard_logits(rng, n, k)
    gate = None if platt is None else hard_gates(rng, n)
    label = np.empty(n, np.int32)
    score, probability = np.empty((2, n), np.float32)
    emulator.decide(
        pointer(logits), ctypes.c_size_t(n), k, pointer(gate), *doubles(platt),
        pointer(score), pointer(label), pointer(probability),
    )  # fmt: skip
    routed = native.Router(n, threshold=0.5, platt=platt).route(logits, gate)
    for name, ours in (("label", label), ("score", score), ("probability", probability)):
        assert ours.tobytes() == getattr(routed, name).tobytes(), name
    assert 1000 < np.isnan(score).sum() < n - 1000


@pytest.mark.parametrize("platt", PLATTS[:2], ids=["probability", "gate"])
@pytest.mark.parametrize(
    ("lanes", "k", "sizes"),
    [(1, 2, (0, 1, 31, 32, 33, 255, 256, 257, 1000, 9001)), (1, 7, (256, 3000)), (32, 40, (0, 1, 8, 9, 300)),
     (32, 33, (65,)), (32, 64, (65,))],
)  # fmt: skip
def test_the_kernels_route_as_the_router_does(emulator, lanes, k, sizes, platt):
    rng = np.random.default_rng(k)
    capacity = max(sizes)
    many = hard_logits(rng, capacity, k)
    gates = None if platt is None else hard_gates(rng, capacity)
    scores = native.Router(capacity, threshold=0.5, platt=platt).route(many, gates).score
    exact = rng.choice(scores[scores < 1])
    for threshold in (exact, np.nextafter(exact, np.float32(1)), np.inf, -np.inf):
        kernels = Emulated(emulator, capacity, threshold=threshold, platt=platt, lanes=lanes)
        router = native.Router(capacity, threshold=threshold, platt=platt)
        for n in sizes:
            gate = None if gates is None else gates[:n]
            same_bits(kernels.route(many[:n], gate), router.route(many[:n], gate))


@pytest.mark.parametrize("resident", [1, 3, 40])
def test_tiles_find_their_place_in_any_order(emulator, resident):
    rng = np.random.default_rng(resident)
    n = 256 * 70 - 3
    logits = rng.normal(size=(n, 2)).astype(np.float32)
    logits[rng.random(n) < 0.3] = np.nan
    kernels = Emulated(emulator, n, threshold=-np.inf, resident=resident)
    # More tiles than a warp looks back over, again and again on the same scratch memory.
    for _ in range(3):
        routed = kernels.route(logits)
        assert routed.deferred.tolist() == np.flatnonzero(np.isnan(logits[:, 0])).tolist()


def test_rows_without_an_answer_defer(emulator):
    inf, nan = np.inf, np.nan
    rows = np.array([[nan, nan], [nan, 5], [inf, 0], [-inf, -inf], [-inf, 3], [0, -0.0]], np.float32)
    routed = Emulated(emulator, 6, threshold=-inf).route(rows)
    assert routed.exited.tolist() == [0, 0, 0, 0, 1, 1]
    assert routed.label.tolist() == [-1, -1, -1, -1, 1, 0]
    assert routed.deferred.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("lanes", "k"), [(1, 2), (1, 1), (32, 40)])
def test_gathered_rows_come_back_as_stage_b_answers_them(emulator, lanes, k):
    rng = np.random.default_rng(k)
    n, width = 300, 700
    logits = hard_logits(rng, n, k)
    tokens = rng.integers(0, 2**16, (n, width)).astype(np.uint16)
    kernels = Emulated(emulator, n, threshold=0.6, lanes=lanes)
    router = native.Router(n, threshold=0.6)
    found, expected = kernels.route(logits), router.route(logits)
    rows = expected.deferred.copy()
    assert 0 < rows.size < n
    out = np.full((n, width), 7, np.uint16)
    emulator.gather(
        pointer(tokens), ctypes.c_size_t(width), pointer(kernels.deferred), pointer(kernels.counts), n, 2, pointer(out)
    )
    assert out[: rows.size].tobytes() == tokens[rows].tobytes()
    assert (out[rows.size :] == 7).all()
    # Stage B's bucket is larger than the count; what pads it reaches nobody.
    logits_b = hard_logits(rng, rows.size + 20, k)
    kernels.merge(logits_b, rows.size + 20)
    answers = native.Router(n, threshold=0).route(logits_b[: rows.size])
    router.merge(expected, answers.label, answers.probability, answers.probability)
    same_bits(found, expected)


@pytest.mark.skipif(find_nvcc() is None, reason="nvcc is neither on PATH nor in CUDA_HOME")
def test_no_multiplication_is_fused_and_none_is_approximate(repository, tmp_path):
    """What would change a bit on a GPU is not in the code handed to it."""
    text = (repository / "csrc/cmake/OptionalCuda.cmake").read_text()
    assert "-fmad=false" in text and "fast" not in re.sub(r"#.*", "", text)
    source = tmp_path / "row.cu"
    source.write_text(
        '#include "kernels.cuh"\n'
        "using namespace stage1;\n"
        "template __global__ void cuda::merge_kernel<32>(const float*, int, cuda::Routed);\n"
        "template __global__ void cuda::route_kernel<1>(const float*, int, int, const float*, Rule, cuda::Routed,\n"
        "                                               cuda::Scratch*);\n"
    )
    command = [find_nvcc(), "-std=c++20", "-fmad=false", "--prec-div=true", "--expt-relaxed-constexpr", "-ptx",
               f"-I{repository / 'csrc/include'}", f"-I{repository / 'csrc/route'}", str(source),
               "-o", str(tmp_path / "row.ptx")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ptx = (tmp_path / "row.ptx").read_text()
    assert "mul.rn.f64" in ptx and "div.rn.f64" in ptx and "rcp.rn.f64" in ptx
    assert not re.findall(r"\b(?:fma|mad)\.\S*f\d\d|\.approx|\.ftz", ptx)


def test_without_the_module_or_a_device_a_call_says_what_is_missing():
    if no_device() is None:
        pytest.skip("there is a device; what is missing elsewhere cannot be seen here")
    with pytest.raises(DependencyError, match=r"STAGE1_CUDA=ON|needs a device, got none \(.+\); install or update"):
        native.CudaRouter(4, threshold=0.5)
    assert native.cuda_why() is None or "no device: " in native.cuda_why()


@pytest.mark.skipif(not BUILT, reason="stage1_pro._cuda is not built (STAGE1_CUDA=ON builds it)")
def test_loading_the_module_asks_nothing_of_a_driver():
    code = (
        "import stage1_pro._cuda as cuda\n"
        "loaded = open('/proc/self/maps').read()\n"
        "assert 'libcuda.so' not in loaded and 'libcudart.so' not in loaded, loaded\n"
        "print(cuda.built()[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_arguments_are_named_before_a_device_is_asked():
    good = np.zeros((4, 2), np.float32)

    strided = types.SimpleNamespace(
        __cuda_array_interface__={
            "version": 3,
            "shape": (4, 2),
            "typestr": "<f4",
            "data": (256, False),
            "strides": (4, 16),
        }
    )
    for call, message in [
        (lambda: native.CudaRouter(0, threshold=0.5), "max_rows must be 1 to"),
        (lambda: native.CudaRouter(4, threshold=float("nan")), "threshold must be a number, got NaN"),
        (lambda: _on_device("logits", good, ("float32",), 2), r"float32 \[N, K\] on a GPU, got ndarray; move"),
        (lambda: _on_device("logits", strided, ("float32",), 2), r"got float32 \[4, 2\] on a GPU, strided"),
        (lambda: _on_device("gate", strided, ("float16",), 1), r"gate must be contiguous float16 \[N\]"),
    ]:
        with pytest.raises(InputError, match=message):
            call()
    shared = native.DeviceArray(256, (3, 2), "f4", None)
    assert _on_device("logits", shared, ("float32",), 2) == (256, (3, 2))
    assert _stream(types.SimpleNamespace(cuda_stream=77)) == 77 and _stream(5) == 5


# --- On a GPU.


@pytest.fixture
def torch_cuda():
    reason = no_device()
    if reason:
        pytest.skip(reason)
    return pytest.importorskip("torch", reason="torch is not installed; pip install -c constraints.txt '.[train]'")


def on_host(torch, routed, n):
    count = int(torch.as_tensor(routed.count, device="cuda")[0])
    names = ("exited", "score", "label", "probability")
    arrays = [torch.as_tensor(getattr(routed, name), device="cuda").cpu().numpy()[:n] for name in names]
    return native.Routed(*arrays, torch.as_tensor(routed.deferred, device="cuda").cpu().numpy()[:count])


@pytest.mark.gpu
@pytest.mark.parametrize("platt", PLATTS, ids=["probability", "gate", "steep gate"])
@pytest.mark.parametrize("k", [1, 2, 3, 7, 40])
def test_a_gpu_decides_as_the_cpu_does(torch_cuda, k, platt):
    rng = np.random.default_rng(k)
    sizes = (0, 1, 31, 257, 4096, 200_000)
    logits = hard_logits(rng, max(sizes), k)
    gates = None if platt is None else hard_gates(rng, max(sizes))
    scores = native.Router(max(sizes), threshold=0.5, platt=platt).route(logits, gates).score
    exact = rng.choice(scores[scores < 1])
    there = torch_cuda.from_numpy(logits).cuda()
    gate_there = None if gates is None else torch_cuda.from_numpy(gates).cuda()
    for threshold in (exact, np.nextafter(exact, np.float32(1)), -np.inf):
        gpu = native.CudaRouter(max(sizes), threshold=threshold, platt=platt)
        cpu = native.Router(max(sizes), threshold=threshold, platt=platt)
        for n in sizes:
            gate = None if gates is None else gates[:n]
            routed = gpu.route(
                there[:n], None if gates is None else gate_there[:n], stream=torch_cuda.cuda.current_stream()
            )
            same_bits(on_host(torch_cuda, routed, n), cpu.route(logits[:n], gate))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
@pytest.mark.parametrize("width", [1, 3, 8, 197 * 384])
def test_a_gpu_gathers_and_merges(torch_cuda, dtype, width):
    rng = np.random.default_rng(width)
    n = 200
    logits = hard_logits(rng, n, 2)
    source = torch_cuda.randint(0, 100, (n, width), device="cuda").to(getattr(torch_cuda, dtype))
    out = torch_cuda.zeros_like(source)
    gpu, cpu = native.CudaRouter(n, threshold=0.7), native.Router(n, threshold=0.7)
    stream = torch_cuda.cuda.Stream()
    stream.wait_stream(torch_cuda.cuda.current_stream())
    expected = cpu.route(logits)
    rows = expected.deferred.copy()
    with torch_cuda.cuda.stream(stream):
        gpu.route(torch_cuda.from_numpy(logits).cuda(), stream=stream)
        gpu.gather(source, out, stream=stream)
        gpu.mark(stream)
        assert gpu.wait() == rows.size
        logits_b = hard_logits(rng, n, 2)
        gpu.merge(torch_cuda.from_numpy(logits_b).cuda(), stream=stream)
    stream.synchronize()
    assert torch_cuda.equal(out[: rows.size], source[torch_cuda.from_numpy(rows).long().cuda()])
    assert not out[rows.size :].any()
    answers = native.Router(n, threshold=0).route(logits_b[: rows.size])
    cpu.merge(expected, answers.label, answers.probability, answers.probability)
    same_bits(on_host(torch_cuda, gpu.routed, n), expected)


@pytest.mark.gpu
def test_three_launches_and_a_graph_of_them(torch_cuda):
    rng = np.random.default_rng(0)
    logits = torch_cuda.from_numpy(hard_logits(rng, 5000, 2)).cuda()
    source = torch_cuda.randn(5000, 64, device="cuda")
    out = torch_cuda.zeros_like(source)
    gpu, cpu = native.CudaRouter(5000, threshold=0.7), native.Router(5000, threshold=0.7)

    def turn():
        stream = torch_cuda.cuda.current_stream()
        gpu.route(logits, stream=stream)
        gpu.gather(source, out, stream=stream)
        gpu.merge(logits, stream=stream)

    turn()
    graph = torch_cuda.cuda.CUDAGraph()
    with torch_cuda.cuda.graph(graph):
        turn()
    for seed in range(5):
        new = hard_logits(np.random.default_rng(seed), 5000, 2)
        logits.copy_(torch_cuda.from_numpy(new))
        graph.replay()
        torch_cuda.cuda.synchronize()
        expected = cpu.route(new)
        found = on_host(torch_cuda, gpu.routed, 5000)
        assert found.deferred.tobytes() == expected.deferred.tobytes()
        assert found.exited.tobytes() == expected.exited.tobytes()


@pytest.mark.gpu
def test_a_gpu_router_names_wrong_arguments(torch_cuda):
    router = native.CudaRouter(4, threshold=0.5)
    good = torch_cuda.zeros(4, 2, device="cuda")
    for call, message in [
        (lambda: router.route(good.cpu()), r"got float32 \[4, 2\] in host memory"),
        (lambda: router.route(good.double()), "got float64"),
        (lambda: router.route(good.T), "strided"),
        (lambda: router.route(torch_cuda.zeros(5, 2, device="cuda")), "at most 4 rows"),
        (lambda: router.route(good, good[:, 0].contiguous()), "gate must be None, got values"),
    ]:
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.gpu
def test_the_switch_runs_the_smallest_bucket_that_holds_the_count(torch_cuda):
    ran = torch_cuda.zeros(3, dtype=torch_cuda.int32, device="cuda")
    one = torch_cuda.ones(1, dtype=torch_cuda.int32, device="cuda")
    graphs = []
    for bucket in range(3):
        graph = torch_cuda.cuda.CUDAGraph(keep_graph=True)
        with torch_cuda.cuda.graph(graph):
            ran[bucket : bucket + 1].add_(one)
        graphs.append(graph)
    router = native.CudaRouter(16, threshold=0.9)
    switch = router.switch([4, 8, 16], graphs)
    logits = torch_cuda.zeros(16, 2, device="cuda")
    stream = torch_cuda.cuda.current_stream()
    for deferred, expected in ((0, [0, 0, 0]), (1, [1, 0, 0]), (4, [1, 0, 0]), (5, [0, 1, 0]), (16, [0, 0, 1])):
        logits.zero_()
        logits[deferred:, 0] = 9
        ran.zero_()
        router.route(logits, stream=stream)
        switch.launch(stream)
        torch_cuda.cuda.synchronize()
        assert ran.tolist() == expected, deferred
