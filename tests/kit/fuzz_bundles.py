"""Mutate bundles and see that each is refused with a message or answers in range: nothing else may happen.

    python tests/kit/fuzz_bundles.py --n 100000 --out fuzz.json

Case i of a seed is always the same mutation; every second case has all hashes made right again afterwards. Workers are
processes of their own, so a crash inside onnxruntime is seen as one. While a bundle is read, an audit hook watches what
Python opens, imports and starts; a canary folder beside the bundles must stay as it was.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import io
import json
import os
import pickle
import random
import resource
import selectors
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import numpy as np

from stage1_pro.config import Config
from stage1_pro.data.images import PreprocessSpec
from stage1_pro.data.splits import Merging, Row, Splits, hash_splits
from stage1_pro.deploy.bundle import load_bundle, write_bundle
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.deploy.inspection import inspect, render_inspection
from stage1_pro.deploy.manifest import EngineEntry, GraphVariant, Provenance, StageEntry
from stage1_pro.deploy.reference import write_reference
from stage1_pro.deploy.trust import engine_trust, new_key, sign, signature_status
from stage1_pro.errors import InputError, Stage1Error
from stage1_pro.files import sha256_bytes, sha256_file
from stage1_pro.models.architecture import BackboneInfo
from stage1_pro.policies import target as targets
from stage1_pro.policies.gate import GateConstraints, GateParams
from stage1_pro.policies.policy import Origin
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.sets import ScrcParams
from stage1_pro.policies.softmax import Thresholds, softmax
from stage1_pro.policies.target import Scrc
from stage1_pro.words import SPLITS

CLASSES = ["none", "roadwork"]
SPEC = PreprocessSpec(height=4, width=6)
MEMORY = 6 * 2**30
CASE_SECONDS = 60
SECONDS = 10  # of one case, at most
START_SECONDS = 240  # imports, on a busy machine
POLICIES = ("softmax", "gate", "scrc")

# --------------------------------------------------------------------------------------------
# Tiny bundles that load in a millisecond


def write_graphs(folder, *, external=False):
    """Both stages as linear maps, stage B's weights beside its graph when external; returns their entries."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    size = 3 * SPEC.height * SPEC.width

    def weights(name, *shape):
        return numpy_helper.from_array(rng.normal(0, 0.1, shape).astype(np.float32), name)

    def value(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    first = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixels"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "w_hidden"], ["wide"]),
            helper.make_node("Tanh", ["wide"], ["tokens"]),
            helper.make_node("Reshape", ["tokens", "shape"], ["hidden"]),
            helper.make_node("MatMul", ["tokens", "w_logits"], ["scores"]),
            helper.make_node("Add", ["scores", "bias"], ["logits"]),
            helper.make_node("MatMul", ["tokens", "w_gate"], ["column"]),
            helper.make_node("Squeeze", ["column", "axis"], ["gate_logit"]),
        ],
        "stage_a",
        [value("pixels", "n", 3, SPEC.height, SPEC.width)],
        [value("logits", "n", 2), value("gate_logit", "n"), value("hidden", "n", 2, 4)],
        [
            weights("w_hidden", size, 8), weights("w_logits", 8, 2), weights("bias", 2), weights("w_gate", 8, 1),
            numpy_helper.from_array(np.array([-1, 2, 4]), "shape"), numpy_helper.from_array(np.array([1]), "axis"),
        ],
    )  # fmt: skip
    second = helper.make_graph(
        [
            helper.make_node("Flatten", ["hidden"], ["flat"], axis=1),
            helper.make_node("Gemm", ["flat", "w"], ["logits"], alpha=2.0),
        ],
        "stage_b",
        [value("hidden", "n", 2, 4)],
        [value("logits", "n", 2)],
        [weights("w", 8, 2)],
    )
    for name, graph in (("stage_a", first), ("stage_b", second)):
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.checker.check_model(model)
        apart = external and name == "stage_b"
        onnx.save(
            model, folder / f"{name}.onnx", save_as_external_data=apart, location="stage_b.weights", size_threshold=0
        )
    pixels = {"pixels": [-1, 3, SPEC.height, SPEC.width]}
    shapes = {"logits": [-1, 2], "gate_logit": [-1], "hidden": [-1, 2, 4]}
    return {
        "stage_a": StageEntry(onnx="stage_a.onnx", inputs=pixels, outputs=shapes, parity=1e-6),
        "stage_b": StageEntry(
            onnx="stage_b.onnx", inputs={"hidden": [-1, 2, 4]}, outputs={"logits": [-1, 2]}, parity=1e-6
        ),
    }


def make_splits():
    rows = [
        Row(
            id=str(i), file=f"{i}.png", label=CLASSES[i % 2], group=str(i), split=SPLITS[i // 2 % 4],
            half="fit" if SPLITS[i // 2 % 4] == "val_calib" else None, sha256=sha256_bytes(str(i).encode()),
        )
        for i in range(16)
    ]  # fmt: skip
    return Splits(
        root="images", classes=CLASSES, positive="roadwork", seed=0, fractions=dict.fromkeys(SPLITS, 0.25),
        counts={name: {"none": 2, "roadwork": 2} for name in SPLITS}, groups=dict.fromkeys(SPLITS, 4),
        hashes=hash_splits(rows), rows=rows,
        merging=Merging(pairs=0, components=0, largest_rows=0, largest_share=0.0, largest_groups=[]),
    )  # fmt: skip


def make_policy(kind, hashes):
    bound = {
        "split_hashes": {"val_calib": hashes["val_calib"]},
        "model_fingerprint": "0" * 64,
        "preprocessing_fingerprint": SPEC.fingerprint(),
    }
    shared = {
        "classes": CLASSES, "positive": "roadwork", "coverage": 0.5, "guarantee": "none", "statement": "Nothing.",
        "bound_level": 0.95, "bound_method": "test", "n_rows": 10, "n_exited": 5, "n_positive_exited": 3,
        "n_false_negative": 0, "n_positive_groups": 3, "grouped": True, "sweep_results": [],
    }  # fmt: skip
    if kind == "softmax":
        return Thresholds(
            **shared, **bound, exit_threshold=0.52, exit_lower_threshold=0.48, exit_upper_threshold=0.52,
            fnr_on_exited=0.0, exit_accuracy=1.0, target_fnr=0.02, fnr_upper_bound=0.2,
        )  # fmt: skip
    if kind == "gate":
        return GateParams(
            **shared, **bound, a=1.5, b=-0.2, fitted=True, platt="test", threshold=0.45, exit_error=0.0,
            fnr_on_exited=None, certificate=None, certify_uses=None,
            constraints=GateConstraints(min_coverage=0.4, max_exit_error=0.01), exit_error_upper_bound=0.4,
            fnr_upper_bound=None, n_errors=0, n_exited_groups=5, n_fit_rows=5,
        )  # fmt: skip
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 400)
    signal = (2 * labels - 1)[:, None] * np.array([-1.0, 1.0])
    rows = Rows.of(
        softmax(signal + rng.normal(size=(400, 2))), labels, gate=rng.normal(size=400), probs_b=softmax(2 * signal),
        halves=np.where(np.arange(400) % 2, "fit", "certify"), classes=CLASSES, positive="roadwork",
    )  # fmt: skip
    target = Scrc(alpha=0.1, variant="naive", guarantee="none", cells="class")
    return ScrcParams.fit(target, rows, origin=Origin(**bound))


def make_bundle(folder, kind="softmax", *, rich=False):
    """Write a bundle as export does; rich: external weights, a variant, an engine, reference outputs."""
    folder = Path(folder)
    splits = make_splits()
    metrics = folder.parent / f"{folder.name}.csv"
    metrics.parent.mkdir(parents=True, exist_ok=True)
    metrics.write_text("epoch,loss\n1,0.5\n")

    def graphs(out):
        stages, engines = write_graphs(out, external=rich), []
        if rich:
            shutil.copy(out / "stage_a.onnx", out / "stage_a.fp16.onnx")
            variant = GraphVariant(
                onnx="stage_a.fp16.onnx", parity=1e-3, judged_by="onnxruntime", images=8, flips=0, near_threshold=0,
                block_maxima=[1.0, 2.0], calibration_images=8,
            )  # fmt: skip
            stages["stage_a"] = stages["stage_a"].model_copy(update={"variants": {"fp16": variant}})
            engine = out / "engines/rtx/stage_a.engine"
            engine.parent.mkdir(parents=True)
            engine.write_bytes(b"ftrt" + bytes(60) + b"no engine, but nobody may find out")
            engines = [
                EngineEntry(
                    stage="stage_a", path="engines/rtx/stage_a.engine", target="rtx", builder="tensorrt_rtx",
                    builder_version="1.7", compute_capabilities=["SM86"], precision="fp16", batch=(1, 8, 64),
                    onnx_sha256=sha256_file(out / "stage_a.fp16.onnx"), layers=3, attention_layers=1, build_seconds=1.0,
                    validated="not run",
                )
            ]  # fmt: skip
            write_reference(out, stages, SPEC)
        return stages, engines

    bundle = write_bundle(
        folder, graphs, policy=make_policy(kind, splits.hashes), splits=splits, config=Config(), metrics=metrics,
        preprocessing=SPEC, tap=2,
        backbone=BackboneInfo(
            source="tiny", family="dinov3", licence="trained from scratch", hidden_size=8, n_blocks=4, patch_size=2
        ),
        provenance=Provenance(
            stage1_pro="0.1.0", torch="2.13", transformers="5", checkpoint_sha256="1" * 64, model_fingerprint="0" * 64,
            split_hashes=splits.hashes,
        ),
    )  # fmt: skip
    metrics.unlink()
    return bundle


# --------------------------------------------------------------------------------------------
# Mutations: each changes the mapping name -> bytes (a callable makes something that is no plain file)

INTERESTING = (
    None, True, False, 0, 1, -1, 2, 1e-320, 0.5, 1 - 1e-16, 2**31, 2**63, -(2**63), 2**64, 10**400, 1e308, -1e308,
    float("nan"), float("inf"), float("-inf"), "", "A", "0", "nan", "..", ".", "/",
    "/etc/passwd", "../canary/file",
    "../../canary/file", "a/../stage_a.onnx", "./stage_a.onnx", "stage_a.onnx/", "stage_a.onnx\0", "C:\\windows", "a:b",
    "bundle.json", "bundle.sig", "config.json",
    "\x1b[31mred", "\ud800", "\U0001f6a7", "\u202egnp.exe", "x" * 100_000, "\n",
    "__import__('os').system('true')", "${HOME}", "%s%s%n", [], {}, [[]], {"a": 1}, [1, 2, 3], ["none", "roadwork"],
)  # fmt: skip
EXTERNAL = {
    "location": (
        "../canary/file", "/etc/passwd", "stage_b.weights", "config.json", "x\0y", "", ".",
        "engines/../stage_b.weights", "bundle.json", "*/_ORT_MEM_ADDR_/*",
    ),
    "offset": ("0", "-8", "99999999999999999999", "x", "64", "0x10"),
    "length": ("8", "0", "-1", "99999999999", "", "3", "64"),
}  # fmt: skip
_INT_EDGES = (0, 1, 2, 3, 7, 127, 128, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mutate_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data) + 1)
        span = rng.choice((1, 1, 2, 4, 8, 64, 1024))
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            data[at:at] = rng.randbytes(span)
        elif kind == 3:
            del data[at : at + span]
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            data[at:at] = data[max(0, at - span) : at]
        else:
            data[at : at + span] = struct.pack("<Q", rng.choice(_INT_EDGES))[:span]
    return bytes(data)


def paths_of(value, prefix=()):
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from paths_of(part, (*prefix, key))


def at_path(value, path):
    for key in path:
        value = value[key]
    return value


def mutate_json(rng, data):
    """Structural changes of a JSON text: types, numbers, names, depth, keys that are there twice."""
    values = json.loads(data)
    text = None
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = [path for path in paths_of(values) if path]
        if not places:
            break
        path = rng.choice(places)
        parent, key = at_path(values, path[:-1]), path[-1]
        kind = rng.randrange(11)
        if kind <= 3:
            parent[key] = copy.deepcopy(rng.choice(INTERESTING))
        elif kind == 4:
            del parent[key]
        elif kind == 5 and isinstance(parent, dict):
            parent[str(rng.choice(INTERESTING))[:99_999]] = copy.deepcopy(rng.choice(INTERESTING))
        elif kind == 6 and isinstance(parent, dict):
            parent[rng.choice((key.upper(), key + " ", key[:-1], "../" + key, key + "\0"))] = parent.pop(key)
        elif kind == 7:
            other = rng.choice(places)
            with_parent = at_path(values, other[:-1])
            parent[key] = copy.deepcopy(with_parent[other[-1]])
        elif kind == 8 and isinstance(parent[key], int | float):
            number = parent[key]
            parent[key] = rng.choice(
                (-number, number + 1, number - 1, number * 1e6, number / 1e6, str(number), 1 - number)
            )
        elif kind == 9:
            depth = rng.choice((2, 31, 32, 200, 1000, 20_000))
            mark = rng.choice(("[]", "{}"))
            opened = "[" * depth if mark == "[]" else '{"a":' * depth
            text = (json.dumps(values), json.dumps(parent[key]), opened + "1" + mark[1] * depth)
            break
        elif kind == 10 and isinstance(parent[key], list | dict):
            many = rng.choice((10, 1000, 100_000))
            parent[key] = [1] * many if isinstance(parent[key], list) else {str(i): 1 for i in range(many)}
    dumped = json.dumps(values, ensure_ascii=rng.random() < 0.5)
    if text is not None:
        dumped = text[0].replace(text[1], text[2], 1)
    if rng.random() < 0.05:
        place = dumped.find("{") + 1
        dumped = (
            dumped[:place]
            + rng.choice(('"classes":[],', '"files":{},', '"policy":"gate",', '"a":1,"a":2,'))
            + dumped[place:]
        )
    if rng.random() < 0.03:
        dumped = rng.choice(("\ufeff", " " * 5_000_000, "\0")) + dumped
    return dumped.encode("utf-8", "surrogatepass")


def mutate_policy(rng, data):
    """Numbers of a policy alone, and the seal made right again half of the time."""
    values = json.loads(data)
    numbers = [p for p in paths_of(values) if p and isinstance(at_path(values, p), int | float)]
    for path in rng.sample(numbers, min(len(numbers), rng.choice((1, 2, 5)))):
        old = at_path(values, path)
        at_path(values, path[:-1])[path[-1]] = rng.choice(
            (
                0,
                1,
                -1,
                0.0,
                1.0,
                0.5,
                1 + 2**-52,
                1e308,
                -1e308,
                1e-308,
                2**63,
                old * 2,
                -old,
                1e16,
                float("nan"),
                old / 3,
            )
        )
    if values.get("policy") == "scrc" and rng.random() < 0.7:
        try:
            values.pop("calibrator_fingerprint")
            record = ScrcParams.model_construct(**{**ScrcParams.model_validate_json(data).__dict__, **values})
            values["calibrator_fingerprint"] = record.fingerprint_numbers()
        except Exception:  # noqa: BLE001 - a seal that cannot be made is a mutation as well
            values["calibrator_fingerprint"] = "0" * 64
    return json.dumps(values).encode()


def _fields(message, depth=0):
    for descriptor, value in message.ListFields():
        yield message, descriptor
        if descriptor.type == descriptor.TYPE_MESSAGE and depth < 8:
            for part in value if not hasattr(value, "ListFields") else (value,):
                if hasattr(part, "ListFields"):
                    yield from _fields(part, depth + 1)


def mutate_graph(rng, data):
    """Fields of the parsed graph: shapes, types, names, operators, domains, places of weights, inner graphs."""
    import onnx
    from onnx import helper

    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:  # noqa: BLE001 - another mutation came before
        return mutate_bytes(rng, data)
    graph = model.graph
    # fmt: off
    ops = [
        "Identity", "MatMul", "Add", "Tile", "Expand", "ConstantOfShape", "Range", "Resize", "Gather", "Concat", "Cast",
        "Split", "Loop", "If", "Scan", "NonZero", "OneHot", "Pad", "Conv", "Softmax", "Attention", "Slice", "TopK",
        "Nope", "StringNormalizer",
        "QuantizeLinear", "Einsum", "Reshape", "Transpose", "Where",
        "RandomNormal", "EyeLike",
    ]
    # fmt: on
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.randrange(10)
        if kind == 0 and graph.node:
            rng.choice(graph.node).op_type = rng.choice(ops)
        elif kind == 1 and graph.node:
            rng.choice(graph.node).domain = rng.choice(
                (
                    "com.evil",
                    "com.microsoft",
                    "ai.onnx.ml",
                    "ai.onnx",
                    "ai.onnx.training",
                    "trt",
                    "pkg.\0x",
                    "ai.onnx.contrib",
                )
            )
        elif kind == 2 and graph.initializer:
            tensor = rng.choice(graph.initializer)
            change = rng.randrange(4)
            if change == 0 and tensor.dims:
                tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice((*_INT_EDGES[:-2], -1))
            elif change == 1:
                tensor.data_type = rng.randrange(0, 28)
            elif change == 2:
                tensor.raw_data = rng.randbytes(len(tensor.raw_data))
            else:
                tensor.dims.append(rng.choice((0, 1, 2, 2**20)))
        elif kind == 3 and graph.initializer:
            tensor = rng.choice(graph.initializer)
            tensor.data_location = 1
            tensor.ClearField("raw_data")
            del tensor.external_data[:]
            for key, values in EXTERNAL.items():
                value = rng.choice(values)
                if rng.random() < 0.8:
                    tensor.external_data.add(key=key, value=value)
        elif kind == 4 and graph.node:
            body = helper.make_graph([], "inner", [], [])
            rng.choice(graph.node).attribute.append(helper.make_attribute("body", body))
        elif kind == 5 and graph.node:
            node = rng.choice(graph.node)
            names = [n for other in graph.node for n in (*other.input, *other.output)] + ["", "nobody"]
            ends = node.input if rng.random() < 0.5 else node.output
            if ends:
                ends[rng.randrange(len(ends))] = rng.choice(names)
        elif kind == 6:
            end = rng.choice([*graph.input, *graph.output])
            shape = end.type.tensor_type
            if shape.shape.dim and rng.random() < 0.6:
                rng.choice(shape.shape.dim).dim_value = rng.choice((0, 1, 2, 5, 2**31, -1, 2**62))
            else:
                shape.elem_type = rng.randrange(0, 28)
        elif kind == 7 and graph.node:
            node = rng.choice(graph.node)
            graph.node.add().CopyFrom(node)
        elif kind == 8 and graph.node:
            node = rng.choice(graph.node)
            node.attribute.append(
                helper.make_attribute(
                    rng.choice(("axis", "to", "alpha", "perm", "x")), rng.choice((0, 99, -99, 2**62, 1.5, "a", [2**40]))
                )
            )
        else:
            places = list(_fields(model))
            message, descriptor = rng.choice(places)
            message.ClearField(descriptor.name)
    return model.SerializeToString()


def mutate_arrays(rng, data):
    kind = rng.randrange(6)
    buffer = io.BytesIO()
    if kind == 0:
        return mutate_bytes(rng, data)
    if kind == 1:
        np.savez(buffer, pixels=np.array([{"a": 1}, None], dtype=object))
    elif kind == 2:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("pixels.npy", bytes(rng.choice((10, 2**20, 2**22))))
    elif kind == 3:
        head = io.BytesIO()
        shape = rng.choice(((2**40,), (2**20, 2**20), (-1,), (0,), (2,)))
        np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("pixels.npy", head.getvalue() + bytes(8))
    elif kind == 4:
        with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in rng.choice((["a.npy", "a.npy"], ["../../canary/x.npy"], [f"{i}.npy" for i in range(200)])):
                item = io.BytesIO()
                np.save(item, np.zeros(2, np.float32))
                archive.writestr(name, item.getvalue())
    else:
        return pickle.dumps(Bomb())
    return buffer.getvalue()


class Bomb:
    """Unpickling this leaves a mark that the audit hook sees."""

    def __reduce__(self):
        return os.system, ("true",)


ADDED = (
    "x.txt", "gateparams.json", "scrcparams.json", "thresholds.json", "THRESHOLDS.JSON", "sub/thresholds.json", "a\nb",
    "\x1b[0m", "model.pkl", "stage_a.onnx.data", "stage_c.onnx", "evil.npz", "bundle.sig", "sub/bundle.json",
    "a/b/c/d/e/f/g/h/i/j", "conftest.py", ".hidden",
)  # fmt: skip


def mutate_files(rng, files, outside):
    names = sorted(files)
    name = rng.choice(names)
    kind = rng.randrange(10)
    if kind == 0:
        del files[name]
    elif kind == 9:  # as a hub or a volume has it
        hidden = f"..data/{len(files)}"
        files[hidden] = files[name]
        files[name] = lambda path: path.symlink_to(os.path.relpath(path.parents[name.count("/")] / hidden, path.parent))
    elif kind == 1:
        content = files[name] if isinstance(files[name], bytes) else b""
        files[rng.choice(ADDED)] = rng.choice((b"", b"x", pickle.dumps(Bomb()), content))
    elif kind == 2:
        target = rng.choice(
            (outside / "file", Path("/etc/passwd"), outside, Path("stage_b.onnx"), Path("nowhere"), Path(name).name)
        )
        files[name] = lambda path: path.symlink_to(target)
    elif kind == 3:
        files[name] = os.mkfifo
    elif kind == 4:
        files[name] = os.mkdir
    elif kind == 5:
        files[rng.choice((name.upper(), name + "~", "sub/" + name))] = files.pop(name)
    elif kind == 6:
        other = rng.choice(names)
        files[name], files[other] = files[other], files[name]
    elif kind == 7:
        files[name] = b""
    else:
        count = rng.choice((3, 50, 2500)) if rng.random() < 0.1 else 3
        files.update({f"many/{i}": b"" for i in range(count)})


def as_format_1(files):
    """The manifest as the first format had it: a frozen writer."""
    values = json.loads(files["bundle.json"])
    values["format_version"] = 1
    values.pop("reference")
    for entry in values["stages"].values():
        entry.pop("variants")
    for engine in values["engines"]:
        engine["precision"] = "fp32"
        engine["onnx_sha256"] = values["files"][values["stages"][engine["stage"]]["onnx"]]["sha256"]
    files["bundle.json"] = json.dumps(values).encode()


def make_right(files):
    """Sizes, hashes and fingerprints as if the mutated parts had been exported so: what a forger would do."""
    try:
        values = json.loads(files["bundle.json"])
        policy = values["policy_file"]
        if isinstance(files.get(policy), bytes):
            content = json.loads(files[policy])
            fingerprint = PreprocessSpec.model_validate(values["preprocessing"]).fingerprint()
            if content.get("preprocessing_fingerprint") != fingerprint:
                content["preprocessing_fingerprint"] = fingerprint
                files[policy] = json.dumps(content).encode()
    except Exception:  # noqa: BLE001 - what cannot be made right stays wrong
        values = values if "values" in locals() else None
    try:
        listed = {n: d for n, d in files.items() if isinstance(d, bytes) and n not in ("bundle.json", "bundle.sig")}
        if isinstance(values["files"], dict):
            odd = {n: e for n, e in values["files"].items() if n not in files}
            values["files"] = {n: {"sha256": sha256_bytes(d), "size": len(d)} for n, d in listed.items()}
            values["files"].update(odd if len(odd) < 3 else {})
        for engine in values["engines"]:
            stage = values["stages"][engine["stage"]]
            graph = stage["onnx"] if engine["precision"] == "fp32" else stage["variants"][engine["precision"]]["onnx"]
            engine["onnx_sha256"] = values["files"][graph]["sha256"]
        files["bundle.json"] = json.dumps(values).encode()
    except Exception:  # noqa: BLE001 - as above
        return


def mutate_tensor(rng, files):
    """An input or output that goes, or gets another name, in a graph and in the manifest alike."""
    import onnx

    values = json.loads(files["bundle.json"])
    stage = rng.choice(sorted(values["stages"]))
    entry = values["stages"][stage]
    model = onnx.ModelProto()
    try:
        model.ParseFromString(files[entry["onnx"]])
    except Exception as error:
        raise ValueError("no graph any more") from error
    side = rng.choice(("inputs", "outputs", "outputs", "outputs"))
    listed = model.graph.input if side == "inputs" else model.graph.output
    tensor = rng.choice(list(listed))
    name = tensor.name
    if rng.random() < 0.6:
        listed.remove(tensor)
        entry[side].pop(name)
    else:
        other = rng.choice(("logits", "gate_logit", "hidden", "pixels", "other"))
        entry[side][other] = entry[side].pop(name)
        tensor.name = other
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [other if found == name else found for found in names]
    files[entry["onnx"]] = model.SerializeToString()
    files["bundle.json"] = json.dumps(values).encode()


KINDS = ("bytes", "json", "graph", "policy", "arrays", "files", "tensor")


def mutate(seed, index, bases, outside):
    """Case ``index`` of a seed: (files, kinds of mutation, whether hashes were made right)."""
    rng = random.Random(f"{seed}/{index}")
    files = dict(rng.choice(bases))
    right, kinds = index % 2 == 1, []
    if rng.random() < 0.15:
        as_format_1(files)
        kinds.append("format_1")
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind = rng.choices(KINDS, (20, 25, 20, 12, 6, 12, 5))[0]
        plain = [name for name, data in files.items() if isinstance(data, bytes) and data]
        jsons = [name for name in plain if name.endswith(".json")]
        wanted = {
            "bytes": plain,
            "json": jsons + ["bundle.json"] * 4 * ("bundle.json" in jsons),
            "graph": [name for name in plain if name.endswith(".onnx")],
            "policy": [name for name in jsons if name in ("thresholds.json", "gateparams.json", "scrcparams.json")],
            "arrays": [name for name in plain if name.endswith(".npz")],
            "files": plain,
            "tensor": ["bundle.json"] * ("bundle.json" in jsons),
        }[kind]
        if not wanted:
            kind, wanted = "bytes", plain
        if not wanted:
            break
        name = rng.choice(wanted)
        kinds.append(kind)
        if kind == "files":
            mutate_files(rng, files, outside)
            continue
        if kind == "tensor":
            try:
                mutate_tensor(rng, files)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError, OverflowError):
                files[name] = mutate_bytes(rng, files[name])  # as below
            continue
        change = {
            "bytes": mutate_bytes,
            "json": mutate_json,
            "graph": mutate_graph,
            "policy": mutate_policy,
            "arrays": mutate_arrays,
        }
        try:
            files[name] = change[kind](rng, files[name])
        except (ValueError, TypeError, OverflowError, RecursionError, AttributeError, KeyError, IndexError):
            files[name] = mutate_bytes(rng, files[name])  # an earlier mutation left nothing to parse
    if right:
        make_right(files)
    return files, kinds, right


# --------------------------------------------------------------------------------------------
# One case, watched


class Watch:
    """What Python does while a bundle is read; the hook cannot be removed, only switched."""

    FORBIDDEN = (
        "pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.spawn", "subprocess.Popen",
        "socket.", "ctypes.dlopen", "marshal.loads", "shutil.", "os.remove", "os.rename", "os.rmdir", "os.mkdir",
        "os.link", "os.symlink", "os.chmod", "os.truncate", "tempfile.",
    )  # fmt: skip

    def __init__(self):
        self.inside, self.seen = None, []
        "\x1b".encode("unicode_escape")  # what messages are escaped with is imported when it is first used
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if self.inside is None:
            return
        if event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.abspath(os.fsdecode(arguments[0]))  # noqa: PTH100 - resolve() would follow links
            flags = arguments[2] or 0
            if not path.startswith(f"{self.inside}/") or flags & (os.O_WRONLY | os.O_RDWR):
                self.seen.append(f"open {path} {arguments[1:]}")
        elif event.startswith(self.FORBIDDEN):
            self.seen.append(event)


def check_answers(cascade):
    spec = cascade.bundle.preprocessing
    rng = np.random.default_rng(0)
    count = 3 if spec.height * spec.width < 2**18 else 1
    images = [rng.integers(0, 256, (5 + i, 7, 3), dtype=np.uint8) for i in range(count)]
    decisions = cascade.predict(images)
    assert len(decisions) == count
    assert set(decisions.label.tolist()) <= {*cascade.bundle.classes, ""}
    for values in (decisions.prob, decisions.confidence):
        assert (np.isnan(values) | ((values >= 0) & (values <= 1))).all(), values
    assert set(decisions.stage.tolist()) <= {"A", "B", ""}
    assert decisions.sets.shape == (count, len(cascade.bundle.classes))


def judge(folder, watch):
    """(outcome, detail) of reading one bundle and answering with it."""
    watch.inside, watch.seen = str(folder), []
    outcome, detail = "loaded", ""
    try:
        bundle = load_bundle(folder)
        # The same without running anything, as verify and inspect do.
        render_inspection(inspect(bundle))
        signature_status(bundle)
        allowed = [entry.path for entry in bundle.manifest.engines if engine_trust(bundle, entry).allowed]
        assert not allowed, f"engines of a stranger would run: {allowed}"
        check_answers(Cascade.load(bundle))
    except Stage1Error as error:
        outcome, detail = "refused", str(error)
        if not detail or len(detail) > 3000 or not detail.isprintable():
            outcome, detail = "bad message", repr(detail[:500])
    except BaseException:  # noqa: BLE001 - that is what is looked for
        watch.inside = None  # a traceback opens the source files
        outcome, detail = "other exception", traceback.format_exc()[-3000:]
    finally:
        watch.inside = None
    if watch.seen:
        outcome, detail = "touched", "; ".join(watch.seen[:5])
    return outcome, detail


def lay_out(folder, files):
    for name, data in files.items():
        path = folder / os.fsdecode(name.encode("utf-8", "surrogateescape"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if callable(data):
                data(path)
            else:
                path.write_bytes(data)
        except (OSError, ValueError):
            continue  # a name the file system cannot hold, or a file where a folder should be


def snapshot(folder):
    return [
        (p.relative_to(folder).as_posix(), p.lstat().st_mtime_ns, p.lstat().st_size) for p in sorted(folder.rglob("*"))
    ]


def make_bases(folder):
    bases = []
    new_key(folder / "stranger.key")
    for kind in POLICIES:
        for rich in (False, True):
            base = folder / f"{kind}-{rich}"
            bundle = make_bundle(base, kind, rich=rich)
            if rich:
                sign(bundle, folder / "stranger.key")
            files = {p.relative_to(base).as_posix(): p.read_bytes() for p in sorted(base.rglob("*")) if p.is_file()}
            bases.append(files)
    return bases


def work(seed, start, stop, step, scratch):
    """Judge cases start, start + step, …; one line before and one after each, so that a crash has a number."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["STAGE1_CONFIG"] = scratch + "/nobody"  # whom this user trusts must not decide
    warnings.simplefilter("error")
    folder = Path(tempfile.mkdtemp(dir=scratch))
    outside = folder / "canary"
    outside.mkdir()
    (outside / "file").write_bytes(bytes(4096))
    bases = make_bases(folder / "bases")
    watch = Watch()
    for files in bases:
        clean = folder / "clean"
        clean.mkdir()
        lay_out(clean, files)
        first = judge(clean, watch)  # the first reading also imports what is imported late
        first = judge(clean, watch)
        assert first == ("loaded", ""), first
        shutil.rmtree(clean)
    with contextlib.suppress(InputError):
        targets.POLICIES.find("nobody")  # the first unknown name is looked for among all that is installed here
    before, parent = snapshot(outside), os.getppid()
    for index in range(start, stop, step):
        if os.getppid() != parent:
            break  # nobody reads what would be found
        print(f"> {index}", flush=True)
        files, kinds, right = mutate(seed, index, bases, outside)
        case = folder / "case"
        case.mkdir()
        lay_out(case, files)
        began = time.process_time()
        outcome, detail = judge(case, watch)
        seconds = time.process_time() - began
        if outcome in ("refused", "loaded") and seconds > SECONDS:
            outcome, detail = "slow", f"{seconds:.1f} s: {detail}"
        if snapshot(outside) != before:
            outcome, detail = "touched", "the canary folder changed"
        # What onnxruntime opens no hook sees, so such a graph must not come that far.
        graphs = [data for name, data in files.items() if name.endswith(".onnx") and isinstance(data, bytes)]
        if outcome == "loaded" and any(b"canary/file" in data or b"/etc/passwd" in data for data in graphs):
            outcome, detail = "touched", "a graph that names a file outside was loaded"
        print("= " + json.dumps([index, outcome, kinds, right, detail, round(seconds, 2), peak()]), flush=True)
        shutil.rmtree(case)
    shutil.rmtree(folder)


# --------------------------------------------------------------------------------------------
# All of them


def start_worker(options, start, scratch):
    command = [
        sys.executable,
        __file__,
        "--seed",
        str(options.seed),
        "--work",
        str(start),
        str(options.n),
        str(options.workers),
        scratch,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True, bufsize=1)


def peak():
    """The most megabytes of memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def run(options, start_worker=None):
    """Drive the workers; return the counts and every case that is neither refused nor loaded."""
    start_worker = start_worker or globals()["start_worker"]
    options.slowest = options.peak = (0, "")
    counts, reasons, findings = collections.Counter(), collections.Counter(), []
    scratch = tempfile.mkdtemp(prefix="stage1-fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    selector, last = selectors.DefaultSelector(), {}
    started = time.perf_counter()

    def begin(slot, start):
        if start < options.n:
            process = start_worker(options, start, scratch)
            last[slot] = [start, time.monotonic() + START_SECONDS, process, False]
            selector.register(process.stdout, selectors.EVENT_READ, slot)

    for slot in range(options.workers):
        begin(slot, slot)
    done = 0
    try:
        while last:
            for key, _ in selector.select(timeout=1):
                slot, line = key.data, key.fileobj.readline()
                state = last[slot]
                if line.startswith("> "):
                    state[:2] = [int(line[2:]), time.monotonic()]
                    state[3] = True
                elif line.startswith("= "):
                    index, outcome, kinds, right, detail, *cost = json.loads(line[2:])
                    if cost:
                        options.slowest = max(options.slowest, (cost[0], f"case {index}, {'+'.join(kinds)}"))
                        options.peak = max(options.peak, (cost[1], f"case {index}, {'+'.join(kinds)}"))
                    counts[(outcome, "+".join(sorted(set(kinds))), right)] += 1
                    done += 1
                    if outcome not in ("refused", "loaded"):
                        findings.append(
                            {"index": index, "outcome": outcome, "kinds": kinds, "right": right, "detail": detail}
                        )
                        print(f"case {index}: {outcome} ({'+'.join(kinds)})\n{detail[-1500:]}", file=sys.stderr)
                    elif outcome == "refused":
                        reasons[" ".join(detail.split()[:4])[:60]] += 1
                    if done % 5000 == 0:
                        print(f"{done} of {options.n}, {time.perf_counter() - started:.0f} s", file=sys.stderr)
                elif not line:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    index, _, process, began = last.pop(slot)
                    if process.wait() != 0:
                        if not began:
                            raise RuntimeError("a worker must begin with its cases, but it ended before")
                        findings.append(
                            {"index": index, "outcome": "crash", "detail": f"exit status {process.returncode}"}
                        )
                        counts[("crash", "?", index % 2 == 1)] += 1
                        print(f"case {index}: crash, exit status {process.returncode}", file=sys.stderr)
                        begin(slot, index + options.workers)
            for index, since, process, _ in list(last.values()):
                if time.monotonic() - since > CASE_SECONDS:
                    print(f"case {index}: no end after {CASE_SECONDS} s", file=sys.stderr)
                    process.kill()
    finally:
        for _, _, process, _ in last.values():
            process.kill()
            process.wait()
        shutil.rmtree(scratch, ignore_errors=True)
    return counts, reasons, findings, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        start, stop, step, scratch = options.work
        work(options.seed, int(start), int(stop), int(step), scratch)
        return 0
    return report(options, *run(options))


def report(options, counts, reasons, findings, seconds):
    """Print what came of the cases, and write it down; 1 where something must not have happened."""
    table = collections.Counter()
    for (outcome, _, right), count in counts.items():
        table[(outcome, right)] += count
    by_kind = collections.Counter()
    for (outcome, kinds, _), count in counts.items():
        for kind in kinds.split("+"):
            by_kind[(kind, outcome)] += count
    print(f"{'outcome':<18}{'hashes as they were':>20}{'made right':>12}")
    for outcome in sorted({key[0] for key in table}):
        print(f"{outcome:<18}{table[(outcome, False)]:>20}{table[(outcome, True)]:>12}")
    print(f"\n{'mutation':<12}" + "".join(f"{name:>10}" for name in ("refused", "loaded", "else")))
    for kind in sorted({key[0] for key in by_kind}):
        refused, loaded = by_kind[(kind, "refused")], by_kind[(kind, "loaded")]
        rest = sum(count for key, count in by_kind.items() if key[0] == kind) - refused - loaded
        print(f"{kind:<12}{refused:>10}{loaded:>10}{rest:>10}")
    print(f"\n{sum(table.values())} cases of seed {options.seed} in {seconds:.0f} s; {len(findings)} findings")
    (slowest, slow), (most, large) = options.slowest, options.peak
    print(f"slowest {slowest:.1f} s of CPU ({slow}), most memory {most} MB ({large})")
    if options.out:
        options.out.write_text(
            json.dumps(
                {
                    "n": options.n, "seed": options.seed, "seconds": round(seconds, 1),
                    "slowest_seconds": options.slowest, "peak_megabytes": options.peak, "findings": findings,
                    "outcomes": [{"outcome": o, "hashes_right": r, "count": c} for (o, r), c in sorted(table.items())],
                    "refused_for": reasons.most_common(60),
                },
                indent=2,
            )
        )  # fmt: skip
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
