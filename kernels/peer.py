"""The Triton kernels of PEER (2407.04153), each beside its twin, and the same passes without
Triton.

Letters: N tokens, d width, E experts of one neuron each (E = m^2), h heads, k choices per head,
R = h k rows per token, P = N R pairs. The rules of all kernels stand in kernels/__init__.py.

The table (E, 2, d) holds u_e and v_e side by side: one index, one contiguous read of 2d elements.
idx (N, R) holds the experts of each token and gate (N, R) float32 their router weights:

    h[n, r] = x[n] . u[idx[n, r]]        y[n] = sum_r act(h[n, r]) gate[n, r] v[idx[n, r]]

An element that is read takes part in one multiply-add, so that the time is that of the reads. The
three passes together read the table twice in token order, write its gradient once, and never hold
anything of size (N, R, d).

A width that is no power of 2 is padded to one by masks. How many rows and warps a program gets: see
`launch_shape`.
"""

import torch
import torch.nn.functional as F

from kernels.common import (ACTIVATION_GRADS, ACTIVATIONS, activate, ceil_div, choose, contiguous,
                            power_of_2, slices, tl, triton, use_triton)


def launch_shape(d, itemsize, rows, warp_bytes):
    """((rows that a program holds at a time, their padded width), warps) for rows of d elements:
    at most `rows` rows and 16 KiB; a warp for each `warp_bytes` of a row, 1 to 4 of them."""
    width = power_of_2(d)
    row_bytes = width * itemsize
    held = max(1, min(rows, 16384 // row_bytes))
    return (held, width), max(1, min(4, row_bytes // warp_bytes))


# A warp reads 512 bytes at once, 16 a thread. Warps beyond the number of such pieces in a row hold
# the same columns of other rows, and each step must then add up the warps' sums through shared
# memory, where all wait for all. Hence one warp for 512 bytes of a row, and 8 rows at a time, in
# the passes token by token, which have R rows to read. An expert has P / E pairs on average, often
# 2: of more rows at a time most would be masked, and one warp takes whole rows, up to 2 KiB. Wider
# ones get more warps, because one would run out of registers.
BY_TOKEN = 8, 512
BY_EXPERT = 2, 2048


def gather_rows(table, idx, dtype):
    """u, v (N, R, d): exactly what the kernels never hold."""
    rows = table.index_select(0, idx.flatten()).view(*idx.shape, *table.shape[1:])
    return rows.to(dtype).unbind(2)


# ---- forward ----

def peer_forward_torch(x, table, idx, gate, activation):
    wide = torch.promote_types(x.dtype, torch.float32)
    u, v = gather_rows(table, idx, wide)                                                # (N, R, d)
    h = torch.einsum("nd,nrd->nr", x.to(wide), u)
    a = ACTIVATIONS[activation](h) * gate                                               # (N, R)
    y = torch.einsum("nr,nrd->nd", a, v)
    return y.to(x.dtype), h


@triton.jit
def _peer_forward_kernel(X, TABLE, IDX, GATE, Y, H, D: tl.constexpr, R: tl.constexpr,
                         ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token per program: x and the sum y stay in float32 registers while its R rows stream by.
    Traffic: 2NRd elements of the table; x, y, idx, gate and h are small beside it.
    Limits: offsets are 64-bit; at most 2^31 - 1 tokens."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    x = tl.load(X + token * D + col, mask=col < D, other=0.0).to(tl.float32)
    y = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        live = r < R
        mask = live[:, None] & (col < D)[None, :]
        # Which expert each row belongs to; u and v lie side by side. Both reads are in flight
        # together.
        pair = token * R + r
        expert = tl.load(IDX + pair, mask=live, other=0).to(tl.int64)
        row = TABLE + expert[:, None] * (2 * D) + col
        u = tl.load(row, mask=mask, other=0.0)                               # (BLOCK_R, BLOCK_D)
        v = tl.load(row + D, mask=mask, other=0.0)
        # h = x . u, kept for backward                                                  (BLOCK_R,)
        h = tl.sum(u.to(tl.float32) * x, 1)
        tl.store(H + pair, h, mask=live)
        # y += act(h) gate v. A row beyond R has v = 0.
        value, _ = activate(h, ACT)
        a = value * tl.load(GATE + pair, mask=live, other=0.0)
        y += tl.sum(a[:, None] * v.to(tl.float32), 0)
    tl.store(Y + token * D + col, y.to(Y.dtype.element_ty), mask=col < D)


def peer_forward(x, table, idx, gate, activation, kernel=None):
    """x (N, d), table (E, 2, d), idx (N, R) integers in [0, E), gate (N, R) float32 -> y (N, d)
    and h (N, R) float32. activation: gelu (exact) | silu | relu | relu2. The backward needs x,
    table, idx, gate and h."""
    if not choose(kernel, x, table, gate):
        return peer_forward_torch(x, table, idx, gate, activation)
    x, table, idx, gate = contiguous(x, table, idx, gate)
    N, d = x.shape
    y = torch.empty_like(x)
    h = torch.empty_like(gate, dtype=torch.float32)
    if N:
        blocks, warps = launch_shape(d, table.element_size(), *BY_TOKEN)
        _peer_forward_kernel[(N,)](
            x, table, idx, gate, y, h, d, idx.shape[1], activation, *blocks, num_warps=warps)
    return y, h


# ---- backward, token by token ----

def peer_backward_tokens_torch(dy, table, idx, gate, h, activation):
    u, v = gather_rows(table, idx, h.dtype)                                             # (N, R, d)
    da = torch.einsum("nd,nrd->nr", dy.to(h.dtype), v)              # gradient of a = act(h) gate
    value = ACTIVATIONS[activation](h)
    dh = ACTIVATION_GRADS[activation](da * gate, h)
    dx = torch.einsum("nr,nrd->nd", dh, u)
    return dx.to(dy.dtype), dh, value * gate, da * value


@triton.jit
def _peer_backward_tokens_kernel(DY, TABLE, IDX, GATE, H, DX, DH, A, DGATE, D: tl.constexpr,
                                 R: tl.constexpr, ACT: tl.constexpr, BLOCK_R: tl.constexpr,
                                 BLOCK_D: tl.constexpr):
    """One token per program: dy and the sum dx stay in float32 registers while its R rows stream by
    again.
    Traffic: 2NRd elements of the table.
    Limits: offsets are 64-bit; at most 2^31 - 1 tokens."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    dy = tl.load(DY + token * D + col, mask=col < D, other=0.0).to(tl.float32)
    dx = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        live = r < R
        mask = live[:, None] & (col < D)[None, :]
        # The same rows as in the forward pass                               (BLOCK_R, BLOCK_D)
        pair = token * R + r
        expert = tl.load(IDX + pair, mask=live, other=0).to(tl.int64)
        row = TABLE + expert[:, None] * (2 * D) + col
        u = tl.load(row, mask=mask, other=0.0)
        v = tl.load(row + D, mask=mask, other=0.0)
        # a = act(h) gate multiplies v, so that its gradient is v . dy                  (BLOCK_R,)
        da = tl.sum(v.to(tl.float32) * dy, 1)
        gate = tl.load(GATE + pair, mask=live, other=0.0)
        value, slope = activate(tl.load(H + pair, mask=live, other=0.0), ACT)
        dh = da * gate * slope
        # dh and a are the weights of x and dy in the gradient of the table.
        tl.store(DH + pair, dh, mask=live)
        tl.store(A + pair, value * gate, mask=live)
        tl.store(DGATE + pair, da * value, mask=live)
        # h = x . u: dx += dh u. A row beyond R has u = 0.
        dx += tl.sum(dh[:, None] * u.to(tl.float32), 0)
    tl.store(DX + token * D + col, dx.to(DX.dtype.element_ty), mask=col < D)


def peer_backward_tokens(dy, table, idx, gate, h, activation, kernel=None):
    """dy (N, d) and what the forward pass saw -> dx (N, d) and, each (N, R) float32, dh the
    gradient of h, a = act(h) gate (for the table's gradient) and d_gate the gradient of the
    gates."""
    if not choose(kernel, dy, table, gate):
        return peer_backward_tokens_torch(dy, table, idx, gate, h, activation)
    dy, table, idx, gate, h = contiguous(dy, table, idx, gate, h)
    N, d = dy.shape
    dx = torch.empty_like(dy)
    dh = torch.empty_like(h)
    a = torch.empty_like(h)
    d_gate = torch.empty_like(h)
    if N:
        blocks, warps = launch_shape(d, table.element_size(), *BY_TOKEN)
        _peer_backward_tokens_kernel[(N,)](
            dy, table, idx, gate, h, dx, dh, a, d_gate, d, idx.shape[1], activation, *blocks,
            num_warps=warps)
    return dx, dh, a, d_gate


# ---- backward, expert by expert: the table's gradient ----
# PARTS 2: u gets dh x and v gets a dy. PARTS 1: a table (E, 1, d) of u alone gets dh x, and DY and
# A are not read. The sub-keys of product_keys.py are such a table.
#
# Routing can be skewed: an expert may have no pair, or most of them. One program per expert takes
# the expert's first SHARE pairs. The pairs beyond are its overflow. The sorted pairs are also cut
# into windows of SHARE positions. One program per window sums the overflow in it into one scratch
# row.
#
# One scratch row per window is enough, because at most one expert overflows into a window. Say that
# position q of a window is overflow of expert e. Then q is at least SHARE positions after e's first
# pair, and less than SHARE after the window's first position. So the window's first position comes
# after e's first pair and not after q: it belongs to e. One position has one owner. For the same
# reason nothing has to be searched for: the owner of the first position is the expert.

def sort_pairs(idx, n_expert):
    """order (P,) int64: the flat pairs of idx (N, R) in expert order; offsets (E + 1,) int64: where
    each expert begins."""
    # A radix sort pays by the digit: short numbers where E itself is one.
    if n_expert < 2 ** 15:
        idx = idx.to(torch.int16)
    experts, order = torch.sort(idx.flatten(), stable=True)
    bounds = torch.arange(n_expert + 1, dtype=experts.dtype, device=idx.device)
    return order, torch.searchsorted(experts, bounds)


def peer_backward_table_torch(x, dy, dh, a, idx, n_expert, out=None, accumulate=False):
    if out is None:
        out = torch.zeros(n_expert, 2, x.shape[1], dtype=dh.dtype, device=x.device)
    elif not accumulate:
        out.zero_()
    # u gets dh x, v gets a dy.
    for gradient, weight, rows in ((out[:, 0], dh, x), (out[:, 1], a, dy)):
        pairs = torch.einsum("nr,nd->nrd", weight, rows.to(weight.dtype)).flatten(0, 1)
        gradient.index_add_(0, idx.flatten(), pairs.to(out.dtype))
    return out


@triton.jit
def sum_pairs(X, DY, DH, A, ORDER, p, end, D: tl.constexpr, R: tl.constexpr, PARTS: tl.constexpr,
              BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums of dh x and of a dy (PARTS 1: zeros) over the sorted pairs p to end - 1, in order,
    float32. ORDER, p and end are int64."""
    col = tl.arange(0, BLOCK_D)
    du = tl.zeros([BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_D], tl.float32)
    # `while`, because Triton 3.6's interpreter cannot run a `for` with a bound read from memory
    # under NumPy 2.3 and later.
    while p < end:
        i = p + tl.arange(0, BLOCK_P)
        live = i < end
        mask = live[:, None] & (col < D)[None, :]
        # The pairs at these positions, int64, and the rows of their tokens    (BLOCK_P, BLOCK_D)
        pair = tl.load(ORDER + i, mask=live, other=0)
        row = (pair // R)[:, None] * D + col
        x = tl.load(X + row, mask=mask, other=0.0)
        if PARTS == 2:
            dy = tl.load(DY + row, mask=mask, other=0.0)
        dh = tl.load(DH + pair, mask=live, other=0.0)
        du += tl.sum(dh[:, None] * x.to(tl.float32), 0)
        if PARTS == 2:
            a = tl.load(A + pair, mask=live, other=0.0)
            dv += tl.sum(a[:, None] * dy.to(tl.float32), 0)
        p += BLOCK_P
    return du, dv


@triton.jit
def _peer_table_overflow_kernel(X, DY, DH, A, IDX, ORDER, OFFSETS, PARTIAL, D: tl.constexpr,
                                R: tl.constexpr, PARTS: tl.constexpr, SHARE: tl.constexpr,
                                BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One window per program: the float32 sums of the overflow in it, if any, to its row of
    PARTIAL.
    Limits: positions and offsets are 64-bit; at most 2^31 - 1 windows."""
    window = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    # The expert that owns the window's first position
    expert = tl.load(IDX + tl.load(ORDER + window * SHARE))
    # Its overflow, cut to the window
    start = tl.maximum(tl.load(OFFSETS + expert) + SHARE, window * SHARE)
    end = tl.minimum(tl.load(OFFSETS + expert + 1), window * SHARE + SHARE)
    if start < end:
        du, dv = sum_pairs(X, DY, DH, A, ORDER, start, end, D, R, PARTS, BLOCK_P, BLOCK_D)
        out = PARTIAL + window * (PARTS * D) + col
        tl.store(out, du, mask=col < D)
        if PARTS == 2:
            tl.store(out + D, dv, mask=col < D)


@triton.jit
def _peer_table_kernel(X, DY, DH, A, ORDER, OFFSETS, PARTIAL, OUT, D: tl.constexpr, R: tl.constexpr,
                       PARTS: tl.constexpr, SHARE: tl.constexpr, ACCUMULATE: tl.constexpr,
                       BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One expert per program: its first SHARE pairs, then its windows' sums in order, all in
    float32 registers. Its PARTS rows are written once: zeros without pairs; when accumulating,
    nothing then.
    Traffic: 2Ed elements written, 2Pd gathered from x and dy, which mostly stay in L2 (PARTS 1:
    half of it).
    Limits: positions and offsets are 64-bit; at most 2^31 - 1 experts."""
    expert = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    first = tl.load(OFFSETS + expert)
    end = tl.load(OFFSETS + expert + 1)
    if (first < end) | (not ACCUMULATE):
        # The first SHARE pairs
        own_end = tl.minimum(end, first + SHARE)
        du, dv = sum_pairs(X, DY, DH, A, ORDER, first, own_end, D, R, PARTS, BLOCK_P, BLOCK_D)
        # The windows that hold its overflow, BLOCK_P scratch rows at a time
        if end - first > SHARE:
            window = (first + SHARE) // SHARE
            last = (end - 1) // SHARE
            while window <= last:
                i = window + tl.arange(0, BLOCK_P)
                mask = (i <= last)[:, None] & (col < D)[None, :]
                rows = PARTIAL + i[:, None] * (PARTS * D) + col
                du += tl.sum(tl.load(rows, mask=mask, other=0.0), 0)
                if PARTS == 2:
                    dv += tl.sum(tl.load(rows + D, mask=mask, other=0.0), 0)
                window += BLOCK_P
        # The expert's rows, after what they held if that is to stay
        out = OUT + expert * (PARTS * D) + col
        if ACCUMULATE:
            du += tl.load(out, mask=col < D, other=0.0).to(tl.float32)
        tl.store(out, du.to(OUT.dtype.element_ty), mask=col < D)
        if PARTS == 2:
            if ACCUMULATE:
                dv += tl.load(out + D, mask=col < D, other=0.0).to(tl.float32)
            tl.store(out + D, dv.to(OUT.dtype.element_ty), mask=col < D)


def sum_by_expert(x, dy, dh, a, idx, out, accumulate, share, blocks, warps):
    """Runs both kernels. out (E, 2, d) gets dh x and a dy of each expert's pairs; out (E, 1, d)
    gets dh x alone, and dy and a are not read. All tensors are contiguous. The other arguments are
    those of `peer_backward_table` and what `launch_shape` gives."""
    E, parts, d = out.shape
    R = idx.shape[1]
    order, offsets = sort_pairs(idx, E)
    windows = ceil_div(idx.numel(), share)
    partial = torch.empty(windows, parts, d, dtype=torch.float32, device=x.device)
    if windows:
        _peer_table_overflow_kernel[(windows,)](
            x, dy, dh, a, idx, order, offsets, partial, d, R, parts, share, *blocks,
            num_warps=warps)
    _peer_table_kernel[(E,)](
        x, dy, dh, a, order, offsets, partial, out, d, R, parts, share, accumulate, *blocks,
        num_warps=warps)


def peer_backward_table(x, dy, dh, a, idx, n_expert, out=None, accumulate=False, kernel=None,
                        share=256):
    """Gradient of the table (E, 2, d): row e sums dh x and a dy over the pairs of expert e. x, dy
    (N, d); dh, a (N, R) float32 from `peer_backward_tokens`.

    out: float32 or bfloat16, contiguous (else ValueError); overwritten, or added to with
         `accumulate`. Pass the same one every step: a fresh one costs more than the gradient. None:
         fresh, float32.
    share: pairs per program. The scratch is ceil(P / share) rows of 8d bytes: 34 MB at P = 2^21,
         d = 512.
    """
    if out is not None and not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} for the table gradient is not contiguous: pass a "
                         "whole one")
    if not choose(kernel, x, dy, dh, a):
        return peer_backward_table_torch(x, dy, dh, a, idx, n_expert, out, accumulate)
    x, dy, dh, a, idx = contiguous(x, dy, dh, a, idx)
    d = x.shape[1]
    if out is None:
        out = torch.empty(n_expert, 2, d, dtype=torch.float32, device=x.device)
        accumulate = False
    shape = launch_shape(d, x.element_size(), *BY_EXPERT)
    sum_by_expert(x, dy, dh, a, idx, out, accumulate, share, *shape)
    return out


# ---- without Triton: rows gathered in slices that stay in cache ----
# These serve PKM too: its table (E, 1, d) holds v alone, its activation is None, and
# y = sum_r gate[n, r] v[idx[n, r]]. A table is read as a flat list of rows. Part j of expert e is
# row e * parts + j, computed in the dtype of idx: int32 holds it up to E = 2^30.


def dot_rows(x, rows, idx):
    """h[n, r] = x[n] . rows[idx[n, r]], (N, R)."""
    R, d = idx.shape[1], x.shape[1]
    h = x.new_empty(idx.shape)
    # Gather the rows of one slice of tokens at a time, (slice, R, d), and multiply while they are
    # in cache.
    for x_part, idx_part, h_part in slices(R * d, x, idx, h):
        gathered = rows.index_select(0, idx_part.flatten()).view(-1, R, d)
        torch.bmm(gathered, x_part.unsqueeze(2), out=h_part.unsqueeze(2))
    return h


def sum_rows(weight, rows, idx):
    """y[n] = sum_r weight[n, r] rows[idx[n, r]], (N, d), row after row, without a copy."""
    return F.embedding_bag(idx, rows, mode="sum", per_sample_weights=weight)


def lean_forward(x, table, idx, gate, activation):
    """y, and the pre-activations h (N, R) (PKM: None)."""
    parts = table.shape[1]
    rows = table.view(-1, x.shape[1])                                                 # (E parts, d)
    h = None
    a = gate
    if activation:
        h = dot_rows(x, rows, idx * parts)
        a = ACTIVATIONS[activation](h) * gate
    return sum_rows(a, rows, idx * parts + parts - 1), h


def lean_backward_tokens(dy, table, idx, gate, h, activation):
    """dx, dh, a = act(h) gate, d_gate, as `peer_backward_tokens` gives them (PKM: None, None, gate,
    d_gate)."""
    parts = table.shape[1]
    rows = table.view(-1, dy.shape[1])
    da = dot_rows(dy, rows, idx * parts + parts - 1)
    if not activation:
        return None, None, gate, da
    value = ACTIVATIONS[activation](h)
    dh = ACTIVATION_GRADS[activation](da * gate, h)
    return sum_rows(dh, rows, idx * parts), dh, value * gate, da * value


def lean_backward_table(x, dy, dh, a, idx, n_expert, out, accumulate):
    """The table's gradient: adds dh x to the u, and a dy to the v, of each token's experts, token
    after token. Into `out` with `accumulate`, else into a fresh one."""
    weights, sources = [dh, a], [x, dy]
    if dh is None:
        weights, sources = [a], [dy]
    weight = torch.stack(weights, 2).unsqueeze(3)                                # (N, R, parts, 1)
    source = torch.stack(sources, 1).unsqueeze(1)                                # (N, 1, parts, d)
    R, parts = weight.shape[1:3]
    d = x.shape[1]
    if not accumulate:
        out = x.new_zeros(n_expert, parts, d)
    for i, w, s in slices(R * parts * d, idx, weight, source):
        pairs = (w * s).flatten(0, 1).flatten(1)                                # (slice R, parts d)
        out.view(len(out), -1).index_add_(0, i.flatten(), pairs)
    return out


PASSES = {
    "lean": (lean_forward, lean_backward_tokens, lean_backward_table),
    "fused": (peer_forward, peer_backward_tokens, peer_backward_table),
}


def choose_path(wanted, table):
    """The path that `ffn.peer_path = auto` takes; ValueError for an explicit fused that cannot run."""
    refusal = "PKM has no neurons" if table.shape[1] == 1 else ""
    if not refusal and not use_triton(table):
        refusal = "it needs a CUDA device and Triton"
    if wanted == "fused" and refusal:
        raise ValueError(f'ffn.peer_path = "fused" cannot run: {refusal}; use "auto" or "lean"')
    if wanted != "auto":
        return wanted
    # auto: fused on CUDA; lean on a CPU, and for PKM, whose forward is one kernel as it is;
    # readable, which needs only gathers and products, on MPS.
    if table.is_cuda:
        return "lean" if refusal else "fused"
    return "lean" if table.device.type == "cpu" else "readable"


def accumulates(leaf):
    """Whether the backward pass that is running adds to the .grad of this leaf, given by its node in
    the graph. torch.autograd.grad does not, nor does backward(inputs=...) without it."""
    try:
        return torch._C._will_engine_execute_node(leaf)
    except RuntimeError:                    # torch.autograd.grad of the leaf itself
        return False


class GatheredExperts(torch.autograd.Function):
    """experts_readable without the gathered rows: x (N, d), table (E, 2, d), idx (N, R) and gate
    (N, R) -> y (N, d). `path` "lean" is plain PyTorch, "fused" the Triton kernels.

    Saves x, idx, the gates and the pre-activations (N, R); backward reads the rows again. Both
    paths write the table's gradient in a fixed order, with one exception: lean on CUDA, which is
    PKM's path, adds atomically.

    A table without .grad gets a dense gradient, as from any function. If the table has one,
    loss.backward() adds to it in place: autograd would first fill a second tensor, 2 GiB at
    E = 2^20 and d = 256, mostly with zeros, and then add it. Where backward is not to accumulate
    into the table (torch.autograd.grad, inputs= of something else) its .grad is left alone. On a
    CPU keep the buffer, with zero_grad(set_to_none=False), because fresh memory is dear there. On
    CUDA drop it: the allocator keeps the memory.
    """

    @staticmethod
    def forward(ctx, x, table, idx, gate, activation, path):
        forward, _, _ = PASSES[path]
        y, h = forward(x, table, idx, gate, activation)
        ctx.save_for_backward(x, table, idx, gate, h)
        ctx.activation = activation
        ctx.path = path
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, table, idx, gate, h = ctx.saved_tensors
        _, backward_tokens, backward_table = PASSES[ctx.path]
        dx, dh, a, d_gate = backward_tokens(dy, table, idx, gate, h, ctx.activation)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, d_gate, None, None
        # The buffer to add to. A compiler must not see a gradient written on the side.
        kept = None
        if table.is_leaf and not torch.compiler.is_compiling():
            kept = table.grad if accumulates(ctx.next_functions[1][0]) else None
        d_table = backward_table(x, dy, dh, a, idx, len(table), kept, accumulate=kept is not None)
        if kept is not None:
            d_table = None
        return dx, d_table, None, d_gate, None, None
