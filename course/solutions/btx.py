"""Branch-Train-MiX.

lecture 5 · difficulty 3 of 5 · importance 4 of 5 · 30 minutes · 5 points

Several experts in text make one sparse model (Sukhbaatar 2024, 2403.07816, sec. 3):

    branch      copy a dense seed model, one copy for each domain
    train       each branch on its own domain, with nothing exchanged between them
    mix         feed-forward layers become experts: expert j of a layer is that layer of branch j.
                All other weights are the mean over the branches. The router is new
    finetune    the whole sparse model on text of all domains, so that the router learns

    FF_mix(x) = sum over the chosen j of g_j(x W_r) FF_j(x)

Write the mix, and the four steps around it. This repository's own is in grow/btx.py.

It matters because the branches can be trained anywhere and at any time, which one large run
cannot, and because a mean of weights means something only among branches of one seed.
"""
import copy

import torch


# given
def train(model, batches, lr=3e-3):
    """Trains all weights of a GPT, in place, by a step on each of the batches, (idx, targets)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for idx, targets in batches:
        out = model(idx, targets)
        (out.loss + out.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def mix(branches, mixed):
    """Gives mixed, in place, what makes it the mix of the branches, which stay as they are.

    branches: E dense GPTs of this repository. mixed: a GPT with parameters of the same names and
    shapes, but for the layers that are sparse in it, where

    a branch  blocks.0.ffn.mlp.w_in.weight (w, d)       blocks.0.ffn.mlp.w_out.weight (d, w)
    mixed     blocks.0.ffn.experts.w_in (E, w, d)       blocks.0.ffn.experts.w_out (E, d, w)
              blocks.0.ffn.router.score.weight (E, d), drawn already

    The head may be tied to the embedding: two names, one tensor."""
    states = [branch.state_dict() for branch in branches]
    # the tensors of a state dict are the model's own: to write into them is to change the model
    # (the router, which no branch has, stays as it was drawn: it learns in the finetuning)
    for name, tensor in mixed.state_dict().items():
        # what all have: the mean, written at once. Adding up in place would count a tied head twice
        if name in states[0]:
            tensor.copy_(torch.stack([state[name] for state in states]).mean(0))
        # experts: the branches' layers one after the other, none of them averaged
        elif ".experts." in name:
            dense = name.replace("experts", "mlp") + ".weight"
            tensor.copy_(torch.stack([state[dense] for state in states]))


def branch_train_mix(seed, domains, mixed, everything):
    """All four steps: mixed, a new GPT with len(domains) experts, becomes the model that
    Branch-Train-MiX makes. Returns the branches. seed: a dense GPT, which stays as it is. domains:
    a list of batches for each domain. everything: batches of all domains. Train by train()."""
    branches = []
    for batches in domains:
        # a copy of its own: a second branch must start from the seed, not from the first branch
        branch = copy.deepcopy(seed)
        train(branch, batches)
        branches.append(branch)
    # first the mix, then its training: the router has never seen a token before
    mix(branches, mixed)
    train(mixed, everything)
    return branches


# ---- the check ----
from pathlib import Path  # noqa: E402

from course.check import Wrong, ask, close, shape  # noqa: E402
from data.tokenizers import Tokenizer  # noqa: E402
from grow import btx  # noqa: E402
from grow.parents import Parent  # noqa: E402
from model import GPT  # noqa: E402
from settings import Config, FFNConfig, ModelConfig  # noqa: E402

VOCAB = 16


def check(mine):
    for n, tied, more in ((3, True, {}), (2, False, {}), (3, False, dict(moe_every=2))):
        check_mix(mine, n, tied, more)
    check_steps(mine)
    show_a_run(mine)


def model_of(tied=True, **ffn):
    model = ModelConfig(n_layer=2, n_embd=16, n_head=2, block_size=16, vocab_size=VOCAB,
                        tie_embeddings=tied)
    return GPT(Config(model, FFNConfig(d_ff=16, activation="gelu", **ffn)))


def branches_of(n, tied):
    """Branches as after training on different text: every weight differs."""
    found = [model_of(tied, kind="dense") for _ in range(n)]
    with torch.no_grad():
        for p in (p for branch in found for p in branch.parameters()):
            p.add_(torch.randn_like(p) * 0.3)
    return found


def mixed_here(branches, more):
    """The same by this repository."""
    header = dict(ancestry=dict(kind="train", start="one seed", parents=[]))
    parents = [Parent(Path(f"branch-{j}"), branch, branch.config, Tokenizer.byte(), header)
               for j, branch in enumerate(branches)]
    return btx.mix(parents, [(f"ffn.{name}", str(value)) for name, value in more.items()])[1]


def snapshot(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def check_mix(mine, n, tied, more):
    branches, mixed = branches_of(n, tied), model_of(tied, n_expert=n, **more)
    before, drawn = [snapshot(b) for b in branches], snapshot(mixed)
    mine.mix(branches, mixed)
    for j, (branch, old) in enumerate(zip(branches, before)):
        for name, t in branch.state_dict().items():
            ask(torch.equal(t, old[name]), f"mix changed {name} of branch {j}: add up in a new tensor")
    want = mixed_here(branches, more).state_dict()
    places = {t.data_ptr() for branch in branches for t in branch.parameters()}
    for name, t in mixed.state_dict().items():
        shape(name, t, drawn[name].shape)
        of_each = [state.get(name) for state in before]
        if ".router." in name:
            ask(torch.equal(t, drawn[name]),
                f"{name} was changed: no branch has a router, it stays as it was drawn")
        elif ".experts." in name:
            check_experts(name, t, want[name])
        else:
            check_shared(name, t, drawn[name], of_each)
        if ".router." not in name:
            close(name, t, want[name])
        ask(t.data_ptr() not in places,
            f"{name} is a branch's own tensor: training the mix would change that branch")


def check_experts(name, t, want):
    mean, n = want.mean(0), len(want)
    ask(not torch.allclose(t, mean.expand_as(t), atol=1e-6), f"all experts of {name} are the mean of the "
        "branches' layers: experts are what differs, so they are not averaged")
    for j in range(n):
        same = [i for i in range(n) if torch.equal(t[j], want[i])]
        ask(not same or j in same,
            f"expert {j} of {name} is the layer of branch {same and same[0]}, not of branch {j}")


def check_shared(name, t, drawn, of_each):
    n, mean = len(of_each), torch.stack(of_each).mean(0)
    ask(not torch.allclose(t, mean * n, rtol=1e-4, atol=1e-5),
        f"{name} is the sum over the {n} branches, not the mean")
    ask(not torch.allclose(t, mean * 2, rtol=1e-4, atol=1e-5), f"{name} is twice the mean over the branches: "
        "embedding and head are one tensor under two names here, and it was added to under both")
    ask(not torch.equal(t, drawn), f"{name} is still as it was drawn: it is the mean over the branches")
    for j, one in enumerate(of_each):
        ask(not torch.equal(t, one),
            f"{name} is that of branch {j} alone: what is no expert is averaged over all")


def check_steps(mine):
    """The four steps, with a train() that only writes down what it gets, and moves the weights a little."""
    domains, everything, calls = [["a"], ["b"], ["c"]], ["all"], []
    seed, mixed = model_of(kind="dense"), model_of(n_expert=3)
    start = snapshot(seed)

    def train(model, batches, *more, **others):
        calls.append((model, list(batches), snapshot(model)))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * len(calls))

    real, mine.train = mine.train, train
    try:
        branches = mine.branch_train_mix(seed, domains, mixed, everything)
    finally:
        mine.train = real
    ask(calls, "branch_train_mix never calls train(model, batches)")
    for model, batches, state in calls[:3]:
        ask(model is not seed, "the seed itself is trained: a branch is a copy of it")
        ask(model is not mixed, "the mix is trained before all branches are: there is nothing to mix yet")
        ask(batches in domains, f"a branch is trained on {batches} instead of one domain of {domains}")
        for name, t in state.items():
            ask(torch.equal(t, start[name]),
                f"the branch of {batches[0]} does not start from the seed: {name} "
                "differs; it goes on from another branch")
    learned = [batches for _, batches, _ in calls[:3]]
    ask(learned == domains, f"the branches learned {learned}, not {domains} in this order")
    ask(all(torch.equal(t, start[name]) for name, t in seed.state_dict().items()), "the seed was changed")
    ask(isinstance(branches, (list, tuple)) and len(branches) == 3 and all(
        b is call[0] for b, call in zip(branches, calls)),
        "branch_train_mix does not return the three branches")
    if len(calls) < 4:
        raise Wrong("the mix is never trained: its router is random, so finetune it on all domains")
    last, batches, state = calls[3]
    ask(last is mixed and len(calls) == 4, "after the branches only the mix is trained, once")
    ask(batches == everything, f"the mix is trained on {batches}, not on text of all domains, {everything}")
    want = mixed_here(branches, {}).state_dict()
    for name, t in state.items():
        if ".router." not in name:
            close(f"{name} at the start of the finetuning", t, want[name], 1e-5, 1e-6,
                  "mix first, then finetune")


def text(domain, n, generator):
    """n batches of a domain: each token follows from the one before by a table of its own."""
    table = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(domain))
    found = []
    for _ in range(n):
        tokens = [torch.randint(VOCAB, (8,), generator=generator)]
        for _ in range(16):
            odd = torch.rand(8, generator=generator) < 0.1
            any_token = torch.randint(VOCAB, (8,), generator=generator)
            tokens.append(torch.where(odd, any_token, table[tokens[-1]]))
        rows = torch.stack(tokens, 1)
        found.append((rows[:, :-1], rows[:, 1:]))
    return found


def show_a_run(mine, steps=40):
    """Prints what the four steps do to the loss in two domains."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(1)
    first_a, first_b, a, b, more_a, more_b, test_a, test_b = (
        text(domain, n, generator) for n in (steps, steps, steps // 2, 8) for domain in (0, 1))
    seed, mixed = model_of(kind="dense"), model_of(n_expert=2)
    mine.train(seed, [batch for pair in zip(first_a, first_b) for batch in pair])
    everything = [batch for pair in zip(more_a, more_b) for batch in pair]
    branches = mine.branch_train_mix(seed, [a, b], mixed, everything)
    untrained = model_of(n_expert=2)
    mine.mix(branches, untrained)
    print("loss, nats a token        domain a   domain b")
    for name, model in (("seed", seed), ("branch of a", branches[0]), ("branch of b", branches[1]),
                        ("mix, router random", untrained), ("mix, finetuned", mixed)):
        with torch.no_grad():
            nats = [sum(model.eval()(*batch).loss.item() for batch in test) / len(test)
                    for test in (test_a, test_b)]
        print(f"{name:24}{nats[0]:10.3f}{nats[1]:11.3f}")


WRONG = [
    ("tensor.copy_(torch.stack([state[dense] for state in states]))",
     "tensor.copy_(torch.stack([state[dense] for state in states]).mean(0))", "they are not averaged"),
    ("[state[dense] for state in states]", "[state[dense] for state in states[::-1]]", "not of branch 0"),
    ("torch.stack([state[name] for state in states]).mean(0)", "states[0][name]",
     "is that of branch 0 alone"),
    ("[state[name] for state in states]).mean(0)", "[state[name] for state in states]).sum(0)",
     "is the sum over"),
    ("            tensor.copy_(torch.stack([state[name] for state in states]).mean(0))",
     "            if not name.startswith(\"head\"):\n                tensor.zero_()\n"
     "            for state in states:\n                tensor.add_(state[name] / len(states))",
     "under two names"),
    ("            tensor.copy_(torch.stack([state[name] for state in states]).mean(0))",
     "            total = states[0][name]\n            for state in states[1:]:\n"
     "                total += state[name]\n            tensor.copy_(total / len(states))",
     "add up in a new tensor"),
    ("if name in states[0]:", "if name in states[0] and \"norm\" not in name:", "still as it was drawn"),
    ("        elif \".experts.\" in name:",
     "        elif \".router.\" in name:\n            tensor.zero_()\n        elif \".experts.\" in name:",
     "no branch has a router"),
    ("branch = copy.deepcopy(seed)", "branch = seed", "a branch is a copy"),
    ("        branch = copy.deepcopy(seed)",
     "        branch = copy.deepcopy(branches[-1] if branches else seed)",
     "it goes on from another branch"),
    ("train(branch, batches)", "train(branch, everything)", "instead of one domain"),
    ("    train(mixed, everything)", "", "the mix is never trained"),
    ("train(mixed, everything)", "train(mixed, domains[0])", "not on text of all domains"),
    ("    mix(branches, mixed)\n    train(mixed, everything)",
     "    train(mixed, everything)\n    mix(branches, mixed)",
     "mix first, then finetune"),
]
