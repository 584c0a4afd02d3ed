"""Experts with a limited number of slots, for a causal language model.

Switch (2101.03961) eq. 3: each expert has C = ceil(capacity_factor N / E) slots, so that all
experts run as one product of known shape. Tokens that find no slot are dropped: the layer adds
nothing to them, and the residual path around it carries them on. The model around the layer writes
text from left to right, and is trained on all positions at once; so what the layer gives a position
may depend on that position and the ones before it.

    layer = CapacityLayer(d=16, width=32, n_expert=4, capacity_factor=1.0)
    y, dropped = layer(torch.randn(2, 8, 16))   # (B, T, d), and the share of tokens without a slot
    slot = layer.queue(gate, expert, T)         # (N,) place of each token in its expert's queue

Letters: B sequences, T positions, d width, N = B T tokens (in the order of sequence, then
position), E experts.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn


class CapacityLayer(nn.Module):
    """x (B, T, d) -> y (B, T, d), dropped ()."""

    def __init__(self, d, width, n_expert, capacity_factor=1.25):
        super().__init__()
        self.n_expert, self.capacity_factor = n_expert, capacity_factor
        self.router = nn.Linear(d, n_expert, bias=False)
        self.w_in = nn.Parameter(torch.randn(n_expert, d, width) * d ** -0.5)
        self.w_out = nn.Parameter(torch.randn(n_expert, width, d) * width ** -0.5)

    def queue(self, gate, expert, T):
        """gate, expert (N,) -> (N,) place of each token among those of its expert, from 0."""
        # the tokens line up, the surest ones first: what is dropped then matters least
        order = gate.argsort(descending=True, stable=True)
        lined_up = F.one_hot(expert.index_select(0, order), self.n_expert)          # (N, E)
        # how many of the same expert stand before it
        before = (lined_up.cumsum(0) * lined_up).sum(1) - 1
        # from the order of the line back to that of the tokens
        return torch.empty_like(before).scatter_(0, order, before)

    def forward(self, x):
        B, T, d = x.shape
        tokens = x.reshape(B * T, d)
        gate, expert = self.router(tokens).softmax(-1).max(-1)                      # (N,) each
        # eq. 3, and who of the queue is served
        slots = math.ceil(self.capacity_factor * B * T / self.n_expert)
        slot = self.queue(gate, expert, T)
        served = slot < slots
        # a row for each slot of each expert, and one past the end for those without
        row = torch.where(served, expert * slots + slot, self.n_expert * slots)
        rows = tokens.new_zeros(self.n_expert * slots + 1, d).index_copy(0, row, tokens)
        # all experts at once: (E, C, d) -> (E, C, w) -> (E, C, d)
        hidden = torch.bmm(rows[:-1].view(self.n_expert, slots, d), self.w_in).relu()
        out = torch.bmm(hidden, self.w_out).view(-1, d)
        # home again, times the gate; a dropped token gets the zeros of the last row
        out = torch.cat([out, out.new_zeros(1, d)]).index_select(0, row)
        return (gate.unsqueeze(1) * out).view(B, T, d), 1 - served.float().mean()


if __name__ == "__main__":
    for factor in (1.0, 1.25, 2.0):
        layer = CapacityLayer(d=16, width=32, n_expert=4, capacity_factor=factor)
        y, dropped = layer(torch.randn(4, 64, 16))
        print(f"capacity factor {factor}: {dropped:.1%} of the tokens dropped")
