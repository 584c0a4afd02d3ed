"""Balance without a loss: the bias, and its drift.

lecture 2 · difficulty 2 of 5 · importance 5 of 5 · 25 minutes · 5 points

A balance loss pulls at the router with a gradient that has nothing to do with the text. Wang et al.
(2408.15664) and DeepSeek-V3 (2412.19437) add a bias to the choice instead, and to nothing else.
With the scores s = sigmoid(z), (N, E):

    ids   = the k experts with the largest s_i + b_i                          (V3 eq. 16)
    gates = s_i of these, divided by their sum                                (V3 eq. 13)
    b_i  <- b_i + u sign(mean load - load_i)     after each batch             (2408.15664 alg. 1)

As written, the steps need not cancel: of eight experts one may have too many tokens and seven too
few, and then most biases rise, batch after batch. This drift changes no choice, but a bias of 30
has fewer digits left for what matters. So take the mean of the E steps off each, then add them.
"""
import torch


def choose(scores, bias, k):
    """scores (N, E), bias (E,) -> gates (N, k) and ids (N, k), largest s + b first. The gates carry
    a gradient to the scores, and sum to 1; with k = 1 a gate is its score."""
    raise NotImplementedError("yours")


def update(bias, load, rate):
    """bias (E,), load (E,) = pairs that each expert got, rate u -> the new bias (E,)."""
    raise NotImplementedError("yours")


def drift(load, rate, steps):
    """The mean of the E biases after `steps` updates of alg. 1 as the paper writes it, without the
    mean taken off, from b = 0 and with the same load (E,) each time: a number."""
    raise NotImplementedError("yours")
