"""Switch's load-balancing loss, and whether 1 is its minimum.

lecture 2 · difficulty 2 of 5 · importance 5 of 5 · 25 minutes · 5 points

With the probabilities p = softmax(z), (N, E), and the experts ids (N, k) that were chosen:

    f_i = the share of the N k pairs that went to expert i          (Switch 2101.03961 eq. 5)
    P_i = the mean over the tokens of p_i                           (eq. 6)
    L   = E sum over i of f_i P_i                                   (eq. 4, before its coefficient)

f is a count: it has no gradient. The loss pushes through P alone, harder on experts that have more
tokens. Even routing gives f_i = P_i = 1 / E and L = 1, whatever E and k are; the factor E is there
for that. The paper says that the loss is minimised there. Is it? f follows which expert of a token
is the largest, and P how large: find probabilities whose loss is below 1.
"""
import torch


def switch_loss(probs, ids):
    """probs (N, E), each row sums to 1, and ids (N, k) -> L, a tensor of shape (), with a gradient
    to probs."""
    E = probs.shape[1]
    # eq. 5: counted over all pairs, so that f sums to 1 for any k
    f = torch.bincount(ids.flatten(), minlength=E) / ids.numel()
    # eq. 6: over all tokens, those of expert i or not: what an expert nearly got counts as well
    P = probs.mean(0)
    return E * (f * P).sum()


def gradient(probs, ids):
    """The gradient of L to probs, (N, E), by hand: a formula of f, E and N, without autograd."""
    N, E = probs.shape
    # L is linear in probs, since f is a number: the same for every token, whatever it chose
    f = torch.bincount(ids.flatten(), minlength=E) / ids.numel()
    return (E / N * f).expand(N, E)


def below_one():
    """probs (N, E) of your own, N >= 2 and E >= 2, each row >= 0 and of sum 1, without ties for the
    largest, whose loss with ids = the largest of each row (k = 1) is below 0.95."""
    # three tokens choose expert 0 by a hair, one chooses expert 1 with all it has: f = (3/4, 1/4)
    # and P = (0.3825, 0.6175). Most tokens sit where the mean probability is small: L = 0.8825
    return torch.tensor([[0.51, 0.49]] * 3 + [[0.0, 1.0]])


# ---- the check ----
import balance  # noqa: E402
from course.check import ask, close, grads, shape  # noqa: E402
from routers import pairs  # noqa: E402

SIZES = (6, 4, 1), (5, 3, 2), (8, 7, 3), (3, 2, 2)        # N, E, k


def oracle(probs, ids):
    """The repository's switch_loss."""
    E = probs.shape[1]
    routing = pairs(ids, torch.ones(ids.shape), probs=probs)
    return balance.switch_loss(routing, balance.expert_counts(ids.flatten(), E), None, None)


def batch(N, E, k):
    """probs and ids where the last expert is chosen by nobody."""
    z = torch.randn(N, E, generator=torch.Generator().manual_seed(N))
    z[:, E - 1] -= 3 * (E > k)
    probs = (1.5 * z).softmax(-1)
    return probs, probs.topk(k, -1).indices


def check(mine):
    for size in SIZES:
        loss(mine, *batch(*size))
        by_hand(mine, *batch(*size))
    for N, E, k in ((4, 4, 1), (6, 3, 2), (8, 8, 2)):
        even = mine.switch_loss(torch.full((N, E), 1 / E), torch.arange(N * k).view(N, k) % E)
        close("the loss of even routing", even, 1.0, hint=f"E = {E}, k = {k}")
    counterexample(mine)


def loss(mine, probs, ids):
    (N, E), k = probs.shape, ids.shape[1]
    want, got = oracle(probs, ids), mine.switch_loss(probs.clone(), ids)
    shape("the loss", got, ())
    f, P = balance.expert_counts(ids.flatten(), E) / ids.numel(), probs.mean(0)
    chosen = torch.zeros(N, E).scatter(1, ids, probs.gather(1, ids)).mean(0)
    for other, why in (
            (want / E, f"is {E} times too small: is the factor E missing, or the sum a mean?"),
            (want * k, f"is {k} times too large: f is a share of N k pairs, so that it sums to 1"),
            (want * E, f"is {E} times too large: one factor E is enough"),
            (E * (f * chosen).sum(), "counts only the probabilities of the chosen experts: P is "
             "the mean of p_i over all tokens"),
            (E * (f * f).sum(), "is E sum f_i f_i: one of the two factors is P, the mean "
             "probability, or it has no gradient"),
            (E * (P * P).sum(), "is E sum P_i P_i: one of the factors is f, which counts pairs")):
        ask(abs(got - want) < 1e-5 or abs(got - other) > 1e-5, f"the loss {why}")
    close("the loss", got, want, hint=f"N = {N}, E = {E}, k = {k}")
    moved = grads(lambda p: mine.switch_loss(p, ids), probs)[0]
    ask(moved.any(), "the loss has no gradient to probs: is P detached?")
    close("the gradient of your loss", moved, grads(lambda p: oracle(p, ids), probs)[0],
          hint="P alone carries a gradient; f is a count")


def by_hand(mine, probs, ids):
    (N, E), leaf = probs.shape, probs.clone().requires_grad_()
    want = torch.autograd.grad(oracle(leaf, ids), leaf)[0]
    got = mine.gradient(probs.clone(), ids)
    shape("gradient", got, (N, E))
    chosen = torch.zeros(N, E).scatter(1, ids, 1.0)
    for other, why in (
            (want * N, f"is {N} times too large: P is a mean over N tokens, so divide by N"),
            (want / E, f"is {E} times too small: the factor E is missing"),
            (want * chosen, "is not 0 for an expert that a token did not choose: P_i is a mean "
             "over all tokens")):
        ask(torch.allclose(got, want) or not torch.allclose(got, other), f"the gradient {why}")
    close("gradient", got, want)


def counterexample(mine):
    probs = mine.below_one()
    ask(isinstance(probs, torch.Tensor) and probs.dim() == 2 and min(probs.shape) >= 2,
        "below_one returns no tensor (N, E) with N >= 2 and E >= 2")
    total, top = probs.sum(-1), probs.topk(2, -1).values
    row = int((total - 1).abs().argmax())
    ask(abs(total[row] - 1) < 1e-4, f"row {row} of below_one sums to {total[row]:.3f}, not to 1")
    ask((probs >= 0).all(), "a probability of below_one is negative")
    ask((top[:, 0] - top[:, 1]).min() > 1e-4, "in a row of below_one two experts tie")
    found = float(oracle(probs, probs.argmax(-1, keepdim=True)))
    ask(found < 0.95, f"the loss of below_one is {found:.3f}, not below 0.95: let most tokens "
        "choose an expert by little, and the others one with much")


WRONG = [
    ("return E * (f * P).sum()", "return (f * P).sum()", "is the factor E missing"),
    ("return E * (f * P).sum()", "return E * (f * P).mean()", "is the factor E missing"),
    ("    f = torch.bincount(ids.flatten(), minlength=E) / ids.numel()\n    # eq. 6",
     "    f = torch.bincount(ids.flatten(), minlength=E) / len(ids)\n    # eq. 6",
     "so that it sums to 1"),
    ("P = probs.mean(0)",
     "P = torch.zeros_like(probs).scatter(1, ids, probs.gather(1, ids)).mean(0)",
     "counts only the probabilities of the chosen"),
    ("P = probs.mean(0)", "P = probs.detach().mean(0)", "is P detached?"),
    ("return E * (f * P).sum()", "return E * (P * P).sum()", "which counts pairs"),
    ("return E * (f * P).sum()", "return E * (f * f).sum()", "or it has no gradient"),
    ("(E / N * f)", "(E * f)", "divide by N"),
    ("(E / N * f)", "(f / N)", "the factor E is missing"),
    ("return (E / N * f).expand(N, E)",
     "return (E / N * f) * torch.zeros(N, E).scatter(1, ids, 1.0)", "that a token did not choose"),
    ("[[0.51, 0.49]] * 3 + [[0.0, 1.0]]", "[[0.9, 0.1], [0.1, 0.9]]", "not below 0.95"),
]
