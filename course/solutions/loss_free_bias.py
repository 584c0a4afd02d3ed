"""Balance without a loss: the bias, and its drift.

lecture 2 · difficulty 2 of 5 · importance 5 of 5 · 25 minutes · 5 points

A balance loss pulls at the router with a gradient that has nothing to do with the text. Wang et al.
(2408.15664) and DeepSeek-V3 (2412.19437) add a bias to the choice instead, and to nothing else.
With the scores s = sigmoid(z), (N, E):

    ids   = the k experts with the largest s_i + b_i                          (V3 eq. 16)
    gates = s_i of these, divided by their sum                                (V3 eq. 13)
    b_i  <- b_i + u sign(mean load - load_i)     after each batch             (2408.15664 alg. 1)

As written, the steps need not cancel: of eight experts one may have too many tokens and seven too
few, and then most biases rise, batch after batch. This drift changes no choice, but a bias of 30
has fewer digits left for what matters. So take the mean of the E steps off each, then add them.
"""
import torch


def choose(scores, bias, k):
    """scores (N, E), bias (E,) -> gates (N, k) and ids (N, k), largest s + b first. The gates carry
    a gradient to the scores, and sum to 1; with k = 1 a gate is its score."""
    # the bias decides who is chosen...
    ids = (scores.detach() + bias).topk(k, -1).indices
    # ...and has no part in how much it counts: an expert that is helped is not thereby better
    gates = scores.gather(-1, ids)
    # s / s is 1: with one expert the router would get no gradient
    if k > 1:
        gates = gates / gates.sum(-1, keepdim=True)
    return gates, ids


def update(bias, load, rate):
    """bias (E,), load (E,) = pairs that each expert got, rate u -> the new bias (E,)."""
    # the sign alone: a step is as large for an expert that is nearly even as for one far off, and
    # one odd batch moves little
    step = torch.sign(load.mean() - load)
    # what all have in common changes no order of s + b
    return bias + rate * (step - step.mean())


def drift(load, rate, steps):
    """The mean of the E biases after `steps` updates of alg. 1 as the paper writes it, without the
    mean taken off, from b = 0 and with the same load (E,) each time: a number."""
    # so many signs are +, so many -, and what does not cancel is added at each step
    return float(steps * rate * torch.sign(load.mean() - load).mean())


# ---- the check ----
from balance import update_bias  # noqa: E402
from course.check import ask, close, grads, shape  # noqa: E402
from routers import ROUTERS  # noqa: E402
from settings import FFNConfig  # noqa: E402

SIZES = (5, 4, 2), (3, 7, 3), (4, 8, 1), (2, 3, 3)          # N, E, k
LOADS = [8., 2, 2, 2, 2, 2, 2, 4], [1., 9, 5], [4., 4, 4, 4], [7., 1, 0, 0, 2]


def oracle(scores, bias, k):
    """Gates and ids of the repository's router, given these scores."""
    E = scores.shape[1]
    router = ROUTERS["sigmoid"](FFNConfig(n_expert=E, top_k=k, n_groups=1, topk_groups=1), E)
    router.score = torch.nn.Identity()                      # its logits are its input
    router.bias = bias
    ids, gates = router(scores.logit(), None).by_token()
    return gates, ids


def check(mine):
    for N, E, k in SIZES:
        random = torch.Generator().manual_seed(N)
        scores = torch.randn(N, E, generator=random).sigmoid()
        bias = 0.6 * torch.randn(E, generator=random)
        choice(mine, scores, bias - bias.mean(), k)
    for load in map(torch.tensor, LOADS):
        one_update(mine, load, 0.01)
        drifts(mine, load, 0.01)


def choice(mine, scores, bias, k):
    N = len(scores)
    gates, ids = mine.choose(scores.clone(), bias.clone(), k)
    want, expert = oracle(scores, bias, k)
    shape("gates", gates, (N, k))
    shape("ids", ids, (N, k))
    n = int((ids != expert).any(-1).int().argmax())
    for other, why in ((scores, "the bias has no effect on the choice: take the k largest s + b"),
                       (scores - bias, "the bias is subtracted: a high bias brings more tokens")):
        ask(torch.equal(ids, expert) or not torch.equal(ids, other.topk(k, -1).indices), why)
    ask(torch.equal(ids, expert), f"token {n} goes to experts {ids[n].tolist()}, not to "
        f"{expert[n].tolist()}, which have the largest s + b, in falling order")
    ask(k > 1 or not torch.allclose(gates, torch.ones(N, 1)), "with k = 1 all gates are 1, and the "
        "router gets no gradient: do not divide the only score by itself")
    summed = (scores + bias).gather(-1, ids)
    for other in (summed, summed / summed.sum(-1, keepdim=True), summed.softmax(-1)):
        ask(not torch.allclose(gates, other), "the bias is in the gates: it decides who is chosen, "
            "and the gates are made of s alone")
    ask(k == 1 or not torch.allclose(gates, scores.gather(-1, ids)), f"the gates of token 0 sum to "
        f"{gates[0].sum():.2f}: divide them by their sum")
    close("gates", gates, want)
    moved = grads(lambda s: mine.choose(s, bias, k)[0], scores)[0]
    right = grads(lambda s: oracle(s, bias, k)[0], scores)[0]
    close("the gradient of the gates", moved, right, rtol=1e-3, atol=1e-5)


def one_update(mine, load, rate):
    E, before = len(load), torch.linspace(-0.1, 0.1, len(load))
    want = before.clone()
    update_bias(want, load, rate)
    got = mine.update(before.clone(), load.clone(), rate)
    shape("the new bias", got, (E,))
    step, want, loads = got - before, want - before, f"with loads {[int(v) for v in load]}"
    gap = load.mean() - load
    sign = rate * torch.sign(gap)
    # who is even, up or down with the others
    up, down = rate * torch.where(gap >= 0, 1.0, -1.0), rate * torch.where(gap > 0, 1.0, -1.0)
    even = f"{loads} an expert moves whose load is the mean: sign(0) is 0"
    for other, why in (
            (-want, f"{loads} the bias of the busiest expert goes up: it must lose tokens"),
            (-sign, f"{loads} the bias of the busiest expert goes up: it must lose tokens"),
            (sign, f"{loads} the mean of the biases moves by {step.mean():.4f}: this is the drift; "
             "take the mean off the steps"),
            *((t - mean, even) for t in (up, down) for mean in (0, t.mean())),
            (rate * gap, f"{loads} the steps grow with the gaps to the mean: take their sign"),
            (rate * gap / load.sum(), f"{loads} the steps grow with the gaps to the mean: take "
             "their sign")):
        right, alike = (torch.allclose(step, t, atol=1e-6) for t in (want, other))
        ask(right or not alike, why)
    close(f"the step of the bias {loads}", step, want)


def drifts(mine, load, rate):
    """The steps of the paper's rule, one by one."""
    bias, steps = torch.zeros(len(load)), 7
    for _ in range(steps):
        bias += rate * torch.sign(load.mean() - load)
    got, want, sums = float(mine.drift(load.clone(), rate, steps)), bias.mean(), bias.sum()
    for other, why in ((sums, f"the sum of the biases; their mean is {want:.4f}"),
                       (want / steps, f"the mean after one step, not after {steps}"),
                       (want / rate, f"counted in steps: each is u = {rate}")):
        ask(abs(got - want) < 1e-6 or abs(got - other) > 1e-6, f"drift is {got:.4f}: that is {why}")
    close(f"the drift with loads {[int(v) for v in load]}", got, want)


WRONG = [
    ("(scores.detach() + bias).topk", "scores.detach().topk", "no effect on the choice"),
    ("(scores.detach() + bias).topk", "(scores.detach() - bias).topk", "is subtracted"),
    ("gates = scores.gather(-1, ids)", "gates = (scores + bias).gather(-1, ids)", "in the gates"),
    ("if k > 1:", "if k > 0:", "all gates are 1"),
    ("if k > 1:", "if k > 9:", "divide them by their sum"),
    ("    step = torch.sign(load.mean() - load)", "    step = torch.sign(load - load.mean())",
     "it must lose tokens"),
    ("rate * (step - step.mean())", "rate * step", "this is the drift"),
    ("    step = torch.sign(load.mean() - load)", "    step = load.mean() - load",
     "take their sign"),
    ("    step = torch.sign(load.mean() - load)",
     "    step = torch.where(load > load.mean(), -1.0, 1.0)", "sign(0) is 0"),
    ("torch.sign(load.mean() - load).mean())", "torch.sign(load.mean() - load).sum())",
     "the sum of the biases"),
    ("float(steps * rate", "float(rate", "after one step"),
]
