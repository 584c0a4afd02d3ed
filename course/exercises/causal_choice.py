"""Experts that choose: why it looks ahead, and a form that does not.

lecture 2 · difficulty 3 of 5 · importance 4 of 5 · 30 minutes · 5 points

In expert choice (Zhou et al. 2202.09368) the roles are turned: each expert takes the C tokens that
have the highest probability for it, C = N k / E, so that all loads are equal by construction. The
probabilities are a softmax over the experts; the gate is the probability itself, and 0 where the
expert does not take the token. A token may get no expert, or several.

In a language model that is a leak. Among the N = B T tokens that compete are later ones of the same
text, so that whether a token is processed depends on words that come after it. Nothing fails in
training, but generation cannot do the same, since there the later tokens do not exist yet.

1. `expert_choice`: the C best of all tokens of the batch, for each expert.
2. `leak`: a test that finds out, for any way to choose. Replace what comes after position t and see
   whether a gate at or before t changes. Such a test finds most bugs of this kind in any model.
3. `causal_choice`: at each position by itself, each expert takes C = B k / E of the B sequences of
   the batch (as Krajewski et al. 2402.07871 group them). What stays: a text sees its neighbours in
   the batch.
"""
import torch


def expert_choice(probs, C):
    """probs (B, T, E), each row sums to 1 -> gates (B, T, E): the probability where the expert
    takes the token, else 0, with their gradient. Each expert takes C of all B T tokens."""
    raise NotImplementedError("yours")


def leak(choose, probs, t):
    """The largest change (float) of a gate at the positions 0 ... t when other probabilities stand
    at all positions after t; 0.0 if choose does not look ahead. choose: a function from
    probabilities (B, T, E) to gates (B, T, E). probs (B, T, E) stays as it is."""
    raise NotImplementedError("yours")


def causal_choice(probs, k):
    """probs (B, T, E) -> gates (B, T, E), as expert_choice, but at each position each expert takes
    C of the B sequences. C is B k / E, rounded, and at least 1."""
    raise NotImplementedError("yours")
