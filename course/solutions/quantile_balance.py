"""Even loads from one quantile.

lecture 2 · difficulty 3 of 5 · importance 3 of 5 · 30 minutes · 5 points

A token has a score s_ij for each of E experts. A bias b (E,) is added for the choice alone: token i
goes to the k experts with the largest s_ij + b_j. Which b gives every expert the same number of
tokens, N k / E? To find the best even assignment is a linear program, and minus b is the price that
its dual puts on each expert. Quantile balancing (Su 2026, kexue.fm/archives/11619) takes one step
of that dual for each batch:

    c_i = the (k+1)-th largest of s_ij + b_j over the experts        the cutoff of token i
    b_j = the (N k / E)-th smallest of c_i - s_ij over the tokens    the new bias of expert j

and then subtracts the mean of b, which changes no choice. Read it as an offer: as long as the other
experts stay where they are, expert j gets token i if b_j > c_i - s_ij, so that this b_j buys it
just its share of the tokens.

Write both lines. There is no loss, no rate and no gradient in it, and one step from b = 0 brings
the loads near to even. The new b serves the next batch: with that of the present one, a token would
choose by the scores of later tokens.
"""
import torch


def cutoff(scores, bias, k):
    """scores (N, E), bias (E,) -> (N,): the (k+1)-th largest of a token's scores plus bias; where
    k = E, which leaves none, the smallest."""
    # the best expert that a token does not choose: what another must beat to be chosen
    E = scores.shape[1]
    best = (scores + bias).topk(min(k + 1, E), -1).values                           # (N, k+1)
    return best[:, -1]


def quantile_step(scores, bias, k):
    """scores (N, E), bias (E,) -> the new bias (E,), of mean 0. Its rank among the N tokens is
    N k / E, rounded down, but at least 1. A bias is a buffer: the new one carries no gradient, and
    the one that came in stays as it was."""
    N, E = scores.shape
    # a bias with a gradient would let the next batch's loss reach back into this one
    scores = scores.detach()
    # how large b_j must be for expert j to get token i. The old b is in the cutoff alone:
    # c - (s + b) would be how far b has to move
    needed = cutoff(scores, bias, k).unsqueeze(1) - scores                          # (N, E)
    # in each column by itself: as many tokens as an even share lie at or below it
    rank = max(1, N * k // E)
    new = needed.kthvalue(rank, dim=0).values
    # a number common to all experts changes no choice; left in, it would add up over the steps
    return new - new.mean()


# ---- the check ----
from balance import update_quantile  # noqa: E402
from course.check import ask, close, shape  # noqa: E402

SIZES = (12, 4, 1), (40, 5, 2), (9, 6, 3), (16, 8, 4), (3, 8, 2), (6, 3, 3), (200, 16, 2)


def check(mine):
    for seed, (N, E, k) in enumerate(SIZES):
        # the first experts are ahead
        random = torch.Generator().manual_seed(seed)
        scores = (torch.randn(N, E, generator=random) + torch.linspace(2, 0, E)).sigmoid()
        bias = 0.3 * torch.randn(E, generator=random)
        cutoffs(mine, scores, bias, k)
        one_step(mine, scores, bias, k)
    got = mine.quantile_step(scores.requires_grad_(), bias, k)
    ask(not got.requires_grad, "the new bias carries a gradient to the scores, and it is a buffer: "
        "detach the scores, or work under torch.no_grad()")


def cutoffs(mine, scores, bias, k):
    """A cutoff is one of the token's s + b, and exactly k of these lie above it."""
    (N, E), total = scores.shape, scores + bias                                     # (N, E)
    got = mine.cutoff(scores.clone(), bias.clone(), k)
    shape("what cutoff returns", got, (N,))
    def found_in(t):
        return (t - got[:, None]).abs().min(-1).values < 1e-6

    ask(found_in(total).all() or not found_in(scores).all(), "each cutoff is one of the scores "
        "without the bias; tokens choose by s + b, so that the cutoff is one of those")
    ask(found_in(total).all(), "the cutoff of token "
        f"{int((~found_in(total)).int().argmax())} is none of its s + b")
    above = (total > got[:, None] + 1e-6).sum(-1)
    i, want = int((above != min(k, E - 1)).int().argmax()), min(k, E - 1)
    ask(above[i] == want or above[i] != k - 1, f"{k - 1} experts lie above the cutoff of token "
        f"{i}, which chooses k = {k}: that is its last choice, and the cutoff is the best expert "
        "that it does not choose")
    ask(above[i] == want, f"{int(above[i])} experts lie above the cutoff of token {i}, not {want}")


def one_step(mine, scores, bias, k):
    E, given, want = len(bias), bias.clone(), bias.clone()
    got = mine.quantile_step(scores.clone(), given, k)
    update_quantile(want, scores, k)
    shape("the new bias", got, (E,))
    ask(torch.equal(given, bias), "quantile_step changed the bias that it was given: return a new "
        "one")
    if not alike(got, want):
        diagnose(mine, scores, bias, k, got, want)
    ask((got - want).abs().max() < 1e-5, "the new bias is right but for its mean, "
        f"{got.mean():.4f}: subtract it, or it adds up over the steps")
    close("the new bias", got, want, atol=1e-5)


def alike(a, b):
    """Whether two biases choose the same: up to a number common to all experts."""
    return torch.allclose((a - a.mean()).float(), (b - b.mean()).float(), atol=1e-5)


def diagnose(mine, scores, bias, k, got, want):
    """Raises Wrong for what is often mistaken, and else for the largest difference."""
    N, E = scores.shape
    ask(not alike(got, want - bias), "you return how far the bias moves, b_new - b: the old bias "
        "is in the cutoff already, so subtract s from it, not s + b")
    ask(not alike(got, -want), "the new bias has the wrong sign: the most popular expert's is the "
        "lowest")
    needed, rank = mine.cutoff(scores, bias, k).unsqueeze(1) - scores, max(1, N * k // E)
    share = f"an even share of N = {N} tokens, E = {E}, k = {k} is number {rank} from below"
    for r, column in enumerate(needed.sort(0).values, 1):
        by = ", which is the quantile at 1 - k / E" if 0 <= r - (N - rank) <= 1 else ""
        ask(not alike(got, column),
            f"each bias is number {r} of the c - s of its expert{by}; {share}")
    for value in (-needed).sort(0).values:
        ask(not alike(got, value), "you take a quantile of s - c, in which a popular expert gets a "
            "high bias; take that of c - s")
    ask(not alike(got, needed.quantile(k / E, 0)), "torch.quantile interpolates between two "
        f"tokens; {share}, that token's own value (kthvalue, or a sort)")
    close("the new bias", got - got.mean(), want, atol=1e-5)


WRONG = [
    ("topk(min(k + 1, E), -1)", "topk(k, -1)", "that is its last choice"),
    ("(scores + bias).topk", "scores.topk", "one of the scores without the bias"),
    ("unsqueeze(1) - scores ", "unsqueeze(1) - scores - bias ", "how far the bias moves"),
    ("cutoff(scores, bias, k).unsqueeze(1) - scores ",
     "scores - cutoff(scores, bias, k).unsqueeze(1) ", "a quantile of s - c"),
    ("return new - new.mean()", "return new", "right but for its mean"),
    ("return new - new.mean()", "return new.mean() - new", "the wrong sign"),
    ("rank = max(1, N * k // E)", "rank = N + 1 - max(1, N * k // E)", "the quantile at 1 - k / E"),
    ("rank = max(1, N * k // E)", "rank = max(1, N // E)", "number 8 of the c - s"),
    ("needed.kthvalue(rank, dim=0).values", "needed.quantile(k / E, dim=0)", "interpolates"),
    ("needed.kthvalue(rank, dim=0)", "needed.kthvalue(1, dim=1)", "has shape (12,), not (4,)"),
    ("scores = scores.detach()", "scores = scores", "carries a gradient"),
    ("return new - new.mean()", "return bias.copy_(new - new.mean())", "changed the bias"),
]
