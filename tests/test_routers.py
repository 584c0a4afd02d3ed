"""routers.py: every router against a slow second writing of its paper, and its traits."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from tiny import KINDS, LEARNED, config_of

import routers
from balance import importance_loss, load_loss, policy_loss
from ffn import Context
from kernels.assignment import balanced_assignment
from routers import ROUTERS, hash_table, limit_groups
from settings import ConfigError

D, B, T = 16, 4, 12
ALL = list(ROUTERS)


def build_router(config, *place, **more):
    return ROUTERS[config.router](config, *place, **more)



def router_of(name, more=(), d=D, spread=0.5, seed=0):
    """A router whose weights are large enough that choices differ."""
    torch.manual_seed(seed)
    router = build_router(config_of(name, more).ffn, d, vocab_size=32, layer=0)
    with torch.no_grad():
        for p in router.parameters():
            p.normal_(std=spread)
    return router


def tokens(seed=0, B=B, T=T, d=D):
    """x (n, d) and a Context."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (B, T), generator=g)
    return torch.randn(B * T, d, generator=g), Context(ids, torch.arange(B) % 4, torch.tensor(0.0))


def call(router, x, ctx, seed=3):
    torch.manual_seed(seed)
    return router(x, ctx)


def chosen(r):
    """(n, k) experts and weights."""
    return r.expert.view(-1, r.k), r.weight.view(-1, r.k)


# ---- what all routers share

@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_routing_is_well_formed(name, train):
    x, ctx = tokens()
    r = call(router_of(name).train(train), x.bfloat16(), ctx)
    assert r.expert.shape == r.weight.shape == r.token.shape
    assert 0 <= int(r.expert.min()) and int(r.expert.max()) < 4 and r.weight.dtype == torch.float32
    if name == "expert_choice":
        assert r.k == 0
    else:
        assert torch.equal(r.token, torch.arange(len(x)).repeat_interleave(r.k))
        assert all(len(set(row.tolist())) == r.k for row in chosen(r)[0])           # no expert twice
    if r.probs is not None:
        assert r.logits.dtype == r.probs.dtype == torch.float32
        torch.testing.assert_close(r.probs.sum(-1), torch.ones(len(x)))


@pytest.mark.parametrize("name", LEARNED)
def test_logits_are_float32_under_autocast(name):
    x, ctx = tokens()
    router = router_of(name).eval()
    with torch.autocast("cpu", torch.bfloat16):
        r = call(router, x.bfloat16(), ctx)
    torch.testing.assert_close(r.logits, x.bfloat16().float() @ router.score.weight.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_label_says_whether_training_draws_noise(name):
    x, ctx = tokens()
    for train in (True, False):
        router = router_of(name).train(train)
        a, b = call(router, x, ctx, seed=1), call(router, x, ctx, seed=2)
        keep = [torch.ones(1) if r.keep is None else r.keep for r in (a, b)]
        same = all(torch.equal(*pair) for pair in ((a.expert, b.expert), (a.weight, b.weight), keep))
        assert same != (train and ROUTERS[name].traits.noise), "traits.noise: does it draw in training, and only then?"


@pytest.mark.parametrize("name", ALL)
def test_it_returns_what_its_traits_promise(name):
    x, ctx = tokens()
    r, traits = call(router_of(name).train(), x, ctx), ROUTERS[name].traits
    assert (r.logits is not None) == traits.logits, "traits.logits: does it return logits?"
    assert r.probs is not None or not traits.steerable, "traits.steerable: needs probs in its Routing"
    assert all((traits.says, traits.paper, traits.gate)), "traits: what it does, whose it is, its gate"


@pytest.mark.parametrize("name", ALL)
def test_router_changes_no_state(name):
    x, ctx = tokens()
    router = router_of(name)
    before = {k: v.clone() for k, v in router.state_dict().items()}
    call(router.train(), x, ctx), call(router.eval(), x, ctx)
    assert all(torch.equal(v, before[k]) for k, v in router.state_dict().items())


# ---- topk

@pytest.mark.parametrize("order", ["topk_then_softmax", "softmax_then_topk", "softmax_then_topk_renorm"])
def test_topk_gate_orders(order):
    x, ctx = tokens()
    more = {"ffn.gate_order": order, "ffn.n_expert": 6, "ffn.top_k": 3, "ffn.route_scale": 1.5}
    router = router_of("topk", more)
    r = router(x, ctx)
    for t, (experts, weights) in enumerate(zip(*chosen(r))):
        z = router.score(x)[t].tolist()
        best = sorted(range(6), key=lambda e: -z[e])[:3]
        over = best if order == "topk_then_softmax" else range(6)
        gate = [math.exp(z[e]) / sum(math.exp(z[j]) for j in over) for e in best]
        total = sum(gate) if order.endswith("renorm") else 1.0
        assert experts.tolist() == best
        assert weights.tolist() == pytest.approx([1.5 * g / total for g in gate], rel=1e-5)


def slow_limit(scores, n_groups, topk_groups, best):
    """Set of allowed experts of one token, by sorting Python lists."""
    size = len(scores) // n_groups
    groups = [range(g * size, (g + 1) * size) for g in range(n_groups)]
    rank = sorted(groups, key=lambda group: -sum(sorted((scores[e] for e in group), reverse=True)[:best]))
    return {e for group in rank[:topk_groups] for e in group}


@pytest.mark.parametrize("best", [1, 2])
@pytest.mark.parametrize("shift", [0.0, -10.0])             # where all scores are negative, 0 would win
def test_group_limit(best, shift):
    scores = torch.randn(50, 16, generator=torch.Generator().manual_seed(0)) + shift
    limited = limit_groups(scores, 8, 3, best)
    for row, out in zip(scores.tolist(), limited.tolist()):
        allowed = slow_limit(row, 8, 3, best)
        assert {e for e in range(16) if out[e] > -math.inf} == allowed
        assert all(out[e] == row[e] for e in allowed)


@pytest.mark.parametrize("shift", [0.0, -5.0])
@pytest.mark.parametrize("name,best", [("topk", 1), ("sigmoid", 2)])
def test_experts_lie_in_topk_groups(name, best, shift):
    """DeepSeek-V2 ranks groups by their best expert, V3 by the sum of the two best biased scores."""
    x, ctx = tokens()
    router = router_of(name, {"ffn.n_expert": 16, "ffn.top_k": 4, "ffn.n_groups": 8, "ffn.topk_groups": 3})
    logits = router.score(x)
    scores = logits.softmax(-1)
    if name == "sigmoid":
        router.bias += shift + torch.rand(16)                           # biased scores below 0
        scores = logits.sigmoid() + router.bias
    differs = 0
    for experts, row in zip(chosen(router(x, ctx))[0].tolist(), scores.tolist()):
        allowed = slow_limit(row, 8, 3, best)
        assert len({e // 2 for e in experts}) <= 3
        assert experts == sorted(allowed, key=lambda e: -row[e])[:4]
        differs += set(experts) != set(sorted(range(16), key=lambda e: -row[e])[:4])
    assert differs > 0                                                  # the limit did change something


# ---- noisy_topk

def test_noisy_topk_training_and_evaluation():
    x, ctx = tokens()
    router = router_of("noisy_topk")
    torch.manual_seed(5)
    noise = torch.randn(len(x), 4)
    clean = x @ router.score.weight.T
    noisy = clean + noise * F.softplus(x @ router.noise.weight.T)
    for mode, scores in ((True, noisy), (False, clean)):
        r = call(router.train(mode), x, ctx, seed=5)
        top, experts = scores.topk(2, -1)
        assert torch.equal(chosen(r)[0], experts)
        torch.testing.assert_close(chosen(r)[1], top.softmax(-1))
    assert r.smooth_load is None


@pytest.mark.parametrize("raw", [0.0, 5.0, -4.0, -10.0, -60.0, -1e4, 1e4])
@pytest.mark.parametrize("spread", [0.5, 50.0])
def test_noisy_topk_keeps_its_noise_and_finite_gradients(raw, spread):
    """softplus(-60) is 1e-26: nothing of the noise is left, and the load's gradient was not a number. The deviation
    is at least 0.01, and as in the paper above that."""
    router, (x, ctx) = router_of("noisy_topk", spread=spread).train(), tokens()
    x[:, 0] = 1.0
    with torch.no_grad():
        router.noise.weight.zero_()[:, 0] = raw
    r = call(router, x, ctx)
    torch.manual_seed(3)
    std = max(F.softplus(torch.tensor(raw)).item(), 0.01)
    torch.testing.assert_close(r.logits, router.score(x) + std * torch.randn(r.logits.shape), rtol=1e-4, atol=1e-4)
    loss = load_loss(r) + importance_loss(r, torch.zeros(4), None, None) + r.probs.square().sum()
    for grad in torch.autograd.grad(loss, list(router.parameters())):
        assert grad.isfinite().all()


def test_noisy_topk_starts_at_zero():
    router = build_router(config_of("noisy_topk").ffn, D, 32, 0)
    assert not router.score.weight.any() and not router.noise.weight.any()


@pytest.mark.parametrize("k", [2, 3])
def test_smooth_load_is_the_chance_to_stay_chosen(k):
    """Eq. 8-10 by its meaning: draw expert i's own noise anew, keep the others', count how often i wins."""
    x, ctx = tokens(B=1, T=6)
    router = router_of("noisy_topk", {"ffn.top_k": k}, spread=0.3).train()
    r = call(router, x, ctx, seed=5)
    clean, std = router.score(x), F.softplus(router.noise(x))
    torch.manual_seed(11)
    expected = torch.zeros(4)
    for i in range(4):
        others = torch.cat([r.logits[:, :i], r.logits[:, i + 1:]], -1)
        bar = others.topk(k, -1).values[:, -1:]                         # the k-th best of the others
        again = clean[:, i:i + 1] + torch.randn(6, 20000) * std[:, i:i + 1]
        expected[i] = (again > bar).float().mean(1).sum()
    torch.testing.assert_close(r.smooth_load, expected, rtol=0, atol=0.03)
    r.smooth_load.sum().backward()
    assert router.noise.weight.grad.any() and router.score.weight.grad.any()


# ---- switch, gshard

def test_switch_keeps_its_probability_and_jitters_in_training_only():
    x, ctx = tokens()
    router = router_of("switch", {"ffn.jitter": 0.2})
    probs = (x @ router.score.weight.T).softmax(-1)
    r = call(router.eval(), x, ctx)
    torch.testing.assert_close(r.weight, probs.amax(-1))
    assert torch.equal(r.expert, probs.argmax(-1)) and (r.weight < 1).all()
    torch.manual_seed(3)
    jittered = ((x * torch.empty_like(x).uniform_(0.8, 1.2)) @ router.score.weight.T).softmax(-1)
    torch.testing.assert_close(call(router.train(), x, ctx).weight, jittered.amax(-1))


def test_switch_starts_at_a_tenth_of_the_usual_variance():
    router = build_router(config_of("switch", {"ffn.n_expert": 64}).ffn, 256, 32, 0)
    assert float(router.score.weight.detach().var()) == pytest.approx(0.1 / 256, rel=0.05)


def test_gshard_visits_the_second_expert_with_probability_2g():
    router = router_of("gshard", spread=0.2).train()
    one, ctx = tokens(B=1, T=6)
    many = one.repeat_interleave(4000, 0)
    r = call(router, many, ctx)
    gate = (one @ router.score.weight.T).softmax(-1).topk(2, -1).values
    gate = gate / gate.sum(-1, keepdim=True)
    keep = r.keep.view(6, 4000, 2).float().mean(1)
    assert (keep[:, 0] == 1).all()
    torch.testing.assert_close(keep[:, 1], (2 * gate[:, 1]).clamp_max(1), rtol=0, atol=0.03)
    assert keep[:, 1].min() < 0.9                                       # the test had something to see
    r = router.eval()(one, ctx)
    assert r.keep is None
    torch.testing.assert_close(chosen(r)[1], gate)


# ---- sigmoid

@pytest.mark.parametrize("k", [1, 2])
def test_sigmoid_bias_chooses_and_does_not_weigh(k):
    x, ctx = tokens()
    router = router_of("sigmoid", {"ffn.top_k": k, "ffn.route_scale": 2.5})
    router.bias += torch.tensor([2.0, 0.0, 0.0, -2.0])
    s = (x @ router.score.weight.T).sigmoid()
    experts, weights = chosen(router(x, ctx))
    assert (experts == 0).any(1).all() and not (experts == 3).any()     # the bias decides
    gate = s.gather(1, experts)
    gate = gate / gate.sum(-1, keepdim=True) if k > 1 else gate
    torch.testing.assert_close(weights, 2.5 * gate)


def test_sigmoid_bias_is_a_buffer():
    router = router_of("sigmoid")
    assert "bias" in router.state_dict() and not router.bias.requires_grad
    assert [n for n, _ in router.named_parameters()] == ["score.weight"]


# ---- sinkhorn, base

def skewed(n, E, seed=0):
    """Logits with a favourite expert."""
    return torch.randn(n, E, generator=torch.Generator().manual_seed(seed)) + torch.linspace(2, 0, E)


def test_sinkhorn_plan_has_its_row_and_column_sums():
    router = router_of("sinkhorn", {"ffn.sinkhorn_iters": 50})
    logits = skewed(48, 4).requires_grad_()
    plan = router.plan(logits).exp()
    assert not plan.requires_grad
    torch.testing.assert_close(plan.sum(1), torch.ones(48))
    torch.testing.assert_close(plan.sum(0), torch.full((4,), 12.0), rtol=1e-3, atol=0)
    ratio = (plan.log() - logits).detach()          # the plan is exp(z / tau), its rows and columns scaled
    ratio = ratio - ratio[:1] - ratio[:, :1] + ratio[:1, :1]
    torch.testing.assert_close(ratio, torch.zeros_like(ratio), rtol=0, atol=1e-4)


def test_sinkhorn_chooses_by_the_plan_in_training_and_by_the_logits_in_evaluation():
    x, ctx = tokens(B=8)
    router = router_of("sinkhorn")
    with torch.no_grad():
        router.score.weight[0] += 1.0 * x.mean(0) / x.mean(0).norm() ** 2       # a favourite
    train, test = router.train()(x, ctx), router.eval()(x, ctx)
    logits = x @ router.score.weight.T
    assert torch.equal(train.expert, router.plan(logits).argmax(-1))
    assert torch.equal(test.expert, logits.argmax(-1))
    for r in (train, test):
        torch.testing.assert_close(r.weight, logits.sigmoid().gather(1, r.expert.unsqueeze(1)).squeeze(1))
    assert train.expert.bincount(minlength=4).max() < test.expert.bincount(minlength=4).max()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 20), st.integers(0, 10 ** 6), st.sampled_from([0.1, 1.0, 10.0]))
def test_balanced_assignment_is_balanced_and_nearly_best(E, slots, seed, scale):
    """Exactly n/E tokens each, and the sum of scores within n epsilon of scipy's optimum."""
    n = E * slots + seed % E                        # also not a multiple of E: then at most ceil(n / E)
    if n == 0:
        return
    scores = scale * (skewed(n, E, seed) + 3.0)
    choice = balanced_assignment(scores)
    limit = -(-n // E)
    assert choice.bincount(minlength=E).max() <= limit
    row, column = linear_sum_assignment(-scores.repeat_interleave(limit, 1).numpy())
    best = scores.double()[row, column // limit].sum()
    epsilon = 1e-3 * float(scores.max() - scores.min()) + 1e-5
    assert best - scores.double().gather(1, choice.unsqueeze(1)).sum() <= n * epsilon + 1e-4


def test_balanced_assignment_ends_whatever_it_is_given():
    scores = torch.randn(12, 4)
    scores[3] = torch.nan
    scores[7, 2] = torch.inf
    assert balanced_assignment(scores).bincount(minlength=4).tolist() == [3] * 4


def test_balanced_assignment_of_equal_scores():
    assert balanced_assignment(torch.zeros(12, 4)).bincount(minlength=4).tolist() == [3] * 4


def test_base_balances_in_training_only():
    x, ctx = tokens()
    router = router_of("base")
    with torch.no_grad():
        router.score.weight[0] += x.mean(0) / x.mean(0).norm() ** 2
    logits = x @ router.score.weight.T
    train = router.train()(x, ctx)
    assert train.expert.bincount(minlength=4).tolist() == [len(x) // 4] * 4
    torch.testing.assert_close(train.weight, logits.sigmoid().gather(1, train.expert.unsqueeze(1)).squeeze(1))
    assert torch.equal(router.eval()(x, ctx).expert, logits.argmax(-1))


def test_base_centroids_start_orthogonal():
    w = build_router(config_of("base").ffn, D, 32, 0).score.weight
    torch.testing.assert_close(w @ w.T, 0.01 * torch.eye(4), rtol=0, atol=1e-6)


# ---- hash, domain

def test_hash_reads_the_table_and_nothing_else():
    x, ctx = tokens()
    router = router_of("hash")
    r = router(x, ctx)
    assert r.expert.tolist() == [router.table[i].item() for i in ctx.token_ids.flatten()]
    assert (r.weight == 1).all() and torch.equal(router(-x, ctx).expert, r.expert)
    assert not list(router.parameters()) and "table" in router.state_dict()


def test_hash_tables_differ_between_layers_and_are_even():
    tables = [build_router(config_of("hash").ffn, D, 32, layer).table for layer in (0, 1, 0)]
    assert torch.equal(tables[0], tables[2]) and not torch.equal(tables[0], tables[1])
    assert tables[0].bincount().tolist() == [8] * 4


def zipf(vocab=1024, seed=0):
    counts = 1e6 / torch.arange(1, vocab + 1, dtype=torch.float64)
    return counts[torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))]


def unevenness(table, counts, E):
    """Largest load over mean load."""
    load = torch.zeros(E, dtype=torch.float64).index_add(0, table, counts)
    return float(load.max() / load.mean())


def test_balanced_hash_table_is_more_even_than_random():
    counts = zipf()
    balanced = unevenness(hash_table(1024, 4, counts), counts, 4)
    assert balanced < 1.01
    assert all(balanced < unevenness(hash_table(1024, 4, seed=s), counts, 4) for s in range(5))


def test_balanced_hash_of_a_config():
    """ffn.hash_table = "balanced" routes nowhere before it has the counts; its table is in the state dict."""
    x, ctx = tokens()
    config = config_of("hash", {"ffn.hash_table": "balanced"}).ffn
    router, again = (build_router(config, D, 32, 0) for _ in range(2))
    assert (router(x, ctx).expert == -1).all()
    router.set_token_counts(zipf(32))
    assert torch.equal(router.table, hash_table(32, 4, zipf(32)))
    again.load_state_dict(router.state_dict())
    assert torch.equal(again(x, ctx).expert, router(x, ctx).expert)


def test_domain_takes_the_label_or_mixes_evenly():
    x, ctx = tokens()
    router = router_of("domain")
    r = router(x, ctx)
    assert torch.equal(r.expert.view(B, T), ctx.domain.unsqueeze(1).expand(B, T)) and (r.weight == 1).all()
    assert not list(router.parameters())
    r = router(x, ctx._replace(domain=None))
    assert r.k == 4 and (r.weight == 0.25).all()
    assert (chosen(r)[0] == torch.arange(4)).all()


# ---- rl, sample_top1, soft, expert_choice

def test_rl_samples_its_policy():
    router = router_of("rl", spread=0.3)
    one, ctx = tokens(B=1, T=4)
    pi = (one @ router.score.weight.T).softmax(-1)
    r = call(router.train(), one.repeat_interleave(5000, 0), ctx)
    frequency = F.one_hot(r.expert, 4).float().view(4, 5000, 4).mean(1)
    torch.testing.assert_close(frequency, pi, rtol=0, atol=0.03)
    log_pi = pi.log().repeat_interleave(5000, 0)
    torch.testing.assert_close(r.log_prob, log_pi.gather(1, r.expert.unsqueeze(1)).squeeze(1))
    assert (r.weight == 1).all()
    assert torch.equal(router.eval()(one, ctx).expert, pi.argmax(-1))


def test_rl_baseline_does_not_push_on_the_model():
    x, ctx = tokens()
    x.requires_grad_()
    router = router_of("rl")
    router(x, ctx).baseline.sum().backward()
    assert x.grad is None and router.value.weight.grad.any() and router.value.bias.grad.any()


def test_rl_learns_where_the_useful_expert_is_knowable():
    """Expert i is right for tokens of direction i, and its loss is lower by a quarter of the noise."""
    router = router_of("rl", spread=0.02).train()
    optimizer = torch.optim.Adam(router.parameters(), 0.03)
    right = torch.arange(512) % 4
    x, ctx = F.one_hot(right, D).float(), tokens(T=128)[1]
    for step in range(60):
        r = call(router, x, ctx, seed=step)
        loss = 3 + torch.randn(len(x)) - 0.25 * (r.expert == right)
        optimizer.zero_grad()
        policy_loss([r], loss, 0.01).backward()
        optimizer.step()
    assert torch.equal(router.eval()(x, ctx).expert, right)


@pytest.mark.parametrize("step,tau", [(0, 1.0), (5000, math.exp(-0.5)), (10 ** 6, 0.5)])
def test_sample_top1_temperature(step, tau):
    """The largest component of softmax((z + gumbel) / tau), tau = max(0.5, exp(-r step)) with r = 1e-4."""
    x, ctx = tokens()
    router = router_of("sample_top1").train()
    r = call(router, x, ctx._replace(step=torch.tensor(float(step))))
    torch.manual_seed(3)
    z = x @ router.score.weight.T - torch.empty(len(x), 4).exponential_().log()
    torch.testing.assert_close(r.weight, (z / tau).softmax(-1).amax(-1))
    assert torch.equal(r.expert, z.argmax(-1))
    plain = call(router, x, ctx._replace(step=step))                    # a plain number means the same
    assert torch.equal(plain.weight, r.weight)


def test_sample_top1_samples_the_softmax_and_is_hard_in_evaluation():
    router = router_of("sample_top1", spread=0.3)
    one, ctx = tokens(B=1, T=4)
    probs = (one @ router.score.weight.T).softmax(-1)
    r = call(router.train(), one.repeat_interleave(5000, 0), ctx)
    frequency = F.one_hot(r.expert, 4).float().view(4, 5000, 4).mean(1)
    torch.testing.assert_close(frequency, probs, rtol=0, atol=0.03)
    r = router.eval()(one, ctx)
    assert torch.equal(r.expert, probs.argmax(-1)) and (r.weight == 1).all()


def test_soft_visits_all_experts_by_their_probability():
    x, ctx = tokens()
    router = router_of("soft")
    experts, weights = chosen(router(x, ctx))
    assert (experts == torch.arange(4)).all()
    torch.testing.assert_close(weights, (x @ router.score.weight.T).softmax(-1))


@pytest.mark.parametrize("size,C", [(4, 2), (6, 3), (1, 1)])
def test_expert_choice_takes_c_sequences_at_every_position(size, C):
    x, ctx = tokens(B=size)
    router = router_of("expert_choice")                                 # 4 experts, k = 2: C = B / 2
    r = router(x, ctx)
    probs = (x @ router.score.weight.T).softmax(-1).view(size, T, 4)
    got = {(t, e): w for t, e, w in zip(r.token.tolist(), r.expert.tolist(), r.weight.tolist())}
    assert len(got) == len(r.token) == C * T * 4
    for t in range(T):
        for e in range(4):
            best = probs[:, t, e].topk(C).indices.tolist()
            for b in range(size):
                assert ((b * T + t, e) in got) == (b in best)
                assert b not in best or got[b * T + t, e] == pytest.approx(probs[b, t, e].item(), rel=1e-5)


def test_expert_choice_generates_by_each_tokens_own_best_scores():
    x, ctx = tokens()
    router = router_of("expert_choice")
    experts, weights = chosen(router(x, ctx._replace(generating=True)))
    top = (x @ router.score.weight.T).softmax(-1).topk(2, -1)
    assert torch.equal(experts, top.indices)
    torch.testing.assert_close(weights, top.values)


# ---- what validation refuses: settings with which a router would never learn, or could not run

@pytest.mark.parametrize("router,more,key", [
    ("topk", {"ffn.top_k": 1}, "ffn.gate_order"),                       # softmax over one logit is 1
    ("topk", {"ffn.top_k": 1, "ffn.gate_order": "softmax_then_topk_renorm"}, "ffn.gate_order"),
    ("noisy_topk", {"ffn.top_k": 1}, "ffn.top_k"),
    ("switch", {"ffn.output_norm": "true"}, "ffn.output_norm"),         # the norm would cancel the gate
    ("sigmoid", {"ffn.top_k": 1, "ffn.output_norm": "true"}, "ffn.output_norm"),
    ("switch", {"ffn.top_k": 2}, "ffn.top_k"),
    ("hash", {"ffn.granularity": 2}, "ffn.top_k"),                      # would visit 2 experts
    ("gshard", {"ffn.top_k": 1}, "ffn.top_k"),
    ("topk", {"ffn.top_k": 5}, "ffn.top_k"),
    ("topk", {"ffn.balance": "loss_free"}, "ffn.balance"),
    ("topk", {"ffn.balance": "importance_load"}, "ffn.balance"),
    ("hash", {"ffn.balance": "switch"}, "ffn.balance"),
    ("expert_choice", {"ffn.balance": "switch"}, "ffn.balance"),
    ("hash", {"ffn.z_loss": 0.1}, "ffn.z_loss"),
    ("expert_choice", {"ffn.capacity_factor": 1.0}, "ffn.capacity_factor"),
    ("soft", {"ffn.eval_capacity_factor": 1.0}, "ffn.eval_capacity_factor"),
    ("topk", {"ffn.n_groups": 3}, "ffn.n_groups"),
    ("gshard", {"ffn.n_groups": 2}, "ffn.n_groups"),
    ("topk", {"ffn.n_groups": 4, "ffn.topk_groups": 1}, "ffn.topk_groups"),
    ("domain", {"data.name": "a,b"}, "data.name"),
])
def test_validation_refuses(router, more, key):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        config_of(router, more)


@pytest.mark.parametrize("router", ALL)
def test_every_router_is_accepted_and_built(router):
    assert type(router_of(router)) is ROUTERS[router] and router in KINDS
