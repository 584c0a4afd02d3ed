"""Fine-grained experts, run in the order of the experts.

DeepSeekMoE (2401.06066): each of E experts is cut into G finer ones, and a token uses G times as
many, so that it costs the same and has far more combinations to choose from. y = sum over the k G
chosen of g_i E_i(x), the gates the softmax over all E G experts, here divided by their sum over the
chosen ones.

The pairs (token, expert) are sorted by expert. Then the rows of one expert lie side by side, each
expert is one product, and a sum brings the rows home to their tokens. The gate multiplies the w
hidden numbers: W2 (g a) = g W2 a, and the product need not be kept for the backward pass of g.

    layer = FineGrained(d=16, width=32, n_expert=4, top_k=2, granularity=4)
    y, load = layer(torch.randn(2, 8, 16))          # (B, T, d), and pairs of each expert (E G,)

Letters: B sequences, T positions, d width, N = B T tokens, E experts, k for a token, P = N k G
pairs, w hidden width.
"""
import torch
import torch.nn.functional as F
from torch import nn


class FineGrained(nn.Module):
    """x (B, T, d) -> y (B, T, d), load (E G,)."""

    def __init__(self, d, width, n_expert, top_k, granularity=1):
        super().__init__()
        self.n_expert, self.top_k = n_expert * granularity, top_k * granularity
        w = width // granularity
        self.router = nn.Linear(d, self.n_expert, bias=False)
        self.w_in = nn.Parameter(torch.randn(self.n_expert, d, w) * d ** -0.5)
        self.w_out = nn.Parameter(torch.randn(self.n_expert, w, d) * w ** -0.5)

    def route(self, tokens):
        """Gates and experts of tokens (N, d), (N, k G) each; the gates of a token sum to 1."""
        weights, experts = self.router(tokens).softmax(-1).topk(self.top_k, -1)
        return weights / weights.sum(-1, keepdim=True), experts

    def run(self, rows, gate, ends):
        """Sorted rows (P, d), gates (P,), through the experts whose rows end at `ends`."""
        parts, start = [], 0
        for e, end in enumerate(ends.tolist()):
            hidden = F.silu(rows[start:end] @ self.w_in[e]) * gate[start:end].unsqueeze(1)
            parts.append(hidden @ self.w_out[e])
            start = end
        return torch.cat(parts)

    def forward(self, x):
        tokens = x.flatten(0, 1)                                        # (N, d)
        weights, experts = self.route(tokens)
        # the pairs in the order of their experts, first tokens first
        expert, order = experts.flatten().sort(stable=True)             # (P,) each
        token, gate = order // self.top_k, weights.flatten().index_select(0, order)
        load = torch.bincount(expert, minlength=self.n_expert)
        # gather, run, and add each row to its token
        out = self.run(tokens.index_select(0, token), gate, load.cumsum(0))
        y = torch.zeros_like(tokens).index_add(0, token, out * gate.unsqueeze(1))
        return y.view_as(x), load


if __name__ == "__main__":
    for G in (1, 2, 4):
        layer = FineGrained(d=16, width=32, n_expert=4, top_k=2, granularity=G)
        y, load = layer(torch.randn(2, 8, 16))
        print(f"G = {G}: {layer.n_expert} experts, {layer.top_k} a token, y has std {y.std():.3f}")
