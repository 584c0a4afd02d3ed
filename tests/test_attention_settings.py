"""Settings of attention: norms of queries and keys, width of a head, biases, window, slower rotary positions; and the
epsilon of the norms."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_btx import parent_of
from tiny import batch_of, model_of, run

from grow import btx
from kernels.norm import NormOnCPU, rms_norm
from model import GPT, load_config, resolve, rotary_table, rotate
from runtime.config import from_tables
from settings import Config, ConfigError, ModelConfig

EACH = {"qk_norm head": {"model.qk_norm": "head"}, "qk_norm all": {"model.qk_norm": "all"},
        "head_dim": {"model.head_dim": 6}, "window": {"model.window": 3}, "window of one": {"model.window": 1},
        "biases": {"model.qkv_bias": True, "model.out_bias": True},
        "linear": {"model.rope_scaling": "linear", "model.rope_factor": 3.0},
        "llama3": {"model.rope_scaling": "llama3", "model.rope_factor": 8.0, "model.rope_original": 16},
        "all": {"model.qk_norm": "all", "model.head_dim": 10, "model.window": 4, "model.n_head": 4,
                "model.n_kv_head": 2, "model.qkv_bias": True, "model.out_bias": True, "model.norm_eps": 1e-3,
                "model.rope_scaling": "linear", "model.rope_factor": 2.0}}
EACH["all, without rope"] = EACH["all"] | {"model.rope": False, "model.rope_scaling": "none", "model.rope_factor": 1.0}


def drawn(more, kind="dense"):
    """A model in evaluation mode whose biases and norms are not at their start."""
    model = model_of(kind, more).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
    return model


def logits(model, idx, **more):
    with torch.no_grad():
        return run(model, idx, **more).logits


def tokens(T=12, B=2):
    return batch_of(B=B, T=T)[0]


# ---- all of them

@pytest.mark.parametrize("more", EACH.values(), ids=EACH)
def test_attention_against_a_loop(more):
    """One head and one position at a time, by the formulas."""
    model = drawn(more)
    m, attention, T = model.config.model, model.blocks[0].attention, 9
    x = torch.randn(T, 16, generator=torch.Generator().manual_seed(0))
    width, kv = m.n_head * m.head_width, m.n_kv_head * m.head_width
    q, k, v = attention.qkv(x).split([width, kv, kv], -1)

    def normed(t, norm):
        t = t.unflatten(1, (-1, m.head_width))
        over = (1, 2) if m.qk_norm == "all" else 2
        size = (t.square().mean(over, keepdim=True) + m.norm_eps).sqrt()
        return t / size * norm.weight.view(-1, m.head_width) if norm is not None else t

    q, k, v = normed(q, attention.norm_q), normed(k, attention.norm_k), v.unflatten(1, (-1, m.head_width))
    if m.rope:
        q, k = (rotate(t.unsqueeze(0), model.rotary[:, :T])[0] for t in (q, k))
    heads = torch.zeros(T, m.n_head, m.head_width)
    for i in range(T):
        for h in range(m.n_head):
            g, seen = h * m.n_kv_head // m.n_head, range(max(0, i + 1 - (m.window or T)), i + 1)
            p = torch.stack([q[i, h] @ k[j, g] / m.head_width ** 0.5 for j in seen]).softmax(0)
            heads[i, h] = sum(p[n] * v[j, g] for n, j in enumerate(seen))
    y = attention(x.unsqueeze(0), model.rotary[:, :T] if m.rope else None, None, 0)[0]
    torch.testing.assert_close(y, attention.out(heads.flatten(1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", EACH.values(), ids=EACH)
def test_a_cache_gives_what_the_whole_text_gives(more):
    """In pieces, and one token after the other from a length that is a tensor, as a CUDA graph reads it."""
    model, idx = drawn(more), tokens()
    full = logits(model, idx)
    for sizes in ([5, 1, 1, 5], [3, 4, 4, 1]):
        cache = model.new_cache(2)
        parts = [logits(model, part, cache=cache) for part in idx.split(sizes, 1)]
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-5)
    cache = model.new_cache(2)
    parts = [logits(model, idx[:, :2], cache=cache)]
    cache.length = torch.tensor([2])
    parts += [logits(model, part, cache=cache) for part in idx[:, 2:].split(1, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("more", EACH.values(), ids=EACH)
def test_all_parameters_learn_also_under_autocast(more):
    model, (idx, targets, _) = model_of("topk", more), batch_of()
    plain = run(model, idx, targets).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = run(model, idx, targets).loss
    loss.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=0.02)
    # a window of one token leaves queries and keys nothing to choose
    free = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert all("norm_q" in name or "norm_k" in name for name in free) if more == EACH["window of one"] else not free


@pytest.mark.parametrize("more", EACH.values(), ids=EACH)
def test_weights_in_bfloat16_give_nearly_the_same(more):
    model, idx = drawn(more), tokens()
    full = logits(model, idx)
    half = logits(model.to(torch.bfloat16), idx)
    assert half.dtype == torch.bfloat16 and (half.float() - full).norm() < 0.05 * full.norm()


@pytest.mark.parametrize("name", ["all"])
def test_compiled_it_is_one_graph_and_the_same(name):
    model, (idx, targets, _) = model_of("dense", EACH[name]), batch_of()
    results = []
    for forward in (model, torch.compile(model, backend="eager", fullgraph=True)):
        loss = run(forward, idx, targets).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_old_settings_are_what_the_new_defaults_say():
    """A checkpoint's header from before has none of them; its weights have their names and their numbers."""
    new = ("head_dim", "out_bias", "qk_norm", "window", "rope_scaling", "rope_factor", "rope_original", "rope_low",
           "rope_high", "norm_eps")
    config = load_config(None, {"model.vocab_size": 32, "model.n_layer": 1})
    tables = config.to_dict()
    tables["model"] = {name: value for name, value in tables["model"].items() if name not in new}
    assert resolve(from_tables(tables)) == config
    names = [name for name in GPT(config).state_dict() if "attention" in name]
    assert names == ["blocks.0.norm_attention.weight", "blocks.0.attention.qkv.weight", "blocks.0.attention.out.weight"]


def test_models_made_from_such_models_are_such_models():
    """Upcycled it is the same function; of a mix the norms are means; a branch of another window is refused."""
    parent, other = (parent_of(more=EACH["all"], seed=seed) for seed in (0, 1))
    idx = tokens()
    with torch.no_grad():
        for i, p in enumerate((parent, other)):
            p.model.blocks[0].attention.norm_q.weight.fill_(1.5 + i)
    model = btx.upcycle(parent, [("ffn.n_expert", "3")])[1].eval()
    torch.testing.assert_close(logits(model, idx), logits(parent.model, idx), rtol=1e-5, atol=1e-6)
    mixed = btx.mix([parent, other], [])[1]
    assert set(mixed.blocks[0].attention.norm_q.weight.tolist()) == {2.0}
    with pytest.raises(ConfigError, match="model.window"):
        btx.mix([parent, parent_of(more=EACH["all"] | {"model.window": 5})], [])


# ---- window

@settings(max_examples=20, deadline=None)
@given(w=st.integers(1, 6), n_layer=st.integers(1, 3), at=st.integers(0, 11), cached=st.booleans())
def test_no_token_outside_the_receptive_field_matters(w, n_layer, at, cached):
    """n_layer layers carry a token at most n_layer (w - 1) positions on; within that it does matter."""
    model = model_of("dense", {"model.window": w, "model.n_layer": n_layer}).eval()
    idx, other = tokens(B=1), tokens(B=1)
    other[0, at] = (other[0, at] + 1) % 32

    def read(ids):
        return logits(model, ids, **(dict(cache=model.new_cache(1)) if cached else {}))[0]

    change = (read(idx) - read(other)).abs().amax(1)                                # (T,)
    reach = at + n_layer * (w - 1)
    assert not change[:at].any() and not change[reach + 1:].any()
    assert change[at] > 0 and change[min(reach, at + w - 1, 11)] > 0


def test_a_window_of_the_whole_text_is_none():
    idx = tokens()
    plain = logits(model_of("topk").eval(), idx)
    assert torch.equal(plain, logits(model_of("topk", {"model.window": 12}).eval(), idx))
    assert torch.equal(plain, logits(model_of("topk", {"model.window": 999}).eval(), idx))
    assert not torch.allclose(plain, logits(model_of("topk", {"model.window": 11}).eval(), idx), atol=1e-6)


@given(w=st.integers(0, 14), context=st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_flops_count_the_pairs_that_the_mask_leaves(w, context):
    more = {"model.n_layer": 1, "model.n_head": 2, "model.n_kv_head": 1, "model.head_dim": 6}
    layer = model_of("dense", more | {"model.window": w}).blocks[0].attention
    pairs = sum(0 <= i - j < (w or 99) for i in range(context) for j in range(context))
    # 2 of a multiply-add; scores and sums of 2 heads of width 6; q, k, v and output of width 12 + 6 + 6 + 12
    assert layer.flops_per_token(context) == pytest.approx(2 * 2 * 12 * pairs / context + 2 * 16 * (12 + 6 + 6 + 12))


# ---- norms

@pytest.mark.parametrize("which", ["head", "all"])
def test_with_a_norm_the_length_of_queries_and_keys_is_nothing(which):
    """Of all of them together; of one head's alone only where each head has a norm of its own."""
    model, idx = drawn({"model.qk_norm": which, "model.norm_eps": 1e-12}), tokens()
    before, weight = logits(model, idx), model.blocks[0].attention.qkv.weight     # 2 heads of 8: q, k, v
    for rows, same in ((slice(0, 16), True), (slice(16, 32), True), (slice(0, 8), which == "head"),
                       (slice(16, 24), which == "head"), (slice(32, 48), False)):
        with torch.no_grad():
            weight[rows] *= 3
        change = (logits(model, idx) - before).abs().max()
        assert (change < 1e-5) == same and (change < 1e-5 or change > 1e-3)
        with torch.no_grad():
            weight[rows] /= 3


def test_norms_of_queries_and_keys_have_the_widths_they_should():
    more = {"model.n_head": 4, "model.n_kv_head": 2, "model.head_dim": 6}
    widths = {}
    for which in ("head", "all"):
        attention = model_of("dense", more | {"model.qk_norm": which}).blocks[0].attention
        widths[which] = len(attention.norm_q.weight), len(attention.norm_k.weight)
    assert widths == {"head": (6, 6), "all": (24, 12)}


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.1])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_norm_eps(eps, scale):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)) * scale
    weight = torch.linspace(0.5, 2, 16)
    expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, eps), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rms_norm(x.double(), weight, eps).float(), expected, rtol=1e-4, atol=1e-5)


def test_every_norm_of_the_model_has_its_epsilon():
    model = model_of("topk", {"model.norm_eps": 0.25, "model.qk_norm": "head"})
    norms = [m for m in model.modules() if type(m).__name__ == "RMSNorm"]
    assert len(norms) == 2 * 4 + 1 and {norm.eps for norm in norms} == {0.25}
    double = [t.double().requires_grad_() for t in (torch.randn(3, 4), torch.ones(4))]
    assert torch.autograd.gradcheck(lambda x, w: NormOnCPU.apply(x, w, 0.25), double)


# ---- width of a head, biases

@settings(max_examples=12, deadline=None)
@given(heads=st.sampled_from([(2, 1), (2, 2), (3, 1), (4, 2)]), half=st.integers(1, 8), biases=st.booleans())
def test_shapes_and_counts_of_heads_with_a_width_of_their_own(heads, half, biases):
    (n_head, n_kv), width = heads, 2 * half
    more = {"model.n_layer": 1, "model.n_head": n_head, "model.n_kv_head": n_kv, "model.head_dim": width,
            "model.qkv_bias": biases, "model.out_bias": biases}
    model = model_of("dense", more)
    attention, rows = model.blocks[0].attention, (n_head + 2 * n_kv) * width
    assert attention.qkv.weight.shape == (rows, 16) and attention.out.weight.shape == (16, n_head * width)
    assert model.new_cache(3).states[0].shape == (2, 3, n_kv, 12, width)
    plain = model_of("dense", {"model.n_layer": 1, "model.n_head": 2})                          # 4 d^2
    more = (rows + n_head * width) * 16 - 4 * 16 * 16
    assert model.num_params().total - plain.num_params().total == more + biases * (rows + 16)
    assert model(tokens()).logits.shape == (2, 12, 32)


# ---- rotary positions

def table(**more):
    return rotary_table(ModelConfig(n_embd=16, n_head=1, block_size=40, **more))


@settings(max_examples=20, deadline=None)
@given(factor=st.integers(2, 8), base=st.sampled_from([500.0, 10000.0, 1e6]))
def test_linear_position_is_a_share_of_itself(factor, base):
    """Position f p of a factor f turns as position p did."""
    slow = table(rope_base=base, rope_scaling="linear", rope_factor=float(factor))[:, ::factor]
    torch.testing.assert_close(slow, table(rope_base=base)[:, :slow.shape[1]], rtol=0, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(factor=st.floats(1.5, 16), low=st.floats(0.1, 2), more=st.floats(0.5, 8), original=st.integers(8, 4096))
def test_llama3_by_wavelengths(factor, low, more, original):
    """Pair by pair: short waves stay, long ones grow by the factor, those between by a share."""
    high = low + more
    mine = table(rope_base=500.0, rope_scaling="llama3", rope_factor=factor, rope_low=low, rope_high=high,
                 rope_original=original)
    angles = []
    for i in range(8):
        frequency = 500.0 ** (-i / 8)
        wave = 2 * math.pi / frequency
        if wave > original / low:
            frequency /= factor
        elif wave >= original / high:
            share = (original / wave - low) / (high - low)
            frequency = share * frequency + (1 - share) * frequency / factor
        angles.append(frequency)
    angle = torch.outer(torch.arange(40.0), torch.tensor(angles + angles))
    torch.testing.assert_close(mine[0, :, 0], angle.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(mine[1, :, 0].abs(), angle.sin().abs(), rtol=0, atol=1e-4)


# ---- what is refused

@pytest.mark.parametrize("more, wanted", [
    ({"head_dim": 5}, "model.head_dim = 5 gives heads of odd width 5"),
    ({"n_head": 3}, "cannot be divided by model.n_head = 3; or set model.head_dim"),
    ({"rope_scaling": "linear"}, "set model.rope_factor above 1"),
    ({"rope_scaling": "linear", "rope_factor": 2.0, "rope": False}, "model.rope = false"),
    ({"rope_scaling": "llama3", "rope_factor": 2.0, "rope_low": 5.0}, "must be below model.rope_high = 4.0"),
    ({"rope_scaling": "yarn"}, "is not one of none, linear, llama3"), ({"window": -1}, "at least 0"),
    ({"qk_norm": "heads"}, "did you mean head?"), ({"norm_eps": 0.0}, "at least 1e-12"),
    ({"rope_factor": 2.0}, "has no effect: it is read with model.rope_scaling"),
    ({"rope_low": 2.0}, "has no effect"), ({"mixer": "mamba", "window": 3}, "it is read with attention in some block"),
    ({"mixer": "mamba", "qk_norm": "head"}, "has no effect")])
def test_settings_that_do_not_fit_are_refused(more, wanted):
    with pytest.raises(ConfigError) as error:
        load_config(None, {f"model.{name}": value for name, value in more.items()})
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_heads_of_any_width_fit_a_width_that_they_do_not_divide():
    assert load_config(None, {"model.n_head": 3, "model.head_dim": 4}).model.head_width == 4
    assert load_config(None, {"model.mixer": "mamba", "model.attention_every": 2, "model.window": 3}).model.window == 3
    assert Config().model.head_width == 32
