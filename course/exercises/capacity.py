"""Capacity: places in a queue, and who is dropped.

lecture 2 · difficulty 3 of 5 · importance 4 of 5 · 30 minutes · 5 points

An expert with a fixed number of slots is one dense matrix product, however uneven the loads are. So
each of the E experts gets a factor c times an even share of the P = N k pairs, rounded up:

    slots = ceil(c N k / E)           but never more than N: a token visits an expert once at most
                                      (Switch 2101.03961 sec. 2.2)

The pairs of an expert stand in a queue, and those beyond the slots are dropped: the token gets
nothing from this expert, and the residual connection carries it past the layer.

Who stands in front? A language model must not look ahead: whether a token travels may depend on the
positions before it alone, so the queue goes by position. At one position all first choices go
before all second ones, and of the same choice the first sequence of the batch before the second.
"""
import math

import torch


def slots(n_token, n_expert, k, factor):
    """The slots of one expert, an int. factor: a decimal number, meant exactly: 1.1 for 200 tokens,
    4 experts and k = 1 gives 55."""
    raise NotImplementedError("yours")


def keep(ids, n_expert, n_slot):
    """ids (B, T, k), the experts of each token, best first -> (B, T, k) bool: which pairs get one
    of the n_slot slots of their expert. A token's experts differ. All sequences share the slots."""
    raise NotImplementedError("yours")
