"""python -m lab.bench mamba: the selective scan of one layer, as the loop that is read and as it
is trained with.

    loop            mamba.scan_loop: autograd gives each x[:, t] a gradient as long as the text
    loop, unbound   the same, its positions taken apart once, which spares that
    scan            kernels/mamba.py
"""
from functools import partial
from typing import NamedTuple

import torch

import mamba
from lab.timing.measure import INPUTS, Contestant, Table, check, measure, print_table, saved_mib


class ScanShape(NamedTuple):
    """B sequences of T positions; c channels with states of n numbers."""
    B: int
    T: int
    c: int
    n: int

    def __str__(self):
        return f"B{self.B} T{self.T} c{self.c} n{self.n}"

    def flops(self, direction):
        """Six for each number of each state, as Mamba.flops_per_token counts; backward twice."""
        return 6 * self.B * self.T * self.c * self.n * (3 if direction == "fwd+bwd" else 1)


# The first ones are `--shapes quick`: the layer of configs/jamba.toml, and one with half the state.
SCAN_SHAPES = dict(cpu=[ScanShape(12, 256, 256, 16), ScanShape(12, 256, 256, 8),
                        ScanShape(4, 256, 256, 16), ScanShape(2, 1024, 256, 16)],
                   cuda=[ScanShape(8, 1024, 1536, 16), ScanShape(8, 4096, 1536, 16)])


def inputs(shape, device):
    """What a scan gets at the start of a training, requiring gradients; and the gradient of y."""
    B, T, c, n = shape
    delta = torch.empty(B, T, c, device=device).uniform_(-7, -2).exp()
    rate = -torch.arange(1.0, n + 1, device=device).unsqueeze(1).repeat(1, c)
    x, dy = torch.randn(2, B, T, c, device=device)
    write, read = torch.randn(2, B, T, n, device=device)
    leaves = [t.requires_grad_() for t in (x, delta, rate, write, read)]
    return [*leaves, torch.zeros(B, n, c, device=device)], dy


def loop_unbound(x, delta, rate, write, read, h):
    """scan_loop with unbind."""
    ys = []
    for x, delta, write, read in zip(*(t.unbind(1) for t in (x, delta, write, read))):
        decay = torch.exp(delta.unsqueeze(1) * rate)
        h = decay * h + write.unsqueeze(2) * (delta * x).unsqueeze(1)
        ys.append((read.unsqueeze(2) * h).sum(1))
    return torch.stack(ys, 1), h


def results(path, tensors, dy):
    """y and all gradients."""
    y = path(*tensors)[0]
    return [y, *torch.autograd.grad(y, tensors[:5], dy)]


def bench_shape(machine, shape, paths):
    """Rows of one table. BenchError if the scan is not the loop."""
    torch.manual_seed(0)
    sets = [inputs(shape, machine.device) for _ in range(INPUTS)]
    tensors, dy = sets[0]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    names = ["y", *(f"gradient of {name}" for name in ("x", "delta", "rate", "write", "read"))]
    want = results(mamba.scan_loop, wide, dy.double())
    for name, path in paths.items():
        check(name, shape, names, results(path, tensors, dy), want, torch.float32)
    rows = []
    saved = {name: saved_mib(lambda: path(*tensors)[0]) for name, path in paths.items()}
    for direction, run in (("fwd", lambda path, i: path(*sets[i][0])),
                           ("fwd+bwd", lambda path, i: results(path, *sets[i]))):
        flops = shape.flops(direction)
        contestants = {name: Contestant(partial(run, path), flops, None, saved[name])
                       for name, path in paths.items()}
        rows += measure(machine, "mamba", shape, torch.float32, direction, contestants)
    return print_table(rows, ("times the loop's speed", partial(speed_up, rows)))


def speed_up(rows, row):
    """The loop's time over that of a row."""
    (loop,) = (r["ms"] for r in rows if r["path"] == "loop" and r["direction"] == row["direction"])
    return f"{loop / row['ms']:.1f}" if loop and row["ms"] else "-"


def bench_scans(machine, shapes):
    """The Tables of the bench."""
    print("The selective scan of a Mamba layer in float32, as a loop over positions and in chunks. "
          "Before they\nare timed, they are checked against the loop in float64.", flush=True)
    paths = {"loop": mamba.scan_loop, "loop, unbound": loop_unbound, "scan": mamba.scan}
    return [Table(str(shape), torch.float32, partial(bench_shape, machine, shape, paths))
            for shape in shapes]
