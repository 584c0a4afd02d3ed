"""What the kernel files share: Triton where it is installed, the rule that picks a kernel or its
twin, and the activations with their gradients. The rules and letters of all kernels stand in
kernels/__init__.py.
"""
import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    HAS_TRITON = True
except ImportError:
    from types import SimpleNamespace

    # Just enough for the decorators and annotations of the kernels, which are then never launched.
    triton = SimpleNamespace(jit=lambda fn: fn)
    tl = SimpleNamespace(constexpr=None)
    HAS_TRITON = False

# TRITON_INTERPRET=1 counts only if it was set before triton was first imported.
INTERPRETED = HAS_TRITON and triton.knobs.runtime.interpret
aten = torch.ops.aten


def use_triton(x):
    """The one rule: a kernel where Triton is installed and x is on a GPU (or Triton interprets).
    The twin elsewhere, and for float64, which the kernels do not have."""
    return HAS_TRITON and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64


def choose(kernel, x, *others):
    """Whether to run the kernel. `kernel` None: by the rule. True or False: as the caller says.

    RuntimeError where True is impossible, and for a kernel that autograd would have to see through.
    """
    if kernel and not use_triton(x):
        why = "triton is not installed"
        if HAS_TRITON:
            why = f"the tensor is {x.dtype} on {x.device.type}"
        raise RuntimeError(
            f"a Triton kernel was asked for but {why}: use float32 or bfloat16 on a GPU, or "
            "TRITON_INTERPRET=1 from the start of the program, or kernel=False")
    if kernel is None:
        kernel = use_triton(x)
    if kernel and torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others)):
        raise RuntimeError("a Triton kernel has no autograd: call it in an autograd.Function or "
                           "with no_grad")
    return kernel


def contiguous(*tensors):
    """The tensors in row-major order. Copies only one that is not: the gradient of y.sum(), say."""
    return [t.contiguous() for t in tensors]


def ceil_div(a, b):
    return -(-a // b)


def power_of_2(n):
    """The smallest power of 2 that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def slices(width, *tensors):
    """Cuts tensors along their tokens, for a loop whose temporaries hold `width` numbers a token.

    A slice fills 2^19 numbers, 2 MiB of float32, on a CPU: a core's cache. On a GPU it fills 2^24,
    64 MiB: smaller slices would cost more in launches than they save.
    """
    room = 2 ** 19 if tensors[0].device.type == "cpu" else 2 ** 24
    step = max(1, room // width)
    return zip(*(t.split(step) for t in tensors))


# ---- activations, element by element; "swiglu", which takes two halves of a row, is in moe.py ----

ACTIVATIONS = {
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
}

# (gradient, h) -> gradient * act'(h), in one pass where autograd would take several
ACTIVATION_GRADS = {
    "gelu": aten.gelu_backward,
    "silu": aten.silu_backward,
    "relu": lambda g, h: aten.threshold_backward(g, h, 0),
    "relu2": lambda g, h: g * F.relu(h) * 2,
}


@triton.jit
def activate(h, ACT: tl.constexpr):
    """act(h) and its derivative act'(h), both float32. ACT is a name of ACTIVATIONS. The compiler
    removes the one that a kernel does not use."""
    if ACT == "gelu":
        # h Phi(h) and Phi(h) + h phi(h), with the distribution and density of the normal law
        cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        value = h * cdf
        slope = cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACT == "silu":
        # h s and s (1 + h (1 - s)), with s = sigmoid(h)
        s = 1.0 / (1.0 + tl.exp(-h))
        value = h * s
        slope = s * (1.0 + h * (1.0 - s))
    else:
        # max(h, 0). The comparison is false for a NaN, so that a NaN stays one.
        value = tl.where(h <= 0, 0.0, h)
        slope = tl.where(h <= 0, 0.0, 1.0)
        if ACT == "relu2":
            slope = 2.0 * value
            value = value * value
    return value, slope
