"""Wherever a policy is shown, it is said to promise what its file holds and nothing else."""

from __future__ import annotations

import html
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from fitting import fit_gate_policy, fit_scrc_policy, fit_softmax_policy
from kit.claims import CLAIMS, OF_EXITS, WAS
from test_certify import BINARY, make_run

from stage1_pro.continual.watch.monitor import Evidence, ServedColumns, TriggerState
from stage1_pro.continual.watch.srt import ControllerConfig, ThresholdController, to_logit
from stage1_pro.continual.watch.status import MonitorConfig, Status, assess, dashboard, exposition, write_page
from stage1_pro.data.splits import Splits
from stage1_pro.deploy.inspection import inspect, render_inspection
from stage1_pro.deploy.prediction import render as render_prediction
from stage1_pro.policies.policy import Policy, Said
from stage1_pro.policies.softmax import softmax
from stage1_pro.policies.standing import standing
from stage1_pro.report import write_report
from stage1_pro.training.calibration import render as render_policy
from stage1_pro.training.evaluation import Evaluation, evaluate_predictions, render

ALPHA = 0.03
KINDS = (
    "softmax none",
    "softmax ltt",
    "gate none",
    "gate ltt",
    "gate other",
    "scrc naive",
    "scrc pac",
    "scrc T",
    "tightened",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run, and predictions of a test set from where its calibration rows came."""
    run = tmp_path_factory.mktemp("run")
    predictions = make_run(run, 8000)
    test = make_run(tmp_path_factory.mktemp("test"), 400, seed=5)
    return run, (predictions, replace(test, split="val_test", halves=np.array([""] * 400)))


@pytest.fixture(scope="module", params=KINDS)
def shown(request: pytest.FixtureRequest, world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A policy of each kind, and all texts in which it is shown."""
    run, (rows, test) = world
    probs = softmax(rows.logits_a)
    given = {
        **BINARY, "halves": rows.halves, "model_fingerprint": rows.model_fingerprint,
        "preprocessing_fingerprint": rows.preprocessing_fingerprint,
    }  # fmt: skip
    kind, how = [*request.param.split(), "ltt"][:2]
    if kind == "softmax":
        policy: Policy = fit_softmax_policy(probs, rows.labels, **given, guarantee=how, target_fnr=0.05)
    elif kind in ("gate", "tightened"):
        error, how = (0.04, "ltt") if how == "other" else (ALPHA, how)
        policy = fit_gate_policy(probs, rows.gate_logits, rows.labels, **given, guarantee=how, max_exit_error=error)
        policy = policy.at(policy.exit_threshold + 1e-3) if kind == "tightened" else policy
    else:
        policy = fit_scrc_policy(probs, rows.gate_logits, probs, rows.labels, **given, variant=how, alpha=0.05)
    return request.param, policy, texts(policy, run, test, tmp_path_factory.mktemp("shown"))


def texts(policy: Policy, run: Path, test: Any, folder: Path) -> dict[str, str]:
    evaluation, *_ = evaluate_predictions(test, policy, n_replicates=5)
    evaluation.write(folder / "evaluation.json")
    assert Evaluation.read(folder / "evaluation.json") == evaluation
    write_report(
        folder / "report.html", evaluation, policy=policy, pictures=[], mistakes=[], groups=[], image_root=folder
    )
    promise = standing(policy, Splits.read(run / "splits.json").summary())
    found = {
        "calibrate": render_policy(policy), "evaluate": render(evaluation),
        "evaluation.json": evaluation.model_dump_json(), "report": (folder / "report.html").read_text(),
        "predict": render_prediction([], None, promise), "headline": policy.headline(), "measured": policy.measured(),
        "story": " ".join(policy.story()),
    }  # fmt: skip
    for wrong in (0, 3, 40):
        status, rows = looked(policy, wrong)
        write_page(folder / "status.html", status, rows)
        found |= {
            f"status {wrong}": " ".join([status.headline, *status.sentences]),
            f"page {wrong}": (folder / "status.html").read_text(), f"metrics {wrong}": exposition(status).decode(),
        }  # fmt: skip
    return {name: html.unescape(re.sub(r"data:image/png;base64,[^\"]*", "", text)) for name, text in found.items()}


def looked(
    policy: Policy, wrong: int, n: int = 400, tighter: float = 0.0, alpha: float = ALPHA, *,
    threshold: float | None = None, steered: bool = True,
) -> tuple[Status, ServedColumns]:  # fmt: skip
    rows = ServedColumns(
        time=np.arange(n) * 10.0, exited=np.ones(n, bool), wrong=(np.arange(n) < wrong).astype(float),
        propensity=np.ones(n), score=np.full(n, 0.99),
    )  # fmt: skip
    start = min(policy.exit_threshold, 0.99)
    controller = ThresholdController(ControllerConfig(alpha=alpha, certified=start, audit_rate=0.3, floor=0.3)).state
    if tighter:
        controller = controller.at_least(to_logit(start) + tighter)
    status, _ = assess(
        rows, MonitorConfig(alpha=alpha), now=1e5, triggers_before=TriggerState(since=0.0), policy=policy,
        evidence=Evidence(alpha=alpha).after(rows.wrong, propensity=rows.propensity, time=rows.time),
        controller=controller if steered else None, threshold=threshold,
    )  # fmt: skip
    return status, rows


def test_nothing_is_said_to_be_promised_that_the_file_does_not_hold(shown: Any) -> None:
    kind, policy, said = shown
    promises = kind in ("softmax ltt", "gate ltt", "gate other", "scrc pac", "scrc T")
    assert bool(policy.promises) == promises == (policy.guarantee != "none")
    for name, text in said.items():
        found = CLAIMS.search(text)
        assert not (name.split()[0] in ("status", "page", "metrics") and WAS.search(text)), (kind, name)
        if not promises:
            assert found is None, (kind, name, text[max(0, found.start() - 80) : found.end() + 80])
        if name.split()[0] in ("status", "page", "metrics"):
            # The watched number is the error of exits, which other policies promise nothing of.
            assert bool(OF_EXITS.search(text)) <= (kind == "gate ltt"), (kind, name)
    if promises:
        assert all(CLAIMS.search(said[name]) for name in ("calibrate", "evaluate", "report", "predict"))
        assert "the labels are right" in said["predict"]
        judged = re.compile(r"\b(PASS|FAIL|INCONCLUSIVE)\b|beyond chance")
        for name in ("evaluate", "report"):
            # One calibration does not refute an average.
            assert bool(judged.search(said[name])) == (kind != "scrc T"), (kind, name)
            assert ("on average" in said[name]) >= (kind == "scrc T")
    else:
        assert "romises nothing" in said["calibrate"] or "othing is promised" in said["calibrate"]
        assert "certified: 0" not in said["page 0"] and "calibrated: 0" in said["page 0"]
    assert bool(OF_EXITS.search(said["page 0"])) == (kind == "gate ltt")


def test_one_rate_has_one_verdict(shown: Any) -> None:
    kind, _, said = shown
    page = said["report"]
    assert ('id="fnr-check"' in page) == (kind == "softmax none")
    rows = re.findall(r'class="name">FNR on exits</td>', page)
    assert len(rows) == (kind == "softmax ltt")


def test_sets_are_headlined_by_what_is_answered(shown: Any) -> None:
    kind, _, said = shown
    lead = said["report"].split('<section class="tiles">')[0]
    assert ("left" in lead and "to a person" in lead) == kind.startswith("scrc")
    assert ("Together:" in lead) != kind.startswith("scrc")
    assert ("deployed:" in said["evaluate"]) == kind.startswith("scrc")


def test_a_tightened_threshold_is_shown_without_the_promises_it_gives_up(shown: Any) -> None:
    kind, policy, _ = shown
    loose, _ = looked(policy, 0)
    tight, _ = looked(policy, 0, tighter=1.0)
    assert tight.threshold > loose.threshold == loose.calibrated == tight.calibrated
    assert bool(loose.promises) == bool(policy.promises) == (loose.certified is not None)
    if policy.steerable:
        assert (tight.promises, tight.certified) == ([], None) and tight.limit != "promised"
        assert not CLAIMS.search(" ".join([tight.headline, *tight.sentences])), kind


@pytest.mark.parametrize("alpha", [0.02, ALPHA, 0.05])
@pytest.mark.parametrize("wrong", [0, 3, 40])
@pytest.mark.parametrize("steered", [True, False])
def test_an_alarm_speaks_of_what_was_promised_where_the_threshold_was_tightened_since(
    shown: Any, tmp_path: Path, alpha: float, wrong: int, steered: bool
) -> None:
    """Evidence is against the policy as exported, whoever tightened it; what is promised now is another thing."""
    kind, policy, _ = shown
    if not policy.steerable:
        return
    above = min(policy.exit_threshold, 0.99) + 0.005
    if above <= policy.exit_threshold:
        return
    tight, rows = looked(policy, wrong, alpha=alpha, tighter=1.0 if steered else 0.0, threshold=above, steered=steered)
    assert tight.threshold >= above and (tight.threshold == above or steered)
    assert tight.promises == [] and tight.certified is None
    assert tight.limit == policy.at(tight.threshold).says_of_exits(alpha)[0] not in ("promised", "covered by a promise")
    text = " ".join([tight.headline, *tight.sentences])
    assert not CLAIMS.search(text), (kind, text)
    if wrong == 40 and alpha == ALPHA:
        write_page(tmp_path / "page.html", tight, rows)
        page = re.sub(r"data:image/png;base64,[^\"]*", "", (tmp_path / "page.html").read_text())
        assert not CLAIMS.search(page) and not OF_EXITS.search(page), (kind, page)
    was = policy.says_of_exits(alpha)[0]
    assert bool(WAS.search(text)) == (was in ("promised", "covered by a promise", "promised of groups")), (kind, text)
    assert ("nothing is promised of it" in text) == (was == "asked for"), (kind, text)
    assert ("than was promised" in text) == (was == "promised" and tight.health == "alarm"), (kind, text)
    assert "tightened from" in text and (tight.health == "alarm") == (wrong == 40)
    loose, _ = looked(policy, wrong, alpha=alpha)
    assert loose.health == tight.health and not WAS.search(" ".join([loose.headline, *loose.sentences]))


def test_a_picture_calls_its_limit_promised_where_it_is(tmp_path: Path) -> None:
    rows = ServedColumns(
        time=np.arange(50.0), exited=np.ones(50, bool), wrong=np.zeros(50), propensity=np.ones(50),
        score=np.full(50, 0.99),
    )  # fmt: skip
    status, _ = assess(
        rows, MonitorConfig(alpha=ALPHA), now=50.0, triggers_before=TriggerState(since=0.0),
        evidence=Evidence(alpha=ALPHA),
    )  # fmt: skip
    drawn = {}
    for said in get_args(Said):
        write_page(tmp_path / "page.html", status.model_copy(update={"limit": said}), rows)
        drawn[said] = re.findall(r"data:image/png;base64,([^\"]*)", (tmp_path / "page.html").read_text())[0]
    promised = drawn.pop("promised")
    assert len(set(drawn.values())) == 1 and promised not in drawn.values()


@pytest.mark.parametrize("sizes", [(1, 1), (1, 60)])
@pytest.mark.parametrize("alpha", [0.02, ALPHA, 0.05])
def test_audits_of_photos_judge_a_promise_of_photos_alone(sizes: tuple[int, int], alpha: float) -> None:
    """A certified exit error of at most 3%, of groups of one or of unlike sizes, held against limits around it."""
    rng = np.random.default_rng(0)
    size = np.where(rng.random(3000) < 0.05, *sizes[::-1])
    groups = np.repeat(np.arange(size.size), size)
    wrong = rng.random(groups.size) < np.where(size[groups] > 1, 0.15, 0.004)
    labels, sure = rng.integers(0, 2, groups.size), rng.uniform(0.6, 0.99, groups.size)
    positive = np.where((labels == 1) ^ wrong, sure, 1 - sure)
    policy = fit_gate_policy(
        np.stack([1 - positive, positive], axis=1), np.log(sure / (1 - sure)), labels, **BINARY,
        halves=np.where(rng.random(size.size) < 0.5, "fit", "certify")[groups], model_fingerprint="m",
        preprocessing_fingerprint="p", guarantee="ltt", max_exit_error=ALPHA, min_coverage=0.5,
        groups=groups.astype(str),
    )  # fmt: skip
    of_photos = sizes == (1, 1)
    for count in (0, 46):
        status, _ = looked(policy, count, alpha=alpha)
        text = " ".join([status.headline, *status.sentences])
        assert bool(OF_EXITS.search(text)) == (of_photos and alpha == ALPHA), text
        assert ("no policy promises" in text) == (alpha < ALPHA), text
        assert status.health == ("alarm" if count else "holds")
        if alpha >= ALPHA:
            assert "at most 3%" in text and ("groups" in text) == (not of_photos), text


def test_before_any_audit_there_is_no_harm_to_count(tmp_path: Path) -> None:
    rows = ServedColumns(*(np.array([], dtype=kind) for kind in (float, bool, float, float, float)))
    status, _ = assess(
        rows,
        MonitorConfig(alpha=ALPHA),
        now=0.0,
        triggers_before=TriggerState(since=0.0),
        evidence=Evidence(alpha=ALPHA),
    )
    write_page(tmp_path / "page.html", status, rows)
    assert "<b>no</b> evidence of harm yet" in (tmp_path / "page.html").read_text()
    assert not CLAIMS.search((tmp_path / "page.html").read_text())
    assert not re.search("certif|promis", str(dashboard()))
    older = status.model_dump(mode="json")
    for name in ("limit", "promises", "calibrated"):
        del older[name]
    assert Status.model_validate(older).limit == "watched"


def test_a_bundle_that_promises_nothing_says_so(tiny: Path) -> None:
    said = render_inspection(inspect(tiny / "bundle"))
    assert "guarantee: none" in said and not CLAIMS.search(said)
