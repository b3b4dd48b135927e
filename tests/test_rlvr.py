"""Rewards, their gradients, reward tuning, replay and proposals."""

from __future__ import annotations

import contextlib
import importlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.tiny import make_model, make_run
from torch import nn

import stage1_pro
from stage1_pro.config import Config, load_config
from stage1_pro.continual.learn import mgrpo, rlvr
from stage1_pro.continual.learn import rewards as r
from stage1_pro.continual.learn.mgrpo import ProposalOptions, likelihood_loss, propose
from stage1_pro.continual.learn.replay import Reservoir
from stage1_pro.data.predictions import Predictions
from stage1_pro.data.splits import Splits
from stage1_pro.data.synthetic import render_pool
from stage1_pro.errors import ArtifactError, InputError, NotReachableError
from stage1_pro.metrics.probabilistic import mcc
from stage1_pro.policies.claims import CLAIMS_FILE, Claims
from stage1_pro.policies.policy import read_policy

CLASSES = ("none", "roadwork")


@pytest.fixture(autouse=True)
def _one_torch_thread(_same_torch_threads):
    """The tensors here are so small that a second thread only waits."""
    torch.set_num_threads(1)


@pytest.fixture
def bench(repository, monkeypatch):
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return importlib.import_module("continual_learning")


def truth_of(labels, source="owner"):
    return r.verified(labels, source, classes=CLASSES, positive="roadwork")


def expected_set_reward(positive, is_positive, reward):
    """Expected reward of a set whose rows are answered positive independently, exactly: by the laws of both counts."""
    truth = torch.as_tensor(is_positive)
    laws = []
    for rows in (positive[truth], positive[~truth]):
        law = positive.new_ones(1)
        for p in rows:
            law = torch.cat([law * (1 - p), law.new_zeros(1)]) + torch.cat([law.new_zeros(1), law * p])
        laws.append(law)
    tp, fp = np.meshgrid(*(np.arange(len(law), dtype=np.float64) for law in laws), indexing="ij")
    table = reward(tp, fp, len(laws[0]) - 1 - tp, len(laws[1]) - 1 - fp)
    return laws[0] @ torch.as_tensor(table, dtype=positive.dtype) @ laws[1]


# -------------------------------------------------------------------------------- rewards


def test_action_rewards_by_hand():
    spec = r.RewardSpec(right=1, k_fp=2, k_fn=5, defer_cost=0.1, guess=-0.5, abstain_cost=0.25)
    found = r.action_rewards(spec, truth_of([0, 1]), [1, 1])
    np.testing.assert_allclose(found, [[1, -2, -2.1, -0.75], [-5, 1, 0.9, -0.75]])


def test_earned_agrees_with_the_table_of_actions():
    rng = np.random.default_rng(0)
    labels, b, action = rng.integers(0, 2, 200), rng.integers(-1, 2, 200), rng.integers(0, 4, 200)
    table = r.action_rewards(r.RewardSpec(k_fp=1), truth_of(labels), b)
    answers = np.where(action < 2, action, np.where(action == 2, b, -1))
    got = r.earned(r.RewardSpec(k_fp=1), truth_of(labels), r.Actions(answers, action == 2))
    np.testing.assert_allclose(got, table[np.arange(200), action])


@pytest.mark.parametrize("source", ["model", "match", "stage_b", ""])
def test_pseudo_labels_are_refused_as_reward(source):
    with pytest.raises(InputError, match="sources must be owner or review for a reward"):
        truth_of([0, 1], source)
    with pytest.raises(InputError, match=f"got '{source}' at row 1"):
        truth_of([0, 1], ["owner", source])
    with pytest.raises(InputError, match="reward"):
        r.Verified(np.array([0]), np.array([source]), CLASSES, "roadwork")


@pytest.mark.parametrize(
    ("labels", "message"), [([2], "from 0 to 1"), ([-1], "from 0 to 1"), ([0.5], "class indices"), ([[0]], "shape")]
)
def test_labels_that_are_none(labels, message):
    with pytest.raises(InputError, match=message):
        truth_of(labels)


def test_decisions_of_other_rows_or_classes():
    truth = truth_of([0, 1])
    with pytest.raises(InputError, match="answers_b must have shape"):
        r.action_rewards(r.RewardSpec(), truth, [0])
    with pytest.raises(InputError, match="from -1"):
        r.earned(r.RewardSpec(), truth, r.Actions(np.array([0, 2]), np.zeros(2, dtype=bool)))
    with pytest.raises(InputError, match="positive must be one of"):
        r.verified([0], "owner", classes=CLASSES, positive="works")


def test_mcc_of_counts_is_that_of_rows_and_zero_where_undefined():
    rng = np.random.default_rng(1)
    said, y = rng.integers(0, 2, (2, 300))
    counts = [(said & y).sum(), (said & ~y & 1).sum(), ((1 - said) & y).sum(), ((1 - said) & (1 - y)).sum()]
    assert r.mcc_reward(*counts) == pytest.approx(mcc(said, y))
    assert r.mcc_reward(3, 0, 0, 0) == 0
    assert r.validator_reward(5, 0, 0, 5) == 1


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_difference_rewards_are_the_sets_with_one_answer_changed(pairs):
    said, y = (np.array(column) for column in zip(*pairs, strict=True))

    def reward(answers):
        return r.validator_reward(
            (answers & y).sum(), (answers & ~y).sum(), (~answers & y).sum(), (~answers & ~y).sum()
        )

    for i, found in enumerate(r.difference_rewards(said, y, r.validator_reward)):
        up, down = said.copy(), said.copy()
        up[i], down[i] = True, False
        assert found == pytest.approx(reward(up) - reward(down))


# -------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("reward", [r.mcc_reward, r.validator_reward])
def test_set_gradient_equals_enumeration_at_eight_rows(reward):
    rng = np.random.default_rng(2)
    y = np.array([1, 1, 1, 0, 0, 0, 0, 1], dtype=bool)
    logit = torch.tensor(rng.normal(size=8), requires_grad=True)
    joint = np.array(list(itertools.product([False, True], repeat=8)))
    worth = torch.tensor(
        reward((joint & y).sum(1), (joint & ~y).sum(1), (~joint & y).sum(1), (~joint & ~y).sum(1)).copy()
    )

    def chance(p):
        return torch.where(torch.from_numpy(joint), p, 1 - p).prod(1)

    # Brute force: the gradient of the sum over all 256 answers of the set.
    (brute,) = torch.autograd.grad(chance(logit.sigmoid()) @ worth, logit)
    # Difference rewards in O(n), averaged over the same 256 by their chances.
    p = logit.sigmoid()
    mean = chance(p.detach()) @ torch.from_numpy(r.difference_rewards(joint, y, reward))
    (own,) = torch.autograd.grad(p @ mean, logit)
    (exact,) = torch.autograd.grad(expected_set_reward(logit.sigmoid(), y, reward), logit)
    assert (own - brute).abs().max() < 1e-6
    assert (exact - brute).abs().max() < 1e-6
    assert brute.abs().max() > 1e-2


def test_set_loss_is_unbiased():
    rng = np.random.default_rng(3)
    y = rng.random(40) < 0.4
    logit = torch.tensor(rng.normal(size=40), requires_grad=True)
    (exact,) = torch.autograd.grad(-expected_set_reward(logit.sigmoid(), y, r.mcc_reward), logit)
    draws = []
    for _ in range(200):
        loss = rlvr.set_loss(logit.sigmoid(), y, r.mcc_reward, 100, rng)
        draws.append(torch.autograd.grad(loss, logit)[0])
    z = (torch.stack(draws).mean(0) - exact) / (torch.stack(draws).std(0) / 200**0.5)
    assert z.abs().max() < 4.5


def test_rloo_mean_over_20000_draws_is_the_exact_gradient():
    torch.manual_seed(4)
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[1, -3.5, 0.9, -0.2], [-3.5, 1, 0.9, -0.2], [1, -3.5, -3.6, -0.2]], dtype=torch.float64)
    (exact,) = torch.autograd.grad(rlvr.exact_loss(logits.log_softmax(1), rewards), logits)
    draws, group = 20_000, 4
    actions = torch.multinomial(logits.detach().softmax(1), draws * group, replacement=True).reshape(3, draws, group)
    got = rewards[:, None].expand(3, draws, 4).gather(2, actions)
    each = []
    for part in np.array_split(np.arange(draws), 200):
        log_probs = logits.log_softmax(1).repeat_interleave(len(part), 0)
        loss = rlvr.rloo_loss(log_probs, actions[:, part].reshape(-1, group), got[:, part].reshape(-1, group))
        each.append(torch.autograd.grad(loss, logits)[0])
    blocks = torch.stack(each)
    z = (blocks.mean(0) - exact) / (blocks.std(0) / 200**0.5)
    assert z.abs().max() < 4
    assert exact.abs().max() > 1e-2


def test_clipped_gradient_at_the_old_policy_is_the_exact_one_and_stops_beyond_the_clip():
    torch.manual_seed(5)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(6, 4, dtype=torch.float64)
    old = logits.detach().log_softmax(1)
    (exact,) = torch.autograd.grad(rlvr.exact_loss(logits.log_softmax(1), rewards), logits)
    (own,) = torch.autograd.grad(rlvr.clipped_loss(logits.log_softmax(1), old, rewards, 0.2), logits)
    torch.testing.assert_close(own, exact)
    # Far along the gradient nothing pulls any more.
    best = rewards.argmax(1, keepdim=True)
    far = torch.full((6, 4), -50.0, dtype=torch.float64).scatter(1, best, 50.0).requires_grad_()
    (none,) = torch.autograd.grad(rlvr.clipped_loss(far.log_softmax(1), old, rewards, 0.2), far)
    assert none.abs().max() < 1e-12


def test_heads_policy_is_a_distribution_over_exits_and_deferral():
    torch.manual_seed(6)
    from stage1_pro.models.model import Heads

    heads = Heads(5, 3, 4, 0.0)
    x = torch.randn(7, 5)
    out = rlvr.HeadsPolicy(heads)(x, x).exp()
    assert out.shape == (7, 5)
    torch.testing.assert_close(out.sum(1), torch.ones(7))
    torch.testing.assert_close(out[:, 3], 1 - heads(x, x).gate_logit.sigmoid())
    assert (out[:, 4] == 0).all()
    own = rlvr.log_probs_of(rlvr.HeadsPolicy(heads), (x, x))
    assert float(rlvr.kl(own, own)) == 0


# -------------------------------------------------------------------------------- tuning


class Table(nn.Module):
    """Action logits linear in the inputs."""

    def __init__(self, width=3, actions=4):
        super().__init__()
        self.linear = nn.Linear(width, actions)

    def forward(self, x):
        return self.linear(x).log_softmax(1)


def some_rows(n=200, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    y = (x[:, 0] + 0.5 * rng.normal(size=n) > 0).astype(np.int64)
    table = r.action_rewards(r.RewardSpec(defer_cost=0.5), truth_of(y), y)
    return rlvr.BanditRows((torch.from_numpy(x).float(),), torch.from_numpy(table).float())


@pytest.mark.parametrize("method", ["exact", "clipped", "rloo"])
def test_tuning_earns_more_touches_only_what_learns_and_repeats_to_the_byte(method):
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        policy = Table()
        weight, bias = policy.linear.weight.detach().clone(), policy.linear.bias.detach().clone()
        options = rlvr.TuneOptions(method=method, lr=0.05, epochs=15, batch_size=64)
        tuned = rlvr.fit_policy(policy, [policy.linear.weight], some_rows(), some_rows(seed=1), options)
        states.append(policy.linear.weight.detach().clone())
        assert tuned.best > tuned.start + 0.1
        assert torch.equal(policy.linear.bias, bias)
        assert not torch.equal(policy.linear.weight, weight)
        select = some_rows(seed=1)
        assert rlvr.mean_reward(rlvr.log_probs_of(policy, select.inputs), select.rewards) == tuned.best
    assert torch.equal(*states)


def test_tuning_that_does_not_help_ends_where_it_began():
    policy = Table()
    before = policy.linear.weight.detach().clone()
    rows = some_rows()
    against = rlvr.BanditRows(rows.inputs, -rows.rewards)
    rlvr.fit_policy(policy, list(policy.parameters()), against, against, rlvr.TuneOptions(lr=0.05, epochs=30))
    settled = policy.linear.weight.detach().clone()
    tuned = rlvr.fit_policy(policy, list(policy.parameters()), rows, against, rlvr.TuneOptions(lr=0.05, epochs=3))
    assert tuned.best_epoch == 0
    assert torch.equal(policy.linear.weight, settled)
    assert not torch.equal(settled, before)


def test_bad_rows_and_parameters():
    rows = some_rows()
    with pytest.raises(InputError, match="parameters must be one or more"):
        rlvr.fit_policy(Table(), [], rows, rows, rlvr.TuneOptions())
    policy = Table()
    with pytest.raises(InputError, match="says_positive"):
        rlvr.fit_policy(policy, list(policy.parameters()), rows, rows, rlvr.TuneOptions(method="mcc"))
    with pytest.raises(InputError, match="shape"):
        rlvr.BanditRows((torch.zeros(3, 2),), torch.zeros(2, 4))
    with pytest.raises(InputError, match="finite"):
        rlvr.BanditRows((torch.zeros(1, 2),), torch.full((1, 4), float("nan")))


@pytest.mark.slow
def test_exact_with_kl_beats_ce_with_a_tuned_threshold_and_dividing_by_the_sd_hurts(bench):
    found = [bench.tuning_seed(seed) for seed in range(6)]
    base = np.array([one["CE + tuned threshold"] for one in found])
    exact, grpo, rloo = (np.array([one[k] for one in found]) - base for k in ("exact + KL", "GRPO with /SD", "RLOO"))
    assert exact.mean() >= 0.01
    assert grpo.mean() < rloo.mean() - 0.02
    assert grpo.mean() < 0
    assert np.mean([one["MCC of MCC"] - one["MCC of CE"] for one in found]) > 0


# -------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small linear run on rendered scenes, calibrated without a promise."""
    folder = tmp_path_factory.mktemp("run")
    render_pool(folder / "photos", 240, seed=1, size=48)
    run = folder / "run"
    stage1_pro.split(folder / "photos" / "labels.csv", run, positive="roadwork", seed=0)
    config = load_config(None, ["train.mode=linear", "train.epochs=2", "train.workers=0", "model.image_size=48"])
    stage1_pro.train(run, config)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("through", ["heads", "adapter"])
def test_a_tuned_run_is_a_run_without_policy_that_calibrates_again(trained, tmp_path, through):
    out = tmp_path / "tuned"
    options = rlvr.TuneOptions(lr=0.01 if through == "heads" else 0.003, epochs=12, batch_size=32)
    spec = r.RewardSpec(defer_cost=0.2)
    record = rlvr.tune(trained, out, spec=spec, options=options, through=through)
    assert record.reward_after > record.reward_before
    assert "certify again" in record.statement
    assert rlvr.TuningRecord.read(out / "tuning.json") == record
    assert read_policy(out) is None
    calib = Predictions.load(out / "val_calib.npz")
    assert calib.model_fingerprint == record.model_fingerprint != record.parent_fingerprint
    assert stage1_pro.calibrate(out, guarantee="none", target_fnr=0.99).model_fingerprint == record.model_fingerprint
    with pytest.raises(InputError, match="out must be a new folder"):
        rlvr.tune(trained, out)
    if through == "heads":
        again = tmp_path / "again"
        rlvr.tune(trained, again, spec=spec, options=options)
        assert (again / "model_best.pth").read_bytes() == (out / "model_best.pth").read_bytes()


def test_a_row_whose_list_says_a_model_labelled_it_earns_nothing(tmp_path):
    splits = Splits.read(make_run(tmp_path / "run", make_model()) / "splits.json")
    first = splits.of("train")[0]
    rows = [row.model_copy(update={"source": "model" if row == first else "camera 3"}) for row in splits.rows]
    splits = splits.model_copy(update={"rows": rows})
    with pytest.raises(InputError, match="got 'model' at row 0"):
        rlvr.Origin(make_model(), splits, Config(), r.RewardSpec()).rows("train", cached=True)


@pytest.mark.slow
def test_tuning_a_run_refuses_and_takes_uses_along(trained, tmp_path):
    with pytest.raises(InputError, match="another folder"):
        rlvr.tune(trained, trained)
    with pytest.raises(NotReachableError, match="nothing was written"):
        rlvr.tune(trained, tmp_path / "none", options=rlvr.TuneOptions(lr=1e-12, epochs=1))
    assert not list(tmp_path.iterdir())
    # So few photos can certify nothing, which spends no claim; a look at them is counted.
    with contextlib.suppress(NotReachableError):
        stage1_pro.calibrate(trained, guarantee="none", target_fnr=0.9)
    assert (trained / CLAIMS_FILE).exists()
    out = tmp_path / "tuned"
    rlvr.tune(trained, out, spec=r.RewardSpec(defer_cost=0.2), options=rlvr.TuneOptions(lr=0.01, epochs=12))
    assert Claims.read(out / CLAIMS_FILE) == Claims.read(trained / CLAIMS_FILE)


# -------------------------------------------------------------------------------- replay


def batches(n, parts, seed):
    order = np.random.default_rng(seed).permutation(n)
    for part in np.array_split(order, parts):
        yield [str(i) for i in part], [f"s{i % 3 if i % 50 else 9}" for i in part], {"x": part[:, None] * 1.0}


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(0, 99), st.integers(5, 80))
def test_the_reservoir_does_not_depend_on_order_batches_or_repeats(tmp_path_factory, parts, seed, capacity):
    folder = tmp_path_factory.mktemp("replay")
    one, other = Reservoir(capacity, 7), Reservoir(capacity, 7)
    for batch in batches(200, 1, 0):
        one.add(*batch)
    for batch in batches(200, parts, seed):
        other.add(*batch)
        other.add(*batch)
    other.save(folder / "b.npz")
    back = Reservoir.load(folder / "b.npz")
    back.add(["3"], ["s0"], {"x": np.array([[3.0]])})
    back.save(folder / "c.npz")
    one.save(folder / "a.npz")
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes() == (folder / "c.npz").read_bytes()
    assert len(one) <= capacity
    np.testing.assert_array_equal(one.columns["x"][:, 0], one.ids.astype(int))


def test_the_reservoir_shares_by_stratum_and_samples_evenly():
    kept = np.zeros(300)
    for seed in range(200):
        memory = Reservoir(30, seed)
        for batch in batches(300, 4, seed):
            memory.add(*batch)
        kept[memory.ids.astype(int)] += 1
        counts = dict(zip(*np.unique(memory.strata, return_counts=True), strict=True))
        assert counts["s9"] == 6
        assert {counts[k] for k in ("s0", "s1", "s2")} == {8}
    usual = kept[[i for i in range(300) if i % 50 and i % 3 == 0]]
    assert abs(usual.mean() - 200 * 8 / 98) < 0.5
    assert np.abs(usual - usual.mean()).max() < 5 * usual.mean() ** 0.5


def test_the_reservoir_refuses():
    memory = Reservoir(2)
    with pytest.raises(InputError, match="capacity must be"):
        Reservoir(0)
    with pytest.raises(InputError, match="strata must hold a row"):
        memory.add(["a"], [], {})
    memory.add(["a"], ["s"], {"x": np.zeros((1, 2))})
    with pytest.raises(InputError, match="columns must be as before"):
        memory.add(["b"], ["s"], {"x": np.zeros((1, 3))})
    with pytest.raises(InputError, match="strata must be at most"):
        memory.add(["b", "c"], ["t", "u"], {"x": np.zeros((2, 2))})


def test_a_file_that_is_no_reservoir(tmp_path):
    np.savez(tmp_path / "x.npz", ids=np.array(["a"]))
    with pytest.raises(ArtifactError, match="missing: capacity"):
        Reservoir.load(tmp_path / "x.npz")


# -------------------------------------------------------------------------------- proposals


def test_a_proposal_keeps_its_budget_leaves_the_champion_alone_and_repeats():
    rows, select = some_rows(400), some_rows(400, seed=1)
    torch.manual_seed(1)
    champion = Table()
    before = {k: v.clone() for k, v in champion.state_dict().items()}
    found = []
    for _ in range(2):
        options = ProposalOptions(steps=60, lr=0.02, anchor_budget=0.2)
        found.append(propose(champion, rows, rows, select, anchor=rows.inputs, recent=select.inputs, options=options))
    assert all(torch.equal(champion.state_dict()[k], v) for k, v in before.items())
    assert found[0].steps == found[1].steps
    tried = {step.share: step for step in found[0].steps}
    assert list(tried) == [1.0, 0.7, 0.4]
    assert found[0].share is not None
    best = tried[found[0].share]
    assert best.within_budget
    assert best.anchor_kl <= 0.2
    assert best.select_reward > found[0].champion_reward
    candidate = Table()
    candidate.load_state_dict(found[0].state)
    assert float(rlvr.kl(rlvr.log_probs_of(candidate, rows.inputs), rlvr.log_probs_of(champion, rows.inputs))) <= 0.2
    assert rlvr.mean_reward(rlvr.log_probs_of(candidate, select.inputs), select.rewards) == best.select_reward


def test_no_step_within_the_budget_is_no_proposal():
    rows = some_rows(300)
    options = ProposalOptions(steps=20, lr=0.05, anchor_budget=1e-9)
    found = propose(Table(), rows, None, rows, anchor=rows.inputs, recent=rows.inputs, options=options)
    assert found.state is None
    assert found.share is None
    assert not any(step.within_budget for step in found.steps)


def test_a_proposal_moves_only_what_learns():
    rows = some_rows(300)
    champion = Table()
    options = ProposalOptions(steps=40, lr=0.05, anchor_budget=100)
    found = propose(
        champion, rows, None, rows, anchor=rows.inputs, recent=rows.inputs, options=options, learns=["linear.bias"]
    )
    assert found.state is not None
    assert torch.equal(found.state["linear.weight"], champion.linear.weight)
    assert not torch.equal(found.state["linear.bias"], champion.linear.bias)
    with pytest.raises(InputError, match="learns must name"):
        propose(champion, rows, None, rows, anchor=rows.inputs, recent=rows.inputs, learns=["gate.weight"])
    with pytest.raises(InputError, match="anchor and recent"):
        propose(champion, rows, None, rows, anchor=(), recent=rows.inputs)


# -------------------------------------------------------------------------------- a run, proposed


def test_likelihood_moves_a_policy_that_is_sure_and_wrong_where_its_reward_does_not():
    logits = torch.tensor([[20.0, 0.0]], requires_grad=True)
    rewards = torch.tensor([[-3.5, 1.0]])
    moved = {}
    for name, loss in (
        ("reward", rlvr.exact_loss(logits.log_softmax(1), rewards)),
        ("likelihood", likelihood_loss(logits.log_softmax(1), rewards, 0.5)),
    ):
        (gradient,) = torch.autograd.grad(loss, logits)
        moved[name] = float(gradient.abs().max())
    assert moved["reward"] < 1e-6 < 0.9 < moved["likelihood"]
    # Its optimum is the softmax of the rewards.
    best = (rewards / 0.5).log_softmax(1).requires_grad_()
    (gradient,) = torch.autograd.grad(likelihood_loss(best.log_softmax(1), rewards, 0.5), best)
    assert float(gradient.abs().max()) < 1e-6


@pytest.fixture(scope="module")
def to_propose(trained, tmp_path_factory):
    """The trained run, of whose train rows one half is known and the other new; half of val_select is the anchor."""
    splits = Splits.read(trained / "splits.json")
    train, select = splits.of("train"), splits.of("val_select")
    return {
        "known": {row.sha256 for row in train[::2]},
        "anchor": {row.sha256 for row in select[::2]},
        "recent": [splits.path(row) for row in train[1::8]],
        "spec": r.RewardSpec(defer_cost=0.2),
        "options": ProposalOptions(lr=0.01, steps=80, batch_size=32, anchor_budget=5.0),
    }


@pytest.mark.slow
def test_a_proposed_run_earns_more_remembers_and_calibrates_again(trained, to_propose, tmp_path):
    record = mgrpo.propose_run(trained, tmp_path / "one", **to_propose)
    assert record.reward_after > record.reward_before
    n = len(Splits.read(trained / "splits.json").of("train"))
    assert sum(record.replayed.values()) + record.n_new == n and record.n_new > 0
    assert mgrpo.ProposalRecord.read(tmp_path / "one/proposal.json") == record
    assert read_policy(tmp_path / "one") is None
    assert stage1_pro.calibrate(tmp_path / "one", guarantee="none", target_fnr=0.99).model_fingerprint == (
        record.model_fingerprint
    )
    remembered = Reservoir.load(tmp_path / "one" / mgrpo.RESERVOIR)
    assert len(remembered) == n
    # Same inputs, same bytes; and a reservoir of these features is taken, not made again.
    again = mgrpo.propose_run(trained, tmp_path / "two", **to_propose)
    assert again == record
    assert (tmp_path / "one/model_best.pth").read_bytes() == (tmp_path / "two/model_best.pth").read_bytes()
    small = Reservoir(10, 0)
    keep = remembered.ids[:10]
    small.add(keep, remembered.strata[:10], {name: column[:10] for name, column in remembered.columns.items()})
    small.save(tmp_path / "small.npz")
    taken = mgrpo.propose_run(trained, tmp_path / "three", reservoir=tmp_path / "small.npz", **to_propose)
    assert sum(taken.replayed.values()) == 10
    columns = {**small.columns, "features": np.full(10, "0" * 64)}
    other = Reservoir(10, 0)
    other.add(keep, remembered.strata[:10], columns)
    other.save(tmp_path / "other.npz")
    made = mgrpo.propose_run(trained, tmp_path / "four", reservoir=tmp_path / "other.npz", **to_propose)
    assert made.replayed == record.replayed


@pytest.mark.slow
def test_proposing_a_run_refuses(trained, to_propose, tmp_path):
    with pytest.raises(NotReachableError, match="nothing was written"):
        mgrpo.propose_run(trained, tmp_path / "none", **{**to_propose, "options": ProposalOptions(lr=1e-12, steps=1)})
    everything = {row.sha256 for row in Splits.read(trained / "splits.json").rows}
    with pytest.raises(NotReachableError, match="rows that are not known"):
        mgrpo.propose_run(trained, tmp_path / "few", **{**to_propose, "known": everything})
    for change, name in (({"anchor": set()}, "anchor"), ({"recent": []}, "recent")):
        with pytest.raises(InputError, match=f"{name}.* must be 1 or more"):
            mgrpo.propose_run(trained, tmp_path / "few", **{**to_propose, **change})
    assert not list(tmp_path.iterdir())
