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
    # which block: programs that follow each other take the blocks of the same rows, left to right
    across = tl.cdiv(D, BLOCK_C)
    row = (tl.program_id(0) // across) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = (tl.program_id(0) % across) * BLOCK_C + tl.arange(0, BLOCK_C)
    # int64 before it is multiplied by a width: P d passes 2^31 in a real model
    row = row.to(tl.int64)
    # lanes past the last row and past the last column stay idle
    live = row < P
    mask = live[:, None] & (col < D)[None, :]                               # (BLOCK_R, BLOCK_C)
    # which token each place holds; lanes without a place read nothing
    token = tl.load(ORDER + row, mask=live, other=0).to(tl.int64) // K      # (BLOCK_R,)
    # a pointer is an address: row times width plus column
    x = tl.load(X + token[:, None] * D + col[None, :], mask=mask)
    tl.store(OUT + row[:, None] * D + col[None, :], x, mask=mask)


def permute(x, order, k, out, BLOCK_R=4, BLOCK_C=16):
    """x (N, d), order (P,) a permutation of the pairs, out (P, d) without gaps, to be filled.
    Launches permute_kernel on blocks of this size. x and order may be views with gaps."""
    # the kernel knows the shape and takes the elements to lie side by side
    x, order = x.contiguous(), order.contiguous()
    P, d = out.shape
    # rounded up in both directions: a part of a block is a block
    programs = triton.cdiv(P, BLOCK_R) * triton.cdiv(d, BLOCK_C)
    permute_kernel[(programs,)](x, order, out, P, k, d, BLOCK_R, BLOCK_C)


# ---- the check ----
from course.check import Wrong, ask  # noqa: E402
from kernels.common import HAS_TRITON, INTERPRETED  # noqa: E402
from kernels.moe import permute_torch  # noqa: E402

GUARD = 4096                            # elements before and behind each tensor
DEVICE = "cpu" if INTERPRETED else "cuda"


def why_not():
    """Why this exercise cannot be checked on this machine, or an empty text."""
    if not HAS_TRITON:
        return "cannot be checked here: Triton is not installed (it comes with torch on Linux)"
    if not INTERPRETED and not torch.cuda.is_available():
        return ("cannot be checked here: Triton was imported before TRITON_INTERPRET=1 was set, "
                "and there is no GPU; set it from the start of the program")
    return ""


def guarded(size, fill):
    """(tensor of this size, the memory around it), all of it filled."""
    numbers = 1
    for n in size:
        numbers *= n
    memory = torch.full((numbers + 2 * GUARD,), fill, device=DEVICE)
    return memory[GUARD:GUARD + numbers].view(size), memory


def check(mine):
    if why := why_not():
        raise Wrong(why)
    ask(hasattr(mine.permute_kernel, "__getitem__"), "permute_kernel is no kernel: leave "
        "@triton.jit above it")
    cases = ((6, 5, 1), (4, 16, 2), (7, 20, 3), (5, 33, 2))
    for seed, (N, d, k) in enumerate(cases):
        one_size(mine, N, d, k, seed)
    one_size(mine, 6, 20, 2, 5, blocks=(8, 32))
    one_size(mine, 6, 20, 2, 6, gaps=True)
    one_size(mine, 6, 20, 2, 7, dtype=torch.int32)



def one_size(mine, N, d, k, seed, blocks=(4, 16), gaps=False, dtype=torch.int64):
    P = N * k
    sizes = f"(N = {N}, d = {d}, k = {k}, blocks of {blocks[0]} x {blocks[1]})"
    random = torch.Generator().manual_seed(seed)
    # what may be read by mistake is -1, what is not written -2; rows of x hold 100 n + column
    x, _ = guarded((N, d * (1 + gaps)), -1.0)
    x = x[:, ::1 + gaps]
    x.copy_(100 * torch.arange(1, N + 1)[:, None] + torch.arange(d))
    order, _ = guarded((P,), 0)
    order.copy_(torch.randperm(P, generator=random))
    out, memory = guarded((P, d), -2.0)
    calls = launches(mine, x, order.to(dtype) if dtype != torch.int64 else order, k, out, blocks)
    ask(calls, "permute does not launch permute_kernel")
    outside = torch.cat([memory[:GUARD], memory[GUARD + P * d:]]) != -2
    behind = int(outside[GUARD:].sum())
    ask(not outside.any(), f"{int(outside.sum())} numbers outside of out were written, {behind} of "
        f"them behind its end {sizes}: mask the lanes whose row is not below P, and those whose "
        "column is not below d")
    compare(x, order.long(), k, out, sizes, gaps)


def launches(mine, x, order, k, out, blocks):
    """Calls permute; how often it launched the kernel, which runs as it is."""
    kernel, count = mine.permute_kernel, []

    class Counted:
        def __getitem__(self, grid):
            count.append(grid)
            return kernel[grid]

    mine.permute_kernel = Counted()
    try:
        mine.permute(x, order, k, out, *blocks)
    except Exception as error:
        # the interpreter wraps what the kernel raised
        raise error.__cause__ or error
    finally:
        mine.permute_kernel = kernel
    return len(count)


def compare(x, order, k, out, sizes, gaps):
    """Raises Wrong for what is often mistaken."""
    want = permute_torch(x, order, k)
    if torch.equal(out, want):
        return
    missing = out == -2
    for i, what in ((0, "row"), (1, "column")):
        lacks = missing.all(1 - i)
        ask(not lacks.any(), f"{what} {int(lacks.int().argmax())} of out was never written "
            f"{sizes}: blocks begin at multiples of BLOCK_{what[0].upper()}, and the number of "
            "them is rounded up")
    ask(not gaps, "a view x with gaps gives other rows: the kernel takes the elements to lie side "
        "by side, so call .contiguous() first")
    p = int((out != want).any(1).int().argmax())
    where = (f"out[{p}] is {out[p, 0]:g} ... {out[p, -1]:g}, and x[{int(order[p]) // k}] is "
             f"{want[p, 0]:g} ... {want[p, -1]:g} {sizes}")
    ask(not torch.equal(out, permute_torch(x, order.argsort(), k)), f"{where}: this is the way "
        "back, out[order[p]] = x[p // k]; gather, so that each program writes rows of its own")
    ask(not torch.equal(out, x.repeat_interleave(k, 0)), f"{where}: order is not used")
    ask((out != -1).all(), f"{where}: memory outside of x was read; order[p] is a pair, and its "
        "token is order[p] // k")
    raise Wrong(where)


WRONG = [
    ("other=0).to(tl.int64) // K ", "other=0).to(tl.int64) ", "its token is order[p] // k"),
    ("mask = live[:, None] & (col < D)[None, :]", "mask = live[:, None] & (col >= 0)[None, :]",
     "whose column is not below d"),
    ("mask = live[:, None] & (col < D)[None, :]", "mask = (row >= 0)[:, None] & (col < D)[None, :]",
     "whose row is not below P"),
    ("triton.cdiv(P, BLOCK_R) * triton", "P // BLOCK_R * triton", "was never written"),
    ("triton.cdiv(d, BLOCK_C)\n", "max(1, d // BLOCK_C)\n", "never written"),
    ("x, order = x.contiguous(), order.contiguous()", "order = order.contiguous()",
     "call .contiguous() first"),
    ("tl.load(X + token[:, None] * D + col[None, :], mask=mask)",
     "tl.load(X + (row // K)[:, None] * D + col[None, :], mask=mask)", "order is not used"),
    ("    x = tl.load(X + token[:, None] * D + col[None, :], mask=mask)\n"
     "    tl.store(OUT + row[:, None] * D + col[None, :], x, mask=mask)",
     "    x = tl.load(X + (row // K)[:, None] * D + col[None, :], mask=mask)\n"
     "    pair = tl.load(ORDER + row, mask=live, other=0)\n"
     "    tl.store(OUT + pair[:, None] * D + col[None, :], x, mask=mask)", "this is the way back"),
    ("permute_kernel[(programs,)](x, order, out, P, k, d, BLOCK_R, BLOCK_C)",
     "out.copy_(x[order // k])", "does not launch"),
    ("% across) * BLOCK_C", "% across)", "column 17 of out was never written"),
    ("col[None, :], x, mask=mask)", "col[None, :], x + 1, mask=mask)", "out[0] is 301 ... 305"),
]
