"""A layer that samples one expert for each token, written as products with one-hot rows.

Sampling as in BTX's Sample Top-1 (2403.07816): in training the expert is drawn by adding Gumbel
noise to the logits, in evaluation it is the likeliest. Its gate is its probability. Balanced by
Switch's loss (2101.03961 eq. 4-6),

    L = E sum over i of f_i P_i     f the shares of the tokens that were sent, P mean probabilities

It is 1 for an even use. A count does not change with a small step of the weights: the loss moves
the probabilities P alone.

    layer = SampledLayer(d=16, width=32, n_expert=4)
    y, info = layer(torch.randn(2, 8, 16))          # (B, T, d)
    (task_loss + 0.01 * info.balance).backward()

All experts run on all tokens here, and the one-hot rows pick: short, and for small sizes fast
enough.
Letters: B sequences, T positions, d width, N = B T tokens, E experts, w hidden width.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Info(NamedTuple):
    load: Tensor                        # (E,) share of the tokens of each expert, f
    importance: Tensor                  # (E,) mean probability of each expert, P
    balance: Tensor                     # () E sum f P


class SampledLayer(nn.Module):
    """x (B, T, d) -> y (B, T, d) and Info."""

    def __init__(self, d, width, n_expert, temperature=1.0):
        super().__init__()
        self.n_expert, self.temperature = n_expert, temperature
        self.router = nn.Linear(d, n_expert, bias=False)
        self.w_in = nn.Parameter(torch.randn(n_expert, d, width) * d ** -0.5)
        self.w_out = nn.Parameter(torch.randn(n_expert, width, d) * width ** -0.5)

    def pick(self, logits):
        """(N, E) one-hot rows: the expert of each token."""
        if self.training:
            # hard rows; backward sees the soft sample, so that the router learns from the draw
            return F.gumbel_softmax(logits, tau=self.temperature, hard=True)
        return F.one_hot(logits.argmax(-1), self.n_expert).to(logits.dtype)

    def forward(self, x):
        tokens = x.flatten(0, 1)                                    # (N, d)
        logits = self.router(tokens)                                # (N, E)
        probs = logits.softmax(-1)
        choice = self.pick(logits)                                  # (N, E)
        # every expert on every token, then the one of each token, times its probability
        hidden = torch.einsum("nd,edw->new", tokens, self.w_in).relu()
        out = torch.einsum("new,ewd->ned", hidden, self.w_out)
        y = torch.einsum("ne,ned->nd", choice * probs, out)
        # how evenly the experts are used
        load, importance = choice.mean(0), probs.mean(0)
        balance = self.n_expert * (load * importance).sum()
        return y.view_as(x), Info(load, importance, balance)


if __name__ == "__main__":
    layer = SampledLayer(d=16, width=32, n_expert=4)
    y, info = layer(torch.randn(2, 8, 16))
    print(f"y {tuple(y.shape)}, load {info.load.tolist()}, balance {info.balance.item():.3f}")
