"""Two published scaling laws of routed language models, with their coefficients.

    Clark et al. 2022 (2202.01169)       loss over dense size N and experts E, after 130B tokens
    Krajewski et al. 2024 (2402.07871)   loss over total size N, training tokens D, granularity G

Losses are nats per token of the papers' own data and tokenizers: compare them within a law, never
with the loss of a small model on bytes. Arguments may be numbers or arrays that broadcast, and so
may a law's coefficients: a fit keeps its bootstrap as one law with coefficients (B, 1).
"""
from typing import NamedTuple

import numpy as np


class Clark(NamedTuple):
    """Coefficients of Clark's Eq. 1, for one router."""
    a: float            # log10 L over log10 N, at Ê = 1
    b: float            # log10 L over log10 Ê, at N = 1
    c: float            # how much the gain from experts shrinks per decade of N
    d: float
    E_start: float      # Ê of one expert
    E_max: float        # Ê of infinitely many


class Krajewski(NamedTuple):
    """Coefficients of Krajewski's law, for one expansion rate E."""
    a: float
    alpha: float        # exponent of N
    b: float
    beta: float         # exponent of D
    g: float
    gamma: float        # exponent of G
    c: float            # loss that no size removes, nats


# Clark's three routers as the paper prints them, and refitted to the final losses of its released
# curves.
CLARK = {"s_base": Clark(-.082, -.108, .009, 1.104, 1.847, 314.478),
         "rl_r": Clark(-.083, -.126, .012, 1.111, 1.880, 469.982),
         "hash": Clark(-.087, -.136, .012, 1.157, 4.175, 477.741)}
CLARK_REFIT = {"s_base": Clark(-.0830, -.1180, .0099, 1.1136, 2.08, 239),
               "rl_r": Clark(-.0827, -.1234, .0112, 1.1070, 1.72, 470),
               "hash": Clark(-.0874, -.1384, .0126, 1.1595, 4.27, 427)}
# N from which experts stop helping, by the paper's unrounded coefficients. Three decimals of b and
# c move it by factors, and it belongs to the fixed budget of tokens: with more tokens it moves up.
CLARK_CUTOFF = {"s_base": 937e9, "rl_r": 85e9, "hash": 83e9}
# ffn.router -> the paper's router
CLARK_NAMES = dict(sinkhorn="s_base", rl="rl_r", hash="hash")

# By expansion rate E, N_MoE / N_ff; E = 1 is the dense model, which has no granularity.
KRAJEWSKI = {64: Krajewski(18.1, .115, 30.8, .147, 2.1, .58, .47),
             16: Krajewski(19.64, .124, 57.07, .169, 1.18, .986, .472),
             1: Krajewski(16.3, .126, 26.7, .127, 0., 0., .47)}
# FLOPs per weight and token in training, and per token and d x experts for routing
C_F, C_R = 6, 14


# ---- Clark ----

def saturated_experts(law, E):
    """Ê, the experts that count: E_start at E = 1, about E in between, E_max at infinity.
    1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max."""
    return 1 / (1 / (E - 1 + 1 / (1 / law.E_start - 1 / law.E_max)) + 1 / law.E_max)


def clark_loss(law, N, E):
    """L in nats per token of a model with E experts of which each token visits one, Eq. 1; N are
    the parameters of the dense model that it becomes at E = 1."""
    n, e = np.log10(N), np.log10(saturated_experts(law, E))
    return 10 ** (law.a * n + law.b * e + law.c * n * e + law.d)


def effective_params(law, N, E):
    """N̄, the size of the dense model with the predicted loss of (N, E); so N̄(N, 1) = N."""
    e, start = np.log10(saturated_experts(law, E)), np.log10(law.E_start)
    slope = law.a + law.c * start                       # of a dense model
    return 10 ** ((np.log10(N) * (law.a + law.c * e) + law.b * (e - start)) / slope)


# ---- Krajewski ----

class Optimum(NamedTuple):
    """The best model that a budget of FLOPs can train."""
    N: float            # total parameters without embeddings
    D: float            # training tokens
    G: int
    loss: float         # nats per token
    d_model: float
    n_blocks: float


def krajewski_loss(law, N, D, G):
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta in nats per token; N counts all experts,
    without embeddings: d² (8 E + 4) n_blocks."""
    return law.c + (law.g / G ** law.gamma + law.a) / N ** law.alpha + law.b / D ** law.beta


def shape_of(N, E):
    """(d_model, n_blocks), not rounded, of N = d² (8 E + 4) n_blocks with d = 64 n_blocks, the
    aspect ratio that reproduces the paper's table of optima."""
    n_blocks = (N / (64 ** 2 * (8 * E + 4))) ** (1 / 3)
    return 64 * n_blocks, n_blocks


def krajewski_flops(d_model, n_blocks, D, G, E, c_r=C_R):
    """FLOPs to train on D tokens: (12 d² c_f + d E G c_r) D n_blocks. The second term is routing,
    to G E experts; a dense model has none (c_r = 0)."""
    return (12 * d_model ** 2 * C_F + d_model * E * G * c_r) * D * n_blocks


def compute_optimal(flops, E=64, c_r=C_R, granularities=2 ** np.arange(13)):
    """The Optimum among these granularities, by search over N on a grid of 0.1 %; E is a key of
    KRAJEWSKI."""
    law, G = KRAJEWSKI[E], np.asarray(granularities)
    N = np.geomspace(1e4, 1e18, 32_001)[:, None]
    d_model, n_blocks = shape_of(N, E)
    D = flops / krajewski_flops(d_model, n_blocks, 1, G, E, c_r)        # (sizes, granularities)
    loss = krajewski_loss(law, N, D, G)
    i, j = np.unravel_index(loss.argmin(), loss.shape)
    numbers = N[i, 0], D[i, j], int(G[j]), loss[i, j], d_model[i, 0], n_blocks[i, 0]
    return Optimum(*(n if isinstance(n, int) else float(n) for n in numbers))


def dense_optimal(flops):
    """The Optimum among dense models."""
    return compute_optimal(flops, 1, 0, [1])


def dense_flops(loss):
    """FLOPs at which the best dense model reaches a loss above c, by bisection. The printed
    coefficients give 21 times the mixture's at 1e20 (paper: 20) and 32 times at 1e25 (paper: over
    40)."""
    low, high = 10., 36.                                # powers of ten
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if dense_optimal(10 ** middle).loss > loss else (low, middle)
    return 10 ** high
