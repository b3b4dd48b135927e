"""The gate: its loss has the right gradient however a batch is cut, and its refit means P(Stage A is correct | x)."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from sklearn.linear_model import LogisticRegression

import stage1_pro
from stage1_pro.config import ModelConfig, TrainConfig, load_config
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits
from stage1_pro.errors import InputError
from stage1_pro.metrics import augrc
from stage1_pro.models.model import Heads, Outputs, create_model
from stage1_pro.policies.ranking import GateChoice
from stage1_pro.training import checkpoint, losses
from stage1_pro.training.gate_head import FEWEST_ERROR_GROUPS, fit_gate, fold_of, margin
from stage1_pro.training.inference import infer_split
from stage1_pro.training.loop import train
from stage1_pro.training.run import RunConfig
from stage1_pro.training.taps import TapChoice, candidates, choose_tap, cost, largest_exit

WEIGHTS = {"selective_weight": 0.5, "coverage_weight": 32.0, "target_coverage": 0.8}
SELECTIVE = losses.Selective(TrainConfig(**WEIGHTS))


def made(rows: int = 12, seed: int = 0) -> tuple[Heads, torch.Tensor, torch.Tensor]:
    """Heads with an open gate in float64, features [rows, 6] and labels of three classes."""
    draw = torch.Generator().manual_seed(seed)
    heads = Heads(6, 3, 5, 0.0).double()
    for parameter in heads.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.5
    features = torch.randn(rows, 6, generator=draw, dtype=torch.float64)
    return heads, features, torch.randint(0, 3, (rows,), generator=draw)


def sums(outputs: Outputs, labels: torch.Tensor) -> torch.Tensor:
    return SELECTIVE.sums(losses.Part(outputs, labels, torch.tensor([0.5, 1.0, 2.0])))


def test_the_selective_loss_is_its_formula() -> None:
    heads, features, labels = made()
    with torch.no_grad():
        outputs = heads(features, features)
    soft = torch.sigmoid(outputs.gate_logit.float())
    weight = torch.tensor([0.5, 1.0, 2.0])[labels]
    entropy = -torch.log_softmax(outputs.logits_a.float(), 1)[torch.arange(12), labels] * weight
    expected = 0.5 * (soft * entropy).sum() / soft.sum() + 32 * max(0.0, 0.8 - float(soft.mean())) ** 2
    assert float(SELECTIVE.of(sums(outputs, labels))) == pytest.approx(float(expected), rel=1e-5)
    slack = {**WEIGHTS, "target_coverage": float(soft.mean()) - 0.01}
    alone = losses.Selective(TrainConfig(**slack)).of(sums(outputs, labels))
    assert float(alone) == pytest.approx(float(0.5 * (soft * entropy).sum() / soft.sum()), rel=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    draw = torch.Generator().manual_seed(3)
    parts = torch.rand(3, generator=draw, dtype=torch.float64) * 5 + torch.tensor([0.0, 0.0, 8.0])
    parts.requires_grad_(True)
    assert torch.autograd.gradcheck(SELECTIVE.of, (parts,))
    heads, features, labels = made()
    SELECTIVE.of(sums(heads(features, features), labels)).backward()
    weight, step = heads.gate.linear.weight, 1e-2
    for k in range(weight.shape[1]):
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[0, k] += sign * step
                found.append(float(SELECTIVE.of(sums(heads(features, features), labels))))
                weight[0, k] -= sign * step
        assert weight.grad is not None
        assert float(weight.grad[0, k]) == pytest.approx((found[0] - found[1]) / (2 * step), rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("stop", [True, False])
def test_the_gate_learns_and_features_are_stopped_unless_asked(stop: bool) -> None:
    model = create_model(ModelConfig(tap=2), ["a", "b"], "b", 0).train()
    model.heads.gate.stop_features = stop
    torch.nn.init.ones_(model.heads.gate.linear.weight)
    outputs = model(torch.randn(4, 3, 48, 48, generator=torch.Generator().manual_seed(1)))
    # The hinge alone: its only way into the backbone is through the gate.
    soft = torch.sigmoid(outputs.gate_logit)
    part = torch.stack([soft.sum() * 0, soft.sum(), torch.tensor(4.0)])
    hinge = TrainConfig(selective_weight=0, coverage_weight=1, target_coverage=1)
    losses.Selective(hinge).of(part).backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"heads.gate.linear.weight", "heads.gate.linear.bias"} <= touched
    assert any(name.startswith("backbone.") for name in touched) is not stop
    assert not any(name.startswith("heads.classifier") for name in touched), "the margin is always stopped"


@pytest.mark.parametrize("size", [1, 3, 5, 12])
def test_parts_of_a_batch_add_up_to_its_gradient(size: int) -> None:
    heads, features, labels = made()
    SELECTIVE.of(sums(heads(features, features), labels)).backward()
    whole = {name: p.grad.clone() for name, p in heads.named_parameters() if p.grad is not None}
    heads.zero_grad()
    with torch.no_grad():
        total = sums(heads(features, features), labels)
    for start in range(0, 12, size):
        part = slice(start, start + size)
        share = losses.as_share(sums(heads(features[part], features[part]), labels[part]), total)
        loss = SELECTIVE.of(share)
        torch.testing.assert_close(loss.detach(), SELECTIVE.of(total))
        loss.backward()
    for name, p in heads.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, whole[name], rtol=1e-4, atol=1e-6)
    # What the exact way is for: the mean of the parts' own losses has another gradient.
    heads.zero_grad()
    if size == 3:
        for start in range(0, 12, size):
            part = slice(start, start + size)
            own = sums(heads(features[part], features[part]), labels[part])
            (SELECTIVE.of(own) * size / 12).backward()
        assert heads.gate.linear.weight.grad is not None
        assert not torch.allclose(heads.gate.linear.weight.grad, whole["gate.linear.weight"], rtol=1e-2)


def _trained(coverage_weight: float, classifier_weight: float) -> tuple[float, float]:
    """Mean soft gate and accuracy on new rows, after training heads on a noisy three-class task."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 20))

    def rows(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = rng.integers(0, 3, n)
        spread = rng.choice([0.5, 4.0], n)[:, None]
        return torch.from_numpy(centres[labels] + spread * rng.normal(size=(n, 20))).float(), torch.from_numpy(labels)

    torch.manual_seed(0)
    torch.set_num_threads(1)  # so small that threads only wait for each other
    heads = Heads(20, 3, 8, 0.0)
    objective = losses.Objective(
        TrainConfig(
            selective_weight=1, coverage_weight=coverage_weight, target_coverage=0.8,
            classifier_weight=classifier_weight, auxiliary_weight=0,
        )
    )  # fmt: skip
    x, y = rows(600)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.02, weight_decay=0.0)
    for _ in range(400):
        outputs = heads(x, x)
        part = losses.Part(outputs, y, torch.ones(3))
        own = objective.sums(part)
        optimizer.zero_grad()
        (objective.shared(own, own) + objective.added(part) / len(y)).backward()
        optimizer.step()
    x, y = rows(2000)
    with torch.no_grad():
        outputs = heads(x, x)
    accuracy = float((outputs.logits_a.argmax(1) == y).float().mean())
    return float(torch.sigmoid(outputs.gate_logit).mean()), accuracy


def test_selective_risk_alone_collapses_and_the_hinge_holds_it() -> None:
    alone, poor = _trained(0, 0)
    held, better = _trained(32, 0.5)
    assert alone < 0.4, "the gate shuts on all but rows already right"
    assert held > 0.7
    assert better > poor + 0.15


# ------------------------------------------------------------------------------------------------
# The refit


def learned(rows: int = 1200, noise: float = 1.5, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features whose first two columns tell the class and whose third tells how noisy the label is; groups of 4."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 6))
    flip = rng.random(rows) < np.where(x[:, 2] > 0, 0.25, 0.02) * (noise > 0)
    y = ((x[:, 0] + x[:, 1] > 0) ^ flip).astype(np.int64)
    return x, y, np.array([f"g{i // 4}" for i in range(rows)])


LOGITS = np.array([[-1.0, 1.0], [-1.0, 1.0], [0, 0], [0, 0], [0, 0], [0, 0]])


def score(fit, x: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    return np.column_stack([x, margin(x @ LOGITS)]) @ fit.weight + fit.bias


def test_the_refitted_gate_ranks_better_than_the_margin_and_is_a_probability() -> None:
    x, y, groups = learned()
    fit = fit_gate([x], [x @ LOGITS], y, groups.tolist(), np.ones(2), folds=5, seed=0)
    assert fit.form == "features and margin"
    new, truth, _ = learned(4000, seed=1)
    wrong = (new @ LOGITS).argmax(1) != truth
    gate = score(fit, new)
    assert augrc(gate, wrong) < 0.8 * augrc(margin(new @ LOGITS), wrong)
    assert float((1 / (1 + np.exp(-gate))).mean()) == pytest.approx(1 - wrong.mean(), abs=0.03)
    again = fit_gate([x], [x @ LOGITS], y, groups.tolist(), np.ones(2), folds=5, seed=0)
    assert again.weight.tobytes() == fit.weight.tobytes()


def test_labels_of_a_fold_do_not_reach_the_head_that_answers_it() -> None:
    # Labels are pure noise and features more than rows: a head that saw them would be right on every row.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(120, 300)), rng.integers(0, 2, 120)
    groups = [f"g{i // 3}" for i in range(120)]
    fit = fit_gate([x], [np.column_stack([0 * x[:, 0], x[:, 0]])], y, groups, np.ones(2), folds=5, seed=0)
    assert 0.35 < fit.n_errors / fit.n_rows < 0.65
    folds = fold_of(groups, 5, 0)
    assert all(len(set(folds[3 * k : 3 * k + 3])) == 1 for k in range(40))
    assert np.bincount(folds).tolist() == [24] * 5


def test_the_gate_is_the_regression_sklearn_finds() -> None:
    from stage1_pro.training.gate_head import _logistic

    x, y, _ = learned(400)
    # A penalty of 4 on a feature is one of 1 on half of it; the last column is the margin, whose own is 1.
    scale = np.append(np.full(x.shape[1] - 1, 2.0), 1.0)
    mine = _logistic(x, y.astype(float), 4.0)
    judge = LogisticRegression(C=1.0, tol=1e-10, max_iter=1000).fit(x / scale, y)
    np.testing.assert_allclose(mine[:-1], judge.coef_[0] / scale, atol=5e-3)
    assert mine[-1] == pytest.approx(judge.intercept_[0], abs=5e-3)


def test_the_gate_reads_margins_on_the_scale_of_the_trained_classifier() -> None:
    """Ten times the logits rank no answer otherwise: the same features weigh as much, and a tenth of each margin."""
    x, y, groups = learned()
    one, ten = (
        fit_gate([x], [scale * x @ LOGITS], y, groups.tolist(), np.ones(2), folds=5, seed=0) for scale in (1, 10)
    )
    assert (one.form, ten.form) == ("features and margin",) * 2 and abs(one.weight[-1]) > 0.01
    scales = np.append(np.ones(x.shape[1]), 10)
    np.testing.assert_allclose(ten.weight * scales, one.weight, rtol=1e-3, atol=1e-3)
    assert ten.bias == pytest.approx(one.bias, abs=1e-3)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("no error", "no answer on held-out train rows was wrong"),
        ("one group", "all train rows are of one group"),
        ("few errors", "group\\(s\\) hold a wrong answer: too few"),
    ],
)
def test_correctness_that_cannot_be_fitted_gives_the_margin_and_says_why(case: str, reason: str) -> None:
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 200)
    x = rng.normal(size=(200, 6)) * 0.1
    x[:, 0] += 4 * (2 * y - 1)
    if case == "few errors":
        y[:4] = 1 - y[:4]
    groups = ["g"] * 200 if case == "one group" else [f"g{i // 2}" for i in range(200)]
    fit = fit_gate([x], [x @ LOGITS], y, groups, np.ones(2), folds=5, seed=0)
    assert fit.form == "margin alone"
    assert re.search(reason, fit.reason)
    assert fit.weight[-1] > 0
    assert not fit.weight[:-1].any()
    assert case != "few errors" or fit.n_errors < FEWEST_ERROR_GROUPS
    with pytest.raises(InputError, match="views must .*2.*got 0 and 5"):
        fit_gate([], [], y, groups, np.ones(2), folds=5, seed=0)


SMALL = ["model.image_size=32", "train.epochs=2", "train.batch_size=32", "train.workers=0", "gate.views=1"]


def test_training_stores_both_gates_and_says_which_ranks_better(streets_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(streets_run, tmp_path / "run"))
    train(run, load_config(None, SMALL))
    content = checkpoint.load(run / "model_best.pth")
    model, _ = checkpoint.load_run_model(run)
    joint = checkpoint.load_joint_gate(run / "model_best.pth", model)
    assert joint is not None
    assert not torch.equal(joint.linear.weight, model.heads.gate.linear.weight)
    assert content["gate_fit"]["n_rows"] == len(Splits.read(run / "splits.json").of("train"))

    select = infer_split(run, "val_select")
    assert select.joint_gate_logits is not None
    choice = GateChoice.read(run / "gate.json")
    wrong = select.logits_a.argmax(1) != select.labels
    gate, sure = augrc(select.gate_logits, wrong), augrc(margin(select.logits_a), wrong)
    assert choice.gate_augrc.value == pytest.approx(gate)
    assert choice.softmax_augrc.value == pytest.approx(sure, abs=1e-4)
    assert choice.joint_gate_augrc is not None
    assert choice.joint_gate_augrc.value == pytest.approx(augrc(select.joint_gate_logits, wrong))
    assert choice.difference.value == pytest.approx(gate - sure, abs=1e-4)
    assert choice.confidence == ("gate" if gate < sure else "softmax")
    assert choice.model_fingerprint == model.fingerprint()
    calibration = Predictions.load(run / "val_calib.npz")
    assert calibration.model_fingerprint == model.fingerprint(), "calibration must speak of the refitted gate"
    assert calibration.joint_gate_logits is None

    before = {name: (run / name).read_bytes() for name in ("model_best.pth", "gate.json", "val_calib.npz")}
    train(run, resume=True)
    assert all((run / name).read_bytes() == data for name, data in before.items()), "fitting twice changes nothing"

    evaluation = stage1_pro.evaluate(run, n_replicates=100)
    test = infer_split(run, "val_test")
    wrong = test.logits_a.argmax(1) != test.labels
    assert evaluation.value("gate_augrc", "stage_a") == pytest.approx(augrc(test.gate_logits, wrong))
    assert evaluation.value("softmax_augrc", "stage_a") == evaluation.value("augrc", "stage_a")
    assert evaluation.measure("gate_minus_softmax_augrc", "stage_a").value == pytest.approx(
        evaluation.value("gate_augrc", "stage_a") - evaluation.value("softmax_augrc", "stage_a")
    )
    page = (run / "report.html").read_text()
    assert "What knows when Stage A is right?" in page
    assert "The gate before it was refitted" in page


def test_a_joint_gate_stays_as_training_left_it(streets_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(streets_run, tmp_path / "run"))
    train(run, load_config(None, [*SMALL, "gate.fit=joint", "gate.confidence=gate", "train.epochs=1"]))
    assert "joint_gate_state_dict" not in checkpoint.load(run / "model_best.pth")
    choice = GateChoice.read(run / "gate.json")
    assert (choice.fit, choice.form, choice.confidence, choice.joint_gate_augrc) == ("joint", "joint", "gate", None)


# ------------------------------------------------------------------------------------------------
# The tap


def test_largest_exit_keeps_stage_bs_error_and_cuts_no_tie() -> None:
    sure = np.array([0.9, 0.8, 0.7, 0.7, 0.6])
    right = np.zeros(5, dtype=bool)
    assert largest_exit(sure, right, right) == (1.0, 0.0)
    wrong_at = lambda *rows: np.isin(np.arange(5), rows)  # noqa: E731
    assert largest_exit(sure, wrong_at(3), right) == (0.4, 0.0), "the tie at .7 goes as one"
    assert largest_exit(sure, wrong_at(0), right) == (0.0, 0.0)
    assert largest_exit(sure, wrong_at(0), wrong_at(1)) == (1.0, 0.2), "Stage B's own error may be traded"
    rng = np.random.default_rng(0)
    for _ in range(50):
        sure, a, b = rng.integers(0, 8, 30) / 8, rng.random(30) < 0.2, rng.random(30) < 0.15
        options = [0.0] + [
            float((sure >= t).mean()) for t in np.unique(sure) if np.where(sure >= t, a, b).sum() <= b.sum()
        ]
        assert largest_exit(sure, a, b)[0] == max(options)


def test_cost_is_that_of_the_blocks_run() -> None:
    assert cost(6, 12, 0.8) == pytest.approx(1 / 1.6667, rel=1e-4)
    assert cost(12, 12, 0.3) == 1
    assert candidates(12) == [4, 6, 8, 12]
    assert candidates(4) == [1, 2, 3, 4]
    assert candidates(1) == [1]


def test_the_cheapest_tap_at_equal_risk_is_chosen() -> None:
    rng = np.random.default_rng(0)
    y = (rng.integers(0, 2, 400), rng.integers(0, 2, 400))
    make = lambda strength: [  # noqa: E731
        np.column_stack([strength * (2 * labels - 1) + rng.normal(size=400), rng.normal(size=400)]) for labels in y
    ]
    features = {1: make(0.2), 2: make(2.5), 4: make(2.5)}
    choice = choose_tap(
        {k: v[0] for k, v in features.items()}, {k: v[1] for k, v in features.items()}, y, np.ones(2),
        {"train": "a", "val_select": "b"},
    )  # fmt: skip
    assert choice.tap == 2
    costs = {one.tap: one.cost for one in choice.candidates}
    assert costs[2] < costs[1] <= 1
    assert costs[4] == 1
    assert all(one.cascade_error <= choice.error_b for one in choice.candidates)


def test_an_automatic_tap_is_measured_stored_and_kept(streets_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(streets_run, tmp_path / "run"))
    with pytest.raises(InputError, match="model.tap must .*got auto"):
        train(run, load_config(None, [*SMALL, "model.tap=auto"]))
    create_model(ModelConfig(), ["a", "b"], "b", 0).backbone.hf.save_pretrained(tmp_path / "backbone")
    options = [*SMALL, "model.tap=auto", f"model.backbone={tmp_path / 'backbone'}", "model.image_size=48",
               "train.epochs=1"]  # fmt: skip
    train(run, load_config(None, options))
    choice = TapChoice.read(run / "tap.json")
    assert [one.tap for one in choice.candidates] == [1, 2, 3, 4]
    assert RunConfig.read(run / "config.json").config.model.tap == choice.tap
    assert checkpoint.load_run_model(run)[0].tap == choice.tap
    before = (run / "tap.json").read_bytes()
    train(run, load_config(None, options), resume=True)
    assert (run / "tap.json").read_bytes() == before


def test_features_at_a_tap_are_what_stage_a_starts_from() -> None:
    x = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for tap in (1, 3, 4):
            model = create_model(ModelConfig(tap=tap), ["a", "b"], "b", 0).eval()
            assert torch.equal(model.features_at(x, [1, 3, 4])[tap], model.features(x)[0])
