"""A Mixtral layer: two of eight SwiGLU experts for each token.

Mixtral (2401.04088) sec. 2.1: y = sum over i of g_i SwiGLU_i(x) with g = softmax(TopK(x W_g)),
where TopK keeps the k largest logits and sets all others to minus infinity. So a token that is sure
of its first expert uses hardly any of the second one, and one that cannot decide uses both alike.

    layer = MixtralLayer(Settings(d=16, width=32, n_expert=8, top_k=2))
    y = layer(torch.randn(2, 8, 16))                # (B, T, d)
    gates, experts = layer.choose(torch.randn(16, 16))      # of tokens (N, d): (N, k) each

Letters: B sequences, T positions, d width, N = B T tokens, E experts, k a token.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Settings:
    d: int = 128
    width: int = 256
    n_expert: int = 8
    top_k: int = 2


class SwiGLU(nn.Module):
    """W2 (silu(W1 x) * W3 x), (n, d) -> (n, d)."""

    def __init__(self, s):
        super().__init__()
        self.w1 = nn.Linear(s.d, s.width, bias=False)
        self.w2 = nn.Linear(s.width, s.d, bias=False)
        self.w3 = nn.Linear(s.d, s.width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Router(nn.Module):
    """What each token thinks of each expert, (N, d) -> (N, E), in float32."""

    def __init__(self, s):
        super().__init__()
        self.proj = nn.Linear(s.d, s.n_expert, bias=False)

    def forward(self, x):
        return F.softmax(self.proj(x).float(), dim=-1)


class MixtralLayer(nn.Module):
    """x (B, T, d) -> y (B, T, d)."""

    def __init__(self, s):
        super().__init__()
        self.top_k = s.top_k
        self.router = Router(s)
        self.experts = nn.ModuleList(SwiGLU(s) for _ in range(s.n_expert))

    def choose(self, tokens):
        """Gates and experts of tokens (N, d), (N, k) each, best first; the gates sum to 1."""
        score, experts = self.router(tokens).topk(self.top_k, dim=-1)
        return F.softmax(score, dim=-1), experts

    def forward(self, x):
        tokens = x.flatten(0, 1)
        gates, experts = self.choose(tokens)
        y = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            # the tokens that chose expert e, and which of their k choices it was
            n, rank = (experts == e).nonzero(as_tuple=True)
            y = y.index_add(0, n, gates[n, rank].unsqueeze(1).to(y.dtype) * expert(tokens[n]))
        return y.view_as(x)


if __name__ == "__main__":
    layer = MixtralLayer(Settings(d=16, width=32))
    gates, experts = layer.choose(torch.randn(3, 16))
    print("gates", gates.tolist(), "experts", experts.tolist())
