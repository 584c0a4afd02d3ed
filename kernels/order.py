"""The pairs in expert order: a stable counting sort in three launches, beside torch.sort.

Letters: E experts, k choices per token, P pairs (a token at one of its experts). Expert order and
its limit on P are those of kernels/moe.py, the rules of all kernels those of kernels/__init__.py.

Pairs are cut into blocks. A pair's place in expert order is the sum of three counts: the pairs of
smaller experts, the pairs of its own expert in earlier blocks, and those before it in its block.
"""
import torch

from kernels.common import ceil_div, contiguous, power_of_2, tl, triton, use_triton
from kernels.moe import invert

# Each pair is compared with every expert: for more experts than these torch.sort takes over.
MOST_EXPERTS = 1024


def expert_order_torch(expert, token, weight, n_expert):
    # A radix sort pays by the digit: short numbers where E itself is one.
    narrow = torch.int16 if n_expert < 2 ** 15 else torch.int64
    sorted_expert, order = torch.sort(expert.to(narrow), stable=True)                   # (P,), (P,)
    # Where each expert's pairs end, as the grouped product wants it
    ids = torch.arange(n_expert, dtype=narrow, device=expert.device)
    ends = torch.searchsorted(sorted_expert, ids, right=True, out_int32=True)           # (E,)
    return order, token.index_select(0, order), weight.index_select(0, order), ends


@triton.jit
def _count_kernel(EXPERT, UP_TO, P, E, BLOCKS, BLOCK: tl.constexpr, PART: tl.constexpr,
                  BLOCK_E: tl.constexpr):
    """UP_TO[e, b] of one block b and BLOCK_E experts per program: the pairs of the block that go to
    expert e or a smaller one.
    Limits: offsets are 64-bit; at most 2^31 - 1 blocks, and 65,535 BLOCK_E experts."""
    block = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    found = tl.zeros([BLOCK_E, PART], tl.int32)
    for start in tl.range(0, BLOCK, PART):
        # PART pairs at a time; those past the end go to an expert E, which nobody counts
        i = block * BLOCK + start + tl.arange(0, PART)
        expert = tl.load(EXPERT + i, mask=i < P, other=E).to(tl.int32)
        found += (expert[None, :] <= e[:, None]).to(tl.int32)
    tl.store(UP_TO + e.to(tl.int64) * BLOCKS + block, tl.sum(found, 1), mask=e < E)


@triton.jit
def _scan_kernel(UP_TO, BEFORE, ENDS, BLOCKS, PART: tl.constexpr):
    """One expert per program. BEFORE[e, b]: its pairs in the blocks before b. ENDS[e]: the pairs of
    all experts up to e. The difference of two rows of UP_TO counts one expert's pairs, so that no
    program waits for another's sum.
    Limits: offsets are 64-bit; at most 2^31 - 1 experts."""
    e = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PART)
    up_to = tl.zeros([PART], tl.int32)
    before = tl.zeros([PART], tl.int32)
    start = 0
    while start < BLOCKS:
        b = start + column
        here = tl.load(UP_TO + e * BLOCKS + b, mask=b < BLOCKS, other=0)
        less = tl.load(UP_TO + (e - 1) * BLOCKS + b, mask=(b < BLOCKS) & (e > 0), other=0)
        count = here - less
        # The pairs in earlier parts, the same number in every lane, and those earlier in this part
        tl.store(BEFORE + e * BLOCKS + b, before + tl.cumsum(count, 0) - count, mask=b < BLOCKS)
        before += tl.sum(count, 0)
        up_to += here
        start += PART
    tl.store(ENDS + e, tl.sum(up_to, 0))


@triton.jit
def _place_kernel(EXPERT, TOKEN, WEIGHT, BEFORE, ENDS, ORDER, INVERSE, SORTED_TOKEN, GATE, P,
                  BLOCKS, BLOCK: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr):
    """ROWS pairs of one block per program, each to its place in the four results. No two pairs have
    the same place.
    Limits: offsets are 64-bit; values are below 2^31."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    block = first // BLOCK
    pair = first + tl.arange(0, ROWS)
    live = pair < P
    expert = tl.load(EXPERT + pair, mask=live, other=0).to(tl.int32)
    # Pairs of the same expert that come earlier in the block, compared PART at a time by their
    # places in it
    mine = (first % BLOCK).to(tl.int32) + tl.arange(0, ROWS)
    earlier = tl.zeros([ROWS, PART], tl.int32)
    for start in tl.range(0, BLOCK, PART):
        i = start + tl.arange(0, PART)
        pair_i = block * BLOCK + i
        other = tl.load(EXPERT + pair_i, mask=pair_i < P, other=0).to(tl.int32)
        earlier += ((other[None, :] == expert[:, None]) & (i[None, :] < mine[:, None])).to(tl.int32)
    # The three counts
    place = tl.load(ENDS + expert - 1, mask=live & (expert > 0), other=0).to(tl.int64)
    place += tl.load(BEFORE + expert.to(tl.int64) * BLOCKS + block, mask=live, other=0)
    place += tl.sum(earlier, 1)
    tl.store(INVERSE + pair, place.to(tl.int32), mask=live)
    tl.store(ORDER + place, pair.to(tl.int32), mask=live)
    tl.store(SORTED_TOKEN + place, tl.load(TOKEN + pair, mask=live), mask=live)
    tl.store(GATE + place, tl.load(WEIGHT + pair, mask=live), mask=live)


def sort_by_counting(expert, token, weight, n_expert):
    """order, inverse (int32), token, weight, ends of `expert_order`, by the kernels, on contiguous
    tensors. Scratch is 8 (P + E) bytes at most."""
    P = len(expert)
    order = torch.empty_like(expert, dtype=torch.int32)
    inverse, sorted_token, gate = (torch.empty_like(t) for t in (order, token, weight))
    if not P:
        return order, inverse, sorted_token, gate, order.new_zeros(n_expert)
    ends = order.new_empty(n_expert)
    # Longer blocks for more experts, because each block has two counts for each expert
    block = max(128, power_of_2(n_expert))
    blocks = ceil_div(P, block)
    up_to, before = order.new_empty(2, n_expert, blocks).unbind()
    block_e = min(64, power_of_2(n_expert))
    _count_kernel[(blocks, ceil_div(n_expert, block_e))](
        expert, up_to, P, n_expert, blocks, block, 64, block_e, num_warps=4)
    part = min(512, max(32, power_of_2(blocks)))
    _scan_kernel[(n_expert,)](up_to, before, ends, blocks, part, num_warps=4)
    _place_kernel[(ceil_div(P, 128),)](expert, token, weight, before, ends, order, inverse,
                                       sorted_token, gate, P, blocks, block, 128, 32, num_warps=4)
    return order, inverse, sorted_token, gate, ends


class ExpertOrder(torch.autograd.Function):
    """sort_by_counting with the gradient of the weights: each goes back to its own pair."""

    @staticmethod
    def forward(ctx, weight, expert, token, n_expert):
        order, inverse, token, gate, ends = sort_by_counting(
            *contiguous(expert, token, weight), n_expert)
        ctx.mark_non_differentiable(order, inverse, token, ends)
        # Else backward would fill a tensor of zeros for each of these four.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inverse)
        return order, inverse, token, gate, ends

    @staticmethod
    def backward(ctx, _order, _inverse, _token, d_gate, _ends):
        inverse, = ctx.saved_tensors
        return d_gate.index_select(0, inverse), None, None, None


def expert_order(expert, token, weight, n_expert, fused=False):
    """The stable sort of P pairs by expert. expert (P,) integers below n_expert, token (P,), weight
    (P,) -> order and inverse (P,), token and weight in expert order, and ends (E,) int32, where
    each expert's pairs end. The gradient of the weights flows back.

    By the kernels on CUDA, and with `fused` wherever Triton runs; the twin for more than
    MOST_EXPERTS experts. order and inverse are int32, as `permute` and `unpermute` read them;
    without `fused` the twin leaves order int64 and inverse None, because nothing reads them.
    """
    if n_expert <= MOST_EXPERTS and use_triton(expert) and (fused or expert.is_cuda):
        return ExpertOrder.apply(weight, expert, token, n_expert)
    order, token, weight, ends = expert_order_torch(expert, token, weight, n_expert)
    order, inverse = invert(order) if fused else (order, None)
    return order, inverse, token, weight, ends
