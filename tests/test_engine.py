"""Room deploy: what precisions do to a model, engine recipes, and the classic builder's path against its stubs."""

from __future__ import annotations

import ast
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stage1_pro.data.images import PreprocessSpec
from stage1_pro.deploy import engine as engine_module
from stage1_pro.deploy.engine import EngineRecipe, check_recipe, choose_recipe, engine_path, load_recipe
from stage1_pro.deploy.onnx import Answers, count_flips, export_variants
from stage1_pro.deploy.precision import HALF_LIMIT, Rewritten, in_precision, measure_peaks
from stage1_pro.errors import ArtifactError, DependencyError, InputError
from stage1_pro.models.architecture import BackboneInfo
from stage1_pro.models.backbone import backbone_from_config
from stage1_pro.models.model import Architecture, Stage1Model
from stage1_pro.policies.softmax import Thresholds

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "engines").glob("*.yaml"))
FAMILIES: dict[str, dict[str, Any]] = {
    "dinov3": {"model_type": "dinov3_vit", "intermediate_size": 96, "num_register_tokens": 2},
    "dinov3 gated": {
        "model_type": "dinov3_vit", "intermediate_size": 96, "num_register_tokens": 2, "use_gated_mlp": True,
        "hidden_act": "silu", "key_bias": True,
    },
    "dinov2": {"model_type": "dinov2", "mlp_ratio": 2},
    "dinov2 gated": {"model_type": "dinov2", "mlp_ratio": 2, "use_swiglu_ffn": True},
}  # fmt: skip


def make_model(family: str = "dinov3", tap: int = 3, seed: int = 0) -> Stage1Model:
    """Three random blocks of 8-pixel patches on 32 pixels, every parameter moved away from where it starts."""
    values = {
        "image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3,
        **FAMILIES[family],
    }  # fmt: skip
    backbone = backbone_from_config(values, 32, seed)
    architecture = Architecture(
        backbone=BackboneInfo(
            source="random", family=backbone.family, licence="trained from scratch: the owner's own", hidden_size=48,
            n_blocks=3, patch_size=8,
        ),
        hf_config=values, image_size=32, tap=tap, classes=["none", "roadwork"], positive="roadwork",
        auxiliary_hidden=24, dropout=0.0, preprocessing=PreprocessSpec(height=32, width=32),
    )  # fmt: skip
    model = Stage1Model(architecture, backbone, seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def pixels(n: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def answers(model: Any, given: torch.Tensor) -> list[torch.Tensor]:
    with torch.no_grad():
        logits, gate, hidden = model.stage_a(given)
        return [logits, gate, model.stage_b(hidden)]


def with_outlier(model: Stage1Model, size: float = 1e5) -> Stage1Model:
    """One channel of every token is huge on the residual stream, as large DINOs have it; norms divide it away."""
    width = model.backbone.hidden_size
    with torch.no_grad():
        for name, parameter in model.backbone.hf.embeddings.named_parameters():
            if name.endswith(("cls_token", "register_tokens", "projection.bias", "patch_embeddings.bias")):
                parameter[..., width // 2] += size
    return model


class TestRewritten:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("tap", [2, 3])
    def test_is_the_model_in_fp32(self, family: str, tap: int) -> None:
        """The rewriting itself costs rounding alone, in both families, with a tap inside and at the end."""
        model = make_model(family, tap)
        before = model.fingerprint()
        found, wanted = answers(Rewritten(model, torch.float32), pixels()), answers(model, pixels())
        assert all(float((a - b).abs().max()) < 2e-5 for a, b in zip(found, wanted, strict=True))
        assert min(float(w.std()) for w in wanted) > 1e-3, "outputs that do not depend on pixels would always agree"
        assert model.fingerprint() == before

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize(("precision", "limit"), [("res32", 1e-2), ("fp16", 2e-2), ("bf16", 0.2)])
    def test_narrow_types_stay_near(self, family: str, precision: Any, limit: float) -> None:
        model = make_model(family, 2)
        wanted = answers(model, pixels())
        found = answers(in_precision(model, precision), pixels())
        assert 0 < max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) < limit
        assert all(value.dtype == torch.float32 for value in found)

    def test_res32_errs_less_than_bf16(self) -> None:
        model = make_model()
        wanted = answers(model, pixels(32))
        error = {
            p: max(
                float((a - b).abs().max())
                for a, b in zip(answers(in_precision(model, p), pixels(32)), wanted, strict=True)
            )
            for p in ("res32", "bf16")
        }
        assert error["res32"] < error["bf16"] / 4

    @pytest.mark.parametrize("tap", [2, 3])
    def test_last_block_is_cls_only_exactly_where_nothing_reads_patches(self, tap: int) -> None:
        model = make_model(tap=tap)
        assert not Rewritten(model, torch.float32).cls_only
        readers = [model.heads.auxiliary[0]]
        if tap == 3:
            readers += [model.heads.classifier[1], model.heads.gate.linear]
        with torch.no_grad():
            for layer in readers:
                layer.weight[:, 48:96] = 0
        plain = Rewritten(model, torch.float32)
        assert plain.cls_only
        shapes: list[tuple[int, ...]] = []
        plain.blocks[-1].register_forward_hook(lambda _m, _i, out: shapes.append(tuple(out.shape)))
        found, wanted = answers(plain, pixels()), answers(model, pixels())
        assert all(float((a - b).abs().max()) < 2e-5 for a, b in zip(found, wanted, strict=True))
        assert shapes == [(5, 1, 48)]
        with torch.no_grad():
            readers[-1].weight[0, 60] = 1e-30  # one weight, however small, reads them
        assert not Rewritten(model, torch.float32).cls_only

    @pytest.mark.parametrize("precision", ["int8", "fp8"])
    def test_quantised_is_refused_with_the_reason(self, precision: Any) -> None:
        with pytest.raises(InputError, match=rf"must be fp32, fp16, bf16 or res32, got '{precision}'; .*ModelOpt"):
            in_precision(make_model(), precision)


class TestOverflow:
    """An outlier on the residual stream: fp16 throughout overflows, res32 holds."""

    def test_fp16_overflows_and_res32_holds(self) -> None:
        model = with_outlier(make_model())
        wanted = answers(model, pixels())
        assert all(bool(torch.isfinite(w).all()) for w in wanted)
        assert not all(bool(torch.isfinite(v).all()) for v in answers(in_precision(model, "fp16"), pixels()))
        found = answers(in_precision(model, "res32"), pixels())
        assert max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True)) < 1e-2

    def test_export_refuses_and_names_what_holds(self, tmp_path: Path) -> None:
        model = with_outlier(make_model())
        with pytest.raises(ArtifactError, match=r"a value of 1e\+05 in block \d in fp16; export res32"):
            export_variants(model, {}, tmp_path, ["fp16"], pixels=pixels().numpy(), calibration=pixels().numpy())
        with torch.no_grad():  # one branch itself is too large: res32 cannot help
            model.backbone.blocks[1].mlp.down_proj.weight.mul_(1e7)
        with pytest.raises(ArtifactError, match="in block 2 in res32; export bf16 or fp32"):
            export_variants(model, {}, tmp_path, ["res32"], pixels=pixels().numpy(), calibration=pixels().numpy())
        assert not list(tmp_path.glob("*.onnx"))

    def test_peaks_tell_branch_from_residual(self) -> None:
        plain, outlier = make_model(tap=2), with_outlier(make_model(tap=2))
        before, after = (measure_peaks(m, [pixels()]) for m in (plain, outlier))
        assert [len(before[s]) for s in ("stage_a", "stage_b")] == [2, 1]
        for stage in ("stage_a", "stage_b"):
            for peak in after[stage]:
                assert peak.residual > HALF_LIMIT > peak.branch
                assert peak.of("fp16") == peak.residual and peak.of("res32") == peak.branch
            assert all(0 < peak.branch < 1e3 and peak.residual < 1e3 for peak in before[stage])

    def test_near_the_limit_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import stage1_pro.deploy.onnx as onnx_module

        said: list[str] = []
        monkeypatch.setattr(onnx_module, "say", said.append)
        peaks = measure_peaks(with_outlier(make_model(), 2e4), [pixels()])
        onnx_module._check_peaks("fp16", peaks)
        assert len(said) == 1 and "fp16 may overflow on other images" in said[0] and "res32" in said[0]
        onnx_module._check_peaks("res32", peaks)
        assert len(said) == 1


class TestFlips:
    def test_without_a_policy_both_stages_count(self) -> None:
        rng = np.random.default_rng(0)
        one = Answers(rng.normal(size=(50, 2)), rng.normal(size=50), rng.normal(size=(50, 2)))
        assert count_flips(one, one, None) == (0, 0)
        other = one._replace(logits_b=one.logits_b.copy())
        other.logits_b[[3, 7]] = other.logits_b[[3, 7]][:, ::-1]
        assert count_flips(one, other, None) == (2, 0)

    def test_under_a_policy_who_answers_counts_and_near_is_said(self) -> None:
        policy = Thresholds.model_construct(
            policy="softmax", exit_threshold=0.8, classes=["a", "b"], positive="b", guarantee="none"
        )
        margins = np.log(np.array([0.9, 0.8005, 0.7995, 0.6]) / (1 - np.array([0.9, 0.8005, 0.7995, 0.6])))
        logits = np.stack((np.zeros(4), margins), axis=1)
        # Stage B says the same, so only who answers can differ.
        one = Answers(logits, np.zeros(4), logits)
        moved = logits.copy()
        moved[1, 1] = np.log(0.7999 / 0.2001)  # was just above the threshold
        moved[3, 1] = np.log(0.85 / 0.15)  # was far below it
        assert count_flips(one, Answers(moved, np.zeros(4), logits), policy) == (2, 1)


class TestRecipes:
    @pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
    def test_those_that_ship_load_and_are_buildable(self, path: Path) -> None:
        recipe = load_recipe(path)
        if recipe.target == "rtx":
            pytest.importorskip("tensorrt_rtx")
            assert check_recipe(recipe)
        else:
            engine_module._check_card(recipe, (*recipe.compute_capabilities, "SM90")[0])

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"compute_capabilities": ("SM90",)}, "got 'SM90', a data-centre card .*target tensorrt.*tensorrt.yaml"),
            ({"compute_capabilities": ("SM100",)}, "got 'SM100', a data-centre card"),
            ({"compute_capabilities": ("SM75",)}, "SM75 computes in TensorRT for RTX, got 'fp32'; use res32 or fp16"),
            ({"compute_capabilities": ("SM75",), "precision": "bf16"}, "got 'bf16'; use res32 or fp16 there, or SM80"),
            (
                {"compute_capabilities": ("SM75",), "precision": "res32", "fallbacks": ("fp32",)},
                "got 'fp32'; use res32 or fp16",
            ),
            (
                {"compute_capabilities": ("SM86",), "precision": "fp8"},
                "SM86 computes .*got 'fp8'; use res32 or fp16 or bf16 or fp32 there, or SM89, SM120 or later for fp8",
            ),
            ({"precision": "fp8"}, "must be one of res32, fp16, bf16, fp32, got 'fp8'; .*ModelOpt"),
            ({"compute_capabilities": ("8.6",)}, "must be named like SM86, got '8.6'"),
            ({"compute_capabilities": ("SM70",)}, "must be among SM80, SM86, SM89, .*got 'SM70'"),
        ],
    )
    def test_refusals_name_what_works(self, values: dict[str, Any], message: str) -> None:
        pytest.importorskip("tensorrt_rtx")
        with pytest.raises(InputError, match=message):
            check_recipe(EngineRecipe(**values))

    def test_turing_is_among_the_cards_of_fp16(self) -> None:
        pytest.importorskip("tensorrt_rtx")
        assert check_recipe(EngineRecipe(compute_capabilities=("SM75", "SM86"), precision="res32")) == ["SM75", "SM86"]
        assert "SM75" not in check_recipe(EngineRecipe(precision="res32")), "the builder's own choice begins at Ampere"

    def test_batch_by_stage(self, tmp_path: Path) -> None:
        path = tmp_path / "r.yaml"
        path.write_text("batch: {stage_a: [1, 8, 64], stage_b: [1, 2, 8]}")
        recipe = load_recipe(path)
        assert (recipe.profile("stage_a"), recipe.profile("stage_b")) == ((1, 8, 64), (1, 2, 8))
        for text, message in (
            ("batch: {stage_a: [1, 8, 64]}", "must have stage_a and stage_b"),
            ("batch: {stage_a: [1, 8, 64], stage_b: [4, 2, 8]}", "must rise from 1"),
            ("fallbacks: [fp32]", "fallbacks must differ"),
        ):
            path.write_text(text)
            with pytest.raises(InputError, match=message):
                load_recipe(path)

    def test_choice(self) -> None:
        pytest.importorskip("tensorrt_rtx")
        chosen = choose_recipe("rtx", ROOT / "engines" / "rtx-res32.yaml", ["fp16", "fp32"])
        assert chosen.ladder == ("fp16", "fp32") and chosen.profile("stage_b") == (1, 4, 64)
        assert engine_path(chosen, "stage_a") == "engines/rtx/stage_a.engine"
        assert engine_path(chosen, "stage_b", "fp32") == "engines/rtx-fp32/stage_b.engine"
        with pytest.raises(InputError, match="target must .*got 'rtx'"):
            choose_recipe("rtx", ROOT / "engines" / "tensorrt.yaml")


class TestClassicPath:
    """The one code path, as far as it goes without classic TensorRT's libraries and a GPU."""

    def test_stubs_alone_are_no_builder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
        with pytest.raises(DependencyError, match=r"tensorrt is not installed.*stage1_pro\[tensorrt\]"):
            engine_module.import_builder("tensorrt")

    def test_without_a_gpu_it_says_where_to_build(self) -> None:
        if engine_module._present_card() is not None:
            pytest.skip("there is a GPU")
        with pytest.raises(ArtifactError, match="must build on the machine whose GPU .*stage1 build"):
            engine_module._check_present(EngineRecipe(target="tensorrt"))

    def test_inspected_layers(self) -> None:
        told = {"Layers": [{"Name": "_gemm_mha_v2", "LayerType": "kgen"}, "plain"], "Bindings": ["pixels"]}
        found = engine_module.inspected_layers(told)
        assert [(layer.name, layer.kind) for layer in found] == [("_gemm_mha_v2", "kgen"), ("plain", "")]

    @pytest.mark.slow
    def test_types_hold_against_the_published_stubs(self, tmp_path: Path) -> None:
        """Mypy finds nothing in engine.py, and does find a name that classic TensorRT has not."""
        # Alone: what they name as their dependencies is TensorRT itself, gigabytes that come from elsewhere.
        fetched = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "fetched",
             "-c", ROOT / "constraints.txt", "tensorrt-stubs"],
            capture_output=True, text=True,
        )  # fmt: skip
        if fetched.returncode != 0:
            pytest.skip(f"tensorrt-stubs cannot be had: {fetched.stderr.strip().splitlines()[-1]}")
        stubs = list((tmp_path / "fetched").rglob("*.pyi"))
        assert stubs
        for path in stubs:
            target = tmp_path / "stubs" / path.relative_to(tmp_path / "fetched")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(mended(path.read_text(encoding="utf-8")))
        source = (ROOT / "python" / "stage1_pro" / "deploy" / "engine.py").read_text(encoding="utf-8")
        (tmp_path / "mypy.ini").write_text(
            f"[mypy]\npython_version = 3.11\nmypy_path = {tmp_path / 'stubs'}:{ROOT / 'python'}\n"
            "follow_imports = silent\nignore_missing_imports = True\ncheck_untyped_defs = True\n"
        )
        for text, fine in ((source, True), (source.replace("trt.OnnxParser(", "trt.OnnxParsre("), False)):
            (tmp_path / "checked.py").write_text(text)
            done = subprocess.run(
                [sys.executable, "-m", "mypy", "--config-file", tmp_path / "mypy.ini", tmp_path / "checked.py"],
                capture_output=True, text=True, cwd=tmp_path,
            )  # fmt: skip
            # The stubs have errors of their own; what counts is what is said of our file.
            found = [line for line in done.stdout.splitlines() if line.startswith("checked.py") and ": error:" in line]
            assert "Found" in done.stdout or done.returncode == 0, done.stdout + done.stderr
            assert bool(found) != fine, found
        assert "OnnxParsre" in found[0]


def mended(stub: str) -> str:
    """A stub whose signatures that are not Python take anything; the published ones have a few dozen."""
    lines = stub.splitlines()
    for _ in range(200):
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            place = (error.lineno or 1) - 1
            while not lines[place].lstrip().startswith("def "):
                place -= 1
            head = lines[place].split("(")[0]
            assert "*args" not in lines[place], f"line {place + 1} cannot be mended: {lines[place]}"
            ends = " ..." if lines[place].rstrip().endswith("...") else ""
            lines[place] = f"{head}(*args: object, **kwargs: object) -> object:{ends}"
        else:
            return "\n".join(lines)
    raise AssertionError("more than 200 signatures are not Python")
