"""Even loads from one quantile.

lecture 2 · difficulty 3 of 5 · importance 3 of 5 · 30 minutes · 5 points

A token has a score s_ij for each of E experts. A bias b (E,) is added for the choice alone: token i
goes to the k experts with the largest s_ij + b_j. Which b gives every expert the same number of
tokens, N k / E? To find the best even assignment is a linear program, and minus b is the price that
its dual puts on each expert. Quantile balancing (Su 2026, kexue.fm/archives/11619) takes one step
of that dual for each batch:

    c_i = the (k+1)-th largest of s_ij + b_j over the experts        the cutoff of token i
    b_j = the (N k / E)-th smallest of c_i - s_ij over the tokens    the new bias of expert j

and then subtracts the mean of b, which changes no choice. Read it as an offer: as long as the other
experts stay where they are, expert j gets token i if b_j > c_i - s_ij, so that this b_j buys it
just its share of the tokens.

Write both lines. There is no loss, no rate and no gradient in it, and one step from b = 0 brings
the loads near to even. The new b serves the next batch: with that of the present one, a token would
choose by the scores of later tokens.
"""
import torch


def cutoff(scores, bias, k):
    """scores (N, E), bias (E,) -> (N,): the (k+1)-th largest of a token's scores plus bias; where
    k = E, which leaves none, the smallest."""
    raise NotImplementedError("yours")


def quantile_step(scores, bias, k):
    """scores (N, E), bias (E,) -> the new bias (E,), of mean 0. Its rank among the N tokens is
    N k / E, rounded down, but at least 1. A bias is a buffer: the new one carries no gradient, and
    the one that came in stays as it was."""
    raise NotImplementedError("yours")
