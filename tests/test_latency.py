"""The latency harness: every call a sample, intervals that cover, exact deferral rates, and the stations around it."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit.tiny import copy_run, make_images
from PIL import Image

from stage1_pro.cli import main
from stage1_pro.commands.bench import BenchLatency, render_comparison, render_latency
from stage1_pro.deploy.bench import LatencyBench, LatencyComparison, bench_latency, compare_latency, draw_latency
from stage1_pro.deploy.timing import (
    Sampling,
    Subject,
    clocks,
    cold_starts,
    deferrals,
    draw_photos,
    quantiles,
    ratios,
    sample,
)
from stage1_pro.errors import ArtifactError, InputError


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_run(tiny, tmp_path_factory.mktemp("latency") / "run")


@pytest.fixture(scope="module")
def bundle(run: Path) -> Path:
    return run / "bundle"


@pytest.fixture(scope="module")
def found(bundle: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LatencyBench, Path]:
    out = tmp_path_factory.mktemp("out")
    photos = make_images(out / "photos", 3)[0].parent
    asked = BenchLatency(
        bundle=bundle, run=run, batch=[1, 4], rates=[0, 0.5, 1], quick=True, samples=20, warmup=1, photos=photos,
        against=["torch-eager", "onnxruntime"], out=out, threads=1,
    )  # fmt: skip
    return bench_latency(asked), out


class TestSampling:
    def test_every_call_is_one_sample_in_rounds_of_changing_order(self) -> None:
        seen: list[tuple[str, int]] = []

        def contestant(name: str) -> Any:
            def call(number: int) -> dict[str, float]:
                seen.append((name, number))
                return {"host": number + (name == "b") / 2}

            return call

        result = sample({name: contestant(name) for name in "abc"}, Sampling(40, warmup=0, limit=60, seed=3))
        kept = seen[9:]
        assert [number for _, number in kept] == [i for i in range(40) for _ in range(3)]
        orders = {tuple(name for name, number in kept if number == i) for i in range(40)}
        assert len(orders) == 6 and all(sorted(order) == ["a", "b", "c"] for order in orders)
        np.testing.assert_array_equal(result["b"]["host"], np.arange(40) + 0.5)

    def test_limit_ends_it_after_ten(self) -> None:
        result = sample({"a": lambda number: {"host": 1.0}}, Sampling(1000, warmup=0, limit=1e-9))
        assert len(result["a"]["host"]) == 10

    def test_warm_up_lasts_as_long_as_asked_for(self) -> None:
        calls: list[float] = []

        def call(number: int) -> dict[str, float]:
            calls.append(time.perf_counter())
            return {"host": 0.0}

        sample({"a": call}, Sampling(1, warmup=0.05, limit=1))
        assert calls[-1] - calls[0] >= 0.049

    def test_a_visit_repeats_a_short_call_and_keeps_the_mean(self) -> None:
        calls: list[int] = []

        def call(number: int) -> dict[str, float]:
            calls.append(number)
            time.sleep(0.004)
            return {"host": float(len(calls))}

        result = sample({"a": call}, Sampling(3, visit=0.02))["a"]["host"]
        repeats = calls.count(2) - 1
        assert (
            repeats >= 2
            and len(calls) == 3 + 3 * repeats
            and calls[3:] == [n for n in range(3) for _ in range(repeats)]
        )
        np.testing.assert_allclose(result, [4 + n * repeats + (repeats - 1) / 2 for n in range(3)])

    def test_two_clocks(self) -> None:
        asleep = clocks(lambda: time.sleep(0.03))(0)
        assert asleep["wall"] >= 0.03 > 3 * asleep["processor"]

    @pytest.mark.parametrize("batch", [1, 8, 5])
    @pytest.mark.parametrize("rate", [0, 0.1, 0.3, 0.5, 1])
    def test_deferral_rate_is_exact_over_calls(self, batch: int, rate: float) -> None:
        exited = np.array([deferrals(batch, rate, number, seed=0) for number in range(100)])
        assert (~exited).sum() == round(100 * batch * rate)
        sizes = (~exited).sum(axis=1)
        assert sizes.max() - sizes.min() <= 1
        if 0 < rate < 1:
            assert len({row.tobytes() for row in exited}) > 1


class TestIntervals:
    def test_quantiles_are_those_of_the_samples(self) -> None:
        seconds = np.random.default_rng(0).gamma(3, 1e-3, 1000)
        for one in quantiles(seconds):
            assert one.milliseconds == pytest.approx(1e3 * np.quantile(seconds, one.q))
            assert one.low is not None and one.high is not None and one.low <= one.milliseconds <= one.high

    def test_too_few_samples_have_no_tail(self) -> None:
        p50, p90, p95, p99 = quantiles(np.arange(1, 21) / 1e3)
        assert p50.milliseconds == pytest.approx(10.5) and p90.low is not None and p95.milliseconds is not None
        assert p99.milliseconds is None and p99.low is None

    def test_intervals_cover(self) -> None:
        """Of medians of independent draws at 95%; 40 draws, at least 33 covered (a chance of 1e-4 to fall below)."""
        truth = 1e3 * np.log(2)
        covered = 0
        for seed in range(40):
            p50 = quantiles(np.random.default_rng(seed).exponential(1.0, 400), seed=seed)[0]
            assert p50.low is not None and p50.high is not None
            covered += p50.low <= truth <= p50.high
        assert covered >= 33

    def test_slow_stretches_make_them_wider(self) -> None:
        """The same values, in stretches and shuffled: blocks see that neighbours are alike."""
        rng = np.random.default_rng(0)
        stretches = np.repeat(rng.gamma(4, 1.0, 50), 20)
        shuffled = rng.permutation(stretches)
        wide, narrow = (quantiles(values)[0] for values in (stretches, shuffled))
        assert wide.high - wide.low > 2 * (narrow.high - narrow.low)  # type: ignore[operator]

    def test_ratios(self) -> None:
        rng = np.random.default_rng(0)
        base = rng.gamma(20, 1e-3, 1000)
        (mean, p50, *_rest, p99) = ratios(1.3 * base, base, paired=True)
        assert mean.q is None and p50.q == 0.5 and p99.q == 0.99
        assert mean.ratio == pytest.approx(1.3) and mean.high - mean.low < 1e-9
        for seed in range(3):
            other = np.random.default_rng(seed + 5).gamma(20, 1e-3, 800)
            value = ratios(other, base, paired=False)[1]
            assert value.low < value.ratio < value.high and 0.9 < value.ratio < 1.1

    def test_pairing_takes_out_what_both_saw(self) -> None:
        rng = np.random.default_rng(1)
        weather = np.repeat(rng.gamma(2, 1.0, 50), 20)
        ours, theirs = (weather * rng.normal(1, 0.01, 1000) for _ in range(2))
        paired, apart = (ratios(ours, theirs, paired=flag)[0] for flag in (True, False))
        assert paired.high - paired.low < 0.2 * (apart.high - apart.low)


class TestBench:
    def test_what_is_in_it(self, found: tuple[LatencyBench, Path]) -> None:
        result, out = found
        assert LatencyBench.read(out / "latency.json") == result
        keys = {one.key() for one in result.series}
        assert keys == {
            *(("stage_a", "host", batch, None) for batch in (1, 4)),
            *(("cascade", "host", batch, rate) for batch in (1, 4) for rate in (0, 0.5, 1)),
            *(("request", part, 1, 0.3) for part in ("decode", "resize", "model", "total")),
        }
        assert all(one.n == 20 == len(one.milliseconds) and not one.enough for one in result.series)
        assert all(one.within is None and one.p99 is None for one in result.throughput)
        (cold,) = result.cold
        assert cold.cache == "none" and cold.total > cold.load + cold.first
        parts = {one.part: one for one in result.series if one.contestant == "request"}
        together = np.sum([parts[part].milliseconds for part in ("decode", "resize", "model")], axis=0)
        np.testing.assert_allclose(together, parts["total"].milliseconds, atol=1e-3)
        with Image.open(io.BytesIO((out / "latency.png").read_bytes())) as figure:
            assert figure.format == "PNG" and figure.width > 500
        assert draw_latency(result) == (out / "latency.png").read_bytes()

    def test_peers_answer_alike_on_the_same_inputs(self, found: tuple[LatencyBench, Path]) -> None:
        result, _ = found
        assert [(peer.name, peer.batch) for peer in result.peers] == [
            (name, batch) for batch in (1, 4) for name in ("torch-eager", "onnxruntime")
        ]
        for peer in result.peers:
            assert peer.skipped is None and peer.flips == 0
            assert peer.logit is not None and peer.logit < 1e-4
            assert {one.q for one in peer.to_cascade} >= {None, 0.5}

    def test_render_says_what_it_is(self, found: tuple[LatencyBench, Path]) -> None:
        text = render_latency(found[0])
        for part in ("quick: 20 samples each, too few for a p99", "request, decode", "cold start", "torch-eager"):
            assert part in text

    def test_compare_with_itself_and_with_a_slower_one(self, found: tuple[LatencyBench, Path], tmp_path: Path) -> None:
        result, out = found
        slower = result.model_copy(
            update={
                "series": [
                    one.model_copy(update={"milliseconds": [2 * value for value in one.milliseconds]})
                    for one in result.series
                ],
                "photos": "others",
            }
        )
        slower.write(tmp_path / "slower.json")
        same = compare_latency(out / "latency.json", out / "latency.json")
        assert all(one.ratios[0].ratio == 1 for one in same.differences)
        twice = compare_latency(out / "latency.json", tmp_path / "slower.json", out=tmp_path / "c.json")
        assert LatencyComparison.read(tmp_path / "c.json") == twice
        for one in twice.differences:
            assert one.ratios[0].ratio == pytest.approx(2) and one.ratios[0].low < 2 < one.ratios[0].high
        assert any("photos differs" in caution for caution in twice.cautions)
        assert "below 1 the former is faster" in render_comparison(twice)

    def test_peer_that_cannot_run_says_why(self, bundle: Path) -> None:
        asked = BenchLatency(
            bundle=bundle, batch=[1], rates=[0], samples=10, warmup=0, against=["torch-eager"], quick=True
        )
        result = bench_latency(asked)
        (peer,) = result.peers
        assert peer.skipped == "a bundle holds no weights torch could load; name --run as well" and not peer.to_cascade
        assert "skipped: a bundle holds no weights" in render_latency(result)

    @pytest.mark.slow
    def test_run_in_torch(self, run: Path) -> None:
        result = bench_latency(BenchLatency(run=run, batch=[2], rates=[0.5], samples=10, warmup=0, quick=True))
        assert result.runtime == "torch" and result.steps == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "must get --bundle or --run"),
            ({"bundle": "b", "samples": 3}, "samples must be 10 or more, got 3"),
            ({"bundle": "b", "deferral": 2}, "deferral must be a share"),
            ({"bundle": "b", "limit": 0}, "limit must be above 0"),
            ({"bundle": "b", "budget": float("nan")}, "budget must be above 0"),
            ({"bundle": "b", "rates": [-1]}, "rates must be"),
            ({"bundle": "b", "against": ["torch-eagr"]}, "did you mean 'torch-eager'"),
            ({"bundle": "b", "runtime": "onnxruntme"}, "did you mean 'onnxruntime'"),
            ({"bundle": "b", "runtime": "torch"}, "name --run"),
        ],
    )  # fmt: skip
    def test_wrong_arguments(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            bench_latency(BenchLatency(**arguments))

    def test_cold_process_that_fails_gives_its_reason(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="fresh process must answer with onnxruntime, got: .*ArtifactError"):
            cold_starts(Subject(tmp_path, "onnxruntime", threads=1), repeats=1)

    def test_drawn_photos_are_jpegs_by_seed(self) -> None:
        one, two = draw_photos(2, (160, 90), 0)
        assert one != two and [one, two] == draw_photos(2, (160, 90), 0)
        with Image.open(io.BytesIO(one)) as image:
            assert image.format == "JPEG" and image.size == (160, 90)

    def test_command_line(
        self, bundle: Path, found: tuple[LatencyBench, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["bench", "latency", "--bundle", str(bundle), "--quick", "--samples", "10", "--batch", "1"]
        assert main([*arguments, "--rates", "0", "1", "--warmup", "0", "--out", str(tmp_path)]) == 0
        assert "bytes on" in capsys.readouterr().out
        files = [str(found[1] / "latency.json"), str(tmp_path / "latency.json")]
        assert main(["bench", "compare", "--json", *files]) == 0
        assert len(json.loads(capsys.readouterr().out)["differences"]) == 7
        assert main(["bench", "compare", files[0], str(tmp_path / "latency.png")]) == 4
        assert "readable JSON" in capsys.readouterr().err
