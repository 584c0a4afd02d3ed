"""A language model of one mixture layer, and how good it is, in bits a byte.

Bytes (B, T) -> logits of the next byte (B, T, 256). The layer is Shazeer's (1701.06538) without
noise: of E experts the 2 best, gates by softmax over these two; their use is kept even by the
importance loss, the squared coefficient of variation of the summed gates (eq. 6 and 7), 0 for an
even use.

    model = ByteModel(d=32, width=64, n_expert=4, coefficient=0.1)
    out = model(idx, targets)                       # out.loss is what training minimises
    out.loss.backward()
    bits_per_byte(model, [(idx, targets), ...])     # how well the model predicts, for a table

The coefficient says how hard training pushes towards an even use. Models of different coefficients
are compared by their bits a byte, which are the cross-entropy / ln 2: how long a compressed text
would be.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Out(NamedTuple):
    logits: Tensor                      # (B, T, 256)
    loss: Tensor                        # ()
    importance: Tensor                  # (E,) summed gates of each expert


class ByteModel(nn.Module):
    """Embedding, two of E experts, output; without attention it knows one byte of the past."""

    def __init__(self, d, width, n_expert, coefficient=0.1):
        super().__init__()
        self.coefficient = coefficient
        self.embedding, self.head = nn.Embedding(256, d), nn.Linear(d, 256)
        self.router = nn.Linear(d, n_expert, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(d, width), nn.ReLU(), nn.Linear(width, d))
            for _ in range(n_expert))

    def mix(self, x):
        """x (B, T, d) -> (B, T, d), and the gates (B, T, E), 0 where an expert was not chosen."""
        best, experts = self.router(x).topk(2, -1)
        gates = x.new_zeros(*x.shape[:-1], len(self.experts)).scatter(-1, experts, best.softmax(-1))
        outputs = torch.stack([expert(x) for expert in self.experts], -1)           # (B, T, d, E)
        return (outputs * gates.unsqueeze(-2)).sum(-1), gates

    def forward(self, idx, targets):
        x = self.embedding(idx)
        y, gates = self.mix(x)
        logits = self.head(x + y)
        # eq. 6 and 7: importance is the batchwise sum of the gates, and its loss CV^2
        importance = gates.sum((0, 1))
        balance = importance.var(correction=0) / importance.mean() ** 2
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) + self.coefficient * balance
        return Out(logits, loss, importance)


@torch.no_grad()
def bits_per_byte(model, batches):
    """Mean over all bytes of the batches: pairs of inputs and targets (B, T), of any sizes."""
    model.eval()
    nats, count = 0.0, 0
    for idx, targets in batches:
        nats += model(idx, targets).loss.item() * targets.numel()
        count += targets.numel()
    return nats / count / math.log(2)


if __name__ == "__main__":
    model = ByteModel(d=32, width=64, n_expert=4)
    text = torch.tensor(list(__doc__.encode())[:513])
    print(f"{bits_per_byte(model, [(text[None, :-1], text[None, 1:])]):.3f} bits a byte, untrained")
