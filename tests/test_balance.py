"""balance.py: every loss at its minimum and against a slow second writing; what carries a gradient."""
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROUTERS, batch_of, config_of, model_of, run

import balance as bal
from routers import pairs

# each loss of a uniform routing, at E experts; device and comm count groups. Its least value, but for btx, where
# it is a saddle: see below.
MINIMUM = {"switch": 1, "gshard": lambda E: 1 / E ** 2, "importance": 0, "load": 0, "btx": 1, "btx_detached": 1,
           "deepseek": 1, "device": 1, "comm": 1}


def settings_of(**more):
    return SimpleNamespace(**dict(n_groups=4, topk_groups=2, balance="none", balance_loss=0.0, load_loss=0.0,
                                  device_loss=0.0, comm_loss=0.0, z_loss=0.0) | more)


def loss_of(name, r, shape, c=None):
    """A loss by name, on a Routing of B * T tokens."""
    load, c = bal.expert_counts(r.expert, r.probs.shape[1], r.keep), c or settings_of()
    if name == "load":
        return bal.load_loss(r)
    if name in ("device", "comm"):
        return {"device": bal.device_loss, "comm": bal.comm_loss}[name](r, c, shape)
    names = {"importance": "importance_load"}
    return bal.LOSSES[names.get(name, name)](r, load, c, shape)


def even_routing(B=2, T=8, E=8, k=2):
    """Uniform probabilities; in each sequence every expert is first choice equally often and second choice
    equally often. A token's two experts lie in different groups of two, so that it uses exactly 2 groups."""
    t = torch.arange(B * T) % E
    indices = torch.stack([(t + 2 * j) % E for j in range(k)], -1)
    probs = torch.full((B * T, E), 1 / E).requires_grad_()
    logits = torch.zeros(B * T, E)
    return pairs(indices, torch.full(indices.shape, 1 / k), logits=logits, probs=probs,
                 smooth_load=torch.full((E,), B * T * k / E))


def random_routing(B=2, T=6, E=8, k=2, seed=0, sharp=2.0):
    g = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(B * T, E, generator=g)
    probs = logits.softmax(-1).requires_grad_()
    top = probs.topk(k, -1)
    smooth = torch.rand(E, generator=g).requires_grad_()
    return pairs(top.indices, top.values, logits=logits, probs=probs, smooth_load=smooth)


# ---- minima

@pytest.mark.parametrize("name", MINIMUM)
def test_perfect_balance_scores_exactly_the_stated_minimum(name):
    stated = MINIMUM[name](8) if callable(MINIMUM[name]) else MINIMUM[name]
    assert loss_of(name, even_routing(), (2, 8)).item() == pytest.approx(stated, abs=1e-6)


@pytest.mark.parametrize("name", MINIMUM)
def test_imbalance_scores_more(name):
    least = loss_of(name, even_routing(T=6, E=6), (2, 6), settings_of(n_groups=3)).item()
    one = torch.tensor([0, 1]).expand(12, 2)                        # all tokens to the same two experts
    probs = torch.tensor([0.6, 0.3, 0.02, 0.02, 0.03, 0.03]).expand(12, 6)
    r = pairs(one, probs[:, :2], probs=probs, smooth_load=torch.tensor([12.0, 12, 0, 0, 0, 0]))
    if name == "comm":                                      # two of the three groups get every token
        r = r._replace(expert=torch.tensor([0, 2]).repeat(12))
    assert float(loss_of(name, r, (2, 6), settings_of(n_groups=3))) > 1.2 * least + 0.01


# ---- against loops

@pytest.mark.parametrize("k", [1, 2, 3])
def test_switch_and_gshard_and_btx_against_loops(k):
    r = random_routing(k=k)
    n, E = r.probs.shape
    P = [sum(r.probs[t, e].item() for t in range(n)) / n for e in range(E)]
    pair = list(zip(r.expert.tolist(), r.weight.tolist()))
    f = [sum(e == i for e, _ in pair) / (n * k) for i in range(E)]
    first = [sum(e == i for e, _ in pair[::k]) / n for i in range(E)]
    u = [sum(w for e, w in pair if e == i) / n for i in range(E)]
    for name, factor, weights in (("switch", E, f), ("gshard", 1 / E, first), ("btx", E, u), ("btx_detached", E, u)):
        expected = factor * sum(map(math.prod, zip(weights, P)))
        assert loss_of(name, r, (2, 6)).item() == pytest.approx(expected, rel=1e-5)


def test_importance_and_load_against_numpy():
    r = random_routing()
    importance = [sum(w for e, w in zip(r.expert.tolist(), r.weight.tolist()) if e == i) for i in range(8)]
    for name, values in (("importance", importance), ("load", r.smooth_load.tolist())):
        mean = sum(values) / 8
        cv2 = sum((v - mean) ** 2 for v in values) / 8 / mean ** 2          # population variance
        assert loss_of(name, r, (2, 6)).item() == pytest.approx(cv2, rel=1e-5)


def test_load_loss_is_zero_without_noise():
    assert bal.load_loss(random_routing()._replace(smooth_load=None)).item() == 0


@pytest.mark.parametrize("k,topk_groups", [(1, 1), (2, 2), (3, 2)])
def test_deepseek_losses_against_loops(k, topk_groups):
    """DeepSeek-V2 eq. 23-31, sequence by sequence."""
    B, T, E, D = 3, 5, 8, 4
    r, c = random_routing(B, T, E, k), settings_of(topk_groups=topk_groups)
    size, expert, sums = E // D, r.expert.view(B, T, k).tolist(), [0.0, 0.0, 0.0]
    for b in range(B):
        count = [sum(row.count(i) for row in expert[b]) for i in range(E)]
        f = [E / (k * T) * n for n in count]
        P = [sum(r.probs[b * T + t, i].item() for t in range(T)) / T for i in range(E)]
        sums[0] += sum(f[i] * P[i] for i in range(E))
        for j in range(D):
            group = range(j * size, (j + 1) * size)
            group_P = sum(P[i] for i in group)
            sums[1] += sum(f[i] for i in group) / size * group_P
            sent = sum(any(e in group for e in row) for row in expert[b])
            sums[2] += D / (topk_groups * T) * sent * group_P
    for name, expected in zip(("deepseek", "device", "comm"), sums):
        assert loss_of(name, r, (B, T), c).item() == pytest.approx(expected / B, rel=1e-5)


def test_deepseek_balances_each_sequence_and_switch_only_the_batch():
    """One sequence all on expert 0, the other all on expert 1: even over the batch, not within a sequence."""
    expert = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]).unsqueeze(1)
    probs = torch.nn.functional.one_hot(expert[:, 0], 2).float()
    r = pairs(expert, torch.ones(8, 1), probs=probs)
    assert loss_of("switch", r, (2, 4)).item() == 1 and loss_of("deepseek", r, (2, 4)).item() == 2


def test_z_loss_by_hand():
    r = random_routing()
    by_hand = [math.log(sum(math.exp(z) for z in row)) ** 2 for row in r.logits.tolist()]
    assert bal.z_loss(r).item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 30), st.integers(0, 10 ** 6), st.booleans())
def test_expert_counts(E, P, seed, masked):
    g = torch.Generator().manual_seed(seed)
    expert = torch.randint(0, E, (P,), generator=g)
    keep = torch.rand(P, generator=g) < 0.5 if masked else None
    kept = expert if keep is None else expert[keep]
    counts = bal.expert_counts(expert, E, keep)
    assert counts.dtype == torch.float32 and counts.tolist() == kept.bincount(minlength=E).tolist()


# ---- gradients

@pytest.mark.parametrize("name", ["switch", "gshard", "deepseek", "device", "comm"])
def test_counted_fractions_carry_no_gradient(name):
    """The gradient of sum f P with respect to probs is f / n, a constant: nothing of it comes through f."""
    r = random_routing()
    loss = loss_of(name, r, (2, 6))
    grad, = torch.autograd.grad(loss, r.probs, create_graph=True)
    assert not grad.requires_grad                               # the loss is linear in probs
    assert loss.item() == pytest.approx((grad * r.probs).sum().item(), rel=1e-5)
    assert grad.any()


def test_importance_and_btx_carry_a_gradient_through_the_gates():
    for name in ("importance", "btx"):
        r = random_routing()
        weight = r.weight.detach().requires_grad_()
        loss_of(name, r._replace(weight=weight), (2, 6)).backward()
        assert weight.grad.any()


def after_descent(name, steps=500, E=8, k=2):
    """(largest load over the mean, loss) after gradient descent on a loss alone: a linear router on fixed tokens,
    nearly uniform at first; gates are those of Mixtral and sum to 1."""
    g = torch.Generator().manual_seed(0)
    x, router = torch.randn(512, 16, generator=g), 0.02 * torch.randn(16, E, generator=g)
    optimizer = torch.optim.Adam([router.requires_grad_()], lr=0.01)
    for _ in range(steps):
        logits = x @ router
        top = logits.topk(k, -1)
        r = pairs(top.indices, top.values.softmax(-1), logits=logits, probs=logits.softmax(-1))
        loss = loss_of(name, r, (1, 512))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    load = bal.expert_counts(r.expert, E)
    return (load.max() / load.mean()).item(), loss.item()


def test_uniform_routing_is_a_saddle_of_btx_and_not_of_the_detached_form():
    """Through both factors the loss falls below the 1 of a uniform routing, and the load gets less even."""
    start, _ = after_descent("btx", steps=1)
    busiest, loss = after_descent("btx")
    assert busiest > 1.2 * start and loss < 0.998
    busiest, _ = after_descent("btx_detached")
    assert busiest < 1.1 < start
    r = random_routing()
    weight = r.weight.detach().requires_grad_()
    loss = loss_of("btx_detached", r._replace(weight=weight), (2, 6))
    assert torch.autograd.grad(loss, weight, allow_unused=True)[0] is None


# ---- what enters the objective

def test_auxiliary_losses_apply_each_coefficient_once():
    r, shape = random_routing(), (2, 6)
    load = bal.expert_counts(r.expert, 8)
    L = {name: loss_of(name, r, shape) for name in MINIMUM} | {"z": bal.z_loss(r)}
    cases = [(dict(balance="none", balance_loss=0.5), 0 * L["z"], 0),
             (dict(balance="switch", balance_loss=0.5), 0.5 * L["switch"], L["switch"]),
             (dict(balance="gshard", balance_loss=0.5), 0.5 * L["gshard"], L["gshard"]),
             (dict(balance="btx", balance_loss=0.5), 0.5 * L["btx"], L["btx"]),
             (dict(balance="btx_detached", balance_loss=0.5), 0.5 * L["btx"], L["btx"]),
             (dict(balance="importance_load", balance_loss=0.5, load_loss=0.25),
              0.5 * L["importance"] + 0.25 * L["load"], L["importance"]),
             (dict(balance="deepseek", balance_loss=0.5, device_loss=0.25, comm_loss=0.125),
              0.5 * L["deepseek"] + 0.25 * L["device"] + 0.125 * L["comm"], L["deepseek"]),
             (dict(balance="loss_free", balance_loss=0.5), 0.5 * L["deepseek"], L["deepseek"])]
    for c, expected, reported in cases:
        for z in (0.0, 2.0):
            aux, b, z_loss = bal.auxiliary_losses(r, load, settings_of(z_loss=z, **c), shape)
            torch.testing.assert_close(aux, expected + z * L["z"])
            assert b.item() == (reported.item() if b.requires_grad else reported)
            assert z_loss.item() == (L["z"].item() if z else 0)


def one_sided(layer_expert):
    """A model whose layer i sends every token to expert layer_expert[i] with a probability near 1: token
    vectors are positive, attention and experts write nothing."""
    model = model_of("switch", {"ffn.n_expert": 2, "ffn.balance_loss": 1.0, "ffn.jitter": 0.0})
    with torch.no_grad():
        model.embedding.weight.fill_(1.0)
        for block, expert in zip(model.blocks, layer_expert):
            block.attention.out.weight.zero_(), block.ffn.experts.w_out.zero_()
            block.ffn.router.score.weight.zero_()[expert] = 2.0
    return model


def test_losses_are_per_layer_and_not_pooled():
    """Two layers that favour opposite experts are even when pooled; each alone scores the worst, E = 2."""
    for layer_expert in ((0, 0), (0, 1)):
        out = run(one_sided(layer_expert), *batch_of()[:2])
        assert [float(s.balance_loss) for s in out.stats] == pytest.approx([2, 2])
        assert float(out.aux_loss) == pytest.approx(4)


def test_auto_picks_the_routers_own_loss():
    own = dict(topk="switch", noisy_topk="importance_load", gshard="gshard", sigmoid="loss_free",
               sinkhorn="none", base="none", hash="none", expert_choice="none", domain="none", rl="switch",
               switch="switch", soft="none", sample_top1="switch")
    assert {r: config_of(r).ffn.balance for r in ROUTERS} == own


# ---- loss-free bias

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.sampled_from([0.001, 0.1]))
def test_update_bias_is_a_step_by_the_sign(load, rate):
    bias = torch.linspace(-1, 1, len(load))
    mean = sum(load) / len(load)
    paper = torch.tensor([b + rate * ((n < mean) - (n > mean)) for b, n in zip(bias.tolist(), load)])
    before = bias.mean().item()
    bal.update_bias(bias, torch.tensor(load, dtype=torch.float32), rate)
    torch.testing.assert_close(bias - bias[0], paper - paper[0], rtol=0, atol=1e-6)     # the paper's differences
    assert bias.mean().item() == pytest.approx(before, abs=1e-6)                        # and no drift


def test_the_bias_does_not_drift_and_chooses_as_the_papers_does():
    """Loads with one busy expert, as the sign sees them: the paper's biases all grow, these have mean 0; the
    experts that they choose are the same ones."""
    g = torch.Generator().manual_seed(0)
    ours, paper = torch.zeros(8), torch.zeros(8)
    for step in range(1000):
        load = torch.rand(8, generator=g) + torch.tensor([6.0] + [0.0] * 7)
        bal.update_bias(ours, load, 0.001)
        paper += 0.001 * torch.sign(load.mean() - load)
        scores = torch.rand(32, 8, generator=g)
        assert torch.equal((scores + ours).topk(2, -1).indices, (scores + paper).topk(2, -1).indices)
    assert paper.mean() > 0.5 and abs(ours.mean()) < 1e-4
    torch.testing.assert_close(ours - ours.mean(), paper - paper.mean(), rtol=0, atol=1e-4)


def test_bias_moves_after_the_step_only_and_is_saved():
    """Forward and backward leave the bias alone, update_balance moves it by the loads it is handed, and an
    expert that got too much is chosen less from then on."""
    model = model_of("sigmoid", {"ffn.bias_rate": 0.5})
    idx, targets, _ = batch_of()
    bias = [block.ffn.router.bias for block in model.blocks]
    out = run(model, idx, targets)
    (out.loss + out.aux_loss).backward()
    assert not any(b.any() or b.requires_grad for b in bias) and float(out.aux_loss) == 0
    loads = [s.load for s in out.stats]
    model.after_step(loads)
    for b, load in zip(bias, loads):
        step = torch.sign(load.mean() - load)
        assert torch.equal(b, 0.5 * (step - step.mean()))
    again = run(model, idx, targets).stats
    for load, then in zip(loads, again):
        assert then.load[load.argmax()] < load.max()
    assert {f"blocks.{i}.ffn.router.bias" for i in range(2)} <= set(model.state_dict())


@pytest.mark.parametrize("kind", ["dense", "topk", "peer"])
def test_update_balance_changes_nothing_elsewhere(kind):
    model = model_of(kind)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.after_step([s.load for s in run(model.eval(), batch_of()[0]).stats])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_loss_free_evens_out_a_favourite():
    """Fifty steps of the rule alone, on fixed scores with a favourite expert."""
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(256, 4, generator=g) + torch.tensor([0.5, 0.2, 0.1, 0.0])
    bias = torch.zeros(4)
    for _ in range(50):
        load = bal.expert_counts((scores + bias).topk(2, -1).indices.flatten(), 4)
        bal.update_bias(bias, load, 0.02)
    before = bal.expert_counts(scores.topk(2, -1).indices.flatten(), 4)
    assert before.max() / before.mean() > 1.5 and load.max() / load.mean() < 1.1
