"""Product keys (2407.04153 sec. 2.1): the best k of the m^2 experts of each query, without the
scores of all sub-keys.

Letters: N tokens, h heads, m sub-keys of a half, c width of a half, k kept. A query has 2 halves,
and each half has its own sub-keys (m, c). The rules of all kernels stand in kernels/__init__.py.
"""
import torch

from kernels.common import (ceil_div, choose, contiguous, power_of_2, slices, tl, triton,
                            use_triton)
from kernels.peer import launch_shape, sum_by_expert, sum_rows


def product_key_topk_torch(q, sub_keys, k):
    """Scores (N, h, 2, k), descending, and indices int32 of the best sub-keys of each half."""
    wide = torch.promote_types(q.dtype, torch.float32)
    every = torch.einsum("nhpc,pmc->nhpm", q.to(wide), sub_keys.to(wide))             # (N, h, 2, m)
    scores, indices = every.topk(k, dim=-1)
    return scores, indices.int()


def product_key_experts_torch(q, sub_keys, k):
    (scores, other_scores), (first, second) = (
        t.unbind(2) for t in product_key_topk_torch(q, sub_keys, k))            # (N, h, k) each
    # All k^2 sums of a first and a second half, the experts that have them, and the k best of them
    sums = (scores.unsqueeze(3) + other_scores.unsqueeze(2)).flatten(2)
    experts = (first.unsqueeze(3) * sub_keys.shape[1] + second.unsqueeze(2)).flatten(2)
    best, at = sums.topk(k, dim=-1)
    return best, experts.gather(2, at)


@triton.jit
def nothing(BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K: tl.constexpr):
    """The best K of no scores, for `take_in`: scores, numbers and ranks, (BLOCK_N, BLOCK_K). They
    are unsorted. Slots beyond K hold +inf, which is never the smallest, and ranks that are never
    below K, so that nothing moves into them."""
    slot = tl.arange(0, BLOCK_K)[None, :]
    best = tl.full([BLOCK_N, BLOCK_K], float("-inf"), tl.float32)
    best = tl.where(slot < K, best, float("inf"))
    number = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    return best, number, number + slot


@triton.jit
def take_in(score, candidate, best, number, rank, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """The best K after a tile of scores (BLOCK_N, tile) of `candidate`, numbers below 2^31 - 1 that
    differ within a row. Of equal scores the older one is better, then the lower number. NaN and
    -inf are never taken in."""
    LOWEST: tl.constexpr = float("-inf")
    LARGEST: tl.constexpr = 2 ** 31 - 1
    # A NaN would hide the others.
    score = tl.where(score == score, score, LOWEST)
    kth = tl.min(best, 1)                                                       # (BLOCK_N,)
    top = tl.max(score, 1)
    # As long as any row's largest score beats its K-th best, each such row takes that one in. One
    # that only equals the K-th best stays out.
    while tl.max((top > kth).to(tl.int32), 0) > 0:
        beats = (top > kth)[:, None]
        # The lowest number that has it, crossed out among the scores
        winner = tl.min(tl.where(score == top[:, None], candidate, LARGEST), 1)[:, None]
        score = tl.where(candidate == winner, LOWEST, score)
        # It comes after what is at least as large (the slots beyond K always are). What comes after
        # it moves down one rank, and the last rank's slot is its own now.
        place = tl.sum((best >= top[:, None]).to(tl.int32), 1)[:, None] - (BLOCK_K - K)
        last = beats & (rank == K - 1)
        rank = tl.where(beats & (rank >= place), rank + 1, rank)
        rank = tl.where(last, place, rank)
        best = tl.where(last, top[:, None], best)
        number = tl.where(last, winner, number)
        kth = tl.min(best, 1)
        top = tl.max(score, 1)
    return best, number, rank


@triton.jit
def _product_keys_kernel(Q, SUB_KEYS, SCORES, EXPERTS, N, HEADS, M: tl.constexpr, C: tl.constexpr,
                         K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                         BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_N tokens of one head per program. Registers hold the scores of BLOCK_M sub-keys at a
    time and the best K so far. Ranks without a score are -inf at expert 0.
    Traffic: q once; the sub-keys once per program, from L2. Work: in random order a token takes in
    K / t scores of its t-th tile on average, 54 of 1,024 at K = 16 and tiles of 64, with some 4
    operations on each score of the tile; a program goes on until its last token is done. Of the
    sums it takes in at most the 50 that can be among the best 16.
    Limits: offsets are 64-bit; h is the grid's y, at most 65,535; M^2 < 2^31."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = (token < N)[:, None]
    row = token[:, None] * HEADS + tl.program_id(1)                             # (BLOCK_N, 1)
    key = tl.arange(0, BLOCK_M)
    # Not in a function of its own: the compiler would take Q and SUB_KEYS for written.
    for half in tl.static_range(2):
        best, index, rank = nothing(BLOCK_N, BLOCK_K, K)
        # Heads share the sub-keys. Where this half's begin, 64-bit
        first_key = tl.full([], half * M, tl.int64)
        for start in tl.range(0, M, BLOCK_M):
            # Scores of BLOCK_M sub-keys. The width comes in pieces: shared memory holds any c.
            score = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for first_col in tl.range(0, C, BLOCK_C):
                col = first_col + tl.arange(0, BLOCK_C)
                q = Q + (2 * row + half) * C + col
                q = tl.load(q, mask=live & (col < C)[None, :], other=0.0)
                keys = SUB_KEYS + (first_key + start) * C + key[:, None] * C + col
                inside = (start + key < M)[:, None] & (col < C)[None, :]
                keys = tl.load(keys, mask=inside, other=0.0)
                # Float32 goes through the tensor cores as three TF32 products, which keeps about
                # 22 bits of each factor.
                score = tl.dot(q, tl.trans(keys), score, input_precision="tf32x3")
            candidate = (start + key)[None, :]                                  # (1, BLOCK_M)
            score = tl.where(candidate < M, score, float("-inf"))
            best, index, rank = take_in(score, candidate, best, index, rank, K, BLOCK_K)
        if half == 0:
            first, first_index, first_rank = best, index, rank          # (BLOCK_N, BLOCK_K) each
    slot = tl.arange(0, BLOCK_K)[None, :]
    second = tl.where(slot < K, best, float("-inf"))
    second_index = index
    best, expert, rank = nothing(BLOCK_N, BLOCK_K, K)
    for i in tl.range(0, K):
        # Score and number of the first half's sub-key of rank i, and its sums with all of the
        # second half
        this = first_rank == i
        score = tl.sum(tl.where(this, first, 0.0), 1)[:, None] + second
        candidate = tl.sum(tl.where(this, first_index, 0), 1)[:, None] * M + second_index
        best, expert, rank = take_in(score, candidate, best, expert, rank, K, BLOCK_K)
    out = row * K + rank
    mask = live & (slot < K)
    tl.store(SCORES + out, best, mask=mask)
    tl.store(EXPERTS + out, expert, mask=mask)


def topk_blocks(c, k):
    """BLOCK_N, BLOCK_M, BLOCK_C, BLOCK_K for halves of width c."""
    # 64 x 64 scores on 4 warps are 32 registers a thread, and 4 threads of one warp share a row.
    # The best, their indices and ranks, twice, are 6 BLOCK_N BLOCK_K / 128 registers more: above
    # k = 16 there are fewer tokens at a time, down to the 16 rows that tl.dot needs.
    block_k = power_of_2(k)
    return max(16, min(64, 1024 // block_k)), 64, 32 if c > 16 else 16, block_k


def product_key_experts(q, sub_keys, k, kernel=None):
    """q (N, h, 2, c), the two halves of each head's query, and sub_keys (2, m, c), shared by the
    heads -> scores (N, h, k) float32, descending, and experts (N, h, k) int32, i m + j of sub-keys
    i and j. Exact. Of equal sub-keys the kernel takes the lower one; of equal sums that of the
    better i, then the lower expert. The twin takes what torch.topk takes. ValueError if k > m."""
    m = sub_keys.shape[1]
    if k > m:
        raise ValueError(f"top-{k} of {m} sub-keys: ask for fewer, or make more keys")
    if not choose(kernel, q, sub_keys):
        return product_key_experts_torch(q, sub_keys, k)
    q, sub_keys = contiguous(q, sub_keys)
    N, h, _, c = q.shape
    scores = torch.empty(N, h, k, dtype=torch.float32, device=q.device)
    experts = torch.empty_like(scores, dtype=torch.int32)
    if N:
        blocks = topk_blocks(c, k)
        _product_keys_kernel[(ceil_div(N, blocks[0]), h)](
            q, sub_keys, scores, experts, N, h, m, c, k, *blocks, num_warps=4)
    return scores, experts


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
    the twin. q (N, h, 2, c); indices (N, h, 2, k) the chosen sub-keys of each half, which differ;
    d_scores (N, h, 2, k) the gradient of their scores. share: pairs per program, as in
    `peer_backward_table`."""
    if not choose(kernel, q, d_scores):
        return sub_key_gradient_torch(q, d_scores, indices, m)
    return sum_by_sub_key(q, d_scores.flatten(0, 2), table_rows(indices, m), m, share)


def sum_by_sub_key(q, d_scores, rows, m, share=256):
    """The kernel's sub_key_gradient; d_scores and rows (N h 2, k), rows as from `table_rows`. A
    half may choose a sub-key several times."""
    # The 2m sub-keys are a table of width c. Its tokens are the halves of the queries, and each of
    # them chose k rows.
    c = q.shape[3]
    tokens, d_scores, rows = contiguous(q.flatten(0, 2), d_scores, rows)
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
    """peer.topk_readable without the scores (N, h, 2, m), 64 KiB a token at h = 8, m = 1024, and
    without their gradient: tokens pass in slices. q (N, h, 2, c), sub_keys (2, m, c) -> scores
    (N, h, 2, k), indices int32. The gradient of the sub-keys adds in a fixed order."""

    @staticmethod
    def forward(ctx, q, sub_keys, k):
        N, h = q.shape[:2]
        scores = q.new_empty(N, h, 2, k)
        indices = q.new_empty(N, h, 2, k, dtype=torch.int32)
        for q_part, s, i in slices(2 * h * sub_keys.shape[1], q, scores, indices):
            s[:], i[:] = product_key_topk_torch(q_part, sub_keys, k)
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
        return dq.view_as(q), sub_key_gradient_torch(q, d_scores, indices, m), None


class RetrieveFused(torch.autograd.Function):
    """peer.retrieve in one launch: q (N, h, 2, c), sub_keys (2, m, c) -> scores (N, h, k), experts
    (N, h, k) int32. Saves q, the sub-keys and the experts, which name the chosen sub-keys."""

    @staticmethod
    def forward(ctx, q, sub_keys, k):
        scores, experts = product_key_experts(q, sub_keys, k, kernel=True)
        ctx.save_for_backward(q, sub_keys, experts)
        ctx.mark_non_differentiable(experts)
        return scores, experts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_scores, _):
        q, sub_keys, experts = ctx.saved_tensors
        m, k = sub_keys.shape[1], experts.shape[2]
        # Expert i m + j chose row i of the sub-keys and row m + j. Both have the gradient of the
        # sum.                                                                        (N h 2, k)
        rows = torch.stack((experts // m, experts % m + m), 2).view(-1, k)
        d_halves = d_scores.unsqueeze(2).expand(-1, -1, 2, -1).reshape(-1, k)
        dq = sum_rows(d_halves, sub_keys.flatten(0, 1), rows)
        return dq.view_as(q), sum_by_sub_key(q, d_halves, rows, m), None


def fuses(q):
    """Whether RetrieveFused is to be taken: on CUDA. On a CPU Triton could only interpret it."""
    return q.is_cuda and use_triton(q)
