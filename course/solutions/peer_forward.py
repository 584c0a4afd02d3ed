"""PEER's forward pass, to be read.

lecture 4 · difficulty 4 of 5 · importance 4 of 5 · 40 minutes · 6 points

A feed-forward layer of E = m^2 experts, each of them one neuron (He 2024, 2407.04153, algorithm 1):

    q = norm(x W_q)                     h queries for each token, each cut into two halves q', q"
    s_ij = q' . c_i + q" . c'_j         the score of expert i m + j, from two tables of m sub-keys
    y = sum over the heads and their k best experts of g act(x . u) v

The gates g of a head are the softmax of that head's k best scores. All heads share the sub-keys
and the experts, and act is the exact GELU. Expert i m + j has row i m + j of one table, with its u
and its v side by side.

A query needs 2 m dot products, not m^2. So find the k best sub-keys of each half first: the k best
experts are among the k^2 sums of those. Never score all m^2 experts.

It matters because this is the whole layer, a million experts in a dozen lines. The fast kernels of
this repository are tested against a function like yours.
"""
import torch
import torch.nn.functional as F


def queries(x, w_q, norm, h):
    """x (N, d) -> queries (N, h, 2, c), both halves of each.

    w_q (2 h c, d): its rows are ordered by head, then half, then feature. norm: a function
    (N, 2 h c) -> (N, 2 h c) of all features of a token's queries, to be called once."""
    # the norm sees the features of all heads side by side: it has a mean for each of the 2 h c
    q = norm(x @ w_q.T)                                                         # (N, 2hc)
    # a view cuts the features in the order of the rows: head, half, feature
    return q.view(len(x), h, 2, -1)


def retrieve(q, sub_keys, k):
    """Queries (N, h, 2, c) and sub_keys (2, m, c) -> the k best of the m^2 experts of each query:
    scores (N, h, k), largest first, and experts (N, h, k), numbers i m + j."""
    m = sub_keys.shape[1]
    # q' . c_i and q" . c'_j: 2 m dot products for each query, and the k best of each half
    half, at = torch.einsum("nhpc,pmc->nhpm", q, sub_keys).topk(k, -1)          # (N, h, 2, k)
    # all k^2 pairs: the second best of one half may go with the best of the other
    sums = half[:, :, 0, :, None] + half[:, :, 1, None, :]                      # (N, h, k, k)
    # no other expert can win: a sub-key outside has k better ones, and so the expert k better ones
    scores, place = sums.flatten(2).topk(k, -1)                                 # (N, h, k)
    # expert i m + j, from the sub-keys' own numbers and not their ranks
    numbers = at[:, :, 0, :, None] * m + at[:, :, 1, None, :]
    return scores, numbers.flatten(2).gather(-1, place)


def forward(x, w_q, norm, sub_keys, table, h, k):
    """The layer: x (N, d) -> y (N, d), with its gradients. w_q, norm and sub_keys as above; table
    (E, 2, d) holds u_i = table[i, 0] and v_i = table[i, 1]."""
    scores, experts = retrieve(queries(x, w_q, norm, h), sub_keys, k)
    # each head has a softmax of its own, so that a token's gates sum to h
    gate = scores.softmax(-1)                                                   # (N, h, k)
    # u and v of the R = h k experts of each token
    rows = F.embedding(experts.flatten(1), table.flatten(1))                    # (N, R, 2d)
    u, v = rows.chunk(2, -1)
    # one neuron each: act(x . u), weighed by the gate after the activation
    neuron = F.gelu(torch.einsum("nd,nrd->nr", x, u))
    return torch.einsum("nr,nrd->nd", neuron * gate.flatten(1), v)


# ---- the check ----
from torch.func import functional_call  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from course.check import Wrong, ask, close, grads, shape  # noqa: E402
from ffn import Context  # noqa: E402
from peer import PEER, topk_readable  # noqa: E402
from peer import retrieve as retrieve_here  # noqa: E402
from settings import FFNConfig  # noqa: E402


def check(mine):
    check_queries(mine)
    check_retrieval(mine)
    check_gates(mine)
    for size in ((5, 12, 6, 3, 4), (3, 8, 4, 2, 3), (1, 9, 5, 1, 5)):
        check_layer(mine, *size)


def check_queries(mine):
    N, d, h, c = 3, 8, 2, 3
    x, w_q, calls = torch.randn(N, d), torch.randn(2 * h * c, d), []

    def norm(q):
        calls.append(q.shape)
        ask(tuple(q.shape) == (N, 2 * h * c), f"norm gets a tensor {tuple(q.shape)}, not {(N, 2 * h * c)}"
            " = (N, 2 h c): it has statistics of its own for each feature of each head")
        return 2 * q + torch.arange(2. * h * c)

    q = mine.queries(x, w_q, norm, h)
    shape("queries", q, (N, h, 2, c))
    ask(calls, "queries never calls norm: the queries are normalised before they meet the sub-keys")
    flat = norm(x @ w_q.T)
    for order, other in (("half, then head", flat.view(N, 2, h, c).transpose(1, 2)),
                         ("head, then feature, then half", flat.view(N, h, c, 2).transpose(2, 3))):
        ask(not torch.allclose(q, other, rtol=1e-4), f"the features are cut by {order}: the rows of w_q"
            " are ordered by head, then half, then feature")
    close("queries", q, flat.view(N, h, 2, c), 1e-4, 1e-5)


def check_retrieval(mine):
    for N, h, m, c, k in ((4, 2, 5, 3, 4), (6, 1, 7, 4, 1), (3, 3, 4, 2, 4)):
        q, sub_keys = torch.randn(N, h, 2, c), torch.randn(2, m, c)
        score, expert = mine.retrieve(q, sub_keys, k)
        shape("scores of retrieve", score, (N, h, k))
        shape("experts of retrieve", expert, (N, h, k))
        every = torch.cartesian_prod(torch.arange(k), torch.arange(k)).unbind(1)
        best, want = retrieve_here(q, sub_keys, k, every, topk_readable)
        expert, want = expert.long(), want.long()
        i, j = want // m, want % m
        if torch.equal(expert, j * m + i) and not torch.equal(expert, want):
            n = (i != j).flatten().nonzero()[0].item()
            i, j = i.flatten()[n].item(), j.flatten()[n].item()
            raise Wrong(f"the experts are numbered j m + i: sub-keys i = {i} and j = {j} of m = {m} are "
                        f"expert i m + j = {i * m + j}, not {j * m + i}")
        missing_expert(q, sub_keys, expert, want)
        close("scores of retrieve", score, best, 1e-4, 1e-5, "the sum of both halves' scores, largest first")
        ask(torch.equal(expert, want), "the right experts come in another order than their scores")
    check_cost(mine)


def missing_expert(q, sub_keys, expert, want):
    """Names an expert that should have been found, and where it stands in the two lists."""
    m, k = sub_keys.shape[1], want.shape[2]
    order = torch.einsum("nhpc,pmc->nhpm", q, sub_keys).argsort(-1, descending=True)
    for n, a in torch.cartesian_prod(torch.arange(len(q)), torch.arange(q.shape[1])).tolist():
        lost = [e for e in want[n, a].tolist() if e not in expert[n, a].tolist()]
        if lost:
            first, second = ((order[n, a, half] == s).nonzero().item() + 1
                             for half, s in enumerate(divmod(lost[0], m)))
            alike = ", by the sub-keys' own numbers and not their ranks" if first == second else ""
            raise Wrong(f"expert {lost[0]}, one of the {k} best of a query, was not found: its sub-keys are "
                        f"number {first} of the first half's list and number {second} of the second's; all "
                        f"k^2 pairs of the two lists compete{alike}")


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made inside it has; a view of what was there before makes none."""

    def __init__(self, *given):
        super().__init__()
        self.most, self.given = 0, {t.untyped_storage().data_ptr() for t in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)
                and t.untyped_storage().data_ptr() not in self.given]
        self.most = max([self.most, *(t.numel() for t in made)])
        return out


def check_cost(mine):
    N, h, m, k = 16, 2, 64, 3
    q, sub_keys = torch.randn(N, h, 2, 3), torch.randn(2, m, 3)
    with Largest(q, sub_keys) as largest:
        mine.retrieve(q, sub_keys, k)
    ask(largest.most < N * h * m * m, f"a tensor of {largest.most:,} numbers was made, a score for each of "
        f"the m^2 = {m * m:,} experts and {N * h} queries: take the k best of each half, then their k^2 sums")


def layer_of(d, m, h, k, norm="batchnorm"):
    """This repository's layer in evaluation, with batch statistics as after training."""
    config = FFNConfig(kind="peer", n_keys=m, peer_heads=h, peer_top_k=k, query_norm=norm,
                       peer_path="readable")
    layer = PEER(config, d).eval()
    with torch.no_grad():
        for t in (*layer.queries.norm.parameters(), *layer.queries.norm.buffers()):
            t.copy_(torch.rand(t.shape) + 0.5)
    return layer


def run(layer, x, **weights):
    ctx = Context(torch.zeros(1, len(x), dtype=torch.long))
    return functional_call(layer, weights, (x.unsqueeze(0), ctx))[0].squeeze(0)


def check_gates(mine):
    """All experts alike and all scores equal, so that one number says what was done with the gates."""
    N, d, m, h, k, z = 2, 6, 4, 2, 3, -1.5
    x, u, layer = torch.randn(N, d), torch.zeros(d), layer_of(d, m, h, k, "none")
    x[:, 0], u[0] = z, 1
    table = torch.stack([u, torch.ones(d)]).repeat(m * m, 1, 1)
    sub_keys = torch.zeros_like(layer.sub_keys)
    y = mine.forward(x, layer.queries.weight.detach(), lambda q: q, sub_keys, table, h, k)
    shape("y", y, (N, d))
    # x . u = z everywhere: what y is where something is done otherwise
    inside, act = F.gelu(torch.tensor(z / k)).item(), F.gelu(torch.tensor(z)).item()
    for value, sentence in {
            act: "the gates of a token sum to 1 over all heads: each head has a softmax of its own, and "
                 "they sum to h",
            h * k * act: "all gates are 1: the softmax of a head's k scores is missing",
            h / k * act: "the gates of a head sum to 1/k: is there a softmax of each half, or a mean over k?",
            h * k / m**2 * act: "the gates of a head sum to k/E: the softmax is over the k scores that are "
                                "kept",
            h * k * inside: "the gate is inside the activation: act(g x . u) is not g act(x . u)",
            h * z: "the activation is missing: y is the sum of g (x . u) v",
            h: "x . u plays no part: y is the sum of g v, which is PKM's layer and not PEER's"}.items():
        ask(not torch.allclose(y, torch.full_like(y, value), rtol=1e-3), sentence)
    tanh = h * F.gelu(torch.tensor(z), approximate="tanh")
    ask((y - tanh).abs().max() > 1e-6, "this is the tanh approximation of the GELU, not the exact one")
    ask(y[:, 1:].abs().max() > 0, "u and v are swapped: u_i is table[i, 0], v_i is table[i, 1]")
    close("y, where all experts are alike", y, run(layer, x, sub_keys=sub_keys, table=table))


def check_layer(mine, N, d, m, h, k):
    """Output and all gradients on random numbers."""
    layer, x, at = layer_of(d, m, h, k), torch.randn(N, d), f"(N, d, m, h, k = {N}, {d}, {m}, {h}, {k})"
    weights = {"queries.weight": layer.queries.weight, "sub_keys": layer.sub_keys, "table": layer.table}

    def theirs(x, w_q, sub_keys, table):
        return mine.forward(x, w_q, layer.queries.norm, sub_keys, table, h, k)

    def ours(x, *given):
        return run(layer, x, **dict(zip(weights, given)))

    y = theirs(x, *weights.values())
    shape("y", y, (N, d))
    close(f"y {at}", y, run(layer, x), 1e-4, 1e-5)
    got, want = grads(theirs, x, *weights.values()), grads(ours, x, *weights.values())
    names = ["x", "w_q", "sub_keys", "table"]
    for name, a, b in zip(names, got, want):
        ask(a.abs().max() > 0 or b.abs().max() == 0,
            f"{name} gets no gradient: the scores, the gates and the neurons must keep theirs")
    for name, a, b in zip(names, got, want):
        close(f"the gradient of {name} {at}", a, b, 1e-3, 1e-5)


WRONG = [
    ("norm(x @ w_q.T)", "x @ w_q.T", "never calls norm"),
    ("norm(x @ w_q.T)", "norm((x @ w_q.T).view(len(x) * h, -1))", "norm gets a tensor (6, 6)"),
    ("view(len(x), h, 2, -1)", "view(len(x), 2, h, -1).transpose(1, 2)", "half, then head"),
    ("at[:, :, 0, :, None] * m + at[:, :, 1, None, :]",
     "at[:, :, 0, :, None] + at[:, :, 1, None, :] * m", "numbered j m + i"),
    ("numbers = at[:, :, 0, :, None] * m + at[:, :, 1, None, :]",
     "numbers = torch.arange(k)[:, None] * m + torch.arange(k) + 0 * at[:, :, 0, :, None]",
     "own numbers and not their ranks"),
    ("sums = half[:, :, 0, :, None] + half[:, :, 1, None, :]",
     "sums = half[:, :, 0, :, None] + half[:, :, 1, None, :] + torch.eye(k).log()", "all k^2 pairs"),
    ("sub_keys).topk(k, -1)", "sub_keys).topk(m, -1)", "a score for each of the m^2"),
    ("gate = scores.softmax(-1)", "gate = scores.flatten(1).softmax(-1)", "sum to 1 over all heads"),
    ("gate = scores.softmax(-1)", "gate = torch.ones_like(scores)", "all gates are 1"),
    ("gate = scores.softmax(-1)", "gate = scores.detach().softmax(-1)", "w_q gets no gradient"),
    ("F.gelu(torch.einsum(\"nd,nrd->nr\", x, u))",
     "F.gelu(torch.einsum(\"nd,nrd->nr\", x, u) * gate.flatten(1)) / gate.flatten(1)",
     "inside the activation"),
    ("F.gelu(torch.einsum(\"nd,nrd->nr\", x, u))", "torch.einsum(\"nd,nrd->nr\", x, u)",
     "the activation is missing"),
    ("x, u))", "x, u), approximate=\"tanh\")", "tanh approximation"),
    ("u, v = rows.chunk(2, -1)", "v, u = rows.chunk(2, -1)", "u and v are swapped"),
]
