"""Capacity: places in a queue, and who is dropped.

lecture 2 · difficulty 3 of 5 · importance 4 of 5 · 30 minutes · 5 points

An expert with a fixed number of slots is one dense matrix product, however uneven the loads are. So
each of the E experts gets a factor c times an even share of the P = N k pairs, rounded up:

    slots = ceil(c N k / E)           but never more than N: a token visits an expert once at most
                                      (Switch 2101.03961 sec. 2.2)

The pairs of an expert stand in a queue, and those beyond the slots are dropped: the token gets
nothing from this expert, and the residual connection carries it past the layer.

Who stands in front? A language model must not look ahead: whether a token travels may depend on the
positions before it alone, so the queue goes by position. At one position all first choices go
before all second ones, and of the same choice the first sequence of the batch before the second.
"""
import math

import torch


def slots(n_token, n_expert, k, factor):
    """The slots of one expert, an int. factor: a decimal number, meant exactly: 1.1 for 200 tokens,
    4 experts and k = 1 gives 55."""
    # 1.1 * 200 / 4 is 55.00000000000001 in floating point, and would be rounded up to 56
    share = round(factor * n_token * k / n_expert, 9)
    return min(math.ceil(share), n_token)


def keep(ids, n_expert, n_slot):
    """ids (B, T, k), the experts of each token, best first -> (B, T, k) bool: which pairs get one
    of the n_slot slots of their expert. A token's experts differ. All sequences share the slots."""
    # the one queue of the batch: by position, then choice, then sequence
    order, back = (1, 2, 0), (2, 0, 1)
    queue = ids.permute(order)                                                  # (T, k, B)
    # a pair's place is the number of pairs of the same expert that stand before it
    expert = queue.reshape(-1)                                                  # (P,)
    came = torch.nn.functional.one_hot(expert, n_expert).cumsum(0)              # (P, E)
    place = came.gather(1, expert.unsqueeze(1)).squeeze(1) - 1
    # places are numbered from 0
    kept = place < n_slot
    return kept.view(queue.shape).permute(back)


# ---- the check ----
from course.check import ask, shape  # noqa: E402
from ffn import Context  # noqa: E402
from moe import MoE, limit_capacity  # noqa: E402
from routers import pairs  # noqa: E402
from settings import FFNConfig  # noqa: E402

COUNTS = (12, 4, 1, 1.0), (10, 4, 1, 1.0), (16, 8, 2, 1.25), (8, 4, 2, 4.0), (200, 4, 1, 1.1)
SIZES = (1, 6, 1, 3), (3, 5, 1, 2), (2, 6, 2, 4), (4, 8, 3, 5)                  # B, T, k, E


class Crowd(torch.nn.Module):
    """A router that sends every token to the first k experts."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, x, ctx):
        return pairs(torch.arange(self.k).expand(len(x), -1), torch.ones(len(x), self.k))


def slots_of(n_token, n_expert, k, factor):
    """What the repository's layer gives to an expert: how many of a crowd it does not drop."""
    config = FFNConfig(n_expert=n_expert, top_k=k, d_expert=1, capacity_factor=factor,
                       balance="none", dispatch="loop", router="switch" if k == 1 else "topk")
    moe = MoE(config, 2)
    moe.router = Crowd(k)
    stats = moe(torch.zeros(1, n_token, 2), Context(torch.zeros(1, n_token).long()))[1]
    return round((1 - stats.dropped.item()) * n_token)


def check(mine):
    for N, E, k, factor in COUNTS:
        count(mine.slots(N, E, k, factor), N, E, k, factor)
    for size in SIZES:
        queues(mine, *size)


def count(got, N, E, k, factor):
    want, share = slots_of(N, E, k, factor), factor * N * k / E
    ask(isinstance(got, int), f"slots is a {type(got).__name__}, not a whole number, an int")
    case = f"N = {N}, E = {E}, k = {k} and factor {factor} give {got} slots, not {want}"
    ask(got <= N, f"{case}: a token visits an expert once, so that no more than N pairs can come")
    for other, why in (
            (math.floor(share), f"round {share:g} up"),
            (math.ceil(share), f"in floating point the share is {share!r}, which is rounded up"),
            (math.ceil(factor * N / E), "there are N k pairs to place, not N")):
        ask(got == want or got != other, f"{case}: {why}")
    ask(got == want, case)


def queues(mine, B, T, k, E):
    random = torch.Generator().manual_seed(10 * B + E)
    ids = (torch.rand(B, T, E, generator=random) - torch.arange(E) / E / 2).topk(k, -1).indices
    n_slot = max(2, B * T * k // (2 * E))
    got = mine.keep(ids.clone(), E, n_slot)
    shape("keep", got, (B, T, k))
    ask(got.dtype == torch.bool, f"keep is {got.dtype}, not bool")
    want = oracle(ids, E, n_slot)
    if not torch.equal(got, want):
        diagnose(mine, got, want, ids, E, n_slot)


def oracle(ids, E, n_slot):
    (B, T, k), flat = ids.shape, ids.flatten(0, 1)
    routing = limit_capacity(pairs(flat, torch.ones(flat.shape)), E, n_slot, (B, T))
    return routing.keep.view(B, T, k)


def in_order(ids, E, n_slot, order):
    """Who gets a slot in a queue of another order of the dimensions sequence, position, choice."""
    shape = ids.permute(order).shape
    queue = ids.permute(order).reshape(1, -1, 1)
    kept = oracle(queue, E, n_slot).view(shape)
    return kept.permute([order.index(i) for i in range(3)])


def diagnose(mine, got, want, ids, E, n_slot):
    """Raises Wrong for the order that this queue has, or another mistake."""
    full = torch.bincount(ids[got], minlength=E)
    most = f"expert {full.argmax()} serves {full.max()} pairs with {n_slot} slots"
    apart = torch.cat([oracle(row, E, n_slot) for row in ids.split(1)])
    ahead = ("all first choices go before all second ones, as in GShard: the first choice of a "
             "later position evicts the second one of an earlier position, which looks ahead")
    for other, why in (
            (oracle(ids, E, n_slot + 1), f"{most}: places are numbered from 0"),
            (oracle(ids, E, n_slot - 1), f"an expert with {n_slot} slots serves only {n_slot - 1}"),
            (apart, f"{most}: you count the queue of each sequence by itself, and all share them"),
            (in_order(ids, E, n_slot, [0, 1, 2]), "your queue goes sequence by sequence: late "
             "positions of the first one take the slots of early positions of the second"),
            (in_order(ids, E, n_slot, [2, 0, 1]), ahead),
            (in_order(ids, E, n_slot, [2, 1, 0]), ahead),
            (oracle(ids.flip(1), E, n_slot).flip(1), "the last positions are served first")):
        ask(not torch.equal(got, other), why)
    ask(full.max() <= n_slot, most)
    looks_ahead(mine, ids, E, n_slot)
    b, t, j = (got != want).nonzero()[0].tolist()
    ask(False, f"the pair of sequence {b}, position {t}, choice {j} should "
        f"{'be dropped' if got[b, t, j] else 'travel'}: at one position the queue goes by choice, "
        "then by sequence")


def looks_ahead(mine, ids, E, n_slot):
    """Raises Wrong if what later positions choose decides whether an earlier pair travels."""
    base = mine.keep(ids.clone(), E, n_slot)
    for t in range(1, ids.shape[1]):
        other = ids.clone()
        other[:, t:] = (other[:, t:] + 1) % E
        moved = (mine.keep(other, E, n_slot)[:, :t] != base[:, :t]).nonzero()
        ask(not len(moved), f"what position {t} and those after it choose decides whether position "
            f"{moved[0, 1].item() if len(moved) else 0} travels: the queue must go by position")


WRONG = [
    ("math.ceil(share)", "math.floor(share)", "round 2.5 up"),
    ("factor * n_token * k / n_expert", "factor * n_token / n_expert", "N k pairs to place"),
    ("min(math.ceil(share), n_token)", "math.ceil(share)", "a token visits an expert once"),
    ("round(factor * n_token * k / n_expert, 9)", "factor * n_token * k / n_expert",
     "in floating point"),
    ("place < n_slot", "place <= n_slot", "numbered from 0"),
    (".squeeze(1) - 1", ".squeeze(1)", "with 2 slots serves only 1"),
    ("(1, 2, 0), (2, 0, 1)", "(0, 1, 2), (0, 1, 2)", "sequence by sequence"),
    ("(1, 2, 0), (2, 0, 1)", "(2, 1, 0), (2, 1, 0)", "which looks ahead"),
    ("(1, 2, 0), (2, 0, 1)", "(1, 0, 2), (1, 0, 2)", "then by sequence"),
    (".cumsum(0)  ", ".flip(0).cumsum(0).flip(0)  ", "the last positions are served first"),
]
