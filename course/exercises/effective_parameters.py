"""What experts are worth: two scaling laws.

lecture 4 · difficulty 3 of 5 · importance 3 of 5 · 40 minutes · 5 points

Clark et al. 2022 (2202.01169, eq. 1) give the loss of a model in which each token visits one of E
experts. N are the parameters of the dense model that it is at E = 1, and all models read 130
billion tokens:

    log10 L = a log10 N + b log10 Ê + c log10 N log10 Ê + d         (L in nats a token)
    1/Ê = 1/(E - 1 + 1/(1/E_start - 1/E_max)) + 1/E_max

Ê are the experts that count: E_start of them at E = 1, E_max at infinitely many. The effective
parameters N' of (N, E) are those of the dense model with the same predicted loss.

Krajewski et al. 2024 (2402.07871) let the tokens D vary, too, and cut experts to granularity G:

    L = c + (g / G^gamma + a) / N^alpha + b / D^beta                (nats a token)
    N = d^2 (8 E + 4) blocks                all experts counted, embeddings not
    FLOPs = (72 d^2 + 14 d E G) D blocks    of training; 14 d E G are the routing
    d = 64 blocks                           not rounded: a shape that gives back the paper's table

Here E is the expansion, the feed-forward parameters over those of the dense model. A budget of
FLOPs buys a size, a number of tokens and a granularity; find the best.

A law comes as an object with its coefficients as attributes: law.a, law.b, law.c, law.d,
law.E_start and law.E_max, or law.a, law.alpha, law.b, law.beta, law.g, law.gamma and law.c. All
numbers are plain floats.

It matters because "how many experts, how fine, on how many tokens" is asked before every large
run, and because both laws show where the gain ends.
"""
import math

GRANULARITIES = [2 ** i for i in range(13)]             # what optimum() chooses G from


def experts_that_count(law, E):
    """Clark's Ê of E experts."""
    raise NotImplementedError("yours")


def clark_loss(law, N, E):
    """Clark's L for a dense size N and E experts."""
    raise NotImplementedError("yours")


def effective_parameters(law, N, E):
    """N', the size of the dense model with the loss of (N, E), so that N' = N at E = 1."""
    raise NotImplementedError("yours")


def krajewski_loss(law, N, D, G):
    """Krajewski's L for N parameters in all, D tokens and granularity G."""
    raise NotImplementedError("yours")


def training_flops(N, D, G, E):
    """FLOPs that train N parameters in all, with expansion E and granularity G, on D tokens."""
    raise NotImplementedError("yours")


def optimum(law, flops, E):
    """(N, D, G) with the lowest loss that this many training FLOPs can buy, G one of GRANULARITIES.
    N to about 1 %."""
    raise NotImplementedError("yours")
