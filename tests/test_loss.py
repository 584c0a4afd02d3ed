"""kernels/loss.py: the chunked loss of the output layer against F.cross_entropy of all logits.

As in test_kernels.py, the kernel runs on a GPU, or in Triton's interpreter where there is none.
"""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import common
from kernels.loss import IGNORE, head_loss, head_loss_torch, softmax_gradient

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RUNS = common.HAS_TRITON and (CUDA or common.INTERPRETED)
needs_kernel = pytest.mark.skipif(not RUNS, reason="needs triton, and a GPU or TRITON_INTERPRET=1")
kernel_or_twin = pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernel), False])


def layer(N, d=8, V=50, dtype=torch.float64, ignored=(), seed=0):
    """x (N, d), weight (V, d), targets (N,); logits of size 2. `ignored`: a bool per token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, d, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, d, generator=generator, dtype=torch.float64) * 2 * d ** -0.5
    targets = torch.randint(V, (N,), generator=generator)
    if len(ignored):
        targets[torch.tensor(ignored)] = IGNORE
    x, weight = (t.to(DEVICE, dtype).requires_grad_() for t in (x, weight))
    return x, weight, targets.to(DEVICE)


def oracle(x, weight, targets, upstream=1.0):
    """float64: mean, token losses, and the gradients of x and weight for upstream * mean."""
    x, weight = (t.detach().double().requires_grad_() for t in (x, weight))
    token_loss = F.cross_entropy(x @ weight.T, targets, reduction="none")
    mean = token_loss.sum() / max(1, (targets != IGNORE).sum().item())
    gradients = torch.autograd.grad(upstream * mean, (x, weight))
    return [mean.detach(), token_loss.detach(), *gradients]


def run(function, x, weight, *rest, upstream=1.0):
    mean, token_loss = function(x, weight, *rest)
    return [mean.detach(), token_loss, *torch.autograd.grad(upstream * mean, (x, weight))]


def close(actual, exact, tolerance):
    """Relative error in the norm, 0.1 added to it, for each pair of tensors."""
    for a, b in zip(actual, exact, strict=True):
        assert a.shape == b.shape
        error = (a.double() - b).norm() / (b.norm() + 0.1)
        assert error <= tolerance, f"relative error {error:.2e}"


class Created(TorchDispatchMode):
    """Watches every operation: the most elements of a tensor that one returns, and the casts."""

    def __init__(self):
        super().__init__()
        self.largest, self.casts = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        if func is torch.ops.aten._to_copy.default:
            self.casts.append(tuple(result.shape))
        return result


# ---- the same numbers as with all logits ----

@settings(max_examples=30, deadline=None, derandomize=True)
@given(ignored=st.lists(st.booleans(), max_size=20), chunk_tokens=st.integers(1, 25),
       d=st.sampled_from([1, 3, 8]), V=st.sampled_from([1, 2, 50]), upstream=st.floats(-9, 9))
def test_loss_and_gradients_for_any_chunk(ignored, chunk_tokens, d, V, upstream):
    """No tokens, all ignored, a chunk larger than N, and N not a multiple of it are among them."""
    tensors = layer(len(ignored), d, V, ignored=ignored)
    exact = oracle(*tensors, upstream)
    close(run(head_loss, *tensors, chunk_tokens, False, upstream=upstream), exact, 1e-12)
    close(run(head_loss_torch, *tensors, upstream=upstream), exact, 1e-12)
    with torch.no_grad():
        close(head_loss(*tensors, chunk_tokens), exact[:2], 1e-12)


def test_all_ignored_is_zero_everywhere():
    results = run(head_loss, *layer(5, ignored=[True] * 5), 2)
    assert all(t.count_nonzero() == 0 for t in results)


def test_an_ignored_token_is_a_token_that_is_not_there():
    x, weight, targets = layer(9, ignored=[i % 3 == 1 for i in range(9)])
    kept = targets != IGNORE
    with_them = run(head_loss, x, weight, targets, 4)
    without = run(head_loss, x[kept].detach().requires_grad_(), weight, targets[kept], 4)
    close([with_them[0], with_them[1][kept], with_them[2][kept], with_them[3]], without, 1e-12)
    assert with_them[1][~kept].count_nonzero() == with_them[2][~kept].count_nonzero() == 0


@kernel_or_twin
def test_float32(kernel):
    tensors = layer(21, dtype=torch.float32, ignored=[i % 4 == 0 for i in range(21)])
    results = run(head_loss, *tensors, 8, kernel)
    assert all(t.dtype == torch.float32 for t in results)
    close(results, oracle(*tensors), 2e-6)


@kernel_or_twin
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["autocast", "bf16"])
def test_bfloat16(kernel, stored):
    """Losses stay float32; gradients have the dtype of what they belong to."""
    tensors = layer(21, dtype=stored, ignored=[i % 4 == 0 for i in range(21)])
    with torch.autocast(DEVICE, torch.bfloat16, enabled=stored == torch.float32):
        results = run(head_loss, *tensors, 8, kernel)
    assert [t.dtype for t in results] == [torch.float32, torch.float32, stored, stored]
    close(results, oracle(*tensors), 2e-2)


def test_autocast_leaves_float64_alone():
    tensors = layer(9)
    with torch.autocast(DEVICE, torch.bfloat16):
        close(run(head_loss, *tensors, 4), oracle(*tensors), 1e-12)


def test_the_gradient_of_the_weight_is_summed_in_float32():
    """256 chunks of one token each: their sum in bfloat16 is off by 1e-2."""
    x, weight, targets = layer(256, V=3, dtype=torch.bfloat16)
    weight = weight.detach().float().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        d_weight = run(head_loss, x, weight, targets, 1, False)[3]
    close([d_weight], [oracle(x, weight, targets)[3]], 4e-3)


# ---- the contract ----

def test_only_the_mean_carries_a_gradient():
    mean, token_loss = head_loss(*layer(7), 3)
    assert mean.requires_grad and not token_loss.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        token_loss.mean().backward()


def test_no_gradient_where_none_is_wanted():
    x, weight, targets = layer(7)
    _, _, dx, d_weight = oracle(x, weight, targets)
    head_loss(x, weight.detach(), targets, 3)[0].backward()
    head_loss(x.detach(), weight, targets, 3)[0].backward()
    close([x.grad, weight.grad], [dx, d_weight], 1e-12)
    with torch.no_grad():
        assert not head_loss(x, weight, targets, 3)[0].requires_grad
    assert not head_loss(x.detach(), weight.detach(), targets, 3)[0].requires_grad


def test_backward_twice_and_no_second_derivative():
    x, weight, targets = layer(7)
    mean, _ = head_loss(x, weight, targets, 3)
    first, second = (torch.autograd.grad(mean, (x, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(mean, x, create_graph=True)


def test_a_tied_weight_over_several_micro_steps():
    """The embedding and the head share the weight, and three micro-steps add to its gradient."""
    _, weight, targets = layer(24)
    ids, grads = targets.roll(1), []
    for function, rest in ((head_loss, (5,)), (head_loss_torch, ())):
        weight.grad = None
        for part, target in zip(ids.split(8), targets.split(8)):
            x = F.embedding(part, weight).tanh()
            (function(x, weight, target, *rest)[0] / 3).backward()
        grads.append(weight.grad)
    close(grads[:1], grads[1:], 1e-12)


def test_refuses_a_chunk_of_nothing():
    with pytest.raises(ValueError, match="chunk_tokens = 0"):
        head_loss(*layer(4), 0)


# ---- memory and compile ----

@pytest.mark.parametrize("autocast", [False, True])
def test_no_tensor_is_as_large_as_all_logits(autocast):
    N, d, V, chunk_tokens = 64, 4, 96, 8
    x, weight, targets = layer(N, d, V, torch.float32)
    created, control = Created(), Created()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        with created:
            head_loss(x, weight, targets, chunk_tokens, False)[0].backward()
        with control:
            head_loss_torch(x, weight, targets)[0].backward()
    assert created.largest == max(chunk_tokens * V, V * d, N * d)
    assert control.largest == N * V
    assert created.casts.count((V, d)) == autocast                 # the weight is cast once


@pytest.mark.parametrize("autocast", [False, True])
def test_compile(autocast):
    def step(x, weight, targets):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            return head_loss(x, weight, targets, 4, False)

    tensors = layer(10, dtype=torch.float32, ignored=[i == 2 for i in range(10)])
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)
    results, expected = (run(f, *tensors, upstream=0.5) for f in (compiled, step))
    close(results, expected, 1e-6)
    assert not compiled(*tensors)[1].requires_grad
    with torch.no_grad():
        close(compiled(*tensors), expected[:2], 1e-6)


# ---- the pass over the logits ----

@kernel_or_twin
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("V", [1, 2, 50, 4096, 9000])
def test_softmax_gradient(kernel, dtype, V):
    """Logits of size 30, so that the maximum matters; 9,000 columns are 3 blocks of the kernel."""
    generator = torch.Generator().manual_seed(V)
    z = (torch.randn(4, V, generator=generator) * 30).to(DEVICE, dtype)
    targets = torch.tensor([0, V - 1, IGNORE, V // 2], device=DEVICE)
    z64 = z.double().requires_grad_()
    loss = F.cross_entropy(z64, targets, reduction="none")
    (expected,) = torch.autograd.grad(loss.sum(), z64)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    actual, gradient = softmax_gradient(z, targets, kernel)
    assert (actual.dtype, gradient.dtype) == (torch.float32, dtype)
    close([actual], [loss], 2e-6)
    close([gradient], [expected], tolerance)


@kernel_or_twin
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in the interpreter
def test_infinite_and_missing_logits(kernel):
    """-inf is a column of probability 0; NaN and +inf make the loss of their own row NaN."""
    inf = float("inf")
    z = torch.tensor([[0., -inf, 0.], [0., inf, 0.], [0., float("nan"), 0.], [-inf, 1., -inf]],
                     device=DEVICE)
    loss, gradient = softmax_gradient(z, torch.tensor([0, 0, 0, 1], device=DEVICE), kernel)
    assert loss.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(gradient[[0, 3]].cpu(), torch.tensor([[-.5, 0., .5], [0., 0., 0.]]))
