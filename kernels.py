"""The Triton kernels of the MoE layer, each beside the plain PyTorch function it must equal.

Imports, and runs the twins, without Triton. PEER's kernels are in kernels_peer.py.

    name_torch(...)    the twin: plain PyTorch, any device, any float dtype; defines what is computed
    _name_kernel       the Triton kernel: float32 or bfloat16 in and out, float32 inside
    name(...)          what other files call: allocates, and picks one of the two by `use_triton`

Letters: T tokens, d model width, n hidden width of an expert, k experts per token, P = T*k pairs (a token
at one of its experts). "Expert order" is the stable sort of the flat pairs by expert: sorted position p
holds pair order[p], of token order[p] // k; inverse[order[p]] = p.

Deterministic: each output element is written by one program, which adds in a fixed order; nothing is atomic.
No synchronisation, no recompile: a launch is shaped by T, P and N alone, never by the loads of the experts.
Compile: a launch is plain `kernel[grid](...)`, the simplest of PyTorch's ways. torch.compile puts it into its
    graph (no graph break) and reads from the kernel itself which arguments it writes, so that it copies none.
    A custom operator would add dispatch in eager mode and hide the launch from Inductor.
Autograd: none here. Every gradient is one of these functions too; moe.py and peer.py tie the two together.
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


# ---- tokens into expert order and back ----
# One program moves a tile of 8 or 16 rows by up to 256 columns with 4 warps: a warp reads 512 contiguous
# bytes of a bf16 row, 16 a thread, several rows in flight. 256 divides 768, 1024 and 1280, so that few
# lanes idle. Neighbouring programs take the tiles of one block of rows, so that whole rows stay together.

def tile_grid(rows, width, block_rows):
    """grid, (block_rows, block_columns) for an array (rows, width)."""
    block_columns = min(256, power_of_2(width))
    return (ceil_div(rows, block_rows) * ceil_div(width, block_columns),), (block_rows, block_columns)


@triton.jit
def tile(ROWS, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's rows (BLOCK_R,), columns (BLOCK_C,), and masks of rows and of elements. Rows are int64:
    row * width passes 2**31 at real sizes."""
    tiles = tl.cdiv(WIDTH, BLOCK_C)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    return row, col, row < ROWS, (row < ROWS)[:, None] & (col < WIDTH)[None, :]


def permute_torch(x, order, k):
    return x.index_select(0, order // k)


@triton.jit
def _permute_kernel(X, ORDER, OUT, P, K: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
                    BLOCK_C: tl.constexpr):
    """A tile of OUT per program, in registers only between its read and its write.
    Traffic: Pd elements written; Pd read, k times from the same Td."""
    row, col, live, mask = tile(P, D, BLOCK_R, BLOCK_C)
    token = tl.load(ORDER + row, mask=live, other=0).to(tl.int64) // K
    tl.store(OUT + row[:, None] * D + col, tl.load(X + token[:, None] * D + col, mask=mask), mask=mask)


def permute(x, order, k, kernel=None):
    """Rows of x (T, d) in expert order: out[p] = x[order[p] // k], (P, d). Its backward is `unpermute`."""
    if not choose(kernel, x):
        return permute_torch(x, order, k)
    x, order = contiguous(x, order)
    out = x.new_empty(len(order), x.shape[1])
    if out.numel():
        grid, blocks = tile_grid(*out.shape, 16)
        _permute_kernel[grid](x, order, out, len(order), k, x.shape[1], *blocks, num_warps=4)
    return out


def unpermute_torch(y, inverse, k):
    # embedding_bag is the sum of k gathered rows: one pass, float32 inside, and (T, k, d) never exists; a
    # CPU does it in half the time of index_add and a sixth of index_select().view().sum()
    return F.embedding_bag(inverse.view(-1, k), y, mode="sum")


@triton.jit
def _unpermute_kernel(Y, INVERSE, OUT, T, K: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
                      BLOCK_C: tl.constexpr):
    """A tile of OUT per program, summed in float32 registers in the order of the token's choices.
    Traffic: Pd elements read once, Td written once."""
    row, col, live, mask = tile(T, D, BLOCK_R, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for j in tl.static_range(K):  # unrolled, so that the k reads do not wait for each other
        p = tl.load(INVERSE + row * K + j, mask=live, other=0).to(tl.int64)
        total += tl.load(Y + p[:, None] * D + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + row[:, None] * D + col, total.to(OUT.dtype.element_ty), mask=mask)


def unpermute(y, inverse, k, kernel=None):
    """Sum of each token's k rows: out[t] = sum_j y[inverse[t*k + j]], y (P, d) -> (T, d). Its backward is
    `permute`. The routing weights are already in y: see `gated_activation`."""
    if not choose(kernel, y):
        return unpermute_torch(y, inverse, k)
    y, inverse = contiguous(y, inverse)
    out = y.new_empty(len(inverse) // k, y.shape[1])
    if out.numel():
        grid, blocks = tile_grid(*out.shape, 8)
        _unpermute_kernel[grid](y, inverse, out, len(out), k, y.shape[1], *blocks, num_warps=4)
    return out


# ---- the activation with the routing weight folded in ----
# W2 (w act(h)) = w W2 act(h) for experts without bias. Weighting here makes the router's gradient a dot
# product over n instead of d, and no expert output (P, d) has to be saved for it.

def gated_activation_torch(h, weight, activation):
    w = weight.to(h.dtype).unsqueeze(1)
    if activation != "swiglu":
        return ACTIVATIONS[activation](h).mul_(w)
    gate, up = h.chunk(2, -1)
    return F.silu(gate).mul_(up).mul_(w)


@triton.jit
def _gated_activation_kernel(H, WEIGHT, A, P, N: tl.constexpr, ACT: tl.constexpr, BLOCK_R: tl.constexpr,
                             BLOCK_C: tl.constexpr):
    """A tile of A per program, computed in float32 registers and rounded once.
    Traffic: 3Pn elements with swiglu, else 2Pn."""
    row, col, live, mask = tile(P, N, BLOCK_R, BLOCK_C)
    WIDTH: tl.constexpr = 2 * N if ACT == "swiglu" else N  # of a row of H: [gate | up], or the pre-activation
    h = H + row[:, None] * WIDTH + col
    value, _ = activate(tl.load(h, mask=mask, other=0.0).to(tl.float32), ACT)
    if ACT == "swiglu":
        value *= tl.load(h + N, mask=mask, other=0.0).to(tl.float32)
    value *= tl.load(WEIGHT + row, mask=live, other=0.0).to(tl.float32)[:, None]
    tl.store(A + row[:, None] * N + col, value.to(A.dtype.element_ty), mask=mask)


def gated_activation(h, weight, activation, kernel=None):
    """a = weight[:, None] * act(h): h (P, n), or (P, 2n) = [gate | up] for "swiglu", and weight (P,)
    float32 -> (P, n) in h's dtype. activation: swiglu | gelu (exact) | silu | relu | relu2."""
    if not choose(kernel, h, weight):
        return gated_activation_torch(h, weight, activation)
    h, weight = contiguous(h, weight)
    a = h.new_empty(len(h), h.shape[1] // (2 if activation == "swiglu" else 1))
    if a.numel():
        grid, blocks = tile_grid(*a.shape, 8)
        _gated_activation_kernel[grid](h, weight, a, *a.shape, activation, *blocks, num_warps=4)
    return a


def gated_activation_backward_torch(da, h, weight, activation):
    """In blocks of rows whose temporaries stay in a core's cache: that halves the time on a CPU, where fresh
    large memory costs more, in page faults, than the arithmetic. A GPU and a compiler want one block."""
    rows = len(da) if da.is_cuda or torch.compiler.is_compiling() else 2**18 // max(1, da.shape[1])
    dh, w = torch.empty_like(h), weight.to(h.dtype).unsqueeze(1)
    blocks = zip(*(t.split(max(1, rows)) for t in (da, h, w, dh)))
    return dh, torch.cat([_gated_backward_block(*block, activation) for block in blocks]), da


def _gated_backward_block(da, h, w, dh, activation):
    """Writes the gradient of h into dh and w * act(h) over da; returns the gradient of w (rows,)."""
    d = da * w
    if activation == "swiglu":
        (gate, up), (dgate, dup) = h.chunk(2, -1), dh.chunk(2, -1)
        a = F.silu(gate)
        dup.copy_(a).mul_(d)  # not out=dup: a compiler refuses to write into half a row
        dgate.copy_(aten.silu_backward(d.mul_(up), gate))
        a.mul_(up)
    else:
        a = ACTIVATIONS[activation](h)
        dh.copy_(ACTIVATION_GRADS[activation](d, h))
    dweight = torch.mul(da, a, out=d).sum(-1, dtype=torch.promote_types(da.dtype, torch.float32))
    torch.mul(a, w, out=da)
    return dweight


@triton.jit
def _gated_activation_backward_kernel(DA, H, WEIGHT, DH, DWEIGHT, P, N: tl.constexpr, ACT: tl.constexpr,
                                      BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """BLOCK_R whole rows per program, BLOCK_C columns at a time: dweight's row sum stays in registers and
    has one writer. A goes over DA, each element after its own read.
    Traffic: 6Pn elements with swiglu, else 4Pn."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    weight = tl.load(WEIGHT + row, mask=row < P, other=0.0).to(tl.float32)[:, None]
    WIDTH: tl.constexpr = 2 * N if ACT == "swiglu" else N
    products = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)  # summed over the columns once, after the loop
    for start in tl.range(0, N, BLOCK_C):
        col = start + tl.arange(0, BLOCK_C)
        mask = (row < P)[:, None] & (col < N)[None, :]
        at, a = row[:, None] * WIDTH + col, DA + row[:, None] * N + col
        h, dh = H + at, DH + at
        da = tl.load(a, mask=mask, other=0.0).to(tl.float32)
        value, slope = activate(tl.load(h, mask=mask, other=0.0).to(tl.float32), ACT)
        if ACT == "swiglu":
            up = tl.load(h + N, mask=mask, other=0.0).to(tl.float32)
            tl.store(dh + N, (da * weight * value).to(DH.dtype.element_ty), mask=mask)
            value, slope = value * up, slope * up
        products += da * value
        tl.store(dh, (da * weight * slope).to(DH.dtype.element_ty), mask=mask)
        tl.store(a, (value * weight).to(DA.dtype.element_ty), mask=mask)
    tl.store(DWEIGHT + row, tl.sum(products, 1), mask=row < P)


def gated_activation_backward(da, h, weight, activation, kernel=None):
    """One pass over da (P, n) and h -> dh (like h), dweight (P,) float32, and a (P, n), the activation
    again, for the weight gradient of the down projection. `da` is consumed: a takes its memory."""
    if not choose(kernel, da, h, weight):
        return gated_activation_backward_torch(da, h, weight, activation)
    da, h, weight = contiguous(da, h, weight)
    dh, dweight = torch.empty_like(h), torch.empty_like(weight, dtype=torch.float32)
    if len(da):
        block = min(256, power_of_2(da.shape[1]))
        _gated_activation_backward_kernel[(ceil_div(len(da), 8),)](
            da, h, weight, dh, dweight, *da.shape, activation, 8, block, num_warps=4)
    return dh, dweight, da
