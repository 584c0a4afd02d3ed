"""mamba.py and kernels/mamba.py: the scan and its loop, what a state may and may not do, and the hybrid of Jamba."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from test_train import corpora, losses, run as train_run, same_tensors, weights    # noqa: F401 (a fixture)
from tiny import BASE, batch_of

import kernels.mamba as kernels_mamba
import sample
import train
from data.corpora import recall
from data.prepare import prepare
from kernels import common
from lab import bench
from lab.papers.probes import PROBES
from lab.timing import mamba as bench_mamba
from lab.timing import measure
from mamba import Mamba, convolve, scan, scan_loop
from model import GPT, Output, attention_layers, load_config
from settings import ConfigError, ModelConfig
from train import build_optimizer

RUNS = common.HAS_TRITON and (torch.cuda.is_available() or common.INTERPRETED)
needs_kernel = pytest.mark.skipif(not RUNS, reason="needs triton, and a GPU or TRITON_INTERPRET=1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
examples = settings(max_examples=25, deadline=None, derandomize=True)
HYBRID = {"model.n_layer": 4, "model.mixer": "mamba", "model.attention_every": 4, "model.rope": "false",
          "model.d_state": 3, "model.n_kv_head": 1, "ffn.moe_every": 2}


def inputs(B, T, c, n, seed=0, dtype=torch.float64):
    """x, delta > 0, rate < 0, write, read, and the state before."""
    g = torch.Generator().manual_seed(seed)
    x, delta, write, read = (torch.randn(B, T, k, generator=g, dtype=dtype) for k in (c, c, n, n))
    rate, h = (torch.randn(*shape, generator=g, dtype=dtype) for shape in ((n, c), (B, n, c)))
    return [x, F.softplus(delta - 1), -rate.exp(), write, read, h]


def everything(path, tensors, seed=1):
    """y, the final state, and the gradients of all inputs of a random combination of both."""
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    y, h = path(*tensors)
    g = torch.Generator().manual_seed(seed)
    out = sum((t * torch.randn(t.shape, generator=g, dtype=t.dtype)).sum() for t in (y, h))
    return [y, h, *torch.autograd.grad(out, tensors)]


def layer_of(d=16, seed=0, **more):
    torch.manual_seed(seed)
    layer = Mamba(ModelConfig(n_embd=d, **more))
    layer.init_weights(2)
    return layer


def hybrid_of(more=(), seed=0):
    torch.manual_seed(seed)
    return GPT(load_config(None, BASE | HYBRID | dict(more)))


# ---- the scan

@examples
@given(B=st.integers(1, 3), T=st.integers(1, 40), c=st.integers(1, 6), n=st.integers(1, 5),
       chunk=st.integers(1, 41), seed=st.integers(0, 99))
def test_the_scan_is_the_loop_for_any_chunk(B, T, c, n, chunk, seed):
    tensors = inputs(B, T, c, n, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels_mamba, "CHUNK", chunk)
        found = everything(scan, tensors)
    for a, b in zip(found, everything(scan_loop, tensors)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@examples
@given(T=st.integers(2, 40), cut=st.integers(1, 39), path=st.sampled_from([scan, scan_loop]))
def test_two_halves_are_one_scan(T, cut, path):
    cut = min(cut, T - 1)

    def halves(x, delta, rate, write, read, h):
        first, second = zip(*((t[:, :cut], t[:, cut:]) for t in (x, delta, write, read)))
        a, h = path(*first[:2], rate, *first[2:], h)
        b, h = path(*second[:2], rate, *second[2:], h)
        return torch.cat([a, b], 1), h

    tensors = inputs(2, T, 3, 4)
    for a, b in zip(everything(halves, tensors), everything(path, tensors)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("path", [scan, scan_loop])
def test_the_gradient_is_that_of_differences(path):
    tensors = [t.requires_grad_() for t in inputs(1, 7, 2, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels_mamba, "CHUNK", 3)
        assert torch.autograd.gradcheck(path, tensors)


def test_nothing_overflows_whatever_delta():
    """float32: decays of e^-1e6 and of 1, side by side; finite, and the loop's numbers."""
    x, delta, rate, write, read, h = inputs(2, 50, 4, 3, dtype=torch.float32)
    delta[:, ::3] *= 1e3
    delta[:, 1::3] *= 1e-6
    tensors = [x, delta, rate * 1e3, write, read, h]
    for a, b in zip(everything(scan, tensors), everything(scan_loop, tensors)):
        a, b = a.detach(), b.detach()
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@needs_kernel
@pytest.mark.parametrize("shape", [(2, 37, 8, 4), (1, 16, 33, 3), (2, 5, 70, 16), (1, 1, 1, 1)], ids=str)
def test_kernels_are_their_twins(shape):
    """Forward and backward; chunks that end early, channels and states that fill no block."""
    exact = inputs(*shape)
    tensors = [t.float().to(DEVICE) for t in exact]
    g = torch.Generator().manual_seed(5)
    dy, dh = torch.randn(exact[0].shape, generator=g), torch.randn(exact[5].shape, generator=g)
    y, starts = kernels_mamba.scan(*tensors, kernel=True)
    got = kernels_mamba.scan_backward(dy.to(DEVICE), dh.to(DEVICE), *tensors[:5], starts, kernel=True)
    y64, starts64 = kernels_mamba.scan(*exact, kernel=False)
    want = kernels_mamba.scan_backward(dy.double(), dh.double(), *exact[:5], starts64, kernel=False)
    for a, b in zip([y, starts, *got], [y64, starts64, *want], strict=True):
        assert a.shape == b.shape
        assert (a.cpu() - b).norm() <= 2e-6 * (b.norm() + 0.1)


# ---- what a state may and may not do

@pytest.mark.parametrize("path", [scan, scan_loop])
def test_delta_zero_keeps_the_state(path):
    x, delta, rate, write, read, h = inputs(2, 21, 3, 4)
    y, final = path(x, torch.zeros_like(delta), rate, write, read, h)
    assert torch.equal(final, h)
    torch.testing.assert_close(y, torch.einsum("btn,bnc->btc", read, h))


@pytest.mark.parametrize("path", [scan, scan_loop])
def test_what_is_not_written_does_not_come_out(path):
    x, delta, rate, write, read, h = inputs(2, 21, 3, 4)
    y, final = path(x, delta, rate, torch.zeros_like(write), read, torch.zeros_like(h))
    assert not y.any() and not final.any()


def test_a_layer_that_writes_nothing_is_its_skip():
    layer = layer_of()
    torch.nn.init.zeros_(layer.norm_write.weight)
    x = torch.randn(2, 9, 16)
    inner, gate = layer.w_in(x).chunk(2, -1)
    inner = F.silu(convolve(F.pad(inner, (0, 0, 3, 0)), layer.conv_weight, layer.conv_bias))
    expected = layer.out(layer.skip * inner * F.silu(gate))
    torch.testing.assert_close(layer(x, None, None, 0), expected)
    torch.nn.init.ones_(layer.norm_write.weight)
    assert (layer(x, None, None, 0) - expected).abs().max() > 1e-3


@examples
@given(seed=st.integers(0, 99), scale=st.sampled_from([0.01, 1.0, 30.0]))
def test_negative_rates_bound_the_state(seed, scale):
    """|h_t| <= |h_0| + max |x write| (max delta + 1 / |rate|), however long the text."""
    x, delta, rate, write, read, h = inputs(1, 300, 3, 2, seed)
    delta = delta * scale
    most = (x.unsqueeze(2) * write.unsqueeze(3)).abs().amax(1)                     # (1, n, c)
    bound = h.abs() + most * (delta.amax(1).unsqueeze(1) + 1 / rate.abs())
    for t in (1, 30, 300):
        _, state = scan(x[:, :t], delta[:, :t], rate, write[:, :t], read[:, :t], h)
        assert (state.abs() <= bound + 1e-9).all()
    _, grown = scan(x, delta, -rate * 100, write, read, h)                         # a rate above 0 is not bounded
    assert not (grown.abs() <= bound).all()


def test_the_convolution_is_torchs():
    x, weight, bias = torch.randn(2, 11, 5), torch.randn(3, 5), torch.randn(5)
    expected = F.conv1d(x.mT, weight.T.unsqueeze(1), bias, groups=5).mT
    torch.testing.assert_close(convolve(x, weight, bias), expected)


@examples
@given(t=st.integers(0, 28))
def test_a_layer_is_causal(t):
    layer, x = layer_of(d_conv=3), torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(t))
    other = x.clone()
    other[:, t + 1:] += 1
    a, b = layer(x, None, None, 0), layer(other, None, None, 0)
    assert torch.equal(a[:, :t + 1], b[:, :t + 1])
    assert ((a[:, t + 1:] - b[:, t + 1:]).abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize("n,rank", [(16, 0), (3, 5)])
def test_how_a_layer_starts(n, rank):
    layer = layer_of(d=256, d_state=n, dt_rank=rank)
    rates = -layer.log_rate.exp()
    torch.testing.assert_close(rates, -torch.arange(1.0, n + 1).unsqueeze(1).expand(n, 512))
    delta = F.softplus(layer.w_delta.bias.detach())
    assert 0.001 * (1 - 1e-4) <= delta.min() and delta.max() <= 0.1 * (1 + 1e-4)
    # log-uniform: the share below each quarter of the logarithms
    share = torch.stack([(delta.log10() < -3 + 2 * q).float().mean() for q in (0.25, 0.5, 0.75)])
    torch.testing.assert_close(share, torch.tensor([0.25, 0.5, 0.75]), rtol=0, atol=0.08)
    assert layer.rank == (rank or 16) and (layer.skip == 1).all() and not layer.conv_bias.any()


# ---- the hybrid

def test_where_attention_stands():
    def places(n_layer, every, layers=()):
        return attention_layers(ModelConfig(n_layer=n_layer, attention_every=every, attention_layers=list(layers)))

    assert places(32, 8) == [4, 12, 20, 28] and places(8, 8) == [4] and places(4, 4) == [2]     # 1 : 7, 1 : 3
    assert places(4, 0) == [] and places(4, 1) == [0, 1, 2, 3] and places(6, 2, [5, 0]) == [0, 5]
    model = hybrid_of()
    assert [isinstance(b.attention, Mamba) for b in model.blocks] == [True, True, False, True]
    assert model.sparse == [1, 3] and model.rotary is None


@pytest.mark.parametrize("settings,words", [
    ({"model.attention_every": 9}, "model.attention_every = 9 gives none of the 4 blocks attention"),
    ({"model.attention_layers": "4"}, r"model.attention_layers = \[4\] names a layer outside 0..3"),
    ({"model.mixer": "mambo"}, "model.mixer = \"mambo\" is not one of attention, mamba .did you mean mamba"),
    ({"model.mixer": "attention"}, "model.attention_every = 4 has no effect"),
    ({"model.mixer": "attention", "model.attention_every": 0}, "model.d_state = 3 has no effect")])
def test_refusals(settings, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, BASE | HYBRID | settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 5], [7, 5], [2, 2, 8]], ids=str)
def test_pieces_with_a_cache_are_the_whole(pieces, dtype):
    model, idx = hybrid_of().eval(), batch_of(B=2, T=12)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        full, cache = model(idx).logits, model.new_cache(2)
        parts = torch.cat([model(part, cache=cache).logits for part in idx.split(pieces, 1)], 1)
    if dtype == torch.float32:
        torch.testing.assert_close(parts, full, rtol=1e-4, atol=1e-5)
    else:
        assert (parts.float() - full.float()).norm() < 0.03 * full.float().norm()


def test_text_is_the_same_with_the_cache_past_the_block():
    model = hybrid_of().eval()
    idx = torch.randint(32, (2, 5), generator=torch.Generator().manual_seed(0))
    texts = [torch.stack([step.ids for step in sample.generate(model, idx, 30, generator=sample.seeded(7, 2),
                                                               cache=cache)]) for cache in (True, False)]
    assert torch.equal(*texts) and texts[0].unique().numel() > 10


def test_the_cache_holds_keys_for_the_blocks_with_attention_alone():
    """J3: bytes of keys and values are the share of attention; what Mamba keeps knows no length."""
    def bytes_of(model):
        sizes = [0, 0]
        for block, state in zip(model.blocks, model.new_cache(3).states):
            tensors = state if isinstance(state, tuple) else [state]
            sizes[isinstance(block.attention, Mamba)] += sum(t.numel() * t.element_size() for t in tensors)
        return sizes

    every = GPT(load_config(None, BASE | {"model.n_layer": 4, "model.n_kv_head": 1}))
    keys, states = bytes_of(hybrid_of())
    assert 4 * keys == bytes_of(every)[0]
    assert bytes_of(hybrid_of({"model.block_size": 48})) == [4 * keys, states]
    assert states == 3 * 4 * 3 * (3 * 32 + 3 * 32)      # 3 blocks, float32, 3 sequences: tail (3, 32), state (3, 32)


def test_counts_by_hand():
    d, c, n, r, K = 16, 32, 3, 1, 4
    weights_ = d * 2 * c + c * (r + 2 * n) + r * c + c * d
    small = K * c + c + (r + 2 * n) + c + n * c + c     # convolution, norms, bias of delta, rates, skip
    layer = layer_of(d_state=n)
    assert sum(p.numel() for p in layer.parameters()) == weights_ + small
    assert layer.flops_per_token(8) == layer.flops_per_token(999) == 2 * (weights_ + K * c + c) + 6 * n * c
    hybrid, plain = hybrid_of(), hybrid_of({"model.attention_layers": "0,1,2,3"})
    attention = plain.blocks[0].attention
    more = sum(p.numel() for p in layer.parameters()) - sum(p.numel() for p in attention.parameters())
    assert hybrid.num_params().total - plain.num_params().total == 3 * more
    assert hybrid.flops_per_token(9) - plain.flops_per_token(9) == 3 * (
        layer.flops_per_token(9) - attention.flops_per_token(9))


def test_published_jamba():
    """Jamba v0.1 as released: 51.57B parameters, 12.11B of them active."""
    config = load_config(train.__file__.replace("train.py", "configs/published/jamba.toml"))
    with torch.device("meta"):
        model = GPT(config)
    assert model.num_params() == (51_570_323_328, 12_110_311_296)
    assert attention_layers(config.model) == [4, 12, 20, 28] and model.sparse == list(range(1, 32, 2))


def test_without_rotary_positions_attention_knows_no_order():
    """The last position sees a set; with rope, or with Mamba below, a sequence."""
    idx = batch_of(B=2, T=8)[0]
    other = torch.cat([idx[:, :7].flip(1), idx[:, 7:]], 1)
    one = {"model.n_layer": 1, "model.attention_every": 1, "ffn.kind": "dense", "ffn.moe_every": 0}
    two = {"model.n_layer": 2, "model.attention_every": 2}
    for more, same in (({}, True), ({"model.rope": "true"}, False), (two, False)):
        model = hybrid_of(one | more).eval()
        with torch.no_grad():
            change = (model(idx).logits[:, -1] - model(other).logits[:, -1]).abs().max()
        assert (change < 1e-5) == same and (change < 1e-5 or change > 1e-3)


def test_rates_do_not_decay():
    optimizer = build_optimizer(model := hybrid_of(), model.config.train, torch.device("cpu"))
    decayed = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {name for name, p in model.blocks[0].attention.named_parameters() if id(p) in decayed}
    assert names == {"w_in.weight", "conv_weight", "w_select.weight", "w_delta.weight", "out.weight"}


def test_a_hybrid_resumes_to_the_bit(corpora, tmp_path):                                    # noqa: F811
    more = {key.replace(".", "__"): value for key, value in HYBRID.items()} | dict(train__schedule="constant")
    train_run(corpora, tmp_path / "whole", **more)
    train_run(corpora, tmp_path / "parts", **more, train__max_steps=4)
    assert train.main(["--out", str(tmp_path / "parts"), "--resume", "--quiet", "--train.max_steps", "6"]) == 0
    assert same_tensors(weights(tmp_path / "whole").model, weights(tmp_path / "parts").model)
    assert losses(tmp_path / "whole")[-1] == losses(tmp_path / "parts")[-1]


def test_compiled_in_one_graph():
    """On a CPU the scan is one operator, which a compiler does not unroll."""
    idx, targets, _ = batch_of(B=2, T=12)
    found = []
    for backend in (None, "aot_eager"):
        torch._dynamo.reset()
        model = hybrid_of({"model.n_layer": 2, "model.attention_every": 2, "ffn.kind": "dense", "ffn.moe_every": 0})
        forward = torch.compile(model, fullgraph=True, backend=backend) if backend else model
        out = forward(idx, targets)
        out.loss.backward()
        found.append([out.loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# ---- the corpus `recall`, its probe, the bench

def test_recall_lines_are_dictionaries(tmp_path):
    rows = next(recall.documents("train")).reshape(-1, 128).tolist()
    assert rows == next(recall.documents("train")).reshape(-1, 128).tolist()
    others = next(recall.documents("val")).reshape(-1, 128).tolist()
    assert not {tuple(row) for row in rows} & {tuple(row) for row in others}
    sizes = set()
    for row in rows:
        pairs = set(zip(row[::2], row[1::2]))
        assert len(pairs) == len(dict(pairs))                           # one answer for a letter
        assert all(letter < 24 and (answer - 24) // 9 == letter for letter, answer in pairs)
        sizes.add(len(pairs))
    assert {2, 4, 8} <= sizes and 20 < max(sizes) <= 24
    lines = recall.lines(3, 50, [16])
    assert (recall.known(lines).sum(1) == [64 - len(set(row)) for row in lines[:, ::2].tolist()]).all()
    (folder,) = prepare(["recall"], "bpe", out=tmp_path, max_tokens=5000, quiet=True)
    assert folder.name == "recall-byte"                                 # it brings its tokenizer


@pytest.mark.parametrize("right", [True, False])
def test_recall_probe_against_a_model_that_knows_all_or_nothing(right):
    def oracle(ids):
        """Looks up what a line has told; the wrong one takes the next symbol."""
        logits = torch.zeros(*ids.shape, 256)
        for row, out in zip(ids.tolist(), logits):
            told = dict.fromkeys(row, 0)
            for i in range(0, 128, 2):
                out[i, (told[row[i]] + (not right)) % 256] = 1
                told[row[i]] = row[i + 1]
        return Output(logits, None, None, [])

    config = load_config(None, {"model.block_size": 128})
    row = PROBES["recall"](oracle, [], config, torch.device("cpu"), "float32")
    assert row == {f"recall_{n}": float(right) for n in recall.SIZES}
    assert PROBES["recall"](oracle, [], load_config(None, {"model.block_size": 127}), None, "float32") == {}


def test_bench_rows(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "LIMITS", {"quick": (math.inf, math.inf)})
    monkeypatch.setattr(measure, "EMULATED", math.inf)
    monkeypatch.setattr(bench, "find_machine", lambda *a, **k: measure.find_machine("cpu", 0, 1, size=64, copy_mib=1))
    monkeypatch.setattr(bench, "SCAN_SHAPES", {"cpu": [bench_mamba.ScanShape(2, 9, 4, 3)]})
    small = {"model.n_layer": 2, "model.n_embd": 16, "model.block_size": 16, "train.batch_size": 2, "ffn.d_ff": 8,
             "ffn.d_dense": 16, "ffn.moe_every": 1}
    monkeypatch.setattr(bench, "JAMBA", {"attention": {"model.mixer": "attention"} | small,
                                         "hybrid": {"model.attention_every": 2} | small})
    assert bench.main(["mamba", "--shapes", "quick", "--device", "cpu", "--json", str(tmp_path / "rows.json")]) == 0
    text = (tmp_path / "rows.json").read_text()
    assert all(f'"path": "{path}"' in text for path in ("loop", "scan", "attention", "hybrid"))
    assert "times the loop's speed" in capsys.readouterr().out


def test_bench_refuses_a_wrong_scan(monkeypatch):
    monkeypatch.setattr(bench_mamba.mamba, "scan", lambda *tensors: [t * 1.001 for t in scan(*tensors)])
    machine = measure.find_machine("cpu", 0, 1, size=64, copy_mib=1)
    (table,) = bench_mamba.bench_scans(machine, [bench_mamba.ScanShape(1, 5, 4, 3)])
    with pytest.raises(measure.BenchError, match="path scan is wrong: its y"):
        table.rows()
