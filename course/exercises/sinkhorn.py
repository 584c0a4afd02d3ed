"""A balanced plan by scaling rows and columns.

lecture 2 · difficulty 3 of 5 · importance 3 of 5 · 30 minutes · 5 points

S-BASE (Clark et al. 2202.01169 sec. 3.1) asks which plan moves N tokens to E experts so that the
tokens prefer where they go and every expert gets the same: a matrix P (N, E) of positive numbers
whose rows sum to 1 and whose columns sum to N / E. Of all those, take the one that makes

    sum_ij P_ij z_ij  -  tau sum_ij P_ij log P_ij

largest, with the router's logits z (N, E). It is exp(z / tau) with its rows and columns multiplied
by numbers, and these are found by turns (Sinkhorn): scale every column to N / E, then every row to
1, and again. A small tau is near to a hard assignment and needs more turns.

1. `log_plan`: the logarithm of P after a fixed number of turns. Stay with logarithms: at z / tau =
   100 exp no longer fits into float32.
2. `route`: in training a token goes to the largest entry of its row of the plan. The plan looks at
   the whole batch, later tokens and neighbours included, so that it cannot be used in generation:
   in evaluation a token goes to its largest logit. The gate is in both cases the sigmoid of the raw
   logit of the chosen expert, and that is the way by which the router learns.
"""
import math

import torch


def log_plan(logits, tau, turns):
    """logits (N, E) -> log P (N, E), without a gradient. A turn scales the columns and then the
    rows, so that the rows are exact at the end and the columns nearly so."""
    raise NotImplementedError("yours")


def route(logits, tau, turns, training):
    """logits (N, E) -> experts (N,) int64 and gates (N,), whose gradient goes to the logits."""
    raise NotImplementedError("yours")
