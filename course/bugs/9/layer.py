"""PEER: a large table of experts of one neuron each, found by product keys.

PEER (2407.04153) alg. 1. A token has h queries of two halves. m sub-keys for each half make m^2
keys, of which the k best are found without looking at all of them: the k best sub-keys of each
half, then the k best sums of those. Expert i is one neuron, e_i(x) = gelu(u_i . x) v_i, and y is
the sum over the heads and their k experts of softmax(score) e_i(x).

Each half of a query is normalised over its own features, as LayerNorm does it, to mean 0 and
variance 1: then scores have one scale from the first step on, whatever the weights of the queries
are. (The paper has a BatchNorm there; a LayerNorm keeps the tokens apart.)

    layer = PEERLayer(d=16, m=8, heads=2, top_k=4, d_key=8)
    y = layer(torch.randn(2, 8, 16))                # (B, T, d)
    layer.queries(tokens)                           # of tokens (N, d): (N, h, 2, c), c = d_key / 2
    layer.retrieve(layer.queries(tokens))           # scores and experts, (N, h, k) each

Letters: B sequences, T positions, d width, N = B T tokens, h heads, k experts a head, m sub-keys of
a half.
"""
import torch
import torch.nn.functional as F
from torch import nn


class PEERLayer(nn.Module):
    """x (B, T, d) -> y (B, T, d), from m^2 experts."""

    def __init__(self, d, m, heads, top_k, d_key):
        super().__init__()
        self.m, self.heads, self.top_k, c = m, heads, top_k, d_key // 2
        self.query = nn.Linear(d, heads * d_key, bias=False)
        # learned scale and shift of a query's features, after the norm
        self.scale, self.shift = nn.Parameter(torch.ones(2, c)), nn.Parameter(torch.zeros(2, c))
        self.sub_keys = nn.Parameter(torch.randn(2, m, c) * c ** -0.5)
        self.u = nn.Embedding(m * m, d)
        self.v = nn.Embedding(m * m, d)
        nn.init.normal_(self.u.weight, std=d ** -0.5)
        nn.init.normal_(self.v.weight, std=heads ** -0.5)

    def queries(self, tokens):
        """(N, d) -> (N, h, 2, c), normalised."""
        q = self.query(tokens).view(len(tokens), self.heads, 2, -1)
        var, mean = torch.var_mean(q, dim=1, correction=0, keepdim=True)
        return (q - mean) * (var + 1e-5).rsqrt() * self.scale + self.shift

    def retrieve(self, q):
        """Queries (N, h, 2, c) -> scores and experts, (N, h, k) each, best first."""
        # the k best sub-keys of each half
        scores = torch.einsum("nhpc,pmc->nhpm", q, self.sub_keys)
        (s1, s2), (i1, i2) = (t.unbind(2) for t in scores.topk(self.top_k, -1))     # (N, h, k) each
        # all k^2 sums, which hold the k best of all m^2; expert i m + j has sub-keys i and j
        sums = (s1.unsqueeze(-1) + s2.unsqueeze(-2)).flatten(-2)                    # (N, h, k^2)
        experts = (i1.unsqueeze(-1) * self.m + i2.unsqueeze(-2)).flatten(-2)
        best, at = sums.topk(self.top_k, -1)
        return best, experts.gather(-1, at)

    def forward(self, x):
        tokens = x.flatten(0, 1)
        scores, experts = self.retrieve(self.queries(tokens))
        # the neurons that were found, weighed by how well they fit
        hidden = F.gelu(torch.einsum("nd,nhkd->nhk", tokens, self.u(experts)))
        y = torch.einsum("nhk,nhkd->nd", hidden * scores.softmax(-1), self.v(experts))
        return y.view_as(x)


if __name__ == "__main__":
    layer = PEERLayer(d=16, m=8, heads=2, top_k=4, d_key=8)
    _, experts = layer.retrieve(layer.queries(torch.randn(100, 16)))
    print(f"100 tokens used {len(experts.unique())} of the {layer.m ** 2} experts")
