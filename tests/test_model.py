"""model.py: the silent bugs that only a whole model shows, for every feed-forward kind and every router."""
import dataclasses
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import KINDS, LEARNED, ONE_EXPERT, ROUTERS, batch_of, config_of, model_of, run

from balance import LOSSES, OF_MICRO_BATCH, policy_loss
from ffn import Dense
from kernels.norm import NormOnCPU
from model import GPT, Cache, RMSNorm, load_config, readers, rotary_table, rotate, sparse_layers
from moe import MoE
from runtime.config import all_fields, read_config, to_toml
from settings import ConfigError, FFNConfig, ModelConfig

ROOT = Path(__file__).parent.parent
SPARSE = [kind for kind in KINDS if kind != "dense"]
V = 32


def looks(kind, where):
    """When the router, if the kind is one, looks "ahead" or "across": "", "in training" or "always"."""
    return getattr(ROUTERS[kind].traits, where) if kind in ROUTERS else ""


def logits(model, idx, seed=7, **more):
    with torch.no_grad():
        return run(model, idx, seed=seed, **more).logits


def with_changed_future(idx, t):
    """The same tokens up to t, others after."""
    return torch.cat([idx[:, :t + 1], (idx[:, t + 1:] + 5) % V], 1)


# ---- 1. the router learns from the language-model loss

@pytest.mark.parametrize("kind,k,order", [
    *((r, 1, "softmax_then_topk") for r in LEARNED if r not in ("noisy_topk", "gshard")),
    *((r, 2, "topk_then_softmax") for r in LEARNED if r not in ONE_EXPERT),
    *(("topk", 2, order) for order in ("softmax_then_topk", "softmax_then_topk_renorm"))])
def test_router_gets_a_gradient_from_the_language_model_loss(kind, k, order):
    """Without any balance loss. rl has a constant gate: its objective is the reward, the token's own loss."""
    more = {"ffn.top_k": k, "ffn.balance": "none", "ffn.gate_order": order}
    idx, targets, _ = batch_of()
    model = model_of(kind, more)
    out = run(model, idx, targets)
    (out.loss if kind != "rl" else out.aux_loss).backward()
    for block in model.blocks:
        for name, p in block.ffn.router.named_parameters():
            assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 1e-7, name


def test_rl_policy_objective():
    """-(r - b) log pi whitened over the batch, and (r - b)^2, for each layer; r carries no gradient."""
    model = model_of("rl", {"ffn.balance": "none", "ffn.rl_loss": 0.5, "model.tie_embeddings": "false"})
    idx, targets, _ = batch_of()
    out = run(model, idx, targets)
    reward = out.logits.detach().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    expected = 0.0
    for s in out.stats:
        a = (reward - s.baseline).detach()
        white = (a - a.mean()) / a.std(correction=0)
        expected = expected + 0.5 * (-(white * s.log_prob).mean() + (reward - s.baseline).square().mean())
    torch.testing.assert_close(out.aux_loss, expected, rtol=1e-4, atol=1e-5)
    out.aux_loss.backward()
    assert model.head.weight.grad is None and model.blocks[1].ffn.router.score.weight.grad.any()


# ---- 3. and 4. causality and batch neighbours, and whether the labels tell the truth

@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_causal(kind):
    idx, _, domain = batch_of()
    model = model_of(kind).eval()
    for t in (0, 3, 6):
        a = logits(model, idx, domain=domain)
        b = logits(model, with_changed_future(idx, t), domain=domain)
        torch.testing.assert_close(a[:, :t + 1], b[:, :t + 1], rtol=1e-5, atol=1e-5)
        assert (a[:, t + 1:] - b[:, t + 1:]).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_causal_where_no_label_says_otherwise(kind):
    """With the noise held fixed. peer and pkm with layernorm: batch norm mixes positions in training."""
    idx, _, domain = batch_of()
    model = model_of(kind, {"ffn.query_norm": "layernorm"})
    leak = 0.0
    for t in (0, 3, 6):
        a = logits(model, idx, domain=domain)
        b = logits(model, with_changed_future(idx, t), domain=domain)
        leak = max(leak, float((a[:, :t + 1] - b[:, :t + 1]).abs().max()))
    assert (leak > 1e-3) == bool(looks(kind, "ahead")) and (leak < 1e-5 or leak > 1e-3)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_batch_neighbours_matter_only_where_the_label_says_so(kind, train):
    """Other sequences change, the first one does not."""
    idx, _, domain = batch_of(B=4)
    other = idx.clone()
    other[1:] = (other[1:] + 5) % V
    model = model_of(kind, {"ffn.query_norm": "layernorm"}).train(train)
    a, b = (logits(model, tokens, domain=domain)[0] for tokens in (idx, other))
    change = float((a - b).abs().max())
    labelled = looks(kind, "across") == "always" or train and looks(kind, "across") == "in training"
    assert (change > 1e-3) == labelled and (change < 1e-5 or change > 1e-3)


@pytest.mark.parametrize("kind", ["peer", "pkm"])
def test_batch_norm_mixes_neighbours_in_training_only(kind):
    idx, _, _ = batch_of(B=4)
    other = torch.cat([idx[:1], (idx[1:] + 5) % V])
    model = model_of(kind)
    run(model, idx)                                                     # running statistics
    assert (logits(model, idx)[0] - logits(model, other)[0]).abs().max() > 1e-3
    model.eval()
    torch.testing.assert_close(logits(model, idx)[0], logits(model, other)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["topk", "switch", "gshard", "sigmoid", "hash"])
def test_capacity_is_causal(kind, train):
    """A full expert turns away later positions, never earlier ones. Neighbours compete, as the help says."""
    idx, _, _ = batch_of(B=4)
    model = model_of(kind, {"ffn.capacity_factor": 0.5, "ffn.eval_capacity_factor": 0.5}).train(train)
    for t in (0, 3, 6):
        a, b = logits(model, idx), logits(model, with_changed_future(idx, t))
        torch.testing.assert_close(a[:, :t + 1], b[:, :t + 1], rtol=1e-5, atol=1e-5)
    assert all(float(s.dropped) > 0.1 for s in run(model, idx).stats)
    other = torch.cat([idx[:1], (idx[1:] + 5) % V])
    assert (logits(model, idx)[0] - logits(model, other)[0]).abs().max() > 1e-3
    assert "compete" in dict(all_fields())["ffn.capacity_factor"].metadata["help"]


# ---- 5. evaluation

@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_deterministic_and_changes_no_state(kind):
    idx, targets, domain = batch_of()
    model = model_of(kind, {"model.dropout": 0.3}).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        a, b = (run(model, idx, targets, seed=s, domain=domain) for s in (1, 2))
    assert torch.equal(a.logits, b.logits) and torch.equal(a.loss, b.loss)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    a, b = (logits(model.train(), idx, seed=s, domain=domain) for s in (1, 2))
    assert not torch.equal(a, b)                            # dropout, so that there was something to see


# ---- 6. what is reported and what is trained on

@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_cross_entropy_alone_and_aux_is_counted_once(kind):
    idx, targets, domain = batch_of()
    balance = {} if kind not in LEARNED or kind == "expert_choice" else {"ffn.balance_loss": 0.7}
    plain = model_of(kind, {"ffn.balance_loss": 0.0, "ffn.load_loss": 0.0, "ffn.rl_loss": 0.0})
    loaded = model_of(kind, balance | ({"ffn.z_loss": 0.3, "ffn.load_loss": 0.2} if kind in LEARNED else {}))
    a, b = (run(m, idx, targets, domain=domain) for m in (plain, loaded))
    by_hand = -a.logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean()
    torch.testing.assert_close(a.loss, by_hand)
    assert torch.equal(a.loss, b.loss) and torch.equal(a.logits, b.logits)
    assert float(a.aux_loss) == 0
    layers = sum(s.aux_loss for s in b.stats)
    policy = policy_loss(b.stats, F.cross_entropy(b.logits.mT, targets, reduction="none"), 0.01)
    torch.testing.assert_close(b.aux_loss, layers + policy)
    assert (b.aux_loss.item() != 0) == (kind in LEARNED)
    if kind in LEARNED and kind != "noisy_topk":
        expected = sum(loaded.config.ffn.balance_loss * s.balance_loss + 0.3 * s.z_loss for s in b.stats)
        torch.testing.assert_close(layers, expected)


def test_no_targets_no_loss():
    out = run(model_of("topk").eval(), batch_of()[0])
    assert out.loss is None and out.logits.shape == (3, 8, V) and len(out.stats) == 2


# ---- 8. initialisation

@pytest.mark.parametrize("kind", KINDS)
def test_no_expert_starts_at_zero_or_like_another(kind):
    torch.manual_seed(0)
    model = GPT(config_of(kind))
    for block in model.blocks:
        if isinstance(block.ffn, MoE):
            tensors = [block.ffn.experts.w_in, block.ffn.experts.w_out]
        else:
            mlp = block.ffn.mlp if kind == "dense" else None
            tensors = [mlp.w_in.weight, mlp.w_out.weight] if mlp else [block.ffn.table]
        for w in tensors:
            rows = w.detach().flatten(1)
            assert rows.std() > 0.01 and (rows.abs().amax(1) > 0).all()
            assert torch.pdist(rows).min() > 0.1 * torch.pdist(rows).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_log_v_and_every_parameter_gets_a_gradient(kind):
    torch.manual_seed(0)
    model = GPT(config_of(kind))
    idx, targets, domain = batch_of(B=8, T=12)
    out = run(model, idx, targets, domain=domain)
    assert float(out.loss) == pytest.approx(math.log(V), abs=0.1)
    (out.loss + out.aux_loss).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


def test_every_write_to_the_residual_stream_starts_small():
    """2 n_layer writes of variance 1 / (4 n_layer) each at unit input: together no more than the input."""
    torch.manual_seed(0)
    for kind in ("dense", "topk"):
        model = GPT(config_of(kind, {"model.n_layer": 4, "model.n_embd": 64, "ffn.d_ff": 64}))
        for name, p in model.named_parameters():
            if name.endswith(("attention.out.weight", "w_out.weight", "experts.w_out")):
                assert float(p.detach().std()) == pytest.approx((2 * 64 * 8) ** -0.5, rel=0.05)
            if name.endswith(("attention.qkv.weight", "w_in.weight", "experts.w_in")):
                assert float(p.detach().std()) == pytest.approx((2 * 64) ** -0.5, rel=0.05)


# ---- 9. cached generation

@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_equals_the_full_forward(kind):
    """Up to block_size, in chunks of several lengths; expert choice equals its own generating mode, uncut."""
    capacity = {} if kind in ("expert_choice", "soft") else {"ffn.eval_capacity_factor": 0.3}
    model = model_of(kind, capacity | {"model.n_kv_head": 1}).eval()
    idx, _, _ = batch_of(B=2, T=12)
    if kind == "expert_choice":
        full = logits(model, idx, cache=model.new_cache(2))
    else:
        full = logits(model_of(kind, {"model.n_kv_head": 1}).eval(), idx)       # without a capacity limit
    for chunks in ([1] * 12, [5, 1, 1, 1, 1, 3], [3, 4, 5], [11, 1]):
        cache, parts, start = model.new_cache(2), [], 0
        for size in chunks:
            parts.append(logits(model, idx[:, start:start + size], cache=cache))
            start += size
        assert cache.length == 12
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)


def test_expert_choice_generates_otherwise_than_it_trains():
    """The known gap: generation takes each token's own best scores."""
    model, idx = model_of("expert_choice").eval(), batch_of()[0]
    change = (logits(model, idx) - logits(model, idx, cache=model.new_cache(3))).abs().max()
    assert change > 1e-2


@pytest.mark.parametrize("kind", ["dense", "topk"])
def test_cached_generation_in_bf16(kind):
    model, idx = model_of(kind).eval(), batch_of(B=2, T=12)[0]
    with torch.autocast("cpu", torch.bfloat16):
        full, cache = logits(model, idx), model.new_cache(2)
        cached = torch.cat([logits(model, idx[:, i:i + 3], cache=cache) for i in range(0, 12, 3)], 1)
    assert (cached.float() - full.float()).norm() < 0.03 * full.float().norm()


def test_more_than_block_size_is_an_error():
    model = model_of("topk").eval()
    idx = batch_of(B=1, T=13)[0]
    with pytest.raises(ValueError, match="block_size"):
        model(idx)
    cache = model.new_cache(1)
    model(idx[:, :12], cache=cache)
    with pytest.raises(ValueError, match="block_size"):
        model(idx[:, 12:], cache=cache)


def test_cache_is_preallocated_for_the_kv_heads_only():
    cache = model_of("dense", {"model.n_kv_head": 1}).new_cache(3)
    assert isinstance(cache, Cache) and [state.shape for state in cache.states] == 2 * [(2, 3, 1, 12, 8)]


# ---- attention

def test_rope_depends_on_distance_only():
    """(R_i q) . (R_j k) is a function of i - j."""
    table = rotary_table(ModelConfig(n_embd=8, n_head=1, block_size=20))
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=g)
    turned = [rotate(x.expand(1, 20, 1, 8), table)[0, :, 0] for x in (q, k)]
    scores = turned[0] @ turned[1].T                                    # (20, 20)
    for distance in range(-5, 6):
        same = scores.diagonal(distance)
        torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=1e-4)
    assert scores[5].std() > 0.05
    torch.testing.assert_close(turned[0][0], q[0, 0, 0])                # position 0 is not turned
    torch.testing.assert_close(turned[0].norm(dim=-1), q.norm().expand(20))


def test_rope_frequencies():
    angle = torch.outer(torch.arange(20.0), 500.0 ** (-torch.arange(4) / 4))
    cos, sin = rotary_table(ModelConfig(n_embd=8, n_head=1, block_size=20, rope_base=500.0))[:, :, 0]
    torch.testing.assert_close(cos, torch.cat([angle.cos()] * 2, -1))
    torch.testing.assert_close(sin, torch.cat([-angle.sin(), angle.sin()], -1))


def test_attention_against_a_loop():
    """Softmax over the past, one head and one position at a time."""
    model = model_of("dense", {"model.n_kv_head": 1})
    attention, table = model.blocks[0].attention, model.rotary[:, :6]
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0))
    y = attention(x, table, None, 0)
    q, k, v = attention.qkv(x)[0].split([16, 8, 8], -1)
    q = rotate(q.view(1, 6, 2, 8), table)[0]
    k = rotate(k.view(1, 6, 1, 8), table)[0, :, 0]
    heads = torch.zeros(6, 2, 8)
    for i in range(6):
        for h in range(2):
            p = torch.stack([q[i, h] @ k[j] / 8 ** 0.5 for j in range(i + 1)]).softmax(0)
            heads[i, h] = sum(p[j] * v[j] for j in range(i + 1))
    torch.testing.assert_close(y[0], heads.flatten(1) @ attention.out.weight.T, rtol=1e-4, atol=1e-5)


def test_grouped_query_heads_equal_repeated_heads():
    grouped = model_of("topk", {"model.n_head": 4, "model.n_kv_head": 2, "model.qkv_bias": "true"}).eval()
    full = model_of("topk", {"model.n_head": 4, "model.qkv_bias": "true"}).eval()
    state = grouped.state_dict()
    for name in [n for n in state if ".qkv." in n]:
        q, k, v = state[name].split([16, 8, 8])
        twice = [t.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1) for t in (k, v)]
        state[name] = torch.cat([q] + twice)
    full.load_state_dict(state)
    idx = batch_of()[0]
    torch.testing.assert_close(logits(grouped, idx), logits(full, idx), rtol=1e-5, atol=1e-5)


# ---- norm

def test_norm_on_cpu_equals_rms_norm():
    """Outputs and gradients, under autocast too, and against finite differences in float64."""
    x, dy = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    for autocast in (False, True):
        results = []
        for norm in (RMSNorm(16), lambda x: F.rms_norm(x, (16,), weight, eps=1e-5)):
            weight = torch.linspace(0.5, 2, 16).requires_grad_()
            if isinstance(norm, RMSNorm):
                norm.weight = torch.nn.Parameter(weight.detach().clone())
            leaf, w = x.clone().requires_grad_(), getattr(norm, "weight", weight)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = norm(leaf)
            results.append([y, *torch.autograd.grad(y, (leaf, w), dy.to(y.dtype))])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    double = [t.double().requires_grad_() for t in (x, torch.linspace(0.5, 2, 16))]
    assert torch.autograd.gradcheck(NormOnCPU.apply, double)


# ---- loss in slices

@pytest.mark.parametrize("chunks", [2, 5, 24])
def test_loss_chunks_give_the_same_loss_and_gradients(chunks):
    idx, targets, _ = batch_of()
    results = []
    for n in (1, chunks):
        model = model_of("topk", {"model.loss_chunks": n})
        out = run(model, idx, targets)
        assert (out.logits is None) == (n > 1)
        (out.loss + out.aux_loss).backward()
        results.append([out.loss.detach()] + [p.grad for p in model.parameters()])
        assert run(model.eval(), idx, targets).logits is not None
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---- micro-steps

MICRO = [(kind, {}) for kind in KINDS] + [("topk", more) for more in (
    *({"ffn.balance": name} for name in LOSSES if name not in ("importance_load", "loss_free", "quantile", "gshard")),
    {"ffn.balance": "none"}, {"ffn.balance": "none", "ffn.z_loss": 1.0}, {"ffn.balance_loss": 0.0},
    {"ffn.balance": "deepseek", "ffn.n_groups": 2, "ffn.device_loss": 1.0, "ffn.comm_loss": 1.0},
    {"ffn.balance": "none", "ffn.capacity_factor": 0.5}, {"ffn.balance": "none", "ffn.eval_capacity_factor": 0.5},
    {"ffn.balance": "none", "model.dropout": 0.2})] + [
    ("switch", {"ffn.jitter": 0.0, "ffn.balance": "deepseek"}), ("switch", {"ffn.jitter": 0.0}),
    ("sigmoid", {"ffn.balance_loss": 1.0, "ffn.z_loss": 1.0}), ("gshard", {"ffn.balance": "none"}),
    ("sigmoid", {"ffn.balance": "quantile", "ffn.balance_loss": 0.0}),
    ("peer", {"ffn.query_norm": "layernorm"}), ("pkm", {"ffn.query_norm": "none"})]


def step_in_parts(kind, more, n):
    """(names, gradients and what a step moves) of one step on a batch that is cut into n micro-steps."""
    model = model_of(kind, {"ffn.balance_loss": 1.0} | more)
    idx, targets, domain = batch_of(B=4)
    loads = []
    for i, part in enumerate(zip(idx.chunk(n), targets.chunk(n), domain.chunk(n))):
        out = run(model, part[0], part[1], domain=part[2], seed=i)
        ((out.loss + out.aux_loss) / n).backward()
        loads.append([s.load for s in out.stats])
    model.after_step([sum(layer) for layer in zip(*loads)])
    numbers = [p.grad for p in model.parameters()] + [b for n, b in model.named_buffers() if n.endswith("router.bias")]
    return model.per_micro_batch(), numbers


@pytest.mark.parametrize("kind, more", MICRO, ids=str)
def test_micro_steps_train_the_same_or_it_is_said(kind, more):
    """The gradient of a batch is the mean of those of its halves where per_micro_batch() is empty, and only there.
    (test_parallel: two processes train what one does.)"""
    said, whole = step_in_parts(kind, more, 1)
    _, halves = step_in_parts(kind, more, 2)
    same = all((a - b).norm() <= 1e-4 * a.norm() + 1e-7 for a, b in zip(whole, halves))
    assert same == (not said), said


def test_what_is_equal_and_what_goes_by_a_micro_batch():
    """The rule as it is written: deepseek, z-loss, loss-free, hash, soft are equal; the help names the others."""
    assert set(LOSSES) - OF_MICRO_BATCH == {"deepseek", "loss_free"}
    assert not any(model_of(kind).per_micro_batch() for kind in ("dense", "sigmoid", "hash", "soft", "domain"))
    assert model_of("gshard", {"ffn.capacity_factor": 2.0}).per_micro_batch() == [
        "ffn.router gshard", "ffn.capacity_factor 2.0", "ffn.balance gshard"]
    text = dict(all_fields())["train.grad_accum"].metadata["help"]
    assert all(name in text for name in (*OF_MICRO_BATCH, "capacity", "batchnorm", "dropout"))
    assert model_of("gshard", {"model.dropout": 0.1}).differences() == ["ffn.router gshard", "model.dropout 0.1"]
    assert model_of("peer").differences() == []                 # processes put the batch norm together


# ---- settings that nothing reads

@pytest.mark.parametrize("path, more, key, remedy", [
    (None, {"ffn.jitter": 0.2}, "ffn.jitter", 'ffn.router = "switch"'),
    (None, {"ffn.load_loss": 0.1}, "ffn.load_loss", 'ffn.balance = "importance_load"'),
    ("olmoe", {"ffn.bias_rate": 0.1}, "ffn.bias_rate", 'ffn.balance = "loss_free"'),
    ("olmoe", {"ffn.balance": "none", "ffn.balance_loss": 0.1}, "ffn.balance_loss", 'ffn.balance = "switch" or '),
    ("olmoe", {"ffn.d_key": 16}, "ffn.d_key", 'ffn.kind = "peer" or "pkm"'),
    ("peer", {"ffn.n_expert": 4}, "ffn.n_expert", 'ffn.kind = "moe"'),
    ("peer", {"ffn.z_loss": 0.1}, "ffn.z_loss", 'ffn.kind = "moe"'),
    ("pkm", {"ffn.peer_activation": "relu"}, "ffn.peer_activation", 'ffn.kind = "peer"'),
    ("dense", {"ffn.moe_layers": [1]}, "ffn.moe_layers", 'ffn.kind = "moe" or "peer" or "pkm"'),
    ("switch", {"ffn.route_scale": 2.0}, "ffn.route_scale", 'ffn.router = "topk" or "sigmoid"'),
    ('router = "topk"\nhash_table = "balanced"', {}, "ffn.hash_table", 'ffn.router = "hash"'),
    ('balance = "none"\nbalance_loss = 0.1', {}, "ffn.balance_loss", 'ffn.balance = "switch" or '),
    ('kind = "dense"\nd_key = 16', {}, "ffn.d_key", 'ffn.kind = "peer" or "pkm"')])
def test_a_setting_that_nothing_reads_is_refused_with_what_would(path, more, key, remedy, tmp_path):
    if path and "=" in path:
        (tmp_path / "own.toml").write_text(f"[ffn]\n{path}\n")
        path = tmp_path / "own.toml"
    elif path:
        path = ROOT / "configs" / f"{path}.toml"
    with pytest.raises(ConfigError) as refused:
        load_config(path, more)
    assert f"{key} = " in str(refused.value) and f"has no effect: it is read with {remedy}" in str(refused.value)
    assert more == {} or f"--{key}" in str(refused.value)


@pytest.mark.parametrize("path, more", [
    ("olmoe", {"ffn.kind": "dense"}), ("olmoe", {"ffn.balance": "none"}), ("switch", {"ffn.router": "gshard", "ffn.top_k": 2}),
    ("deepseek_v3", {"ffn.balance": "switch"}), ("olmoe", {"ffn.jitter": 0.01}),          # the default
    ("peer", {"ffn.kind": "moe", "ffn.d_key": 32}), ("peer_markov", {"ffn.kind": "dense", "ffn.router": "noisy_topk"})])
def test_what_another_choice_reads_may_be_left_behind(path, more, tmp_path):
    """In a file whose choice the command line replaces, on a command line that chooses a kind or router (arms of
    one experiment share settings), and in the config.toml of such a run, which holds every value."""
    config = load_config(ROOT / "configs" / f"{path}.toml", more)
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_config(tmp_path / "config.toml", {"train.max_steps": 7}).ffn == config.ffn


def test_what_reads_a_setting_is_data_that_fits_the_code():
    """Routers name the settings that their code uses; every name exists; without init_from alone it is asked."""
    names = {spec.name for spec in dataclasses.fields(FFNConfig)}
    assert {name for _, _, read in readers() for name in read} <= names
    for name, router in ROUTERS.items():
        used = set(re.findall(r"(?:\bc|\bconfig)\.(\w+)", inspect.getsource(router))) & names
        assert used <= set(router.traits.reads) | {"top_k"}, name
    assert load_config(None, {"train.init_from": "run", "ffn.gumbel_rate": 0.1}).ffn.gumbel_rate == 0.1
    assert GPT(read_config(None, {"ffn.jitter": 0.2, "model.vocab_size": 9})).config.ffn.jitter == 0.2


# ---- layouts

@pytest.mark.parametrize("more,expected", [
    ({}, [0, 1, 2, 3, 4, 5]), ({"ffn.moe_every": 2}, [1, 3, 5]), ({"ffn.moe_every": 3}, [2, 5]),
    ({"ffn.moe_layers": "4,1"}, [1, 4]), ({"ffn.n_dense_first": 1}, [1, 2, 3, 4, 5]),
    ({"ffn.n_dense_first": 2, "ffn.moe_every": 2}, [3, 5])])
def test_placement_of_sparse_layers(more, expected):
    model = model_of("topk", {"model.n_layer": 6, "ffn.d_dense": 40} | more)
    assert [i for i, b in enumerate(model.blocks) if isinstance(b.ffn, MoE)] == expected
    assert sparse_layers(model.config) == expected
    for block in model.blocks:
        if isinstance(block.ffn, Dense):
            assert block.ffn.mlp.w_out.weight.shape == (16, 40)
        else:
            assert block.ffn.experts.w_out.shape == (4, 16, 16)


def test_peer_stands_in_the_middle_layer_only():
    model = model_of("peer", {"model.n_layer": 5, "ffn.moe_every": 0})
    assert [type(b.ffn).__name__ for b in model.blocks] == ["Dense", "Dense", "PEER", "Dense", "Dense"]


def test_balanced_hash_tables_come_from_the_token_counts():
    model, idx = model_of("hash", {"ffn.hash_table": "balanced"}), batch_of()[0]
    counts = 1000 / torch.arange(1.0, V + 1)
    model.set_token_counts(counts)
    for block in model.blocks:
        load = torch.zeros(4).index_add(0, block.ffn.router.table, counts)
        assert load.max() / load.mean() < 1.1
    assert run(model, idx).stats[0].load.sum() == 24
    random, table = model_of("hash"), model_of("hash").blocks[0].ffn.router.table
    random.set_token_counts(counts)
    assert torch.equal(random.blocks[0].ffn.router.table, table)


# ---- 13. counts

def test_num_params_by_hand():
    more = {"model.n_layer": 3, "model.n_head": 4, "model.n_kv_head": 2, "model.qkv_bias": "true",
            "ffn.n_shared": 2, "ffn.shared_gate": "true", "ffn.n_dense_first": 1, "ffn.d_dense": 40,
            "ffn.d_expert": 24, "ffn.output_norm": "true"}
    attention = 16 * (16 + 2 * 8) + (16 + 2 * 8) + 16 * 16              # grouped q, k, v with biases; out
    expert = 3 * 16 * 24                                                # swiglu
    sparse = 4 * expert + 2 * expert + 4 * 16 + 16 + 16                 # routed, shared, router, gate, norm
    total = V * 16 + 3 * (attention + 2 * 16) + 3 * 16 * 40 + 2 * sparse + 16
    model = model_of("topk", more)
    assert model.num_params() == (total, total - 2 * (4 - 2) * expert)
    untied = model_of("topk", more | {"model.tie_embeddings": "false"})
    assert untied.num_params().total == total + V * 16


def test_num_params_of_other_kinds():
    dense = model_of("dense").num_params()
    assert dense.total == dense.active
    for kind, active in (("hash", 1), ("soft", 4), ("gshard", 2), ("domain", 1), ("expert_choice", 2)):
        total, used = model_of(kind).num_params()
        assert total - used == 2 * (4 - active) * 3 * 16 * 16
    total, used = model_of("peer").num_params()
    assert total - used == 2 * (16 - 4) * 2 * 16            # 2 layers; h k = 4 of N = 16 neurons, u and v


def test_flops_per_token_by_hand():
    T = 12
    attention = 2 * 16 * 16 * 4 + 2 * 2 * 16 * (T + 1) / 2  # projections; scores and mix over the past
    head = 2 * 16 * V
    dense = 2 * 3 * 16 * 16
    topk = 2 * dense + 2 * 16 * 4                           # two experts, and the router
    peer = 2 * (2 * 16 * 8 + 2 * 8 * 4 + 3 + 2 * 2 * 2 * 16)    # h (query, scores of halves, adds, k neurons)
    for kind, ffn in (("dense", dense), ("topk", topk), ("peer", peer)):
        assert model_of(kind).flops_per_token() == 2 * (attention + ffn) + head
    assert model_of("dense").flops_per_token(6) == 2 * (attention - 2 * 2 * 16 * 3 + dense) + head
    shared = model_of("topk", {"ffn.n_shared": 1}).flops_per_token()
    assert shared == model_of("topk").flops_per_token() + 2 * dense


@pytest.mark.parametrize("name,total,active", [
    ("mixtral_8x7b", 46_702_792_704, 12_879_925_248), ("qwen2_57b_a14b", 57_408_658_944, 14_249_270_784),
    ("deepseek_moe_16b", 16_375_728_128, 2_828_650_496)])
def test_published_parameter_counts(name, total, active):
    config = load_config(ROOT / "configs" / "published" / f"{name}.toml")
    with torch.device("meta"):
        model = GPT(config)
    assert all(p.is_meta for p in model.parameters()) and model.rotary.is_meta
    assert model.num_params() == (total, active)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.stem)
def test_every_preset_loads_and_runs(path):
    small = [("ffn.n_keys", "16")] if "n_keys" in path.read_text() else []
    config = load_config(path, [("model.block_size", "16"), *small])
    config.model.vocab_size = 64
    torch.manual_seed(0)
    model = GPT(config)
    idx, targets, domain = batch_of(B=2, T=16, vocab=64)
    model.set_token_counts(torch.ones(64))
    out = run(model, idx, targets, domain=domain)
    (out.loss + out.aux_loss).backward()
    assert out.loss.isfinite() and path.read_text().startswith("# ")


# ---- torch.compile: the whole model in one graph, never compiled again

def compiled_steps(kind, backend, more=()):
    """Five compiled training steps on batches with different loads, in bf16 autocast."""
    torch._dynamo.reset()
    model = model_of(kind, {"model.n_layer": 1} | dict(more))
    forward = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    domain, loads = batch_of(B=4)[2], []
    for i in range(5):
        idx, targets, _ = batch_of(B=4, vocab=3 if i % 2 else V, seed=i)    # few tokens: an uneven load
        with torch.autocast("cpu", torch.bfloat16):
            out = forward(idx, targets, domain=domain.roll(i), step=torch.tensor(float(i)))
        (out.loss + out.aux_loss).backward()
        loads.append(tuple(out.stats[0].load.tolist()))
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    return model, loads


@pytest.mark.parametrize("kind,backend,more", [
    ("dense", "aot_eager", {}), ("topk", "aot_eager", {}), ("topk", "eager", {"ffn.capacity_factor": 1.0}),
    ("topk", "eager", {"ffn.dispatch": "padded", "ffn.capacity_factor": 1.0}),
    *((kind, "eager", {}) for kind in SPARSE if kind not in ("topk", "base"))])
def test_compile_without_graph_break_or_recompile(kind, backend, more):
    """Every kind and router but base, whose auction takes as many rounds as the data asks for."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        _, loads = compiled_steps(kind, backend, more)
    assert kind in ("dense", "soft", "expert_choice", "domain") or len(set(loads)) > 1


def test_compile_changes_no_gradient():
    """F.grouped_mm, compiled by its own rules in bf16 and through an operator of ours in float32, and plain expressions, against ExpertByExpert."""
    idx, targets, _ = batch_of(B=4)
    grads = []
    for backend in (None, "aot_eager"):
        torch._dynamo.reset()
        model = model_of("topk", {"model.n_layer": 1})
        with torch.autocast("cpu", torch.bfloat16):
            out = (torch.compile(model, fullgraph=True, backend=backend) if backend else model)(idx, targets)
        (out.loss + out.aux_loss).backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        assert (a - b).norm() <= 0.03 * a.norm()


def test_base_is_never_compiled():
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        compiled_steps("base", "eager")
