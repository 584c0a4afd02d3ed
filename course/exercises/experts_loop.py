"""A sparse layer as a loop over experts.

lecture 1 · difficulty 1 of 5 · importance 5 of 5 · 20 minutes · 4 points

A router has chosen: token n goes to the experts ids[n] (k of them), whose outputs are weighed with
gates[n]. The layer returns

    y_n = sum over j = 1..k of gates[n, j] E_i(x_n),   i = ids[n, j]     (Shazeer 1701.06538 eq. 1)

A (token, expert) choice is called a pair; there are P = N k of them. Run each expert once, on the
tokens that chose it and on no others: this is all that makes the layer cheap. Every faster path of
this repository must agree with this loop (moe.py: dispatch_loop), so it is the one to read first.
"""
import torch


def load(ids, n_expert):
    """ids (N, k) -> (n_expert,): how many of the P pairs go to each expert. It sums to P."""
    raise NotImplementedError("yours")


def moe(x, ids, gates, experts):
    """x (N, d), ids (N, k), gates (N, k) -> y (N, d), with gradients to x, gates and the experts.
    experts: a list of E functions, each from rows (n, d) to rows (n, d), for any n, also 0."""
    raise NotImplementedError("yours")
