"""The smooth load of noisy top-k.

lecture 2 · difficulty 4 of 5 · importance 3 of 5 · 35 minutes · 6 points

How many tokens an expert gets is a count: no gradient. Shazeer et al. (1701.06538, appendix A) made
a load with a gradient out of the noise that their router adds to its logits:

    H_i = z_i + e_i s_i, e ~ N(0, 1)          the noisy logits, whose k largest are chosen (eq. 4)
    P_i = the chance that expert i is among the k largest if its own e_i is drawn once more,
          while the noise of the others stays as it is                             (eq. 8 and 9)
    load_i = sum over the tokens of P_i                                                 (eq. 10)
    L = CV(load)^2, the variance of the loads over the square of their mean             (eq. 11)

Expert i is chosen again if its new H_i is above a bar: the k-th largest H of the *other* experts.
From that bar, z_i and s_i follows P_i, with the distribution function of the normal distribution.
"""
import torch


def bar(noisy, k):
    """noisy (N, E), the logits H -> (N, E): what each expert must beat to be among the k largest,
    the k-th largest of the H of the other experts. k < E; no two H of a token are equal."""
    raise NotImplementedError("yours")


def smooth_load(clean, noisy, std, k):
    """clean z, noisy H and std s, each (N, E) -> the load (E,), with gradients to all three."""
    raise NotImplementedError("yours")


def cv_squared(load):
    """(E,) -> (): the variance over the square of the mean. The E loads are all there are, and no
    sample of more: divide by E, not by E - 1."""
    raise NotImplementedError("yours")
