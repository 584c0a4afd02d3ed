"""Sort the pairs by expert, one grouped product, and home again.

lecture 3 · difficulty 3 of 5 · importance 5 of 5 · 35 minutes · 6 points

A routing is a list of P pairs: pair p says that token[p] goes to expert[p] and that its result is
weighed by weight[p]. The loop over experts (moe.dispatch_loop) runs one small product for each
expert and has to ask how many rows it will get. A grouped product does all of them at once, if the
rows of one expert lie next to each other:

    pair         0   1   2   3   4   5             expert        2  0  2  0  2  3      (E = 4)
    sorted by expert: pairs 1 3 | | 0 2 4 | 5      ends          2  2  5  6

1. `expert_order`: in which order the pairs stand then, and where each expert's rows end. Experts
   without a pair have an end as well: that of the expert before.
2. `sort_dispatch`: gather the rows, two grouped products with silu between them, weigh, and add
   each row to its token. With the experts' matrices W_in (E, w, d) and W_out (E, d, w) it is

       y_n = sum over the pairs p of token n of weight_p W_out[e] silu(W_in[e] x_n),   e = expert_p

A token may have k pairs, another number of them, or none, and in any order (where experts choose,
pairs come by expert): the same function serves them all.
"""
import torch
import torch.nn.functional as F


# given
def grouped(rows, matrices, ends):
    """rows (P, a) in the order of their experts, matrices (E, b, a), ends (E,) -> (P, b): each row
    by the matrix of its expert. What F.grouped_mm does in one kernel, as a loop to be read."""
    parts, start = [], 0
    for matrix, end in zip(matrices, ends.tolist()):
        parts.append(rows[start:end] @ matrix.T)
        start = end
    return torch.cat(parts)


def expert_order(expert, n_expert):
    """expert (P,) -> order (P,), the pair at each place when the pairs are sorted by expert, those
    of one expert in their old order; and ends (E,), how many places the experts up to e take."""
    # stable: the same routing always gives the same sums, to the last bit
    order = expert.argsort(stable=True)
    # minlength, or the experts after the last one with a pair would be missing. (On a GPU bincount
    # waits for the host; balance.expert_counts does not.)
    counts = expert.bincount(minlength=n_expert)
    return order, counts.cumsum(0)


def sort_dispatch(x, token, expert, weight, w_in, w_out, grouped=grouped):
    """x (N, d); token, expert, weight (P,); w_in (E, w, d), w_out (E, d, w) -> y (N, d), in their
    float dtype and with a gradient for each. Calls grouped(rows, matrices, ends) twice."""
    order, ends = expert_order(expert, w_in.shape[0])
    # what was said of a pair must travel with it: its token and its weight, in sorted order
    token, weight = token.index_select(0, order), weight.index_select(0, order)
    rows = x.index_select(0, token)                                             # (P, d)
    # the gate after the activation: silu(g h) is not g silu(h)
    hidden = F.silu(grouped(rows, w_in, ends)) * weight.unsqueeze(1)            # (P, w)
    rows = grouped(hidden, w_out, ends)                                         # (P, d)
    # several rows may belong to one token: they are added, where an assignment would keep the last
    return torch.zeros_like(x).index_add(0, token, rows)


# ---- the check ----
from course.check import ask, close, grads, shape  # noqa: E402
from moe import Experts, dispatch_loop  # noqa: E402
from routers import Routing  # noqa: E402

GIVEN = grouped
KINDS = ("one expert a token", "two experts a token", "two experts a token, three experts empty",
         "all tokens at one expert", "two experts a token, the pairs in another order",
         "experts choose, so that tokens have none or several")


def drawn(kind, N=7, d=4, w=5, E=5):
    """x, token, expert, weight, w_in, w_out of a routing of this kind."""
    random = torch.Generator().manual_seed(N)

    def normal(*size):
        return torch.randn(*size, generator=random, dtype=torch.float64)

    # every token's experts from the best to the worst
    ranked, token = normal(N, E).argsort(-1), torch.arange(N)
    expert = ranked[:, 0]
    if kind.startswith("two"):
        token, expert = token.repeat_interleave(2), ranked[:, :2].flatten()
    if "empty" in kind:
        expert = 1 + 2 * (ranked[:, :1] % 2 == torch.arange(2)).long().flatten()
    if "all tokens" in kind:
        expert = torch.full((N,), 2)
    if "another order" in kind:
        mixed = torch.randperm(2 * N, generator=random)
        token, expert = token[mixed], expert[mixed]
    if kind.startswith("experts choose"):
        pair = torch.randperm(N * E, generator=random)[:N + 2]
        token, expert = pair // E, pair % E
    weight = normal(len(token)).abs() + 0.2
    return normal(N, d), token, expert, weight, normal(E, w, d), normal(E, d, w)


def oracle(x, token, expert, weight, w_in, w_out):
    experts = Experts(1, 1, 1, "silu")
    del experts.w_in, experts.w_out
    experts.w_in, experts.w_out = w_in, w_out
    return dispatch_loop(x, Routing(expert, weight, token, 0), experts)


def check(mine):
    for kind in KINDS:
        orders(mine, drawn(kind)[2], 5)
    for kind in KINDS:
        dispatches(mine, drawn(kind), kind)
    dispatches(mine, drawn("two of 17 experts a token", N=40, d=3, w=2, E=17), "E = 17, N = 40")


def orders(mine, expert, E):
    order, ends = mine.expert_order(expert.clone(), E)
    shape("order", order, expert.shape)
    empty = sorted(set(range(E)) - set(expert.tolist()))
    ask(len(ends) == E, f"ends has {len(ends)} numbers, not E = {E}: the experts {empty} have no "
        "pair, and an end all the same (bincount's minlength)")
    ask(order.sort().values.tolist() == list(range(len(expert))), "order is no permutation of the "
        f"{len(expert)} pairs")
    sorted_, held = expert.argsort(stable=True), expert[order]
    ask((held.diff() >= 0).all() or not torch.equal(order.argsort(), sorted_), "order is the place "
        f"of each pair, so that expert[order] is {held.tolist()}: it is the pair at each place")
    ask((held.diff() >= 0).all(), f"expert[order] is {held.tolist()}, which is not sorted")
    ask(torch.equal(order, sorted_), "pairs of one expert have changed places: a stable sort gives "
        "the same sums to the last bit each time")
    counts = expert.bincount(minlength=E)
    want = counts.cumsum(0)
    for wrong, what in ((counts, "how many pairs each expert has: add them up"),
                        (want - counts, "where each expert begins: it is where each ends")):
        ask(torch.equal(wrong, want) or not torch.equal(ends, wrong),
            f"ends is {ends.tolist()}, {what}")
    ask(torch.equal(ends.long(), want), f"ends is {ends.tolist()}, not {want.tolist()}")


def dispatches(mine, drawn, kind):
    x, token, expert, weight, w_in, w_out = drawn
    calls, P = [], len(token)

    def spy(rows, matrices, ends):
        calls.append(len(rows))
        ask(len(rows) == P, f"grouped gets {len(rows)} rows, not P = {P}: one for each pair")
        ask(len(ends) == len(matrices) and int(ends[-1]) == P, f"grouped gets the ends "
            f"{ends.tolist()} for {len(matrices)} experts and {P} rows")
        return GIVEN(rows, matrices, ends)

    got, want = mine.sort_dispatch(*drawn, spy), oracle(*drawn)
    shape("y", got, want.shape)
    ask(len(calls) == 2, f"grouped is called {len(calls)} times, not twice: it takes all experts "
        "at once")
    if not torch.allclose(got, want, rtol=1e-8, atol=1e-10):
        diagnose(got, want, drawn)
    close(f"y ({kind})", got, want, rtol=1e-8, atol=1e-10)
    moving = x, weight, w_in, w_out
    found = grads(lambda x, *rest: mine.sort_dispatch(x, token, expert, *rest, GIVEN), *moving)
    right = grads(lambda x, *rest: oracle(x, token, expert, *rest), *moving)
    for name, got, want in zip(("x", "weight", "w_in", "w_out"), found, right):
        ask(got.abs().max() > 0, f"the gradient of {name} is 0: is something detached, or copied "
            "into a tensor without a gradient?")
        close(f"the gradient of {name} ({kind})", got, want, rtol=1e-7, atol=1e-9)


def diagnose(got, want, drawn):
    """Raises Wrong for what is often mistaken."""
    x, token, expert, weight, w_in, w_out = drawn
    place = expert.argsort(stable=True).argsort()

    def would_be(token=token, weight=weight):
        return torch.allclose(got, oracle(x, token, expert, weight, w_in, w_out))

    # each pair's row by itself, (P, d)
    pairs = list(zip(token, expert, weight))
    row = torch.stack([w_out[e] @ (g * F.silu(w_in[e] @ x[t])) for t, e, g in pairs])
    early = torch.stack([w_out[e] @ F.silu(w_in[e] @ (g * x[t])) for t, e, g in pairs])
    last, n = torch.zeros_like(x), int((got - want).abs().amax(1).argmax())
    for p in expert.argsort(stable=True).tolist():
        last[token[p]] = row[p]
    ask(not torch.allclose(got, last), f"token {n} has {int((token == n).sum())} experts, and y "
        "holds what the last one returned: y[token] = rows and y[token] += rows keep one row of "
        "each token, index_add adds them all")
    ask(not would_be(weight=weight[place]), "the weights are in the order of the pairs, and the "
        "rows in that of the experts: sort the weights as well")
    ask(not would_be(weight=torch.ones_like(weight)), "the weights are not applied")
    ask(not would_be(weight=weight.square()), "the weights are applied twice")
    ask(not would_be(token=token[place]), "the tokens are in the order of the pairs, and the "
        "weights and ends in that of the experts: sort token as well")
    ask(not torch.allclose(got, torch.zeros_like(x).index_add(0, token, early)), "the weight is "
        "applied before the activation: silu(g h) is not g silu(h)")
    home = torch.zeros_like(x).index_add(0, token[place], row)
    ask(not torch.allclose(got, home), "the rows are in the order of the experts, and are added to "
        "the tokens in the order of the pairs: add row p to the token of pair order[p]")
    k = len(token) // len(x)
    ask(len(token) != k * len(x) or not would_be(token=torch.arange(len(x)).repeat_interleave(k)),
        "y is right only where pair p belongs to token p // k: take the tokens from `token`")


WRONG = [
    ("torch.zeros_like(x).index_add(0, token, rows)",
     "torch.zeros_like(x).index_copy(0, token, rows)", "what the last one returned"),
    ("return torch.zeros_like(x).index_add(0, token, rows)",
     "y = torch.zeros_like(x)\n    y[token] += rows\n    return y", "what the last one returned"),
    ("token, weight = token.index_select(0, order), weight.index_select(0, order)",
     "token = token.index_select(0, order)", "sort the weights as well"),
    ("token, weight = token.index_select(0, order), weight.index_select(0, order)",
     "weight = weight.index_select(0, order)", "sort token as well"),
    ("token, weight = token.index_select(0, order), weight.index_select(0, order)",
     "token, weight = order // (len(token) // len(x)), weight.index_select(0, order)",
     "token p // k"),
    ("index_add(0, token, rows)", "index_add(0, token[order.argsort()], rows)", "of pair order[p]"),
    ("F.silu(grouped(rows, w_in, ends)) * weight.unsqueeze(1)",
     "F.silu(grouped(rows, w_in, ends))", "not applied"),
    ("rows = x.index_select(0, token)",
     "rows = x.index_select(0, token) * weight.unsqueeze(1); weight = weight ** 0",
     "before the activation"),
    ("rows = grouped(hidden, w_out, ends)",
     "rows = grouped(hidden, w_out, ends) * weight.unsqueeze(1)", "applied twice"),
    ("* weight.unsqueeze(1)", "* weight.detach().unsqueeze(1)", "the gradient of weight is 0"),
    ("expert.bincount(minlength=n_expert)", "expert.bincount()", "an end all the same"),
    ("expert.bincount(minlength=n_expert)", "expert.unique(return_counts=True)[1]",
     "an end all the same"),
    ("return order, counts.cumsum(0)", "return order, counts.cumsum(0) - counts",
     "where each ends"),
    ("return order, counts.cumsum(0)", "return order, counts", "add them up"),
    ("order = expert.argsort(stable=True)", "order = expert.argsort(stable=True).argsort()",
     "the pair at each place"),
    ("order = expert.argsort(stable=True)",
     "order = len(expert) - 1 - expert.flip(0).argsort(stable=True)", "a stable sort"),
]
