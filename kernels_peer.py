"""The Triton kernels of product keys and PEER (2407.04153), beside their twins, in the manner of kernels.py.

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

from kernels import (ACTIVATION_GRADS, ACTIVATIONS, activate, ceil_div, choose, contiguous, power_of_2, tl,
                     triton)


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


# ---- product keys: the best k of n sub-keys for each half of the query ----

def cartesian_candidates(k):
    """Ranks (i, j), two int64 tensors, of the pairs that can be among the k largest sums of two descending
    lists: those with (i + 1)(j + 1) <= k, 50 of 256 at k = 16. Each other pair is matched or beaten by k
    pairs of better ranks, so leaving it out changes no value of the top k, ties and rounded sums included.
    Keep as buffers."""
    rank = torch.arange(1, k + 1)
    return (rank[:, None] * rank <= k).nonzero(as_tuple=True)


def product_key_topk_torch(q, keys, k):
    wide = torch.promote_types(q.dtype, torch.float32)
    scores, indices = torch.einsum("thsd,snd->thsn", q.to(wide), keys.to(wide)).topk(k, dim=-1)
    return scores, indices.int()


@triton.jit
def _product_key_topk_kernel(Q, KEYS, SCORES, INDICES, T, HALVES, N: tl.constexpr, D: tl.constexpr,
                             K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
                             BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_T tokens of one half of one head per program. Registers hold the scores of BLOCK_N keys at a
    time and the best K so far; K passes take the next largest of both, and of equals the lowest index:
    exact, ties included. Float32 goes through the tensor cores as three TF32 products, which keeps about
    22 bits of each factor; without them the dot product would cost twice what the selection does.
    Traffic: q once; the keys once per program, from L2. The passes decide the time: 8K operations a score."""
    token, half = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T), tl.program_id(1)
    row, live = token[:, None] * HALVES + half, (token < T)[:, None]
    rank, lowest = tl.arange(0, BLOCK_K)[None, :], float("-inf")
    best, index = tl.full([BLOCK_T, BLOCK_K], lowest, tl.float32), tl.full([BLOCK_T, BLOCK_K], N, tl.int32)
    for start in tl.range(0, N, BLOCK_N):
        n, score = start + tl.arange(0, BLOCK_N), tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        for first_col in tl.range(0, D, BLOCK_D):  # in pieces: shared memory holds any d
            col = first_col + tl.arange(0, BLOCK_D)
            q = tl.load(Q + row * D + col, mask=live & (col < D)[None, :], other=0.0)
            keys = KEYS + ((half % 2) * N + n)[:, None] * D + col
            keys = tl.load(keys, mask=(n < N)[:, None] & (col < D)[None, :], other=0.0)
            score = tl.dot(q, tl.trans(keys), score, input_precision="tf32x3")
        n = n[None, :]
        score = tl.where((n < N) & (score == score), score, lowest)  # a NaN must not become a bad index
        old, old_index = best, index
        for j in tl.range(K):
            top = tl.maximum(tl.max(score, 1), tl.max(old, 1))[:, None]
            first, second = tl.where(score == top, n, N), tl.where(old == top, old_index, N)
            first = tl.minimum(tl.min(first, 1), tl.min(second, 1))[:, None]
            score, old = tl.where(n == first, lowest, score), tl.where(old_index == first, lowest, old)
            best, index = tl.where(rank == j, top, best), tl.where(rank == j, first, index)
    out, mask = row * K + rank, live & (rank < K)
    tl.store(SCORES + out, best, mask=mask)
    tl.store(INDICES + out, index, mask=mask)


def product_key_topk(q, keys, k, kernel=None):
    """q (T, heads, 2, d), the two halves of each head's query, and keys (2, n, d), shared by the heads ->
    scores (T, heads, 2, k) float32, descending, and indices (T, heads, 2, k) int32. Exact; on a tie the
    kernel takes the lower index and the twin what torch.topk takes. ValueError if k > n."""
    if k > keys.shape[1]:
        raise ValueError(f"top-{k} of {keys.shape[1]} sub-keys: ask for fewer, or make more keys")
    if not choose(kernel, q, keys):
        return product_key_topk_torch(q, keys, k)
    q, keys = contiguous(q, keys)
    (T, heads, _, d), n = q.shape, keys.shape[1]
    scores = torch.empty(T, heads, 2, k, dtype=torch.float32, device=q.device)
    indices = torch.empty_like(scores, dtype=torch.int32)
    if T:  # 64 x 128 scores on 4 warps: 64 registers a thread, and 4 threads of one warp share a row
        blocks = 64, max(128, power_of_2(k)), 32 if d > 16 else 16, power_of_2(k)
        _product_key_topk_kernel[(ceil_div(T, 64), 2 * heads)](
            q, keys, scores, indices, T, 2 * heads, n, d, k, *blocks, num_warps=4)
    return scores, indices
