"""The best k of a million keys from two thousand scores.

lecture 4 · difficulty 4 of 5 · importance 5 of 5 · 50 minutes · 7 points

PEER (2407.04153 sec. 2.1; the keys are those of PKM, 1907.05242) finds k of E = m^2 experts for a
query without looking at all of them. The query has two halves q', q", and so has the key of expert
i m + j: sub-key c_i of the first table and sub-key c'_j of the second; each has m. Its score

    s_ij = q' . c_i + q" . c'_j

is a sum, so that 2 m dot products say all about m^2 scores: 2,000 for a million experts. The k best
of each half, and then the k best among their sums, are the k best of all. Not even all k^2 sums are
needed. Let both halves be ranked, best first, from 0: which pairs of ranks (i, j) can be among the
k best sums at all? At k = 16 there are 50 such pairs, and no smaller set will do.

1. `candidates`: these pairs of ranks.
2. `product_key_topk`: the k best experts and their scores. The check counts what you form: with
   m = 1,000 and 4 queries it must stay below a million numbers in all, and half a second.
3. `candidates_suffice`: the claim as a property that can be tested on any two lists. A test that
   cannot fail proves nothing: the check hands it sets of ranks that lack a pair.
"""
import torch


def candidates(k):
    """-> two int64 tensors of one length, the ranks i and j (from 0) of the pairs that can be
    among the k largest sums of two lists that are ranked from the best down. In any order, and no
    more pairs than are needed."""
    raise NotImplementedError("yours")


def product_key_topk(q, sub_keys, k):
    """q (N, 2, c), sub_keys (2, m, c), k <= m -> scores (N, k), from the largest down, with their
    gradient, and experts (N, k) int64, i m + j of the sub-keys i and j."""
    raise NotImplementedError("yours")


def candidates_suffice(a, b, ranks, k):
    """Whether the k largest of all sums a_i + b_j are found among the pairs `ranks`. a, b (m,),
    not sorted; ranks: as from candidates, for lists that are ranked from the best down. Where sums
    are equal, any of them will do. False for fewer than k pairs. Looks at all m^2 sums: this is
    the proof, not the method."""
    raise NotImplementedError("yours")
