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
    saved = dict(
        # state_dict, not parameters(): the bias of loss-free balancing is a buffer
        model=run.model.state_dict(),
        # the moments of AdamW, and the number of steps by which it corrects them
        optimizer=run.optimizer.state_dict(),
        # what the learning rate is a function of
        done=run.done,
        # where the data stands: the deal of this pass, the place in it, and how the next is dealt
        order=run.order, cursor=run.cursor, shuffle=run.shuffle.get_state(),
        # what dropout draws from
        random=torch.get_rng_state())
    # a state_dict holds the live tensors: without a copy, training would go on in the checkpoint
    return copy.deepcopy(saved)


def restore(run, saved):
    """Makes a run of any state and seed the one that was saved."""
    # into the tensors that are there, so that the optimizer still holds those of the model
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.done, run.order, run.cursor = saved["done"], saved["order"], saved["cursor"]
    run.shuffle.set_state(saved["shuffle"])
    # last: nothing may draw after it
    torch.set_rng_state(saved["random"])


# ---- the check ----
import io  # noqa: E402

from course.check import Wrong, ask  # noqa: E402

WHY = {
    "buffer": "no gradient moves it, but the choice of experts depends on it; state_dict() has it, "
              "parameters() has not",
    "exp_avg_sq": "without its second moment AdamW's next steps have another size",
    "exp_avg": "without its first moment AdamW starts its momentum anew",
    "step of": "AdamW corrects its moments by the number of its own steps",
    "run.done": "the learning rate is a function of it, and would warm up again",
    "run.order": "the rest of this pass would read other windows",
    "run.cursor": "the run would read windows again, or skip some",
    "run.shuffle": "the next pass over the windows would come in another order",
    "default generator": "dropout would drop other numbers than in the run that was never stopped",
}


def pieces(run):
    """{name: tensor} of all that a run is."""
    found = {f"the parameter {n}": p for n, p in run.model.named_parameters()}
    found |= {f"the buffer {n}": b for n, b in run.model.named_buffers()}
    for n, p in run.model.named_parameters():
        found |= {f"AdamW's {what} of {n}": t for what, t in run.optimizer.state.get(p, {}).items()}
    found |= {"run.done": run.done, "run.order": run.order, "run.cursor": run.cursor,
              "the state of run.shuffle": run.shuffle.get_state(),
              "the state of the default generator": torch.get_rng_state()}
    return {name: torch.as_tensor(t).detach().clone() for name, t in found.items()}


def check(mine):
    with torch.random.fork_rng(devices=[]):
        for steps in (13, 5, 0):            # within a pass, at its end, before the first step
            interrupted(mine, steps)


def interrupted(mine, steps):
    run = Run(0)
    for _ in range(steps):
        run.step()
    at = pieces(run)
    saved = mine.save(run)
    ask(isinstance(saved, dict), f"save returns {type(saved).__name__}, not a dict")
    changed = [n for n, t in pieces(run).items() if not equal(t, at[n])]
    ask(not changed, f"save changes the run that it saves: {', '.join(changed[:2])}")
    losses = [run.step() for _ in range(10)]
    later = pieces(run)
    # in another process all generators stand elsewhere
    other = Run(1)
    torch.manual_seed(99)
    mine.restore(other, through_a_file(saved))
    compare(other, at, later, steps)
    for n, want in enumerate(losses, steps + 1):
        got = other.step()
        ask(got == want, f"restored at step {steps}, the loss of step {n} is {got!r}, not "
            f"{want!r} as without a stop")
    for name, t in pieces(other).items():
        ask(equal(t, later[name]), f"10 steps after a restore {name} differs, and did not before")


def equal(a, b):
    return a.shape == b.shape and torch.equal(a, b)


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    try:
        return torch.load(file, weights_only=True)
    except Exception as error:
        what = str(error).replace("\n", " ").partition("GLOBAL ")[2].split(" ")[0]
        raise Wrong("torch.load(weights_only=True) refuses what save returned: keep tensors, "
                    f"numbers, texts, lists and dicts, not {what or 'other objects'}") from None


def compare(run, at, later, steps):
    """Raises Wrong for the first piece that is not as it was."""
    held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    ask(held == {id(p) for p in run.model.parameters()}, "after restore the optimizer holds other "
        "tensors than the model, and moves them in vain: copy into the tensors that are there")
    got = pieces(run)
    ask(run.optimizer.state or not steps, "after restore AdamW has no state: save its moments and "
        "step counts with the weights")
    for name, want in at.items():
        why = next((why for word, why in WHY.items() if word in name), "all parameters are saved")
        ask(name in got, f"after restore there is no {name}: {why}")
        found = got[name]
        if equal(found, want):
            continue
        ask(not equal(found, later[name]), f"{name} is what it was at step {steps + 10}, and save "
            f"was called at step {steps}: a state_dict holds the live tensors, so copy them")
        far = (found - want).abs().max() if found.shape == want.shape else torch.inf
        ask("param" not in name or far > 0.02 * want.abs().max(), f"{name} is rounded, by up to "
            f"{far:.1g}: save it in its own dtype")
        numbers = f"{found.item():g}, not {want.item():g}" if want.dim() == 0 else "not as it was"
        raise Wrong(f"restored at step {steps}, {name} is {numbers}: {why}")
    more = [name for name in got if name not in at]
    ask(not more, f"restored at step {steps}, the run has what it had not: {more[:1]}")


WRONG = [
    ("run.model.load_state_dict(saved[\"model\"])",
     "with torch.no_grad():\n        for name, p in run.model.named_parameters():\n"
     "            p.copy_(saved[\"model\"][name])", "parameters() has not"),
    ("run.model.load_state_dict(saved[\"model\"])",
     "run.model = Model()\n    run.model.load_state_dict(saved[\"model\"])", "in vain"),
    ("    run.optimizer.load_state_dict(saved[\"optimizer\"])\n", "", "AdamW has no state"),
    ("run.optimizer.load_state_dict(saved[\"optimizer\"])",
     "run.optimizer.load_state_dict(saved[\"optimizer\"])\n"
     "    for state in run.optimizer.state.values():\n        state[\"step\"].zero_()",
     "by the number of its own steps"),
    ("run.done, run.order, run.cursor = saved[\"done\"], saved[\"order\"], saved[\"cursor\"]",
     "run.order, run.cursor = saved[\"order\"], saved[\"cursor\"]", "would warm up again"),
    ("run.done, run.order, run.cursor = saved[\"done\"], saved[\"order\"], saved[\"cursor\"]",
     "run.done, run.order = saved[\"done\"], saved[\"order\"]", "read windows again"),
    ("run.done, run.order, run.cursor = saved[\"done\"], saved[\"order\"], saved[\"cursor\"]",
     "run.done, run.cursor = saved[\"done\"], saved[\"cursor\"]", "would read other windows"),
    ("    run.shuffle.set_state(saved[\"shuffle\"])\n", "", "the next pass over the windows"),
    ("    torch.set_rng_state(saved[\"random\"])\n", "", "dropout would drop"),
    ("    torch.set_rng_state(saved[\"random\"])\n", "    torch.manual_seed(0)\n",
     "dropout would drop"),
    ("return copy.deepcopy(saved)", "return saved", "a state_dict holds the live tensors"),
    ("return copy.deepcopy(saved)",
     "saved[\"model\"] = {n: t.bfloat16() for n, t in saved[\"model\"].items()}\n"
     "    return copy.deepcopy(saved)", "is rounded"),
    ("random=torch.get_rng_state())", "random=torch.get_rng_state(), run=run)",
     "refuses what save"),
    ("random=torch.get_rng_state())", "random=torch.get_rng_state(), seed=torch.randint(9, ()))",
     "save changes the run that it saves: the state of the default generator"),
]
