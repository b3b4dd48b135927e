"""Comparison: arms start alike, intervals pair groups over seeds, runs are kept, val_test is read once."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from fitting import fit_gate_policy

import stage1_pro
from stage1_pro import native
from stage1_pro.cli import main
from stage1_pro.commands.compare import Compare, compare
from stage1_pro.config import Config, build_config, load_config
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits, resplit
from stage1_pro.data.synthetic import render_pool
from stage1_pro.errors import ArtifactError, InputError, NotReachableError, TrainingError
from stage1_pro.files import write_csv
from stage1_pro.metrics import augrc, mcc
from stage1_pro.metrics import compare as compare_rows
from stage1_pro.metrics.seeds import ARM_METRICS, SeedRows, _Ranked, compare_seeds
from stage1_pro.policies.gate import reach
from stage1_pro.studies import comparing
from stage1_pro.studies.comparing import Comparison, _split_all, check_fairness, markdown, read_arms
from stage1_pro.training.loop import train
from stage1_pro.training.run import Start, write_config

TINY = ["train.epochs=1", "train.batch_size=32", "train.workers=0", "gate.fit=joint"]


def config(*overrides: str) -> Config:
    return load_config(None, [*TINY, *overrides])


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render_pool(tmp_path_factory.mktemp("scenes") / "pool", 160, seed=3, size=48)


@pytest.fixture(scope="module")
def split_run(labels: Path) -> Path:
    stage1_pro.split(labels, labels.parent.parent / "run", seed=0)
    return labels.parent.parent / "run"


# ---------------------------------------------------------------------------------------------- fairness


def start_of(split_run: Path, folder: Path, *overrides: str) -> Start:
    shutil.copytree(split_run, folder)
    train(folder, config(*overrides))
    return Start.read(folder / "start.json")


@pytest.mark.slow
def test_two_arms_draw_identical_heads_orders_and_augmentations(split_run: Path, tmp_path: Path) -> None:
    base = start_of(split_run, tmp_path / "a")
    other = start_of(split_run, tmp_path / "b", "train.lr=1e-4", "train.workers=1", "model.dropout=0.1", "model.tap=2")
    assert (base.heads, base.order, base.batch_rows, base.batch_inputs) == (
        other.heads, other.order, other.batch_rows, other.batch_inputs,
    )  # fmt: skip
    assert check_fairness({"a": base, "b": other}, 0) == []
    linear = start_of(split_run, tmp_path / "linear", "train.mode=linear")
    assert (linear.heads, linear.order, linear.batch_rows) == (base.heads, base.order, base.batch_rows)
    assert linear.batch_inputs is None
    assert linear.n_trainable < base.n_trainable <= base.n_parameters == linear.n_parameters
    (said,) = check_fairness({"a": base, "linear": linear}, 0)
    assert "no augmented pixels: linear" in said
    # and what must make a difference does
    seeded = start_of(split_run, tmp_path / "seeded", "seed=1")
    assert not {seeded.heads, seeded.order, seeded.batch_inputs} & {base.heads, base.order, base.batch_inputs}
    turned = start_of(split_run, tmp_path / "turned", "augment.rotation=90")
    assert turned.batch_rows == base.batch_rows
    assert turned.batch_inputs != base.batch_inputs
    (said,) = check_fairness({"a": base, "turned": turned}, 0)
    assert "other pixels: a | turned" in said
    elsewhere = base.model_copy(
        update={"environment": {**base.environment, "get_num_threads": "96", "MKL_CBWR": "AVX"}}
    )
    (said,) = check_fairness({"a": base, "b": elsewhere}, 0)
    assert said.endswith("differ in MKL_CBWR, get_num_threads")
    unknown = base.model_copy(update={"environment": {}})
    assert check_fairness({"a": base, "b": unknown}, 0) == []


def test_start_is_of_what_training_reads_and_resume_leaves_it(split_run: Path, tmp_path: Path) -> None:
    import hashlib
    import itertools

    from stage1_pro.data.loader import TrainLoader, epoch_order
    from stage1_pro.models.model import create_model

    run = tmp_path / "run"
    found = start_of(split_run, run, "augment.blur_probability=0.5")
    options, splits = config("augment.blur_probability=0.5"), Splits.read(run / "splits.json")
    rows = splits.of("train")
    loader = TrainLoader(
        [splits.path(row) for row in rows], [splits.classes.index(row.label) for row in rows],
        create_model(options.model, splits.classes, splits.positive, 0).architecture.preprocessing, options.augment,
        seed=0, batch_size=32,
    )  # fmt: skip
    batches = list(itertools.islice(loader.epoch(0), 2))
    assert found.batch_inputs == hashlib.sha256(b"".join(b.pixels.numpy().tobytes() for b in batches)).hexdigest()
    order = [rows[i].id for epoch in range(3) for i in epoch_order(len(rows), 0, epoch)]
    assert found.order == hashlib.sha256("\n".join(order).encode()).hexdigest()
    before = (run / "start.json").read_bytes(), (run / "start.json").stat().st_mtime_ns
    train(run, resume=True)
    assert ((run / "start.json").read_bytes(), (run / "start.json").stat().st_mtime_ns) == before
    select = Predictions.load(run / "val_select.npz")
    assert select.split == "val_select"
    assert select.row_ids.tolist() == [row.id for row in splits.of("val_select")]


START = Start(
    seed=0, split_hashes={"train": "x"}, head_shapes={"classifier.weight": [2, 8]}, heads="h", order="o", batch_size=32,
    batch_rows="r", batch_inputs="p", preprocessing="f", augmentation="g", n_trainable=1, n_parameters=2,
    base_fingerprint="b", versions={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"seed": 1}, "seed"),
        ({"split_hashes": {"train": "y"}}, "splits"),
        ({"order": "?"}, "row order"),
        ({"heads": "?"}, "starting heads"),
        ({"batch_rows": "?"}, "rows in the first batches"),
        ({"batch_inputs": "?"}, "pixels in the first batches"),
        ({"head_shapes": {"classifier.weight": [2, 4]}, "order": "?"}, "row order"),
    ],
)
def test_a_doctored_start_is_refused_by_name(changed: dict[str, object], what: str) -> None:
    doctored = START.model_copy(update=changed)
    with pytest.raises(ArtifactError, match=f"same {what}, but in seed 3 those of base and peft differ"):
        check_fairness({"base": START, "same": START, "peft": doctored}, 3)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"head_shapes": {"classifier.weight": [2, 4]}, "heads": "?"}, "heads of other shapes"),
        ({"batch_size": 16, "batch_rows": "?", "batch_inputs": "?"}, "other batch sizes"),
        ({"preprocessing": "?", "batch_inputs": "?"}, "preprocessing"),
        ({"batch_inputs": None}, "no augmented pixels: peft"),
    ],
)
def test_what_cannot_be_the_same_is_said(changed: dict[str, object], said: str) -> None:
    found = check_fairness({"base": START, "peft": START.model_copy(update=changed)}, 0)
    assert any(said in one for one in found)
    # two arms of the same kind are still held against each other
    twins = {"base": START, "x": START.model_copy(update=changed), "y": START.model_copy(update=changed)}
    broken = {"batch_rows": "!"} if "batch_inputs" in changed and changed["batch_inputs"] is None else {"heads": "!"}
    twins["y"] = twins["y"].model_copy(update=broken)
    with pytest.raises(ArtifactError, match="and y differ"):
        check_fairness(twins, 0)


# ---------------------------------------------------------------------------------------------- splits


def test_other_seeds_cut_all_but_val_test_anew(split_run: Path) -> None:
    first = Splits.read(split_run / "splits.json")
    second = resplit(first, 1)
    assert second.hashes["val_test"] == first.hashes["val_test"]
    assert second == resplit(first, 1)
    for name in ("train", "val_select", "val_calib", "val_calib.fit", "val_calib.certify"):
        assert second.hashes[name] != first.hashes[name], name
        assert second.hashes[name] != resplit(first, 2).hashes[name], name
    assert {row.id for row in second.rows} == {row.id for row in first.rows}
    assert all((row.half is None) == (row.split != "val_calib") for row in second.rows)
    for name, count in second.counts.items():
        assert sum(count.values()) == pytest.approx(sum(first.counts[name].values()), abs=8)


# ---------------------------------------------------------------------------------------------- intervals


def simulated(
    rng: np.random.Generator, *, n_groups: int = 60, seeds: int = 3, gain: float = 0.0, classes: int = 2
) -> dict[str, list[SeedRows]]:
    """Two arms on overlapping parts of one data set whose groups share their difficulty."""
    sizes = rng.integers(1, 5, n_groups)
    group = np.repeat(np.arange(n_groups), sizes)
    label = rng.integers(0, classes, group.size)
    hard = np.repeat(rng.normal(size=n_groups), sizes)
    arms: dict[str, list[SeedRows]] = {"base": [], "other": []}
    for _ in range(seeds):
        kept = np.isin(group, rng.choice(n_groups, n_groups // 2, replace=False))
        noise = rng.normal(size=group.size)
        for name, extra in (("base", 0.0), ("other", gain)):
            logit = rng.normal(size=(group.size, classes)) * 0.3
            logit[np.arange(group.size), label] += 0.8 + extra - hard + 0.5 * noise
            probs = np.exp(logit) / np.exp(logit).sum(1, keepdims=True)
            gate = np.round(logit.max(1), 1)  # with ties
            arms[name].append(SeedRows(probs[kept], gate[kept], label[kept], group[kept].astype(str)))
    return arms


def by_hand(rows: SeedRows, times: np.ndarray) -> list[float]:
    """The metrics of rows that are really repeated."""
    again = np.repeat(np.arange(len(rows.labels)), times)
    given, wrong = rows.probs.argmax(1)[again], (rows.probs.argmax(1) != rows.labels)[again]
    return [
        1 - wrong.mean(), mcc(given, rows.labels[again]),
        augrc(rows.probs.max(1)[again], wrong), augrc(rows.gate[again], wrong),
    ]  # fmt: skip


@pytest.mark.parametrize("classes", [2, 4])
def test_weights_are_shared_by_seeds_and_arms(classes: int) -> None:
    arms = simulated(np.random.default_rng(classes), classes=classes)
    found = compare_seeds(arms, n_replicates=40, seed=5)
    names = np.unique(np.concatenate([rows.groups for rows in arms["base"]]))
    drawn = native.resample_counts([names.size], 40, seed=5)
    for k, metric in enumerate(ARM_METRICS):
        twins = {
            name: np.array([
                np.mean([by_hand(one, times[np.searchsorted(names, one.groups)])[k] for one in seeds])
                for times in drawn
            ])
            for name, seeds in arms.items()
        }  # fmt: skip
        np.testing.assert_allclose(found["other"].means[metric].replicates, twins["other"], atol=1e-12)
        difference = found["other"].differences[metric]
        np.testing.assert_allclose(difference.replicates, twins["other"] - twins["base"], atol=1e-12)
        assert difference.method == "t"
        assert difference.low < difference.value < difference.high
        values = [by_hand(one, np.ones(len(one.labels), int))[k] for one in arms["other"]]
        assert found["other"].values[metric].tolist() == pytest.approx(values)
        assert found["other"].means[metric].value == pytest.approx(np.mean(values))
    assert found["base"].differences == {}


def test_one_seed_is_the_plain_paired_difference() -> None:
    arms = simulated(np.random.default_rng(0), seeds=1)
    (a,), (b,) = arms["other"], arms["base"]
    plain = compare_rows(a.probs, b.probs, a.labels, groups=a.groups, metrics=["augrc", "accuracy"], seed=2)
    found = compare_seeds(arms, n_replicates=1000, seed=2)["other"].differences
    for name in ("augrc", "accuracy"):
        assert (found[name].value, found[name].low, found[name].high) == pytest.approx(
            (plain[name].value, plain[name].low, plain[name].high)
        )


def test_the_influence_of_seeds_is_the_derivative() -> None:
    """Of every metric along the weight of each row, by central differences."""
    rows = simulated(np.random.default_rng(4), n_groups=12, seeds=1, classes=3)["other"][0]
    ranked, n, step = _Ranked(rows), len(rows.labels), 1e-6
    moved = np.eye(n) * step
    slopes = (ranked.measure(1 + moved) - ranked.measure(1 - moved)) / (2 * step)
    np.testing.assert_allclose(ranked.influence(), slopes, atol=1e-7)


def test_row_order_does_not_matter_and_chunks_neither(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = simulated(np.random.default_rng(1))
    found = compare_seeds(arms, n_replicates=50)
    monkeypatch.setattr("stage1_pro.metrics.seeds._CHUNK", 500)
    turned = {
        name: [SeedRows(r.probs[::-1], r.gate[::-1], r.labels[::-1], r.groups[::-1]) for r in seeds]
        for name, seeds in arms.items()
    }
    again = compare_seeds(turned, n_replicates=50)
    for metric in ARM_METRICS:
        np.testing.assert_allclose(
            again["other"].differences[metric].replicates, found["other"].differences[metric].replicates, atol=1e-12
        )


def test_intervals_cover_and_pairing_narrows_them() -> None:
    rng = np.random.default_rng(7)
    big = compare_seeds(simulated(rng, n_groups=20_000, seeds=2, gain=0.6), n_replicates=2)["other"]
    truth = {name: one.value for name, one in big.differences.items()}
    covered = dict.fromkeys(truth, 0)
    trials = 120
    for _ in range(trials):
        found = compare_seeds(simulated(rng, n_groups=120, seeds=4, gain=0.6), n_replicates=200)
        for name, one in found["other"].differences.items():
            covered[name] += one.low <= truth[name] <= one.high
        apart = [found[name].means["augrc"] for name in ("base", "other")]
        paired = found["other"].differences["augrc"]
        assert paired.high - paired.low < np.hypot(*(one.high - one.low for one in apart))
    # binomial noise of 120 trials at 95%: 3.3 standard errors are .066
    assert min(covered.values()) / trials > 0.88, covered


def test_an_arm_against_itself_has_no_interval() -> None:
    rows = simulated(np.random.default_rng(2))["base"]
    one = compare_seeds({"a": rows, "b": rows}, n_replicates=20)["b"].differences["augrc"]
    assert one.value == 0
    assert one.method == "none"
    assert "equal" in one.note


def test_unlike_arms_are_refused() -> None:
    arms = simulated(np.random.default_rng(3))
    with pytest.raises(InputError, match="same seeds, got 3 of base and 2 of other"):
        compare_seeds({"base": arms["base"], "other": arms["other"][:2]})
    moved = [arms["other"][1], arms["other"][0], arms["other"][2]]
    with pytest.raises(InputError, match="same rows, got others in seed number 0 of base and other"):
        compare_seeds({"base": arms["base"], "other": moved})
    alone = [replace(rows, groups=np.full(len(rows.labels), "one")) for rows in arms["base"]]
    assert np.isnan(compare_seeds({"base": alone}, n_replicates=10)["base"].means["accuracy"].low)


def test_reach_agrees_with_the_policy() -> None:
    rng = np.random.default_rng(4)
    seen = set()
    for _ in range(60):
        n, noise = int(rng.integers(20, 400)), rng.choice([0.02, 0.3, 1])
        labels = rng.integers(0, 2, n)
        gate = np.round(rng.normal(size=n), 1)
        wrong = rng.random(n) < noise / (1 + np.exp(6 * (gate + 1)))
        probs = np.eye(2)[np.where(wrong, 1 - labels, labels)]
        found = reach(gate, wrong)
        halves = np.where(np.arange(n) % 2, "fit", "certify")
        try:
            policy = fit_gate_policy(
                probs, gate, labels, halves=halves, classes=["no", "yes"], positive="yes", guarantee="none",
                exit_error=0.01,
            )  # fmt: skip
            assert found.feasible
            assert policy.coverage == found.coverage
        except NotReachableError:
            assert not found.feasible
        accepted = [gate >= at for at in np.unique(gate)]
        assert found.exit_error == min(wrong[a].mean() for a in accepted if a.sum() >= 0.7 * n - 1e-9)
        within = [a.sum() / n for a in accepted if 100 * wrong[a].sum() <= a.sum()]
        assert found.coverage == max(within, default=0.0)
        seen.add(found.feasible)
    assert seen == {True, False}
    with pytest.raises(InputError, match="min_coverage must be inside"):
        reach([0.1], [0], min_coverage=1.0)


# ---------------------------------------------------------------------------------------------- arms


def test_arms_are_read_with_names_and_overrides(tmp_path: Path) -> None:
    for name in ("full", "linear"):
        (tmp_path / f"{name}.yaml").write_text(f"train: {{mode: {name}}}\n")
    paths = [tmp_path / "full.yaml", tmp_path / "linear.yaml"]
    arms = read_arms(paths, overrides=["train.epochs=3", "linear:train.lr=0.5"])
    assert list(arms) == ["full", "linear"]
    assert [arm.train.epochs for arm in arms.values()] == [3, 3]
    assert (arms["full"].train.lr, arms["linear"].train.lr) == (1e-3, 0.5)
    assert list(read_arms(paths, names=["a", "b"])) == ["a", "b"]
    for bad, message in (
        ({"names": ["a"]}, "got 1 names for 2 files"),
        ({"names": ["a", "a"]}, "different names"),
        ({"overrides": ["lineal:train.lr=1"]}, "did you mean 'linear'"),
        ({"overrides": ["linear:train.lr=-1"]}, "arm linear: .*train.lr"),
        ({"study": "modes"}, "got both"),
    ):
        with pytest.raises(InputError, match=message):
            read_arms(paths, **bad)
    with pytest.raises(InputError, match="did you mean 'modes'"):
        read_arms([], study="mode")


def test_standing_studies_are_shipped() -> None:
    arms = read_arms([], study="modes", overrides=["model.backbone=tiny"])
    assert list(arms) == ["full", "lora", "dora", "apla", "partial"]
    assert [arm.train.mode for arm in arms.values()] == list(arms)
    pair = read_arms([], study="explora", overrides=["explora:model.backbone=adapted"])
    assert [arm.model.backbone for arm in pair.values()] == ["tiny", "adapted"]
    assert pair["none"].train == pair["explora"].train


def test_no_comparison_is_refused_before_anything_is_trained(labels: Path, tmp_path: Path) -> None:
    two = {"full": config(), "linear": config("train.mode=linear")}
    for arms, options, message in (
        ({"full": config()}, {}, "two arms or more"),
        ({"full": config(), "again": config("seed=4")}, {}, "same configuration for full and again"),
        ({"full": config(), "../x": two["linear"]}, {}, "usable as folders"),
        (two, {"seeds": 0}, "seeds must be 1 or more"),
        (two, {"metric": "acuracy"}, "did you mean 'accuracy'"),
        (two, {"level": 1.0}, "level must be inside"),
    ):
        with pytest.raises(InputError, match=message):
            compare(tmp_path / "out", labels, arms, **options)
    with pytest.raises(InputError, match="which is not there"):
        compare(tmp_path / "out", labels.parent / "nothing.csv", two)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="new or empty folder"):
        compare(tmp_path / "other", labels, two)
    assert not (tmp_path / "out" / "full").exists()


# ---------------------------------------------------------------------------------------------- the whole way


def test_near_duplicates_that_are_too_many_can_be_accepted_as_told(labels: Path, tmp_path: Path) -> None:
    pool = shutil.copytree(labels.parent, tmp_path / "pool")
    rows = list(csv.DictReader(labels.read_text().splitlines()))
    more = [{**rows[0], "file": f"{number}.jpg", "group": f"copy {number}"} for number in range(20)]
    for row in more:
        shutil.copy(pool / rows[0]["file"], pool / row["file"])
    write_csv(pool / "labels.csv", [*rows, *more], list(rows[0]))
    given = Compare.of(data=pool / "labels.csv", out=tmp_path / "out")
    arms = {"a": config(), "b": config()}
    with pytest.raises(InputError, match=r"--max-component 0\.\d+") as refused:
        _split_all(given, arms, [0])
    share = float(str(refused.value).rpartition("--max-component ")[2])
    _split_all(given.model_copy(update={"max_component": share}), arms, [0])
    assert (tmp_path / "out" / "a" / "seed0" / "splits.json").is_file()


@pytest.fixture(scope="module")
def compared(labels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms in two seeds, without val_test so far."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    compare(out, labels, ARMS, seeds=2, test=False, n_replicates=100)
    return out


ARMS = {"full": config(), "linear": config("train.mode=linear")}


def times(out: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in out.glob("*/seed*/*") if p.name != ".lock"}


def test_the_chosen_arm_is_the_best_whichever_way_its_metric_points(
    labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are drawn, one arm wrong thrice as often; everything behind the training is the real thing."""

    def drawn(run: Path, _config: Path, seed: int, _log: Path) -> str:
        rng, splits, arm = np.random.default_rng(seed), Splits.read(run / "splits.json"), run.parent.name
        rows = splits.of("val_select")
        truth = np.array([splits.classes.index(row.label) for row in rows])
        wrong, sure = rng.random(truth.size) < {"good": 0.15, "bad": 0.45}[arm], rng.random(truth.size)
        logits = np.where(np.arange(2) == np.where(wrong, 1 - truth, truth)[:, None], sure[:, None], 0)
        text = np.array([row.id for row in rows])
        Predictions(
            text, np.array([row.group for row in rows]), text, text, logits.astype(np.float32),
            logits.astype(np.float32), (sure - wrong).astype(np.float32), truth, splits.classes, splits.positive,
            "val_select", splits.hashes["val_select"], "", "",
        ).save(run / "val_select.npz")  # fmt: skip
        (run / "val_calib.npz").touch()
        write_config(run, config(), splits)
        START.model_copy(update={"seed": seed, "split_hashes": splits.hashes}).write(run / "start.json")
        return ""

    monkeypatch.setattr(comparing, "_train", drawn)
    arms = {"bad": config(), "good": config("train.lr=2e-3")}
    for metric in ("accuracy", "augrc"):
        found, _ = compare(tmp_path / "out", labels, arms, seeds=2, test=False, n_replicates=50, metric=metric)
        value = {arm.name: {one.metric: one.value for one in arm.metrics}[metric] for arm in found.arms}
        assert (value["good"] > value["bad"]) is (metric == "accuracy")
        assert found.chosen == "good"
        assert {one.metric: one.n_better for one in found.differences} == dict.fromkeys(ARM_METRICS, 2)


@pytest.mark.slow
def test_a_comparison_from_labels_to_tables(labels: Path, compared: Path) -> None:
    found = Comparison.read(compared / "compare.json")
    assert [arm.name for arm in found.arms] == ["full", "linear"]
    assert found.chosen == min(found.arms, key=lambda a: {m.metric: m.value for m in a.metrics}["augrc"]).name
    for seed in (0, 1):
        same = {(compared / arm / f"seed{seed}" / "splits.json").read_bytes() for arm in ARMS}
        assert len(same) == 1
    tests = {Splits.read(p).hashes["val_test"] for p in compared.glob("full/seed*/splits.json")}
    assert len(tests) == 1
    full, linear = found.arms
    assert (full.mode, linear.mode) == ("full", "linear")
    assert linear.trainable_share < 0.2 < full.trainable_share
    for arm in found.arms:
        assert arm.n_timed == 2
        assert arm.seconds is not None and arm.seconds > 1
        assert arm.peak_memory is not None and 100 << 20 < arm.peak_memory < 4 << 30
        for one in arm.seeds:
            rows = Predictions.load(compared / arm.name / f"seed{one.seed}" / "val_select.npz")
            wrong = rows.logits_a.argmax(1) != rows.labels
            assert one.accuracy == pytest.approx(1 - wrong.mean())
            assert one.gate_augrc == pytest.approx(augrc(rows.gate_logits, wrong))
    assert {d.metric for d in found.differences} == set(ARM_METRICS)
    assert all(d.arm == "linear" and d.baseline == "full" for d in found.differences)
    text = (compared / "compare.md").read_text()
    assert text == markdown(found)
    assert "no augmented pixels: linear" in text
    lines = (compared / "compare.csv").read_text().splitlines()
    assert len(lines) == 5
    for name in ("differences", "accuracy_trained", "augrc_seconds"):
        assert (compared / "figures" / f"{name}.png").stat().st_size > 5000


@pytest.mark.slow
def test_finished_runs_are_skipped_and_val_test_is_read_once(
    labels: Path, compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    before = times(out)
    splits = Splits.read(out / "full" / "seed0" / "splits.json")
    first, tested = compare(out, labels, ARMS, seeds=2, n_replicates=100)
    assert times(out) == before
    assert tested is not None
    assert tested.split == "val_test"
    assert [arm.name for arm in tested.arms] == list(dict.fromkeys(["full", first.chosen]))
    assert tested.arms[0].seeds[0].n == len(splits.of("val_test"))
    written = (out / "test.json").stat().st_mtime_ns
    # present, it is read back: a photo of val_test that is gone is not missed
    again = compare(out, labels, ARMS, seeds=2, n_replicates=100)
    assert again == (first, tested)
    assert (out / "test.json").stat().st_mtime_ns == written
    for changed in ({"metric": "mcc"}, {"seeds": 1}):
        with pytest.raises(InputError, match="val_test must be read once"):
            compare(out, labels, ARMS, **{"seeds": 2, **changed})
    third, none = compare(out, labels, ARMS, seeds=1, test=False, n_replicates=100)
    assert none is None
    assert len(third.seeds) == 1
    _, second = compare(out, labels, ARMS, seeds=1, second_look=True, n_replicates=100)
    assert second is not None
    assert second.looks == [tested.chosen]
    with pytest.raises(InputError, match="name another folder"):
        compare(out, labels, ARMS, seeds=2, hold_split=True)
    with pytest.raises(InputError, match="arm linear .*train.lr"):
        compare(out, labels, {**ARMS, "linear": config("train.mode=linear", "train.lr=1e-4")}, second_look=True)
    capsys.readouterr()
    doctored = Start.read(out / "linear" / "seed1" / "start.json").model_copy(update={"heads": "other"})
    doctored.write(out / "linear" / "seed1" / "start.json")
    with pytest.raises(ArtifactError, match="seed 1 .*full and linear"):
        compare(out, labels, ARMS, seeds=2, test=False)


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True], ids=["with its training", "alone"])
def test_a_killed_comparison_goes_on(labels: Path, compared: Path, tmp_path: Path, alone: bool) -> None:
    out = tmp_path / "out"
    slow = ["--set", "train.epochs=40", "--set", "train.save_every_steps=1"]
    for name in ARMS:
        (tmp_path / f"{name}.yaml").write_text(
            f"train: {{mode: {name}, epochs: 1, batch_size: 32, workers: 0}}\ngate: {{fit: joint}}\n"
        )
    command = [
        sys.executable, "-m", "stage1_pro.cli", "compare", "--data", str(labels), "--out", str(out), "--seeds", "1",
        "--config", str(tmp_path / "linear.yaml"), str(tmp_path / "full.yaml"), "--no-test", "--replicates", "100",
    ]  # fmt: skip
    process = subprocess.Popen([*command, *slow], stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 240
    while not (out / "full" / "seed0" / "last.pth").is_file():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    if alone:
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {p: p.stat().st_mtime_ns for p in (out / "linear" / "seed0").iterdir() if p.name != ".lock"}
    assert not (out / "full" / "seed0" / "val_calib.npz").exists()
    done = subprocess.run([*command, *slow, "--json"], capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)["val_select"]
    assert "finished before" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    linear, full = result["arms"]
    assert (linear["n_timed"], full["n_timed"]) == (1, 0)
    assert full["seconds"] is None
    # A training that was not killed is waited for, not begun again.
    assert ("resumed at epoch" in (out / "logs" / "full-seed0.log").read_text()) is not alone


@pytest.mark.slow
def test_a_broken_arm_is_named_and_the_others_are_kept(
    labels: Path, compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(compared, out)
    before = times(out)
    arms = {"broken": config("model.backbone=./nowhere"), **ARMS}
    with pytest.raises(TrainingError, match=r"1 of 3 did not: arm broken, seed 0: model.backbone must be .*nowhere"):
        compare(out, labels, arms, seeds=2, test=False)
    assert {k: v for k, v in times(out).items() if "/broken/" not in k} == before
    assert "nowhere" in (out / "logs" / "broken-seed0.log").read_text()
    assert not (out / "logs" / "broken-seed1.log").exists()
    # mended under the same name: nothing was trained with the old configuration
    found, _ = compare(out, labels, {**ARMS, "broken": config("train.lr=1e-4")}, seeds=1, test=False, n_replicates=50)
    assert [arm.name for arm in found.arms] == ["full", "linear", "broken"]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = capsys.readouterr().out
    for word in ("--study", "--second-look", "[NAME:]KEY=VALUE", "val_test", "stage1 help compare"):
        assert word in text
    assert main(["compare", "--data", "x", "--out", "y"]) == 2
    assert "--config or --study, got neither" in capsys.readouterr().err


def test_an_arm_starts_from_one_backbone_in_every_seed(tmp_path: Path) -> None:
    """A folder whose weights changed between two calls would mix two backbones in one column."""
    base = tmp_path / "explora" / "backbone"
    base.mkdir(parents=True)
    arms = {"A": build_config({"model": {"backbone": str(base)}}), "tiny": Config()}
    for seed, print_ in enumerate(("b", "b")):
        for name in arms:
            (tmp_path / name / f"seed{seed}").mkdir(parents=True)
            own = print_ if name == "A" else str(seed)
            START.model_copy(update={"base_fingerprint": own}).write(tmp_path / name / f"seed{seed}" / "start.json")
    assert comparing._check_bases(tmp_path, arms, [0, 1]) == []
    (base.parent / "explora.json").write_text("{}")
    assert "may have been in its pool" in comparing._check_bases(tmp_path, arms, [0, 1])[0]
    START.model_copy(update={"base_fingerprint": "c"}).write(tmp_path / "A" / "seed1" / "start.json")
    with pytest.raises(ArtifactError, match="arm A must start from the same backbone"):
        comparing._check_bases(tmp_path, arms, [0, 1])
