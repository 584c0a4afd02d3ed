"""Sort the pairs by expert, one grouped product, and home again.

lecture 3 · difficulty 3 of 5 · importance 5 of 5 · 35 minutes · 6 points

A routing is a list of P pairs: pair p says that token[p] goes to expert[p] and that its result is
weighed by weight[p]. The loop over experts (moe.dispatch_loop) runs one small product for each
expert and has to ask how many rows it will get. A grouped product does all of them at once, if the
rows of one expert lie next to each other:

    pair         0   1   2   3   4   5             expert        2  0  2  0  2  3      (E = 4)
    sorted by expert: pairs 1 3 | | 0 2 4 | 5      ends          2  2  5  6

1. `expert_order`: in which order the pairs stand then, and where each expert's rows end. Experts
   without a pair have an end as well: that of the expert before.
2. `sort_dispatch`: gather the rows, two grouped products with silu between them, weigh, and add
   each row to its token. With the experts' matrices W_in (E, w, d) and W_out (E, d, w) it is

       y_n = sum over the pairs p of token n of weight_p W_out[e] silu(W_in[e] x_n),   e = expert_p

A token may have k pairs, another number of them, or none, and in any order (where experts choose,
pairs come by expert): the same function serves them all.
"""
import torch
import torch.nn.functional as F


# given
def grouped(rows, matrices, ends):
    """rows (P, a) in the order of their experts, matrices (E, b, a), ends (E,) -> (P, b): each row
    by the matrix of its expert. What F.grouped_mm does in one kernel, as a loop to be read."""
    parts, start = [], 0
    for matrix, end in zip(matrices, ends.tolist()):
        parts.append(rows[start:end] @ matrix.T)
        start = end
    return torch.cat(parts)


def expert_order(expert, n_expert):
    """expert (P,) -> order (P,), the pair at each place when the pairs are sorted by expert, those
    of one expert in their old order; and ends (E,), how many places the experts up to e take."""
    raise NotImplementedError("yours")


def sort_dispatch(x, token, expert, weight, w_in, w_out, grouped=grouped):
    """x (N, d); token, expert, weight (P,); w_in (E, w, d), w_out (E, d, w) -> y (N, d), in their
    float dtype and with a gradient for each. Calls grouped(rows, matrices, ends) twice."""
    raise NotImplementedError("yours")
