"""A balanced plan by scaling rows and columns.

lecture 2 · difficulty 3 of 5 · importance 3 of 5 · 30 minutes · 5 points

S-BASE (Clark et al. 2202.01169 sec. 3.1) asks which plan moves N tokens to E experts so that the
tokens prefer where they go and every expert gets the same: a matrix P (N, E) of positive numbers
whose rows sum to 1 and whose columns sum to N / E. Of all those, take the one that makes

    sum_ij P_ij z_ij  -  tau sum_ij P_ij log P_ij

largest, with the router's logits z (N, E). It is exp(z / tau) with its rows and columns multiplied
by numbers, and these are found by turns (Sinkhorn): scale every column to N / E, then every row to
1, and again. A small tau is near to a hard assignment and needs more turns.

1. `log_plan`: the logarithm of P after a fixed number of turns. Stay with logarithms: at z / tau =
   100 exp no longer fits into float32.
2. `route`: in training a token goes to the largest entry of its row of the plan. The plan looks at
   the whole batch, later tokens and neighbours included, so that it cannot be used in generation:
   in evaluation a token goes to its largest logit. The gate is in both cases the sigmoid of the raw
   logit of the chosen expert, and that is the way by which the router learns.
"""
import math

import torch


def log_plan(logits, tau, turns):
    """logits (N, E) -> log P (N, E), without a gradient. A turn scales the columns and then the
    rows, so that the rows are exact at the end and the columns nearly so."""
    N, E = logits.shape
    # the plan is data for a choice; a gradient through all turns would be costly, and is not meant
    plan = logits.detach() / tau
    for _ in range(turns):
        # to divide a column by its sum is to subtract its logsumexp; then times N / E
        plan = plan - plan.logsumexp(0, keepdim=True) + math.log(N / E)
        plan = plan - plan.logsumexp(1, keepdim=True)
    return plan


def route(logits, tau, turns, training):
    """logits (N, E) -> experts (N,) int64 and gates (N,), whose gradient goes to the logits."""
    # balanced while it learns, and by itself alone when it is used
    value = log_plan(logits, tau, turns) if training else logits
    experts = value.argmax(-1)
    # from the raw logit: an entry of the plan says what the batch left over, and has no gradient
    gates = logits.gather(1, experts.unsqueeze(1)).squeeze(1).sigmoid()
    return experts, gates


# ---- the check ----
from course.check import ask, close, grads, shape  # noqa: E402
from routers import ROUTERS  # noqa: E402
from settings import FFNConfig  # noqa: E402


def oracle(E, tau, turns, training=True):
    """The repository's router; its logits are its input."""
    config = FFNConfig(router="sinkhorn", n_expert=E, top_k=1, sinkhorn_tau=tau,
                       sinkhorn_iters=turns)
    router = ROUTERS["sinkhorn"](config, E).train(training)
    router.score = torch.nn.Identity()
    return router


def drawn(N, E, seed, scale=1.0):
    """Logits of which the first experts are ahead."""
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(N, E, generator=random) + torch.linspace(2, 0, E)) * scale


def check(mine):
    for seed, (N, E, tau, turns) in enumerate(((12, 3, 1.0, 8), (40, 5, 0.5, 3), (7, 4, 2.0, 1))):
        plan(mine, drawn(N, E, seed), tau, turns)
    z = drawn(24, 4, 3, scale=40)
    large = mine.log_plan(z.clone(), 0.1, 8)
    ask(large.isfinite().all(), f"log_plan is not finite for logits up to {z.max():.0f} at tau = "
        "0.1: exp(1000) does not fit into float32, so never leave the logarithm (logsumexp)")
    close("log_plan of large logits", large, oracle(4, 0.1, 8).plan(z), rtol=1e-4, atol=1e-2)
    routes(mine, drawn(60, 4, 4), 1.0, 8)
    routes(mine, drawn(9, 6, 5), 0.3, 20)


def same(a, b):
    return torch.allclose(a.float(), b, rtol=1e-4, atol=1e-4)


def plan(mine, z, tau, turns):
    (N, E), sizes = z.shape, f"(N = {z.shape[0]}, E = {z.shape[1]}, tau = {tau}, turns = {turns})"
    got, want = mine.log_plan(z.clone(), tau, turns), oracle(E, tau, turns).plan(z)
    shape("what log_plan returns", got, (N, E))
    ask(not (got >= 0).all(), "log_plan returns the plan itself: return its logarithm")
    ask(not same(got, (z / tau).log_softmax(1)), "log_plan is the softmax of z / tau: its rows sum "
        "to 1, but nothing balances its columns")
    for n in range(1, 2 * turns + 3):
        other = oracle(E, tau, n).plan(z)
        ask(same(other, want) or not same(got, other), f"this is the plan after {n} of {turns} "
            f"turns {sizes}: a turn scales the columns and the rows")
    for other in {1 / tau, 1.0} - {tau}:
        ask(not same(got, oracle(E, other, turns).plan(z)), f"this is the plan of tau = {other:g}, "
            f"not {tau:g}: divide the logits by tau, once, before the first turn")
    rows, columns = got.exp().sum(1), got.exp().sum(0)
    i = int((rows - 1).abs().argmax())
    first = "" if not torch.allclose(columns, torch.tensor(N / E), rtol=1e-3) else (
        ": scale the columns first and the rows last, since each token has to go somewhere")
    ask((rows[i] - 1).abs() < 1e-4,
        f"row {i} of the plan sums to {rows[i]:.3f}, not to 1 {sizes}{first}")
    close(f"log_plan {sizes}", got, want, rtol=1e-4, atol=1e-4,
          hint=f"columns sum to {[round(c, 2) for c in columns.tolist()]}, N / E is {N / E:g}")
    ask(not mine.log_plan(z.clone().requires_grad_(), tau, turns).requires_grad, "log_plan carries "
        "a gradient: it is data for a choice, so detach the logits")


def routes(mine, z, tau, turns):
    N, E = z.shape
    for training in (True, False):
        got, gates = mine.route(z.clone(), tau, turns, training)
        want = oracle(E, tau, turns, training)(z, None)
        shape("the experts of route", got, (N,))
        shape("the gates of route", gates, (N,))
        raw = z.argmax(-1)
        ask(not (training and torch.equal(got, raw)), "in training tokens go to their largest "
            f"logit, {int(raw.bincount().max())} of {N} to one of {E} experts: take the largest "
            "entry of the plan")
        i = int((got != raw).int().argmax())
        ask(training or got[i] == raw[i], f"in evaluation token {i} goes to expert {int(got[i])}, "
            f"and its largest logit is that of {int(raw[i])}: the plan depends on other tokens, so "
            "leave it out")
        ask(torch.equal(got, want.expert), "the experts are not the largest entries of the plan")
        about_gates(mine, z, (tau, turns, training), gates, got, want.weight)


def about_gates(mine, z, how, gates, experts, want):
    (tau, turns, training), E, at = how, z.shape[1], experts.unsqueeze(1)
    entry = oracle(E, tau, turns).plan(z).gather(1, at).squeeze(1)
    when, probability = "training" if training else "evaluation", z.softmax(-1).gather(1, at)
    for what, wrong in (("the entry of the plan", entry.exp()), ("1", torch.ones(len(z))),
                        ("the sigmoid of the plan's entry", entry.sigmoid()),
                        ("the softmax over the experts", probability.squeeze(1)),
                        ("the raw logit", z.gather(1, at).squeeze(1))):
        ask(not same(gates, wrong), f"the gate in {when} is {what}: take the sigmoid of the raw "
            "logit, by which the router learns")
    close(f"the gates in {when}", gates, want, hint="the sigmoid of the chosen expert's raw logit")
    close(f"the gradient of the gates in {when}",
          grads(lambda t: mine.route(t, *how)[1], z)[0],
          grads(lambda t: oracle(E, *how)(t, None).weight, z)[0],
          hint="it goes to the raw logit of the chosen expert alone")


WRONG = [
    ("logits.detach() / tau", "logits.detach() * tau", "divide the logits by tau"),
    ("logits.detach() / tau", "logits.detach()", "this is the plan of tau = 1"),
    ("logits.detach() / tau", "logits / tau", "carries a gradient"),
    ("for _ in range(turns):", "for _ in range(1):", "the plan after 1 of 8 turns"),
    ("plan = plan - plan.logsumexp(0, keepdim=True) + math.log(N / E)\n", "pass\n",
     "nothing balances its columns"),
    ("        plan = plan - plan.logsumexp(0, keepdim=True) + math.log(N / E)\n"
     "        plan = plan - plan.logsumexp(1, keepdim=True)\n",
     "        plan = plan - plan.logsumexp(1, keepdim=True)\n"
     "        plan = plan - plan.logsumexp(0, keepdim=True) + math.log(N / E)\n",
     "columns first and the rows last"),
    ("plan = plan - plan.logsumexp(1, keepdim=True)\n",
     "plan = plan - plan.logsumexp(1, keepdim=True) + math.log(N / E)\n", "not to 1"),
    ("    return plan\n", "    return plan.exp()\n", "return its logarithm"),
    ("        plan = plan - plan.logsumexp(0, keepdim=True) + math.log(N / E)\n"
     "        plan = plan - plan.logsumexp(1, keepdim=True)\n",
     "        p = plan.exp()\n        p = p / p.sum(0) * N / E\n"
     "        plan = (p / p.sum(1, keepdim=True)).log()\n", "never leave the logarithm"),
    ("if training else logits", "if training or len(logits) > 1 else logits", "so leave it out"),
    ("value = log_plan(logits, tau, turns) if training else logits", "value = logits",
     "take the largest entry of the plan"),
    ("gates = logits.gather(1, experts.unsqueeze(1)).squeeze(1).sigmoid()",
     "gates = log_plan(logits, tau, turns).exp().amax(1)", "is the entry of the plan"),
    ("gates = logits.gather(1, experts.unsqueeze(1)).squeeze(1).sigmoid()",
     "gates = logits.softmax(-1).gather(1, experts.unsqueeze(1)).squeeze(1)", "is the softmax"),
    ("gates = logits.gather(1, experts.unsqueeze(1)).squeeze(1).sigmoid()",
     "gates = torch.ones(len(logits))", "the gate in training is 1"),
    ("gates = logits.gather", "gates = logits.detach().gather", "the gradient of the gates"),
]
