"""The Triton kernels of the MoE layer, each beside its twin, and the two Functions that run all
experts.

Letters: N tokens, d width, E experts, w hidden width of an expert, k choices per token, P = N k
pairs (a token at one of its experts). The rules of all kernels (deterministic, no synchronisation,
compile) stand in kernels/__init__.py.

"Expert order" is the stable sort of the flat pairs by expert. Sorted position p holds pair
order[p], which belongs to token order[p] // k; inverse[order[p]] = p. P is below 2^31, because the
ends of the experts' groups are int32 for F.grouped_mm.
"""

import torch
import torch.nn.functional as F

from kernels.common import (ACTIVATION_GRADS, ACTIVATIONS, activate, aten, ceil_div, choose,
                            contiguous, power_of_2, tl, triton, use_triton)


# ---- tokens into expert order and back ----
# One program moves a tile of 8 or 16 rows by up to 256 columns with 4 warps. A warp reads 512
# contiguous bytes of a bfloat16 row, 16 bytes a thread, and has several rows in flight. 256 divides
# 768, 1024 and 1280, so that few lanes idle.

def tile_grid(rows, width, block_rows):
    """(grid, (block_rows, block_columns)) for an array (rows, width) that is cut by `tile`."""
    block_columns = min(256, power_of_2(width))
    tiles = ceil_div(rows, block_rows) * ceil_div(width, block_columns)
    return (tiles,), (block_rows, block_columns)


@triton.jit
def tile(ROWS, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's rows (BLOCK_R,) and columns (BLOCK_C,) of an array (ROWS, WIDTH), a mask of
    the rows and a mask of the elements. Limit: the grid takes 2^31 - 1 tiles."""
    # Neighbouring programs take the tiles of one block of rows: whole rows are read together.
    tiles_per_row = tl.cdiv(WIDTH, BLOCK_C)
    # Rows are int64 from here on, because row * width passes 2^31 at real sizes.
    row = (tl.program_id(0) // tiles_per_row).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = (tl.program_id(0) % tiles_per_row) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = row < ROWS
    mask = live[:, None] & (col < WIDTH)[None, :]
    return row, col, live, mask


def permute_torch(x, order, k):
    return x.index_select(0, order // k)


@triton.jit
def _permute_kernel(X, ORDER, OUT, P, K: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
                    BLOCK_C: tl.constexpr):
    """A tile of OUT per program, in registers only between its read and its write.
    Traffic: Pd elements written; Pd read, k times from the same Nd.
    Limits: offsets are 64-bit; at most 2^31 - 1 tiles."""
    row, col, live, mask = tile(P, D, BLOCK_R, BLOCK_C)
    # Which token each sorted position holds                                            (BLOCK_R,)
    token = tl.load(ORDER + row, mask=live, other=0).to(tl.int64) // K
    # Its part of the row, copied                                              (BLOCK_R, BLOCK_C)
    x = tl.load(X + token[:, None] * D + col, mask=mask)
    tl.store(OUT + row[:, None] * D + col, x, mask=mask)


def permute(x, order, k, kernel=None):
    """Rows of x (N, d) in expert order: out[p] = x[order[p] // k], (P, d). Its backward is
    `unpermute`."""
    if not choose(kernel, x):
        return permute_torch(x, order, k)
    x, order = contiguous(x, order)
    P, d = len(order), x.shape[1]
    out = x.new_empty(P, d)
    if out.numel():
        grid, blocks = tile_grid(P, d, 16)
        _permute_kernel[grid](x, order, out, P, k, d, *blocks, num_warps=4)
    return out


def unpermute_torch(y, inverse, k):
    # embedding_bag sums k gathered rows in one pass, float32 inside, and never makes (N, k, d). A
    # CPU does it in half the time of index_add and a sixth of index_select().view().sum().
    return F.embedding_bag(inverse.view(-1, k), y, mode="sum")


@triton.jit
def _unpermute_kernel(Y, INVERSE, OUT, N, K: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
                      BLOCK_C: tl.constexpr):
    """A tile of OUT per program, summed in float32 registers in the order of the token's choices.
    Traffic: Pd elements read once, Nd written once.
    Limits: offsets are 64-bit; at most 2^31 - 1 tiles."""
    row, col, live, mask = tile(N, D, BLOCK_R, BLOCK_C)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    # The loop is unrolled, so that the k reads do not wait for each other.
    for j in tl.static_range(K):
        # Where choice j of each token lies in expert order                             (BLOCK_R,)
        p = tl.load(INVERSE + row * K + j, mask=live, other=0).to(tl.int64)
        total += tl.load(Y + p[:, None] * D + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + row[:, None] * D + col, total.to(OUT.dtype.element_ty), mask=mask)


def unpermute(y, inverse, k, kernel=None):
    """Sum of each token's k rows: out[n] = sum_j y[inverse[n k + j]], y (P, d) -> (N, d). Its
    backward is `permute`. The routing weights are already in y: see `gated_activation`."""
    if not choose(kernel, y):
        return unpermute_torch(y, inverse, k)
    y, inverse = contiguous(y, inverse)
    N, d = len(inverse) // k, y.shape[1]
    out = y.new_empty(N, d)
    if out.numel():
        grid, blocks = tile_grid(N, d, 8)
        _unpermute_kernel[grid](y, inverse, out, N, k, d, *blocks, num_warps=4)
    return out


def invert_torch(order):
    position = torch.arange(order.numel(), dtype=torch.int32, device=order.device)
    return order.int(), torch.empty_like(position).scatter_(0, order, position)


@triton.jit
def _invert_kernel(ORDER, SHORT, INVERSE, P, BLOCK: tl.constexpr):
    """A block of positions per program. Each writes one element of INVERSE, and no two the same.
    Limits: offsets are 64-bit; values are below 2^31."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = p < P
    pair = tl.load(ORDER + p, mask=live, other=0)
    tl.store(SHORT + p, pair.to(tl.int32), mask=live)
    tl.store(INVERSE + pair, p.to(tl.int32), mask=live)


def invert(order, kernel=None):
    """order (P,) int64, a permutation -> order and inverse, inverse[order[p]] = p, as int32: what
    `permute` and `unpermute` read, in half the bytes."""
    if not choose(kernel, order):
        return invert_torch(order)
    order, = contiguous(order)
    short = torch.empty_like(order, dtype=torch.int32)
    inverse = torch.empty_like(short)
    if len(order):
        _invert_kernel[(ceil_div(len(order), 1024),)](order, short, inverse, len(order), 1024,
                                                      num_warps=4)
    return short, inverse


# ---- the activation with the routing weight folded in ----
# W_out (p act(h)) = p W_out act(h) for an expert without bias and a routing weight p. With the
# weight here, the router's gradient is a dot product over w instead of d, and no expert output
# (P, d) has to be saved for it. "swiglu" is silu(gate) * up; a row of h is then [gate | up].

def gated_activation_torch(h, weight, activation):
    column = weight.to(h.dtype).unsqueeze(1)                                            # (P, 1)
    if activation == "swiglu":
        gate, up = h.chunk(2, -1)                                                      # (P, w) each
        return F.silu(gate).mul_(up).mul_(column)
    return ACTIVATIONS[activation](h).mul_(column)


@triton.jit
def _gated_activation_kernel(H, WEIGHT, A, P, W: tl.constexpr, ACT: tl.constexpr,
                             BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of A per program, computed in float32 registers and rounded once.
    Traffic: 3Pw elements with swiglu, else 2Pw.
    Limits: offsets are 64-bit; at most 2^31 - 1 tiles."""
    row, col, live, mask = tile(P, W, BLOCK_R, BLOCK_C)
    GATED: tl.constexpr = ACT == "swiglu"
    H_WIDTH: tl.constexpr = 2 * W if GATED else W
    # The pre-activation, or its gate half                                     (BLOCK_R, BLOCK_C)
    h = H + row[:, None] * H_WIDTH + col
    value, _ = activate(tl.load(h, mask=mask, other=0.0).to(tl.float32), "silu" if GATED else ACT)
    # times its up half, which lies w elements further,
    if GATED:
        value *= tl.load(h + W, mask=mask, other=0.0).to(tl.float32)
    # times the routing weight of the pair.
    value *= tl.load(WEIGHT + row, mask=live, other=0.0).to(tl.float32)[:, None]
    tl.store(A + row[:, None] * W + col, value.to(A.dtype.element_ty), mask=mask)


def gated_activation(h, weight, activation, kernel=None):
    """a = weight[:, None] * act(h), (P, w) in h's dtype. h is (P, w), or (P, 2w) = [gate | up] for
    "swiglu"; weight is (P,) float32. activation: swiglu | gelu (exact) | silu | relu | relu2."""
    if not choose(kernel, h, weight):
        return gated_activation_torch(h, weight, activation)
    h, weight = contiguous(h, weight)
    P = len(h)
    w = h.shape[1] // 2 if activation == "swiglu" else h.shape[1]
    a = h.new_empty(P, w)
    if a.numel():
        grid, blocks = tile_grid(P, w, 8)
        _gated_activation_kernel[grid](h, weight, a, P, w, activation, *blocks, num_warps=4)
    return a


def gated_activation_backward_torch(da, h, weight, activation):
    # A CPU takes blocks of rows whose temporaries stay in a core's cache. That halves the time,
    # because fresh large memory costs more in page faults than the arithmetic. A GPU and a compiler
    # take all rows at once.
    rows = 2**18 // max(1, da.shape[1])
    if da.is_cuda or torch.compiler.is_compiling():
        rows = len(da)
    step = max(1, rows)
    column = weight.to(h.dtype).unsqueeze(1)                                            # (P, 1)
    dh = torch.empty_like(h)
    blocks = zip(da.split(step), h.split(step), column.split(step), dh.split(step))
    d_weight = torch.cat([_gated_backward_block(*block, activation) for block in blocks])
    return dh, d_weight, da


def _gated_backward_block(da, h, weight, dh, activation):
    """Writes the gradient of h into dh and weight * act(h) over da; weight is (rows, 1). Returns
    the gradient of weight, (rows,)."""
    d = da * weight                                                # gradient of act(h), (rows, w)
    if activation == "swiglu":
        gate, up = h.chunk(2, -1)
        d_gate, d_up = dh.chunk(2, -1)
        a = F.silu(gate)
        # Not out=d_up: a compiler refuses to write into half a row.
        d_up.copy_(a).mul_(d)
        d_gate.copy_(aten.silu_backward(d.mul_(up), gate))
        a.mul_(up)
    else:
        a = ACTIVATIONS[activation](h)
        dh.copy_(ACTIVATION_GRADS[activation](d, h))
    # The weight multiplies the row act(h), so that its gradient is the dot product with da.
    wide = torch.promote_types(da.dtype, torch.float32)
    d_weight = torch.mul(da, a, out=d).sum(-1, dtype=wide)
    torch.mul(a, weight, out=da)
    return d_weight


@triton.jit
def _gated_activation_backward_kernel(DA, H, WEIGHT, DH, DWEIGHT, P, W: tl.constexpr,
                                      ACT: tl.constexpr, BLOCK_R: tl.constexpr,
                                      BLOCK_C: tl.constexpr):
    """BLOCK_R whole rows per program, BLOCK_C columns at a time: the row sum of DWEIGHT stays in
    registers and has one writer. The activation is written over DA, each element after its own
    read.
    Traffic: 6Pw elements with swiglu, else 4Pw.
    Limits: offsets are 64-bit; at most 2^31 - 1 blocks of rows."""
    GATED: tl.constexpr = ACT == "swiglu"
    H_WIDTH: tl.constexpr = 2 * W if GATED else W
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < P
    weight = tl.load(WEIGHT + row, mask=live, other=0.0).to(tl.float32)[:, None]
    # da * act(h), summed over the columns once, after the loop               (BLOCK_R, BLOCK_C)
    products = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in tl.range(0, W, BLOCK_C):
        col = start + tl.arange(0, BLOCK_C)
        mask = live[:, None] & (col < W)[None, :]
        at = row[:, None] * H_WIDTH + col
        a = DA + row[:, None] * W + col
        h = H + at
        dh = DH + at
        # The activation and its slope again, from the saved pre-activation
        da = tl.load(a, mask=mask, other=0.0).to(tl.float32)
        pre = tl.load(h, mask=mask, other=0.0).to(tl.float32)
        value, slope = activate(pre, "silu" if GATED else ACT)
        if GATED:
            # a = weight silu(gate) up: the gradient of up here, and `up` into value and slope
            up = tl.load(h + W, mask=mask, other=0.0).to(tl.float32)
            tl.store(dh + W, (da * weight * value).to(DH.dtype.element_ty), mask=mask)
            value = value * up
            slope = slope * up
        products += da * value
        tl.store(dh, (da * weight * slope).to(DH.dtype.element_ty), mask=mask)
        tl.store(a, (value * weight).to(DA.dtype.element_ty), mask=mask)
    tl.store(DWEIGHT + row, tl.sum(products, 1), mask=live)


def gated_activation_backward(da, h, weight, activation, kernel=None):
    """One pass over da (P, w) and h -> dh (like h), d_weight (P,) float32, and a (P, w), the
    activation again, for the weight gradient of the second matrix. `da` is consumed: a takes its
    memory."""
    if not choose(kernel, da, h, weight):
        return gated_activation_backward_torch(da, h, weight, activation)
    da, h, weight = contiguous(da, h, weight)
    P, w = da.shape
    dh = torch.empty_like(h)
    d_weight = torch.empty_like(weight, dtype=torch.float32)
    if P:
        block_columns = min(256, power_of_2(w))
        _gated_activation_backward_kernel[(ceil_div(P, 8),)](
            da, h, weight, dh, d_weight, P, w, activation, 8, block_columns, num_warps=4)
    return dh, d_weight, da


# ---- the whole path: products grouped by expert ----

@torch.library.custom_op("kernels::grouped_product", mutates_args=())
def opaque_product(a: torch.Tensor, b: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """F.grouped_mm as one operator that a compiler does not look into."""
    return F.grouped_mm(a, b, offs=ends)


@opaque_product.register_fake
def _(a, b, ends):
    # The two forms of grouped_product
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(ends.shape[0], a.shape[0], b.shape[1])


def grouped_product(a, b, ends):
    """F.grouped_mm, in every dtype that it has: its groups end at `ends` (E,) int32. a (P, in) and
    b (E, in, out) -> (P, out); a (rows, P) and b (P, columns) -> (E, rows, columns)."""
    # The compiler's own shape function of F.grouped_mm refuses all but bfloat16. Elsewhere the
    # operator would only cost a dispatch.
    if torch.compiler.is_compiling() and a.dtype != torch.bfloat16:
        return opaque_product(a, b, ends)
    return F.grouped_mm(a, b, offs=ends)


class GroupedExperts(torch.autograd.Function):
    """y = sum over a token's pairs of weight W_out act(W_in x), products grouped by expert.

    x (N, d), w_in (E, w or 2w, d), w_out (E, d, w), weight (P,) float32, order, inverse and token
    (P,), offsets (E,) int32 the ends of the groups -> y (N, d). weight, order and token are in
    expert order: see `expert_order` in kernels/order.py. k is 0 where tokens differ in their number
    of experts.

    Saves x, the pre-activation, the weights and the order; backward gathers the rows and applies
    the activation again. Autograd would also keep both of them and the parts of the activation: 3.6
    times the memory (N 2048, d 256, w 128, E 32, k 4; see lab/bench.py moe). With `fused` the
    Triton kernels move the rows and apply the activation; they go by the order and its inverse,
    int32, in the place of the tokens. Without, no Triton is involved here.
    """

    @staticmethod
    def forward(ctx, x, w_in, w_out, weight, order, inverse, token, offsets, k, activation, fused):
        kernel = fused and use_triton(x)
        # The kernels that move rows need the same k for every token; expert choice has none, k = 0.
        if fused and k:
            token = None
        else:
            order = inverse = None
        # 1. Gather the rows and multiply by the first matrices -> h (P, w or 2w). The gathered rows
        #    (P, d) get no name, so that Python frees them when the product is done. The
        #    outputs of the experts in step 3 have none either.
        h = grouped_product(gather(x, order, token, k), w_in.transpose(1, 2), offsets)
        # 2. Activate and weight: h (P, w or 2w) -> a (P, w).
        a = gated_activation(h, weight, activation, kernel)
        # 3. Multiply by the second matrices and bring the outputs home: (P, d) -> (N, d).
        y = combine(grouped_product(a, w_out.transpose(1, 2), offsets), x.shape[0], inverse, token, k)
        ctx.save_for_backward(x, w_in, w_out, weight, order, inverse, token, offsets, h)
        ctx.k = k
        ctx.activation = activation
        ctx.fused = fused
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w_in, w_out, weight, order, inverse, token, offsets, h = ctx.saved_tensors
        k = ctx.k
        dy = dy.contiguous()
        kernel = ctx.fused and use_triton(dy)
        # 3. backwards: each pair gets its token's gradient.
        d_rows = gather(dy, order, token, k)                                            # (P, d)
        da = grouped_product(d_rows, w_out, offsets)                                    # (P, w)
        # 2. backwards, which also makes the activation again, in the memory of da.
        dh, d_weight, a = gated_activation_backward(da, h, weight, ctx.activation, kernel)
        d_w_out = grouped_product(d_rows.T, a, offsets)                                 # (E, d, w)
        # Free three (P, .) tensors before the rows of x are gathered again.
        del d_rows, da, a
        # 1. backwards.
        d_w_in = grouped_product(dh.T, gather(x, order, token, k), offsets)
        dx = combine(grouped_product(dh, w_in, offsets), x.shape[0], inverse, token, k)
        return dx, d_w_in, d_w_out, d_weight, None, None, None, None, None, None, None


class ExpertByExpert(torch.autograd.Function):
    """GroupedExperts for a CPU, where F.grouped_mm is a loop of products. Here the loop is outside:
    the rows of one expert are gathered, transformed and added home while they are in cache, and no
    (P, d) tensor is ever allocated.

    Arguments, result and saved tensors are those of GroupedExperts. Reads the offsets on the host,
    which costs nothing on a CPU. For float32 and experts with much to do: see moe.pays_by_expert.
    """

    @staticmethod
    def forward(ctx, x, w_in, w_out, weight, order, inverse, token, offsets, k, activation, fused):
        y = torch.zeros_like(x)
        h = x.new_empty(token.numel(), w_in.shape[1])                                 # (P, w or 2w)
        for e, rows in enumerate(groups(offsets)):
            # The rows of expert e, its first matrix, the activation, its second matrix, and home
            torch.mm(x.index_select(0, token[rows]), w_in[e].T, out=h[rows])
            a = gated_activation(h[rows], weight[rows], activation, kernel=False)
            y.index_add_(0, token[rows], a @ w_out[e].T)
        ctx.save_for_backward(x, w_in, w_out, weight, token, offsets, h)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, dy):
        x, w_in, w_out, weight, token, offsets, h = ctx.saved_tensors
        dx = torch.zeros_like(x)
        d_w_in = torch.empty_like(w_in)
        d_w_out = torch.empty_like(w_out)
        d_weight = torch.empty_like(weight)
        for e, rows in enumerate(groups(offsets)):
            d_rows = dy.index_select(0, token[rows])                                    # (rows, d)
            dh, d_weight[rows], a = gated_activation_backward(
                d_rows @ w_out[e], h[rows], weight[rows], ctx.activation, kernel=False)
            # An expert without rows gets zeros: a product over no rows.
            torch.mm(d_rows.T, a, out=d_w_out[e])
            torch.mm(dh.T, x.index_select(0, token[rows]), out=d_w_in[e])
            dx.index_add_(0, token[rows], dh @ w_in[e])
        return dx, d_w_in, d_w_out, d_weight, None, None, None, None, None, None, None


def groups(offsets):
    """Slices of the sorted pairs, one per expert, from the ends of the groups."""
    ends = offsets.tolist()
    return [slice(start, end) for start, end in zip([0] + ends, ends)]


def gather(x, order, token, k):
    """Rows of x (N, d) in expert order, (P, d): by the kernel where `token` is None."""
    if token is None:
        return permute(x, order, k)
    return x.index_select(0, token)


def combine(rows, n_token, inverse, token, k):
    """Sum of each token's rows: (P, d) in expert order -> (N, d), by the kernel likewise."""
    if token is None:
        return unpermute(rows, inverse, k)
    # Not index_add_: torch 2.11's compiler loses the gradient of a Function that returns it.
    return rows.new_zeros(n_token, rows.shape[1]).index_add(0, token, rows)


def pick_function(x, token, experts, fused):
    """ExpertByExpert where that is the faster one (python -m lab.bench moe), else GroupedExperts:
    eager float32 on a CPU, and more than 2^25 multiplications in an expert's first product. Below,
    its dozen calls for each expert cost more than they save."""
    if fused or x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return GroupedExperts
    E, rows, d = experts.w_in.shape
    return ExpertByExpert if token.numel() * rows * d > E * 2 ** 25 else GroupedExperts


def grouped_refusal(experts, dtype):
    """Why the grouped paths cannot run these experts in `dtype`, or an empty text: rows must be multiples of
    16 bytes, and the activation's gradient must be known."""
    per_row = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 4}.get(dtype)
    d, width = experts.w_out.shape[1:]
    if per_row is None:
        return f"F.grouped_mm has no {dtype}"
    if d % per_row or width % per_row:
        return f"widths n_embd = {d} and expert {width} must be multiples of {per_row} in {str(dtype)[6:]}"
    if experts.activation not in ("swiglu", *ACTIVATION_GRADS):
        return f"kernels/common.py has no gradient of {experts.activation}"
    return ""
