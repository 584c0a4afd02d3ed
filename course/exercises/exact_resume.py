"""What a checkpoint must hold.

lecture 1 · difficulty 3 of 5 · importance 4 of 5 · 35 minutes · 5 points

A run of N + M steps and a run of N steps that is stopped, loaded and continued for M steps should
be the same run: every loss equal to the last bit. The weights and the optimizer are not enough. A
run that goes on from these alone sees other data, another learning rate and another dropout, and
its loss still looks about right, so that nobody notices.

The training loop below has all that makes this hard: AdamW, dropout, windows in a shuffled order, a
learning rate that warms up, and a mixture of experts with the bias of loss-free balancing
(2408.15664), which no gradient moves. Write what its checkpoint holds, and what puts it back:

    saved = save(run)                   at any step; the run goes on
    torch.save(saved, file)             later, in another process
    run = Run(seed=...)                 anything may be different in it
    restore(run, torch.load(file, weights_only=True))
    run.step()                          as if nothing had happened

weights_only=True executes nothing that a stranger may have put into a file, and so takes tensors,
numbers, texts, lists and dicts alone.
"""
import copy

import torch
from torch import nn

from ffn import Context
from moe import MoE
from settings import FFNConfig

TEXT = torch.randint(32, (40, 9), generator=torch.Generator().manual_seed(0))   # 40 windows
SPARSE = FFNConfig(router="sigmoid", balance="loss_free", bias_rate=0.05, n_expert=4, top_k=2,
                   d_ff=16, dispatch="loop")


# given
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.dropout = nn.Embedding(32, 16), nn.Dropout(0.2)
        self.moe, self.head = MoE(SPARSE, 16), nn.Linear(16, 32)

    def forward(self, x):
        h = self.dropout(self.embedding(x))
        y, stats = self.moe(h, Context(x))
        return self.head(h + y), stats.load


# given
class Run:
    """A training run. Dropout draws from torch's default generator (torch.get_rng_state)."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.model = Model()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.done = 0                                           # optimizer steps
        self.shuffle = torch.Generator().manual_seed(seed)      # deals the windows of each pass
        self.order = torch.empty(0, dtype=torch.long)           # of the present pass
        self.cursor = 0                                         # the next place in it

    def batch(self):
        """The next 8 windows: inputs and targets, (8, 8) each."""
        if self.cursor == len(self.order):
            self.order, self.cursor = torch.randperm(len(TEXT), generator=self.shuffle), 0
        windows = TEXT[self.order[self.cursor:self.cursor + 8]]
        self.cursor += 8
        return windows[:, :-1], windows[:, 1:]

    def step(self):
        """One optimizer step; the loss as a number."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.02 * min(1, (self.done + 1) / 20)
        x, y = self.batch()
        logits, load = self.model(x)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.model.moe.after_step(load)                         # moves moe.router.bias
        self.done += 1
        return loss.item()


def save(run):
    """-> dict of tensors, numbers, texts, lists and dicts: all that the run is at this moment. The
    run goes on unchanged, and what it does later does not change the dict."""
    raise NotImplementedError("yours")


def restore(run, saved):
    """Makes a run of any state and seed the one that was saved."""
    raise NotImplementedError("yours")
