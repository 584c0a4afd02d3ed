"""Product keys (2407.04153 sec. 2.1): the best k of m sub-keys for each half of each query, without
the scores of all of them.

Letters: N tokens, h heads, m sub-keys of a half, c width of a half, k kept. A query has 2 halves,
and each half has its own sub-keys (m, c). The rules of all kernels stand in kernels/__init__.py.
"""
import torch

from kernels.common import (ceil_div, choose, contiguous, power_of_2, slices, tl, triton,
                            use_triton)
from kernels.peer import launch_shape, sum_by_expert, sum_rows


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
    sub-keys at a time and the best K so far, unsorted, each with its rank. Exact, ties included: of
    equal scores the lowest index wins. NaN and -inf are never taken in: where fewer than K scores
    are left, the last ranks are -inf at index 0.
    Traffic: q once; the sub-keys once per program, from L2. Work: in random order a token takes in
    K / t scores of its t-th tile on average, 54 of 1,024 at K = 16 and tiles of 64, with some 4
    operations on each score of the tile; a program goes on until its last token is done.
    Limits: offsets are 64-bit; HALVES = 2h is the grid's y, at most 65,535, so that h <= 32,767."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    half = tl.program_id(1)
    live = (token < N)[:, None]
    # q is an array (N * HALVES, C); this program's rows of it                          (BLOCK_N, 1)
    row = token[:, None] * HALVES + half
    # Heads share the sub-keys: halves are even or odd. The scalar start of this half's is 64-bit.
    first_key = (half % 2).to(tl.int64) * M
    # The best so far, and their ranks. Slots beyond K hold +inf, which is never the smallest, and
    # ranks that are never K - 1, so that nothing moves into them.
    lowest = float("-inf")
    slot = tl.arange(0, BLOCK_K)[None, :]
    best = tl.where(slot < K, tl.full([BLOCK_N, BLOCK_K], lowest, tl.float32), float("inf"))
    index = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    rank = tl.zeros([BLOCK_N, BLOCK_K], tl.int32) + slot
    kth = tl.min(best, 1)                                                       # (BLOCK_N,)
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
            # bits of each factor.
            score = tl.dot(q, tl.trans(keys), score, input_precision="tf32x3")
        # Sub-keys beyond the last one lose. A NaN loses too: it would hide the others.
        candidate = (start + key)[None, :]                                      # (1, BLOCK_M)
        score = tl.where((candidate < M) & (score == score), score, lowest)
        # As long as any row's largest score beats its K-th best, each such row takes that one in.
        # One that only equals the K-th best stays out: it has the higher index.
        top = tl.max(score, 1)                                                  # (BLOCK_N,)
        while tl.max((top > kth).to(tl.int32), 0) > 0:
            beats = (top > kth)[:, None]
            # The lowest index that has it, crossed out among the scores
            winner = tl.min(tl.where(score == top[:, None], candidate, M), 1)[:, None]
            score = tl.where(candidate == winner, lowest, score)
            # It comes after what is at least as large (the slots beyond K always are). What comes
            # after it moves down one rank, and the last rank's slot is its own now.
            place = tl.sum((best >= top[:, None]).to(tl.int32), 1)[:, None] - (BLOCK_K - K)
            last = beats & (rank == K - 1)
            rank = tl.where(beats & (rank >= place), rank + 1, rank)
            rank = tl.where(last, place, rank)
            best = tl.where(last, top[:, None], best)
            index = tl.where(last, winner, index)
            kth = tl.min(best, 1)
            top = tl.max(score, 1)
    out = row * K + rank                                                        # (BLOCK_N, BLOCK_K)
    mask = live & (slot < K)
    tl.store(SCORES + out, best, mask=mask)
    tl.store(INDICES + out, index, mask=mask)


def topk_blocks(c, k):
    """BLOCK_N, BLOCK_M, BLOCK_C, BLOCK_K for halves of width c."""
    # 64 x 64 scores on 4 warps are 32 registers a thread, and 4 threads of one warp share a row.
    # The best, their indices and ranks are 3 BLOCK_N BLOCK_K / 128 registers more: above k = 32
    # there are fewer tokens at a time, down to the 16 rows that tl.dot needs.
    block_k = power_of_2(k)
    return max(16, min(64, 2048 // block_k)), 64, 32 if c > 16 else 16, block_k


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
        blocks = topk_blocks(c, k)
        _product_key_topk_kernel[(ceil_div(N, blocks[0]), 2 * h)](
            q, sub_keys, scores, indices, N, 2 * h, m, c, k, *blocks, num_warps=4)
    return scores, indices


# ---- the gradient of the sub-keys: each gets the sum of d_score q over those that chose it ----

def sub_key_gradient_torch(q, d_scores, indices, m):
    h, c = q.shape[1], q.shape[3]
    # Put a slice's k gradients among zeros and multiply. A product adds in a fixed order, which a
    # scatter into the sub-keys would not do on CUDA.
    out = torch.zeros(2, m, c, dtype=d_scores.dtype, device=q.device)
    for q_part, d, i in slices(2 * h * m, q, d_scores, indices):
        full = d.new_zeros(len(d), h, 2, m).scatter_(-1, i.long(), d)             # (slice, h, 2, m)
        out += torch.einsum("nhpm,nhpc->pmc", full, q_part.to(d.dtype))
    return out


def sub_key_gradient(q, d_scores, indices, m, kernel=None, share=256):
    """Gradient of the sub-keys (2, m, c), float32 from the kernel, in the dtype of d_scores from
    the twin. q (N, h, 2, c); indices (N, h, 2, k) of `product_key_topk`; d_scores (N, h, 2, k) the
    gradient of its scores. share: pairs per program, as in `peer_backward_table`."""
    if not choose(kernel, q, d_scores):
        return sub_key_gradient_torch(q, d_scores, indices, m)
    c = q.shape[3]
    # The 2m sub-keys are a table of width c. Its tokens are the halves of the queries, and each of
    # them chose k rows.
    tokens, d_scores, rows = contiguous(
        q.flatten(0, 2), d_scores.flatten(0, 2), table_rows(indices, m))
    out = torch.empty(2 * m, 1, c, dtype=torch.float32, device=q.device)
    # 8 rows at a time: a sub-key has N h k / m pairs on average, thousands in a large batch.
    shape = launch_shape(c, q.element_size(), 8, 2048)
    sum_by_expert(tokens, tokens, d_scores, d_scores, rows, out, False, share, *shape)
    return out.view(2, m, c)


def table_rows(indices, m):
    """Sub-keys (N, h, 2, k) as rows (N h 2, k) of one list of 2m: those of the second half begin at
    row m."""
    first = m * torch.arange(2, dtype=indices.dtype, device=indices.device).unsqueeze(1)    # (2, 1)
    return (indices + first).flatten(0, 2)


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
        # On a CPU Triton could only interpret the kernels.
        ctx.kernel = q.is_cuda and use_triton(q)
        if ctx.kernel:
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
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_scores, _):
        q, sub_keys, indices = ctx.saved_tensors
        m = sub_keys.shape[1]
        # dq sums the chosen sub-keys of its half, weighted by d_scores.
        dq = sum_rows(d_scores.flatten(0, 2), sub_keys.flatten(0, 1), table_rows(indices, m))
        d_sub_keys = sub_key_gradient(q, d_scores, indices, m, ctx.kernel)
        return dq.view_as(q), d_sub_keys, None
