"""python -m lab.bench parallel: a MoE layer whose experts two processes share, on the CPU.

`one process` has all tokens, all experts and all threads. `two processes` have half of the tokens
and of the experts and one thread each. `exchange` is what of that goes into moving rows:
counts, rows and gates to their experts, results home, and the gradients of both. Bytes are those
that one process sends to the other.
"""
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from ffn import Context
from lab.timing.measure import MIB, Contestant, Table, make_row, print_table
from lab.timing.moe import build_moe
from runtime import parallel

PROCESSES = 2


def timed(run, machine):
    """Median milliseconds of run(), of rounds that all processes begin together."""
    found = []
    for i in range(machine.warmup + machine.repeats):
        if parallel.world() > 1:
            dist.barrier()
        start = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found[machine.warmup:])


def step_of(layer, x, backward):
    """run(): the layer forward, and backward where that is wanted."""
    ctx = Context(torch.zeros(x.shape[:2], dtype=torch.long))

    def run():
        y = layer(x, ctx)[0]
        if backward:
            torch.autograd.grad(y.sum(), (x, *layer.parameters()))
    return run


def exchange_of(layer, x, backward):
    """(run(), MiB to the other process): what of step_of's work is the moving of rows."""
    routing = layer.router(x.flatten(0, 1), None)
    order = torch.sort(routing.expert, stable=True).indices
    rows = x.detach().flatten(0, 1).index_select(0, routing.token.index_select(0, order))
    gate = routing.weight.detach().index_select(0, order)
    leaves = rows.requires_grad_(), gate.requires_grad_()

    def run():
        sent, came, _ = parallel.announce(routing.expert, layer.n_expert)
        there, gates = (parallel.exchange(t, sent, came) for t in leaves)
        home = parallel.exchange(there, came, sent)
        if backward:
            torch.autograd.grad(home.sum() + gates.sum(), leaves)

    # a row and its gate to the other process, a result back; the gradients go the other way
    sent, came, _ = parallel.announce(routing.expert, layer.n_expert)
    away, back = sent[1 - parallel.rank()], came[1 - parallel.rank()]
    row, gate = 4 * rows.shape[1], 4
    there, home = away * (row + gate) + back * row, back * (row + gate) + away * row
    return run, (8 * layer.n_expert // PROCESSES + there + backward * home) / MIB


def worker(rank, shape, machine, folder):
    """What one of the processes runs; the first one writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank,
                            world_size=PROCESSES)
    layer = build_moe(shape, torch.float32, "cpu").train()
    parallel.share_experts(layer, torch.device("cpu"))
    x = torch.randn(1, shape.T // PROCESSES, shape.d, generator=torch.Generator().manual_seed(rank))
    x.requires_grad_()
    found = {}
    for direction in ("fwd", "fwd+bwd"):
        backward = direction == "fwd+bwd"
        move, mib = exchange_of(layer, x, backward)
        found[direction] = timed(step_of(layer, x, backward), machine), timed(move, machine), mib
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)             # gloo's threads sometimes abort while they are taken down


def rows_of(machine, shape):
    """Rows of one table; the notes have the bytes."""
    layer, x = build_moe(shape, torch.float32, "cpu").train(), torch.randn(1, shape.T, shape.d)
    alone = {d: timed(step_of(layer, x.requires_grad_(), d == "fwd+bwd"), machine)
             for d in ("fwd", "fwd+bwd")}
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(worker, (shape, machine, folder), PROCESSES)
        found = json.loads((Path(folder) / "found.json").read_text())
    rows = []
    for direction, (both, moved, mib) in found.items():
        one = Contestant(None, shape.flops(direction))
        part = one._replace(flops=0.0)
        note = f"{mib:.3g} MiB to the other process, {mib / moved * 1e3:,.0f} MiB/s"
        rows += [make_row("parallel", "cpu", shape, path, torch.float32, direction, c, ms, note=text)
                 for path, c, ms, text in (("one process", one, alone[direction], None),
                                           ("two processes", one, both, None),
                                           ("exchange", part, moved, note))]
    return print_table(rows)


def bench_parallel(machine, shapes):
    """The Tables of the bench."""
    print("A MoE layer in one process, and in two that share its experts; and what of that is the\n"
          "exchange of rows between them.", flush=True)
    return [Table(str(shape), torch.float32, partial(rows_of, machine, shape)) for shape in shapes]
