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
    raise NotImplementedError("yours")


def branch_train_mix(seed, domains, mixed, everything):
    """All four steps: mixed, a new GPT with len(domains) experts, becomes the model that
    Branch-Train-MiX makes. Returns the branches. seed: a dense GPT, which stays as it is. domains:
    a list of batches for each domain. everything: batches of all domains. Train by train()."""
    raise NotImplementedError("yours")
