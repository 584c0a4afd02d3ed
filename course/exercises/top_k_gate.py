"""Gates in three orders.

lecture 2 · difficulty 2 of 5 · importance 5 of 5 · 20 minutes · 4 points

A router has a logit for every expert. It keeps the k experts with the largest logits, and weighs
what each of them returns with a gate. Papers make the gates of the logits z (N, E) in three ways:

    softmax_then_topk          the softmax over all E experts, of the k that are kept
                               (DeepSeekMoE 2401.06066 eq. 4-5; Switch 2101.03961 for k = 1)
    softmax_then_topk_renorm   the same, divided by the sum over these k
                               (GShard 2006.16668 alg. 1, with k = 2)
    topk_then_softmax          the softmax over the k logits that are kept
                               (Shazeer 1701.06538 eq. 3; Mixtral 2401.04088 sec. 2.1)

Write all three. Then look at k = 1. The choice itself has no gradient: the router learns from the
text through its gates alone. Say which orders still teach it then.
"""
import torch

ORDERS = ("softmax_then_topk", "softmax_then_topk_renorm", "topk_then_softmax")


def gates(logits, k, order):
    """logits (N, E) -> gates (N, k), largest first, with their gradient to the logits, and ids
    (N, k), their experts. order: one of ORDERS. logits: float32 or bfloat16; gates are float32."""
    raise NotImplementedError("yours")


def learns_at_k_1():
    """The set of those ORDERS whose gate still has a gradient to the logits when k = 1."""
    raise NotImplementedError("yours")
