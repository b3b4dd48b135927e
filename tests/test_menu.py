"""What can be asked of exits: limits of several risks and a least coverage, certified or not, by either score."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from stage1_pro import cli
from stage1_pro.config import CalibrateConfig, Config
from stage1_pro.errors import InputError, NotReachableError
from stage1_pro.policies.bounds import betting_p_value
from stage1_pro.policies.candidates import Means
from stage1_pro.policies.gate import GateParams
from stage1_pro.policies.policy import Policy, risk_of
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.softmax import Thresholds, confidence
from stage1_pro.policies.target import Gate, Softmax, parse_target, settle_target

RISKS = ("exit_error", "fnr", "cascade_error", "disagreement")


def rows_of(rng: np.random.Generator, n: int, *, n_classes: int = 3, halves: bool = True, **more: Any) -> Rows:
    """Rows of two stages, of which the second is stronger; scores come in a few values, so that there are ties."""
    labels = rng.integers(0, n_classes, n)

    def stage(strength: float) -> Any:
        logits = rng.normal(size=(n, n_classes)) + strength * np.eye(n_classes)[labels]
        powers = np.exp(np.round(logits, 1))
        return powers / powers.sum(axis=1, keepdims=True)

    first, second = stage(3.0), stage(4.0)
    gate = np.round(4 * (first.max(axis=1) - 0.5) + rng.normal(size=n), 1)
    gate[rng.random(n) < 0.02] = np.nan
    return Rows.of(
        first, labels, classes=[f"class {i}" for i in range(n_classes)], positive="class 1", gate=gate,
        probs_b=second, halves=np.where(np.arange(n) < n // 3, "fit", "certify") if halves else None,
        rows_independent=not more, told_apart=True, **more,
    )  # fmt: skip


def slow_risk(name: str, rows: Rows, exited: Any, of: str = "class 1") -> tuple[int, int]:
    """Errors and trials, row by row."""
    errors = trials = 0
    for i, out in enumerate(exited):
        a, b, label = rows.probs[i].argmax(), rows.probs_b[i].argmax(), rows.labels[i]
        if name == "cascade_error":
            errors, trials = errors + int((a if out else b) != label), trials + 1
        elif out and (name != "fnr" or rows.classes[label] == of):
            errors, trials = errors + int(a != (b if name == "disagreement" else label)), trials + 1
    return errors, trials


@pytest.mark.parametrize("policy", ["softmax", "gate"])
@pytest.mark.parametrize("asked", [{name: 0.12} for name in RISKS] + [
    {"fnr": 0.2, "fnr_class": "class 2", "exit_error": 0.15}, {"cascade_error": 0.1, "least_coverage": 0.3},
])  # fmt: skip
def test_the_empirical_choice_is_the_laxest_that_meets_every_limit(policy: str, asked: dict[str, Any]) -> None:
    rows = rows_of(np.random.default_rng(3), 240)
    target = parse_target({"policy": policy, "guarantee": "none", **asked})
    kind = Thresholds if policy == "softmax" else GateParams
    found: Any = kind.fit(target, rows)
    score = found.scores(rows.probs, rows.gate)

    def holds(exited: Any) -> bool:
        of = asked.get("fnr_class", "class 1")
        counted = {name: slow_risk(name, rows, exited, of) for name in RISKS if name in asked}
        return exited.mean() >= asked.get("least_coverage", 0) and all(
            m > 0 and k <= asked[name] * m for name, (k, m) in counted.items()
        )

    good = [one for one in np.unique(score[~np.isnan(score)]) if holds(score >= one)]
    assert found.n_exited == int((score >= good[0]).sum())
    assert found.target == target and found.promises == ()


@pytest.mark.parametrize("asked", [{name: 0.15} for name in RISKS] + [{"exit_error": 0.15, "least_coverage": 0.2}])
def test_a_certificate_is_the_walk_of_exact_tests(asked: dict[str, Any]) -> None:
    """Every threshold of the fit rows from where the walk began, strict to lax, until one fails."""
    rows = rows_of(np.random.default_rng(5), 1500)
    target = Softmax(**asked)
    policy = Thresholds.fit(target, rows)
    made, kept = policy.certificate, rows.where(rows.halves == "certify")
    assert made is not None
    score, fit = confidence(kept.probs), confidence(rows.probs)[rows.halves == "fit"]

    def passes(threshold: float) -> bool:
        tests = []
        for name in RISKS:
            if name in asked:
                k, m = slow_risk(name, kept, score >= threshold)
                tests.append(binom.cdf(k, m, asked[name]) if m else 1.0)
        if "least_coverage" in asked:
            tests.append(binom.sf(int((score >= threshold).sum()) - 1, score.size, asked["least_coverage"]))
        return max(tests) <= 0.05

    middles = sorted({(a + b) / 2 for a, b in itertools.pairwise(sorted({*fit, 1 / 3}))}, reverse=True)
    walk = [one for one in middles if one <= made.first_candidate + 1e-12]
    assert walk and passes(walk[0])
    last = next((i for i, one in enumerate(walk) if not passes(one)), len(walk)) - 1
    assert policy.exit_threshold == pytest.approx(walk[last])
    for one in made.risks:
        name = {"exit error": "exit_error", "FNR on exits": "fnr"}.get(one.name, one.name.replace(" ", "_"))
        assert (one.errors, one.trials) == slow_risk(name, kept, score >= policy.exit_threshold)
    assert policy.target == target
    assert {one.quantity for one in policy.promises} == {one.quantity for one in target.promises("class 1")}


def test_betting_on_sums_counts_what_is_not_accepted() -> None:
    """A limit of the cascade's error, of photos: losses and weights of whole groups."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), rng.integers(1, 6, 60))
    rows = rows_of(rng, groups.size, halves=False, groups=groups)
    (asked,) = Softmax(cascade_error=0.2, unit="photo", largest_group=5).promises("class 1")
    risk, score = risk_of(asked, rows), confidence(rows.probs)
    tests = Means(score, [risk], groups, np.array([0.6]), 0.05, None, False, 0, 5, [0.1, 0.1])
    wrong = np.where(score >= 0.6, rows.wrong, rows.probs_b.argmax(axis=1) != rows.labels)
    order = np.random.default_rng(0).permutation(60)[groups]
    loss, whole = np.bincount(order, wrong, 60) / 5, np.bincount(order, minlength=60) / 5
    expected = betting_p_value(loss, 0.2, 0.05, weights=whole, variance=0.2 * 0.8 * 0.1)
    assert tests.p_risk(np.array([0])) == pytest.approx([expected])


def test_checks_count_the_same() -> None:
    rows = rows_of(np.random.default_rng(9), 900)
    for asked in ({"cascade_error": 0.2}, {"disagreement": 0.2}, {"exit_error": 0.2, "fnr": 0.3}):
        policy = Thresholds.fit(Softmax(**asked), rows)
        fresh = rows_of(np.random.default_rng(10), 700, halves=False)
        for name, check in zip(asked, policy.check(fresh).promises, strict=True):
            assert (check.errors, check.trials) == slow_risk(name, fresh, policy.exits(fresh.probs))
            assert check.limit == asked[name] and check.outcome in ("PASS", "INCONCLUSIVE")


def laws() -> Iterator[tuple[str, Any]]:
    """Ten laws of (p, score) -> error of Stage A and of Stage B: a draw of n rows, and n is free."""

    def law(rise: Any, *, positives: float = 0.5, ties: int = 0, b: float = 0.02, n_classes: int = 2) -> Any:
        def draw(n: int, rng: np.random.Generator) -> Rows:
            u = rng.random(n)
            score = np.floor(u * ties) / ties if ties else u
            labels = (rng.random(n) < positives).astype(np.int64)
            if n_classes > 2:
                labels = rng.integers(0, n_classes, n)
            wrong, wrong_b = rng.random(n) < rise(u), rng.random(n) < b
            answer, answer_b = ((labels + one * rng.integers(1, n_classes, n)) % n_classes for one in (wrong, wrong_b))
            least = 1 / n_classes
            surest = least + (1 - least) * (0.01 + 0.98 * score)
            probs = np.full((n, n_classes), ((1 - surest) / (n_classes - 1))[:, None])
            probs[np.arange(n), answer] = surest
            second = np.full((n, n_classes), 0.1 / (n_classes - 1))
            second[np.arange(n), answer_b] = 0.9
            return Rows.of(
                probs, labels, classes=[str(i) for i in range(n_classes)], positive="1", probs_b=second,
                rows_independent=True, told_apart=True,
            )  # fmt: skip

        return draw

    yield "steep", law(lambda u: 0.3 * (1 - u) ** 4)
    yield "flat", law(lambda u: 0.04 + 0 * u)
    yield "at the limit", law(lambda u: 0.06 + 0 * u)
    yield "not monotone", law(lambda u: 0.05 + 0.045 * np.sin(9 * u))
    yield "worst at the top", law(lambda u: 0.02 + 0.1 * (u > 0.9))
    yield "noisy top", law(lambda u: 0.03 + 0.3 * (1 - u) ** 6)
    yield "ties", law(lambda u: 0.3 * (1 - u) ** 4, ties=6)
    yield "imbalance", law(lambda u: 0.2 * (1 - u) ** 2, positives=0.1)
    yield "poor Stage B", law(lambda u: 0.25 * (1 - u) ** 4, b=0.1)
    yield "five classes", law(lambda u: 0.4 * (1 - u) ** 3, n_classes=5)


def false_certificates(draw: Any, asked: dict[str, Any], draws: int, n: int) -> tuple[int, int]:
    """Among so many calibrations: thresholds that truly violate, on a world of 200,000 rows; and thresholds at all."""
    world = draw(200_000, np.random.default_rng(1))
    score = confidence(world.probs)
    target, false, found = Softmax(allow_useless=True, **asked), 0, 0
    risks = [(risk_of(one, world), one) for one in target.promises("1")]
    for seed in range(draws):
        rows = draw(n + n // 2, np.random.default_rng([2, seed]))
        rows = replace(rows, halves=np.where(np.arange(rows.labels.size) < n // 2, "fit", "certify"))
        try:
            policy = Thresholds.fit(target, rows)
        except NotReachableError:
            continue
        found += 1
        outcomes = [risk.outcomes(score >= policy.exit_threshold) for risk, _ in risks]
        # The world is a draw as well: three of its standard errors are no violation.
        false += any(
            errors.sum() / trials.sum() > one.limit + 3 * (one.limit / trials.sum()) ** 0.5
            for (errors, trials), (_, one) in zip(outcomes, risks, strict=True)
        )
    return false, found


ASKED = [{"exit_error": 0.06}, {"fnr": 0.06}, {"cascade_error": 0.06}, {"disagreement": 0.08},
         {"exit_error": 0.06, "fnr": 0.08}]  # fmt: skip


@pytest.mark.parametrize("asked", ASKED, ids="+".join)
def test_promises_are_false_as_rarely_as_they_say_where_errors_lie_at_the_limit(asked: dict[str, Any]) -> None:
    draw = dict(laws())["not monotone"]
    false, _ = false_certificates(draw, asked, 60, 400)
    assert false <= binom.ppf(0.9999, 60, 0.05)


@pytest.mark.slow
@pytest.mark.parametrize("asked", ASKED, ids="+".join)
def test_promises_are_false_as_rarely_as_they_say_under_ten_laws(asked: dict[str, Any]) -> None:
    certified = 0
    for name, draw in laws():
        false, found = false_certificates(draw, asked, 200, 500)
        certified += found
        # Over fifty cells one in 10,000 each.
        assert false <= binom.ppf(0.9999, 200, 0.05), (name, false)
    assert certified > 400, "most laws can be certified"


def test_older_names_mean_the_same_and_the_same_words_are_the_same_claim() -> None:
    assert parse_target({"policy": "gate", "max_exit_error": 0.02, "min_coverage": 0.5, "target_fnr": 0.1}) == Gate(
        exit_error=0.02, least_coverage=0.5, fnr=0.1
    )
    assert settle_target(None, {"policy": "gate", "alpha": 0.02}) == Gate(exit_error=0.02)
    assert parse_target({"policy": "softmax", "target_fnr": 0.02}) == Softmax(fnr=0.02)
    assert Softmax().exit_error == Gate().exit_error == 0.05 and Softmax(fnr=0.1).exit_error is None
    # As the first version wrote them into claims.json.
    assert Softmax(fnr=0.02).key() == "FNR on exits <= 0.02"
    assert Gate(exit_error=0.01, least_coverage=0.7).key() == "coverage >= 0.7, exit error <= 0.01"
    with pytest.raises(InputError, match="max_exit_error and exit_error must not both be given"):
        parse_target({"policy": "gate", "max_exit_error": 0.02, "exit_error": 0.02})
    with pytest.raises(InputError, match="fnr_class must go with fnr"):
        parse_target({"policy": "gate", "fnr_class": "barrier"})
    with pytest.raises(InputError, match="fnr_class must be"):
        Thresholds.fit(Softmax(fnr=0.1, fnr_class="barrier"), rows_of(np.random.default_rng(0), 60))
    with pytest.raises(InputError, match="probs_b must be given"):
        Thresholds.fit(Softmax(disagreement=0.1), replace(rows_of(np.random.default_rng(0), 60), probs_b=None))


FIRST = {"target_fnr": 0.02, "max_exit_error": 0.01, "min_coverage": 0.7, "target_fnr_exit": None}


@pytest.mark.parametrize(("given", "target"), [
    ({"policy": "softmax", **FIRST}, Softmax(fnr=0.02)),
    ({"policy": "gate", **FIRST}, Gate(exit_error=0.01, least_coverage=0.7)),
    ({"policy": "gate", **FIRST, "target_fnr_exit": 0.1}, Gate(exit_error=0.01, least_coverage=0.7, fnr=0.1)),
    ({"target_fnr": 0.1}, Softmax(fnr=0.1)),
    ({"policy": "gate", "max_exit_error": 0.03}, Gate(exit_error=0.03)),
])  # fmt: skip
def test_configurations_of_the_first_version_ask_for_what_they_asked_for(given: dict[str, Any], target: Any) -> None:
    config = CalibrateConfig.model_validate(given)
    assert settle_target(config, {}) == target
    again = Config.model_validate_json(Config(calibrate=config).model_dump_json()).calibrate
    assert again == config
    # A risk on the command line takes the place of those of the configuration.
    assert settle_target(config, {"cascade_error": 0.2}).promises("")[-1].quantity == "cascade error"
    assert len(settle_target(config, {"cascade_error": 0.2, "policy": "softmax"}).promises("")) <= 2


def test_policies_of_the_first_version_are_read(tmp_path: Path) -> None:
    rows = rows_of(np.random.default_rng(5), 1500)
    for target, new in ((Softmax(fnr=0.2), ("limits",)), (Gate(exit_error=0.2, least_coverage=0.1), ("limits",))):
        kind: type[Policy] = Thresholds if isinstance(target, Softmax) else GateParams
        policy = kind.fit(target, rows)
        values = json.loads(policy.model_dump_json())
        newer = (*new, "unlabelled", *(("exit_error", "exit_error_upper_bound", "n_errors", "n_exited_groups")
                                       if kind is Thresholds else ()))  # fmt: skip
        file = tmp_path / "policy.json"
        file.write_text(json.dumps({name: one for name, one in values.items() if name not in newer}))
        read = kind.read(file)
        assert read.target == policy.target == target and read.promises == policy.promises
        assert read.measured() and read.found()


def test_older_flags_still_work_and_say_what_they_are_called_now(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of(np.random.default_rng(5), 900, n_classes=2)
    np.savez(
        tmp_path / "mine.npz", probs=rows.probs, probs_b=rows.probs_b, labels=rows.labels, gate_logits=rows.gate,
        classes=rows.classes,
    )  # fmt: skip
    words = ["calibrate", "--logits", str(tmp_path / "mine.npz"), "--rows-independent", "--json"]
    found = []
    for older, newer in (
        (["--target-fnr", ".3", "--class", "class 1"], ["--fnr", ".3", "--class", "class 1"]),
        (["--policy", "gate", "--alpha", ".3", "--min-coverage", ".1"],
         ["--policy", "gate", "--exit-error", ".3", "--least-coverage", ".1"]),
    ):  # fmt: skip
        for flags in (older, newer):
            assert cli.main([*words, *flags]) == 0
            out, err = capsys.readouterr()
            found.append(json.loads(out))
            assert ("is called" in err) == (flags is older)
        assert found[-1] == found[-2]
    assert cli.main([*words, "--cascade-error", ".2", "--class", "class 1"]) == 2
    assert "fnr_class must go with fnr" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(once: Any, streets: Path) -> Path:
    """A run of two stages that differ, trained for an epoch on rendered streets."""
    pytest.importorskip("torch")
    import stage1_pro

    def make(folder: Path) -> None:
        run = folder / "run"
        stage1_pro.split(streets / "labels.csv", run, seed=0)
        model = {"backbone": "tiny", "image_size": 32, "tap": 1}
        values = {"model": model, "train": {"epochs": 1, "workers": 0}, "gate": {"folds": 2}}
        stage1_pro.train(run, config=Config.model_validate(values))

    return once("menu", make) / "run"


def test_photos_without_labels_certify_agreement(
    trained: Path, streets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They make a claim of their own; photos of the run's own splits are no new photos."""
    from stage1_pro.data.synthetic import render_pool

    run, pool = tmp_path / "run", tmp_path / "pool"
    shutil.copytree(trained, run)
    render_pool(pool, 90, seed=8, size=48)
    (pool / "labels.csv").unlink()
    words = ["calibrate", "--run", str(run), "--unlabelled", str(pool), "--json"]
    assert cli.main([*words, "--disagreement", ".3"]) == 2
    assert "--rows-independent must state" in capsys.readouterr().err
    assert cli.main([*words, "--exit-error", ".3", "--rows-independent"]) == 2
    assert "must go with --disagreement alone" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != ".lock"}
    assert not any(path.name == "claims.json" for path in before)
    assert cli.main([*words, "--disagreement", ".4", "--rows-independent"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    (risk,) = found["certificate"]["risks"]
    n = found["certificate"]["n"]
    # Those that look alike are one group.
    assert f"90 photos without labels in {n} groups; left out: 0 that show photos of the run" in err
    assert risk["name"] == "disagreement" and n > 80 and found["unlabelled"]
    assert found["exit_error"] is None and found["n_errors"] is None and found["fnr_on_exited"] is None
    assert any("photos without labels" in one for one in found["certificate"]["assumptions"])
    # The same claim may be repeated; another one on the same photos may not be made.
    assert cli.main([*words, "--disagreement", ".4", "--rows-independent"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert cli.main([*words, "--disagreement", ".3", "--rows-independent"]) == 2
    assert "certify nothing more" in capsys.readouterr().err
    # Photos of the run's own splits are no new photos.
    own = [
        "calibrate",
        "--run",
        str(run),
        "--unlabelled",
        str(Path(json.loads((run / "splits.json").read_text())["root"])),
    ]
    assert cli.main([*own, "--disagreement", ".4"]) in (2, 3)
