"""kernels/order.py: the counting sort against torch.sort, number for number."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

from kernels import common
from kernels.moe import invert_torch
from kernels.order import (MOST_EXPERTS, ExpertOrder, _scan_kernel, expert_order,
                           expert_order_torch)
from moe import DISPATCH, Experts
from routers import Routing

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_kernel = pytest.mark.skipif(not common.HAS_TRITON or not (CUDA or common.INTERPRETED),
                                  reason="needs triton, and a GPU or TRITON_INTERPRET=1")
NAMES = "order", "inverse", "token", "gate", "ends"


def expected(expert, token, weight, E):
    order, token, gate, ends = expert_order_torch(expert, token, weight, E)
    return [*invert_torch(order), token, gate, ends]


def check(expert, E, seed=0):
    """All five results and the gradient of the weights are those of torch.sort, types included."""
    P, g = len(expert), torch.Generator().manual_seed(seed)
    expert = expert.to(DEVICE)
    token = torch.randint(0, 2 ** 40, (P,), generator=g).to(DEVICE)
    weight, d_gate = torch.randn(2, P, generator=g).to(DEVICE)
    weight.requires_grad_()
    got = expert_order(expert, token, weight, E, fused=True)
    want = expected(expert, token, weight, E)
    for name, a, b in zip(NAMES, got, want, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert [t.requires_grad for t in got] == [False, False, False, True, False]
    d_got, d_want = (torch.autograd.grad(t[3], weight, d_gate)[0] for t in (got, want))
    assert torch.equal(d_got, d_want)


@needs_kernel
@settings(max_examples=20, deadline=None, derandomize=True)
@given(P=st.integers(0, 400), E=st.sampled_from([1, 2, 7, 64, 65, 130]), seed=st.integers(0, 99),
       skew=st.sampled_from([1, 4]), dtype=st.sampled_from([torch.int32, torch.int64]))
def test_it_is_the_stable_sort(P, E, seed, skew, dtype):
    """Up to four blocks of 128 pairs; with skew many experts are empty."""
    draw = torch.rand(P, generator=torch.Generator().manual_seed(seed))
    check((draw ** skew * E).to(dtype).clamp_max(E - 1), E, seed)


@needs_kernel
@pytest.mark.parametrize("P, E, e", [(1, 1, 0), (127, 5, 4), (128, 5, 0), (300, 5, 2),
                                     (700, 257, 256), (1300, MOST_EXPERTS, 700)])
def test_one_expert_has_everything(P, E, e):
    check(torch.full((P,), e), E)


@needs_kernel
@pytest.mark.parametrize("blocks", [1, 32, 70])
def test_the_scan_goes_on_from_part_to_part(blocks):
    """Parts of 32 blocks: a block's count is added to all that come later."""
    count = torch.randint(0, 9, (3, blocks), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    up_to = count.cumsum(0).int()
    before, ends = torch.full_like(up_to, -1), torch.full_like(up_to[:, 0], -1)
    _scan_kernel[(3,)](up_to, before, ends, blocks, 32)
    assert torch.equal(before.long(), count.cumsum(1) - count)
    assert torch.equal(ends.long(), up_to.sum(1))


@needs_kernel
def test_strided_ids_and_weights():
    expert = torch.randint(0, 9, (50, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    token, weight = expert[:, 1] + 1, torch.randn(50, 3, device=DEVICE)[:, 1]
    for a, b in zip(expert_order(expert[:, 0], token, weight, 9, fused=True),
                    expected(expert[:, 0], token, weight, 9)):
        assert torch.equal(a, b)


def by_kernel(monkeypatch, *more, E=4, P=30):
    """Whether expert_order goes by the kernels; its results are checked."""
    taken = []

    def apply(*args):
        taken.append(args)
        return plain(*args)
    plain = ExpertOrder.apply
    monkeypatch.setattr(ExpertOrder, "apply", apply)
    expert = torch.randint(0, E, (P,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    got = expert_order(expert, expert, expert.float(), E, *more)
    want = expected(expert, expert, expert.float(), E)
    assert all(torch.equal(a, b) for a, b in zip(got, want) if a is not None)
    monkeypatch.undo()
    return bool(taken)


def test_where_the_kernels_run(monkeypatch):
    """On CUDA, and interpreted only for the fused path; never for more experts than they take."""
    runs = common.HAS_TRITON and (CUDA or common.INTERPRETED)
    assert by_kernel(monkeypatch, True) == runs
    assert by_kernel(monkeypatch) == (common.HAS_TRITON and CUDA)
    assert not by_kernel(monkeypatch, True, E=MOST_EXPERTS + 1)


@needs_kernel
@pytest.mark.parametrize("k", [0, 2])
def test_a_layer_by_either_sort(monkeypatch, k):
    """Output and gradients of the fused path are equal bit by bit; k 0 as with expert choice."""
    torch.manual_seed(0)
    experts = Experts(5, 8, 8, "swiglu")
    for p in experts.parameters():
        torch.nn.init.normal_(p)
    experts = experts.to(DEVICE)
    x, dy = torch.randn(2, 20, 8, device=DEVICE)
    expert, token = torch.randint(0, 5, (40,), device=DEVICE), torch.arange(40, device=DEVICE) // 2
    results = []
    for most in (MOST_EXPERTS, 0):
        monkeypatch.setattr("kernels.order.MOST_EXPERTS", most)
        weight = torch.linspace(-1, 1, 40, device=DEVICE).requires_grad_()
        x = x.detach().requires_grad_()
        y = DISPATCH["fused"](x, Routing(expert, weight, token, k), experts)
        results.append([y, *torch.autograd.grad(y, [x, weight, *experts.parameters()], dy)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_it_is_captured():
    """A graph sorts what its inputs hold at replay: nothing is read by the host."""
    expert = torch.randint(0, 9, (1000,), device=DEVICE)
    token, weight = torch.arange(1000, device=DEVICE), torch.randn(1000, device=DEVICE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expert_order(expert, token, weight, 9)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = expert_order(expert, token, weight, 9)
    expert.copy_(expert.flip(0))
    graph.replay()
    for a, b in zip(got, expected(expert, token, weight, 9)):
        assert torch.equal(a, b)
