"""Part `bench` of lab/gpu.py: the tables of lab.bench, each a unit, the most telling ones first."""
import contextlib
import functools
import io
import json
import time
from functools import partial
from itertools import chain, zip_longest

import torch

import lab.bench as bench
from lab.drawing.style import BLUE, GREY, new_figure, save
from lab.timing.gpu_unit import CUDA, DEVICE, Unit
from lab.timing.measure import Machine, ceiling_rows, find_machine
from lab.timing.moe import MOE_SHAPES, MoEShape, bench_moe
from lab.timing.peer import PEER_SHAPES, PEERShape, bench_peer

SECONDS = 8             # of the rounds of one contestant
OVER = "the time is over"                               # in the note of a row that is not measured
TOY_MOE, TOY_PEER = MoEShape(32, 16, 4, 2, 8), PEERShape(8, 16, 2, 2, 32, d_key=8)
TOY_MODEL = {"model.n_layer": 1, "model.n_embd": 16, "model.n_head": 2, "model.block_size": 8,
             "train.batch_size": 2, "ffn.d_ff": 16}


@functools.cache
def this_machine(toy):
    """The Machine, its ceilings measured once in this process."""
    size = dict(size=64, copy_mib=1) if toy else dict(size=8192, copy_mib=2048)
    return find_machine(DEVICE, 1 if toy else 3, 2 if toy else 15, **size)


def tables_of(toy, machine):
    """{bench: Tables}; what the benches say before them is left out."""
    sets = bench.model_sets(DEVICE)
    moe_shapes, peer_shapes = MOE_SHAPES[DEVICE], PEER_SHAPES[DEVICE]
    if toy:
        moe_shapes, peer_shapes = [TOY_MOE], [TOY_PEER]
        sets = {"toy": {"dense": bench.model_config(**TOY_MODEL, **{"ffn.kind": "dense"}),
                        "moe": bench.model_config(**TOY_MODEL)}}
    with contextlib.redirect_stdout(io.StringIO()):
        found = dict(moe=bench_moe(machine, moe_shapes), model=bench.bench_model(machine, sets),
                     peer=bench_peer(machine, peer_shapes))
    if toy:
        return {name: [t for t in tables if t.dtype == torch.float32][-1:]
                for name, tables in found.items()}
    # What trains on a card is bfloat16, and a layer says more than its parts.
    order = lambda t: (t.dtype != torch.bfloat16, not t.title.endswith("layer"))      # noqa: E731
    found["peer"].sort(key=order)
    found["moe"].sort(key=lambda t: t.dtype != torch.bfloat16)
    return found


def ceilings(toy, end):
    return ceiling_rows("all", this_machine(toy))


def measure_table(toy, name, place, end):
    """Rows of the table at one place of a bench; not finished where the time did not suffice."""
    left = end - time.time()
    machine = this_machine(toy)._replace(budget=SECONDS, end=time.perf_counter() + left - 5)
    try:
        rows = tables_of(toy, machine)[name][place].rows()
        return [row | dict(held=None) if OVER in (row["note"] or "") else row for row in rows]
    finally:
        if CUDA:
            torch.cuda.empty_cache()


def units(toy, place):
    listed = tables_of(toy, Machine(DEVICE, 1, 1, {}, 1.0))
    each = [[Unit(f"{name} {t.title} {str(t.dtype)[6:]}", partial(measure_table, toy, name, i),
                  least=45, limit=200) for i, t in enumerate(tables)]
            for name, tables in listed.items()]
    # The first table of each bench, then the second of each, ...
    turns = chain.from_iterable(zip_longest(*each))
    return [Unit("ceilings", partial(ceilings, toy), least=30), *filter(None, turns)]


def draw(rows_path, path):
    """A bar for each contestant: how many times the dense twin's time a forward and backward pass
    takes."""
    rows = [row for row in json.loads(rows_path.read_text(encoding="utf-8"))
            if row["ratio_to_dense"] and row["direction"] == "fwd+bwd" and row["path"] != "dense"]
    if not rows:
        return
    names = [f"{row['bench']} {row['shape']}: {row['path']}, {row['dtype']}" for row in rows]
    figure = new_figure(12, 2 + 0.3 * len(rows), "Time of forward and backward, dense twin = 1",
                        f"{rows[-1]['card']}, torch {rows[-1]['torch']}, {rows[-1]['commit']}")
    ax = figure.subplots()
    ax.barh(names[::-1], [row["ratio_to_dense"] for row in rows[::-1]], color=BLUE)
    ax.axvline(1, color=GREY)
    ax.tick_params(axis="y", labelsize=8)
    save(figure, path)
