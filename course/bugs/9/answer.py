"""Bug 9: queries normalised over the heads."""
import torch

BUG = "torch.var_mean(q, dim=1, correction=0, keepdim=True)"
RIGHT = "torch.var_mean(q, dim=-1, correction=0, keepdim=True)"

WHY = """\
Before the view, axis 1 held the features; behind it, axis 1 holds the heads. Mean and variance are
taken over the h heads, for each feature by itself. With two heads that leaves nothing but signs: of
two numbers, minus their mean and divided by their deviation, one is 1 and the other -1. The second
query is minus the first, and the two heads that were to look for different things are tied to each
other. With one head every query is 0, and all tokens find the same experts. With many heads the
harm is smaller, and harder to see. The shapes fit, since broadcasting fits them, gradients flow,
and the neurons that are found learn: a run shows a PEER layer that is not worth its table. What
catches it is a test of what a norm promises, mean 0 and variance 1 of each query, for one head,
too; or of independence: the weights of one head must not move what another one finds."""


def test(layer):
    torch.manual_seed(0)
    for heads in (1, 2, 4):
        peer = layer.PEERLayer(d=16, m=8, heads=heads, top_k=4, d_key=16)
        q = peer.queries(torch.randn(32, 16))
        mean = q.mean(-1).abs().max()
        assert mean < 1e-4, f"{heads} heads: a query has mean {mean:.2f}"
        var = q.var(-1, correction=0)
        assert (var - 1).abs().max() < 0.05, f"{heads} heads: a query has variance {var.min():.2f}"
