"""The Triton kernels of PEER (2407.04153), beside their twins, and the same passes without Triton.

Letters: T tokens, d model width, N experts of one neuron each, R = heads*k pairs per token, P = T*R pairs
in all. The table W (N, 2, d) holds u_e and v_e side by side: one index, one contiguous read of 2d elements.
With idx (T, R) a token's experts and s (T, R) float32 their router weights,

    h[t, r] = x[t] . u[idx[t, r]]            y[t] = sum_r act(h[t, r]) s[t, r] v[idx[t, r]]

There is one multiply-add per element read, so the time is that of the reads. The three passes together read
W twice in token order, write its gradient once, and never hold anything of size (T, R, d).

Launches: 4 warps and 8 rows at a time up to d = 1024 (both (8, d) tiles together: 16 to 64 registers a
thread in bf16, 8 to 32 kB of reads in flight per program); wider rows, fewer at a time. A width that is no
power of two is padded to one by masks.
"""

import torch
import torch.nn.functional as F

from kernels.common import (ACTIVATION_GRADS, ACTIVATIONS, activate, ceil_div, choose, contiguous, power_of_2,
                            slices, tl, triton)


def row_blocks(d, rows, itemsize):
    """How many rows of padded width a program holds at a time, 16 KiB of them, and that width."""
    return max(1, min(rows, 16384 // (power_of_2(d) * itemsize))), power_of_2(d)


def gather_rows(W, idx, dtype):
    """u, v (T, R, d): exactly what the kernels never hold."""
    return W.index_select(0, idx.flatten()).view(*idx.shape, *W.shape[1:]).to(dtype).unbind(2)


# ---- forward ----

def peer_forward_torch(x, W, idx, s, activation):
    wide = torch.promote_types(x.dtype, torch.float32)
    u, v = gather_rows(W, idx, wide)
    h = torch.einsum("td,trd->tr", x.to(wide), u)
    return torch.einsum("tr,trd->td", ACTIVATIONS[activation](h) * s, v).to(x.dtype), h


@triton.jit
def _peer_forward_kernel(X, W, IDX, S, Y, H, D: tl.constexpr, R: tl.constexpr, ACT: tl.constexpr,
                         BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token per program: x and the sum y stay in float32 registers while its R rows stream by.
    Traffic: 2TRd elements of W; x, y, idx, s and h are small beside it."""
    token, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    x = tl.load(X + token * D + col, mask=col < D, other=0.0).to(tl.float32)
    y = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        pair, mask = token * R + r, (r < R)[:, None] & (col < D)[None, :]
        row = W + tl.load(IDX + pair, mask=r < R, other=0).to(tl.int64)[:, None] * (2 * D) + col
        u, v = tl.load(row, mask=mask, other=0.0), tl.load(row + D, mask=mask, other=0.0)  # both in flight
        h = tl.sum(u.to(tl.float32) * x, 1)
        tl.store(H + pair, h, mask=r < R)
        value, _ = activate(h, ACT)
        a = value * tl.load(S + pair, mask=r < R, other=0.0)
        y += tl.sum(a[:, None] * v.to(tl.float32), 0)
    tl.store(Y + token * D + col, y.to(Y.dtype.element_ty), mask=col < D)


def peer_forward(x, W, idx, s, activation, kernel=None):
    """x (T, d), W (N, 2, d), idx (T, R) integers in [0, N), s (T, R) float32 -> y (T, d), h (T, R) float32.
    activation: gelu (exact) | silu | relu | relu2. The backward needs x, W, idx, s and h."""
    if not choose(kernel, x, W, s):
        return peer_forward_torch(x, W, idx, s, activation)
    x, W, idx, s = contiguous(x, W, idx, s)
    y, h = torch.empty_like(x), torch.empty_like(s, dtype=torch.float32)
    if len(x):
        blocks = row_blocks(x.shape[1], 8, W.element_size())
        _peer_forward_kernel[(len(x),)](
            x, W, idx, s, y, h, x.shape[1], idx.shape[1], activation, *blocks, num_warps=4)
    return y, h


# ---- backward, token by token ----

def peer_backward_tokens_torch(dy, W, idx, s, h, activation):
    u, v = gather_rows(W, idx, h.dtype)
    g, value = torch.einsum("td,trd->tr", dy.to(h.dtype), v), ACTIVATIONS[activation](h)
    dh = ACTIVATION_GRADS[activation](g * s, h)
    return torch.einsum("tr,trd->td", dh, u).to(dy.dtype), dh, value * s, g * value


@triton.jit
def _peer_backward_tokens_kernel(DY, W, IDX, S, H, DX, DH, A, DS, D: tl.constexpr, R: tl.constexpr,
                                 ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token per program: dy and the sum dx stay in float32 registers while its R rows stream by again.
    Traffic: 2TRd elements of W."""
    token, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    dy = tl.load(DY + token * D + col, mask=col < D, other=0.0).to(tl.float32)
    dx = tl.zeros([BLOCK_D], tl.float32)
    for start in tl.range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        pair, mask = token * R + r, (r < R)[:, None] & (col < D)[None, :]
        row = W + tl.load(IDX + pair, mask=r < R, other=0).to(tl.int64)[:, None] * (2 * D) + col
        u, v = tl.load(row, mask=mask, other=0.0), tl.load(row + D, mask=mask, other=0.0)
        g = tl.sum(v.to(tl.float32) * dy, 1)  # gradient of a = act(h) * s
        s = tl.load(S + pair, mask=r < R, other=0.0)
        value, slope = activate(tl.load(H + pair, mask=r < R, other=0.0), ACT)
        dh = g * s * slope
        tl.store(DH + pair, dh, mask=r < R)
        tl.store(A + pair, value * s, mask=r < R)
        tl.store(DS + pair, g * value, mask=r < R)
        dx += tl.sum(dh[:, None] * u.to(tl.float32), 0)
    tl.store(DX + token * D + col, dx.to(DX.dtype.element_ty), mask=col < D)


def peer_backward_tokens(dy, W, idx, s, h, activation, kernel=None):
    """dy (T, d) and what the forward pass saw -> dx (T, d) and, each (T, R) float32, dh the gradient of h,
    a = act(h) * s (for the table's gradient) and ds the gradient of s."""
    if not choose(kernel, dy, W, s):
        return peer_backward_tokens_torch(dy, W, idx, s, h, activation)
    dy, W, idx, s, h = contiguous(dy, W, idx, s, h)
    dx, dh, a, ds = (torch.empty_like(t) for t in (dy, h, h, h))
    if len(dy):
        blocks = row_blocks(dy.shape[1], 8, W.element_size())
        _peer_backward_tokens_kernel[(len(dy),)](
            dy, W, idx, s, h, dx, dh, a, ds, dy.shape[1], idx.shape[1], activation, *blocks, num_warps=4)
    return dx, dh, a, ds


# ---- backward, expert by expert: the table's gradient ----
# A row of the table may be wanted by no pair or, when routing is skewed, by most of them. An expert's first
# SHARE pairs belong to its own program. What lies beyond is cut along the sorted pairs into windows of
# SHARE positions, one program each, whose sums wait in a scratch row. At most one expert overflows into a
# window, and it owns the window's first pair: the first SHARE pairs of the next expert that overflows lie
# between the two overflows, so these are more than a window apart. One scratch row per window is enough,
# and nothing has to be searched for.

def sort_pairs(idx, n_expert):
    """order (P,): the flat pairs of idx (T, R) in expert order; offsets (N + 1,) int32: where each begins."""
    experts, order = torch.sort(idx.flatten(), stable=True)
    bounds = torch.arange(n_expert + 1, dtype=experts.dtype, device=idx.device)
    return order, torch.searchsorted(experts, bounds, out_int32=True)


def peer_backward_table_torch(x, dy, dh, a, idx, n_expert, out=None, accumulate=False):
    out = torch.zeros(n_expert, 2, x.shape[1], dtype=dh.dtype, device=x.device) if out is None else out
    out = out if accumulate else out.zero_()
    for gradient, weight, rows in ((out[:, 0], dh, x), (out[:, 1], a, dy)):
        pairs = torch.einsum("tr,td->trd", weight, rows.to(weight.dtype)).flatten(0, 1)
        gradient.index_add_(0, idx.flatten(), pairs.to(out.dtype))
    return out


@triton.jit
def sum_pairs(X, DY, DH, A, ORDER, p, end, D: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr,
              BLOCK_D: tl.constexpr):
    """Sums of dh * x and of a * dy over the sorted pairs p to end - 1, in order, float32. `while`, because
    Triton 3.6's interpreter cannot run a `for` with a bound read from memory under NumPy 2.3 and later."""
    col = tl.arange(0, BLOCK_D)
    du, dv = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    while p < end:
        i = p + tl.arange(0, BLOCK_P)
        pair = tl.load(ORDER + i, mask=i < end, other=0).to(tl.int64)
        row, mask = (pair // R)[:, None] * D + col, (i < end)[:, None] & (col < D)[None, :]
        x, dy = tl.load(X + row, mask=mask, other=0.0), tl.load(DY + row, mask=mask, other=0.0)
        dh, a = tl.load(DH + pair, mask=i < end, other=0.0), tl.load(A + pair, mask=i < end, other=0.0)
        du += tl.sum(dh[:, None] * x.to(tl.float32), 0)
        dv += tl.sum(a[:, None] * dy.to(tl.float32), 0)
        p += BLOCK_P
    return du, dv


@triton.jit
def _peer_table_overflow_kernel(X, DY, DH, A, IDX, ORDER, OFFSETS, PARTIAL, D: tl.constexpr, R: tl.constexpr,
                                SHARE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One window per program: the float32 sums of the overflow in it, if any, to its row of PARTIAL."""
    window, col = tl.program_id(0), tl.arange(0, BLOCK_D)
    expert = tl.load(IDX + tl.load(ORDER + window * SHARE)).to(tl.int64)
    start = tl.maximum(tl.load(OFFSETS + expert) + SHARE, window * SHARE)
    end = tl.minimum(tl.load(OFFSETS + expert + 1), window * SHARE + SHARE)
    if start < end:
        du, dv = sum_pairs(X, DY, DH, A, ORDER, start, end, D, R, BLOCK_P, BLOCK_D)
        out = PARTIAL + window.to(tl.int64) * (2 * D) + col
        tl.store(out, du, mask=col < D)
        tl.store(out + D, dv, mask=col < D)


@triton.jit
def _peer_table_kernel(X, DY, DH, A, ORDER, OFFSETS, PARTIAL, OUT, D: tl.constexpr, R: tl.constexpr,
                       SHARE: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK_P: tl.constexpr,
                       BLOCK_D: tl.constexpr):
    """One expert per program: its first SHARE pairs, then its windows' sums in order, all in float32
    registers; its two rows are written once (zeros without pairs; when accumulating, nothing then).
    Traffic: 2Nd elements written, 2Pd gathered from x and dy, which mostly stay in L2."""
    expert, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    first, end = tl.load(OFFSETS + expert), tl.load(OFFSETS + expert + 1)
    if (first < end) | (not ACCUMULATE):
        du, dv = sum_pairs(X, DY, DH, A, ORDER, first, tl.minimum(end, first + SHARE), D, R, BLOCK_P, BLOCK_D)
        if end - first > SHARE:
            window, last = (first + SHARE) // SHARE, (end - 1) // SHARE
            while window <= last:
                i = window + tl.arange(0, BLOCK_P)
                rows = PARTIAL + i.to(tl.int64)[:, None] * (2 * D) + col
                mask = (i <= last)[:, None] & (col < D)[None, :]
                du += tl.sum(tl.load(rows, mask=mask, other=0.0), 0)
                dv += tl.sum(tl.load(rows + D, mask=mask, other=0.0), 0)
                window += BLOCK_P
        out = OUT + expert * (2 * D) + col
        if ACCUMULATE:
            du += tl.load(out, mask=col < D, other=0.0).to(tl.float32)
            dv += tl.load(out + D, mask=col < D, other=0.0).to(tl.float32)
        tl.store(out, du.to(OUT.dtype.element_ty), mask=col < D)
        tl.store(out + D, dv.to(OUT.dtype.element_ty), mask=col < D)


def peer_backward_table(x, dy, dh, a, idx, n_expert, out=None, accumulate=False, kernel=None, share=256):
    """Gradient of the table (N, 2, d): row e sums dh * x and a * dy over the pairs of expert e. x, dy
    (T, d); dh, a (T, R) float32 from `peer_backward_tokens`.

    out: float32 or bfloat16, contiguous (else ValueError); overwritten, or added to with `accumulate`. Pass
         the same one every step: a fresh one costs more than the gradient. None: fresh, float32.
    share: pairs per program; the scratch is ceil(P / share) rows of 8d bytes (34 MB at P = 2M, d = 512)."""
    if out is not None and not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} for the table gradient is not contiguous: pass a whole one")
    if not choose(kernel, x, dy, dh, a):
        return peer_backward_table_torch(x, dy, dh, a, idx, n_expert, out, accumulate)
    x, dy, dh, a, idx = contiguous(x, dy, dh, a, idx)
    (T, R), d, accumulate = idx.shape, x.shape[1], accumulate and out is not None
    out = torch.empty(n_expert, 2, d, dtype=torch.float32, device=x.device) if out is None else out
    order, offsets = sort_pairs(idx, n_expert)
    blocks = row_blocks(d, 4, x.element_size())  # most experts have few pairs: more would be mostly masked
    partial = torch.empty(ceil_div(T * R, share), 2, d, dtype=torch.float32, device=x.device)
    if len(partial):
        _peer_table_overflow_kernel[(len(partial),)](
            x, dy, dh, a, idx, order, offsets, partial, d, R, share, *blocks, num_warps=4)
    _peer_table_kernel[(n_expert,)](
        x, dy, dh, a, order, offsets, partial, out, d, R, share, accumulate, *blocks, num_warps=4)
    return out


# ---- without Triton: rows gathered in slices that stay in cache ----


def dot_rows(x, rows, idx):
    """h[t, r] = x[t] . rows[idx[t, r]], (n, R), gathering the rows of one slice of tokens at a time."""
    h, (R, d) = x.new_empty(idx.shape), (idx.shape[1], x.shape[1])
    for part, i, out in slices(R * d, x, idx, h):
        torch.bmm(rows.index_select(0, i.flatten()).view(-1, R, d), part.unsqueeze(2), out=out.unsqueeze(2))
    return h


def sum_rows(weight, rows, idx):
    """y[t] = sum_r weight[t, r] rows[idx[t, r]], (n, d), row after row, without a copy."""
    return F.embedding_bag(idx, rows, mode="sum", per_sample_weights=weight)


def lean_forward(x, table, idx, gate, activation):
    """y, and the pre-activations h (n, R) (PKM: None)."""
    parts, rows = table.shape[1], table.view(-1, x.shape[1])            # u of expert e in row 2e, v in 2e + 1
    h = dot_rows(x, rows, idx * parts) if activation else None
    a = ACTIVATIONS[activation](h) * gate if activation else gate
    return sum_rows(a, rows, idx * parts + parts - 1), h


def lean_backward_tokens(dy, table, idx, gate, h, activation):
    """dx, the gradient of h, the weighted activation a, the gradient of the gates."""
    parts, rows = table.shape[1], table.view(-1, dy.shape[1])
    da = dot_rows(dy, rows, idx * parts + parts - 1)
    if not activation:
        return None, None, gate, da
    value, dh = ACTIVATIONS[activation](h), ACTIVATION_GRADS[activation](da * gate, h)
    return sum_rows(dh, rows, idx * parts), dh, value * gate, da * value


def lean_backward_table(x, dy, dh, a, idx, n_expert, out, accumulate):
    """Adds dh x to the u, and a dy to the v, of each token's experts, token after token."""
    weight, source = ([a], [dy]) if dh is None else ([dh, a], [x, dy])
    weight, source = torch.stack(weight, 2).unsqueeze(3), torch.stack(source, 1).unsqueeze(1)
    out = out if accumulate else x.new_zeros(n_expert, weight.shape[2], x.shape[1])
    for i, w, s in slices(weight[0].numel() * x.shape[1], idx, weight, source):
        out.view(len(out), -1).index_add_(0, i.flatten(), (w * s).flatten(0, 1).flatten(1))
    return out


PASSES = dict(lean=(lean_forward, lean_backward_tokens, lean_backward_table),
              fused=(peer_forward, peer_backward_tokens, peer_backward_table))


class GatheredExperts(torch.autograd.Function):
    """experts_readable without the gathered rows: keeps x, idx, gates and pre-activations (n, R) for
    backward, which reads the rows again. `path` lean: plain PyTorch; fused: the Triton kernels. Both write
    the table's gradient in a fixed order, with one exception: lean on CUDA, PKM's path, adds atomically.

    That gradient: without a .grad on the table, backward returns a dense one, as any function does. With one,
    it adds its rows to that and returns None; autograd would first fill another tensor, 2 GiB at N = 2^20,
    mostly with zeros, and then add it. Either way loss.backward() accumulates as ever. Keep the buffer, by
    zero_grad(set_to_none=False), on a CPU, where fresh memory is dear; drop it on CUDA, whose allocator keeps
    it. torch.autograd.grad of a table needs table.grad = None.
    """

    @staticmethod
    def forward(ctx, x, table, idx, gate, activation, path):
        y, h = PASSES[path][0](x, table, idx, gate, activation)
        ctx.save_for_backward(x, table, idx, gate, h)
        ctx.activation, ctx.path = activation, path
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, table, idx, gate, h = ctx.saved_tensors
        _, backward_tokens, backward_table = PASSES[ctx.path]
        dx, dh, a, d_gate = backward_tokens(dy, table, idx, gate, h, ctx.activation)
        if not ctx.needs_input_grad[1]:
            return dx, None, None, d_gate, None, None
        kept = table.grad if table.is_leaf and not torch.compiler.is_compiling() else None
        grad = backward_table(x, dy, dh, a, idx, len(table), kept, accumulate=kept is not None)
        return dx, grad if kept is None else None, None, d_gate, None, None
