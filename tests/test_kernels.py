"""kernels/: each kernel and each twin against float64 autograd of the defining formula.

On a GPU the kernels run there. Without one they run in Triton's interpreter: conftest.py sets
TRITON_INTERPRET=1 before any test file is imported, hence before triton can be, and every call here says
`kernel=True` or `False`, so that nothing depends on the rule or on what else a test session has imported.
The interpreter rounds to bfloat16 by cutting bits off, hence the bfloat16 tolerance, and its tl.dot takes
bfloat16 for integers, hence one skip. Any NumPy will do: the one thing that Triton 3.6's interpreter needs
NumPy < 2.3 for, a `for` with a bound read from memory, the kernels do not use (3.6.0 and 3.7.1 ran with
NumPy 2.4.6).
"""
import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from kernels import common, peer as kernels_peer
from kernels.moe import gated_activation, gated_activation_backward, permute, unpermute
from kernels.peer import peer_backward_table, peer_backward_tokens, peer_forward
from kernels.product_keys import product_key_topk
from peer import cartesian_candidates

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RUNS = common.HAS_TRITON and (CUDA or common.INTERPRETED)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
needs_kernel = pytest.mark.skipif(not RUNS, reason="needs triton, and a GPU or TRITON_INTERPRET=1")
kernel_or_twin = pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernel), False])
either_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
examples = settings(max_examples=12, deadline=None, derandomize=True)


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(actual, exact, dtype=torch.float32):
    """Relative error in the norm, 0.1 added to it: a single dot product may cancel to almost nothing."""
    assert actual.shape == exact.shape
    error = (actual.double() - exact).norm() / (exact.norm() + 0.1)
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


def exact(*tensors):
    """float64 copies that autograd follows."""
    return [t.detach().double().requires_grad_() for t in tensors]


def expert_order(T, k, n_expert, seed):
    """order and inverse of T*k pairs; n_expert = 1: all tokens choose one expert."""
    experts = torch.randint(0, n_expert, (T * k,), generator=torch.Generator().manual_seed(seed))
    order = experts.argsort(stable=True).to(DEVICE)
    return order, torch.empty_like(order).scatter_(0, order, torch.arange(T * k, device=DEVICE))


# ---- the permute path ----

@kernel_or_twin
@either_dtype
@examples
@given(T=st.integers(0, 19), k=st.integers(1, 4), d=st.sampled_from([1, 8, 24, 300]),
       n_expert=st.integers(1, 9))
def test_permute_and_unpermute_are_each_others_gradient(kernel, dtype, T, k, d, n_expert):
    order, inverse = expert_order(T, k, n_expert, seed=T)
    x, g = randn(T, d, dtype=dtype), randn(T * k, d, dtype=dtype)
    (x64,) = exact(x)
    rows = x64.index_select(0, order // k)
    rows.backward(g.double())
    assert torch.equal(permute(x, order, k, kernel), rows.to(dtype))
    close(unpermute(g, inverse, k, kernel), x64.grad, dtype)

    (g64,) = exact(g)
    total = g64.index_select(0, inverse).view(T, k, d).sum(1)
    total.backward(x.double())
    close(unpermute(g, inverse, k, kernel), total, dtype)
    assert torch.equal(permute(x, order, k, kernel), g64.grad.to(dtype))


@needs_kernel
def test_permute_takes_int32_and_strided_rows():
    order, inverse = expert_order(6, 2, 3, seed=0)
    x, y = randn(6, 20)[:, ::2], randn(1, 10).expand(12, 10)
    assert torch.equal(permute(x, order.int(), 2, True), permute(x, order, 2, False))
    close(unpermute(y, inverse.int(), 2, True), 2.0 * y[:6].double())


NAIVE = {"swiglu": lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1], "gelu": F.gelu, "silu": F.silu,
         "relu": F.relu, "relu2": lambda h: F.relu(h) ** 2}


@kernel_or_twin
@either_dtype
@pytest.mark.parametrize("activation", NAIVE)
@pytest.mark.parametrize("P, n", [(0, 5), (1, 8), (13, 21), (9, 300)])
def test_gated_activation(kernel, dtype, activation, P, n):
    h, weight = randn(P, 2 * n if activation == "swiglu" else n, dtype=dtype), randn(P).sigmoid()
    da = randn(P, n, dtype=dtype, seed=1)
    h64, weight64 = exact(h, weight)
    a = NAIVE[activation](h64) * weight64[:, None]
    a.backward(da.double())
    close(gated_activation(h, weight, activation, kernel), a, dtype)
    dh, dweight, again = gated_activation_backward(da.clone(), h, weight, activation, kernel)
    assert dh.dtype == again.dtype == dtype and dweight.dtype == torch.float32
    close(again, a, dtype)
    close(dh, h64.grad, dtype)
    close(dweight, weight64.grad, dtype)


def test_gated_twin_cuts_rows_into_blocks_and_is_exact_in_float64():
    h, weight, da = (t.double() for t in (randn(700, 1000), randn(700), randn(700, 500)))   # 524 rows a block
    h64, weight64 = exact(h, weight)
    (NAIVE["swiglu"](h64) * weight64[:, None]).backward(da)
    dh, dweight, a = gated_activation_backward(da, h, weight, "swiglu")
    torch.testing.assert_close(dh, h64.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dweight, weight64.grad, rtol=1e-12, atol=1e-12)
    assert a.data_ptr() == da.data_ptr()


# ---- PEER ----

def peer_problem(T, R, d, N, skew=1, dtype=torch.float32):
    """x, dy, W, idx, s; idx leans to the first experts with growing `skew`, and is 0 for skew = inf."""
    draw = torch.rand(T, R, generator=torch.Generator().manual_seed(T * R))
    idx = (draw ** skew * N).int().clamp_max(N - 1).to(DEVICE)
    W = randn(N, 2, d, dtype=dtype) * d ** -0.5
    return randn(T, d, dtype=dtype), randn(T, d, dtype=dtype, seed=1), W, idx, randn(T, R, seed=2).sigmoid()


def peer_exact(x, dy, W, idx, s, activation):
    """y, h, dx, ds, dW of the definition, float64."""
    x, W, s = exact(x, W, s)
    u, v = W.index_select(0, idx.flatten()).view(*idx.shape, *W.shape[1:]).unbind(2)
    h = torch.einsum("td,trd->tr", x, u)
    y = torch.einsum("tr,trd->td", NAIVE[activation](h) * s, v)
    y.backward(dy.double())
    return y.detach(), h.detach(), x.grad, s.grad, W.grad


def peer_check(kernel, dtype, activation, problem, share=256):
    x, dy, W, idx, s = problem
    y, h, dx, ds, dW = peer_exact(*problem, activation)
    y_, h_ = peer_forward(x, W, idx, s, activation, kernel)
    assert y_.dtype == dtype and h_.dtype == torch.float32
    dx_, dh_, a_, ds_ = peer_backward_tokens(dy, W, idx, s, h_, activation, kernel)
    dW_ = peer_backward_table(x, dy, dh_, a_, idx, len(W), kernel=kernel, share=share)
    for actual, wanted in ((y_, y), (dx_, dx)):
        close(actual, wanted, dtype)
    for actual, wanted in ((h_, h), (ds_, ds), (a_, NAIVE[activation](h) * s), (dW_, dW)):
        close(actual, wanted)                                                 # these stay float32


@kernel_or_twin
@either_dtype
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", "relu2"])
def test_peer(kernel, dtype, activation):
    peer_check(kernel, dtype, activation, peer_problem(5, 11, 40, 37, dtype=dtype))


@kernel_or_twin
@examples
@given(T=st.integers(0, 6), R=st.sampled_from([1, 8, 13]), d=st.sampled_from([1, 16, 24, 65]),
       N=st.sampled_from([1, 7, 30]), skew=st.sampled_from([1, 3, float("inf")]), share=st.integers(1, 9))
def test_peer_over_shapes(kernel, T, R, d, N, skew, share):
    peer_check(kernel, torch.float32, "gelu", peer_problem(T, R, d, N, skew), share)


@kernel_or_twin
def test_peer_rows_wider_than_1024(kernel):
    peer_check(kernel, torch.float32, "gelu", peer_problem(2, 9, 1100, 6))


@needs_kernel
@settings(max_examples=25, deadline=None, derandomize=True)
@given(counts=st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 5, 9, 14]), min_size=1, max_size=8),
       share=st.integers(1, 5))
def test_each_pair_counts_once_however_experts_lie_across_windows(counts, share):
    """Token t sends t + 1 to its expert: integers, so that a pair dropped or taken twice changes the sum."""
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(DEVICE)
    x = torch.arange(1.0, len(expert) + 1, device=DEVICE)[:, None].expand(-1, 3)
    one = torch.ones_like(x[:, :1])
    dW = peer_backward_table(x, 2 * x, one, one, expert[:, None], len(counts), kernel=True, share=share)
    wanted = x.new_zeros(len(counts), 3).index_add_(0, expert, x)
    assert torch.equal(dW, torch.stack([wanted, 2 * wanted], 1))


@kernel_or_twin
def test_table_gradient_overwrites_or_accumulates(kernel):
    x, dy, W, idx, s = peer_problem(6, 8, 24, 50, skew=3)
    dh, a, empty = randn(6, 8), randn(6, 8, seed=1), torch.bincount(idx.flatten().cpu(), minlength=50) == 0
    assert empty.any()
    fresh = peer_backward_table(x, dy, dh, a, idx, 50, kernel=kernel, share=4)
    kept = torch.full_like(W, float("nan"))
    assert peer_backward_table(x, dy, dh, a, idx, 50, out=kept, kernel=kernel, share=4) is kept
    assert torch.equal(kept, fresh) and not kept[empty.to(DEVICE)].any()
    peer_backward_table(x, dy, dh, a, idx, 50, out=kept, accumulate=True, kernel=kernel, share=4)
    close(kept, 2 * fresh.double())
    with pytest.raises(ValueError, match="not contiguous"):
        peer_backward_table(x, dy, dh, a, idx, 50, out=kept.transpose(1, 2), kernel=kernel)
    narrow = torch.empty_like(W, dtype=torch.bfloat16)
    peer_backward_table(x, dy, dh, a, idx, 50, out=narrow, kernel=kernel)
    close(narrow, fresh.double(), torch.bfloat16)


@needs_kernel
def test_float32_table_takes_bfloat16_tokens():
    x, dy, W, idx, s = peer_problem(3, 8, 24, 10)
    peer_check(True, torch.bfloat16, "gelu", (x.bfloat16(), dy.bfloat16(), W, idx, s))


# ---- product keys ----

@needs_kernel
@pytest.mark.parametrize("T, heads, n, d, k", [(5, 2, 100, 20, 16), (1, 1, 300, 40, 5), (66, 1, 16, 16, 16),
                                               (3, 1, 9, 3, 1)])
@pytest.mark.parametrize("tied", [False, True])
def test_product_key_topk_is_exact_with_ties_to_the_lower_index(T, heads, n, d, k, tied):
    """Integers, so that any order of summation gives the same scores; `tied`: so small that most are
    equal."""
    high = 2 if tied else 1000
    q, keys = (randn(*shape).mul(high / 2).round() for shape in ((T, heads, 2, d), (2, n, d)))
    keys[:, n // 2:] = keys[:, :n - n // 2] if tied else keys[:, n // 2:]                   # duplicated keys
    scores, indices = product_key_topk(q, keys, k, kernel=True)
    wanted, order = torch.einsum("thsd,snd->thsn", q, keys).sort(dim=-1, descending=True, stable=True)
    assert torch.equal(scores, wanted[..., :k]) and torch.equal(indices.long(), order[..., :k])


@kernel_or_twin
@either_dtype
def test_product_key_topk_equals_torch_topk(kernel, dtype):
    if kernel and dtype == torch.bfloat16 and common.INTERPRETED:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16")
    q, keys = randn(4, 3, 2, 24, dtype=dtype), randn(2, 150, 24, dtype=dtype)
    scores, indices = product_key_topk(q, keys, 8, kernel)
    wanted, order = torch.einsum("thsd,snd->thsn", q.double(), keys.double()).topk(8)
    close(scores, wanted)
    assert indices.dtype == torch.int32 and torch.equal(indices.long(), order)


@needs_kernel
def test_product_key_topk_of_nan_gives_indices_in_range():
    q = randn(2, 1, 2, 16)
    q[0] = float("nan")
    _, indices = product_key_topk(q, randn(2, 20, 16), 4, kernel=True)
    assert indices.min() >= 0 and indices.max() < 20


@pytest.mark.parametrize("k", [1, 2, 3, 8, 16, 31])
@pytest.mark.parametrize("values", ["tied", "rounded"])
def test_cartesian_candidates_lose_no_value_of_the_top_k(k, values):
    i, j = cartesian_candidates(k)
    assert len(i) == sum(k // r for r in range(1, k + 1)) and (k != 16 or len(i) == 50)
    a, b = randn(200, k), randn(200, k, seed=1)
    a, b = (a.round(), b.round()) if values == "tied" else (a, b * 1e6)       # where a is mostly rounded away
    a, b = (t.sort(descending=True).values for t in (a, b))
    brute = (a[:, :, None] + b[:, None, :]).flatten(1).topk(k).values
    assert torch.equal((a[:, i] + b[:, j]).topk(k).values, brute)


def test_too_many_sub_keys_asked_for():
    with pytest.raises(ValueError, match="top-5 of 4 sub-keys"):
        product_key_topk(randn(1, 1, 2, 8), randn(2, 4, 8), 5)


# ---- who runs what ----

def test_the_rule(monkeypatch):
    x = torch.ones(2, 2)
    for interpreted in (False, True):
        monkeypatch.setattr(common, "INTERPRETED", interpreted)
        assert common.use_triton(x) == (common.HAS_TRITON and interpreted)
        assert not common.use_triton(x.double())
    monkeypatch.setattr(common, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match="float32 on cpu|not installed"):
        permute(x, torch.arange(2), 1, kernel=True)


@needs_kernel
def test_a_kernel_refuses_to_lose_a_gradient():
    x, order = randn(4, 8).requires_grad_(), torch.arange(4, device=DEVICE)
    with pytest.raises(RuntimeError, match="no autograd"):
        permute(x, order, 1, kernel=True)
    with torch.no_grad():
        permute(x, order, 1, kernel=True)


def test_without_triton(monkeypatch):
    """The files import, the twins run, and a kernel that is asked for says what is missing."""
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.split(".")[0] == "kernels"]:
        monkeypatch.delitem(sys.modules, name)                          # so that it is imported anew
    module = importlib.import_module("kernels.peer")
    assert module.choose.__globals__["HAS_TRITON"] is False
    x, dy, W, idx, s = (t.cpu() for t in peer_problem(2, 3, 8, 5))
    y, _ = module.peer_forward(x, W, idx, s, "gelu")
    torch.testing.assert_close(y, peer_forward(x, W, idx, s, "gelu", kernel=False)[0])
    with pytest.raises(RuntimeError, match="triton is not installed"):
        module.peer_forward(x, W, idx, s, "gelu", kernel=True)


def test_one_graph_under_compile():
    """Kernels on a GPU, twins on a CPU: no graph break, the same numbers."""
    def path(x, order, inverse, weight, da):
        h = permute(x, order, 2, CUDA)
        dh, dweight, a = gated_activation_backward(da.clone(), h, weight, "swiglu", CUDA)
        return unpermute(dh, inverse, 2, CUDA), dweight, a - gated_activation(h, weight, "swiglu", CUDA)

    order, inverse = expert_order(8, 2, 3, seed=0)
    args = randn(8, 32), order, inverse, randn(16).sigmoid(), randn(16, 16)
    compiled = torch.compile(path, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    for actual, wanted in zip(compiled(*args), path(*args)):
        torch.testing.assert_close(actual, wanted)
