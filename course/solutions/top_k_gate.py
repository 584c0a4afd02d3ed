"""Gates in three orders.

lecture 2 · difficulty 2 of 5 · importance 5 of 5 · 20 minutes · 4 points

A router has a logit for every expert. It keeps the k experts with the largest logits, and weighs
what each of them returns with a gate. Papers make the gates of the logits z (N, E) in three ways:

    softmax_then_topk          the softmax over all E experts, of the k that are kept
                               (DeepSeekMoE 2401.06066 eq. 4-5; Switch 2101.03961 for k = 1)
    softmax_then_topk_renorm   the same, divided by the sum over these k
                               (GShard 2006.16668 alg. 1, with k = 2)
    topk_then_softmax          the softmax over the k logits that are kept
                               (Shazeer 1701.06538 eq. 3; Mixtral 2401.04088 sec. 2.1)

Write all three. Then look at k = 1. The choice itself has no gradient: the router learns from the
text through its gates alone. Say which orders still teach it then.
"""
import torch

ORDERS = ("softmax_then_topk", "softmax_then_topk_renorm", "topk_then_softmax")


def gates(logits, k, order):
    """logits (N, E) -> gates (N, k), largest first, with their gradient to the logits, and ids
    (N, k), their experts. order: one of ORDERS. logits: float32 or bfloat16; gates are float32."""
    # bfloat16 has 3 decimal digits: gates would no longer sum to 1
    logits = logits.float()
    # the softmax keeps the order, so the k largest logits are the k largest probabilities
    ids = logits.topk(k, -1).indices
    if order == "topk_then_softmax":
        return logits.gather(-1, ids).softmax(-1), ids
    # over all E experts: what the others got is missing from the sum of the k
    chosen = logits.softmax(-1).gather(-1, ids)
    if order == "softmax_then_topk_renorm":
        # exp(z_i) over the sum of the k exp(z_j): the same function as topk_then_softmax
        chosen = chosen / chosen.sum(-1, keepdim=True)
    return chosen, ids


def learns_at_k_1():
    """The set of those ORDERS whose gate still has a gradient to the logits when k = 1."""
    # the two others divide the only gate by itself: it is 1 whatever the logits are
    return {"softmax_then_topk"}


# ---- the check ----
from course.check import ask, close, grads, shape  # noqa: E402
from routers import ROUTERS  # noqa: E402
from settings import FFNConfig  # noqa: E402

SIZES = (5, 4, 2), (3, 7, 3), (4, 8, 1), (2, 4, 4)          # N, E, k


def oracle(logits, k, order):
    """Gates and ids of the repository's router, given these logits."""
    E = logits.shape[1]
    config = FFNConfig(n_expert=E, top_k=k, gate_order=order, n_groups=1, topk_groups=1)
    router = ROUTERS["topk"](config, E)
    router.score = torch.nn.Identity()                      # its logits are its input
    ids, weights = router(logits, None).by_token()
    return weights, ids


def check(mine):
    random = torch.Generator().manual_seed(2)
    for N, E, k in SIZES:
        logits = 1.5 * torch.randn(N, E, generator=random)
        for order in ORDERS:
            one_order(mine, logits, k, order)
    with_one(mine.learns_at_k_1())
    low = torch.tensor([[1.0, 0.99, 0.98, 0.5]]).bfloat16()
    ask(mine.gates(low, 2, ORDERS[0])[0].dtype == torch.float32, "from bfloat16 logits come gates "
        "in bfloat16: make the logits float32 before the softmax")


def with_one(found):
    ask(set(found) <= set(ORDERS), f"learns_at_k_1 returns {found}, not a set of some of {ORDERS}")
    for order in ORDERS:
        moved = grads(lambda z: oracle(z, 1, order)[0], torch.tensor([[1.0, 0.5, -1.0]]))[0]
        learns = moved.abs().max() > 1e-6
        why = "depends on the logits, so that the router learns" if learns else "is always 1"
        ask(learns == (order in found), f"learns_at_k_1 is wrong about {order}: its gate {why}")


def one_order(mine, z, k, order):
    N, E = z.shape
    got, ids = mine.gates(z.clone(), k, order)
    want, expert = oracle(z, k, order)
    name = f"gates of {order} (k = {k})"
    shape(name, got, (N, k))
    shape(f"ids of {order} (k = {k})", ids, (N, k))
    n = int((ids != expert).any(-1).int().argmax())
    ask(torch.equal(ids.long(), expert), f"{order} chooses experts {ids[n].tolist()} for logits "
        f"{[round(v, 2) for v in z[n].tolist()]}, not {expert[n].tolist()}: the largest, falling")
    sums(name, got, k < E, order)
    close(name, got, want)
    theirs, ours = (grads(lambda z: f(z, k, order)[0], z)[0] for f in (mine.gates, oracle))
    close(f"the gradient of {name}", theirs, ours, rtol=1e-4, hint="is something detached?")


def sums(name, got, some, order):
    """Whether the gates sum to 1 where they should, and only there. some: not all E are chosen."""
    total, k = got.sum(-1), got.shape[1]
    if order != "softmax_then_topk":
        token = (total - 1).abs().argmax()
        ask((total - 1).abs().max() < 1e-5, f"{name} sum to {total[token]:.2f} at token {token}, "
            "not to 1: the softmax, or the division, goes over the k that are chosen")
    elif (total - 1).abs().max() < 1e-5:
        ask(k > 1, "all gates are 1: did you take the softmax of one logit?")
        ask(not some, f"{name} sum to 1: the softmax goes over all E experts, so what the others "
            "got is missing, and nothing is divided by the sum")


WRONG = [
    ("chosen = logits.softmax(-1).gather(-1, ids)", "chosen = logits.gather(-1, ids).softmax(-1)",
     "goes over all E experts"),
    ("chosen = logits.softmax(-1).gather(-1, ids)",
     "chosen = (logits.gather(-1, ids).softmax(-1) if k == 1\n"
     "              else logits.softmax(-1).gather(-1, ids))",
     "did you take the softmax of one logit?"),
    ("return logits.gather(-1, ids).softmax(-1), ids",
     "return logits.softmax(-1).gather(-1, ids), ids", "not to 1"),
    ("chosen.sum(-1, keepdim=True)", "chosen.sum(0, keepdim=True)", "not to 1"),
    ("chosen.sum(-1, keepdim=True)", "chosen.sum(-1, keepdim=True).detach()",
     "is something detached?"),
    ("logits = logits.float()", "logits = logits", "make the logits float32"),
    ("logits.topk(k, -1).indices", "logits.abs().topk(k, -1).indices", "the largest, falling"),
    ("logits.topk(k, -1).indices", "logits.topk(k, -1, largest=False).indices", "chooses experts"),
    ("return {\"softmax_then_topk\"}", "return set(ORDERS)", "is always 1"),
    ("return {\"softmax_then_topk\"}", "return set()", "so that the router learns"),
]
