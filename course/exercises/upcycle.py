"""Upcycling: a dense model becomes a sparse one.

lecture 5 · difficulty 3 of 5 · importance 4 of 5 · 40 minutes · 6 points

A trained dense model need not be thrown away. Sparse upcycling (Komatsuzaki 2022, 2212.05055)
copies its feed-forward layers, all or some of them, into E experts each, takes over all other
weights, and draws a router. If a token's gates sum to 1, the copies give the dense layer's output,
whichever experts the router picks:

    y = sum of g_i FFN(x) = FFN(x)

So the first step starts from the dense model's predictions, with a KL divergence of 0 nats. Not
all gates sum to 1. This repository has three orders, ffn.gate_order, and a factor ffn.route_scale
on the gates:

    topk_then_softmax           the softmax over the k logits that are kept
    softmax_then_topk           the softmax over all E, of which k are kept
    softmax_then_topk_renorm    the same, divided by their sum

Qwen2 (2407.10671, sec. 2.2.2) makes many narrow experts instead. It copies the layer, shuffles the
hidden units of each copy, and cuts the copies into experts of width w. (Then it draws half of all
numbers anew; you need not.) A layer is a sum over its hidden units, so their order means nothing,
and the experts of one copy, all at gate 1, add up to the layer:

    FFN(x) = sum over units u of w_out[:, u] act(w_in[u] x)         a unit: a row and a column

Here h is the hidden width of the dense layer (not a number of heads), w that of a narrow expert.
SwiGLU has two rows for each unit, stacked: w_in (2 h, d) holds all h gate rows, then all h up rows.

It matters because a mistake here does not stop a run. It starts from a worse model, and nobody
sees why; a KL of 0 at step 0 is the test that finds it.
"""
import torch


@torch.no_grad()
def upcycle(dense, moe):
    """Gives moe, in place, what makes it the upcycled dense; dense stays as it is. Both are GPTs of
    this repository with parameters of the same names and shapes, but for the layers that are sparse
    in moe, where

    dense   blocks.0.ffn.mlp.w_in.weight (h or 2 h, d)      blocks.0.ffn.mlp.w_out.weight (d, h)
    moe     blocks.0.ffn.experts.w_in (E, h or 2 h, d)      blocks.0.ffn.experts.w_out (E, d, h)
            blocks.0.ffn.router.score.weight (E, d), drawn already"""
    raise NotImplementedError("yours")


def route_scale(gate_order, E, k):
    """(scale, exact) of a layer upcycled to E copies of which a token visits k.

    scale: the factor on the gates with which they sum to 1 while all logits are equal, as they
    nearly are at step 0. exact: whether they then sum to 1 whatever the logits are."""
    raise NotImplementedError("yours")


def cut_and_shuffle(w_in, w_out, E, w, generator):
    """Qwen2's experts of a layer w_in (h or 2 h, d), w_out (d, h): new tensors (E, w or 2 w, d) and
    (E, d, w). From as many copies as E w units take, each shuffled anew by draws from generator.
    Expert 0 gets the first units of the first copy; nobody gets what the last copy has left."""
    raise NotImplementedError("yours")
