"""kernels/parts.py: float32 products from bfloat16 parts, against float64 and against the float32
product. The kernel runs in Triton's interpreter where there is no GPU; there it rounds to bfloat16
by cutting bits off, and a number is still the sum of its parts."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from kernels import common, parts
from kernels.parts import LinearByParts, pays_by_parts, split
from peer import Queries
from routers import Linear32

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RUNS = common.HAS_TRITON and (CUDA or common.INTERPRETED)
needs_kernel = pytest.mark.skipif(not RUNS, reason="needs triton, and a GPU or TRITON_INTERPRET=1")
kernel_or_twin = pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernel), False])
# Few outputs lie side by side as outputs, many as inputs.
few_or_many = pytest.mark.parametrize("E", [8, 64], ids=["few", "many"])
examples = settings(max_examples=20, deadline=None, derandomize=True)
# bfloat16 has the exponents of float32: parts of numbers that are neither huge nor tiny are exact.
numbers = st.floats(-2.0 ** 100, 2.0 ** 100, width=32).filter(lambda t: t == 0 or abs(t) > 2e-20)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE)


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


@kernel_or_twin
@examples
@given(st.lists(numbers, min_size=1, max_size=40), st.integers(1, 3))
def test_a_float32_number_is_the_sum_of_its_parts(kernel, values, rows):
    t = torch.tensor(values, device=DEVICE).repeat(rows, 1)
    third, second, first, again = split(t, kernel=kernel).unbind(1)
    assert torch.equal(first.float() + second.float() + third.float(), t)
    assert torch.equal(first, again)
    # two parts are 16 bits, or 14 where they are cut off
    backward = split(t, backward=True, kernel=kernel).unbind(1)
    assert torch.equal(backward[0], first) and torch.equal(backward[2], first)
    assert torch.equal(backward[1], second)
    assert ((first.float() + second.float() - t).abs() <= t.abs() * 2 ** -14).all()


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 1), (3, 700), (2500, 3), (0, 8)])
def test_the_kernel_equals_the_twin(shape):
    """On numbers whose parts are the same, rounded or cut off; t is not contiguous."""
    first = randn(*shape).bfloat16().float()
    t = (first + first * 2 ** -9).T.contiguous().T
    for backward in (False, True):
        assert torch.equal(split(t, backward, kernel=True), split(t, backward, kernel=False))
    assert t.numel() == 0 or split(t, True, kernel=True)[:, 1].any()


@kernel_or_twin
@few_or_many
def test_products_by_parts_are_as_exact_as_float32(kernel, E):
    x, weight, dy = randn(50, 96).bfloat16(), randn(E, 96) * 0.1, randn(50, E)
    results = []
    for function, dtype in ((lambda x, w: LinearByParts.apply(x, w, kernel), None),
                            (lambda x, w: F.linear(x.float(), w), None),
                            (F.linear, torch.float64)):
        leaves = [t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
                  for t in (x, weight)]
        y = function(*leaves)
        y.backward(dy.to(y.dtype))
        results.append([y.detach(), *(t.grad for t in leaves)])
    ours, float32, exact = results
    assert [t.dtype for t in ours] == [t.dtype for t in float32]
    assert error(ours[0], exact[0]) < max(3e-7, error(float32[0], exact[0]))
    # dx is rounded to bfloat16 in both, dW has 16 bits of dy, or 14
    assert error(ours[1], exact[1]) < 1.1 * error(float32[1], exact[1])
    assert error(ours[2], exact[2]) < 3e-5
    # what one part alone would give
    assert error(F.linear(x.float(), weight.bfloat16().float()), exact[0]) > 1e-4


@few_or_many
@examples
@given(N=st.integers(1, 9), d=st.sampled_from([1, 8, 130]), seed=st.integers(0, 99))
def test_the_choice_of_experts_is_that_of_float32(E, N, d, seed):
    x, weight = randn(N, d, seed=seed).bfloat16(), randn(E, d, seed=seed)
    exact = x.double() @ weight.double().T
    best = LinearByParts.apply(x, weight, False).topk(2)
    # only experts that float32 itself could confuse may change places
    slack = 1e-6 * (x.double().abs() @ weight.double().abs().T).amax(1, keepdim=True)
    assert (exact.topk(2).values - exact.gather(1, best.indices) <= slack).all()


@few_or_many
def test_one_graph_under_compile(E):
    def step(x, weight):
        y = LinearByParts.apply(x, weight, CUDA)
        return y, *torch.autograd.grad(y.square().sum(), (x, weight))

    args = randn(16, 64).bfloat16().requires_grad_(), randn(E, 64).requires_grad_()
    torch._dynamo.reset()
    forward = torch.compile(lambda x, w: LinearByParts.apply(x, w, CUDA), fullgraph=True,
                            backend="inductor" if CUDA else "aot_eager")
    y = forward(*args)
    got = [y, *torch.autograd.grad(y.square().sum(), args)]
    for actual, wanted in zip(got, step(*args)):
        torch.testing.assert_close(actual, wanted)


def test_the_operator_of_the_compiler_has_the_shape_that_it_says():
    a, b = randn(5, 8).bfloat16(), randn(3, 8).bfloat16()
    torch.library.opcheck(parts.opaque_product32, (a, b.T),
                          test_utils=("test_schema", "test_faketensor"))


def test_a_frozen_input_costs_no_product(monkeypatch):
    x, weight = randn(4, 32).bfloat16(), randn(8, 32).requires_grad_()
    y = LinearByParts.apply(x, weight, False)
    monkeypatch.setattr(torch, "mm", None)
    y.sum().backward()
    assert weight.grad is not None


# ---- where it is taken ----

class OnCUDA(torch.Tensor):
    """A CPU tensor that says that it is on CUDA."""
    is_cuda = True


def test_the_rule(monkeypatch):
    monkeypatch.setattr(parts, "use_triton", lambda x: True)
    x, weight = torch.empty(2 ** 15, 128, dtype=torch.bfloat16).as_subclass(OnCUDA), randn(8, 128)
    assert pays_by_parts(x, weight)
    assert not pays_by_parts(x[1:], weight)                     # too few numbers
    assert not pays_by_parts(x.float(), weight)
    assert not pays_by_parts(x, weight.double())
    assert not pays_by_parts(x, weight[:4])                     # rows of 8 bytes
    assert not pays_by_parts(x.as_subclass(torch.Tensor), weight)
    monkeypatch.setattr(parts, "use_triton", lambda x: False)
    assert not pays_by_parts(x, weight)


def test_routers_and_queries_take_it_where_it_pays(monkeypatch):
    """And are F.linear, to the last bit, where it does not, and where there is a bias."""
    x = randn(6, 32).bfloat16()
    router, queries = Linear32(32, 8), Queries(32, 2, 4, "none")
    with_bias = Linear32(32, 8, bias=True)
    for module in (router, queries, with_bias):
        module.to(DEVICE)
        plain = F.linear(x.float(), module.weight, getattr(module, "bias", None))
        assert torch.equal(module(x).flatten(1), plain)
    calls = []
    by_parts = SimpleNamespace(apply=lambda x, w: calls.append(w) or LinearByParts.apply(x, w))
    monkeypatch.setattr(parts, "LinearByParts", by_parts)
    monkeypatch.setattr(parts, "pays_by_parts", lambda x, weight: True)
    for module in (router, queries, with_bias):
        torch.testing.assert_close(module(x).flatten(1), F.linear(
            x.float(), module.weight, getattr(module, "bias", None)))
    first, second = calls
    assert first is router.weight and second is queries.weight
