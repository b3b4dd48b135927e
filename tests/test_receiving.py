"""Bundles from elsewhere: what is refused, whom they come from, which engines run, older formats, and a fuzzer."""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import fuzz_bundles as fuzz
from onnx import TensorProto, helper

import stage1_pro
from stage1_pro import cli
from stage1_pro.continual.ledger.store import Store
from stage1_pro.continual.loop.registry import Registry
from stage1_pro.continual.serving.live import LiveCascade, Pointer
from stage1_pro.deploy import bundle as bundle_module
from stage1_pro.deploy import trust
from stage1_pro.deploy.bundle import Bundle, load_bundle
from stage1_pro.deploy.cascade import Cascade
from stage1_pro.deploy.graphs import check_graph
from stage1_pro.deploy.inspection import migrate, render_findings, verify
from stage1_pro.deploy.manifest import BundleManifest
from stage1_pro.deploy.trust import engine_trust, remember_built, signature_status
from stage1_pro.errors import ArtifactError, DependencyError, InputError, Stage1Error
from stage1_pro.files import load_npz, save_npz, sha256_file

IMAGES = [np.full((5, 7, 3), shade, np.uint8) for shade in (0, 128, 255)]


def sign(bundle: Path, key: Path) -> trust.Signature:
    return trust.sign(load_bundle(bundle), key)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return fuzz.make_bundle(tmp_path_factory.mktemp("plain") / "bundle").path


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    return fuzz.make_bundle(tmp_path_factory.mktemp("rich") / "bundle", "gate", rich=True).path


@pytest.fixture
def copy(plain, tmp_path):
    return Path(shutil.copytree(plain, tmp_path / "bundle"))


@pytest.fixture
def rich_copy(rich, tmp_path):
    return Path(shutil.copytree(rich, tmp_path / "rich"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Keys and ledger of nobody real."""
    monkeypatch.setenv("STAGE1_CONFIG", str(tmp_path / "config"))
    return tmp_path / "config"


@pytest.fixture
def key(tmp_path):
    pytest.importorskip("cryptography", reason="cryptography is not installed; pip install '.[sign]'")
    trust.new_key(tmp_path / "maker.key")
    return tmp_path / "maker.key"


def rewrite(bundle, change, name="bundle.json"):
    values = json.loads((bundle / name).read_text())
    change(values)
    (bundle / name).write_text(json.dumps(values))


def forge(bundle, name, data):
    """Put other bytes there and list them, as somebody who means harm would."""
    (bundle / name).parent.mkdir(parents=True, exist_ok=True)
    (bundle / name).write_bytes(data)
    entry = {"sha256": sha256_file(bundle / name), "size": len(data)}
    rewrite(bundle, lambda values: values["files"].update({name: entry}))


def answers(bundle):
    return Cascade.load(bundle).predict(IMAGES).to_dict()


class TestManifest:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ('{"format_version": 2, "format_version": 2}', "the same key twice"),
            ('{"tap": NaN}', "NaN, which is no JSON"),
            ("[1, 2]", "must hold a JSON object"),
            ('{"a": ' + "[" * 40 + "]" * 40 + "}", "nested at most 32 deep"),
            ('{"a": ' + "[" * 40_000 + "]" * 40_000 + "}", "maximum recursion depth"),
            ('{"a": [' + "0," * 60_000 + "0]}", "at most 50000 values"),
            ('{"a": "' + "x" * 70_000 + '"}', "texts of at most 65536 characters"),
            (" " * 5_000_000, "at most 4194304 bytes"),
            ('{"a": "\\u001b[31m"}', "control characters"),
            ('{"a": "Apache-2.0\\nsignature   trusted"}', "control characters"),
            ('{"a": "Apache-2.0\\u2028signature   trusted"}', "control characters"),
            ('{"a": "\\ud800"}', "control characters"),
            ('{"a": 1' + "0" * 5000 + "}", "must be JSON"),
            ("\ufeff{}", "must be JSON"),
            ("", "must be JSON"),
        ],
    )
    def test_json_that_is_refused_before_it_is_looked_into(self, copy, text, reason):
        (copy / "bundle.json").write_text(text)
        with pytest.raises(ArtifactError, match=re.escape(reason)) as caught:
            load_bundle(copy)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000

    def test_bytes_that_are_no_utf8(self, copy):
        (copy / "bundle.json").write_bytes(b'{"a": "\xff"}')
        with pytest.raises(ArtifactError, match="readable UTF-8"):
            load_bundle(copy)

    @pytest.mark.parametrize(
        ("keys", "value"),
        [
            (("preprocessing", "height"), 5000),
            (("preprocessing", "std"), [0.0, 1.0, 1.0]),
            (("preprocessing", "mean"), [1e300, 1.0, 1.0]),
            (("preprocessing", "crop_ratio"), 1e9),
            (("tap",), 5),
            (("files", "config.json", "sha256"), "A" * 64),
            (("files", "config.json", "size"), -1),
            (("stages", "stage_a", "outputs", "gate_logit"), [-1, 1]),
            (("stages", "stage_a", "outputs", "more"), [-1]),
            (("stages", "stage_a", "outputs", "hidden"), [-1, 2, 2**40]),
            (("stages", "stage_a", "variants"), {"fp64": {}}),
            (("reference",), "nothing.npz"),
            (("reference",), "../outside.npz"),
            (("classes",), ["", "roadwork"]),
        ],
    )
    def test_numbers_and_names_out_of_bounds(self, copy, keys, value):
        def change(values):
            *way, last = keys
            for step in way:
                values = values[step]
            values[last] = value

        rewrite(copy, change)
        with pytest.raises(ArtifactError):
            load_bundle(copy)

    def test_one_graph_in_fp32(self, rich_copy):
        def change(values):
            stage = values["stages"]["stage_a"]
            variant = next(iter(stage["variants"].values()))
            assert variant["onnx"] != stage["onnx"]
            stage["variants"]["fp32"] = variant

        rewrite(rich_copy, change)
        with pytest.raises(ArtifactError, match="stage_a must have one graph in fp32"):
            load_bundle(rich_copy)

    def test_hidden_must_be_there_under_any_policy(self, copy):
        rewrite(
            copy,
            lambda v: (v["stages"]["stage_a"]["outputs"].pop("hidden"), v["stages"]["stage_b"]["inputs"].pop("hidden")),
        )
        with pytest.raises(ArtifactError, match="hidden of stage_a must .*got absent"):
            load_bundle(copy)

    def test_more_files_than_any_bundle_has(self, copy):
        (copy / "many").mkdir()
        for index in range(2100):
            (copy / "many" / str(index)).touch()
        with pytest.raises(ArtifactError, match="at most 1000 files"):
            load_bundle(copy)

    def test_a_pipe_is_not_waited_for(self, copy):
        (copy / "bundle.json").unlink()
        os.mkfifo(copy / "bundle.json")
        with pytest.raises(ArtifactError, match=r"bundle\.json must be a plain file"):
            load_bundle(copy)

    @pytest.mark.parametrize("name", ["", "SM", "SMxx", "86", "SM\u0661\u0662"])
    def test_cards_that_are_none(self, rich_copy, name):
        rewrite(rich_copy, lambda values: values["engines"][0].update(compute_capabilities=[name]))
        with pytest.raises(ArtifactError, match=r"engines\.0\.compute_capabilities\.0"):
            load_bundle(rich_copy)

    def test_a_worthless_engine_precision(self, rich_copy):
        rewrite(rich_copy, lambda values: values["engines"][0].update(precision="res32"))
        with pytest.raises(ArtifactError, match="got none in res32"):
            load_bundle(rich_copy)


class TestGraphs:
    def build(self, change=None, **changes):
        """Stage B's graph, changed before it is written."""
        tensor = helper.make_tensor("w", TensorProto.FLOAT, [8, 2], np.ones(16, np.float32).tobytes(), raw=True)
        flat = helper.make_node("Flatten", ["hidden"], ["flat"], axis=1)
        product = helper.make_node("Gemm", ["flat", "w"], ["logits"])
        ends = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
            for n, s in (("hidden", ["n", 2, 4]), ("logits", ["n", 2]))
        ]
        graph = helper.make_graph([flat, product], "b", ends[:1], ends[1:], [tensor])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        if change is not None:
            change(model)
        return model.SerializeToString()

    def place(self, location, **more):
        def change(model):
            tensor = model.graph.initializer[0]
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for name, value in {"location": location, **more}.items():
                tensor.external_data.add(key=name, value=value)

        return self.build(change)

    def test_the_plain_one_answers(self, copy):
        forge(copy, "stage_b.onnx", self.build())
        assert len(answers(copy)["label"]) == 3

    @pytest.mark.parametrize(
        "location",
        ["../secret", "/etc/passwd", "unlisted", "", ".", "..", "engines/../config.json", "./config.json",
         "bundle.json", "config.json/", "*/_ORT_MEM_ADDR_/*"],
    )  # fmt: skip
    def test_weights_outside_the_listed_files(self, copy, location):
        (copy.parent / "secret").write_bytes(bytes(64))
        forge(copy, "stage_b.onnx", self.place(location))
        with pytest.raises(ArtifactError, match="no listed file of the bundle"):
            load_bundle(copy)

    def test_weights_outside_although_data_location_denies_it(self, copy):
        def change(model):
            model.graph.initializer[0].external_data.add(key="location", value="../secret")

        forge(copy, "stage_b.onnx", self.build(change))
        with pytest.raises(ArtifactError, match="no listed file of the bundle"):
            load_bundle(copy)

    @pytest.mark.parametrize(
        "more",
        [
            {"offset": "-4"},
            {"offset": "1000"},
            {"length": "1000"},
            {"length": "x"},
            {"offset": "60", "length": "8"},
            {"length": "8"},
        ],
    )
    def test_weights_beyond_their_file(self, copy, more):
        forge(copy, "w.bin", bytes(64))
        forge(copy, "stage_b.onnx", self.place("w.bin"))
        assert len(answers(copy)["label"]) == 3
        forge(copy, "stage_b.onnx", self.place("w.bin", **more))
        if more == {"length": "8"}:  # fewer numbers than the shape says: two-bit ones would fit
            more["length"] = "3"
            forge(copy, "stage_b.onnx", self.place("w.bin", **more))
        with pytest.raises(ArtifactError, match="must be a plain ONNX graph"):
            load_bundle(copy)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda m: setattr(m.graph.node[0], "domain", "com.evil"), "operator of the domain 'com.evil'"),
            (lambda m: setattr(m.graph.node[0], "domain", "com.microsoft"), "operator of the domain"),
            (lambda m: m.graph.node[0].attribute.append(
                helper.make_attribute("body", helper.make_graph([], "inner", [], []))), "graph within the graph"),
            (lambda m: m.functions.add(name="f", domain="ai.onnx"), "functions of its own"),
            (lambda m: m.training_info.add(), "training steps"),
            (lambda m: m.graph.sparse_initializer.add(dims=[2**40]), "sparse weights"),
            (lambda m: m.graph.initializer[0].dims.append(2**20), "numbers in"),
            (lambda m: m.graph.initializer[0].dims.append(-1), "impossible shape"),
            (lambda m: m.graph.initializer[0].dims.extend([2**62, 2**62]), "impossible shape"),
            (lambda m: m.ClearField("graph"), "got 0 graphs"),
        ],
    )  # fmt: skip
    def test_what_a_plain_graph_does_not_have(self, copy, change, reason):
        forge(copy, "stage_b.onnx", self.build(change))
        with pytest.raises(ArtifactError, match=re.escape(reason)):
            load_bundle(copy)

    def test_a_graph_that_no_stage_names_is_walked_too(self, copy):
        forge(copy, "more/stage_c.ONNX", self.place("../../secret"))
        with pytest.raises(ArtifactError, match="no listed file of the bundle"):
            load_bundle(copy)

    def test_every_truncation_and_every_bit(self):
        data = self.build()
        files = {"stage_b.onnx": len(data)}
        seen = set()
        for place in range(len(data)):
            for changed in (data[:place], data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :]):
                try:
                    check_graph(memoryview(changed), "stage_b.onnx", files)
                    seen.add("fine")
                except ArtifactError:
                    seen.add("refused")
        assert seen == {"fine", "refused"}

    def test_a_hostile_length_ends(self):
        for data in (b"\x3a" + b"\xff" * 9 + b"\x01", b"\x3a" + b"\xff" * 20, b"\x3b" * 50, b"\x3a\x02" * 10):
            with pytest.raises(ArtifactError, match="must be a plain ONNX graph"):
                check_graph(memoryview(data), "x.onnx", {})

    def test_it_sees_what_onnx_sees(self, rich):
        """External files of a real export, found by both."""
        model = onnx.load(rich / "stage_b.onnx", load_external_data=False)
        expected = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        sizes = {name: entry.size for name, entry in load_bundle(rich).manifest.files.items()}
        assert (
            expected
            == set(check_graph(memoryview((rich / "stage_b.onnx").read_bytes()), "stage_b.onnx", sizes))
            != set()
        )

    def test_an_output_of_another_shape_than_declared(self, copy):
        """A Reshape to [1, -1] keeps the declared [n, 2] and gives one row for three."""

        def change(model):
            model.graph.node[1].output[0] = "product"
            model.graph.initializer.append(helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 1]))
            model.graph.node.append(helper.make_node("Reshape", ["product", "shape"], ["logits"]))

        forge(copy, "stage_b.onnx", self.build(change))
        rewrite(copy, lambda v: v.update(exit_threshold=1.0), "thresholds.json")
        forge(copy, "thresholds.json", (copy / "thresholds.json").read_bytes())
        with pytest.raises(
            ArtifactError, match=r"logits of stage_b must be float32 \[\d, 2\]|onnxruntime can load|outputs of bundle"
        ):
            answers(copy)

    def test_what_was_hashed_is_what_is_run(self, copy):
        loaded = load_bundle(copy)
        (copy / "stage_b.onnx").write_bytes(self.build())
        with pytest.raises(ArtifactError, match=r"stage_b\.onnx must have the sha256"):
            Cascade.load(loaded)
        with pytest.raises(ArtifactError, match="must list 'x' among its files"):
            loaded.read("x")


def as_a_hub_keeps_it(bundle, folder):
    """Every file a link to one that is called by its content, as huggingface_hub's cache has it."""
    for path in (p for p in bundle.rglob("*") if p.is_file()):
        blob = folder / "blobs" / sha256_file(path)
        link = folder / "snapshots" / "main" / path.relative_to(bundle)
        for made in (blob, link):
            made.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return folder / "snapshots" / "main"


def as_a_volume_mounts_it(bundle, folder):
    """Links through ``..data``, folders among them, as Kubernetes mounts configurations and secrets."""
    shutil.copytree(bundle, folder / "..2026_12_01")
    (folder / "..data").symlink_to("..2026_12_01")
    for path in bundle.iterdir():
        (folder / path.name).symlink_to(f"..data/{path.name}")
    return folder


class TestLinks:
    """What counts is what a file holds, wherever a link leads; what runs are the bytes that were hashed."""

    @pytest.mark.parametrize("lay", [as_a_hub_keeps_it, as_a_volume_mounts_it])
    def test_bundles_of_links_are_bundles(self, rich, tmp_path, key, lay, capsys):
        linked = lay(rich, tmp_path / "linked")
        assert answers(linked) == answers(rich)
        assert pickle.loads(pickle.dumps(Cascade.load(linked))).predict(IMAGES).to_dict() == answers(rich)
        sign(linked, key)
        trust.trust_key(f"{key}.pub")
        assert verify(linked, require_signature=True)["signature"]["status"] == "trusted"
        assert cli.main(["inspect", str(linked)]) == 0
        capsys.readouterr()
        # A loop keeps plain copies, the signature among them.
        store = Store(f"sqlite:///{tmp_path / 'loop.db'}")
        registry = Registry(tmp_path / "loop", store)
        kept = registry.path(registry.add(linked))
        assert not any(path.is_symlink() for path in kept.rglob("*"))
        assert {p.relative_to(kept).as_posix() for p in kept.rglob("*") if p.is_file()} == {
            *load_bundle(rich).manifest.files, "bundle.json", "bundle.sig"
        }  # fmt: skip
        assert signature_status(registry.load(kept.name)).status == "trusted"
        store.close()
        # What serves from a loop's folder takes one of links as well.
        (tmp_path / "served" / "bundles").mkdir(parents=True)
        (tmp_path / "served" / "bundles" / kept.name).symlink_to(linked)
        pointer = Pointer(
            serial=1,
            champion=kept.name,
            version=1,
            previous=None,
            threshold=None,
            shadow=None,
            canary=None,
            canary_share=0,
        )
        pointer.write(tmp_path / "served" / "champion.json")
        assert LiveCascade(tmp_path / "served").predict(IMAGES).to_dict() == answers(rich)

    @pytest.mark.parametrize("name", ["bundle.json", "config.json", "stage_b.onnx", "stage_b.weights", "reference.npz"])
    @pytest.mark.parametrize(
        "target",
        ["/etc/passwd", "/dev/zero", "/dev/tty", "/proc/self/environ", "/proc/self/pagemap", "/proc/kmsg",
         "/sys/power/state", "/proc/self/fd/0", "pipe", "nowhere", ".", "/", "itself", "other"],
    )  # fmt: skip
    def test_links_to_anything_else_are_refused(self, rich_copy, tmp_path, name, target):
        os.mkfifo(tmp_path / "pipe")
        path = rich_copy / name
        path.unlink()
        path.symlink_to({"pipe": tmp_path / "pipe", "itself": name, "other": "metrics.csv"}.get(target, target))
        began = time.monotonic()
        with pytest.raises(ArtifactError) as caught:
            load_bundle(rich_copy)
        assert time.monotonic() - began < 5 and str(caught.value).isprintable()
        assert "root:" not in str(caught.value)

    def test_a_link_that_turns_after_it_was_verified(self, rich_copy, tmp_path):
        linked = as_a_volume_mounts_it(rich_copy, tmp_path / "linked")
        loaded = load_bundle(linked)
        (linked / "..2027").mkdir()
        for name in load_bundle(linked).manifest.files:
            (linked / "..2027" / name).parent.mkdir(parents=True, exist_ok=True)
            (linked / "..2027" / name).write_bytes(b"other")
        (linked / "new").symlink_to("..2027")
        (linked / "new").replace(linked / "..data")
        for name in ("stage_a.onnx", "stage_b.weights", "reference.npz"):
            with pytest.raises(ArtifactError, match="sha256"):
                loaded.read(name)
        with pytest.raises(ArtifactError, match="sha256"):
            loaded.copy_to(tmp_path / "copy", ["stage_b.weights"])

    def test_weights_beside_a_graph_are_the_bytes_that_were_hashed(self, rich_copy):
        """onnxruntime never opens them: they may be gone once they were read."""
        loaded, expected = load_bundle(rich_copy), answers(rich_copy)
        read = Bundle.read

        def once(bundle, name):
            data = read(bundle, name)
            (bundle.path / name).write_bytes(b"x" * len(data))
            return data

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bundle, "read", once)
            cascade = Cascade.load(loaded)
        assert cascade.predict(IMAGES).to_dict() == expected

    def test_what_hubs_and_systems_put_beside_it(self, copy, tmp_path, capsys):
        for name in (".DS_Store", ".cache/huggingface/x.lock", "README.md", "LICENSE", "Thumbs.db", "__MACOSX/._x"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_text("x")
        os.mkfifo(copy / ".pipe")
        assert load_bundle(copy).beside == (
            ".DS_Store", ".cache", ".pipe", "LICENSE", "README.md", "Thumbs.db", "__MACOSX"
        )  # fmt: skip
        assert cli.main(["verify", str(copy)]) == 0
        assert "beside      README.md: no part of the bundle, not read" in capsys.readouterr().out


class TestSizes:
    """Nothing is hashed or read that is larger than any bundle has reason to be."""

    def holes(self, bundle, name, size):
        with (bundle / name).open("wb") as file:
            file.truncate(size)
        rewrite(bundle, lambda v: v["files"].update({name: {"sha256": "0" * 64, "size": size}}))

    @pytest.mark.parametrize(
        "name", ["weights.bin", "more/x.engine", "stage_b.onnx", "metrics.csv", "x.npz", "config.json"]
    )
    @pytest.mark.parametrize("size", [20 * 2**30, 2**43])
    def test_files_of_holes(self, copy, name, size):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            self.holes(copy, name, size)
        except OSError:
            pytest.skip("this file system holds no file so large")
        began = time.process_time()
        with pytest.raises(ArtifactError, match=r"mostly holes|must have at most \d+ bytes"):
            load_bundle(copy)
        assert time.process_time() - began < 2

    def test_all_files_together(self, copy, monkeypatch):
        total = sum(entry.size for entry in load_bundle(copy).manifest.files.values())
        monkeypatch.setattr(bundle_module, "BYTES", total - 1)
        with pytest.raises(ArtifactError, match="bundle must have at most"):
            load_bundle(copy)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda a: a.update(more=np.zeros(3, np.float32)), "more of reference.npz must be absent"),
            (lambda a: a.pop("stage_b.logits"), "stage_b.logits of reference.npz must be .*, got none"),
            (lambda a: a.update(pixels=a["pixels"].astype(np.int8)), "pixels of reference.npz must be uint8"),
            (lambda a: a.update({n: np.repeat(v, 22, axis=0) for n, v in a.items()}), "at most 64 rows, got 66"),
            (lambda a: a.update({n: v[:0] for n, v in a.items()}), "of reference.npz must be"),
        ],
    )
    def test_a_reference_holds_what_it_should(self, rich_copy, tmp_path, change, words):
        arrays = load_npz(rich_copy / "reference.npz")
        change(arrays)
        save_npz(tmp_path / "r.npz", arrays)
        forge(rich_copy, "reference.npz", (tmp_path / "r.npz").read_bytes())
        with pytest.raises(ArtifactError, match=words):
            load_bundle(rich_copy)


class TestArrays:
    def put(self, bundle, data):
        forge(bundle, "reference.npz", data)
        load_bundle(bundle)

    def test_plain_numbers_pass(self, copy, tmp_path):
        save_npz(tmp_path / "a.npz", {"x": np.zeros((2, 0, 3), np.float32), "y": np.ones((), np.uint8)})
        self.put(copy, (tmp_path / "a.npz").read_bytes())

    @pytest.mark.parametrize("kind", ["packed", "objects", "names", "lying", "array", "twice"])
    def test_others_do_not(self, copy, tmp_path, kind):
        path = tmp_path / "a.npz"
        if kind == "packed":
            np.savez_compressed(path, x=np.zeros(2**20))
        elif kind == "objects":
            np.savez(path, x=np.array([{}], dtype=object))
        elif kind == "names":
            np.savez(path, x=np.array(["text"]))
        elif kind == "array":
            np.save(path, np.zeros(3))
            path = tmp_path / "a.npz.npy"
        else:
            with zipfile.ZipFile(path, "w") as archive:
                with archive.open("x.npy", "w") as file:
                    shape = (2**40,) if kind == "lying" else (0,)
                    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
                if kind == "twice":
                    with pytest.warns(UserWarning, match="Duplicate name"):
                        archive.writestr("x.npy", b"")
        with pytest.raises(ArtifactError, match=r"must be an \.npz of plain, unpacked numbers"):
            self.put(copy, path.read_bytes())


class TestFormats:
    @pytest.fixture
    def old(self, rich_copy):
        """A bundle as the first format wrote it."""
        files = {"bundle.json": (rich_copy / "bundle.json").read_bytes()}
        fuzz.as_format_1(files)
        (rich_copy / "bundle.json").write_bytes(files["bundle.json"])
        return rich_copy

    def test_an_older_one_answers_and_says_what_it_lacks(self, old, rich):
        loaded = load_bundle(old)
        assert (loaded.format_version, loaded.manifest.format_version) == (1, 2)
        assert len(loaded.notes) == 2 and "no reference outputs" in loaded.notes[0]
        assert loaded.manifest.reference is None and not loaded.manifest.stages["stage_a"].variants
        assert answers(old) == answers(rich)
        assert load_bundle(rich).notes == ()
        assert "format      1, read as format 2" in render_findings(verify(old))

    def test_migrate_writes_todays(self, old, tmp_path, capsys):
        before = (old / "bundle.json").read_bytes()
        assert cli.main(["migrate", str(old), "--out", str(tmp_path / "new"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["format_version"] == 2
        assert answers(tmp_path / "new") == answers(old)
        assert BundleManifest.read(tmp_path / "new" / "bundle.json") == load_bundle(old).manifest
        assert (old / "bundle.json").read_bytes() == before
        with pytest.raises(InputError, match="out must be a new folder"):
            migrate(old, tmp_path / "new")
        with pytest.raises(InputError, match="format before 2"):
            migrate(tmp_path / "new", tmp_path / "newer")
        with pytest.raises(InputError, match="outside the bundle, which stays as it is"):
            migrate(old, old / "new")
        load_bundle(old)

    def test_a_signature_stays_behind(self, old, tmp_path, key):
        sign(old, key)
        assert signature_status(load_bundle(old)).status == "unknown"
        assert migrate(old, tmp_path / "new")["signature_dropped"]
        assert signature_status(load_bundle(tmp_path / "new")).status == "none"

    @pytest.mark.parametrize(
        ("version", "reason"),
        [
            (3, "a newer stage1_pro wrote this"),
            (10**30, "newer"),
            (0, "from 1 to 2"),
            ("2", "from 1 to 2"),
            (2.0, "from 1"),
            (True, "from 1"),
        ],
    )
    def test_versions_nobody_knows(self, copy, version, reason):
        rewrite(copy, lambda values: values.update(format_version=version))
        with pytest.raises(ArtifactError, match=reason):
            load_bundle(copy)

    @pytest.mark.parametrize("name", ["reference", "variants"])
    def test_a_first_format_with_parts_of_the_second(self, old, name):
        rewrite(
            old,
            lambda v: v.update(reference=None) if name == "reference" else v["stages"]["stage_a"].update(variants={}),
        )
        with pytest.raises(ArtifactError, match="came with format 2"):
            load_bundle(old)


class TestEngines:
    def entry(self, loaded):
        return loaded.manifest.engines[0]

    def test_a_strangers_engine_is_refused(self, rich):
        loaded = load_bundle(rich)
        found = engine_trust(loaded, self.entry(loaded))
        assert (found.status, found.allowed) == ("refused", False)
        assert "was not built here, and the bundle is not signed" in found.reason and "--trust-engines" in found.reason
        # Who receives a bundle has no run to export.
        assert "build it here with `stage1 build`" in found.reason

    def test_it_is_hashed_piece_by_piece(self, rich_copy, monkeypatch):
        """An engine of any size must not fill memory before anybody trusts it."""
        loaded = load_bundle(rich_copy)
        monkeypatch.setattr(type(loaded), "read", lambda *_: pytest.fail("it was read whole"))
        assert engine_trust(loaded, self.entry(loaded)).status == "refused"
        path = rich_copy / self.entry(loaded).path
        path.write_bytes(path.read_bytes()[::-1])
        with pytest.raises(ArtifactError, match="sha256"):
            engine_trust(loaded, self.entry(loaded))

    def test_the_flag(self, rich):
        loaded = load_bundle(rich)
        found = engine_trust(loaded, self.entry(loaded), trust_engines=True)
        assert (found.status, found.allowed) == ("flag", True)

    def test_built_here(self, rich, home):
        loaded = load_bundle(rich)
        path = rich / self.entry(loaded).path
        assert remember_built(path) == remember_built(path) == sha256_file(path)
        assert engine_trust(loaded, self.entry(loaded)).status == "built_here"
        ledger = home / "built_engines.json"
        assert json.loads(ledger.read_text())["sha256"] == [sha256_file(path)]
        assert stat.S_IMODE(ledger.stat().st_mode) == 0o600 and stat.S_IMODE(home.stat().st_mode) == 0o700

    def test_many_builders_at_once(self, tmp_path, home):
        files = []
        for index in range(6):
            files.append(tmp_path / f"{index}.engine")
            files[-1].write_bytes(bytes([index]))
        code = "import sys; from stage1_pro.deploy.trust import remember_built; remember_built(sys.argv[1])"
        running = [subprocess.Popen([sys.executable, "-c", code, str(file)]) for file in files]
        assert [process.wait() for process in running] == [0] * 6
        assert set(json.loads((home / "built_engines.json").read_text())["sha256"]) == {
            sha256_file(file) for file in files
        }

    def test_a_ledger_that_others_may_write(self, rich, home):
        loaded = load_bundle(rich)
        remember_built(rich / self.entry(loaded).path)
        for mode in (0o620, 0o602, 0o666):
            (home / "built_engines.json").chmod(mode)
            with pytest.raises(ArtifactError, match=f"nobody else may write, got mode {mode:o}"):
                engine_trust(loaded, self.entry(loaded))

    def test_signed_by_a_trusted_key(self, rich_copy, key, home):
        sign(rich_copy, key)
        loaded = load_bundle(rich_copy)
        assert engine_trust(loaded, self.entry(loaded)).status == "refused"
        trusted = trust.trust_key(f"{key}.pub", "the workshop")
        found = engine_trust(loaded, self.entry(loaded))
        assert found.status == "signed" and "'the workshop'" in found.reason
        assert stat.S_IMODE((home / "trusted_keys.json").stat().st_mode) == 0o600
        trust.forget_key(trusted.name)
        assert engine_trust(loaded, self.entry(loaded)).status == "refused"

    def test_an_engine_changed_after_loading(self, rich_copy):
        loaded = load_bundle(rich_copy)
        (rich_copy / self.entry(loaded).path).write_bytes(b"x")
        with pytest.raises(ArtifactError, match="it was changed"):
            engine_trust(loaded, self.entry(loaded), trust_engines=True)

    def test_an_entry_of_another_bundle(self, rich):
        loaded = load_bundle(rich)
        other = self.entry(loaded).model_copy(update={"path": "../x"})
        with pytest.raises(ArtifactError, match="lists no such one"):
            engine_trust(loaded, other, trust_engines=True)


class TestSignatures:
    def test_every_byte_of_the_manifest_counts(self, copy, key):
        sign(copy, key)
        trust.trust_key(f"{key}.pub")
        assert signature_status(load_bundle(copy)).status == "trusted"
        text = (copy / "bundle.json").read_text()
        (copy / "bundle.json").write_text(text + "\n")  # the same values, other bytes
        assert signature_status(load_bundle(copy)).status == "invalid"
        with pytest.raises(ArtifactError, match="as its signer left it"):
            verify(copy)
        assert answers(copy)  # data is answered with; what is signed are engines

    @pytest.mark.parametrize(
        "damage",
        [
            lambda v: v.update(signature=base64.b64encode(bytes(64)).decode()),
            lambda v: v.update(signature="é"),
            lambda v: v.update(public_key="AAAA"),
            lambda v: v.update(public_key=base64.b64encode(b"\xff" * 32).decode()),
            lambda v: v.update(key_id="0" * 32),
            lambda v: v.update(algorithm="none"),
            lambda v: v.pop("signature"),
            lambda v: v.update(more=1),
        ],
    )
    def test_damaged_signatures(self, copy, key, damage):
        sign(copy, key)
        rewrite(copy, damage, "bundle.sig")
        assert signature_status(load_bundle(copy)).status == "invalid"

    def test_a_signature_that_is_no_file(self, copy):
        (copy / "bundle.sig").write_bytes(bytes(5000))
        assert signature_status(load_bundle(copy)).status == "invalid"
        (copy / "bundle.sig").unlink()
        (copy / "bundle.sig").symlink_to("/etc/passwd")
        assert signature_status(load_bundle(copy)).status == "invalid"
        with pytest.raises(ArtifactError, match="as its signer left it"):
            verify(copy)

    def test_a_trusted_name_on_another_key(self, copy, key, tmp_path):
        """What is trusted is the key; its identifier in the file is only its name."""
        trust.trust_key(f"{key}.pub")
        trust.new_key(tmp_path / "other.key")
        sign(copy, tmp_path / "other.key")
        stolen = trust.trusted_keys()[0].key_id
        rewrite(copy, lambda v: v.update(key_id=stolen), "bundle.sig")
        assert signature_status(load_bundle(copy)).status == "invalid"

    def test_without_the_library(self, copy, key, monkeypatch):
        sign(copy, key)
        for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, "cryptography", None)
        assert signature_status(load_bundle(copy)).status == "unchecked"
        with pytest.raises(DependencyError, match=r"stage1_pro\[sign\]"):
            sign(copy, key)
        with pytest.raises(ArtifactError, match="signed by a trusted key"):
            verify(copy, require_signature=True)

    def test_keys_that_are_none(self, copy, key, tmp_path):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        with pytest.raises(InputError, match="a key is never replaced"):
            trust.new_key(key)
        (tmp_path / "none.key").touch(mode=0o600)
        with pytest.raises(InputError, match="Ed25519 private key"):
            sign(copy, tmp_path / "none.key")
        with pytest.raises(InputError, match="can be read"):
            sign(copy, tmp_path / "nowhere")
        with pytest.raises(InputError, match=r"name the \.pub file"):
            trust.trust_key(key)
        for mode in (0o640, 0o604, 0o620):
            key.chmod(mode)
            with pytest.raises(InputError, match="readable by you alone"):
                sign(copy, key)
        with pytest.raises(InputError, match="must be a trusted one"):
            trust.forget_key("nobody")

    def test_keys_of_openssl(self, copy, tmp_path):
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed: keys made by it are not tried")
        private = tmp_path / "o.key"
        subprocess.run(
            ["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True, capture_output=True
        )
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", tmp_path / "o.pub"], check=True)
        private.chmod(0o600)
        sign(copy, private)
        trust.trust_key(tmp_path / "o.pub")
        assert signature_status(load_bundle(copy)).status == "trusted"

    def test_where_keys_lie(self, monkeypatch, tmp_path):
        monkeypatch.delenv("STAGE1_CONFIG")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
        assert trust.config_folder() == tmp_path / "stage1_pro"
        monkeypatch.delenv("XDG_CONFIG_HOME")
        assert trust.config_folder() == Path.home() / ".config" / "stage1_pro"


class TestCommands:
    def test_the_manuals_page(self, rich_copy, tmp_path, capsys, monkeypatch):
        """Its lines, as they stand, on a bundle with engines."""
        pytest.importorskip("cryptography", reason="cryptography is not installed; pip install '.[sign]'")
        page = (Path(stage1_pro.__file__).parent / "manual" / "receiving.md").read_text()
        block = re.search(r"```sh\n(.*?)```", page, re.DOTALL)
        assert block is not None
        lines = [line.split() for line in block[1].splitlines()]
        assert len(lines) >= 5
        monkeypatch.chdir(tmp_path)
        (tmp_path / "run").mkdir()
        rich_copy.rename(tmp_path / "run" / "bundle")
        for line in lines:
            assert cli.main(line[1:]) == 0, (line, capsys.readouterr().err)
        text = capsys.readouterr().out
        assert "signature   trusted" in text and "signed by 'maker.key'" in text

    def test_verify_says_what_is_inside(self, rich, capsys):
        assert cli.main(["verify", str(rich), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["verified"] and facts["format_version"] == 2 and facts["signature"]["status"] == "none"
        assert facts["engines"][0]["status"] == "refused" and facts["variants"]["stage_a"] == ["fp16"]
        assert facts["reference"] == "reference.npz" and facts["licence_file"] is None
        assert cli.main(["verify", str(rich), "--trust-engines"]) == 0
        assert "engine      engines/rtx/stage_a.engine (fp16): flag" in capsys.readouterr().out

    def test_verify_refuses(self, copy, capsys):
        assert cli.main(["verify", str(copy), "--require-signature"]) == 4
        assert "must be signed by a trusted key, but it is not signed" in capsys.readouterr().err
        (copy / "stage_a.onnx").write_bytes((copy / "stage_a.onnx").read_bytes()[:-1] + b"x")
        assert cli.main(["verify", str(copy), "--json"]) == 4
        assert json.loads(capsys.readouterr().out)["kind"] == "ArtifactError"

    @pytest.mark.parametrize("line", [["new"], ["trust"], ["list", "x"], ["forget"], ["new", "k", "--name", "n"]])
    def test_keys_that_lack_a_word(self, line, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert cli.main(["keys", *line]) == 2
        assert not any(tmp_path.iterdir())

    def test_the_base_install_verifies(self, rich):
        """No torch, no onnx, and not even onnxruntime: nothing is run."""
        code = (
            "import sys\n"
            "sys.modules.update(dict.fromkeys(('torch', 'onnx', 'onnxruntime', 'transformers', 'cryptography')))\n"
            "from stage1_pro.deploy.inspection import render_findings, verify\n"
            f"print(render_findings(verify({str(rich)!r})))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "every hash right" in done.stdout


class TestFuzz:
    @settings(max_examples=150, deadline=None)
    @given(
        place=st.integers(0, 10_000),
        value=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=6,
        ),
    )
    def test_any_value_anywhere_in_the_manifest(self, plain, place, value):
        values = json.loads((plain / "bundle.json").read_text())
        path = [p for p in fuzz.paths_of(values) if p][place % sum(1 for p in fuzz.paths_of(values) if p)]
        fuzz.at_path(values, path[:-1])[path[-1]] = value
        held = bundle_module.read_plain
        text = json.dumps(values).encode("utf-8", "surrogatepass")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bundle_module, "read_plain", lambda f, n, *a: text if n == "bundle.json" else held(f, n, *a))
            message = ""
            try:
                fuzz.check_answers(Cascade.load(load_bundle(plain)))
            except Stage1Error as error:
                message = str(error)
            assert message.isprintable()

    def test_mutated_bundles_are_refused_or_loaded(self, repository, tmp_path):
        """Half of the cases have their hashes made right again; 100,000: tests/kit/fuzz_bundles.py --n 100000."""
        script = repository / "tests" / "kit" / "fuzz_bundles.py"
        command = [sys.executable, script, "--n", "1500", "--seed", "7", "--out", tmp_path / "fuzz.json"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads((tmp_path / "fuzz.json").read_text())
        counts = {(row["outcome"], row["hashes_right"]): row["count"] for row in found["outcomes"]}
        assert {outcome for outcome, _ in counts} == {"refused", "loaded"} and found["findings"] == []
        assert counts["refused", True] + counts["loaded", True] == 750 and sum(counts.values()) == 1500
        assert counts["loaded", True] > 75  # else nothing but hashes would be tested

    def test_it_sees_what_must_not_happen(self, repository, plain, tmp_path):
        """Each evil is done once, by hand; the watch that cries at none of them would be worthless."""
        code = f"""
import os, pickle, sys
sys.path.insert(0, {str(repository / "tests")!r})
import kit.fuzz_bundles as fuzz
from pathlib import Path
watch, folder = fuzz.Watch(), Path({str(plain)!r})
class Unescaped(fuzz.Stage1Error):
    __str__ = lambda self: '\\x1b[31m'
load = fuzz.load_bundle
evils = dict(
    nothing=lambda: None,
    read=lambda: open('/etc/hostname').close() if os.path.exists('/etc/hostname') else open(sys.executable).close(),
    write=lambda: open(folder / 'x', 'w').close() or os.unlink(folder / 'x'),
    execute=lambda: os.system('true'),
    unpickle=lambda: pickle.loads(pickle.dumps(fuzz.Bomb())),
    other=lambda: 1 / 0,
    message=lambda: (_ for _ in ()).throw(Unescaped()),
)
for name, evil in evils.items():
    fuzz.judge(folder, watch)
    fuzz.load_bundle = lambda path: (evil(), load(path))[1]
    print(name, fuzz.judge(folder, watch)[0], sep='=')
    fuzz.load_bundle = load
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.split("\n")[:-1] == [
            "nothing=loaded", "read=touched", "write=touched", "execute=touched", "unpickle=touched",
            "other=other exception", "message=bad message",
        ], done.stdout + done.stderr  # fmt: skip

    def test_a_crash_is_counted_and_the_rest_goes_on(self, monkeypatch, tmp_path):
        """A worker that dies at case 1 of 4 is replaced behind it."""
        fake = tmp_path / "worker.py"
        fake.write_text(
            "import os, sys\nstart, n, step = map(int, sys.argv[1:4])\n"
            "for i in range(start, n, step):\n    print(f'> {i}', flush=True)\n"
            '    if i == 1: os.abort()\n    print(f\'= [{i}, "refused", ["bytes"], false, "x"]\', flush=True)\n'
        )
        monkeypatch.setattr(
            fuzz, "start_worker",
            lambda o, start, scratch: subprocess.Popen(
                [sys.executable, fake, str(start), str(o.n), str(o.workers)], stdout=subprocess.PIPE, text=True
            ),
        )  # fmt: skip
        options = type("Options", (), {"n": 4, "workers": 1, "seed": 0})
        counts, _, findings, _ = fuzz.run(options)
        assert [(f["index"], f["outcome"]) for f in findings] == [(1, "crash")]
        assert sum(counts.values()) == 4
