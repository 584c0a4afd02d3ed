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

from kernels.common import (ACTIVATION_GRADS, ACTIVATIONS, activate, aten, ceil_div, choose, contiguous, power_of_2,
                            tl, triton)


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


# ---- the whole path: products grouped by expert ----


class GroupedExperts(torch.autograd.Function):
    """y = sum over pairs of p W2 act(W1 x), pairs sorted by expert, products grouped by expert.

    Saves x, the pre-activation, the gates and the order; the gathered rows and the activation are made again
    in backward. Written as a Function because autograd would also keep both of them and the activation's
    parts: 3.6 times the memory (T2048 d256 n128 E32 k4, see lab/bench.py moe). With `fused`, the Triton
    kernels move the rows and apply the activation; without, no Triton is involved.
    """

    @staticmethod
    def forward(ctx, x, w_in, w_out, gate, order, token, offsets, k, activation, fused):
        # The gathered rows, (P, d), have no name, so that they are gone when the next are made; so below.
        h = F.grouped_mm(gather(x, order, token, k, fused), w_in.transpose(1, 2), offs=offsets)  # (P, (2)n)
        a = gated_activation(h, gate, activation, kernel(fused))                           # (P, n), weighted
        y = combine(F.grouped_mm(a, w_out.transpose(1, 2), offs=offsets), x.shape[0], order, token, k, fused)
        ctx.save_for_backward(x, w_in, w_out, gate, order, token, offsets, h)
        ctx.k, ctx.activation, ctx.fused = k, activation, fused
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w_in, w_out, gate, order, token, offsets, h = ctx.saved_tensors
        k, fused = ctx.k, ctx.fused
        dy = dy.contiguous()
        d_rows = gather(dy, order, token, k, fused)                                        # (P, d)
        da = F.grouped_mm(d_rows, w_out, offs=offsets)                                     # (P, n)
        dh, d_gate, a = gated_activation_backward(da, h, gate, ctx.activation, kernel(fused))
        d_w_out = F.grouped_mm(d_rows.T, a, offs=offsets)                                  # (E, d, n)
        del d_rows, da, a
        d_w_in = F.grouped_mm(dh.T, gather(x, order, token, k, fused), offs=offsets)       # (E, n or 2n, d)
        dx = combine(F.grouped_mm(dh, w_in, offs=offsets), x.shape[0], order, token, k, fused)
        return dx, d_w_in, d_w_out, d_gate, None, None, None, None, None, None


class ExpertByExpert(torch.autograd.Function):
    """GroupedExperts for a CPU, where F.grouped_mm is a loop of products anyway: with the loop out here, the
    rows of one expert are gathered, transformed and added home while they are in cache, and no (P, d) tensor
    is ever allocated. Saves the same tensors. Reads the offsets, which costs nothing on a CPU. For float32
    and experts with much to do: see pays_by_expert.
    """

    @staticmethod
    def forward(ctx, x, w_in, w_out, gate, order, token, offsets, k, activation, fused):
        y, h = torch.zeros_like(x), x.new_empty(token.numel(), w_in.shape[1])
        for e, rows in enumerate(groups(offsets)):
            torch.mm(x.index_select(0, token[rows]), w_in[e].T, out=h[rows])               # (rows, n or 2n)
            a = gated_activation(h[rows], gate[rows], activation, kernel=False)
            y.index_add_(0, token[rows], a @ w_out[e].T)
        ctx.save_for_backward(x, w_in, w_out, gate, token, offsets, h)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w_in, w_out, gate, token, offsets, h = ctx.saved_tensors
        dx, d_w_in, d_w_out, d_gate = torch.zeros_like(x), *map(torch.empty_like, (w_in, w_out, gate))
        for e, rows in enumerate(groups(offsets)):
            d_rows = dy.index_select(0, token[rows])
            dh, d_gate[rows], a = gated_activation_backward(d_rows @ w_out[e], h[rows], gate[rows],
                                                            ctx.activation, kernel=False)
            torch.mm(d_rows.T, a, out=d_w_out[e])                                          # zeros for no rows
            torch.mm(dh.T, x.index_select(0, token[rows]), out=d_w_in[e])
            dx.index_add_(0, token[rows], dh @ w_in[e])
        return dx, d_w_in, d_w_out, d_gate, None, None, None, None, None, None


def groups(offsets):
    """Slices of the sorted pairs, one per expert, from the ends of the groups."""
    ends = offsets.tolist()
    return [slice(start, end) for start, end in zip([0] + ends, ends)]


def kernel(fused):
    """Argument of the functions of kernels.py: their own rule, or never."""
    return None if fused else False


def gather(x, order, token, k, fused):
    """Rows of x (N, d) in expert order, (P, d). The kernels need the same k for every token, which expert
    choice (k = 0) does not have."""
    return permute(x, order, k) if fused and k else x.index_select(0, token)


def combine(rows, n_token, order, token, k, fused):
    """Sum of each token's rows, (P, d) in expert order -> (N, d)."""
    if fused and k:
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        return unpermute(rows, inverse, k)
    # Not index_add_: torch 2.11's compiler loses the gradient of a Function that returns it.
    return rows.new_zeros(n_token, rows.shape[1]).index_add(0, token, rows)
