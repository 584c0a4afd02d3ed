"""Product keys (2407.04153 sec. 2.1): the best k of m sub-keys for each half of each query, without
the scores of all of them.

Letters: N tokens, h heads, m sub-keys of a half, c width of a half, k kept. A query has 2 halves,
and each half has its own sub-keys (m, c). The rules of all kernels stand in kernels/__init__.py.
"""
import torch

from kernels.common import (ceil_div, choose, contiguous, power_of_2, slices, tl, triton,
                            use_triton)
from kernels.peer import sum_rows


def product_key_topk_torch(q, sub_keys, k):
    wide = torch.promote_types(q.dtype, torch.float32)
    every = torch.einsum("nhpc,pmc->nhpm", q.to(wide), sub_keys.to(wide))             # (N, h, 2, m)
    scores, indices = every.topk(k, dim=-1)
    return scores, indices.int()


@triton.jit
def _product_key_topk_kernel(Q, SUB_KEYS, SCORES, INDICES, N, HALVES, M: tl.constexpr,
                             C: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr,
                             BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_N tokens of one half of one head per program. Registers hold the scores of BLOCK_M
    sub-keys at a time and the best K so far. Exact, ties included: of equal scores the lowest index
    wins.
    Traffic: q once; the sub-keys once per program, from L2. The K passes decide the time: 8K
    operations a score.
    Limits: offsets are 64-bit; HALVES = 2h is the grid's y, at most 65,535, so that h <= 32,767."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tl.program_id(1)
    live = (token < N)[:, None]
    # q is an array (N * HALVES, C); this program's rows of it                          (BLOCK_N, 1)
    row = token[:, None] * HALVES + half
    # Heads share the sub-keys: halves are even or odd. The scalar start of this half's is 64-bit.
    first_key = (half % 2).to(tl.int64) * M
    # The best so far: -inf, at index M, which no sub-key has
    lowest = float("-inf")
    rank = tl.arange(0, BLOCK_K)[None, :]
    best = tl.full([BLOCK_N, BLOCK_K], lowest, tl.float32)
    index = tl.full([BLOCK_N, BLOCK_K], M, tl.int32)
    for start in tl.range(0, M, BLOCK_M):
        # Scores of BLOCK_M sub-keys. The width comes in pieces, so that shared memory holds any c.
        key = tl.arange(0, BLOCK_M)
        score = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for first_col in tl.range(0, C, BLOCK_C):
            col = first_col + tl.arange(0, BLOCK_C)
            q = tl.load(Q + row * C + col, mask=live & (col < C)[None, :], other=0.0)
            keys = SUB_KEYS + (first_key + start) * C + key[:, None] * C + col
            inside = (start + key < M)[:, None] & (col < C)[None, :]
            keys = tl.load(keys, mask=inside, other=0.0)
            # Float32 goes through the tensor cores as three TF32 products, which keeps about 22
            # bits of each factor. Without them the dot product would cost twice what the selection
            # does.
            score = tl.dot(q, tl.trans(keys), score, input_precision="tf32x3")
        # Sub-keys beyond the last one lose. A NaN loses too: it must not become a bad index.
        candidate = (start + key)[None, :]                                      # (1, BLOCK_M)
        score = tl.where((candidate < M) & (score == score), score, lowest)
        # K passes merge the new scores with the old best: each takes the largest of both.
        old = best
        old_index = index
        for j in tl.range(K):
            # The largest score that is left                                            (BLOCK_N, 1)
            top = tl.maximum(tl.max(score, 1), tl.max(old, 1))[:, None]
            # and the lowest index that has it
            new_match = tl.min(tl.where(score == top, candidate, M), 1)
            old_match = tl.min(tl.where(old == top, old_index, M), 1)
            winner = tl.minimum(new_match, old_match)[:, None]
            # Take it out where it stood and put it at rank j.
            score = tl.where(candidate == winner, lowest, score)
            old = tl.where(old_index == winner, lowest, old)
            best = tl.where(rank == j, top, best)
            index = tl.where(rank == j, winner, index)
    out = row * K + rank                                                        # (BLOCK_N, BLOCK_K)
    mask = live & (rank < K)
    tl.store(SCORES + out, best, mask=mask)
    tl.store(INDICES + out, index, mask=mask)


def product_key_topk(q, sub_keys, k, kernel=None):
    """q (N, h, 2, c), the two halves of each head's query, and sub_keys (2, m, c), shared by the
    heads -> scores (N, h, 2, k) float32, descending, and indices (N, h, 2, k) int32. Exact. On a
    tie the kernel takes the lower index and the twin what torch.topk takes. ValueError if k > m."""
    m = sub_keys.shape[1]
    if k > m:
        raise ValueError(f"top-{k} of {m} sub-keys: ask for fewer, or make more keys")
    if not choose(kernel, q, sub_keys):
        return product_key_topk_torch(q, sub_keys, k)
    q, sub_keys = contiguous(q, sub_keys)
    N, h, _, c = q.shape
    scores = torch.empty(N, h, 2, k, dtype=torch.float32, device=q.device)
    indices = torch.empty_like(scores, dtype=torch.int32)
    if N:
        # 64 x 128 scores on 4 warps are 64 registers a thread, and 4 threads of one warp share a
        # row.
        block_k = power_of_2(k)
        blocks = 64, max(128, block_k), 32 if c > 16 else 16, block_k
        _product_key_topk_kernel[(ceil_div(N, 64), 2 * h)](
            q, sub_keys, scores, indices, N, 2 * h, m, c, k, *blocks, num_warps=4)
    return scores, indices


class TopKLean(torch.autograd.Function):
    """topk_readable without the scores (N, h, 2, m), 64 KiB a token at h = 8, m = 1024, and without
    their gradient. q (N, h, 2, c), sub_keys (2, m, c) -> scores (N, h, 2, k), indices int32.

    The kernel never has all scores. Without it, tokens pass in slices. The gradient of the sub-keys
    adds in a fixed order everywhere.
    """

    @staticmethod
    def forward(ctx, q, sub_keys, k):
        N, h = q.shape[:2]
        m = sub_keys.shape[1]
        # On a CPU Triton could only interpret the kernel.
        if q.is_cuda and use_triton(q):
            scores, indices = product_key_topk(q, sub_keys, k, kernel=True)
        else:
            scores = q.new_empty(N, h, 2, k)
            indices = q.new_empty(N, h, 2, k, dtype=torch.int32)
            for q_part, s, i in slices(2 * h * m, q, scores, indices):
                s[:], i[:] = product_key_topk(q_part, sub_keys, k, kernel=False)
        ctx.save_for_backward(q, sub_keys, indices)
        ctx.mark_non_differentiable(indices)
        return scores, indices

    @staticmethod
    def backward(ctx, d_scores, _):
        q, sub_keys, indices = ctx.saved_tensors
        h, m = q.shape[1], sub_keys.shape[1]
        # dq sums the chosen sub-keys of its half, weighted by d_scores. As one list of 2m rows, the
        # sub-keys of the second half begin at row m.
        first = m * torch.arange(2, dtype=indices.dtype, device=q.device).unsqueeze(1)     # (2, 1)
        rows = (indices + first).flatten(0, 2)                                        # (N h 2, k)
        dq = sum_rows(d_scores.flatten(0, 2), sub_keys.flatten(0, 1), rows)
        # d_sub_keys: put a slice's k gradients among zeros and multiply. A product adds in a fixed
        # order, which a scatter into the sub-keys would not do on CUDA.
        d_sub_keys = torch.zeros_like(sub_keys)
        for q_part, d, i in slices(2 * h * m, q, d_scores, indices):
            full = d.new_zeros(len(d), h, 2, m).scatter_(-1, i.long(), d)         # (slice, h, 2, m)
            d_sub_keys += torch.einsum("nhpm,nhpc->pmc", full, q_part)
        return dq.view_as(q), d_sub_keys, None
