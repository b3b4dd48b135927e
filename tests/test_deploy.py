"""Room deploy: ONNX parity, engines, bundles and what they refuse, the cascade, and the stations around them."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from kit.tiny import (
    CLASSES,
    copy_run,
    make_gate_policy,
    make_images,
    make_model,
    make_policy,
    make_run,
    rehash,
    rewrite,
    set_policy,
    torch_answers,
)
from PIL import Image

from stage1_pro.commands.bench import BenchCascade, render_cascade
from stage1_pro.commands.doctor import doctor
from stage1_pro.commands.doctor import render as render_doctor
from stage1_pro.config import Config, ModelConfig
from stage1_pro.data.splits import Splits
from stage1_pro.deploy import engine as engine_module
from stage1_pro.deploy import onnx as onnx_module
from stage1_pro.deploy.bench import bench_cascade, draw_cascade
from stage1_pro.deploy.bundle import LICENCE, load_bundle
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.deploy.engine import (
    BuildRecord,
    EngineRecipe,
    build_engine,
    check_header,
    load_recipe,
    read_engine,
    sanitise,
)
from stage1_pro.deploy.exporting import build, export
from stage1_pro.deploy.inspection import inspect, render_inspection
from stage1_pro.deploy.manifest import BundleManifest
from stage1_pro.deploy.onnx import export_onnx
from stage1_pro.deploy.onnxruntime import OnnxRuntime
from stage1_pro.deploy.prediction import COLUMNS, infer, predict, render
from stage1_pro.deploy.runtime import RUNTIMES
from stage1_pro.deploy.trained import TorchRuntime
from stage1_pro.errors import ArtifactError, DependencyError, InputError
from stage1_pro.files import sha256_bytes, sha256_file
from stage1_pro.models.model import Stage1Model
from stage1_pro.policies.softmax import Thresholds
from stage1_pro.record import FileEntry
from stage1_pro.training.checkpoint import save_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model() -> Stage1Model:
    return make_model()


@pytest.fixture(scope="module")
def run(tiny: Path, model: Stage1Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared run, with a threshold that splits its images in two."""
    folder = copy_run(tiny, tmp_path_factory.mktemp("deploy") / "run")
    from stage1_pro.data.images import preprocess, read_image

    spec = model.architecture.preprocessing
    pixels = np.stack([preprocess(read_image(p), spec) for p in sorted((folder / "images").iterdir())])
    with torch.no_grad():
        sure = np.sort(torch.softmax(model(torch.from_numpy(pixels)).logits_a.double(), 1).max(1).values.numpy())
    middle = float(sure[len(sure) // 2 - 1 : len(sure) // 2 + 1].mean())
    policy = make_policy(model, Splits.read(folder / "splits.json").hashes, middle)
    policy.write(folder / "thresholds.json")
    set_policy(folder / "bundle", policy)
    return folder


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    return run / "bundle"


@pytest.fixture(scope="module")
def narrow(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("narrow") / "bundle", precisions=["res32", "bf16"])


@pytest.fixture
def graphs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds of tracing: the exporter's writer gives the graphs it wrote for the bundle."""

    def write(module: Any, name: str, example: Any, path: Path, opset: int) -> None:
        shutil.copy(bundle / path.name, path)

    monkeypatch.setattr(onnx_module, "_write", write)


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle of one's own to damage."""
    return Path(shutil.copytree(bundle, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def trt() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx cannot be imported: no engine can be built here")


class TestOnnx:
    def test_parity_when_stage_b_goes_on_from_tokens(self, bundle: Path, model: Stage1Model) -> None:
        """The bundle's graphs (tap 2 of 4), on batches the exporter has not seen."""
        self.compare(bundle, model)
        entries = load_bundle(bundle).manifest.stages
        assert all(0 <= entry.parity < 1e-4 for entry in entries.values())
        assert entries["stage_a"].inputs == {"pixels": [-1, 3, 48, 48]}
        assert entries["stage_a"].outputs == {"logits": [-1, 2], "gate_logit": [-1], "hidden": [-1, 41, 128]}
        assert entries["stage_b"].inputs == {"hidden": [-1, 41, 128]}
        assert entries["stage_b"].outputs == {"logits": [-1, 2]}

    def test_parity_when_both_share_the_last_block(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Tap 4 of 4, with weights beside the graph; the model keeps its training mode."""
        monkeypatch.setattr(onnx_module, "_INLINE_LIMIT", 300_000)
        model = make_model(4).train()
        entries = export_onnx(model, model.architecture.preprocessing, tmp_path)
        assert model.training and model.heads.training
        assert entries["stage_a"].outputs["hidden"] == entries["stage_b"].inputs["hidden"] == [-1, 256]
        assert (tmp_path / "stage_a.onnx.data").stat().st_size > 10 * (tmp_path / "stage_a.onnx").stat().st_size
        self.compare(tmp_path, model.eval())

    @staticmethod
    def compare(folder: Path, model: Stage1Model) -> None:
        a, b = (onnxruntime.InferenceSession(str(folder / f"{s}.onnx")) for s in ("stage_a", "stage_b"))
        for batch in (1, 3, 7, 33):
            pixels = torch.randn(batch, 3, 48, 48, generator=torch.Generator().manual_seed(batch)) * 2
            with torch.no_grad():
                expected = model(pixels)
            logits, gate, hidden = a.run(None, {"pixels": pixels.numpy()})
            assert np.abs(logits - expected.logits_a.numpy()).max() < 1e-4
            assert np.abs(gate - expected.gate_logit.numpy()).max() < 1e-4
            chosen = np.arange(batch)[::2]
            late = b.run(None, {"hidden": hidden[chosen]})[0]
            assert np.abs(late - expected.logits_b.numpy()[chosen]).max() < 1e-4
            # Rows differ, so an output that ignores its input would have been seen.
            assert batch == 1 or min(np.ptp(late, axis=0).min(), np.ptp(gate)) > 1e-3

    def test_file_is_self_contained_and_names_no_folder(self, bundle: Path) -> None:
        for stage in ("stage_a", "stage_b"):
            data = (bundle / f"{stage}.onnx").read_bytes()
            graph = onnx.load_from_string(data)
            onnx.checker.check_model(graph)
            assert graph.opset_import[0].version == 20
            assert not [t for t in graph.graph.initializer if t.external_data]
            assert not {n.op_type for n in graph.graph.node} & {"Cos", "Sin", "Dropout", "RandomUniformLike"}
            for trace in (b"site-packages", b"stage1_pro/", str(ROOT).encode()):
                assert trace not in data

    def test_difference_above_tolerance_is_an_error(self, graphs: None, model: Stage1Model, tmp_path: Path) -> None:
        spec = model.architecture.preprocessing
        with pytest.raises(ArtifactError, match=r"must agree with torch within 1e-12, got a difference of"):
            export_onnx(model, spec, tmp_path, tolerance=1e-12)
        with pytest.raises(ArtifactError, match=r"stage_a.onnx must agree with torch within 0.001"):
            export_onnx(make_model(seed=1), spec, tmp_path)

    def test_nan_is_no_parity(self, graphs: None, tmp_path: Path) -> None:
        model = make_model()
        with torch.no_grad():
            model.heads.auxiliary[3].bias.fill_(float("nan"))
        with pytest.raises(ArtifactError, match="stage_b.onnx must agree with torch"):
            export_onnx(model, model.architecture.preprocessing, tmp_path)

    def test_wrong_pixels(self, model: Stage1Model, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"pixels must be \[M, 3, 48, 48\]"):
            export_onnx(model, model.architecture.preprocessing, tmp_path, pixels=np.zeros((2, 3, 40, 48), np.float32))

    @pytest.mark.slow
    def test_dinov2_backbone(self, shared: Any, tmp_path: Path) -> None:
        model = make_model(6, backbone=str(shared("weights/dinov2-small")), image_size=112)
        entries = export_onnx(model, model.architecture.preprocessing, tmp_path)
        assert all(entry.parity < 1e-3 for entry in entries.values())


class TestEngine:
    def test_yaml_is_the_default(self) -> None:
        assert load_recipe(ROOT / "engines" / "rtx.yaml") == EngineRecipe()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("presicion: fp32", "unknown key 'presicion'.*did you mean 'precision'"),
            ("batch: [8, 4, 2]", "batch must rise from 1"),
            ("precision: fp64", "precision must be one of .*got 'fp64'"),
            ("- 1", "must hold keys and values, got list"),
            ("a: [", "must be a readable YAML file"),
        ],
    )
    def test_bad_recipe(self, text: str, message: str, tmp_path: Path) -> None:
        path = tmp_path / "r.yaml"
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            load_recipe(path)

    def test_missing_builder_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        with pytest.raises(DependencyError, match=r"tensorrt_rtx is not installed.*stage1_pro\[rtx\]"):
            engine_module.import_builder("rtx")

    def test_not_a_graph(self, trt: Any, tmp_path: Path) -> None:
        (tmp_path / "a.onnx").write_bytes(b"no graph")
        with pytest.raises(ArtifactError, match="a.onnx must be a graph tensorrt_rtx can parse"):
            build_engine(tmp_path / "a.onnx", tmp_path, EngineRecipe(), "stage_a")

    def test_sanitise(self) -> None:
        told = "read /home/u/run/stage_a.onnx and C:\\Users\\u\\x.onnx, 3/4 done, node a/b, ratio 1/2"
        assert sanitise(told) == "read stage_a.onnx and x.onnx, 3/4 done, node a/b, ratio 1/2"

    def test_engines_are_this_models(self, trt: Any, run: Path, bundle: Path, tmp_path: Path) -> None:
        out = export(run, tmp_path / "bundle", target="rtx")
        for name in ("stage_a.onnx", "stage_b.onnx", "config.json", "splits.json"):
            assert (out / name).read_bytes() == (bundle / name).read_bytes(), "the same run gives the same bytes"
        manifest = load_bundle(out).manifest
        assert [e.stage for e in manifest.engines] == ["stage_a", "stage_b"]
        for entry in manifest.engines:
            data = (out / entry.path).read_bytes()
            record = BuildRecord.read((out / entry.path).with_suffix(".build.json"))
            # Built by TensorRT for RTX, from the graph in this bundle.
            assert entry.builder == record.builder == "tensorrt_rtx"
            assert entry.builder_version == record.builder_version == trt.__version__
            assert entry.onnx_sha256 == record.onnx_sha256 == sha256_file(out / manifest.stages[entry.stage].onnx)
            assert record.engine_sha256 == sha256_bytes(data) == manifest.files[entry.path].sha256
            # The log's fused layers carry the names of this graph's own matrix products.
            assert entry.layers == len(record.layers) >= 10 * 2
            products = {n.name for n in onnx.load(out / f"{entry.stage}.onnx").graph.node if n.op_type == "MatMul"}
            named = {part for layer in record.layers for part in layer.name.rsplit("_myl", 1)[0].split("+")}
            assert len(named & products) >= 4
            # The header is well formed: the runtime says so, and its length field is the file's length.
            assert "well formed" in entry.validated and "not run" in entry.validated
            assert data[:4] == b"vtrt" and int.from_bytes(data[16:24], "little") == len(data)
            # fp32 weights are in it.
            assert len(data) > (out / f"{entry.stage}.onnx").stat().st_size * 0.8
            assert entry.compute_capabilities[:3] == ["SM80", "SM86", "SM89"]
            assert entry.build_seconds > 0
            text = record.model_dump_json()
            assert str(tmp_path) not in text and str(ROOT) not in text and "Parsing node" not in text
        assert "SM120" in render_inspection(inspect(out))

    def test_recipe_reaches_the_builder(self, trt: Any, bundle: Path, tmp_path: Path) -> None:
        recipe = EngineRecipe(compute_capabilities=("SM86", "SM120"), batch=(1, 2, 4))
        entry = build_engine(bundle / "stage_b.onnx", tmp_path, recipe, "stage_b")
        assert entry.compute_capabilities == ["SM86", "SM120"] and entry.batch == (1, 2, 4)

    def test_header(self, trt: Any, bundle: Path, tmp_path: Path) -> None:
        entry = build_engine(bundle / "stage_b.onnx", tmp_path, EngineRecipe(batch=(1, 1, 2)), "stage_b")
        header = (tmp_path / entry.path).read_bytes()[:64]
        assert check_header(header).startswith("header well formed")
        for bad, message in ((b"x" + header[1:], "malformed"), (bytes(64), "malformed"), (header[:63], "got 63")):
            with pytest.raises(ArtifactError, match=message):
                check_header(bad)

    def test_fused_attentions_are_counted(self, trt: Any, tmp_path: Path) -> None:
        class Attention(torch.nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                for _ in range(3):
                    heads = x.reshape(x.shape[0], 64, 4, 32).transpose(1, 2)
                    x = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
                    x = x.transpose(1, 2).reshape(x.shape[0], 64, 128)
                return x

        with onnx_module._quiet():
            program = torch.onnx.export(
                Attention().eval(), (torch.zeros(2, 64, 128, dtype=torch.float16),), dynamo=True, opset_version=20,
                dynamic_shapes={"x": {0: torch.export.Dim("batch")}}, verbose=False,
            )  # fmt: skip
        assert program is not None
        program.save(str(tmp_path / "m.onnx"))
        entry = build_engine(tmp_path / "m.onnx", tmp_path, EngineRecipe(), "stage_a")
        assert entry.attention_layers == 3


class TestPrecisions:
    """A bundle in several precisions, its engines, and engines that its receiver builds."""

    def test_variants_are_judged_on_photos(self, narrow: Path, bundle: Path) -> None:
        loaded = load_bundle(narrow)
        for stage, norms in (("stage_a", 5), ("stage_b", 5)):
            variants = loaded.manifest.stages[stage].variants
            assert list(variants) == ["fp32", "res32", "bf16"]
            assert variants["fp32"].onnx == f"{stage}.onnx" and variants["res32"].onnx == f"{stage}.res32.onnx"
            assert [v.judged_by for v in variants.values()] == ["onnxruntime", "onnxruntime", "torch"]
            assert variants["fp32"].parity < 1e-4 and 0 < variants["res32"].parity < 0.03
            # The heads' random weights make logits of several units; bf16 has 8 bits, fp16 11.
            assert 2 * variants["res32"].parity < variants["bf16"].parity < 1
            for variant in variants.values():
                assert variant.images == variant.calibration_images == 4
                assert len(variant.block_maxima) == 2 and all(0 < m < 1e3 for m in variant.block_maxima)
            for name in ("fp32", "res32"):
                assert variants[name].flips == variants[name].near_threshold
            # fp32 bytes do not depend on what lies beside them.
            assert (narrow / f"{stage}.onnx").read_bytes() == (bundle / f"{stage}.onnx").read_bytes()
            graph = onnx.load(narrow / f"{stage}.res32.onnx").graph
            types = {t.name: t.data_type for t in graph.initializer}
            float32 = onnx.TensorProto.FLOAT
            products = [n for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in types]
            assert products and all(types[n.input[1]] == onnx.TensorProto.FLOAT16 for n in products)
            layers = [n for n in graph.node if n.op_type == "LayerNormalization"]
            assert len(layers) == norms and all(types[n.input[1]] == float32 for n in layers)
            assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {float32}

    def test_the_receiver_builds(self, trt: Any, narrow: Path, tmp_path: Path) -> None:
        before = {p: p.read_bytes() for p in narrow.rglob("*") if p.is_file()}
        batch = {"stage_a": (1, 2, 4), "stage_b": (1, 1, 2)}
        recipe = EngineRecipe(precision="res32", fallbacks=("fp32",), batch=batch)
        out = build(narrow, tmp_path / "here", recipe=recipe)
        assert {p: p.read_bytes() for p in narrow.rglob("*") if p.is_file()} == before
        loaded = load_bundle(out)
        assert [(e.path, e.precision, e.batch) for e in loaded.manifest.engines] == [
            ("engines/rtx/stage_a.engine", "res32", (1, 2, 4)),
            ("engines/rtx/stage_b.engine", "res32", (1, 1, 2)),
            ("engines/rtx-fp32/stage_a.engine", "fp32", (1, 2, 4)),
            ("engines/rtx-fp32/stage_b.engine", "fp32", (1, 1, 2)),
        ]
        first, _, wide, _ = loaded.manifest.engines
        # The tiny model's two blocks: res32 fuses both attentions, fp32 none, and takes fewer layers.
        assert (first.attention_layers, wide.attention_layers) == (2, 0) and first.layers < wide.layers
        data = read_engine(loaded, first)
        assert sha256_bytes(data) == loaded.manifest.files[first.path].sha256
        (out / first.path).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ArtifactError, match="stage_a.engine must have the sha256 it was exported with"):
            read_engine(loaded, first)
        with pytest.raises(ArtifactError, match="changed"):
            build(out, tmp_path / "again")

    def test_what_an_older_bundle_lacks_is_made(self, trt: Any, copy: Path, tmp_path: Path) -> None:
        def first_format(values: Any) -> None:
            values["format_version"] = 1
            values["files"].pop(values.pop("reference"))
            for stage in values["stages"].values():
                del stage["variants"]

        expected = (copy / "reference.npz").read_bytes()
        (copy / "reference.npz").unlink()
        rewrite(copy, first_format)
        assert load_bundle(copy).format_version == 1
        out = build(copy, tmp_path / "here")
        assert load_bundle(out).manifest.reference == "reference.npz"
        assert (out / "reference.npz").read_bytes() == expected
        assert "0 flips" in Cascade.load(out).steps[-1].reason

    def test_graphs_beside_engines_are_copied(self, trt: Any, copy: Path, tmp_path: Path) -> None:
        def move(values: Any) -> None:
            stage = values["stages"]["stage_b"]
            for entry in (stage, *stage["variants"].values()):
                entry["onnx"] = "engines/stage_b.onnx"
            values["files"]["engines/stage_b.onnx"] = values["files"].pop("stage_b.onnx")

        (copy / "engines").mkdir()
        (copy / "stage_b.onnx").rename(copy / "engines" / "stage_b.onnx")
        rewrite(copy, move)
        out = build(copy, tmp_path / "here")
        again = build(out, tmp_path / "again")
        assert load_bundle(again).manifest.stages["stage_b"].onnx == "engines/stage_b.onnx"

    def test_build_refusals(self, trt: Any, bundle: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"one stage_a was exported in \(fp32\), got 'res32'; .*--precision"):
            build(bundle, tmp_path / "b", precisions=["res32"])
        assert not (tmp_path / "b").exists()
        for out in (bundle, bundle / "inside"):
            with pytest.raises(InputError, match="out must lie outside the bundle"):
                build(bundle, out)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "notes.txt").write_text("mine")
        with pytest.raises(InputError, match="holds something else"):
            build(bundle, tmp_path / "other", overwrite=True)

    def test_an_engine_of_another_precision_is_refused(self, copy: Path) -> None:
        entry = {
            "stage": "stage_a", "path": "metrics.csv", "target": "rtx", "builder": "x", "builder_version": "1",
            "compute_capabilities": [], "precision": "fp16", "batch": [1, 1, 1], "onnx_sha256": "0" * 64, "layers": 1,
            "attention_layers": 0, "build_seconds": 0.0, "validated": "",
        }  # fmt: skip
        rewrite(copy, lambda v: v["engines"].append(entry))
        with pytest.raises(ArtifactError, match="must be built from a graph of this bundle, got none in fp16"):
            load_bundle(copy)

    def test_precisions_that_cannot_be_exported(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="got 'int8'; .*ModelOpt"):
            export(run, tmp_path / "b", precisions=["int8"])
        with pytest.raises(InputError, match="precisions must be of fp32, .*got 'fp64'"):
            export(run, tmp_path / "b", precisions=["fp64"])  # type: ignore[list-item]
        assert not (tmp_path / "b").exists()


class TestBundle:
    def test_what_is_in_it(self, bundle: Path, run: Path) -> None:
        files = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
        assert files == {
            "bundle.json", "config.json", "metrics.csv", "reference.npz", "splits.json", "stage_a.onnx",
            "stage_b.onnx", "thresholds.json",
        }  # fmt: skip
        manifest = BundleManifest.read(bundle / "bundle.json")
        assert set(manifest.files) == files - {"bundle.json"}
        assert manifest.active_exit_policy == "softmax"
        assert (bundle / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
        everything = b"".join(p.read_bytes() for p in bundle.rglob("*.json"))
        # File names and places do not leave the house.
        assert b"secret-street" not in everything and b".png" not in everything and str(run).encode() not in everything

    def test_changed_byte(self, copy: Path) -> None:
        for name in load_bundle(copy).manifest.files:
            data = bytearray((copy / name).read_bytes())
            data[len(data) // 2] ^= 1
            (copy / name).write_bytes(data)
            with pytest.raises(ArtifactError, match=f"{name} must have the sha256 it was exported with"):
                load_bundle(copy)
            data[len(data) // 2] ^= 1
            (copy / name).write_bytes(data)
        load_bundle(copy)

    def test_changed_size(self, copy: Path) -> None:
        with (copy / "stage_a.onnx").open("ab") as file:
            file.write(b"\0")
        with pytest.raises(ArtifactError, match=r"stage_a.onnx must have \d+ bytes as exported"):
            load_bundle(copy)

    @pytest.mark.parametrize("name", ["stage_b.onnx", "metrics.csv", "config.json", "splits.json"])
    def test_missing_file(self, copy: Path, name: str) -> None:
        (copy / name).unlink()
        with pytest.raises(ArtifactError, match=f"missing: {name}"):
            load_bundle(copy)

    def test_missing_manifest(self, copy: Path) -> None:
        (copy / "bundle.json").unlink()
        with pytest.raises(ArtifactError, match="bundle must hold bundle.json"):
            load_bundle(copy)
        with pytest.raises(ArtifactError, match="bundle must be a folder"):
            load_bundle(copy / "nowhere")

    @pytest.mark.parametrize("name", ["notes.txt", "engines/rtx/stage_a.engine", "engines/README.md", "readme.onnx"])
    def test_extra_file(self, copy: Path, name: str) -> None:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("x")
        with pytest.raises(ArtifactError, match=f"only the files of bundle.json, extra: {name}"):
            load_bundle(copy)

    @pytest.mark.parametrize("name", ["gateparams.json", "scrcparams.json", "old/thresholds.json", "Thresholds.JSON"])
    @pytest.mark.parametrize("listed", [False, True])
    def test_second_policy_file(self, copy: Path, name: str, listed: bool) -> None:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes((copy / "thresholds.json").read_bytes())
        if listed:
            rehash(copy, name)
        with pytest.raises(ArtifactError, match="exactly one policy file"):
            load_bundle(copy)

    def test_no_policy_file(self, copy: Path) -> None:
        (copy / "thresholds.json").unlink()
        with pytest.raises(ArtifactError, match="missing: thresholds.json"):
            load_bundle(copy)
        rewrite(copy, lambda v: v["files"].pop("thresholds.json"))
        with pytest.raises(ArtifactError, match="exactly one policy file, got none"):
            load_bundle(copy)

    def test_policy_file_of_another_policy(self, copy: Path) -> None:
        rewrite(copy, lambda v: v.update(active_exit_policy="gate"))
        with pytest.raises(ArtifactError, match="policy_file must be gateparams.json"):
            load_bundle(copy)

    def test_another_policys_record_under_its_name(self, copy: Path) -> None:
        (copy / "thresholds.json").rename(copy / "scrcparams.json")

        def change(values: Any) -> None:
            values.update(active_exit_policy="scrc", policy_file="scrcparams.json")
            values["files"]["scrcparams.json"] = values["files"].pop("thresholds.json")

        rewrite(copy, change)
        with pytest.raises(ArtifactError, match="scrcparams.json is not a valid ScrcParams"):
            load_bundle(copy)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("classes", ["roadwork", "none"], "another classes"),
            ("positive", "none", "another positive class"),
            ("model_fingerprint", "0" * 64, "another model fingerprint: 000000000000…"),
            ("model_fingerprint", None, "another model fingerprint: none"),
            ("preprocessing_fingerprint", "0" * 64, "another preprocessing fingerprint"),
            ("split_hashes", {"val_calib": "0" * 64}, "calibrated on this run's val_calib"),
            ("exit_threshold", 1.5, "exit_threshold: Input should be less than or equal to 1"),
            ("exit_thresholt", 0.5, "exit_thresholt: Extra inputs"),
        ],
    )
    def test_policy_of_another_model(self, copy: Path, key: str, value: Any, message: str) -> None:
        path = copy / "thresholds.json"
        values = json.loads(path.read_text())
        values[key] = value
        path.write_text(json.dumps(values))
        rehash(copy, "thresholds.json")
        with pytest.raises(ArtifactError, match=message):
            load_bundle(copy)

    def test_other_preprocessing_in_the_manifest(self, copy: Path) -> None:
        rewrite(copy, lambda v: v["preprocessing"].update(mean=[0.5, 0.5, 0.5]))
        with pytest.raises(ArtifactError, match="another preprocessing fingerprint"):
            load_bundle(copy)

    @pytest.mark.parametrize("name", ["../evil", "/etc/passwd", "a/../b", "a//b", "c:\\x", "a\\..\\b", "", ".", "a\0b"])
    def test_names_that_leave_the_folder(self, copy: Path, name: str) -> None:
        entry = FileEntry(sha256="0" * 64, size=0).model_dump()
        rewrite(copy, lambda v: v["files"].update({name: entry}))
        with pytest.raises(ArtifactError, match="must name files inside the bundle|control characters"):
            load_bundle(copy)

    def test_graph_outside_the_folder(self, copy: Path) -> None:
        rewrite(copy, lambda v: v["stages"]["stage_a"].update(onnx="../stage_a.onnx"))
        with pytest.raises(ArtifactError, match="must name files inside the bundle|control characters"):
            load_bundle(copy)

    def test_a_linked_folder_that_holds_nothing_of_it(self, copy: Path) -> None:
        (copy / "engines").symlink_to(copy.parent)
        with pytest.raises(ArtifactError, match="only the files of bundle.json, extra: engines"):
            load_bundle(copy)

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": 2}', "\udcff", '"' + "[" * 100000])
    def test_broken_manifest(self, copy: Path, text: str) -> None:
        (copy / "bundle.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(ArtifactError, match=r"bundle.json"):
            load_bundle(copy)

    def test_graph_of_another_shape(self, copy: Path) -> None:
        rewrite(copy, lambda v: v["stages"]["stage_a"]["outputs"].update(logits=[-1, 3]))
        with pytest.raises(ArtifactError, match=r"logits of stage_a must be \[-1, 2\], got \[-1, 3\]"):
            load_bundle(copy)

    def test_graphs_swapped(self, copy: Path) -> None:
        (copy / "stage_a.onnx").write_bytes((copy / "stage_b.onnx").read_bytes())
        rehash(copy, "stage_a.onnx")
        loaded = load_bundle(copy)
        with pytest.raises(ArtifactError, match="stage_a.onnx must have the inputs and outputs of bundle.json"):
            OnnxRuntime(loaded)

    def test_graph_that_is_none(self, copy: Path) -> None:
        (copy / "stage_a.onnx").write_bytes(b"garbage")
        rehash(copy, "stage_a.onnx")
        with pytest.raises(ArtifactError, match="stage_a.onnx must be a plain ONNX graph"):
            Cascade.load(copy)

    def test_engine_of_another_graph(self, copy: Path) -> None:
        path = copy / "engines/rtx/stage_a.engine"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 64)
        rehash(copy, "engines/rtx/stage_a.engine")
        entry = {
            "stage": "stage_a", "path": "engines/rtx/stage_a.engine", "target": "rtx", "builder": "tensorrt_rtx",
            "builder_version": "1", "compute_capabilities": [], "precision": "fp32", "batch": [1, 2, 3],
            "onnx_sha256": "0" * 64, "layers": 1, "attention_layers": 0, "build_seconds": 1.0, "validated": "",
        }  # fmt: skip
        rewrite(copy, lambda v: v["engines"].append(entry))
        with pytest.raises(ArtifactError, match="must be built from stage_a.onnx of this bundle"):
            load_bundle(copy)


class TestExport:
    def test_no_policy(self, run: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("bundle")))
        (other / "thresholds.json").unlink()
        with pytest.raises(InputError, match="run `stage1 calibrate"):
            export(other)
        assert not (other / "bundle").exists()

    def test_policy_of_another_model(self, run: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("bundle")))
        strange = make_model(seed=9)
        hashes = Splits.read(other / "splits.json").hashes
        save_model(other / "model_best.pth", strange, strange.state_dict(), split_hashes=hashes)
        with pytest.raises(ArtifactError, match="thresholds.json must belong to this model, got another model fing"):
            export(other)

    def test_two_policies(self, run: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("bundle")))
        (other / "gateparams.json").write_text("{}")
        with pytest.raises(ArtifactError, match="exactly one policy file, got thresholds.json, gateparams.json"):
            export(other)

    def test_overwrite(self, graphs: None, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = export(run, tmp_path / "b")
        with pytest.raises(InputError, match="--overwrite"):
            export(run, out)
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        import stage1_pro.deploy.exporting as station

        images = station._images
        monkeypatch.setattr(station, "_images", lambda *_: np.full((2, 3, 48, 48), np.nan, np.float32))
        with pytest.raises(ArtifactError, match="nothing was exported"):
            export(run, out, overwrite=True)
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["b"]
        monkeypatch.setattr(station, "_images", images)
        assert export(run, out, overwrite=True) == out
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before

    def test_a_folder_of_something_else_is_left_alone(self, run: Path) -> None:
        with pytest.raises(InputError, match="holds something else"):
            export(run, run, overwrite=True)
        assert (run / "splits.json").exists()

    def test_recipe_needs_a_target(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="recipe must go with target rtx"):
            export(run, tmp_path / "b", target="onnx", recipe=EngineRecipe())

    def test_licence_travels_with_derived_weights(self, tmp_path: Path) -> None:
        from stage1_pro.deploy.bundle import _portable, licence_note

        model = make_model(4)
        info = model.architecture.backbone
        backbone = tmp_path / "dinov3-own"
        backbone.mkdir()
        (backbone / "LICENSE.md").write_text("the whole text")
        config = Config(model=ModelConfig(backbone=str(backbone)))
        assert _portable(config)["model"]["backbone"] == "dinov3-own"
        hub = "facebook/dinov3-vits16-pretrain-lvd1689m"
        assert _portable(Config(model=ModelConfig(backbone=hub)))["model"]["backbone"] == hub
        assert licence_note(str(backbone), info) is None
        note = licence_note(
            str(backbone), info.model_copy(update={"source": "dinov3-own", "licence": "DINOv3 License"})
        )
        assert note is not None and "DINOv3 License" in note and "the whole text" in note
        assert LICENCE == "LICENCE-BACKBONE.txt"


class TestCascade:
    def test_decides_as_torch_does(self, run: Path, bundle: Path, model: Stage1Model) -> None:
        paths = sorted((run / "images").iterdir())
        cascade = Cascade.load(bundle)
        decisions = cascade.predict(paths, batch_size=5)
        pixels = np.stack([cascade.pixels(path) for path in paths])
        label, prob, exited = torch_answers(model, pixels, cascade.bundle.policy.exit_threshold)
        assert 0 < exited.sum() < len(paths)
        assert decisions.label.tolist() == label.tolist()
        assert decisions.exited.tolist() == exited.tolist()
        assert decisions.stage.tolist() == ["A" if e else "B" for e in exited]
        np.testing.assert_allclose(decisions.prob, prob, atol=1e-5)
        np.testing.assert_allclose(decisions.confidence, np.maximum(prob, 1 - prob), atol=1e-5)
        assert [row["label"] for row in decisions] == decisions.to_dict()["label"] == label.tolist()

    @pytest.mark.parametrize("batch_size", [1, 3, 16, 100])
    def test_batches_do_not_matter(self, run: Path, bundle: Path, batch_size: int) -> None:
        paths = sorted((run / "images").iterdir())
        cascade = Cascade.load(bundle)
        one, many = cascade.predict(paths, batch_size=batch_size), cascade.predict(paths, batch_size=7)
        assert one.label.tolist() == many.label.tolist() and one.exited.tolist() == many.exited.tolist()
        np.testing.assert_allclose(one.prob, many.prob, atol=1e-6)

    def test_image_at_the_threshold_decides_alike_alone(self, run: Path, bundle: Path) -> None:
        paths = sorted((run / "images").iterdir())
        cascade = Cascade.load(bundle)
        pixels = np.stack([cascade.pixels(path) for path in paths])
        everything = cascade.predict(paths, batch_size=16)
        for index in np.flatnonzero(everything.exited):
            threshold = float(everything.confidence[index])
            policy = cascade.bundle.policy.model_copy(update={"exit_threshold": threshold})
            moved = Cascade(type(cascade.bundle)(bundle, cascade.bundle.manifest, policy, cascade.bundle.splits),
                            cascade.runtime)  # fmt: skip
            assert moved.decide(pixels).exited[index]
            assert moved.decide(pixels[index : index + 1]).exited[0]

    def test_gate_policy_decides_as_torch_does(
        self, graphs: None, run: Path, model: Stage1Model, tmp_path: Path
    ) -> None:
        """Exits by the ONNX gate's logit, for any batch, also for the very image that the threshold was put on."""
        other = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("bundle")))
        (other / "thresholds.json").unlink()
        paths = sorted((run / "images").iterdir())
        from stage1_pro.data.images import preprocess, read_image

        pixels = np.stack([preprocess(read_image(path), model.architecture.preprocessing) for path in paths])
        with torch.no_grad():
            outputs = model(torch.from_numpy(pixels))
        sure = 1 / (1 + np.exp(-(1.5 * outputs.gate_logit.double().numpy() - 0.2)))
        ordered = np.sort(sure)
        policy = make_gate_policy(model, Splits.read(other / "splits.json").hashes, float(ordered[7:9].mean()))
        policy.write(other / "gateparams.json")
        out = export(other)
        loaded = load_bundle(out)
        assert loaded.policy == policy and loaded.manifest.active_exit_policy == "gate"
        assert (out / "gateparams.json").exists() and not (out / "thresholds.json").exists()
        cascade = Cascade.load(out)
        wanted = sure >= policy.threshold
        assert 0 < wanted.sum() < len(paths)
        # The gate is no monotone function of the largest probability, so the other rule would have been seen.
        first = torch.softmax(outputs.logits_a.double(), 1).numpy()
        assert not np.array_equal(np.argsort(sure), np.argsort(first.max(1)))
        for batch_size in (1, 3, 16):
            decisions = cascade.predict(paths, batch_size=batch_size)
            assert decisions.exited.tolist() == wanted.tolist()
        probs = np.where(wanted[:, None], first, torch.softmax(outputs.logits_b.double(), 1).numpy())
        assert decisions.label.tolist() == np.array(CLASSES)[probs.argmax(1)].tolist()
        scores = policy.scores(
            first, cascade.runtime.run("stage_a", {"pixels": pixels})["gate_logit"].astype(np.float64)
        )
        for index in range(len(paths)):
            moved = policy.model_copy(update={"threshold": float(scores[index])})
            near = Cascade(type(loaded)(out, loaded.manifest, moved, loaded.splits), cascade.runtime)
            assert near.decide(pixels).exited[index]
            assert near.decide(pixels[index : index + 1]).exited[0]
        assert len(cascade.predict([])) == 0
        text = render_inspection(inspect(out))
        for words in (
            "sigmoid(1.5 * gate logit + -0.2)",
            "guarantee: none",
            "gateparams.json",
            "exit error",
            "wished 1.00%",
        ):
            assert words in text

    def test_stage_b_sees_deferred_rows_only(self, run: Path, bundle: Path) -> None:
        cascade = Cascade.load(bundle)
        seen: list[int] = []
        inner = cascade.runtime

        class Spy:
            name = "spy"

            def run(self, stage: Any, inputs: Any) -> Any:
                if stage == "stage_b":
                    seen.append(len(inputs["hidden"]))
                return inner.run(stage, inputs)

        cascade.runtime = Spy()
        decisions = cascade.predict(sorted((run / "images").iterdir()), batch_size=16)
        assert seen == [int((~decisions.exited).sum())]

    def test_every_kind_of_image(self, run: Path, bundle: Path) -> None:
        path = min((run / "images").iterdir())
        image = Image.open(path)
        kinds = [path, str(path), path.read_bytes(), image, np.asarray(image)]
        decisions = Cascade.load(bundle).predict(kinds)
        assert len(set(decisions.prob.tolist())) == 1
        assert len(Cascade.load(bundle).predict(np.stack([np.asarray(image)] * 2))) == 2

    def test_nan_defers_and_then_abstains(self, bundle: Path) -> None:
        cascade = Cascade.load(bundle)
        first = np.array([[np.nan, 0], [9, 0], [np.inf, 0], [0, 0]], np.float32)
        second = np.array([[0, 3], [np.nan, 0], [1, 1]], np.float32)

        class Fake:
            name = "fake"

            def run(self, stage: Any, inputs: Any) -> Any:
                if stage == "stage_a":
                    return {"logits": first, "hidden": np.arange(4, dtype=np.float32)[:, None]}
                assert inputs["hidden"].ravel().tolist() == [0, 2, 3]
                return {"logits": second}

        cascade.runtime = Fake()
        decisions = cascade.decide(np.zeros((4, 3, 48, 48), np.float32))
        assert decisions.label.tolist() == ["roadwork", "none", "", "none"]
        assert decisions.stage.tolist() == ["B", "A", "", "B"]
        assert decisions.exited.tolist() == [False, True, False, False]
        assert np.isnan(decisions.prob).tolist() == [False, False, True, False]
        assert decisions.prob[3] == 0.5

    def test_no_images(self, bundle: Path) -> None:
        decisions = Cascade.load(bundle).predict([])
        assert len(decisions) == 0 and list(decisions) == [] and decisions.prob.dtype == np.float64

    def test_wrong_arguments(self, bundle: Path) -> None:
        cascade = Cascade.load(bundle)
        with pytest.raises(InputError, match="put it in a list"):
            cascade.predict("a.jpg")
        with pytest.raises(InputError, match="put it in a list"):
            cascade.predict(np.zeros((5, 5, 3), np.uint8))
        with pytest.raises(InputError, match="batch_size must be 1 or more"):
            cascade.predict([], batch_size=0)
        with pytest.raises(InputError, match=r"must be uint8 \[H, W, 3\]"):
            cascade.predict([np.zeros((5, 5, 3), np.float32)])
        with pytest.raises(InputError, match="got int"):
            cascade.predict([3])  # type: ignore[list-item]
        with pytest.raises(InputError, match=r"runtime must be one of auto, .*did you mean 'onnxruntime'"):
            Cascade.load(bundle, "onnxruntim")
        with pytest.raises(InputError, match="threads must be 0"):
            OnnxRuntime(load_bundle(bundle), -1)


def served(cascade: Cascade, threshold: float) -> Cascade:
    """The same cascade under another threshold."""
    from dataclasses import replace

    policy = cascade.bundle.policy.model_copy(update={"exit_threshold": threshold})
    return Cascade(replace(cascade.bundle, policy=policy), cascade.runtime)


def same_decisions(one: Any, other: Any) -> None:
    for name in ("label", "stage", "exited"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
    np.testing.assert_allclose(one.prob, other.prob, atol=1e-5)
    np.testing.assert_allclose(one.confidence, other.confidence, atol=1e-5)


@pytest.mark.parametrize("how", ["bundle", "run"])
def test_a_cascade_is_pickled_as_where_it_came_from(run: Path, tmp_path: Path, how: str) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    photos = sorted((folder / "images").iterdir())
    cascade = Cascade.load(folder / "bundle", threads=1) if how == "bundle" else Cascade.from_run(folder)
    sent = pickle.dumps(cascade)
    assert len(sent) < 5000
    got, wanted = pickle.loads(sent).predict(photos), cascade.predict(photos)
    np.testing.assert_array_equal(got.prob, wanted.prob)
    assert got.label.tolist() == wanted.label.tolist() and pickle.loads(sent).runtime.name == cascade.runtime.name
    # Spawned workers, which have nothing of this process.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(Cascade.predict, (cascade, photos))
    np.testing.assert_array_equal(found.prob, wanted.prob)
    policy = Thresholds.read(folder / "thresholds.json")
    stricter = policy.model_copy(update={"exit_threshold": policy.exit_threshold / 2 + 0.5})
    if how == "bundle":
        set_policy(folder / "bundle", stricter)
    else:
        stricter.write(folder / "thresholds.json")
    with pytest.raises(ArtifactError, match="has changed"):
        pickle.loads(sent)
    with pytest.raises(InputError, match="to be pickled"):
        pickle.dumps(Cascade(cascade.bundle, cascade.runtime))


class TestTorchRuntime:
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
    def test_decides_as_the_bundle_does(self, run: Path, bundle: Path, batch_size: int) -> None:
        paths = sorted((run / "images").iterdir())
        trained = Cascade.from_run(run)
        assert trained.runtime.name == "torch"
        decisions = trained.predict(paths, batch_size=batch_size)
        same_decisions(decisions, Cascade.load(bundle).predict(paths, batch_size=7))
        assert 0 < decisions.exited.sum() < len(paths)

    @pytest.mark.parametrize("rows", [8, pytest.param(16, marks=pytest.mark.slow)])
    def test_every_threshold_between_two_rows(self, run: Path, bundle: Path, rows: int) -> None:
        """Wherever a policy may stand, in the middle of a gap, both runtimes and any batch size decide alike."""
        torch_, onnx_ = Cascade.from_run(run), Cascade.load(bundle)
        pixels = np.stack([onnx_.pixels(path) for path in sorted((run / "images").iterdir())[:rows]])
        # Copies of rows tie: a tie exits whole.
        pixels = np.concatenate([pixels, pixels[3:6]])
        sure = np.sort(onnx_.decide(pixels, exited=np.ones(len(pixels), bool)).confidence)
        middles = ((sure[1:] + sure[:-1]) / 2)[np.diff(sure) > 2e-6]
        assert middles.size >= rows - 2, "this test wants gaps above the rounding"
        for threshold in middles:
            one, other = (served(cascade, float(threshold)) for cascade in (torch_, onnx_))
            whole = one.decide(pixels)
            same_decisions(whole, other.decide(pixels))
            assert whole.exited[3:6].tolist() == whole.exited[-3:].tolist()
            for cascade in (one, other):
                alone = [cascade.decide(pixels[i : i + 1]).exited[0] for i in range(0, len(pixels), 4)]
                assert alone == whole.exited[::4].tolist()

    def test_ties_exactly_at_the_threshold(self, tmp_path: Path) -> None:
        """Logits that are exact in every arithmetic: all rows are at the threshold and exit, in both runtimes."""
        from stage1_pro.policies.softmax import confidence, softmax

        model = make_model()
        with torch.no_grad():
            model.heads.classifier[1].weight.zero_()
            model.heads.classifier[1].bias.copy_(torch.tensor([0.25, 1.5]))
        folder = make_run(tmp_path / "run", model)
        exported = export(folder)
        threshold = float(confidence(softmax([[0.25, 1.5]]))[0])
        for cascade in (Cascade.from_run(folder), Cascade.load(exported)):
            for n in (1, 2, 5):
                pixels = np.random.default_rng(n).normal(size=(n, 3, 48, 48)).astype(np.float32)
                assert served(cascade, threshold).decide(pixels).exited.all()
                assert not served(cascade, float(np.nextafter(threshold, 2))).decide(pixels).exited.any()

    def test_full_pass_is_stage_b_on_everything(self, run: Path, tmp_path: Path) -> None:
        cascade = Cascade.from_run(run)
        pixels = np.random.default_rng(0).normal(size=(5, 3, 48, 48)).astype(np.float32)
        hidden = cascade.runtime.run("stage_a", {"pixels": pixels})["hidden"]
        logits = cascade.runtime.run("stage_b", {"hidden": hidden})["logits"]
        assert isinstance(cascade.runtime, TorchRuntime)
        np.testing.assert_allclose(cascade.runtime.full_pass(tmp_path)(pixels), logits, atol=1e-5)

    def test_what_it_refuses(self, run: Path, bundle: Path, tmp_path: Path) -> None:
        assert set(RUNTIMES) >= {"onnxruntime", "tensorrt_rtx", "tensorrt", "openvino", "torch"}
        with pytest.raises(InputError, match=r"no weights torch could load; use Cascade.from_run"):
            Cascade.load(bundle, "torch")
        with pytest.raises(InputError, match="run must be a run folder, got"):
            Cascade.from_run(tmp_path / "nowhere")
        with pytest.raises(InputError, match="threads must be 0"):
            Cascade.from_run(run, threads=-1)
        other = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("bundle")))
        make_policy(make_model(seed=9), Splits.read(other / "splits.json").hashes).write(other / "thresholds.json")
        with pytest.raises(ArtifactError, match="must belong to this model, got another model fingerprint"):
            Cascade.from_run(other)
        (other / "thresholds.json").unlink()
        with pytest.raises(InputError, match="run must hold a policy, got none"):
            Cascade.from_run(other)


class TestForcedDeferral:
    @pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
    def test_what_the_policy_chose_forced_is_the_same(self, run: Path, bundle: Path, runtime: str) -> None:
        cascade = Cascade.from_run(run) if runtime == "torch" else Cascade.load(bundle)
        pixels = np.stack([cascade.pixels(path) for path in sorted((run / "images").iterdir())])
        free = cascade.decide(pixels)
        forced = cascade.decide(pixels, exited=free.exited)
        assert free.to_dict() == forced.to_dict()
        turned = cascade.decide(pixels, exited=~free.exited)
        assert (turned.exited == ~free.exited).all()
        # Exits forced to Stage B get its answer and the other way round.
        everything = cascade.decide(pixels, exited=np.zeros(len(pixels), bool))
        assert (everything.stage == "B").all()
        # Torch adds up another number of rows in another order: a logit of 1 moved by 1.2e-5.
        slack = 1e-5 if runtime == "torch" else 1e-6
        np.testing.assert_allclose(turned.prob[free.exited], everything.prob[free.exited], atol=slack)

    @pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
    def test_bench(self, run: Path, bundle: Path, runtime: Any, tmp_path: Path) -> None:
        where = {"run": run} if runtime == "torch" else {"bundle": bundle}
        found = bench_cascade(
            BenchCascade(**where, batch=[1, 6], rates=[0, 0.25, 0.3, 1], rounds=2, out=tmp_path / "out")
        )
        assert (found.runtime, found.tap, found.n_blocks) == (runtime, 2, 4)
        assert found.inputs == ("4 val_select images" if runtime == "torch" else "noise of seed 0")
        assert [[t.n_deferred for t in one.timings if t.contestant == "cascade"] for one in found.batches] == [
            [0, 1], [0, 2, 6],
        ]  # fmt: skip
        for one in found.batches:
            named = {t.contestant: t for t in one.timings}
            assert named["full_pass"].speedup == 1 and named["stage_a"].ideal == named["stage_b"].ideal == 2
            by_deferred = {t.n_deferred: t for t in one.timings}
            assert by_deferred[0].ideal == 2 and by_deferred[one.batch].ideal == 1
            assert sum(one.shares[part] for part in ("embedding", "blocks", "heads")) == pytest.approx(1)
            # Differences of two rounds' times: beside other work they may be anything but missing.
            assert set(one.shares) >= {"embedding", "blocks", "heads", "python"}
            assert np.isfinite(list(one.shares.values())).all()
            for t in one.timings:
                assert 0 < t.milliseconds_low <= t.milliseconds <= t.milliseconds_high
                assert t.images_per_second == pytest.approx(1000 * one.batch / t.milliseconds)
        half = next(t for t in found.batches[1].timings if t.n_deferred == 2)
        assert half.ideal == pytest.approx(1 / (0.5 + 2 / 6 * 0.5))
        assert type(found).read(tmp_path / "out" / "cascade.json") == found
        assert (tmp_path / "out" / "cascade.png").read_bytes() == draw_cascade(found)
        text = render_cascade(found)
        assert "one full pass" in text and "cascade, 2 of 6 deferred" in text
        assert max(map(len, text.splitlines())) <= 120
        assert str(tmp_path) not in found.model_dump_json()

    def test_wrong_arguments(self, run: Path, bundle: Path, tmp_path: Path) -> None:
        other = Path(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("bundle")))
        for arguments, message in (
            ({}, "must get --bundle or --run, got neither"),
            ({"bundle": bundle, "run": run}, "got both"),
            ({"bundle": bundle, "batch": [0]}, r"batch must be one or more sizes of 1 or more, got \[0\]"),
            ({"bundle": bundle, "rates": [1.5]}, r"rates must be one or more shares in \[0, 1\], got \[1.5\]"),
            ({"bundle": bundle, "rounds": 0}, "rounds must be 1 or more, got 0"),
            ({"bundle": bundle, "runtime": "torch"}, "no weights torch could load"),
            ({"bundle": bundle, "runtime": "torhc"}, "did you mean 'torch'"),
            ({"run": other, "runtime": "onnxruntime"}, "which needs its bundle; run `stage1 export"),
        ):
            with pytest.raises(InputError, match=message):
                bench_cascade(BenchCascade(**arguments))  # type: ignore[arg-type]


class TestInfer:
    def test_a_split_as_predict_answers_its_images(self, run: Path, bundle: Path, tmp_path: Path) -> None:
        rows, failures = infer(run, split="val_test", out=tmp_path / "out.csv")
        splits = Splits.read(run / "splits.json")
        paths = [splits.path(row) for row in splits.of("val_test")]
        assert [row["file"] for row in rows] == [row.file for row in splits.of("val_test")]
        expected, _ = predict(Cascade.load(bundle), paths)
        for mine, theirs in zip(rows, expected, strict=True):
            for name in ("label", "decision", "stage", "error"):
                assert mine[name] == theirs[name]
            assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-5)
        with (tmp_path / "out.csv").open(newline="") as file:
            assert list(next(csv.reader(file))) == [*COLUMNS, "prob_none", "prob_roadwork"]
        again, _ = infer(run, [paths[0], tmp_path / "out.csv"])
        assert failures == 0 and again[0]["label"] == rows[0]["label"] and len(again) == 1 + len(rows)

    def test_wrong_inputs(self, run: Path) -> None:
        with pytest.raises(InputError, match="infer must get images or --split, got neither"):
            infer(run)
        with pytest.raises(InputError, match="got both"):
            infer(run, [run / "images"], split="val_test")
        with pytest.raises(InputError, match="batch_size must be 1 or more"):
            infer(run, split="val_test", batch_size=0)


class TestPredict:
    def test_images_folders_and_csv(self, run: Path, bundle: Path, tmp_path: Path) -> None:
        paths = make_images(tmp_path / "photos" / "deep", 3)
        (tmp_path / "photos" / "notes.txt").write_text("not an image ending")
        (tmp_path / "photos" / "bad.jpg").write_bytes(b"broken")
        lines = ["file,other", *(f"photos/deep/{p.name},x" for p in paths), "photos/nowhere.png,x"]
        (tmp_path / "list.csv").write_text("\n".join(lines))
        out = tmp_path / "answers.csv"
        inputs = [paths[0], tmp_path / "photos", tmp_path / "list.csv"]
        rows, failures = predict(Cascade.load(bundle), inputs, out=out, batch_size=2)
        assert [Path(row["file"]).name for row in rows] == [
            "00.png", "bad.jpg", "00.png", "01.png", "02.png", "00.png", "01.png", "02.png", "nowhere.png",
        ]  # fmt: skip
        assert failures == 2
        good = [row for row in rows if row["error"] is None]
        assert {row["decision"] for row in good} <= {"exited", "deferred"}
        expected = Cascade.load(bundle).predict(paths)
        assert [row["label"] for row in good[-3:]] == expected.label.tolist()
        np.testing.assert_allclose([row["probability"] for row in good[-3:]], expected.prob, atol=1e-6)
        with out.open(newline="") as file:
            written = list(csv.DictReader(file))
        assert list(written[0]) == [*COLUMNS, "prob_none", "prob_roadwork"] and len(written) == 9
        assert written[1]["label"] == "" and written[1]["error"]
        assert json.loads(json.dumps(rows, allow_nan=False)) == rows
        assert "2 unreadable" in render(rows) and "bad.jpg" in render(rows) and str(out) in render(rows, out)

    def test_wrong_inputs(self, bundle: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "a.csv").write_text("path\nx.jpg\n")
        (tmp_path / "b.csv").write_text("file\n")
        cascade = Cascade.load(bundle)
        for inputs, message in (
            ([tmp_path / "nowhere"], "inputs must exist"),
            ([tmp_path / "empty"], "inputs must hold images"),
            ([tmp_path / "a.csv"], "must have a column 'file', got path"),
            ([tmp_path / "b.csv"], "must list at least one image"),
            ([], "at least one image"),
        ):
            with pytest.raises(InputError, match=message):
                predict(cascade, inputs)


class TestInspectAndDoctor:
    def test_inspect(self, bundle: Path, model: Stage1Model) -> None:
        facts = inspect(bundle)
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts
        assert (
            facts["policy"]["guarantee"] == "none" and facts["provenance"]["model_fingerprint"] == model.fingerprint()
        )
        text = render_inspection(facts)
        for word in ("roadwork", "guarantee: none", "Chosen on val_calib", "no engine", "thresholds.json", "tiny"):
            assert word in text

    def test_doctor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        facts = doctor()
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts
        assert facts["base"]["numpy"] == np.__version__ and "onnxruntime" in facts["runtimes"]
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        facts = doctor()
        text = render_doctor(facts)
        assert facts["builders"]["rtx"] is None and "stage1_pro[rtx]" in text

    def test_base_install_needs_no_torch(self, run: Path, bundle: Path) -> None:
        """Predict, inspect and doctor where torch, transformers and peft cannot be imported."""
        program = """
import sys
BLOCKED = {"torch", "transformers", "peft", "accelerate", "safetensors", "onnx", "onnxscript", "tensorrt_rtx"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from stage1_pro import Cascade
from stage1_pro.commands import doctor
from stage1_pro.deploy import inspection
from stage1_pro.deploy import prediction
rows, failures = prediction.predict(prediction.load(sys.argv[1], "onnxruntime"), [sys.argv[2]])
print(prediction.render(rows))
print(inspection.render_inspection(inspection.inspect(sys.argv[1])))
print(doctor.render(doctor.doctor()))
assert failures == 0 and len(rows) == 16
assert not BLOCKED & set(sys.modules)
from stage1_pro.deploy.exporting import export
from stage1_pro.errors import DependencyError
try:
    export(sys.argv[3], sys.argv[3] + "/other")
except DependencyError as error:
    print("REFUSED", error)
"""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program, str(bundle), str(run / "images"), str(run)],
            capture_output=True, text=True, check=False,
            env={"PYTHONPATH": str(ROOT / "python"), "PATH": "/usr/bin:/bin"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "16 images" in done.stdout and "missing" in done.stdout
        assert "stage1_pro[train]" in done.stdout.split("REFUSED")[1]


def test_bytes_and_pil_agree(bundle: Path) -> None:
    cascade = Cascade.load(bundle)
    image = Image.new("RGB", (70, 50), (250, 120, 10))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    np.testing.assert_array_equal(cascade.pixels(buffer.getvalue()), cascade.pixels(image))
    # A PIL image opened lazily is turned and flattened just as its file is.
    turned = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 4), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    np.testing.assert_array_equal(
        cascade.pixels(buffer.getvalue()), cascade.pixels(Image.open(io.BytesIO(buffer.getvalue())))
    )
