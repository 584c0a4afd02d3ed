"""The best k of a million keys from two thousand scores.

lecture 4 · difficulty 4 of 5 · importance 5 of 5 · 50 minutes · 7 points

PEER (2407.04153 sec. 2.1; the keys are those of PKM, 1907.05242) finds k of E = m^2 experts for a
query without looking at all of them. The query has two halves q', q", and so has the key of expert
i m + j: sub-key c_i of the first table and sub-key c'_j of the second; each has m. Its score

    s_ij = q' . c_i + q" . c'_j

is a sum, so that 2 m dot products say all about m^2 scores: 2,000 for a million experts. The k best
of each half, and then the k best among their sums, are the k best of all. Not even all k^2 sums are
needed. Let both halves be ranked, best first, from 0: which pairs of ranks (i, j) can be among the
k best sums at all? At k = 16 there are 50 such pairs, and no smaller set will do.

1. `candidates`: these pairs of ranks.
2. `product_key_topk`: the k best experts and their scores. The check counts what you form: with
   m = 1,000 and 4 queries it must stay below a million numbers in all, and half a second.
3. `candidates_suffice`: the claim as a property that can be tested on any two lists. A test that
   cannot fail proves nothing: the check hands it sets of ranks that lack a pair.
"""
import torch


def candidates(k):
    """-> two int64 tensors of one length, the ranks i and j (from 0) of the pairs that can be
    among the k largest sums of two lists that are ranked from the best down. In any order, and no
    more pairs than are needed."""
    # all pairs of ranks (a, b) with a <= i and b <= j are at least as good as (i, j), itself among
    # them: (i + 1)(j + 1) pairs. If these are more than k, the others fill the top k without it. If
    # they are at most k, there are lists in which no other pair is better, so that it is needed.
    rank = torch.arange(1, k + 1)
    return (rank[:, None] * rank <= k).nonzero(as_tuple=True)


def product_key_topk(q, sub_keys, k):
    """q (N, 2, c), sub_keys (2, m, c), k <= m -> scores (N, k), from the largest down, with their
    gradient, and experts (N, k) int64, i m + j of the sub-keys i and j."""
    # 2 m scores of a query, and the k best of each half: what is worse cannot be part of a top k
    best, index = torch.einsum("npc,pmc->npm", q, sub_keys).topk(k, -1)
    first, second = best.unbind(1)                                              # (N, k) each
    # sums of the ranks that can matter: 50 at k = 16 (t[:, i] would add its gradient in any order)
    i, j = candidates(k)
    scores, at = (first.index_select(1, i) + second.index_select(1, j)).topk(k, -1)
    # ranks are places in the two short lists; the expert is named by the sub-keys' own numbers
    experts = index[:, 0, i] * sub_keys.shape[1] + index[:, 1, j]
    return scores, experts.gather(1, at)


def candidates_suffice(a, b, ranks, k):
    """Whether the k largest of all sums a_i + b_j are found among the pairs `ranks`. a, b (m,),
    not sorted; ranks: as from candidates, for lists that are ranked from the best down. Where sums
    are equal, any of them will do. False for fewer than k pairs. Looks at all m^2 sums: this is
    the proof, not the method."""
    best = (a[:, None] + b).flatten().topk(k).values
    # the same from the ranked lists by the pairs alone; too few of them cannot suffice
    sums = a.sort(descending=True).values[ranks[0]] + b.sort(descending=True).values[ranks[1]]
    # as values: of equal sums it does not matter which pair gave them
    return len(sums) >= k and torch.equal(sums.topk(k).values, best)


# ---- the check ----
import time  # noqa: E402

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from course.check import Wrong, ask, close, grads, shape  # noqa: E402
from peer import cartesian_candidates, retrieve, topk_readable  # noqa: E402


def check(mine):
    for k in (1, 2, 3, 4, 7, 16):
        ranks(mine, k)
    for seed, (N, m, k, c) in enumerate(((3, 5, 2, 4), (2, 9, 9, 3), (5, 16, 6, 8), (1, 20, 1, 2))):
        retrieves(mine, N, m, k, c, seed)
    counted(mine)
    proves(mine)


def witness(i, j, m):
    """Two lists (m,), ranked, in which only the pairs (a, b) with a <= i and b <= j beat (i, j)."""
    falls = [torch.arange(m) * -0.01 - 10.0 * (torch.arange(m) > n) for n in (i, j)]
    return falls[0].double(), falls[1].double()


def ranks(mine, k):
    found = mine.candidates(k)
    ask(found is not None and len(found) == 2 and len(found[0]) == len(found[1]),
        "candidates returns two tensors of one length, the ranks i and the ranks j")
    got, want = (set(zip(*(r.tolist() for r in of))) for of in (found, cartesian_candidates(k)))
    ask(len(found[0]) == len(got), f"candidates({k}) holds a pair of ranks twice")
    if lost := sorted(want - got):
        i, j = lost[0]
        raise Wrong(f"candidates({k}) lacks the ranks {lost[0]}: there are lists in which only "
                    f"{(i + 1) * (j + 1) - 1} pairs are better, fewer than k = {k}")
    more = sorted(got - want, key=sum)
    ask(not more, f"candidates({k}) has {len(got)} pairs, and {len(want)} suffice: how many pairs "
        f"are at least as good as the ranks {more and more[0]} in any two lists?")


def drawn(N, m, c, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(N, 2, c, generator=random), torch.randn(2, m, c, generator=random)


def oracle(q, sub_keys, k):
    score, expert = retrieve(q.unsqueeze(1), sub_keys, k, cartesian_candidates(k), topk_readable)
    return score.squeeze(1), expert.squeeze(1).long()


def retrieves(mine, N, m, k, c, seed):
    q, sub_keys = drawn(N, m, c, seed)
    got, experts = mine.product_key_topk(q.clone(), sub_keys.clone(), k)
    want, right = oracle(q, sub_keys, k)
    sizes = f"(N = {N}, m = {m}, k = {k})"
    shape(f"scores {sizes}", got, (N, k))
    shape(f"experts {sizes}", experts, (N, k))
    each = torch.einsum("npc,pmc->npm", q, sub_keys).topk(k, -1).values
    ask((got.diff(dim=-1) <= 0).all(), f"the scores of query 0 are {rounded(got[0])} {sizes}: from "
        "the largest down")
    ask(k == 1 or not torch.allclose(got, each.sum(1)), "the scores are the best of both halves, "
        f"the second best of both, ... {sizes}: the best of one half also goes with the second of "
        "the other")
    products = (each[:, 0, :, None] * each[:, 1, None]).flatten(1).topk(k).values
    ask(not torch.allclose(got, products), "the scores are products of the halves' scores: they "
        "are sums")
    ask(not torch.allclose(got, want.softmax(-1)) or k == 1, "the scores are a softmax already: "
        "return the sums; the gate comes later")
    n = int((got - want).abs().amax(1).argmax())
    ask(torch.allclose(got, want, rtol=1e-4, atol=1e-5) or (got > want + 1e-4).any(),
        f"the best {k} scores of query {n} are {rounded(want[n])}, and you find {rounded(got[n])} "
        f"{sizes}: some candidates are missing (all k best may share a sub-key)")
    close(f"scores {sizes}", got, want, rtol=1e-4, atol=1e-5)
    names(q, sub_keys, want, experts, right, sizes)
    found, wanted = (grads(lambda q, s: f(q, s, k)[0], q, sub_keys)
                     for f in (mine.product_key_topk, oracle))
    for name, a, b in zip(("q", "sub_keys"), found, wanted):
        close(f"the gradient of {name} {sizes}", a, b, rtol=1e-3, atol=1e-5,
              hint="are the scores detached, or computed again from copies?")


def rounded(t):
    return [round(v, 2) for v in t.tolist()]


def names(q, sub_keys, scores, experts, right, sizes):
    """Raises Wrong unless each expert has its score."""
    if torch.equal(experts.long(), right):
        return
    m = sub_keys.shape[1]
    i, j = right // m, right % m
    ask(not torch.equal(experts.long(), j * m + i), "the experts are j m + i: the sub-key of the "
        "first half counts m times")
    inside = (experts >= 0).all() and (experts < m * m).all()
    ask(inside, f"the experts lie between {int(experts.min())} and {int(experts.max())}, not below "
        f"m^2 = {m * m}")
    n, p = (int(v) for v in (experts != right).nonzero()[0])
    e = int(experts[n, p])
    has = q[n, 0] @ sub_keys[0, e // m] + q[n, 1] @ sub_keys[1, e % m]
    raise Wrong(f"query {n}: you name expert {e}, whose score is {has:.3f}, for the score "
                f"{scores[n, p]:.3f} of expert {int(right[n, p])} {sizes}: a rank is no sub-key's "
                "number, and expert i m + j has the m of all sub-keys")


class Counting(TorchDispatchMode):
    """Adds up the numbers of all tensors that are formed; raises Wrong at `most`."""

    def __init__(self, most, sentence):
        super().__init__()
        self.most, self.sentence, self.total = most, sentence, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.total += sum(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        ask(self.total < self.most, self.sentence)
        return out


def counted(mine):
    m, k, N = 1000, 16, 4
    q, sub_keys = drawn(N, m, 8, 11)
    want, right = oracle(q, sub_keys, k)
    with torch.no_grad(), Counting(m * m, f"for {N} queries of m = {m:,} sub-keys you form more "
                                   "than a million numbers: score the 2 m sub-keys, and add only "
                                   "the best of them"):
        start = time.process_time()
        got, experts = mine.product_key_topk(q, sub_keys, k)
        took = time.process_time() - start
    close(f"scores (m = {m:,}, k = {k})", got, want, rtol=1e-4, atol=1e-5)
    ask(torch.equal(experts.long(), right), f"the experts are wrong at m = {m:,}, k = {k}")
    ask(took < 0.5, f"{N} queries of m = {m:,} sub-keys take {took:.1f} s: let torch add and sort, "
        "not a loop")


def proves(mine):
    random, k, m = torch.Generator().manual_seed(3), 6, 9
    suffice, all_pairs = mine.candidates_suffice, cartesian_candidates(k)

    def without(n):
        return tuple(torch.cat([r[:n], r[n + 1:]]) for r in all_pairs)

    for trial in range(20):
        a, b = torch.randn(2, m, generator=random, dtype=torch.float64)
        ask(suffice(a, b, all_pairs, k), "candidates_suffice says no where the candidates do "
            "suffice: a and b are not sorted, and the ranks are those of the sorted lists")
        a, b = (torch.randint(4, (m,), generator=random).double() for _ in "ab")
        ask(suffice(a, b, all_pairs, k), f"candidates_suffice says no of {a.long().tolist()} and "
            f"{b.long().tolist()}, where sums are equal: compare the k largest values, not which "
            "pairs have them")
    for n, (i, j) in enumerate(zip(*(r.tolist() for r in all_pairs))):
        a, b = (t[torch.randperm(m, generator=random)] for t in witness(i, j, m))
        ask(not suffice(a, b, without(n), k), f"candidates_suffice says yes of ranks without "
            f"({i}, {j}), for lists whose best {k} sums need it: compare with all m^2 sums, and "
            "use the ranks that are handed in")
    few = tuple(r[:k - 1] for r in all_pairs)
    ask(not suffice(a, b, few, k), f"candidates_suffice says yes of {k - 1} pairs for a top {k}")


WRONG = [
    ("rank[:, None] * rank <= k", "rank[:, None] * rank < k", "lacks the ranks"),
    ("rank[:, None] * rank <= k", "rank[:, None] + rank <= k + 1", "has 6 pairs, and 5 suffice"),
    ("rank[:, None] * rank <= k", "rank[:, None] * rank > 0", "has 4 pairs, and 3 suffice"),
    ("rank[:, None] * rank <= k", "rank[:, None] == rank", "lacks the ranks (0, 1)"),
    ("i, j = candidates(k)\n    scores", "i = j = torch.arange(k)\n    scores",
     "the best of both halves"),
    ("i, j = candidates(k)\n    scores",
     "root = min(k, int(k ** 0.5) + 1)\n    i = torch.arange(root).repeat_interleave(root)\n"
     "    j = torch.arange(root).repeat(root)\n    scores", "some candidates are missing"),
    ("first.index_select(1, i) + second", "first.index_select(1, i) * second", "they are sums"),
    ("index[:, 0, i] * sub_keys.shape[1] + index[:, 1, j]",
     "index[:, 1, j] * sub_keys.shape[1] + index[:, 0, i]", "j m + i"),
    ("index[:, 0, i] * sub_keys.shape[1] + index[:, 1, j]", "index[:, 0, i] * k + index[:, 1, j]",
     "the m of all sub-keys"),
    ("index[:, 0, i] * sub_keys.shape[1] + index[:, 1, j]",
     "(i * sub_keys.shape[1] + j).expand(len(q), -1)", "a rank is no sub-key's number"),
    ("return scores, experts", "return scores.softmax(-1), experts", "a softmax already"),
    ("return scores, experts", "return scores.flip(1), experts", "from the largest down"),
    ("return scores, experts", "return scores.detach(), experts", "are the scores detached"),
    ("best, index = torch.einsum(\"npc,pmc->npm\", q, sub_keys).topk(k, -1)\n",
     "full = torch.einsum(\"npc,pmc->npm\", q, sub_keys)\n"
     "    every = full[:, 0, :, None] + full[:, 1, None]\n"
     "    return every.flatten(1).topk(k, -1)\n", "more than a million numbers"),
    ("return len(sums) >= k and torch.equal(sums.topk(k).values, best)", "return True",
     "says yes of ranks without (0, 0)"),

    ("    best = (a[:, None] + b)", "    ranks = candidates(k)\n    best = (a[:, None] + b)",
     "use the ranks that are handed in"),
    ("return len(sums) >= k and torch.equal(sums.topk(k).values, best)",
     "x, y = a.argsort(descending=True)[ranks[0]], b.argsort(descending=True)[ranks[1]]\n"
     "    top = (a[:, None] + b).flatten().topk(k).indices\n"
     "    return set(top.tolist()) <= set((x * len(b) + y).tolist())", "where sums are equal"),
    ("a.sort(descending=True).values[ranks[0]]", "a[ranks[0]]", "not sorted"),
]
