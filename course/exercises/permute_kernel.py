"""Rows into expert order, as a Triton kernel.

lecture 3 · difficulty 4 of 5 · importance 3 of 5 · 50 minutes · 6 points

Before a grouped product can run, the tokens have to lie in the order of their experts:

    out[p] = x[order[p] // k]        x (N, d), order (P,), out (P, d), P = N k

order[p] is the pair at place p, and pair q belongs to token q // k. This moves bytes and computes
nothing, so that all that counts is to read and to write long stretches, once. A Triton kernel is a
program that runs many times at once, each time with another program_id, on a block of elements:

             d = 5 columns                     blocks of BLOCK_R = 4 rows, BLOCK_C = 4 columns
        +---------+---+ . .                    program 0 copies the upper left block, program 1
        |    0    | 1 |                        the upper right one, and so on
        |         |   |     P = 6 rows
        |         |   |                        lanes outside of out (the dots) must not be written:
        +---------+---+ . .                    behind the last row lies somebody else's memory, and
        |    2    | 3 |                        behind the last column the next row
        +---------+---+ . .
        .         .   .

Write the kernel and the function that launches it. Without a GPU, Triton's interpreter runs the
kernel on the CPU, one program after another: slow, and a good place for print. The house's own one
is in kernels/moe.py; look at it afterwards.
"""
import os

import torch

# read once, when triton is first imported
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
from kernels.common import tl, triton  # noqa: E402


@triton.jit
def permute_kernel(X, ORDER, OUT, P, K: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr,
                   BLOCK_C: tl.constexpr):
    """One block (BLOCK_R rows, BLOCK_C columns, powers of 2) of OUT. X, ORDER and OUT point to the
    first element of x (N, D), order (P,), int32 or int64, and out (P, D), each without gaps."""
    raise NotImplementedError("yours")


def permute(x, order, k, out, BLOCK_R=4, BLOCK_C=16):
    """x (N, d), order (P,) a permutation of the pairs, out (P, d) without gaps, to be filled.
    Launches permute_kernel on blocks of this size. x and order may be views with gaps."""
    raise NotImplementedError("yours")
