"""A sparse layer as a loop over experts.

lecture 1 · difficulty 1 of 5 · importance 5 of 5 · 20 minutes · 4 points

A router has chosen: token n goes to the experts ids[n] (k of them), whose outputs are weighed with
gates[n]. The layer returns

    y_n = sum over j = 1..k of gates[n, j] E_i(x_n),   i = ids[n, j]     (Shazeer 1701.06538 eq. 1)

A (token, expert) choice is called a pair; there are P = N k of them. Run each expert once, on the
tokens that chose it and on no others: this is all that makes the layer cheap. Every faster path of
this repository must agree with this loop (moe.py: dispatch_loop), so it is the one to read first.
"""
import torch


def load(ids, n_expert):
    """ids (N, k) -> (n_expert,): how many of the P pairs go to each expert. It sums to P."""
    # an expert that nobody chose is counted too: without minlength the last ones would be missing
    return torch.bincount(ids.flatten(), minlength=n_expert)


def moe(x, ids, gates, experts):
    """x (N, d), ids (N, k), gates (N, k) -> y (N, d), with gradients to x, gates and the experts.
    experts: a list of E functions, each from rows (n, d) to rows (n, d), for any n, also 0."""
    y = torch.zeros_like(x)
    for i, expert in enumerate(experts):
        # the pairs of expert i: which token, and which of its k choices, so which gate
        token, choice = (ids == i).nonzero(as_tuple=True)
        # only these rows are computed; the gate weighs what comes out, since E_i is not linear
        rows = expert(x[token]) * gates[token, choice].unsqueeze(1)
        # added, not assigned: a token has k experts, and each adds its part
        y = y.index_add(0, token, rows)
    return y


# ---- the check ----
from types import SimpleNamespace  # noqa: E402

from balance import expert_counts  # noqa: E402
from course.check import ask, close, grads, shape  # noqa: E402
from ffn import activation_of  # noqa: E402
from moe import Experts, dispatch_loop  # noqa: E402
from routers import pairs  # noqa: E402

SIZES = (7, 4, 5, 2), (6, 3, 4, 1), (9, 5, 6, 3), (1, 2, 3, 2), (4, 2, 2, 2)        # N, d, E, k


def batch(N, d, E, k, random):
    """x, ids, gates, and the repository's experts, of which the last is chosen by nobody."""
    experts = Experts(E, d, 3, "gelu")
    for p in experts.parameters():
        p.data = torch.randn(p.shape, generator=random)
    scores = torch.rand(N, E, generator=random)
    if E > k:
        scores[:, E - 1] -= 1
    gates = 0.2 + torch.rand(N, k, generator=random)        # they do not sum to 1
    return torch.randn(N, d, generator=random), scores.topk(k, -1).indices, gates, experts


def functions(experts, ran):
    """The experts as functions of their own; `ran` counts the rows that they compute."""
    def one(i, x):
        ran[i] += len(x)
        return activation_of(x @ experts.w_in[i].T, "gelu") @ experts.w_out[i].T

    return [lambda x, i=i: one(i, x) for i in range(len(ran))]


def check(mine):
    for size in SIZES:
        one_size(mine, *size, torch.Generator().manual_seed(size[0]))


def one_size(mine, N, d, E, k, random):
    x, ids, gates, experts = batch(N, d, E, k, random)
    want = expert_counts(ids.flatten(), E)
    got = mine.load(ids, E)
    shape(f"load (E = {E}, where nobody chose the last expert)", got, (E,))
    ask(int(got.sum()) == N * k, f"the load sums to {int(got.sum())}, not to P = N k = {N * k}: "
        "all k choices of a token count, whatever their gates are")
    close("load", got.float(), want)
    # what they compute, then what comes out
    ran, y = [0] * E, dispatch_loop(x, pairs(ids, gates), experts)
    out = mine.moe(x.clone(), ids, gates.clone(), functions(experts, ran))
    shape("y", out, (N, d))
    ask(sum(ran) <= N * k, f"the experts ran on {sum(ran)} rows, for N k = {N * k} pairs: "
        "give each expert the rows of the tokens that chose it, and no others")
    if not torch.allclose(out, y, rtol=1e-5, atol=1e-5):
        diagnose(out, y, x, ids, gates, experts)
    names = "x", "gates", "w_in", "w_out"
    tensors = x, gates, experts.w_in, experts.w_out

    def theirs(x, gates, *weights):
        return mine.moe(x, ids, gates, functions(like(experts, *weights), [0] * E))

    def ours(x, gates, *weights):
        return dispatch_loop(x, pairs(ids, gates), like(experts, *weights))

    for name, a, b in zip(names, grads(theirs, *tensors), grads(ours, *tensors)):
        ask(a.any() or not b.any(), f"no gradient reaches {name}: is something detached?")
        close(f"the gradient of {name}", a, b, rtol=1e-4, atol=1e-5)


def like(experts, w_in, w_out):
    """The same experts with other matrices."""
    return SimpleNamespace(w_in=w_in, w_out=w_out, activation=experts.activation)


def diagnose(out, y, x, ids, gates, experts):
    """Raises Wrong for what is often mistaken, and else for the largest difference."""
    E, (N, k) = len(experts.w_in), ids.shape

    def same(y):
        return torch.allclose(out, y, rtol=1e-4, atol=1e-5)

    each = [functions(experts, [0] * E)[i] for i in range(E)]
    for other, why in (
            (torch.ones_like(gates), "y is the plain sum of the experts: where is the gate?"),
            (gates.square(), "the gate is applied twice"),
            (gates / gates.sum(-1, keepdim=True), "you divide the gates by their sum: take them as "
             "the router gave them")):
        ask(not same(dispatch_loop(x, pairs(ids, other), experts)), why)
    before = torch.stack([sum(each[i](x[n:n + 1] * g)[0] for i, g in zip(ids[n].tolist(), gates[n]))
                          for n in range(N)])
    ask(not same(before), "the gate multiplies what goes into the expert: the expert is not "
        "linear, so weigh what comes out of it")
    last = torch.stack([each[max(row)](x[n:n + 1])[0] * gates[n, row.index(max(row))]
                        for n, row in enumerate(ids.tolist())])
    ask(k == 1 or not same(last), "of a token's k experts only one is in y: add, do not assign")
    close("y", out, y, atol=1e-5)


WRONG = [
    (" * gates[token, choice].unsqueeze(1)", "", "where is the gate?"),
    ("expert(x[token]) * gates[token, choice].unsqueeze(1)",
     "expert(x[token] * gates[token, choice].unsqueeze(1))", "so weigh what comes out"),
    ("gates[token, choice].unsqueeze(1)", "gates[token, choice].unsqueeze(1) ** 2",
     "applied twice"),
    ("y = y.index_add(0, token, rows)", "y = y.index_copy(0, token, rows)",
     "add, do not assign"),
    ("expert(x[token]) * gates[token, choice].unsqueeze(1)",
     "expert(x)[token] * gates[token, choice].unsqueeze(1)", "for N k = 14 pairs"),
    ("gates[token, choice].unsqueeze(1)", "gates[token, choice].detach().unsqueeze(1)",
     "no gradient reaches gates"),
    (", minlength=n_expert", "", "load (E = 5, where nobody chose the last expert) has shape (4,)"),
    ("torch.bincount(ids.flatten()", "torch.bincount(ids[:, 0]", "not to P = N k = 14"),
    ("gates[token, choice].unsqueeze(1)",
     "(gates / gates.sum(-1, keepdim=True))[token, choice].unsqueeze(1)",
     "divide the gates by their sum"),
]
