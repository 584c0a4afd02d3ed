"""peer.py: retrieval against brute force over all N experts, the layer against the paper's formula token by
token, every path against the readable one in float64, and what is promised about memory, buffers, norms and
counts."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.peer
import peer
from ffn import Context, Dense
from kernels import common, product_keys
from kernels.peer import choose_path
from kernels.product_keys import TopKLean
from model import GPT, load_config
from peer import PEER, BatchNorm, cartesian_candidates, retrieve, topk_readable
from runtime.watch import usage
from settings import ConfigError, FFNConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CAN_FUSE = common.use_triton(torch.zeros(1, device=DEVICE))
fused = pytest.param("fused", marks=pytest.mark.skipif(not CAN_FUSE, reason="needs triton, and a GPU or its "
                                                                            "interpreter"))
either_kind = pytest.mark.parametrize("kind", ["peer", "pkm"])


def make(d=12, n_layer=2, seed=0, dtype=torch.float32, device="cpu", **settings):
    """A layer whose running statistics are not the ones it started with."""
    torch.manual_seed(seed)
    small = dict(kind="peer", n_keys=6, peer_heads=3, peer_top_k=4, d_key=10, peer_path="readable")
    config = FFNConfig(**(small | settings))
    layer = PEER(config, d, n_layer=n_layer)
    layer.queries(torch.randn(40, d) * 2 + 1)
    return layer.to(device, dtype)


def context(B, T):
    return Context(torch.zeros(B, T, dtype=torch.long))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cut_after(step):
    """A stand-in for peer.slices that cuts after `step` tokens, so that small tests have several slices."""
    return lambda width, *tensors: zip(*(t.split(step) for t in tensors))


class Largest(TorchDispatchMode):
    """Numel of the largest tensor that any operation made, in forward or backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


# ---- retrieval ----


@given(m=st.integers(2, 12), k=st.integers(1, 12), c=st.integers(1, 4), seed=st.integers(0, 10 ** 6),
       keys=st.sampled_from(["random", "tied", "duplicated", "all equal"]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_retrieval_equals_brute_force(m, k, c, seed, keys):
    """The k scores are exactly the k highest of all m^2; those experts have them; none is named twice."""
    k, round_off = min(k, m), torch.round if keys == "tied" else lambda t: t
    q, sub_keys = round_off(randn(7, 2, 2, c, seed=seed)), round_off(randn(2, m, c, seed=seed + 1))
    if keys == "duplicated":
        sub_keys = sub_keys[:, torch.arange(m) % max(1, m // 3)]
    if keys == "all equal":
        sub_keys = sub_keys[:, :1].expand(-1, m, -1)
    halves = torch.einsum("nhpc,pmc->nhpm", q, sub_keys)
    every = (halves[:, :, 0, :, None] + halves[:, :, 1, None]).flatten(2)                   # (n, h, m^2)
    candidates = torch.stack(cartesian_candidates(k))
    scores, experts = retrieve(q, sub_keys, k, candidates, topk_readable)
    assert torch.equal(scores, every.topk(k, -1).values)
    assert torch.equal(every.gather(-1, experts.long()), scores)
    assert all(len(set(head)) == k for token in experts.tolist() for head in token)
    lean, _ = retrieve(q, sub_keys, k, candidates, TopKLean.apply)
    torch.testing.assert_close(lean, scores)


def test_candidates_are_few():
    """50 pairs for k = 16, against 256."""
    assert len(cartesian_candidates(16)[0]) == 50


def test_topk_lean_has_the_gradients_of_topk(monkeypatch):
    """And never holds the 8 x 2 x 2 x 9 scores, nor their gradient."""
    for module in (kernels.peer, product_keys):
        monkeypatch.setattr(module, "slices", cut_after(3))
    q, sub_keys = randn(8, 2, 2, 5, dtype=torch.float64), randn(2, 9, 5, seed=1, dtype=torch.float64)
    results, largest = [], []
    for topk in (topk_readable, TopKLean.apply):
        inputs = q.clone().requires_grad_(), sub_keys.clone().requires_grad_()
        with Largest() as made:
            scores, _ = topk(*inputs, 4)
            (scores * randn(*scores.shape, seed=2, dtype=torch.float64)).sum().backward()
        results.append([scores.detach(), *(t.grad for t in inputs)])
        largest.append(made.numel)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert largest[0] == 8 * 2 * 2 * 9 > 3 * 2 * 2 * 9 and largest[1] <= q.numel()


# ---- the layer ----


def formula(layer, x):
    """The paper, one token at a time, over all N experts; x (n, d), the layer in evaluation."""
    c, outputs = layer.config, []
    for token, q in zip(x, layer.queries(x)):
        y = torch.zeros_like(token)
        for i, head in enumerate(q):
            keys = layer.sub_keys[i] if c.keys_per_head else layer.sub_keys
            a, b = (keys[p] @ head[p] for p in (0, 1))
            scores = (a[:, None] + b[None, :]).flatten()
            best = scores.topk(c.peer_top_k)
            gates = best.values.softmax(0) if c.peer_score == "softmax" else best.values.sigmoid()
            for g, e in zip(gates, best.indices.tolist()):
                *u, v = layer.table[e]
                y = y + g * (F.gelu(token @ u[0]) * v if u else v)
        outputs.append(y)
    return torch.stack(outputs)


@either_kind
@pytest.mark.parametrize("settings", [
    dict(), dict(peer_score="sigmoid"), dict(peer_top_k=6, query_norm="none"),
    dict(query_norm="layernorm", peer_heads=1), dict(keys_per_head=True)], ids=str)
def test_readable_equals_the_formula(kind, settings):
    layer = make(kind=kind, dtype=torch.float64, **settings).eval()
    x = randn(2, 4, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x, context(2, 4))[0].flatten(0, 1), formula(layer, x.flatten(0, 1)))


def test_one_expert_a_head_is_a_gathered_mlp():
    """k = 1: a token's h experts are the neurons of an MLP of its own, weighed by the sigmoid of their scores."""
    layer = make(peer_top_k=1, peer_heads=5, peer_score="sigmoid").eval()
    x = randn(3, 4, 12)
    y, _ = layer(x, context(3, 4))
    flat = x.flatten(0, 1)
    scores, experts = retrieve(layer.queries(flat), layer.sub_keys, 1, layer.candidates, topk_readable)
    for t, e in enumerate(experts.flatten(1).long()):
        w_in, w_out = layer.table[e, 0], layer.table[e, 1].T                                # (h, d), (d, h)
        gate = scores[t].flatten().sigmoid()
        torch.testing.assert_close(y.flatten(0, 1)[t], w_out @ (F.gelu(w_in @ flat[t]) * gate))


@either_kind
def test_a_gate_that_is_always_1_is_refused_with_the_remedy(kind):
    """Softmax over one score is 1: queries and sub-keys would get no gradient; with the remedy they do."""
    with pytest.raises(ConfigError, match="ffn.peer_top_k = 1 makes every gate 1.*ffn.peer_score = \"sigmoid\""):
        make(kind=kind, peer_top_k=1)
    with pytest.raises(ConfigError, match="ffn.peer_top_k"):
        load_config(None, {"ffn.kind": kind, "ffn.peer_top_k": 1})
    layer = make(kind=kind, peer_top_k=1, peer_score="sigmoid")
    grads = outputs_and_gradients(layer, randn(2, 7, 12), randn(2, 7, 12, seed=1))
    assert grads["queries.weight"].any() and grads["sub_keys"].any()


def outputs_and_gradients(layer, x, dy):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y, stats = layer(x, context(*x.shape[:2]))
    y.backward(dy)
    return dict(y=y.detach(), x=x.grad, load=stats.load) | {n: p.grad for n, p in layer.named_parameters()}


@pytest.mark.parametrize("path", ["readable", "lean", fused])
@pytest.mark.parametrize("settings", [
    dict(), dict(peer_score="sigmoid", peer_activation="silu"),
    dict(query_norm="layernorm", peer_activation="relu"),
    dict(query_norm="none", peer_top_k=1, n_keys=2, peer_score="sigmoid"),
    dict(keys_per_head=True), dict(kind="pkm"), dict(kind="pkm", keys_per_head=True)], ids=str)
def test_every_path_equals_float64_autograd(path, settings, monkeypatch):
    """Output, load and all gradients, in training, over slices of unequal length."""
    if path == "fused" and settings.get("kind") == "pkm":
        pytest.skip("PKM has no fused path")
    for module in (kernels.peer, product_keys):
        monkeypatch.setattr(module, "slices", cut_after(4))
    shape, device = (2, 7, 12), DEVICE if path == "fused" else "cpu"
    exact = outputs_and_gradients(make(dtype=torch.float64, **settings), randn(*shape, dtype=torch.float64),
                                  randn(*shape, seed=1, dtype=torch.float64))
    layer = make(**settings, device=device, peer_path=path)
    ours = outputs_and_gradients(layer, randn(*shape).to(device), randn(*shape, seed=1).to(device))
    for name, value in exact.items():
        error = (ours[name].cpu().double() - value).norm()
        assert error <= 1e-5 * value.norm() + 1e-9, name


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_the_fused_path_compiles_as_one_graph():
    """On a GPU the Triton launches stand in the compiled graph; nothing may get lost there."""
    x, dy = randn(2, 7, 12).to(DEVICE), randn(2, 7, 12, seed=1).to(DEVICE)
    eager = outputs_and_gradients(make(device=DEVICE, peer_path="fused"), x, dy)
    layer = make(device=DEVICE, peer_path="fused")
    layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)
    for name, value in outputs_and_gradients(layer, x, dy).items():
        assert (value - eager[name]).norm() <= 1e-4 * eager[name].norm() + 1e-9, name


@either_kind
def test_heads_with_equal_keys_of_their_own_are_heads_that_share_them(kind):
    """Each head's keys get its own part of the shared ones' gradient; they are counted, and cost no FLOPs."""
    shared, own = make(kind=kind, peer_path="lean"), make(kind=kind, peer_path="lean", keys_per_head=True)
    own.load_state_dict(shared.state_dict() | {"sub_keys": shared.sub_keys.detach().expand(3, -1, -1, -1)})
    a, b = (outputs_and_gradients(layer, randn(2, 7, 12), randn(2, 7, 12, seed=1)) for layer in (shared, own))
    assert b["sub_keys"].flatten(1).any(1).all() and "each head its sub-keys" in own.describe(torch.float32)
    b["sub_keys"] = b["sub_keys"].sum(0)
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-6)
    assert own.sub_keys.numel() == 3 * shared.sub_keys.numel() == 3 * 2 * 6 * 5
    assert own.flops_per_token() == shared.flops_per_token() and own.inactive_params() == shared.inactive_params()
    # drawn: each head's differ
    drawn = make(kind=kind, keys_per_head=True).sub_keys
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn.square().sum(-1), torch.full((3, 2, 6), 0.5))


def test_routing_learns_from_the_output():
    grads = outputs_and_gradients(make(), randn(2, 7, 12), randn(2, 7, 12, seed=1))
    assert all(grads[name].abs().sum() > 0 for name in ("queries.weight", "sub_keys", "table"))


@pytest.mark.parametrize("path", ["readable", "lean"])
def test_repeats_are_bit_equal_on_two_threads(path):
    torch.set_num_threads(2)
    layer = make(d=64, n_keys=8, peer_heads=4, peer_top_k=8, peer_path=path)    # 4096 pairs, 64 experts
    x, dy = randn(4, 32, 64), randn(4, 32, 64, seed=1)
    first = outputs_and_gradients(layer, x, dy)
    for _ in range(10):
        for name, value in outputs_and_gradients(layer, x, dy).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("norm", ["batchnorm", "layernorm", "none"])
def test_evaluation_ignores_batch_neighbours(norm):
    layer, x = make(query_norm=norm, peer_path="lean"), randn(4, 6, 12)
    y, _ = layer.eval()(x, context(4, 6))
    torch.testing.assert_close(layer(x[1:2], context(1, 6))[0], y[1:2])
    torch.testing.assert_close(layer(x[1:2, 3:4], context(1, 1))[0], y[1:2, 3:4])       # nor other positions
    layer.train()
    same = torch.allclose(layer(x, context(4, 6))[0][1:2], layer(x[1:2], context(1, 6))[0], atol=1e-4)
    assert same == (norm != "batchnorm")                                                # training does


@either_kind
def test_cached_generation_equals_the_full_forward(kind):
    config = load_config(None, [("ffn.kind", kind), ("model.n_layer", "3"), ("model.n_embd", "32"),
                                ("model.n_head", "2"), ("model.vocab_size", "17"), ("model.block_size", "16"),
                                ("ffn.n_keys", "8"), ("ffn.peer_top_k", "4")])
    torch.manual_seed(0)
    model, idx = GPT(config), torch.randint(17, (2, 16))
    assert isinstance(model.blocks[1].ffn, PEER) and isinstance(model.blocks[0].ffn, Dense)
    for _ in range(3):
        model(idx)                                                      # running statistics
    model.eval()
    full, cache = model(idx).logits, model.new_cache(2)
    steps = [model(part, cache=cache).logits for part in (idx[:, :5], *idx[:, 5:].split(1, 1))]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-4, atol=1e-5)


def test_autocast_leaves_the_choice_alone():
    """bf16 moves the output by rounding, but the experts and their weights not at all."""
    for path in ("readable", "lean"):
        layer, x = make(peer_path=path).eval(), randn(2, 6, 12)
        y, stats = layer(x, context(2, 6))
        with torch.autocast("cpu", torch.bfloat16):
            y16, stats16 = layer(x, context(2, 6))
        assert torch.equal(stats.load, stats16.load)
        torch.testing.assert_close(y16, y, rtol=0.05, atol=0.02 * y.abs().max().item())


def test_path_is_chosen_by_rule(monkeypatch):
    table = torch.zeros(4, 2, 3)
    assert choose_path("auto", table) == choose_path("auto", table[:, :1]) == "lean"
    assert choose_path("auto", table.to("meta")) == choose_path("readable", table) == "readable"
    monkeypatch.setattr(kernels.peer, "use_triton", lambda t: False)
    with pytest.raises(ValueError, match="CUDA"):
        choose_path("fused", table)
    with pytest.raises(ValueError, match="no neurons"):
        choose_path("fused", table[:, :1])


# ---- initialisation and norms ----


@pytest.mark.parametrize("kind, activation, settings, d", [
    ("peer", "swiglu", dict(n_keys=16, peer_heads=8, peer_top_k=16), 64),
    ("peer", "gelu", dict(n_keys=64, peer_heads=4, peer_top_k=8), 128),
    ("peer", "swiglu", dict(n_keys=128, peer_heads=8, peer_top_k=2, peer_activation="relu"), 32),
    ("peer", "relu2", dict(n_keys=128, peer_heads=2, peer_top_k=32, query_norm="layernorm"), 32),
    ("peer", "gelu", dict(n_keys=32, peer_heads=8, peer_top_k=8, query_norm="none"), 96),
    ("pkm", "swiglu", dict(n_keys=32, peer_heads=8, peer_top_k=32), 64),
    ("peer", "gelu", dict(n_keys=64, peer_heads=4, peer_top_k=8, peer_score="sigmoid"), 64)])
def test_output_starts_with_the_variance_of_the_dense_layer(kind, activation, settings, d):
    """Within 20 % of what model.py's dense layer gives for unit-variance input."""
    torch.manual_seed(0)
    config = load_config(None, [("ffn.kind", "dense"), ("ffn.activation", activation), ("model.n_layer", "3"),
                                ("model.n_embd", str(d)), ("model.vocab_size", "9")])
    x, ctx = torch.randn(1, 1024, d), context(1, 1024)
    with torch.no_grad():
        dense = GPT(config).blocks[1].ffn(x, ctx)[0].var()
        ours = PEER(FFNConfig(kind=kind, activation=activation, d_key=32, **settings), d, n_layer=3)(x, ctx)[0].var()
    assert 0.8 < ours / dense < 1.2


def test_batchnorm_statistics():
    """The mean over the first batches, then a moving average; evaluation applies them."""
    norm, batches = BatchNorm(5), [randn(50, 5, seed=i) * (i + 1) + i for i in range(12)]
    for x in batches[:4]:
        torch.testing.assert_close(norm(x), F.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(norm.mean, torch.stack([x.mean(0) for x in batches[:4]]).mean(0))
    torch.testing.assert_close(norm.var, torch.stack([x.var(0) for x in batches[:4]]).mean(0))
    for x in batches[4:11]:
        norm(x)
    before = norm.mean.clone()
    norm(batches[11])
    torch.testing.assert_close(norm.mean, 0.9 * before + 0.1 * batches[11].mean(0))
    x = batches[0]
    torch.testing.assert_close(norm.eval()(x), (x - norm.mean) / (norm.var + 1e-5).sqrt())
    assert norm.batches == 12                                           # not moved by evaluation
    with pytest.raises(ValueError, match="one token"):
        norm.train()(x[:1])


# ---- memory ----


@either_kind
@pytest.mark.parametrize("path", ["readable", "lean"])
def test_lean_never_holds_the_rows(path, kind, monkeypatch):
    """No tensor of lean reaches (n, R, d), made or saved; readable shows that the test sees one."""
    for module in (kernels.peer, product_keys):
        monkeypatch.setattr(module, "slices", cut_after(2))
    layer, n, d, saved = make(d=48, kind=kind, peer_path=path, n_keys=16), 32, 48, []
    record = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t)
    with Largest() as largest, record:
        layer(randn(1, n, d).requires_grad_(), context(1, n))[0].sum().backward()
    rows, table = n * 12 * d, layer.table.numel()
    assert table < 2 * rows
    assert (max(largest.numel, max(saved)) < max(rows, table + 1)) == (path == "lean")
    assert path == "readable" or sum(s for s in saved if s != table) < rows


@pytest.mark.parametrize("path, kind", [("lean", "peer"), ("lean", "pkm"),
                                        pytest.param("fused", "peer", marks=fused.marks)])
def test_gradient_buffer_is_kept_and_right(path, kind):
    """First step, accumulation, zeroing in place, and dropping: always the gradients that autograd gives."""
    device = DEVICE if path == "fused" else "cpu"
    small = dict(kind=kind, n_keys=4, peer_heads=2)
    layer, oracle = make(**small, peer_path=path, device=device), make(**small, dtype=torch.float64)

    def backward(seed):
        for model, where, dtype in ((layer, device, torch.float32), (oracle, "cpu", torch.float64)):
            x = randn(1, 4, 12, seed=seed, dtype=dtype).to(where)
            model(x, context(1, 4))[0].square().sum().backward()
        exact = oracle.table.grad
        assert (layer.table.grad.cpu().double() - exact).norm() < 1e-5 * exact.norm()

    backward(0)                                                         # no buffer yet
    address = layer.table.grad.data_ptr()
    backward(1)                                                         # accumulates
    for model in (layer, oracle):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    backward(2)
    for model in (layer, oracle):
        model.zero_grad(set_to_none=False)
    backward(3)
    assert layer.table.grad.data_ptr() == address
    for model in (layer, oracle):
        model.zero_grad()
    backward(4)


def test_autograd_grad_and_frozen_tables():
    lean, readable = make(peer_path="lean"), make()
    losses = [m(randn(2, 6, 12), context(2, 6))[0].square().sum() for m in (lean, readable)]
    grads = [torch.autograd.grad(loss, m.table)[0] for loss, m in zip(losses, (lean, readable))]
    torch.testing.assert_close(*grads)
    assert lean.table.grad is None
    lean.table.requires_grad_(False)
    torch.testing.assert_close(outputs_and_gradients(lean, randn(2, 6, 12), randn(2, 6, 12))["sub_keys"],
                               outputs_and_gradients(readable, randn(2, 6, 12), randn(2, 6, 12))["sub_keys"])
    assert lean.table.grad is None


@either_kind
@pytest.mark.parametrize("path", ["lean", fused])
def test_autograd_touches_no_gradient_that_was_not_asked_for(kind, path):
    """With a .grad on the table: torch.autograd.grad returns what it returns elsewhere and leaves .grad alone,
    backward(inputs=...) adds to what it names, and loss.backward() adds to all of them."""
    if path == "fused" and kind == "pkm":
        pytest.skip("PKM has no fused path")
    layer, oracle = make(kind=kind, peer_path=path), make(kind=kind)
    inputs = [randn(2, 6, 12).requires_grad_() for _ in range(2)]

    def loss(model, x):
        return model(x, context(2, 6))[0].square().sum()

    for model, x in zip((layer, oracle), inputs):
        loss(model, x).backward()
    before = layer.table.grad.clone()
    for names in (["x"], ["table"], ["x", "table", "sub_keys"]):
        found = []
        for model, x in zip((layer, oracle), inputs):
            asked = [x if name == "x" else getattr(model, name) for name in names]
            found.append(torch.autograd.grad(loss(model, x), asked))
        for mine, theirs in zip(*found):
            torch.testing.assert_close(mine, theirs)
        assert torch.equal(layer.table.grad, before)
    loss(layer, inputs[0]).backward(inputs=[inputs[0], layer.sub_keys])
    assert torch.equal(layer.table.grad, before)
    address = layer.table.grad.data_ptr()
    loss(layer, inputs[0]).backward(inputs=[layer.table])
    loss(layer, inputs[0]).backward()
    torch.testing.assert_close(layer.table.grad, 3 * before, rtol=1e-4, atol=1e-5)
    assert layer.table.grad.data_ptr() == address


# ---- what is reported ----


@given(st.lists(st.floats(0, 5), min_size=1, max_size=30).filter(lambda z: sum(z) > 0.1))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_usage_equals_its_definition(load):
    z = [v / sum(load) for v in load]
    share, uneven = usage(torch.tensor(load, dtype=torch.float64))
    assert share == pytest.approx(sum(v > 0 for v in load) / len(load))
    assert uneven == pytest.approx(math.log(len(z)) + sum(v * math.log(v) for v in z if v > 0), abs=1e-9)


def test_usage_of_the_extremes():
    assert usage(torch.full((9,), 3.0)) == pytest.approx((1, 0))
    assert usage(F.one_hot(torch.tensor(2), 9) * 3.0) == pytest.approx((1 / 9, math.log(9)))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_stats(score):
    layer, x = make(peer_score=score).eval(), randn(2, 5, 12)
    _, stats = layer(x, context(2, 5))
    q = layer.queries(x.flatten(0, 1))
    scores, experts = retrieve(q, layer.sub_keys, 4, layer.candidates, topk_readable)
    gates = scores.softmax(-1) if score == "softmax" else scores.sigmoid()
    load, entropies, top = [0.0] * 36, [], []
    for token, (g, e) in enumerate(zip(gates.tolist(), experts.tolist())):
        for head, weights in zip(e, g):
            entropies.append(-sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights))
            for expert, w in zip(head, weights):
                load[expert] += w
        top.append(max(zip(sum(g, []), sum(e, [])))[1])
    torch.testing.assert_close(stats.load, torch.tensor(load))
    assert stats.entropy.item() == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert stats.top_expert.flatten().tolist() == top
    assert stats.aux_loss == stats.balance_loss == stats.z_loss == stats.dropped == 0


def test_counts_by_hand():
    """A million experts, d = 256, h = 8, k = 16, d_key = 128: nothing is allocated."""
    settings = dict(n_keys=1024, peer_heads=8, peer_top_k=16, d_key=128)
    with torch.device("meta"):
        layer, pkm = (PEER(FFNConfig(kind=kind, **settings), 256, n_layer=12) for kind in ("peer", "pkm"))
    queries, norm, sub_keys, row = 8 * 128 * 256, 2 * 8 * 128, 2 * 1024 * 64, 2 * 256
    total = sum(p.numel() for p in layer.parameters())
    assert total == queries + norm + sub_keys + 2 ** 20 * row == 537_266_176
    assert layer.inactive_params() == (2 ** 20 - 128) * row
    assert pkm.inactive_params() == (2 ** 20 - 128) * row // 2
    retrieval = 2 * 256 * 8 * 128 + 8 * 2 * (2 * 1024 * 64) + 8 * 50        # queries, scores of halves, sums
    assert layer.flops_per_token() == retrieval + 128 * (2 * 256 + 2 * 256)
    assert pkm.flops_per_token() == retrieval + 128 * 2 * 256
