"""Float32 products on tensor cores, which multiply bfloat16: y = x W^T of bfloat16 x and float32 W.

Letters: N tokens, d width, E outputs (a router's experts, the features of PEER's queries). The
rules of all kernels stand in kernels/__init__.py.

A float32 number is the exact sum of three bfloat16 ones: each is what is left, rounded, and has 8
of the 24 bits. Products of bfloat16 numbers are exact in float32, and tensor cores add them in
float32. So x W_1^T + x W_2^T + x W_3^T is as exact as a product in float32. Backward takes two
parts of dy and of W, 16 bits, and leaves out dy_2 W_2:

    dx = dy_1 W_2 + dy_2 W_1 + dy_1 W_1     relative error below 2^-14, then rounded to bfloat16
    dW = dy_1^T x + dy_2^T x                relative error at most 2^-16

Relative means: to the sum of the absolute values of the products. Parts lie side by side, so that
one product multiplies them all.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from kernels.common import ceil_div, choose, contiguous, tl, triton, use_triton


def parts_torch(t):
    """Three bfloat16 tensors whose sum is the float32 tensor t."""
    parts = []
    for _ in range(3):
        parts.append(t.bfloat16())
        t = t - parts[-1].float()
    return parts


def split_torch(t, backward):
    first, second, third = parts_torch(t)
    order = (first, second, first) if backward else (third, second, first, first)
    return torch.stack(order, 1)


@triton.jit
def _split_kernel(T, OUT, NUMEL, WIDTH: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr):
    """A block of T per program, in registers between one read and 3 or 4 writes. A kernel and not
    the twin, because a compiler may keep the float32 of a number that was rounded: the later parts
    would be zero.
    Limits: offsets are 64-bit; at most 2^31 - 1 blocks."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < NUMEL
    t = tl.load(T + i, mask=live, other=0.0)
    # Each part is what the ones before leave, rounded.
    first = t.to(tl.bfloat16)
    t -= first.to(tl.float32)
    second = t.to(tl.bfloat16)
    # OUT is (rows, 3 or 4, WIDTH).
    if BACKWARD:
        out = OUT + i + i // WIDTH * (2 * WIDTH)
        tl.store(out, first, mask=live)
        tl.store(out + WIDTH, second, mask=live)
        tl.store(out + 2 * WIDTH, first, mask=live)
    else:
        third = (t - second.to(tl.float32)).to(tl.bfloat16)
        out = OUT + i + i // WIDTH * (3 * WIDTH)
        tl.store(out, third, mask=live)
        tl.store(out + WIDTH, second, mask=live)
        tl.store(out + 2 * WIDTH, first, mask=live)
        tl.store(out + 3 * WIDTH, first, mask=live)


def split(t, backward=False, kernel=None):
    """Parts of t (rows, width) float32 side by side, bfloat16: third, second, first, first (rows,
    4, width), of which the first three make a product and the last three make dx with those of a
    gradient: first, second, first (rows, 3, width) with `backward`."""
    if not choose(kernel, t):
        return split_torch(t, backward)
    t, = contiguous(t)
    rows, width = t.shape
    out = torch.empty(rows, 3 if backward else 4, width, dtype=torch.bfloat16, device=t.device)
    if t.numel():
        _split_kernel[(ceil_div(t.numel(), 1024),)](t, out, t.numel(), width, backward, 1024,
                                                    num_warps=4)
    return out


@torch.library.custom_op("kernels::product32", mutates_args=())
def opaque_product32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """product32 as one operator: not every compiler knows the shape of mm with an out_dtype."""
    return product32(a, b)


@opaque_product32.register_fake
def _(a, b):
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


def product32(a, b):
    """a b of bfloat16 matrices, in float32. Off CUDA what tensor cores compute: exact products and
    float32 sums."""
    if torch.compiler.is_compiling():
        return opaque_product32(a, b)
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class LinearByParts(torch.autograd.Function):
    """F.linear(x.float(), weight) of x (N, d) bfloat16 and weight (E, d) float32 -> (N, E) float32.
    Saves x and 8 E d bytes of parts, where F.linear saves a float32 copy of x."""

    @staticmethod
    def forward(ctx, x, weight, kernel=None):
        (N, d), E = x.shape, len(weight)
        # As one row the whole matrix is split into four, which lie below each other: (4 E, d).
        parts = split(weight.reshape(1, -1), kernel=kernel).view(4 * E, d)
        ctx.save_for_backward(x, parts)
        ctx.kernel = kernel
        # Few outputs: the parts are outputs side by side, which are then added, 24 E bytes of
        # traffic a token. Many: they are inputs side by side, and x is copied, 12 d bytes.
        if 2 * E < d:
            return product32(x, parts[:3 * E].T).view(N, 3, E).sum(1)
        rows = parts[:3 * E].view(3, E, d).transpose(0, 1).reshape(E, 3 * d)
        return product32(x.repeat(1, 3), rows.T)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, parts = ctx.saved_tensors
        E = dy.shape[1]
        dy = split(dy, backward=True, kernel=ctx.kernel).view(-1, 3 * E)
        # (first, second, first) of dy with (second, first, first) of W
        dx = torch.mm(dy, parts[E:]) if ctx.needs_input_grad[0] else None
        # (first, second) of dy
        d_weight = product32(dy[:, :2 * E].T, x).view(2, E, -1).sum(0)
        return dx, d_weight, None


def pays_by_parts(x, weight):
    """Whether linear32 takes parts for x (N, d) and weight (E, d). On an H100 they took 0.44 ms and
    float32 took 0.77, forward and backward, for a router with N 40,960, d 768, E 128. The rest of
    the rule is reckoned: below 2^22 numbers in x, two more launches cost more than the copies of x
    in float32; bfloat16 products want rows of whole 16 bytes."""
    return (x.is_cuda and x.dtype == torch.bfloat16 and weight.dtype == torch.float32
            and use_triton(x) and x.numel() >= 2 ** 22
            and x.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0)


def linear32(x, weight, bias=None):
    """x W^T + bias in the dtype of the weights, float32: x (N, d), weight (E, d) -> (N, E)."""
    if bias is None and pays_by_parts(x, weight):
        return LinearByParts.apply(x, weight)
    return F.linear(x.to(weight.dtype), weight, bias)
