"""moe.py: every dispatch path against a per-token loop; capacity, layouts, statistics, saved memory."""
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ROUTERS, batch_of, config_of

import moe
from balance import expert_counts
from ffn import Context
from kernels import common
from kernels.common import INTERPRETED, use_triton
from kernels.moe import ExpertByExpert, GroupedExperts
from moe import (DISPATCH, Experts, MoE, choose_dispatch, dispatch_grouped, dispatch_loop, dispatch_padded, limit_capacity)
from routers import Routing, pairs

ACTIVATIONS = ["gelu", "relu", "relu2", "swiglu"]


# ---- the oracle: one token, one expert, plain formulas in float64

def act(h, kind):
    if kind == "swiglu":
        gate, up = h[: len(h) // 2], h[len(h) // 2:]
        return gate / (1 + torch.exp(-gate)) * up
    if kind == "gelu":
        return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    return h.clamp_min(0) ** (2 if kind == "relu2" else 1)


def oracle(x, r, w_in, w_out, kind):
    """y[t] = sum over t's pairs of weight * W_out act(W_in x_t), pair after pair."""
    rows = [0 * row for row in x]
    keep = [True] * len(r.expert) if r.keep is None else r.keep.tolist()
    for p, (t, e) in enumerate(zip(r.token.tolist(), r.expert.tolist())):
        if keep[p]:
            rows[t] = rows[t] + r.weight[p] * (w_out[e] @ act(w_in[e] @ x[t], kind))
    return torch.stack(rows)


def experts_of(E, d, n, kind="swiglu", dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    experts = Experts(E, d, n, kind).to(dtype)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * p.shape[-1] ** -0.5)
    return experts


def routing_of(indices, keep=None, seed=0):
    """Routing of (n, k) experts with random weights, which are float32 for every path."""
    return pairs(indices, torch.rand(indices.shape, generator=torch.Generator().manual_seed(seed)), keep=keep)


def random_indices(n, k, allowed, seed=0):
    """(n, k) different experts for each token, all from `allowed`."""
    g = torch.Generator().manual_seed(seed)
    pick = torch.rand(n, len(allowed), generator=g).topk(k, -1).indices
    return torch.tensor(list(allowed))[pick]


def outcome(path, x, r, experts, dy):
    """[y, dx, d_weight, d_w_in, d_w_out] of a dispatch path, or of the oracle."""
    leaves = [x.detach().requires_grad_(), r.weight.detach().requires_grad_(),
              experts.w_in.detach().requires_grad_(), experts.w_out.detach().requires_grad_()]
    r = r._replace(weight=leaves[1])
    if path is oracle:
        y = oracle(leaves[0], r, leaves[2], leaves[3], experts.activation)
    else:
        twin = SimpleNamespace(w_in=leaves[2], w_out=leaves[3], activation=experts.activation)
        y = path(leaves[0], r, twin)
    grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return [y.detach()] + [torch.zeros_like(l) if g is None else g for g, l in zip(grads, leaves)]


def grouped_by(function, fused=False):
    """dispatch_grouped through one of the two autograd Functions, whatever the device would choose."""
    def path(x, r, experts):
        return dispatch_grouped(x, r, experts, fused, function)
    return path


# path, dtype that it runs in, tolerance; float64 where the path has it
PATHS = {"loop": (dispatch_loop, torch.float64, 1e-12), "padded": (dispatch_padded, torch.float64, 1e-12),
         "expert_by_expert": (grouped_by(ExpertByExpert), torch.float64, 1e-12),
         "grouped": (grouped_by(GroupedExperts), torch.float32, 1e-5),
         "fused": (DISPATCH["fused"], torch.float32, 1e-5)}
ON_CPU = [path for path in DISPATCH if path != "fused" or use_triton(torch.zeros(1))]       # of a whole layer
CASES = {                                                   # name: (E, k, experts that get tokens)
    "spread": (4, 2, range(4)), "one expert has everything": (4, 1, [2]),
    "empty first and last": (5, 2, [1, 2, 3]), "8 of 64 without a token": (64, 2, range(4, 60)),
    "top-1": (4, 1, range(4)), "top-3": (5, 3, range(5)), "all experts": (3, 3, range(3))}


def check(path, r, E, d=8, n=8, kind="swiglu", tokens=12):
    function, dtype, tolerance = PATHS[path]
    experts = experts_of(E, d, n, kind)
    x, dy = torch.randn(2, tokens, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = outcome(oracle, x, r._replace(weight=r.weight.double()), experts, dy)
    got = outcome(function, x.to(dtype), r, experts_of(E, d, n, kind, dtype), dy.to(dtype))
    for name, a, b in zip(("y", "dx", "d_weight", "d_w_in", "d_w_out"), got, expected):
        close = max(tolerance, 1e-6) if name == "d_weight" else tolerance       # gates are float32 throughout
        torch.testing.assert_close(a.double(), b, rtol=close, atol=close, msg=lambda m: f"{name}: {m}")


def test_large_experts_of_a_cpu_go_one_by_one(monkeypatch):
    """And give what F.grouped_mm gives: the choice changes no number but by rounding."""
    taken = []
    for function in (ExpertByExpert, GroupedExperts):
        def forward(*args, function=function, plain=function.forward):
            taken.append(function)
            return plain(*args)
        monkeypatch.setattr(function, "forward", staticmethod(forward))
    for tokens, expected in ((64, GroupedExperts), (9000, ExpertByExpert)):
        x, r = torch.randn(tokens, 64), routing_of(random_indices(tokens, 1, range(2)))
        experts = experts_of(2, 64, 64, "swiglu", torch.float32)
        y = dispatch_grouped(x, r, experts)
        assert taken.pop() is expected
        torch.testing.assert_close(y, dispatch_loop(x, r, experts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("path", PATHS)
def test_every_path_equals_the_per_token_loop(path, case):
    E, k, allowed = CASES[case]
    tokens = 70 if E == 64 else 12
    indices = random_indices(tokens, k, allowed)
    assert E != 64 or len(set(indices.flatten().tolist())) <= 56
    check(path, routing_of(indices), E, tokens=tokens)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("path", PATHS)
def test_every_activation(path, kind):
    check(path, routing_of(random_indices(12, 2, range(4))), 4, kind=kind)


@pytest.mark.parametrize("path", PATHS)
def test_dropped_pairs(path):
    keep = torch.rand(24, generator=torch.Generator().manual_seed(3)) < 0.6
    check(path, routing_of(random_indices(12, 2, range(4)), keep), 4)
    check(path, routing_of(random_indices(12, 2, range(4)), torch.zeros(24, dtype=torch.bool)), 4)


def expert_choice_pairs(tokens, E, C, seed=0):
    """Every expert takes C tokens: some tokens get none, others several; k = 0."""
    g = torch.Generator().manual_seed(seed)
    token = torch.rand(E, tokens, generator=g).topk(C, -1).indices.flatten()
    return Routing(torch.arange(E).repeat_interleave(C), torch.rand(E * C, generator=g), token, 0)


@pytest.mark.parametrize("path", PATHS)
def test_expert_choice_pairs(path):
    r = expert_choice_pairs(12, 5, 4)
    assert 0 < len(set(range(12)) - set(r.token.tolist()))
    check(path, r, 5)


@pytest.mark.parametrize("path", ["loop", "padded", "expert_by_expert"])
@pytest.mark.parametrize("d,n", [(7, 3), (1, 1), (9, 16)])
def test_odd_widths(path, d, n):
    for kind in ACTIVATIONS:
        check(path, routing_of(random_indices(12, 2, range(4))), 4, d, n, kind)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 3), st.integers(0, 10 ** 6), st.booleans())
def test_paths_agree_on_any_routing(tokens, E, k, seed, drop):
    k = min(k, E)
    g = torch.Generator().manual_seed(seed)
    allowed = torch.randperm(E, generator=g)[:max(k, E // 2)].tolist()
    keep = torch.rand(tokens * k, generator=g) < 0.5 if drop else None
    r = routing_of(random_indices(tokens, k, allowed, seed), keep, seed)
    for path in ("loop", "padded", "expert_by_expert", "grouped"):
        check(path, r, E, tokens=tokens)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_loop_passes_gradcheck(kind):
    experts, r = experts_of(3, 3, 2, kind), routing_of(random_indices(4, 2, range(3)))
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = r.weight.detach().double().requires_grad_()

    def run(x, weight, w_in, w_out):
        twin = SimpleNamespace(w_in=w_in, w_out=w_out, activation=kind)
        return dispatch_loop(x, r._replace(weight=weight), twin)

    assert torch.autograd.gradcheck(run, (x, weight, experts.w_in, experts.w_out))


# ---- which path is taken

def moe_of(name="topk", more=(), d=16, seed=0):
    """A MoE layer alone, in training mode, with drawn weights and spread choices."""
    torch.manual_seed(seed)
    layer = MoE(config_of(name, {"model.n_embd": d, "model.n_head": 1} | dict(more)).ffn, d, 32, 0)
    with torch.no_grad():
        for p in layer.parameters():
            if p.dim() > 1:
                p.normal_(std=0.5)
    return layer


def layer_input(B=3, T=8, d=16, seed=1):
    idx, _, domain = batch_of(B, T)
    x = torch.randn(B, T, d, generator=torch.Generator().manual_seed(seed))
    return x, Context(idx, domain, torch.tensor(0.0))


def call(layer, x, ctx, seed=5):
    torch.manual_seed(seed)
    return layer(x, ctx)


@pytest.mark.parametrize("dtype,d,n,path", [
    (torch.float32, 16, 16, "grouped"), (torch.float32, 12, 4, "grouped"), (torch.float32, 16, 6, "loop"),
    (torch.float32, 10, 8, "loop"), (torch.bfloat16, 16, 8, "grouped"), (torch.bfloat16, 12, 8, "loop"),
    (torch.float64, 16, 16, "loop")])
def test_auto_takes_the_grouped_path_on_cpu_and_the_loop_for_odd_widths(dtype, d, n, path):
    """On a CPU auto is never fused, not even where Triton could interpret the kernels (as in these tests)."""
    experts, x = experts_of(2, d, n), torch.zeros(3, d, dtype=dtype)
    assert choose_dispatch("auto", experts, x) == path
    for wanted in ("grouped", "fused"):
        if path == "loop":
            with pytest.raises(ValueError, match="cannot run"):
                choose_dispatch(wanted, experts, x)
        elif wanted == "grouped" or INTERPRETED:
            assert choose_dispatch(wanted, experts, x) == wanted
    assert choose_dispatch("padded", experts, x) == "padded" and choose_dispatch("loop", experts, x) == "loop"


def test_fused_refuses_where_there_is_no_triton(monkeypatch):
    monkeypatch.setattr(common, "use_triton", lambda x: False)
    with pytest.raises(ValueError, match="CUDA"):
        choose_dispatch("fused", experts_of(2, 16, 16), torch.zeros(3, 16))


def test_odd_width_layer_runs_and_explicit_grouped_refuses():
    x, ctx = layer_input(d=10)
    y, _ = call(moe_of(more={"ffn.d_ff": 6}, d=10), x, ctx)
    assert y.shape == x.shape
    with pytest.raises(ValueError, match="n_embd = 10"):
        call(moe_of(more={"ffn.d_ff": 6, "ffn.dispatch": "grouped"}, d=10), x, ctx)


@pytest.mark.parametrize("name", ROUTERS)
def test_ffn_dispatch_changes_no_number(name):
    """Outputs and gradients of a whole layer, for every router and every value of ffn.dispatch."""
    x, ctx = layer_input()
    results = []
    for path in ("auto", *ON_CPU):
        layer = moe_of(name, {"ffn.dispatch": path})
        leaf = x.clone().requires_grad_()
        y, stats = call(layer, leaf, ctx)
        (y.square().sum() + stats.aux_loss).backward()
        results.append([y.detach(), leaf.grad] + [torch.zeros_like(p) if p.grad is None else p.grad
                                                  for p in layer.parameters()])
    for other in results[1:]:
        for a, b in zip(other, results[0]):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["topk", "expert_choice"])
def test_the_fast_path_of_a_gpu_equals_the_loop(name, compiled):
    """In bfloat16, as it trains there; compiled as one graph, in which a gradient could get lost."""
    results = []
    for path in ("loop", "auto"):
        layer, (x, ctx) = moe_of(name, {"ffn.dispatch": path}).cuda(), layer_input()
        ctx = ctx._replace(token_ids=ctx.token_ids.cuda(), domain=None)
        leaf = x.bfloat16().float().cuda().requires_grad_()
        whole = compiled and path == "auto"
        run = torch.compile(layer, fullgraph=True, dynamic=False) if whole else layer
        with torch.autocast("cuda", torch.bfloat16):
            y, _ = run(leaf, ctx)
        y.float().square().sum().backward()
        results.append([y.float().detach(), leaf.grad, layer.experts.w_in.grad, layer.experts.w_out.grad,
                        layer.router.score.weight.grad])
    for slow, fast in zip(*results):
        assert slow.norm() > 0 and (slow - fast).norm() <= 0.02 * slow.norm()


@pytest.mark.parametrize("path", ON_CPU)
@pytest.mark.parametrize("name", ["topk", "expert_choice"])
def test_bf16_autocast_is_close_to_float32(name, path):
    x, ctx = layer_input()
    grads = []
    for enabled in (False, True):
        layer = moe_of(name, {"ffn.dispatch": path})
        # The same routing in both, so that rounding cannot flip a choice: the input is already bf16.
        leaf = x.bfloat16().float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y, stats = call(layer, leaf, ctx)
        y.float().square().sum().backward()
        assert layer.experts.w_in.grad.dtype == torch.float32
        grads.append([y.float().detach(), leaf.grad, layer.experts.w_in.grad, layer.experts.w_out.grad,
                      layer.router.score.weight.grad, stats.load])
    for a, b in zip(*grads):
        assert (a - b).norm() <= 0.02 * a.norm()


# ---- the layer's formula

@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gate_is_applied_once_after_the_activation(kind):
    """y = sum_i p_i W_out act(W_in x), with p before selection and not renormalised."""
    layer = moe_of("topk", {"ffn.gate_order": "softmax_then_topk", "ffn.activation": kind})
    x, ctx = layer_input()
    y, _ = layer(x, ctx)
    flat, w_in, w_out = x.view(-1, 16), layer.experts.w_in, layer.experts.w_out
    p = (flat @ layer.router.score.weight.T).softmax(-1)
    for t in range(len(flat)):
        expected = sum(p[t, e] * (w_out[e] @ act(w_in[e] @ flat[t], kind)) for e in p[t].topk(2).indices)
        torch.testing.assert_close(y.view(-1, 16)[t], expected, rtol=1e-4, atol=1e-5)


def rows_of(w, i, width):
    """The w_in rows of hidden units i*width ... of a swiglu matrix [gate | up]."""
    gate, up = w.chunk(2)
    return torch.cat([gate[i * width:(i + 1) * width], up[i * width:(i + 1) * width]])


@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts_are_one_wide_mlp(gated):
    """n_shared experts that every token visits add up one by one, behind Qwen2's gate times its sigmoid."""
    more = {"ffn.n_shared": 3, "ffn.d_expert": 8, "ffn.shared_gate": str(gated).lower()}
    layer, (x, ctx) = moe_of("topk", more), layer_input()
    w_in, w_out = layer.shared.w_in.weight, layer.shared.w_out.weight
    assert w_out.shape == (16, 24)
    shared = sum(act_rows(x @ rows_of(w_in, i, 8).T) @ w_out[:, 8 * i:8 * i + 8].T for i in range(3))
    gate = (x @ layer.shared_gate.weight.T).sigmoid() if gated else 1
    y, _ = layer(x, ctx)
    layer.shared = None
    torch.testing.assert_close(y, layer(x, ctx)[0] + gate * shared, rtol=1e-4, atol=1e-4)


def act_rows(h):
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def test_d_shared_is_the_width_of_one_shared_expert():
    layer = moe_of("topk", {"ffn.d_shared": 40, "ffn.shared_gate": "true"})
    assert layer.shared.w_out.weight.shape == (16, 40) and layer.shared_gate.weight.shape == (1, 16)


def test_output_norm_normalises_the_output():
    layer, (x, ctx) = moe_of("expert_choice", {"ffn.output_norm": "true"}), layer_input()
    y, _ = layer(x, ctx)
    layer.norm = None
    plain, _ = layer(x, ctx)
    centred = plain - plain.mean(-1, keepdim=True)
    size = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(y, centred / size, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("G", [1, 2, 4])
def test_granularity_splits_the_width_and_multiplies_experts_and_k(G):
    """E and k times G, hidden width over G: total and active expert parameters stay (Krajewski et al.)."""
    layer, (x, ctx) = moe_of("topk", {"ffn.granularity": G}), layer_input()
    w_in, w_out = layer.experts.w_in, layer.experts.w_out
    assert w_in.shape == (4 * G, 2 * 16 // G, 16) and w_out.shape == (4 * G, 16, 16 // G)
    assert w_in.numel() + w_out.numel() == 4 * 3 * 16 * 16
    assert w_in.numel() + w_out.numel() - layer.inactive_params() == 2 * 3 * 16 * 16
    assert layer.router(x.view(-1, 16), ctx).k == 2 * G
    assert layer.router.score.weight.shape == (4 * G, 16)


def test_every_expert_can_receive_gradient():
    layer, (x, ctx) = moe_of("topk"), layer_input(B=8)
    layer(x, ctx)[0].square().sum().backward()
    for p in layer.experts.parameters():
        assert all(g.any() for g in p.grad)


# ---- capacity

def slow_capacity(r, slots, B, T, k):
    """Pairs that find a slot: position after position, first choices before second, then by sequence."""
    used, kept = {}, set()
    for t in range(T):
        for j in range(k):
            for b in range(B):
                p = (b * T + t) * k + j
                if r.keep is not None and not r.keep[p]:
                    continue
                e = int(r.expert[p])
                if used.setdefault(e, 0) < slots:
                    used[e] += 1
                    kept.add(p)
    return kept


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 6),
       st.booleans(), st.integers(0, 10 ** 6))
def test_capacity_keeps_the_first_in_position_order(B, T, E, k, slots, masked, seed):
    k = min(k, E)
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(B * T * k, generator=g) < 0.7 if masked else None
    r = routing_of(random_indices(B * T, k, range(E), seed), keep)
    limited = limit_capacity(r, E, slots, (B, T))
    assert set(limited.keep.nonzero().flatten().tolist()) == slow_capacity(r, slots, B, T, k)
    counts = expert_counts(r.expert, E, limited.keep)
    assert torch.equal(counts, expert_counts(r.expert, E, keep).clamp_max(slots))


@pytest.mark.parametrize("path", ON_CPU)
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25])
def test_capacity_slots_and_dropped_share(path, factor):
    """ceil(factor k n / E) slots; what is over contributes nothing, and its share is reported."""
    more = {"ffn.capacity_factor": factor, "ffn.dispatch": path, "ffn.balance": "switch"}
    layer, (x, ctx) = moe_of("topk", more), layer_input()
    y, stats = layer(x, ctx)
    r = layer.router(x.view(-1, 16), ctx)
    slots = math.ceil(factor * 2 * 24 / 4)
    kept = slow_capacity(r, slots, 3, 8, 2)
    assert float(stats.dropped) == pytest.approx(1 - len(kept) / 48) and (factor > 1 or len(kept) < 48)
    r = r._replace(keep=torch.tensor([p in kept for p in range(48)]))
    expected = dispatch_loop(x.view(-1, 16), r, layer.experts)
    torch.testing.assert_close(y.view(-1, 16), expected, rtol=1e-4, atol=1e-4)
    assert stats.load.sum() == 48                                       # counted before dropping
    free = moe_of("topk", {"ffn.balance": "switch"})(x, ctx)[1]
    assert torch.equal(stats.balance_loss, free.balance_loss) and torch.equal(stats.load, free.load)


@pytest.mark.parametrize("factor, slots", [(1.1, 55), (0.07, 4), (1.15, 58), (1.1000001, 56), (2.2, 110)])
def test_slots_are_rounded_up_from_the_exact_product(factor, slots):
    """1.1 x 200 / 4 is 55; in floating point it is 55.00000000000001."""
    layer = moe_of("topk", {"ffn.capacity_factor": factor, "ffn.dispatch": "loop"})
    with torch.no_grad():
        layer.router.score.weight.copy_(torch.tensor([3.0, 2.0, 0.0, -1.0])[:, None])       # two experts get all
        _, stats = layer(torch.ones(10, 10, 16), Context(torch.zeros(10, 10, dtype=torch.long)))
    assert stats.load.tolist() == [100, 100, 0, 0]
    assert round(200 * (1 - float(stats.dropped))) == 2 * min(slots, 100)


def test_the_first_screen_says_each_loss_with_its_coefficient():
    for router, more, wanted in [
            ("topk", {"ffn.balance_loss": 0.03}, "balance switch (balance_loss 0.03),"),
            ("topk", {"ffn.balance": "none", "ffn.z_loss": 0.001}, "balance none (z_loss 0.001),"),
            ("noisy_topk", {"ffn.load_loss": 0.2}, "importance_load (balance_loss 0.01, load_loss 0.2),"),
            ("topk", {"ffn.balance": "deepseek", "ffn.n_groups": 2, "ffn.device_loss": 0.05},
             "deepseek (balance_loss 0.01, device_loss 0.05),"),
            ("sigmoid", {}, "loss_free (bias_rate 0.001),"), ("hash", {}, "balance none,"),
            ("rl", {"ffn.rl_loss": 0.5}, "balance switch (balance_loss 0.01, rl_loss 0.5),")]:
        assert wanted in moe_of(router, more).describe(torch.float32)


def test_capacity_in_training_and_evaluation_apart():
    x, ctx = layer_input()
    for factor, key in (("train", "ffn.capacity_factor"), ("eval", "ffn.eval_capacity_factor")):
        layer = moe_of("topk", {key: 0.5})
        dropped = {mode: float(layer.train(mode == "train")(x, ctx)[1].dropped) for mode in ("train", "eval")}
        assert dropped.pop(factor) > 0.2 and list(dropped.values()) == [0]
        assert float(layer.train(factor == "train")(x, ctx._replace(generating=True))[1].dropped) == 0


def test_dropped_counts_only_what_travelled():
    """GShard's second experts that chance left out are not drops of the capacity limit."""
    layer, (x, ctx) = moe_of("gshard", {"ffn.capacity_factor": 100.0}), layer_input()
    _, stats = call(layer, x, ctx)
    assert stats.load.sum() < 48 and float(stats.dropped) == 0


# ---- stats

@pytest.mark.parametrize("name", ROUTERS)
def test_stats(name):
    layer, (x, ctx) = moe_of(name), layer_input()
    _, stats = call(layer, x, ctx)
    torch.manual_seed(5)
    r = layer.router(x.view(-1, 16), ctx)
    keep = [True] * len(r.expert) if r.keep is None else r.keep.tolist()
    sent = [e for e, kept in zip(r.expert.tolist(), keep) if kept]
    assert stats.load.tolist() == [sent.count(e) for e in range(4)]
    assert stats.top_expert.shape == (3, 8) and stats.top_expert.dtype == torch.int64
    assert 0 <= float(stats.entropy) <= math.log(4) + 1e-5
    if r.probs is not None:
        entropy = -sum(p * math.log(p) for row in r.probs.tolist() for p in row) / len(r.probs)
        assert float(stats.entropy) == pytest.approx(entropy, rel=1e-4)
    for t, top in enumerate(stats.top_expert.flatten().tolist()):
        if r.k:
            mine = list(zip(r.weight.view(-1, r.k)[t].tolist(), r.expert.view(-1, r.k)[t].tolist()))
            assert max(mine)[0] == dict(map(reversed, mine))[top]
        else:
            assert top == int(r.probs[t].argmax())
    assert (stats.log_prob is not None) == (name == "rl") == (stats.baseline is not None)


def test_stats_carry_no_gradient_but_the_losses():
    layer, (x, ctx) = moe_of("topk"), layer_input()
    _, stats = layer(x, ctx)
    assert stats.aux_loss.requires_grad
    others = stats.load, stats.dropped, stats.entropy, stats.top_expert
    assert not any(t.requires_grad for t in others)


# ---- memory saved for backward

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
def test_saved_memory_is_layer_input_and_pre_activation(kind, dtype):
    """Within 10 % at T2048 d256 n128 E32 k4, indices and gates included, parameters not."""
    T, d, n, E, k = 2048, 256, 128, 32, 4
    experts = experts_of(E, d, n, kind, dtype)
    x = torch.randn(T, d, dtype=dtype).requires_grad_()
    r = routing_of(random_indices(T, k, range(E)))
    seen = {p.untyped_storage().data_ptr() for p in experts.parameters()}
    sizes = []

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes.append(storage.nbytes())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dispatch_grouped(x, r, experts)
    floor = (T * d + T * k * n * (2 if kind == "swiglu" else 1)) * x.element_size()
    assert floor <= sum(sizes) <= 1.1 * floor
