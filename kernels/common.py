"""What every kernel file shares: Triton if it is there, the rule that picks a kernel or its twin, and the
activations with their gradients. Imports without Triton.

    name_torch(...)    the twin: plain PyTorch, any device, any float dtype; defines what is computed
    _name_kernel       the Triton kernel: float32 or bfloat16 in and out, float32 inside
    name(...)          what other files call: allocates, and picks one of the two by `use_triton`
"""
import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
    HAS_TRITON = True
except ImportError:
    from types import SimpleNamespace  # enough for the decorators and annotations below
    triton, tl, HAS_TRITON = SimpleNamespace(jit=lambda fn: fn), SimpleNamespace(constexpr=None), False

INTERPRETED = HAS_TRITON and triton.knobs.runtime.interpret  # TRITON_INTERPRET=1 when triton was imported
aten = torch.ops.aten


def use_triton(x):
    """The one rule: kernels where Triton is installed and x is on a GPU (or Triton interprets), twins
    elsewhere, and for float64, which the kernels do not have."""
    return HAS_TRITON and (x.is_cuda or INTERPRETED) and x.dtype != torch.float64


def choose(kernel, x, *others):
    """`kernel` None: by the rule. True or False: as the caller says. RuntimeError where True is impossible,
    and for a kernel that autograd would have to see through."""
    if kernel and not use_triton(x):
        why = f"the tensor is {x.dtype} on {x.device.type}" if HAS_TRITON else "triton is not installed"
        raise RuntimeError(f"a Triton kernel was asked for but {why}: use float32 or bfloat16 on a GPU, "
                           "or TRITON_INTERPRET=1 from the start of the program, or kernel=False")
    kernel = use_triton(x) if kernel is None else kernel
    if kernel and torch.is_grad_enabled() and any(t.requires_grad for t in (x, *others)):
        raise RuntimeError("a Triton kernel has no autograd: call it in an autograd.Function or with no_grad")
    return kernel


def contiguous(*tensors):
    return [t.contiguous() for t in tensors]  # free where it already is; grad of y.sum() is not


def ceil_div(a, b):
    return -(-a // b)


def power_of_2(n):
    return 1 << max(n - 1, 0).bit_length()


def slices(width, *tensors):
    """Cuts tensors along their tokens so that `width` numbers a token fill 2 MiB, a core's cache (GPU: 64):
    smaller slices pay for their launches, larger ones leave the cache."""
    step = max(1, (2 ** 19 if tensors[0].device.type == "cpu" else 2 ** 24) // width)
    return zip(*(t.split(step) for t in tensors))


# ---- activations: "swiglu" is silu on the first half of a row, times the second half ----

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "swiglu": F.silu, "relu": F.relu,
               "relu2": lambda h: F.relu(h).square()}
ACTIVATION_GRADS = {  # (gradient, h) -> gradient * act'(h), in one pass where autograd would take several
    "gelu": aten.gelu_backward, "silu": aten.silu_backward, "swiglu": aten.silu_backward,
    "relu": lambda g, h: aten.threshold_backward(g, h, 0), "relu2": lambda g, h: g * F.relu(h) * 2}


@triton.jit
def activate(h, ACT: tl.constexpr):
    """act(h) and act'(h) in float32; the one that a kernel does not use is not computed."""
    if ACT == "gelu":  # exact, with erf
        cdf = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476))
        value, slope = h * cdf, cdf + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif ACT == "silu" or ACT == "swiglu":
        s = 1.0 / (1.0 + tl.exp(-h))
        value, slope = h * s, s * (1.0 + h * (1.0 - s))
    else:
        value, slope = tl.where(h <= 0, 0.0, h), tl.where(h <= 0, 0.0, 1.0)  # a NaN stays a NaN
        if ACT == "relu2":
            value, slope = value * value, 2.0 * value
    return value, slope
