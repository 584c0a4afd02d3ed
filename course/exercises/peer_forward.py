"""PEER's forward pass, to be read.

lecture 4 · difficulty 4 of 5 · importance 4 of 5 · 40 minutes · 6 points

A feed-forward layer of E = m^2 experts, each of them one neuron (He 2024, 2407.04153, algorithm 1):

    q = norm(x W_q)                     h queries for each token, each cut into two halves q', q"
    s_ij = q' . c_i + q" . c'_j         the score of expert i m + j, from two tables of m sub-keys
    y = sum over the heads and their k best experts of g act(x . u) v

The gates g of a head are the softmax of that head's k best scores. All heads share the sub-keys
and the experts, and act is the exact GELU. Expert i m + j has row i m + j of one table, with its u
and its v side by side.

A query needs 2 m dot products, not m^2. So find the k best sub-keys of each half first: the k best
experts are among the k^2 sums of those. Never score all m^2 experts.

It matters because this is the whole layer, a million experts in a dozen lines. The fast kernels of
this repository are tested against a function like yours.
"""
import torch
import torch.nn.functional as F


def queries(x, w_q, norm, h):
    """x (N, d) -> queries (N, h, 2, c), both halves of each.

    w_q (2 h c, d): its rows are ordered by head, then half, then feature. norm: a function
    (N, 2 h c) -> (N, 2 h c) of all features of a token's queries, to be called once."""
    raise NotImplementedError("yours")


def retrieve(q, sub_keys, k):
    """Queries (N, h, 2, c) and sub_keys (2, m, c) -> the k best of the m^2 experts of each query:
    scores (N, h, k), largest first, and experts (N, h, k), numbers i m + j."""
    raise NotImplementedError("yours")


def forward(x, w_q, norm, sub_keys, table, h, k):
    """The layer: x (N, d) -> y (N, d), with its gradients. w_q, norm and sub_keys as above; table
    (E, 2, d) holds u_i = table[i, 0] and v_i = table[i, 1]."""
    raise NotImplementedError("yours")
