"""A Qwen2-MoE layer: routed experts, and a shared one behind a gate of its own.

Qwen2 (2407.10671): y = sum over the chosen i of g_i E_i(x) + sigmoid(x w_s) E_s(x). The shared
expert is one MLP that is n_shared times as wide as a routed one. The routed gates are the k largest
of the softmax over all E experts; norm_topk makes those that share a token sum to 1 (models of the
series differ in it). The layer is used with any k from 1 to E, 1 for the cheapest model of them.
The router has no loss of its own: at every k all that it learns comes through its gates.

    layer = QwenLayer(d=16, width=8, n_expert=8, top_k=2)
    y = layer(torch.randn(2, 8, 16))                # (B, T, d)
    layer.last_load                                 # (E,) pairs of each expert in that call

Letters: B sequences, T positions, d width, N = B T tokens, E experts, k of them for a token, w
hidden width.
"""
import torch
import torch.nn.functional as F
from torch import nn


class MLP(nn.Module):
    """SwiGLU, (n, d) -> (n, d)."""

    def __init__(self, d, width):
        super().__init__()
        self.gate_up = nn.Linear(d, 2 * width, bias=False)
        self.down = nn.Linear(width, d, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class QwenLayer(nn.Module):
    """x (B, T, d) -> y (B, T, d)."""

    def __init__(self, d, width, n_expert, top_k, n_shared=4, norm_topk=True):
        super().__init__()
        self.top_k, self.norm_topk = top_k, norm_topk
        self.router = nn.Linear(d, n_expert, bias=False)
        self.experts = nn.ModuleList(MLP(d, width) for _ in range(n_expert))
        self.shared = MLP(d, n_shared * width)
        self.shared_gate = nn.Linear(d, 1, bias=False)
        # sigmoid(0): at the start half of the shared expert
        nn.init.zeros_(self.shared_gate.weight)
        self.register_buffer("last_load", torch.zeros(n_expert), persistent=False)

    def route(self, tokens):
        """Gates and experts, (N, k) each."""
        probs = self.router(tokens).softmax(-1, dtype=torch.float32)
        weights, experts = probs.topk(self.top_k, -1)
        if self.norm_topk:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(tokens.dtype), experts

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, experts = self.route(tokens)
        self.last_load = F.one_hot(experts, len(self.experts)).sum((0, 1)).float()
        # the shared expert sees every token, and the token says how much of it is wanted
        y = self.shared_gate(tokens).sigmoid() * self.shared(tokens)
        for e, expert in enumerate(self.experts):
            n, rank = (experts == e).nonzero(as_tuple=True)
            if len(n):
                y = y.index_add(0, n, weights[n, rank].unsqueeze(1) * expert(tokens[n]))
        return y.view_as(x)


if __name__ == "__main__":
    for k in (1, 2, 4):
        layer = QwenLayer(d=16, width=8, n_expert=8, top_k=k)
        y = layer(torch.randn(2, 8, 16))
        print(f"k = {k}: y {tuple(y.shape)}, pairs of each expert {layer.last_load.int().tolist()}")
