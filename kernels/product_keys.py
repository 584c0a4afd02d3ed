"""Product keys (2407.04153 sec. 2.1): the best k of m sub-keys for each half of each query, without the scores of
all of them."""
import torch

from kernels.common import ceil_div, choose, contiguous, power_of_2, slices, tl, triton, use_triton
from kernels.peer import sum_rows


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


class TopKLean(torch.autograd.Function):
    """topk_readable without the (n, h, 2, m) scores, 64 KiB a token at h = 8, m = 1024, and without their
    gradient: the kernel never has them, without it tokens pass in slices. For the sub-keys, backward puts a
    slice's k gradients among zeros and multiplies, which adds in a fixed order everywhere."""

    @staticmethod
    def forward(ctx, q, sub_keys, k):
        n, h, m = *q.shape[:2], sub_keys.shape[1]
        if q.is_cuda and use_triton(q):                                 # a CPU could only interpret it
            scores, indices = product_key_topk(q, sub_keys, k, kernel=True)
        else:
            scores, indices = q.new_empty(n, h, 2, k), q.new_empty(n, h, 2, k, dtype=torch.int32)
            for part, s, i in slices(2 * h * m, q, scores, indices):
                s[:], i[:] = product_key_topk(part, sub_keys, k, kernel=False)
        ctx.save_for_backward(q, sub_keys, indices)
        ctx.mark_non_differentiable(indices)
        return scores, indices

    @staticmethod
    def backward(ctx, d_scores, _):
        q, sub_keys, indices = ctx.saved_tensors
        h, m, d_keys = q.shape[1], sub_keys.shape[1], torch.zeros_like(sub_keys)
        first = m * torch.arange(2, dtype=indices.dtype, device=q.device).unsqueeze(1)      # key of each half
        dq = sum_rows(d_scores.flatten(0, 2), sub_keys.flatten(0, 1), (indices + first).flatten(0, 2))
        for part, d, i in slices(2 * h * m, q, d_scores, indices):
            full = d.new_zeros(len(d), h, 2, m).scatter_(-1, i.long(), d)
            d_keys += torch.einsum("nhpm,nhpc->pmc", full, part)
        return dq.view_as(q), d_keys, None
