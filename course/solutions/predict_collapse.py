"""Predict: what happens to the load without a balance loss?

lecture 2 · difficulty 1 of 5 · importance 4 of 5 · 15 minutes · 3 points

Think first, then run. The check trains a tiny layer: Switch routing (one expert for each token),
E = 8 experts, 60 steps of 256 tokens, which are to guess the next of 64 symbols. What the tokens
have in common begins twice as large as what tells them apart. It does so with three seeds, without
a balance loss and with Switch's at coefficient 0.1, and takes means over the seeds and over the
last 20 steps.

Two things pull. An expert that is chosen more often is trained more, and so becomes the better
choice. And the text pulls: are eight experts that share the work better at guessing than one that
does it nearly alone?

Write down what you expect, and why, before you run it. A prediction is right if it is within the
band of what comes out; the check prints what that is. If you were wrong, say to yourself what you
had not thought of, and only then change the number.
"""


def predict():
    """A dict of four numbers:
    busiest_without: the share of the tokens, 0 to 1, of the busiest expert without the loss, +- 0.2
    busiest_with: the same with the loss, +- 0.06
    dead_without: how many of the 8 experts get less than 1 % of the tokens without it, +- 2
    gain: how many nats the text's own loss is lower with the balance loss than without, +- 0.1"""
    return dict(
        # one expert is ahead at the first step, since it likes what all tokens have in common; it
        # learns from more tokens than the others, and so gets further ahead
        busiest_without=0.8,
        # even would be 1/8 = 0.125; the text pulls some tokens back to where they guess best
        busiest_with=0.17,
        # an expert that no token visits gets no gradient: it stays as bad as it was drawn
        dead_without=5,
        # none: a layer of one expert alone guesses this text as well (2.63 nats, with eight 2.65)
        gain=0.0)


# ---- the check ----
import functools  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from course.check import ask  # noqa: E402
from ffn import Context  # noqa: E402
from moe import MoE  # noqa: E402
from settings import FFNConfig  # noqa: E402

E, D, SYMBOLS, STEPS, TOKENS, LAST, SEEDS = 8, 16, 64, 60, 256, 20, 3
BANDS = dict(busiest_without=0.2, busiest_with=0.06, dead_without=2, gain=0.1)


class Tiny(torch.nn.Module):
    """Embedding, one sparse layer, output: guesses the next symbol from the present one."""

    def __init__(self, coefficient):
        super().__init__()
        config = FFNConfig(n_expert=E, top_k=1, d_expert=D, router="switch", balance="switch",
                           jitter=0.0, balance_loss=coefficient, activation="relu",
                           dispatch="padded")
        self.embedding = torch.nn.Embedding(SYMBOLS, D)
        self.embedding.weight.data += 2 * torch.randn(D)            # what all tokens have in common
        self.moe, self.head = MoE(config, D), torch.nn.Linear(D, SYMBOLS)

    def forward(self, ids, targets):
        x = F.layer_norm(self.embedding(ids), (D,))
        y, stats = self.moe(x, Context(ids))
        return F.cross_entropy(self.head(x + y).flatten(0, 1), targets.flatten()), stats


def train(coefficient, seed):
    """(text loss, load (E,)) as means of the last steps, and the load of the first step."""
    random = torch.Generator().manual_seed(0)
    table = (2 * torch.randn(SYMBOLS, SYMBOLS, generator=random)).softmax(-1)
    often = 1 / torch.arange(1, SYMBOLS + 1)
    torch.manual_seed(seed)
    model = Tiny(coefficient)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.03)
    losses, loads = [], []
    for _ in range(STEPS):
        ids = often.multinomial(TOKENS, True)
        loss, stats = model(ids.view(1, -1), table[ids].multinomial(1).view(1, -1))
        optimizer.zero_grad()
        (loss + stats.aux_loss).backward()
        optimizer.step()
        losses.append(loss.detach())
        loads.append(stats.load / TOKENS)
    return torch.stack(losses[-LAST:]).mean().item(), torch.stack(loads[-LAST:]).mean(0), loads[0]


def mean(values):
    return sum(values) / SEEDS


@functools.cache
def outcome():
    """What came out: the numbers to predict, and the busiest expert's share at the first step."""
    without, with_loss = ([train(c, seed) for seed in range(SEEDS)] for c in (0.0, 0.1))
    found = dict(busiest_without=mean(load.max().item() for _, load, _ in without),
                 busiest_with=mean(load.max().item() for _, load, _ in with_loss),
                 dead_without=mean((load < 0.01).sum().item() for _, load, _ in without),
                 gain=mean(loss for loss, *_ in without) - mean(loss for loss, *_ in with_loss))
    return found, mean(first.max().item() for *_, first in without)


def check(mine):
    mine = mine.predict()
    ask(isinstance(mine, dict) and set(mine) == set(BANDS), "predict returns no dict of "
        f"{', '.join(BANDS)}")
    for name in ("busiest_without", "busiest_with"):
        ask(mine[name] <= 1, f"{name} is {mine[name]}: a share of the tokens, 0 to 1")
        ask(mine[name] >= 1 / E, f"{name} is {mine[name]}, below 1/8 = 0.125: the busiest of 8 "
            "experts has at least the mean share")
    ask(mine["dead_without"] < E, "all 8 experts dead? Each token visits one of them")
    found, first = outcome()
    print(f"At the first step the busiest of the 8 experts has {first:.2f} of the tokens.\n"
          f"At the end it has {found['busiest_without']:.2f} without the balance loss, and "
          f"{found['busiest_with']:.2f} with it.\n"
          f"Without it {found['dead_without']:.1f} experts are dead. With it the text's loss is "
          f"{abs(found['gain']):.3f} nats {'lower' if found['gain'] > 0 else 'higher'}.")
    why = dict(
        busiest_without="who is ahead is trained more, and nothing pulls back",
        busiest_with="the loss pulls to 1/8 = 0.125, and the text a little away from it",
        dead_without="an expert without tokens has no gradient, so it stays as bad as it was drawn",
        gain="the balance loss does not know the text, and so small a task fits into one expert")
    for name, value in found.items():
        ask(abs(mine[name] - value) <= BANDS[name], f"{name}: you said {mine[name]}, and it was "
            f"{value:.2f} (+- {BANDS[name]}): {why[name]}")


WRONG = [
    ("busiest_without=0.8", "busiest_without=0.2", "nothing pulls back"),
    ("busiest_with=0.17", "busiest_with=0.1", "at least the mean share"),
    ("busiest_with=0.17", "busiest_with=0.5", "the loss pulls to 1/8"),
    ("dead_without=5", "dead_without=0", "has no gradient"),
    ("gain=0.0", "gain=0.5", "fits into one expert"),
    ("busiest_without=0.8", "busiest_without=80", "a share of the tokens"),
]
