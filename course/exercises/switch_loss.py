"""Switch's load-balancing loss, and whether 1 is its minimum.

lecture 2 · difficulty 2 of 5 · importance 5 of 5 · 25 minutes · 5 points

With the probabilities p = softmax(z), (N, E), and the experts ids (N, k) that were chosen:

    f_i = the share of the N k pairs that went to expert i          (Switch 2101.03961 eq. 5)
    P_i = the mean over the tokens of p_i                           (eq. 6)
    L   = E sum over i of f_i P_i                                   (eq. 4, before its coefficient)

f is a count: it has no gradient. The loss pushes through P alone, harder on experts that have more
tokens. Even routing gives f_i = P_i = 1 / E and L = 1, whatever E and k are; the factor E is there
for that. The paper says that the loss is minimised there. Is it? f follows which expert of a token
is the largest, and P how large: find probabilities whose loss is below 1.
"""
import torch


def switch_loss(probs, ids):
    """probs (N, E), each row sums to 1, and ids (N, k) -> L, a tensor of shape (), with a gradient
    to probs."""
    raise NotImplementedError("yours")


def gradient(probs, ids):
    """The gradient of L to probs, (N, E), by hand: a formula of f, E and N, without autograd."""
    raise NotImplementedError("yours")


def below_one():
    """probs (N, E) of your own, N >= 2 and E >= 2, each row >= 0 and of sum 1, without ties for the
    largest, whose loss with ids = the largest of each row (k = 1) is below 0.95."""
    raise NotImplementedError("yours")
