"""Claims follow photos, counts cost none, a refusal changes nothing; units of promises, by simulation of their laws."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fitting import fit_gate_policy, fit_scrc_policy, fit_softmax_policy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_certify import BINARY, files_of, gated, make_run

from stage1_pro import cli
from stage1_pro.commands.calibrate import calibrate
from stage1_pro.commands.split import split
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits, hash_splits
from stage1_pro.errors import InputError, NotReachableError, Stage1Error
from stage1_pro.metrics.binomial import clopper_pearson_lower, clopper_pearson_upper
from stage1_pro.policies.certificate import LABELS_RIGHT
from stage1_pro.policies.certify import certify_threshold
from stage1_pro.policies.checks import check_claim
from stage1_pro.policies.claims import Claims, close_claim, weigh_claim
from stage1_pro.policies.fitting import fit_policy
from stage1_pro.policies.policy import read_policy
from stage1_pro.policies.possible import foresee
from stage1_pro.policies.rows import Rows
from stage1_pro.policies.softmax import softmax
from stage1_pro.policies.target import Gate, Scrc, Softmax


def stderr(share: float, n: int) -> float:
    return math.sqrt(share * (1 - share) / n)


def recut(run: Path, seed: int, *, drop: int = 0, relabel: int = 0) -> None:
    """Cut the photos of a run anew, with some dropped and some labels mended; claims.json stays."""
    splits, predictions = Splits.read(run / "splits.json"), Predictions.load(run / "val_calib.npz")
    rng, n = np.random.default_rng(seed), len(splits.rows)
    keep = np.sort(rng.permutation(n)[: n - drop])
    halves = np.where(rng.permutation(keep.size) % 2 == 0, "fit", "certify")
    labels = predictions.labels[keep].copy()
    labels[:relabel] = 1 - labels[:relabel]
    rows = [
        splits.rows[i].model_copy(update={"half": half, "label": splits.classes[label]})
        for i, half, label in zip(keep.tolist(), halves.tolist(), labels.tolist(), strict=True)
    ]
    splits = splits.model_copy(update={"rows": rows, "hashes": hash_splits(rows), "seed": seed})
    splits.write(run / "splits.json")
    fields = ("row_ids", "groups", "sources", "logits_a", "logits_b", "gate_logits")
    kept = {name: getattr(predictions, name)[keep] for name in fields}
    changed = {**predictions.__dict__, **kept, "halves": halves, "labels": labels}
    Predictions(**{**changed, "split_hash": splits.hashes["val_calib"]}).save(run / "val_calib.npz")


# -------------------------------------------------------------------------------- counts


def hopeless(wish: dict[str, Any], n: int, positives: int, negatives: int) -> bool:
    """Whether not even perfect answers to all could certify it: powers of 1 - alpha, by hand."""
    delta = wish.get("delta", 0.05) / wish.get("claims", 1)
    if wish["policy"] == "softmax":
        return (1 - wish["target_fnr"]) ** positives > delta
    if wish["policy"] == "gate":
        return (1 - wish["max_exit_error"]) ** n > delta or wish["min_coverage"] ** n > delta
    if wish["min_coverage"] ** n > delta / 5:
        return True
    cells = [positives, negatives] if wish.get("cells") == "class" else [n]
    return any((1 - wish["alpha"]) ** m > 4 * delta / 5 / len(cells) for m in cells)


@st.composite
def wishes(draw: st.DrawFn) -> dict[str, Any]:
    rate = st.sampled_from([0.004, 0.01, 0.02, 0.05, 0.15, 0.4])
    policy = draw(st.sampled_from(["softmax", "gate", "scrc"]))
    none = draw(st.integers(0, 3)) == 0
    wish: dict[str, Any] = {"policy": policy, "guarantee": "none" if none else "ltt"}
    if policy == "softmax":
        wish["target_fnr"] = draw(rate)
    else:
        wish["min_coverage"] = draw(st.sampled_from([0.2, 0.7, 0.95]))
        wish["max_exit_error" if policy == "gate" else "alpha"] = draw(rate)
    if policy == "scrc":
        wish["cells"] = draw(st.sampled_from([None, "class", "stage"]))
    if not none and draw(st.booleans()):
        wish |= {"claims": draw(st.integers(1, 3)), "delta": draw(st.sampled_from([0.05, 0.2]))}
    return {name: value for name, value in wish.items() if value is not None}


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6), st.sampled_from([24, 120, 700]), st.lists(wishes(), min_size=2, max_size=6))
def test_a_refusal_changes_nothing_and_counts_cost_no_claim(
    tmp_path_factory: pytest.TempPathFactory, seed: int, n: int, asked: list[dict[str, Any]]
) -> None:
    run = tmp_path_factory.mktemp("run")
    predictions = make_run(run, n=n, seed=seed)
    kept = predictions.labels[predictions.halves == "certify"]
    positives = int((kept == BINARY["classes"].index(BINARY["positive"])).sum())
    for wish in asked:
        before = files_of(run)
        try:
            calibrate(run, **wish)
        except Stage1Error as error:
            after = files_of(run)
            refused, said = isinstance(error, InputError), str(error)
        else:
            after, refused, said = {}, False, ""
        ltt = wish["guarantee"] == "ltt"
        known = ltt and hopeless(wish, kept.size, positives, kept.size - positives)
        if not after:
            assert read_policy(run) is not None and not known
            continue
        assert "--guarantee none" not in said or ltt
        if refused or "unspent" in said:
            assert after == before
        else:
            assert not known, "this was known beforehand"
            assert {**after, "claims.json": b""} == {**before, "claims.json": b""}
            assert ("nothing was changed" in said) == (after == before)
            assert ("claim is spent" in said) == (ltt and after != before)


@pytest.mark.parametrize(
    ("more", "told", "changed"),
    [
        ({"claims": 3}, "one claim is spent, 2 are left", True), ({"claims": 2}, "one claim is spent, 1 is left", True),
        ({}, "one claim is spent, none is left", True), ({"guarantee": "none"}, "the look at these photos", True),
        ({"max_exit_error": 1e-5}, "nothing was changed", False),
    ],
)  # fmt: skip
def test_a_refusal_says_what_it_changed(tmp_path: Path, more: dict[str, Any], told: str, changed: bool) -> None:
    make_run(tmp_path, n=2000)
    before = files_of(tmp_path)
    wish = {"policy": "gate", "max_exit_error": 0.01, "min_coverage": 0.99, **more}
    with pytest.raises(NotReachableError, match=told) as error:
        calibrate(tmp_path, **wish)
    assert (files_of(tmp_path) != before) == changed == ("nothing was changed" not in str(error.value))
    if "claims" in more:
        # The same again is no further claim, and changes nothing.
        before = files_of(tmp_path)
        with pytest.raises(NotReachableError, match="nothing was changed"):
            calibrate(tmp_path, **wish)
        assert files_of(tmp_path) == before


def test_a_dry_run_shows_what_counts_allow_and_spends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path, n=400)
    before = files_of(tmp_path)
    arguments = ["calibrate", "--run", str(tmp_path), "--policy", "gate", "--exit-error", ".01", "--dry-run"]
    arguments += ["--least-coverage", ".7"]
    assert cli.main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    best = 1 - 0.05 ** (1 / 200)
    assert "out of reach: exit error at most 0.01: 200 rows, of at least 299" in said and "unspent" in said
    assert f"at best {math.ceil(best * 1e5) / 1e5:.4g} can be asked for" in said
    assert "possible: coverage at least 0.7" in said
    assert cli.main([*arguments, "--guarantee", "none", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["told"] == []
    assert files_of(tmp_path) == before
    calibrate(tmp_path, policy="gate", max_exit_error=0.3, min_coverage=0.3)
    assert cli.main(arguments) == 2
    assert "must serve one claim" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "n", "first"),
    [
        (Softmax(target_fnr=0.02), 149, True), (Softmax(target_fnr=0.02), 148, False),
        (Gate(max_exit_error=0.01), 299, True), (Gate(max_exit_error=0.01), 298, False),
        (Scrc(alpha=0.01), 321, True), (Scrc(alpha=0.01), 320, False),
    ],
)  # fmt: skip
def test_the_fewest_that_can_certify(target: Any, n: int, first: bool) -> None:
    labels = np.array([1] * (n + 1))
    rows = Rows.of(
        softmax(np.random.default_rng(0).normal(size=(n + 1, 2))), labels, classes=["a", "b"], positive="b",
        groups=np.arange(n + 1), halves=["fit"] + ["certify"] * n,
    )  # fmt: skip
    found = foresee(target, rows)
    assert all(one.possible for one in found) == first
    risk = found[-1]
    assert risk.best is not None and (risk.best <= risk.promise.limit) == first


def test_a_kill_at_any_moment_leaves_the_old_policy_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    make_run(tmp_path, n=4000)
    old = calibrate(tmp_path, policy="softmax", guarantee="none", target_fnr=0.2)
    seen = set()
    for moment in range(40):
        left = [moment]

        def dying(real: Any, left: list[int] = left) -> Any:
            def call(*given: Any, **options: Any) -> Any:
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                return real(*given, **options)

            return call

        with monkeypatch.context() as patch:
            for place, name in ((os, "replace"), (os, "rename"), (Path, "replace"), (Path, "unlink"), (os, "fsync")):
                patch.setattr(place, name, dying(getattr(place, name)))
            try:
                policy = calibrate(tmp_path, policy="gate", guarantee="none", max_exit_error=0.2)
            except KeyboardInterrupt:
                policy = None
        stands = read_policy(tmp_path)
        assert stands is not None
        seen.add(stands.policy)
        if policy is not None:
            assert stands == policy and [one.name for one in tmp_path.glob("*thresholds.json")] == []
            break
        if stands.policy == "gate":
            calibrate(tmp_path, policy="softmax", guarantee="none", target_fnr=0.2)
            assert read_policy(tmp_path) == old
    assert policy is not None and seen == {"softmax", "gate"}


# -------------------------------------------------------------------------------- cuts of the same photos


@pytest.mark.parametrize("change", [{}, {"drop": 1}, {"relabel": 1}, {"drop": 2000}])
def test_another_cut_of_the_same_photos_is_another_claim(tmp_path: Path, change: dict[str, int]) -> None:
    make_run(tmp_path, n=4000)
    wish = {"policy": "gate", "max_exit_error": 0.05}
    first = calibrate(tmp_path, **wish)
    recut(tmp_path, 1, **change)
    before = files_of(tmp_path)
    with pytest.raises(InputError, match="2 cuts that share photos or groups must serve one claim"):
        calibrate(tmp_path, **wish)
    assert files_of(tmp_path) == before and read_policy(tmp_path) == first
    # Photos that were never used begin anew, and only they do.
    make_run(tmp_path, n=4000, seed=7)
    policy = calibrate(tmp_path, **wish)
    assert not any("cut 2" in one for one in policy.certificate.assumptions)


def test_new_splits_in_the_same_folder_remember_what_photos_certified(streets: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = split(streets / "labels.csv", run)
    kept = first.of("val_calib", "certify")
    Claims().seen("half", [row.sha256 for row in kept], [row.group for row in kept]).write(run / "claims.json")
    (run / "last.pth").write_bytes(b"trained")
    before = (run / "claims.json").read_bytes()
    again = split(streets / "labels.csv", run, seed=1, overwrite=True)
    assert not (run / "last.pth").exists() and (run / "claims.json").read_bytes() == before
    photos, groups = zip(*[(row.sha256, row.group) for row in again.of("val_calib", "certify")], strict=True)
    shared = {one for row in kept for one in (row.sha256, row.group)} & {*photos, *groups}
    assert shared and Claims.of(run).seen("other", photos, groups).cuts("other") == ["half", "other"]


def test_cuts_share_the_delta_that_was_declared(tmp_path: Path) -> None:
    make_run(tmp_path, n=6000)
    wish = {"policy": "gate", "max_exit_error": 0.05}
    for cut in range(3):
        policy = calibrate(tmp_path, **wish, **({"claims": 3} if cut == 0 else {}))
        assert (policy.certificate.use, policy.certificate.claims) == (cut + 1, 3)
        assert policy.certificate.delta == pytest.approx(0.05 / 3)
        assert any(f"this is cut {cut + 1} of these photos" in one for one in policy.certificate.assumptions)
        assert LABELS_RIGHT in policy.certificate.assumptions and LABELS_RIGHT in policy.statement
        assert calibrate(tmp_path, **wish) == policy, "the same claim on the same cut is no new one"
        recut(tmp_path, 10 + cut)
    with pytest.raises(InputError, match="the 3 claims declared"):
        calibrate(tmp_path, **wish)


def test_halves_of_an_older_version_are_taken_to_share_photos(tmp_path: Path) -> None:
    make_run(tmp_path, n=4000)
    calibrate(tmp_path, policy="gate", max_exit_error=0.05)
    known = Claims.read(tmp_path / "claims.json").model_dump(mode="json")
    del known["rows"]
    (tmp_path / "claims.json").write_text(json.dumps(known))
    make_run(tmp_path, n=4000, seed=7)
    with pytest.raises(InputError, match="must serve one claim"):
        calibrate(tmp_path, policy="gate", max_exit_error=0.05)


def test_other_frames_of_the_same_clips_are_another_cut(tmp_path: Path) -> None:
    predictions = make_run(tmp_path, n=4000)
    wish = {"policy": "gate", "max_exit_error": 0.05}
    calibrate(tmp_path, **wish)
    splits = Splits.read(tmp_path / "splits.json")
    rows = [row.model_copy(update={"sha256": f"other {row.sha256}"}) for row in splits.rows]
    splits.model_copy(update={"rows": rows, "hashes": hash_splits(rows)}).write(tmp_path / "splits.json")
    replace(predictions, split_hash=hash_splits(rows)["val_calib"]).save(tmp_path / "val_calib.npz")
    before = files_of(tmp_path)
    with pytest.raises(InputError, match="2 cuts that share photos or groups must serve one claim"):
        calibrate(tmp_path, **wish)
    assert files_of(tmp_path) == before
    # A file without groups is of an older version: they are taken to be the same.
    known = json.loads((tmp_path / "claims.json").read_text())
    del known["groups"]
    (tmp_path / "claims.json").write_text(json.dumps(known))
    make_run(tmp_path, n=4000, seed=7)
    with pytest.raises(InputError, match="must serve one claim"):
        calibrate(tmp_path, **wish)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.frozensets(st.integers(0, 12), min_size=1, max_size=5), min_size=1, max_size=8), st.integers(1, 12))
def test_cuts_are_what_photos_and_groups_connect(halves: list[frozenset[int]], first_group: int) -> None:
    """Numbers below ``first_group`` are photos, the others groups."""
    known = Claims()
    for i, shared in enumerate(halves):
        photos = [f"{one:064d}"[::-1] for one in shared if one < first_group]
        known = known.seen(str(i), photos, [str(one) for one in shared if one >= first_group])
    for i, photos in enumerate(halves):
        reached = set(photos)
        for _ in halves:
            reached |= {one for other in halves if other & reached for one in other}
        assert known.cuts(str(i)) == [str(j) for j, other in enumerate(halves) if other & reached]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from([0.01, 0.05, 0.1]), st.integers(1, 6)), min_size=1, max_size=3),
    st.lists(st.integers(0, 2), max_size=8),
)
def test_cuts_that_were_declared_apart_share_what_is_strictest(
    tmp_path: Path, declared: list[tuple[float, int]], tries: list[int]
) -> None:
    """Halves of photos of their own, which a cut of all connects; each was declared by its first claim."""
    photos, file = [[f"{i:064d}"[::-1]] for i in range(len(declared))], tmp_path / "claims.json"
    everything = [one for half in photos for one in half]

    def claim(half: str, rows: list[str], wish: str, **more: Any) -> Any:
        stake, known = weigh_claim(
            tmp_path, half, rows, policy="gate", wish=wish, model_fingerprint="m", preprocessing_fingerprint="p",
            **{"delta": None, "claims": None, "defaults": (0.05, 1), **more},
        )  # fmt: skip
        known.write(file)
        return stake

    Claims().write(file)
    for i, (delta, claims) in enumerate(declared):
        stake = claim(str(i), photos[i], f"first {i}", delta=delta, claims=claims)
        assert (stake.delta, stake.claims, stake.left) == (delta, claims, claims - 1)
    strictest = (min(delta for delta, _ in declared), max(claims for _, claims in declared))
    level, spent = strictest[0] / strictest[1], sum(delta / claims for delta, claims in declared)
    known = Claims.of(tmp_path).seen("all", everything)
    known.model_copy(update={"looks": {"all": 1}}).write(file)
    left: int | None = None
    for number, half in enumerate([*tries, *range(len(declared))] * 2):
        own = half % len(declared)
        before = file.read_bytes()
        try:
            stake = claim(str(own), photos[own], f"later {number}")
        except InputError:
            assert spent + level > strictest[0] * (1 + 1e-9) and left in (None, 0) and file.read_bytes() == before
            continue
        spent += level
        assert (stake.delta, stake.claims) == strictest and spent <= strictest[0] * (1 + 1e-6)
        assert left in (None, stake.left + 1) and not stake.made
        left = stake.left
        again = claim(str(own), photos[own], f"later {number}")
        assert again.made and (again.delta, again.claims, again.left) == (*strictest, left)
    for i in range(len(declared)):
        again = claim(str(i), photos[i], f"first {i}")
        assert again.made and (again.delta, again.claims) == strictest
    for name, value in (("delta", strictest[0] / 2), ("claims", strictest[1] + 1)):
        with pytest.raises(InputError, match=f"--{name} must be"):
            claim("0", photos[0], "another", **{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("claims", [1, 10])
@pytest.mark.parametrize("frames", [False, True])
def test_ten_cuts_of_one_pool_certify_falsely_as_often_as_promised(tmp_path: Path, claims: int, frames: bool) -> None:
    """True exit error 1.02% everywhere, asked for 1%: any of ten cuts of 8,000 photos, or of one frame of each clip."""
    draws, pools, false, made = 50, 8000, 0, 0
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        gate, labels = rng.normal(size=pools), rng.integers(0, 2, pools)
        answer = np.where(rng.random(pools) < 0.0102, 1 - labels, labels)
        probs, photos = np.eye(2)[answer] * 0.8 + 0.1, np.array([f"{i:016d}" for i in range(pools)])
        probs[:, 0] += (jitter := rng.random(pools) * 1e-3)
        probs[:, 1] -= jitter
        run = tmp_path / str(draw)
        run.mkdir()
        hit = False
        for cut in range(10):
            certify = rng.permutation(pools) % 2 == 0
            seen = [f"{cut if frames else 0:04d}{one[4:]}" for one in photos[certify]]
            try:
                stake, known = weigh_claim(
                    run, f"half {cut}", seen, photos[certify], policy="gate", wish="w", model_fingerprint=f"m{cut}",
                    preprocessing_fingerprint="p", delta=None, claims=None, defaults=(0.05, claims),
                )  # fmt: skip
            except InputError:
                continue
            known.write(run / "claims.json")
            made += 1
            try:
                fit_gate_policy(
                    probs, gate, labels, **BINARY, halves=np.where(certify, "certify", "fit"), max_exit_error=0.01,
                    min_coverage=0.3, delta=stake.delta, claims=stake.claims,
                )  # fmt: skip
            except NotReachableError:
                close_claim(run, f"half {cut}", stake, "infeasible")
            else:
                hit = True
        false += hit
    share, noise = false / draws, stderr(0.05, draws)
    print(f"ten cuts, {claims} claims: any false certificate {share:.3f}, promised .05 (se {noise:.3f})")
    assert made == draws * claims and share <= 0.05 + 3 * noise


# -------------------------------------------------------------------------------- units


def clips(k: int, rng: np.random.Generator, n: int = 2000, fnr: float = 0.022) -> tuple[np.ndarray, np.ndarray]:
    """Clips of k bit-identical rows, all positive; FNR the same at every threshold."""
    m = math.ceil(n / k)
    sure, missed = rng.random(m) * 3 + 0.1, rng.random(m) < fnr
    logits = np.stack([np.where(missed, sure, -sure), np.where(missed, -sure, sure)], 1)
    return np.repeat(logits, k, axis=0)[:n], np.ones(n, dtype=np.int64)


def test_logits_need_groups_or_a_statement(tmp_path: Path) -> None:
    file, rng = tmp_path / "mine.npz", np.random.default_rng(0)
    logits, labels = clips(1, rng, 4000, fnr=0.0)
    labels[::2] = 0
    logits[::2] = -logits[::2]
    np.savez(file, logits=logits, labels=labels)
    with pytest.raises(InputError, match="groups"):
        calibrate(logits=file)
    assert calibrate(logits=file, guarantee="none").certificate is None
    policy = calibrate(logits=file, rows_independent=True)
    assert policy.certificate is not None and policy.certificate.unit == "rows"
    assert any("as the caller states" in one for one in policy.certificate.assumptions)
    make_run(tmp_path / "run", 40)
    with pytest.raises(InputError, match="--run"):
        calibrate(tmp_path / "run", rows_independent=True)


def tie_scores(how: str, p: np.ndarray) -> np.ndarray:
    """Probabilities [N] of the second class with ties that say nothing of copies."""
    if how == "bfloat16":
        return ((p.astype(np.float32).view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)
    if how == "saturated":
        return (1 / (1 + np.exp(-8 * np.log(p / (1 - p)).astype(np.float32)))).astype(np.float32)
    if how == "one label":
        # As many rows as like have one answer, and their labels differ.
        return np.where((p > 0.8) & (p < 0.9), 0.85, p)
    if how == "crowded":
        sure = (0.98 + 0.009 * np.tanh(np.abs(np.log(p / (1 - p))) - 2)).astype(np.float32)
        return np.where(p > 0.5, sure, 1 - sure)
    levels = np.round(p * 15) / 15
    eight = 0.5 + np.ceil(np.abs(p - 0.5) * 16) * 0.05
    rounded = {
        "levels": levels,
        "eight levels": np.where(p > 0.5, eight, 1 - eight),
        "float16 levels": np.stack([1 - levels, levels], axis=1).astype(np.float16),
        "float32 levels": levels.astype(np.float32),
        "float16": p.astype(np.float16),
        "decimals": p.round(4),
    }
    return rounded.get(how, p)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "how",
    [
        "levels", "eight levels", "float32 levels", "float16 levels", "float16", "bfloat16", "decimals", "saturated",
        "crowded", "one label", "clipped gate",
    ],
)  # fmt: skip
def test_ties_of_different_photos_are_no_copies(how: str, seed: int, tmp_path: Path) -> None:
    rng, n = np.random.default_rng(seed), 6000
    z = rng.normal(0, 2, n)
    given = tie_scores(how, 1 / (1 + np.exp(-z)))
    second = given if given.ndim == 1 else given[:, 1]
    labels = ((second > 0.5) ^ (rng.random(n) < 0.002)).astype(np.int64)
    gate = np.minimum(np.abs(z), 1.5) if how == "clipped gate" else np.abs(second.astype(np.float64) - 0.5)
    for more in ({}, {"groups": np.arange(n) // 2}):
        unit, units = ("groups", 1500) if more else ("rows", 3000)
        policy = fit_policy("softmax", given, labels, gate=gate, target_fnr=0.05, rows_independent=not more, **more)
        assert (policy.certificate.unit, policy.certificate.n) == (unit, units)
        np.savez(tmp_path / "mine.npz", probs=given, labels=labels, gate_logits=gate, **more)
        policy = calibrate(logits=tmp_path / "mine.npz", target_fnr=0.05, rows_independent=not more)
        assert (policy.certificate.unit, policy.certificate.n) == (unit, units)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("k", [3, 10, 30])
def test_copies_in_different_units_are_refused(tmp_path: Path, dtype: type, k: int) -> None:
    n = 4020
    logits, labels = clips(k, np.random.default_rng(k), n, fnr=0.0)
    logits, clip = logits.astype(dtype), np.arange(n) // k
    labels[0] = 0
    probs, apart = softmax(logits), np.where(clip % 2, "fit", "certify")
    for half in (None, apart, np.where(np.arange(n) % 2, "fit", "certify")):
        for more in ({}, {"groups": np.arange(n)}):
            halves = {} if half is None else {"half": half}
            np.savez(tmp_path / "mine.npz", logits=logits, labels=labels, **more, **halves)
            with pytest.raises(InputError, match="copies"):
                calibrate(logits=tmp_path / "mine.npz", rows_independent=not more)
            with pytest.raises(InputError, match="copies"):
                fit_policy("softmax", probs, labels, halves=half, rows_independent=not more, **more, target_fnr=0.1)
    fit = {"classes": ["0", "1"], "positive": "1", "halves": apart}
    with pytest.raises(InputError, match="copies"):
        fit_softmax_policy(probs, labels, **fit, guarantee="ltt", target_fnr=0.1)
    with pytest.raises(InputError, match="copies"):
        fit_scrc_policy(probs, logits[:, 1].astype(float), probs, labels, **fit, alpha=0.1)
    # In one group each they count once, and nothing is said of copies where nothing is certified.
    policy = fit_policy("softmax", probs, labels, groups=clip, target_fnr=0.2)
    assert policy.certificate.unit == "groups" and policy.certificate.n <= n // k // 2 + 1
    assert fit_policy("softmax", probs, labels, guarantee="none", target_fnr=0.1).certificate is None


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("k", [*range(2, 11), 30, 63])
def test_few_photos_many_times_are_no_grid(dtype: type, k: int) -> None:
    n = 400 * k
    for seed in range(20):
        rng = np.random.default_rng([k, seed])
        logits = np.where(rng.random(k) < 0.5, -1, 1) * rng.uniform(0.1, 5, k)
        second = (1 / (1 + np.exp(-logits))).astype(dtype)[rng.permutation(np.arange(n) % k)]
        for more in ({"rows_independent": True}, {"groups": np.arange(n) // 2}):
            with pytest.raises(InputError, match="copies"):
                fit_policy("softmax", second, (second > 0.5).astype(int), target_fnr=0.1, **more)


def test_the_copies_that_are_named_are_the_same_in_every_process() -> None:
    code = (
        "import numpy as np; from stage1_pro.policies import fit_policy; "
        "p = np.random.default_rng(0).permutation(np.linspace(0.01, 0.99, 97) ** 1.3).repeat(40); "
        "fit_policy('softmax', p, (p > 0.5).astype(int), target_fnr=0.1, rows_independent=True)"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True
        ).stderr.splitlines()[-1]
        for seed in ("1", "2")
    ]
    assert "copies" in said[0] and said[0] == said[1]


def test_one_answer_to_independent_photos_never_becomes_a_unit(tmp_path: Path) -> None:
    """A quarter of the photos get one answer, a fifth of them wrongly: exit error 5%, and 1% is not certified."""
    for seed in range(10):
        rng, n = np.random.default_rng(seed), 8000
        same = rng.random(n) < 0.25
        z = np.where(same, 6.0, rng.uniform(0.5, 9, n)).astype(np.float32)
        labels = rng.random(n) < 0.5
        z = np.where(labels ^ (same & (rng.random(n) < 0.2)), z, -z)
        np.savez(tmp_path / "mine.npz", logits=z, labels=labels.astype(int), gate_logits=np.abs(z))
        wish = {"policy": "gate", "max_exit_error": 0.01, "min_coverage": 0.7}
        with pytest.raises((InputError, NotReachableError)):
            calibrate(logits=tmp_path / "mine.npz", rows_independent=True, **wish)


def test_a_model_that_says_one_thing_is_not_reachable(tmp_path: Path) -> None:
    labels = np.arange(600) % 2
    np.savez(tmp_path / "mine.npz", logits=np.zeros((600, 2)), labels=labels, gate_logits=np.zeros(600))
    assert cli.main(["calibrate", "--logits", str(tmp_path / "mine.npz"), "--policy", "scrc", "--alpha", "0.05"]) == 3
    for more in ({}, {"rows_independent": True}, {"groups": np.arange(600) // 2}):
        with pytest.raises(NotReachableError):
            fit_policy("softmax", np.full(600, 0.5), labels, target_fnr=0.1, **more)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3, 10, 30])
def test_copies_certify_no_more_than_photos(tmp_path: Path, k: int) -> None:
    """True FNR 2.2% at every threshold, asked for 2%: every certificate is false."""
    draws, false, refusal = 200, 0, NotReachableError if k == 1 else InputError
    for draw in range(draws):
        logits, labels = clips(k, np.random.default_rng(draw))
        np.savez(tmp_path / "mine.npz", logits=logits, labels=labels, classes=["none", "yes"])
        try:
            calibrate(logits=tmp_path / "mine.npz", rows_independent=True, target_fnr=0.02)
        except refusal:
            continue
        false += 1
    noise = stderr(0.05, draws)
    print(f"clips of {k}: certified falsely {false / draws:.3f}, promised .05 (se {noise:.3f})")
    assert false / draws <= 0.05 + 3 * noise


def of_groups(rng: np.random.Generator, sizes: np.ndarray, risk: np.ndarray) -> dict[str, Any]:
    """Rows of groups with these sizes, each wrong with its group's risk."""
    names = np.repeat(np.arange(sizes.size), sizes)
    n = names.size
    labels = rng.integers(0, 2, n)
    answer = np.where(rng.random(n) < risk[names], 1 - labels, labels)
    sure = rng.random(n)
    probs = np.eye(2)[answer] * (0.5 + 0.3 * sure[:, None]) + (0.5 - 0.3 * sure[:, None]) * 0.5
    probs /= probs.sum(1, keepdims=True)
    return {
        "probs": probs, "gate_logits": rng.normal(size=n), "labels": labels, "groups": names,
        "halves": np.where(rng.permutation(sizes.size)[names] % 2, "fit", "certify"),
    }  # fmt: skip


LAWS = {
    "large groups worse": ([1, 60], [0.95, 0.05], [0.004, 0.15], 0.025, 4000),
    "at the limit": ([1, 20], [0.8, 0.2], [0.051, 0.051], 0.05, 1500),
    "half of the large ones": ([1, 5, 40], [0.5, 0.4, 0.1], [0.01, 0.02, 0.08], 0.05, 1500),
    "well within": ([1, 4, 12], [0.6, 0.3, 0.1], [0.02, 0.01, 0.02], 0.05, 3000),
}


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_a_promise_of_photos_is_true_or_refused(law: str) -> None:
    sizes, shares, risks, alpha, n = LAWS[law]
    truth = np.dot(np.multiply(sizes, shares), risks) / np.dot(sizes, shares)
    draws, made = 60, 0
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        kind = rng.choice(len(sizes), n, p=shares)
        rows = of_groups(rng, np.array(sizes)[kind], np.array(risks)[kind])
        try:
            policy = fit_gate_policy(
                **rows, **BINARY, max_exit_error=alpha, min_coverage=0.2, unit="photo", largest_group=max(sizes)
            )
        except NotReachableError:
            continue
        made += 1
        assert policy.promises[1].unit == "photo" and policy.target.largest == max(sizes)
    false = made / draws if truth > alpha else 0.0
    noise = stderr(0.05, draws)
    print(
        f"{law}: photos wrong {truth:.4f}, asked {alpha}: certified {made / draws:.2f}, falsely {false:.2f} "
        f"(se {noise:.3f})"
    )
    assert false <= 0.05 + 3 * noise
    assert law != "well within" or made > 0.5 * draws


@pytest.mark.parametrize("unit", ["photo", "group"])
def test_the_best_that_counts_allow_is_what_perfect_answers_certify(unit: str) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.choice([1, 4, 12], 1500, p=[0.6, 0.3, 0.1])
    rows = of_groups(rng, sizes, np.zeros(sizes.size))
    of = {"unit": unit, "largest_group": 12} if unit == "photo" else {}
    wish = {"min_coverage": 0.3, **of}
    given = Rows.of(
        rows["probs"], rows["labels"], **BINARY, gate=rows["gate_logits"], groups=rows["groups"], halves=rows["halves"]
    )
    _, risk = foresee(Gate(max_exit_error=0.2, **wish), given)
    assert risk.best is not None and 0.001 < risk.best < 0.05
    assert not foresee(Gate(max_exit_error=risk.best * 0.99, **wish), given)[1].possible
    assert fit_gate_policy(**rows, **BINARY, **wish, max_exit_error=risk.best * 1.01).coverage > 0.9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 400), st.integers(1, 60))
def test_all_photos_of_any_groups_are_a_coverage_of_one(seed: int, n_groups: int, largest: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(n_groups), rng.integers(1, largest + 1, n_groups))
    scores = rng.random(groups.size)
    given = {"groups": groups, "alpha": 0.5, "delta": 0.05}
    for more in ({"unit": "photos", "largest_group": largest}, {"unit": "group_means"}):
        found = certify_threshold(scores, np.zeros(groups.size, bool), candidates=[0.0], **given, **more)
        assert found.coverage == 1
        some = certify_threshold(scores, np.zeros(groups.size, bool), candidates=[0.4], **given, **more)
        weights = np.ones(groups.size) if "largest_group" in more else 1 / np.bincount(groups)[groups]
        assert some.coverage == pytest.approx(weights[scores >= 0.4].sum() / weights.sum(), abs=1e-12)


def test_a_promise_of_photos_is_another_promise() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.choice([1, 4, 12], 6000, p=[0.6, 0.3, 0.1])
    rows = of_groups(rng, sizes, np.full(sizes.size, 0.01))
    wish = {"max_exit_error": 0.05, "min_coverage": 0.3}
    of_photos = fit_gate_policy(**rows, **BINARY, **wish, unit="photo", largest_group=12)
    of_groups_ = fit_gate_policy(**rows, **BINARY, **wish)
    assert not any(one.covers(other) for one in of_groups_.promises for other in of_photos.promises)
    assert of_photos.target.key() != of_groups_.target.key() and of_photos.certificate.unit == "photos"
    assert "no group holds more than 12" in of_photos.statement
    assert any("--unit photo" in one for one in of_groups_.found())
    assert not any("--unit photo" in one for one in of_photos.found())
    with pytest.raises(InputError, match="largest_group must be at least .* got 11 .* 12"):
        fit_gate_policy(**rows, **BINARY, **wish, unit="photo", largest_group=11)
    for wrong in ({"unit": "photo"}, {"largest_group": 12}):
        with pytest.raises(InputError, match="largest_group must go with unit photo"):
            fit_gate_policy(**rows, **BINARY, **wish, **wrong)
    given = Rows.of(rows["probs"], rows["labels"], **BINARY, gate=rows["gate_logits"], groups=rows["groups"])
    checks = {one.name: one for one in of_photos.check(given).promises}
    exited = of_photos.exits(rows["probs"], rows["gate_logits"])
    wrong = rows["probs"].argmax(1) != rows["labels"]
    assert (checks["exit error"].errors, checks["exit error"].trials) == ((wrong & exited).sum(), exited.sum())
    assert checks["exit error"].outcome == "PASS" and checks["exit error"].photo_trials is None
    beside = {one.name: one for one in of_groups_.check(given).promises}["exit error"]
    assert beside.trials < beside.photo_trials == of_groups_.exits(rows["probs"], rows["gate_logits"]).sum()


@pytest.mark.parametrize("of", range(1, 6))
def test_the_level_of_a_fail_is_shared_by_all_that_are_checked(of: int) -> None:
    for k, n in ((0, 10), (3, 50), (40, 400), (1, 1)):
        found = check_claim("risk", k, n, 0.05, n, of)
        assert found.lower == pytest.approx(clopper_pearson_lower(k, n, 1 - 0.01 / of), rel=1e-12)
        assert found.upper == clopper_pearson_upper(k, n, 0.95)
    # One that fails alone by a hair fails no more beside others.
    n = 10_000
    k = next(k for k in range(500, n) if clopper_pearson_lower(k, n, 0.99) > 0.05)
    assert check_claim("risk", k, n, 0.05, n, of).outcome == ("FAIL" if of == 1 else "INCONCLUSIVE")


@pytest.mark.parametrize("wish", [{}, {"target_fnr": 0.2}])
def test_a_fail_shares_its_level_among_the_promises_of_a_policy(wish: dict[str, float]) -> None:
    """Each promise at its very limit: any FAIL in at most 1% of test sets."""
    data = gated(12_000)
    policy = fit_gate_policy(**data, **BINARY, max_exit_error=0.03, **wish)
    rng, draws, n, failed, of = np.random.default_rng(0), 400, 400, 0, 2 + len(wish)
    for _ in range(draws):
        labels = rng.integers(0, 2, n)
        out = rng.random(n) < policy.constraints.min_coverage
        wrong = rng.random(n) < np.where(labels == 1, 0.06, 0.0)
        probs = np.eye(2)[np.where(wrong, 1 - labels, labels)] * 0.8 + 0.1
        gate = np.where(out, 1.0, -1.0) * 50 * np.sign(policy.a)
        checked = policy.check(Rows.of(probs, labels, **BINARY, gate=gate)).promises
        assert len(checked) == of
        for one in checked:
            lower = clopper_pearson_lower(one.errors, one.trials, 1 - 0.01 / of)
            assert one.lower == pytest.approx(lower, rel=1e-12) and (one.outcome == "FAIL") == (lower > one.limit)
        failed += any(one.outcome == "FAIL" for one in checked)
    noise = stderr(0.01, draws)
    print(f"{of} promises at their limits: FAIL in {failed / draws:.4f} of test sets, at most .01 (se {noise:.4f})")
    assert failed / draws <= 0.01 + 3 * noise
