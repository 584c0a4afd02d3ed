"""A mixture of experts trained by workers that seldom meet (DiLoCo).

DiLoCo (2311.08105) alg. 1. Each of n workers starts from the common weights theta and takes H steps
of its own inner optimizer on its own text, to theta_i. Then they meet: Delta = mean over the
workers of theta - theta_i is handed to an outer optimizer, SGD with Nesterov's momentum, as if it
were a gradient; the result is the next theta. With outer rate 1 and no momentum that is the mean of
the workers.

    model = Mixture(d=8, n_expert=4)
    outer = Outer(model, lr=0.7, momentum=0.9)
    for batches in rounds:                          # a list of (x, y) for each worker
        outer.meet([train(model, part) for part in batches])

Letters: d width, E experts, H inner steps.
"""
import copy

import torch
from torch import nn


class Mixture(nn.Module):
    """x (n, d) -> (n, 1): the likeliest of E linear experts, times its probability."""

    def __init__(self, d, n_expert):
        super().__init__()
        self.router = nn.Linear(d, n_expert, bias=False)
        self.experts = nn.Parameter(torch.randn(n_expert, d) * d ** -0.5)

    def forward(self, x):
        gate, expert = self.router(x).softmax(-1).max(-1)
        chosen = self.experts.index_select(0, expert)                               # (n, d)
        return gate.unsqueeze(1) * (x * chosen).sum(1, keepdim=True)


def train(model, batches, lr=0.01):
    """A copy of the model after one inner step for each batch (x (n, d), y (n, 1))."""
    worker = copy.deepcopy(model)
    inner = torch.optim.AdamW(worker.parameters(), lr=lr)
    for x, y in batches:
        loss = (worker(x) - y).square().mean()
        inner.zero_grad()
        loss.backward()
        inner.step()
    return worker


class Outer:
    """The outer optimizer of a model, which it changes in place."""

    def __init__(self, model, lr=0.7, momentum=0.9):
        self.model = model
        self.sgd = torch.optim.SGD(model.parameters(), lr, momentum, nesterov=momentum > 0)

    def meet(self, workers):
        """One outer step towards these models."""
        for p, *theirs in zip(self.model.parameters(), *(w.parameters() for w in workers)):
            # Delta, how far the workers came, in the place where SGD looks for a gradient
            p.grad = torch.stack([(q - p).detach() for q in theirs]).mean(0)
        self.sgd.step()
        self.sgd.zero_grad()


if __name__ == "__main__":
    torch.manual_seed(0)
    model, teacher = Mixture(8, 4), Mixture(8, 4)
    outer = Outer(model, lr=0.7, momentum=0.9)
    for round in range(6):
        x = torch.randn(4, 10, 32, 8)                           # 4 workers, H = 10
        with torch.no_grad():
            print(f"round {round}: loss {(model(x[0, 0]) - teacher(x[0, 0])).square().mean():.4f}")
            y = teacher(x.flatten(0, 2)).view(4, 10, 32, 1)
        outer.meet([train(model, zip(*worker)) for worker in zip(x, y)])
