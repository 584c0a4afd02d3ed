"""A DeepSeek-V3 layer without a balance loss: biases decide who is chosen.

DeepSeek-V3 (2412.19437) eq. 13-16 and loss-free balancing (2408.15664):

    s = sigmoid(x W_r)                      how well expert i suits the token
    chosen: the k largest of s + b          b, a bias for each expert, has a say in the choice
    g_i = s_i / sum of the chosen s         and in nothing else

After each optimizer step, b_i rises by u where expert i had fewer tokens than the mean, and falls
by u where it had more. The bias is no parameter: it has no gradient, and is saved with the model.

    layer = LossFreeLayer(d=16, width=8, n_expert=8, top_k=2)
    y, load = layer(torch.randn(2, 8, 16))          # (B, T, d), and pairs of each expert (E,)
    ...                                             # backward, optimizer step
    layer.after_step(load)

Letters: B sequences, T positions, d width, N = B T tokens, E experts, k of them for a token, P = N
k pairs.
"""
import torch
from torch import nn


class LossFreeLayer(nn.Module):
    """x (B, T, d) -> y (B, T, d) and load (E,); one shared expert runs on every token."""

    def __init__(self, d, width, n_expert, top_k, bias_rate=0.001, route_scale=1.0):
        super().__init__()
        self.n_expert, self.top_k = n_expert, top_k
        self.bias_rate, self.route_scale = bias_rate, route_scale
        self.router = nn.Linear(d, n_expert, bias=False)
        self.register_buffer("bias", torch.zeros(n_expert))
        self.w_in = nn.Parameter(torch.randn(n_expert, d, width) * d ** -0.5)
        self.w_out = nn.Parameter(torch.randn(n_expert, width, d) * width ** -0.5)
        self.shared = nn.Sequential(nn.Linear(d, width), nn.SiLU(), nn.Linear(width, d))

    def route(self, tokens):
        """Gates and experts of tokens (N, d), (N, k) each."""
        scores = self.router(tokens).float().sigmoid()              # (N, E)
        weights, experts = (scores + self.bias).topk(self.top_k, -1)
        if self.top_k > 1:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.route_scale, experts

    def forward(self, x):
        tokens = x.flatten(0, 1)
        weights, experts = self.route(tokens)
        y = self.shared(tokens)
        load = tokens.new_zeros(self.n_expert)
        for e in range(self.n_expert):
            n, rank = (experts == e).nonzero(as_tuple=True)
            hidden = nn.functional.silu(tokens[n] @ self.w_in[e])
            y = y.index_add(0, n, weights[n, rank].unsqueeze(1) * (hidden @ self.w_out[e]))
            load[e] = len(n)
        return y.view_as(x), load

    @torch.no_grad()
    def after_step(self, load):
        """Moves the biases by the load (E,) of the batch that was just learned from."""
        self.bias += self.bias_rate * torch.sign(load.mean() - load)


if __name__ == "__main__":
    layer = LossFreeLayer(d=16, width=8, n_expert=8, top_k=2, bias_rate=0.01)
    x = torch.randn(4, 64, 16)
    for step in range(21):
        y, load = layer(x)
        layer.after_step(load)
        if step % 10 == 0:
            print(f"step {step}: pairs of each expert {load.int().tolist()}")
