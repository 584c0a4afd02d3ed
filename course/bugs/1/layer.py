"""A Switch layer: every token goes to one expert, and the router is jittered in training.

Switch Transformer (2101.03961), eq. 1 and 2: p = softmax(W_r x), i the expert of largest p, y = p_i
E_i(x). In training the router sees its input times noise from U(1 - j, 1 + j) (sec. 2.4), so that a
token near a border is tried on both sides of it. Nothing else is noisy: the experts see the token
as it is. In evaluation there is no noise at all.

    layer = SwitchLayer(d=16, width=32, n_expert=4)
    y, load = layer(torch.randn(2, 8, 16))          # (B, T, d), and tokens of each expert (E,)
    layer.eval()                                    # no noise from here on

Letters: B sequences, T positions, d width, N = B T tokens, E experts.
"""
import torch
import torch.nn.functional as F
from torch import nn


class Expert(nn.Module):
    """A feed-forward layer, (n, d) -> (n, d)."""

    def __init__(self, d, width):
        super().__init__()
        self.w_in = nn.Linear(d, width)
        self.w_out = nn.Linear(width, d)

    def forward(self, x):
        return self.w_out(F.relu(self.w_in(x)))


class SwitchLayer(nn.Module):
    """x (B, T, d) -> y (B, T, d) and load (E,)."""

    def __init__(self, d, width, n_expert, jitter=0.01):
        super().__init__()
        self.n_expert, self.jitter = n_expert, jitter
        self.router = nn.Linear(d, n_expert, bias=False)
        # sec. 2.4: a tenth of the usual variance, so that no expert leads at the start
        nn.init.normal_(self.router.weight, std=(0.1 / d) ** 0.5)
        self.experts = nn.ModuleList(Expert(d, width) for _ in range(n_expert))

    def noisy(self, x):
        """The tokens (N, d), each feature times a draw from U(1 - j, 1 + j); training only."""
        if not self.training or self.jitter == 0:
            return x
        return x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)

    def forward(self, x):
        # 1. the router reads a jittered token; logits and softmax in float32
        tokens = self.noisy(x.flatten(0, 1))                        # (N, d)
        logits = self.router(tokens)                                # (N, E)
        probs = logits.float().softmax(-1)
        # 2. the best expert, and its probability for a gate: from a 1 the router learns nothing
        gate, expert = probs.max(-1)                                # (N,) each
        # 3. each expert runs on its tokens, and its weighted rows go home
        y = torch.zeros_like(tokens)
        for e in range(self.n_expert):
            mine = (expert == e).nonzero().squeeze(1)
            out = self.experts[e](tokens.index_select(0, mine))
            y = y.index_add(0, mine, gate.index_select(0, mine).unsqueeze(1).to(out.dtype) * out)
        # 4. how many tokens each expert had
        load = torch.zeros(self.n_expert).scatter_add_(0, expert, torch.ones(len(expert)))
        return y.view_as(x), load


if __name__ == "__main__":
    layer = SwitchLayer(d=16, width=32, n_expert=4)
    y, load = layer(torch.randn(2, 8, 16))
    print(f"y {tuple(y.shape)}, tokens of each expert {load.int().tolist()}")
