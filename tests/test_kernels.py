"""kernels/: each kernel and each twin against float64 autograd of the defining formula.

On a GPU the kernels run there. Without one they run in Triton's interpreter: conftest.py sets
TRITON_INTERPRET=1 before any test file is imported, hence before triton can be, and every call here
says `kernel=True` or `False`, so that nothing depends on the rule or on what else a test session
has imported. The interpreter rounds to bfloat16 by cutting bits off, hence the bfloat16 tolerance,
and its tl.dot takes bfloat16 for integers, hence one skip. Any NumPy will do: the one thing that
Triton 3.6's interpreter needs NumPy < 2.3 for, a `for` with a bound read from memory, the kernels
do not use (3.6.0 and 3.7.1 ran with NumPy 2.4.6).
"""
import importlib
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from kernels import common, moe, parts, peer as kernels_peer, product_keys
from kernels.common import tl
from kernels.moe import (gated_activation, gated_activation_backward, invert, permute,
                         unpermute)
from kernels.peer import peer_backward_table, peer_backward_tokens, peer_forward
from kernels.product_keys import RetrieveFused, product_key_experts, sub_key_gradient
from ffn import Context
from model import GPT, load_config
from peer import cartesian_candidates, retrieve, topk_readable

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RUNS = common.HAS_TRITON and (CUDA or common.INTERPRETED)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
needs_kernel = pytest.mark.skipif(not RUNS, reason="needs triton, and a GPU or TRITON_INTERPRET=1")
kernel_or_twin = pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernel), False])
either_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16],
                                       ids=["fp32", "bf16"])
examples = settings(max_examples=12, deadline=None, derandomize=True)


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + 7919 * len(shape) + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def close(actual, exact, dtype=torch.float32):
    """Relative error in the norm. 0.1 is added to it, because one dot product may cancel."""
    assert actual.shape == exact.shape
    error = (actual.double() - exact).norm() / (exact.norm() + 0.1)
    assert error <= TOLERANCE[dtype], f"relative error {error:.2e}"


def exact(*tensors):
    """float64 copies that autograd follows."""
    return [t.detach().double().requires_grad_() for t in tensors]


def expert_order(N, k, n_expert, seed):
    """order and inverse of N k pairs; n_expert = 1: all tokens choose one expert."""
    experts = torch.randint(0, n_expert, (N * k,), generator=torch.Generator().manual_seed(seed))
    order = experts.argsort(stable=True).to(DEVICE)
    return order, torch.empty_like(order).scatter_(0, order, torch.arange(N * k, device=DEVICE))


@kernel_or_twin
@pytest.mark.parametrize("P", [0, 1, 1023, 2500])
def test_invert_is_the_inverse(kernel, P):
    order = torch.randperm(P, generator=torch.Generator().manual_seed(P)).to(DEVICE)
    short, inverse = invert(order, kernel)
    assert short.dtype == inverse.dtype == torch.int32 and torch.equal(short.long(), order)
    assert torch.equal(inverse.long(), order.argsort())


# ---- the permute path ----

@kernel_or_twin
@either_dtype
@examples
@given(N=st.integers(0, 19), k=st.integers(1, 4), d=st.sampled_from([1, 8, 24, 300]),
       n_expert=st.integers(1, 9))
def test_permute_and_unpermute_are_each_others_gradient(kernel, dtype, N, k, d, n_expert):
    order, inverse = expert_order(N, k, n_expert, seed=N)
    x = randn(N, d, dtype=dtype)
    g = randn(N * k, d, dtype=dtype)
    (x64,) = exact(x)
    rows = x64.index_select(0, order // k)
    rows.backward(g.double())
    assert torch.equal(permute(x, order, k, kernel), rows.to(dtype))
    close(unpermute(g, inverse, k, kernel), x64.grad, dtype)

    (g64,) = exact(g)
    total = g64.index_select(0, inverse).view(N, k, d).sum(1)
    total.backward(x.double())
    close(unpermute(g, inverse, k, kernel), total, dtype)
    assert torch.equal(permute(x, order, k, kernel), g64.grad.to(dtype))


@needs_kernel
def test_permute_takes_int32_and_strided_rows():
    order, inverse = expert_order(6, 2, 3, seed=0)
    x = randn(6, 20)[:, ::2]
    y = randn(1, 10).expand(12, 10)
    assert torch.equal(permute(x, order.int(), 2, True), permute(x, order, 2, False))
    close(unpermute(y, inverse.int(), 2, True), 2.0 * y[:6].double())


def swiglu(h):
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


NAIVE = {"swiglu": swiglu, "gelu": F.gelu, "silu": F.silu, "relu": F.relu,
         "relu2": lambda h: F.relu(h) ** 2}


@kernel_or_twin
@either_dtype
@pytest.mark.parametrize("activation", NAIVE)
@pytest.mark.parametrize("P, w", [(0, 5), (1, 8), (13, 21), (9, 300)])
def test_gated_activation(kernel, dtype, activation, P, w):
    h = randn(P, 2 * w if activation == "swiglu" else w, dtype=dtype)
    weight = randn(P).sigmoid()
    da = randn(P, w, dtype=dtype, seed=1)
    h64, weight64 = exact(h, weight)
    a = NAIVE[activation](h64) * weight64[:, None]
    a.backward(da.double())
    close(gated_activation(h, weight, activation, kernel), a, dtype)
    dh, d_weight, again = gated_activation_backward(da.clone(), h, weight, activation, kernel)
    assert dh.dtype == again.dtype == dtype and d_weight.dtype == torch.float32
    close(again, a, dtype)
    close(dh, h64.grad, dtype)
    close(d_weight, weight64.grad, dtype)


def test_gated_twin_cuts_rows_into_blocks_and_is_exact_in_float64():
    """524 rows a block."""
    h, weight, da = (t.double() for t in (randn(700, 1000), randn(700), randn(700, 500)))
    h64, weight64 = exact(h, weight)
    (NAIVE["swiglu"](h64) * weight64[:, None]).backward(da)
    dh, d_weight, a = gated_activation_backward(da, h, weight, "swiglu")
    torch.testing.assert_close(dh, h64.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(d_weight, weight64.grad, rtol=1e-12, atol=1e-12)
    assert a.data_ptr() == da.data_ptr()


def test_no_table_takes_swiglu_for_an_elementwise_function():
    """It needs two halves of a row; silu alone under its name would be a silent error."""
    assert set(common.ACTIVATIONS) == set(common.ACTIVATION_GRADS) == set(NAIVE) - {"swiglu"}


# ---- PEER ----

def peer_problem(N, R, d, E, skew=1, dtype=torch.float32):
    """x, dy, table, idx, gate; idx leans to the first experts with growing `skew`, and is 0 for
    skew = inf."""
    draw = torch.rand(N, R, generator=torch.Generator().manual_seed(N * R))
    idx = (draw ** skew * E).int().clamp_max(E - 1).to(DEVICE)
    table = randn(E, 2, d, dtype=dtype) * d ** -0.5
    x = randn(N, d, dtype=dtype)
    dy = randn(N, d, dtype=dtype, seed=1)
    return x, dy, table, idx, randn(N, R, seed=2).sigmoid()


def peer_exact(x, dy, table, idx, gate, activation):
    """y, h, dx, d_gate, d_table of the definition, float64."""
    x, table, gate = exact(x, table, gate)
    rows = table.index_select(0, idx.flatten()).view(*idx.shape, *table.shape[1:])
    u, v = rows.unbind(2)
    h = torch.einsum("nd,nrd->nr", x, u)
    y = torch.einsum("nr,nrd->nd", NAIVE[activation](h) * gate, v)
    y.backward(dy.double())
    return y.detach(), h.detach(), x.grad, gate.grad, table.grad


def peer_check(kernel, dtype, activation, problem, share=256):
    x, dy, table, idx, gate = problem
    y, h, dx, d_gate, d_table = peer_exact(*problem, activation)
    y_, h_ = peer_forward(x, table, idx, gate, activation, kernel)
    assert y_.dtype == dtype and h_.dtype == torch.float32
    dx_, dh_, a_, d_gate_ = peer_backward_tokens(dy, table, idx, gate, h_, activation, kernel)
    d_table_ = peer_backward_table(x, dy, dh_, a_, idx, len(table), kernel=kernel, share=share)
    close(y_, y, dtype)
    close(dx_, dx, dtype)
    # These stay float32.
    close(h_, h)
    close(d_gate_, d_gate)
    close(a_, NAIVE[activation](h) * gate.double())
    close(d_table_, d_table)


@kernel_or_twin
@either_dtype
@pytest.mark.parametrize("activation", ["gelu", "silu", "relu", "relu2"])
def test_peer(kernel, dtype, activation):
    peer_check(kernel, dtype, activation, peer_problem(5, 11, 40, 37, dtype=dtype))


@kernel_or_twin
@examples
@given(N=st.integers(0, 6), R=st.sampled_from([1, 8, 13]), d=st.sampled_from([1, 16, 24, 65]),
       E=st.sampled_from([1, 7, 30]), skew=st.sampled_from([1, 3, float("inf")]),
       share=st.integers(1, 9))
def test_peer_over_shapes(kernel, N, R, d, E, skew, share):
    peer_check(kernel, torch.float32, "gelu", peer_problem(N, R, d, E, skew), share)


@kernel_or_twin
def test_peer_rows_wider_than_1024(kernel):
    peer_check(kernel, torch.float32, "gelu", peer_problem(2, 9, 1100, 6))


@pytest.mark.parametrize("d, itemsize, by_token, by_expert", [
    (1, 2, ((8, 1), 1), ((2, 1), 1)),
    (256, 2, ((8, 256), 1), ((2, 256), 1)),
    (512, 2, ((8, 512), 2), ((2, 512), 1)),
    (256, 4, ((8, 256), 2), ((2, 256), 1)),
    (768, 2, ((8, 1024), 4), ((2, 1024), 1)),
    (512, 4, ((8, 512), 4), ((2, 512), 1)),
    (1100, 4, ((2, 2048), 4), ((2, 2048), 4)),
    (5000, 4, ((1, 8192), 4), ((1, 8192), 4))])
def test_launch_shape(d, itemsize, by_token, by_expert):
    """One warp for 512 bytes of a row, or for 2 KiB; never more than 16 KiB but for one row."""
    assert kernels_peer.launch_shape(d, itemsize, *kernels_peer.BY_TOKEN) == by_token
    assert kernels_peer.launch_shape(d, itemsize, *kernels_peer.BY_EXPERT) == by_expert


@needs_kernel
@settings(max_examples=25, deadline=None, derandomize=True)
@given(counts=st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 5, 9, 14]), min_size=1, max_size=8),
       share=st.integers(1, 5))
def test_each_pair_counts_once_however_experts_lie_across_windows(counts, share):
    """Token t sends t + 1 to its expert: integers, so that a pair dropped or taken twice changes
    the sum."""
    expert = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(DEVICE)
    x = torch.arange(1.0, len(expert) + 1, device=DEVICE)[:, None].expand(-1, 3)
    one = torch.ones_like(x[:, :1])
    d_table = peer_backward_table(x, 2 * x, one, one, expert[:, None], len(counts), kernel=True,
                                  share=share)
    wanted = x.new_zeros(len(counts), 3).index_add_(0, expert, x)
    assert torch.equal(d_table, torch.stack([wanted, 2 * wanted], 1))


@kernel_or_twin
def test_table_gradient_overwrites_or_accumulates(kernel):
    x, dy, table, idx, gate = peer_problem(6, 8, 24, 50, skew=3)
    dh, a = randn(6, 8), randn(6, 8, seed=1)
    empty = torch.bincount(idx.flatten().cpu(), minlength=50) == 0
    assert empty.any()
    fresh = peer_backward_table(x, dy, dh, a, idx, 50, kernel=kernel, share=4)
    kept = torch.full_like(table, float("nan"))
    assert peer_backward_table(x, dy, dh, a, idx, 50, out=kept, kernel=kernel, share=4) is kept
    # The twin's index_add_ is atomic on CUDA: there two runs differ in the last bits.
    if kernel or not CUDA:
        assert torch.equal(kept, fresh)
    close(kept, fresh.double())
    assert not kept[empty.to(DEVICE)].any()
    peer_backward_table(x, dy, dh, a, idx, 50, out=kept, accumulate=True, kernel=kernel, share=4)
    close(kept, 2 * fresh.double())
    with pytest.raises(ValueError, match="not contiguous"):
        peer_backward_table(x, dy, dh, a, idx, 50, out=kept.transpose(1, 2), kernel=kernel)
    narrow = torch.empty_like(table, dtype=torch.bfloat16)
    peer_backward_table(x, dy, dh, a, idx, 50, out=narrow, kernel=kernel)
    close(narrow, fresh.double(), torch.bfloat16)


@needs_kernel
def test_float32_table_takes_bfloat16_tokens():
    x, dy, table, idx, gate = peer_problem(3, 8, 24, 10)
    peer_check(True, torch.bfloat16, "gelu", (x.bfloat16(), dy.bfloat16(), table, idx, gate))


# ---- product keys ----

@needs_kernel
@pytest.mark.parametrize("N, h, m, c, k", [(5, 2, 100, 20, 16), (1, 1, 300, 40, 5),
                                           (66, 1, 16, 16, 16), (3, 1, 9, 3, 1), (2, 1, 200, 4, 70),
                                           (1, 2, 64, 5, 64)])
@pytest.mark.parametrize("tied", [False, True])
def test_product_keys_are_exact_with_ties_as_stated(N, h, m, c, k, tied):
    """Integers, so that any order of summation gives the same scores; `tied`: so small that most
    are equal, and the second half of the sub-keys repeats the first."""
    high = 2 if tied else 1000
    q = randn(N, h, 2, c).mul(high / 2).round()
    sub_keys = randn(2, m, c).mul(high / 2).round()
    if tied:
        sub_keys[:, m // 2:] = sub_keys[:, :m - m // 2]
    keys_check(q, sub_keys, k)


def keys_check(q, sub_keys, k):
    """The kernel's scores and experts are those of stable sorts: of the sub-keys of each half, then
    of the sums, those of the best first sub-key first."""
    scores, experts = product_key_experts(q, sub_keys, k, kernel=True)
    every = torch.einsum("nhpc,pmc->nhpm", q, sub_keys)
    best, order = (t[..., :k] for t in every.sort(dim=-1, descending=True, stable=True))
    (a, b), (i, j) = best.unbind(2), order.unbind(2)
    sums = (a.unsqueeze(3) + b.unsqueeze(2)).flatten(2)
    wanted, at = (t[..., :k] for t in sums.sort(dim=-1, descending=True, stable=True))
    numbers = (i.unsqueeze(3) * sub_keys.shape[1] + j.unsqueeze(2)).flatten(2)
    assert torch.equal(scores, wanted)
    assert torch.equal(experts.long(), numbers.gather(2, at))


@needs_kernel
@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("order", ["ascending", "descending", "equal", "stairs"])
def test_product_keys_take_in_what_beats_the_kth(order, k):
    """Scores in the worst and the best order, all equal, and equal in threes across tiles of 64."""
    m = 150
    n = torch.arange(float(m))
    column = dict(ascending=n, descending=-n, equal=0 * n, stairs=-(n % 50))[order]
    keys_check(torch.ones(2, 1, 2, 1, device=DEVICE), column[:, None].expand(2, m, 1).to(DEVICE), k)


@kernel_or_twin
@either_dtype
def test_product_keys_equal_brute_force(kernel, dtype):
    """Against the scores of all m^2 experts."""
    if kernel and dtype == torch.bfloat16 and common.INTERPRETED:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16")
    q = randn(4, 3, 2, 24, dtype=dtype)
    sub_keys = randn(2, 70, 24, dtype=dtype)
    scores, experts = product_key_experts(q, sub_keys, 8, kernel)
    a, b = torch.einsum("nhpc,pmc->nhpm", q.double(), sub_keys.double()).unbind(2)
    wanted, order = (a.unsqueeze(3) + b.unsqueeze(2)).flatten(2).topk(8)
    close(scores, wanted)
    assert experts.dtype == torch.int32 and torch.equal(experts.long(), order)


@needs_kernel
def test_product_keys_of_nan_give_experts_in_range():
    """A score that is NaN is never taken; ranks without a score are -inf at expert 0."""
    q = randn(2, 1, 2, 16)
    q[0] = float("nan")
    sub_keys = randn(2, 70, 16)
    kept = torch.tensor([5, 66], device=DEVICE)
    holes = torch.full_like(sub_keys, float("nan"))
    holes[:, kept] = sub_keys[:, kept]
    for keys in (sub_keys, holes):
        scores, experts = product_key_experts(q, keys, 6, kernel=True)
        assert (scores[0] == float("-inf")).all() and not experts[0].any()
    # two sub-keys of each half are left, which make four experts
    a, b = torch.einsum("hpc,pmc->hpm", q[1], sub_keys[:, kept]).unbind(1)
    wanted, order = (a.unsqueeze(2) + b.unsqueeze(1)).flatten(1).sort(descending=True)
    numbers = (kept[:, None] * 70 + kept).flatten()
    torch.testing.assert_close(scores[1, :, :4], wanted)
    assert torch.equal(experts[1, :, :4].long(), numbers[order])
    assert (scores[1, :, 4:] == float("-inf")).all() and not experts[1, :, 4:].any()


@needs_kernel
@examples
@given(N=st.integers(1, 5), h=st.integers(1, 2), m=st.integers(1, 9), c=st.integers(1, 5),
       k=st.integers(1, 9), seed=st.integers(0, 99))
def test_retrieval_in_one_launch_equals_retrieve(N, h, m, c, k, seed):
    """Scores, experts and both gradients, against peer.retrieve in float64."""
    k = min(k, m)
    q, sub_keys = randn(N, h, 2, c, seed=seed), randn(2, m, c, seed=seed)
    d_scores = randn(N, h, k, seed=seed)
    leaves, leaves64 = [t.clone().requires_grad_() for t in (q, sub_keys)], exact(q, sub_keys)
    scores, experts = RetrieveFused.apply(*leaves, k)
    candidates = torch.stack(cartesian_candidates(k)).to(DEVICE)
    wanted, chosen = retrieve(*leaves64, k, candidates, topk_readable)
    close(scores, wanted)
    assert torch.equal(experts, chosen)
    scores.backward(d_scores)
    wanted.backward(d_scores.double())
    for ours, theirs in zip(leaves, leaves64):
        close(ours.grad, theirs.grad)


@kernel_or_twin
@either_dtype
@examples
@given(N=st.integers(0, 9), h=st.integers(1, 3), m=st.sampled_from([4, 9, 40]),
       c=st.sampled_from([1, 5, 16, 40]), k=st.integers(1, 4),
       skew=st.sampled_from([0.0, 0.2, 1e9]), share=st.integers(1, 9))
def test_sub_key_gradient(kernel, dtype, N, h, m, c, k, skew, share):
    """Evenly chosen sub-keys, mostly the first ones, and always the same ones, against autograd of
    the scores."""
    q = randn(N, h, 2, c, dtype=dtype)
    lean = skew * torch.arange(float(m), device=DEVICE)
    indices = (randn(N, h, 2, m, seed=1) - lean).topk(k).indices.int()
    d_scores = randn(N, h, 2, k, seed=2)
    q64, sub_keys = exact(q, torch.zeros(2, m, c, device=DEVICE))
    every = torch.einsum("nhpc,pmc->nhpm", q64, sub_keys)
    every.gather(-1, indices.long()).backward(d_scores.double())
    d_sub_keys = sub_key_gradient(q, d_scores, indices, m, kernel, share)
    assert d_sub_keys.dtype == torch.float32
    close(d_sub_keys, sub_keys.grad)


@needs_kernel
def test_sub_key_gradient_takes_strided_halves_and_repeats_itself():
    q = randn(2, 6, 3, 8).permute(1, 2, 0, 3)                               # (N, h, 2, c)
    indices = randn(6, 3, 2, 30).topk(4).indices.int()
    d_scores = randn(1, 1, 1, 1).expand(6, 3, 2, 4)
    first, again = (sub_key_gradient(q, d_scores, indices, 30, kernel=True, share=3)
                    for _ in range(2))
    assert torch.equal(first, again)
    close(first, sub_key_gradient(q.double(), d_scores.double(), indices, 30, kernel=False))


@pytest.mark.parametrize("k", [1, 2, 3, 8, 16, 31])
@pytest.mark.parametrize("values", ["tied", "rounded"])
def test_cartesian_candidates_lose_no_value_of_the_top_k(k, values):
    i, j = cartesian_candidates(k)
    assert len(i) == sum(k // r for r in range(1, k + 1)) and (k != 16 or len(i) == 50)
    a, b = randn(200, k), randn(200, k, seed=1)
    if values == "tied":
        a, b = a.round(), b.round()
    else:
        b = b * 1e6                                                 # a is mostly rounded away
    a, b = (t.sort(descending=True).values for t in (a, b))
    brute = (a[:, :, None] + b[:, None, :]).flatten(1).topk(k).values
    assert torch.equal((a[:, i] + b[:, j]).topk(k).values, brute)


def test_too_many_sub_keys_asked_for():
    with pytest.raises(ValueError, match="top-5 of 4 sub-keys"):
        product_key_experts(randn(1, 1, 2, 8), randn(2, 4, 8), 5)


# ---- tensors of more than 2^31 elements ----
# The tensors are made by torch.empty and take address space alone: Linux gives memory to a page
# when it is touched. One program at the far end of the grid runs, and touches a few rows. Not
# tested: sub-keys of more than 2^31 elements, because a program of the top-k reads all of them.

BIG = 2 ** 31


@pytest.fixture
def run_program(monkeypatch):
    """run_program(kernel, (x, y), *args) runs the program (x, y) alone, in the interpreter. An
    int32 sum or product that leaves its range is an error there, as it would be a wrong address on
    a GPU."""
    if not RUNS or CUDA:
        pytest.skip("needs Triton's interpreter")
    from triton.runtime import interpreter
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", interpreter.InterpreterOptions(debug=True))

    def run(kernel, program, *args):
        def program_id(axis):
            return interpreter.TensorHandle(np.array([program[axis]], dtype=np.int32), tl.int32)

        monkeypatch.setattr(builder, "create_get_program_id", program_id)
        kernel[(1,)](*args)

    return run


def untouched(*shape, dtype=torch.bfloat16):
    try:
        return torch.empty(*shape, dtype=dtype)
    except RuntimeError:
        pytest.skip(f"this machine gives no address space for {shape} of {dtype}")


def test_the_check_of_the_limit_sees_an_overflow(run_program):
    @common.triton.jit
    def kernel(OUT):
        tl.store(OUT + tl.program_id(0) * 65536, 1.0)

    with pytest.raises(Exception, match="int32 overflow"):
        run_program(kernel, (2 ** 15, 0), torch.zeros(1))


# (rows, width): each array (rows, width) passes 2^31 elements, by its width or by its rows alone
wide_or_tall = pytest.mark.parametrize("rows, width", [(2 ** 15 + 16, 2 ** 16), (BIG + 16, 1)],
                                       ids=["wide", "tall"])


@wide_or_tall
@pytest.mark.parametrize("direction", ["permute", "unpermute"])
def test_permute_past_2_31(run_program, direction, rows, width):
    """The last 16 (8) of `rows`, in reverse order, at the last tile of the width. The order is
    int32 where it can be, so that a product with it could overflow."""
    kernel = {"permute": moe._permute_kernel, "unpermute": moe._unpermute_kernel}[direction]
    block = {"permute": 16, "unpermute": 8}[direction]
    columns = min(256, width)
    index = untouched(rows, dtype=torch.int32 if rows < BIG else torch.int64)
    index[-block:] = torch.arange(rows - 1, rows - 1 - block, -1)
    source, out = untouched(rows, width), untouched(rows, width)
    source[-block:, -columns:] = torch.arange(block * columns).view(block, columns) % 256
    tiles = -(-rows // block) * (width // columns)
    run_program(kernel, (tiles - 1, 0), source, index, out, rows, 1, width, block, columns)
    assert torch.equal(out[-block:, -columns:], source[-block:, -columns:].flip(0))


def test_invert_up_to_2_31(run_program):
    """The last block of as many pairs as there may be, in reverse order."""
    P = BIG - 8
    order = untouched(P, dtype=torch.int64)
    short, inverse = (untouched(P, dtype=torch.int32) for _ in range(2))
    last = (P - 1) // 1024 * 1024
    order[last:] = torch.arange(P - 1, last - 1, -1)
    run_program(moe._invert_kernel, (last // 1024, 0), order, short, inverse, P, 1024)
    for found in (short, inverse):
        assert torch.equal(found[last:].long(), order[last:])


@wide_or_tall
def test_gated_activation_past_2_31(run_program, rows, width):
    """The last 8 rows, at the last tile of the width."""
    columns = min(256, width)
    h, a = untouched(rows, 2 * width), untouched(rows, width)
    weight = untouched(rows, dtype=torch.float32)
    weight[-8:] = randn(8).sigmoid()
    tail = [slice(width - columns, width), slice(2 * width - columns, 2 * width)]
    for half in tail:
        h[-8:, half] = randn(8, columns, seed=half.start).bfloat16()
    tiles = -(-rows // 8) * (width // columns)
    run_program(moe._gated_activation_kernel, (tiles - 1, 0), h, weight, a, rows, width, "swiglu",
                8, columns)
    pre = torch.cat([h[-8:, half] for half in tail], 1)
    wanted = swiglu(pre.double()) * weight[-8:, None].double()
    close(a[-8:, -columns:], wanted, torch.bfloat16)


@pytest.mark.parametrize("rows, width", [(2 ** 23 + 8, 256), (BIG + 8, 1)], ids=["wide", "tall"])
def test_gated_activation_backward_past_2_31(run_program, rows, width):
    h, dh, da = untouched(rows, 2 * width), untouched(rows, 2 * width), untouched(rows, width)
    weight, d_weight = (untouched(rows, dtype=torch.float32) for _ in range(2))
    weight[-8:] = randn(8).sigmoid()
    h[-8:] = randn(8, 2 * width).bfloat16()
    da[-8:] = randn(8, width, seed=1).bfloat16()
    h64, weight64 = exact(h[-8:], weight[-8:])
    a = swiglu(h64) * weight64[:, None]
    a.backward(da[-8:].double())
    run_program(moe._gated_activation_backward_kernel, (rows // 8 - 1, 0), da, h, weight, dh,
                d_weight, rows, width, "swiglu", 8, width)
    close(da[-8:], a, torch.bfloat16)
    close(dh[-8:], h64.grad, torch.bfloat16)
    close(d_weight[-8:], weight64.grad)


@pytest.mark.parametrize(
    "N, R, d, E",
    [(2, 3, 2 ** 12, 2 ** 18 + 1), (2 ** 19 + 1, 3, 2 ** 12, 4), (2 ** 25 + 1, 64, 2, 4)],
    ids=["table", "tokens", "pairs"])
def test_peer_tokens_past_2_31(run_program, N, R, d, E):
    """The last token; its experts are the last ones of the table. What passes 2^31 elements is the
    table, or x and y, or idx, gate and h."""
    x, y, dy, dx = (untouched(N, d, dtype=torch.float32) for _ in range(4))
    idx = untouched(N, R, dtype=torch.int32)
    gate, h, dh, a, d_gate = (untouched(N, R, dtype=torch.float32) for _ in range(5))
    table = untouched(E, 2, d, dtype=torch.float32)
    table[-3:] = randn(3, 2, d) * d ** -0.5
    x[-1:], dy[-1:] = randn(1, d), randn(1, d, seed=1)
    idx[-1] = E - 1 - torch.arange(R) % 3
    gate[-1:] = randn(1, R).sigmoid()
    few = idx[-1:] - (E - 3)
    wanted = peer_exact(x[-1:], dy[-1:], table[-3:], few, gate[-1:], "gelu")
    blocks, _ = kernels_peer.launch_shape(d, 4, *kernels_peer.BY_TOKEN)
    run_program(kernels_peer._peer_forward_kernel, (N - 1, 0), x, table, idx, gate, y, h, d, R,
                "gelu", *blocks)
    run_program(kernels_peer._peer_backward_tokens_kernel, (N - 1, 0), dy, table, idx, gate, h, dx,
                dh, a, d_gate, d, R, "gelu", *blocks)
    for actual, exact_one in zip((y, h, dx, d_gate), wanted):
        close(actual[-1:], exact_one)


@pytest.mark.parametrize("parts", [1, 2])
def test_peer_table_past_2_31(run_program, parts):
    """The last expert owns the sorted positions 2^31 - 2 to 2^31 + 9, in windows of 4, so that the
    last windows hold its overflow. Its row of the gradient, the scratch rows and the positions all
    pass 2^31, and so do the pairs, which are of the last token."""
    share, R, d = 4, 2 ** 12, 8 // parts
    P, windows, E = BIG + 10, BIG // 4 + 3, BIG // 8 + 1
    order = untouched(P, dtype=torch.int64)
    pair = BIG + torch.arange(12)
    order[-12:] = pair
    N = BIG // R + 1
    idx = untouched(N * R, dtype=torch.int32)
    idx[pair] = E - 1
    offsets = untouched(E + 1, dtype=torch.int64)
    offsets[-2:] = torch.tensor([P - 12, P])
    x, dy = untouched(N, d, dtype=torch.float32), untouched(N, d, dtype=torch.float32)
    x[-1], dy[-1] = 1.0, 10.0
    dh, a = (untouched(N * R, dtype=torch.float32) for _ in range(2))
    dh[pair] = a[pair] = torch.arange(1.0, 13.0)
    partial, out = (untouched(n, parts, d, dtype=torch.float32) for n in (windows, E))
    for window in range(windows - 3, windows):
        run_program(kernels_peer._peer_table_overflow_kernel, (window, 0), x, dy, dh, a, idx, order,
                    offsets, partial, d, R, parts, share, 4, d)
    run_program(kernels_peer._peer_table_kernel, (E - 1, 0), x, dy, dh, a, order, offsets, partial,
                out, d, R, parts, share, False, 4, d)
    assert torch.equal(out[-1], torch.tensor([[78.0], [780.0]])[:parts].expand(parts, d))


@pytest.mark.parametrize("N, h, c, k", [(2 ** 20 + 8, 8, 128, 2), (2 ** 24 + 8, 8, 2, 16)],
                         ids=["queries", "results"])
def test_product_keys_past_2_31(run_program, N, h, c, k):
    """The last 8 tokens of the last head, in integers: any sum is exact."""
    q = untouched(N, h, 2, c, dtype=torch.float32)
    q[-8:] = randn(8, h, 2, c).mul(9).round()
    sub_keys = randn(2, 40, c).mul(9).round()
    scores = untouched(N, h, k, dtype=torch.float32)
    experts = untouched(N, h, k, dtype=torch.int32)
    wanted, chosen = product_key_experts(q[-8:, -1:].clone(), sub_keys, k, kernel=True)
    run_program(product_keys._product_keys_kernel, (-(-N // 64) - 1, h - 1), q, sub_keys, scores,
                experts, N, h, 40, c, k, *product_keys.topk_blocks(c, k))
    assert torch.equal(scores[-8:, -1:], wanted)
    assert torch.equal(experts[-8:, -1:], chosen)


@pytest.mark.parametrize("rows, width", [(BIG // 6 + 8, 8), (8, BIG // 6)], ids=["tall", "wide"])
def test_split_past_2_31(run_program, rows, width):
    """The last block of a gradient."""
    t, out = untouched(rows, width, dtype=torch.float32), untouched(rows, 3, width)
    last = (t.numel() - 1) // 1024
    t.view(-1)[last * 1024:] = randn(t.numel() - last * 1024)
    wanted = parts.split(t[-1:, -8:], True, kernel=True)[0]
    run_program(parts._split_kernel, (last, 0), t, out, t.numel(), width, True, 1024)
    assert torch.equal(out[-1, :, -8:], wanted)


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
        monkeypatch.delitem(sys.modules, name)                      # so that it is imported anew
    module = importlib.import_module("kernels.peer")
    assert module.choose.__globals__["HAS_TRITON"] is False
    x, dy, table, idx, gate = (t.cpu() for t in peer_problem(2, 3, 8, 5))
    y, _ = module.peer_forward(x, table, idx, gate, "gelu")
    torch.testing.assert_close(y, peer_forward(x, table, idx, gate, "gelu", kernel=False)[0])
    with pytest.raises(RuntimeError, match="triton is not installed"):
        module.peer_forward(x, table, idx, gate, "gelu", kernel=True)


def test_one_graph_under_compile():
    """Kernels on a GPU, twins on a CPU: no graph break, the same numbers."""
    def path(x, order, inverse, weight, da):
        h = permute(x, order, 2, CUDA)
        dh, d_weight, a = gated_activation_backward(da.clone(), h, weight, "swiglu", CUDA)
        again = gated_activation(h, weight, "swiglu", CUDA)
        return unpermute(dh, inverse, 2, CUDA), d_weight, a - again

    order, inverse = expert_order(8, 2, 3, seed=0)
    args = randn(8, 32), order, inverse, randn(16).sigmoid(), randn(16, 16)
    compiled = torch.compile(path, fullgraph=True, backend="inductor" if CUDA else "aot_eager")
    for actual, wanted in zip(compiled(*args), path(*args)):
        torch.testing.assert_close(actual, wanted)


@either_dtype
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_a_mixture_compiles_in_either_dtype(dtype, activation):
    """Forward and backward in one graph; the same numbers as eager."""
    config = load_config(None, {
        "model.vocab_size": 32, "model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16,
        "model.block_size": 8, "ffn.kind": "moe", "ffn.n_expert": 4, "ffn.top_k": 2,
        "ffn.d_expert": 24, "ffn.activation": activation, "ffn.dispatch": "grouped"})
    torch.manual_seed(0)
    layer = GPT(config).blocks[0].ffn.to(DEVICE)
    ctx = Context(torch.zeros(2, 8, dtype=torch.long, device=DEVICE))
    results = []
    torch._dynamo.reset()
    for forward in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = randn(2, 8, 16).requires_grad_()
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            y, _ = forward(x, ctx)
        dy = randn(2, 8, 16, seed=1).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)])
    for compiled, eager in zip(results[1], results[0]):
        assert eager.abs().max() > 0
        close(compiled, eager.double(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_the_opaque_product_has_the_shapes_that_it_says(dtype):
    """A group of no rows, and rows that are columns: both forms that GroupedExperts uses."""
    ends = torch.tensor([3, 3, 8], dtype=torch.int32, device=DEVICE)
    a, dy, b = (randn(*shape, dtype=dtype) for shape in ((8, 16), (8, 24), (3, 24, 16)))
    for args in ((a, b.transpose(1, 2), ends), (dy.T, a, ends)):
        torch.library.opcheck(moe.opaque_product, args,
                              test_utils=("test_schema", "test_faketensor"))
