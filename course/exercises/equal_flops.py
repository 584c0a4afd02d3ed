"""Finer experts for the same FLOPs.

lecture 4 · difficulty 2 of 5 · importance 4 of 5 · 30 minutes · 4 points

A layer has n_expert experts of hidden width d_ff, and a token visits top_k of them. Granularity G
(Krajewski 2024, 2402.07871) cuts every expert into G narrower ones along its hidden width. A token
then visits G times as many, so that its feed-forward FLOPs and the parameters stay what they were.
Input and output of an expert keep the width d.

Two costs do not stay. The router has a row of d numbers for every expert there is, not only for
those that a token visits. And FLOPs that the router takes are tokens that the same budget cannot
train on.

    FLOPs of a token in a layer = 2 d E (router) + k experts of some matrices, d w numbers each

A multiply-add is 2 FLOPs. Bias, activation, softmax and top-k are not counted.

Write the arithmetic. Then, before you look at any figure, write into predict() what you expect of
models with 8 experts, 2 layers and d = 64, at a fixed budget of 480 steps with G = 1 (983,040
tokens of a Markov source). Equal FLOPs there are those of the paper's count, in which a layer takes
14 d E for routing and 72 d^2 for all else. Each sparse layer ends in a norm, as in the paper. The
check prints what came out: three seeds, recorded in results/fine_grained.

It matters because every comparison of sparse models rests on such a count. One that forgets the
router always finds that the finest experts are best.
"""


def split(G, d_ff, n_expert, top_k):
    """(w, E, k): hidden width, number and choices of a token, of the experts at granularity G, int.
    d_ff, n_expert and top_k are those of G = 1. ValueError if G does not divide d_ff."""
    raise NotImplementedError("yours")


def flops(d, w, E, k, matrices):
    """Forward FLOPs of one token in the layer, router included. matrices: those of an expert, each
    of d w numbers: 2, or 3 with SwiGLU."""
    raise NotImplementedError("yours")


def steps(G, steps_1, d, d_ff, n_expert, top_k, matrices, other):
    """Training steps that a model with granularity G gets for the FLOPs that steps_1 steps with
    G = 1 take, rounded down, int; all steps have the same number of tokens. It has one such layer,
    and `other` are the forward FLOPs of a token in all the rest."""
    raise NotImplementedError("yours")


def predict():
    """Your predictions, as a dict of numbers:

    gain_at_equal_tokens    nats by which G = 4 ends below G = 1 after equally many tokens, +- 0.1
    best_at_equal_flops     the G of 1, 2, 4, 8 and 32 with the lowest loss at equal FLOPs; half or
                            twice the best one passes, too
    worst_at_equal_flops    the G of these with the highest"""
    raise NotImplementedError("yours")
