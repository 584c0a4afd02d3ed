"""Predict: what happens to the load without a balance loss?

lecture 2 · difficulty 1 of 5 · importance 4 of 5 · 15 minutes · 3 points

Think first, then run. The check trains a tiny layer: Switch routing (one expert for each token),
E = 8 experts, 60 steps of 256 tokens, which are to guess the next of 64 symbols. What the tokens
have in common begins twice as large as what tells them apart. It does so with three seeds, without
a balance loss and with Switch's at coefficient 0.1, and takes means over the seeds and over the
last 20 steps.

Two things pull. An expert that is chosen more often is trained more, and so becomes the better
choice. And the text pulls: are eight experts that share the work better at guessing than one that
does it nearly alone?

Write down what you expect, and why, before you run it. A prediction is right if it is within the
band of what comes out; the check prints what that is. If you were wrong, say to yourself what you
had not thought of, and only then change the number.
"""


def predict():
    """A dict of four numbers:
    busiest_without: the share of the tokens, 0 to 1, of the busiest expert without the loss, +- 0.2
    busiest_with: the same with the loss, +- 0.06
    dead_without: how many of the 8 experts get less than 1 % of the tokens without it, +- 2
    gain: how many nats the text's own loss is lower with the balance loss than without, +- 0.1"""
    raise NotImplementedError("yours")
