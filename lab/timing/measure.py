"""How lab/bench.py measures: clocks, memory, ceilings, the check before any timing, and the table.

- Time. All contestants of a comparison run in turn, round after round, so that a slow moment of
  the machine hits each of them; reported are the median of the rounds and the median of the ratios
  within a round. Three input sets take turns. CUDA: events on the stream, read after the last
  round; 1 GiB of zeros is written before each run, which empties the L2 cache and lets the host get
  ahead, as it is in training.
- Forward is that of training: autograd records it.
- Peak memory: the most that was alive at once during a run beyond what was alive before it:
  without weights and inputs, with outputs and fresh gradients. CUDA: the allocator's own count.
  CPU: PyTorch's profiler notes every allocation, operators' temporaries included; what MKL takes
  for itself is not seen.
- Saved memory: what autograd keeps from forward to backward, each storage once, parameters left
  out.
- Ceilings: the best matrix product and the best copy that this machine shows, not the ones on its
  data sheet. A share above 100 % says that it was busy with something else while they were
  measured.
- Limits. After a first call, a contestant runs as many rounds as its budget of seconds allows, at
  least one. What could not be measured is a line of the table that says why.
- Another package's layer (Peer) has weights of its own, so that its numbers are not checked, and
  what it raises is a line of the table too.
"""
import math
import os
import platform
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

os.environ.setdefault("KINETO_LOG_LEVEL", "6")          # else the profiler greets on stderr

KEYS = ("bench", "device", "shape", "path", "dtype", "direction", "ms", "ratio_to_dense", "tflops",
        "ceiling_share", "peak_mib", "saved_mib", "note")
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}     # error that a path may have, see check
INPUTS = 3                                              # input sets that take turns
EMULATED = 8            # a product that takes as many times that of float32 is done in software
MIB = 2 ** 20


class BenchError(Exception):
    """A path whose numbers are wrong, so that its time means nothing."""
    status = 1


class Contestant(NamedTuple):
    """One path of a comparison."""
    run: Callable                   # run(i) does the work once, on input set i
    flops: float = 0.0              # useful ones of a run: those of the mathematics, not of padding
    floor_ms: float | None = None   # what a run takes at the machine's ceiling
    saved_mib: float | None = None
    peer: bool = False              # of another package: what it raises does not end the bench


class Table(NamedTuple):
    """A table that a bench can make."""
    title: str
    dtype: torch.dtype
    rows: Callable                  # rows() measures


class Machine(NamedTuple):
    """Where and how often things are run, and the ceilings found there."""
    device: str                     # cpu or cuda
    warmup: int
    repeats: int                    # rounds, at most
    matmul: dict                    # torch.dtype -> FLOP/s
    copy: float                     # bytes/s, read and written ones together
    budget: float = math.inf        # seconds of the rounds of one contestant
    end: float = math.inf           # the time.perf_counter() after which nothing more is measured

    def name(self):
        return machine_name(self.device)

    def emulates(self, dtype):
        """Whether it has no instructions for a dtype, as its slow products show."""
        return self.matmul[dtype] * EMULATED < self.matmul[torch.float32]

    def compute_ms(self, flops, dtype):
        """The floor of FLOPs: their time in the best matrix product."""
        return flops / self.matmul[dtype] * 1e3

    def copy_ms(self, n_bytes):
        """The floor of bytes: their time in the best copy."""
        return n_bytes / self.copy * 1e3


def machine_name(device):
    """Hardware, threads and PyTorch, for people."""
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return f"{device_name(device)}{threads}, torch {torch.__version__}"


def device_name(device):
    """The hardware behind a device, "cpu" or "cuda", for people."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


# ---- time ----

def mark(device):
    """A moment: seconds, or a CUDA event."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start, end):
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def first_call(device, run):
    """Seconds of run(0), which compiles and makes what is made only once."""
    start = time.perf_counter()
    run(0)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rounds_in(seconds, one, most):
    """How many runs that take `one` second each fit into so many seconds: 1 to `most`."""
    return max(1, min(most, int(seconds / max(one, 1e-9)))) if seconds < math.inf else most


def interleave(device, runs, warmup, repeats, rounds=None):
    """{name: [ms of each round]} of runs {name: run(i)}; rounds {name: n}: of those that take part
    in the first n rounds alone, in one without a warm-up."""
    marks, rounds = {name: [] for name in runs}, rounds or {}
    cushion = torch.empty(2 ** 28, device=device) if device == "cuda" else None
    # Every contestant once a round, so that a slow moment of the machine hits all.
    for i in range(warmup + repeats):
        for name, run in runs.items():
            n = rounds.get(name, repeats)
            if i >= warmup + n or i < warmup and n == 1 < repeats:
                continue
            if cushion is not None:
                cushion.zero_()
            start = mark(device)
            run(i % INPUTS)
            if i >= warmup:
                marks[name].append((start, mark(device)))
    if device == "cuda":
        torch.cuda.synchronize()
    return {name: [milliseconds(*pair) for pair in pairs] for name, pairs in marks.items()}


def find_machine(device, warmup, repeats, size=2048, copy_mib=256, **limits):
    """A Machine with its ceilings: the best of 20 (size, size) products in each dtype, and of 20
    copies that read copy_mib MiB and write as many; of fewer where 20 take more than 2 seconds, and
    of smaller products where one takes more than that. limits: its budget and end."""
    def best(run):
        n = rounds_in(2, first_call(device, run), 20)
        return min(interleave(device, {"": run}, min(n, 3), n)[""]) / 1e3

    def products(dtype, side):
        a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))

        def product(i):
            torch.mm(a, b, out=out)

        # one of twice the side takes eight times as long
        if side < size and min(first_call(device, product) for _ in range(2)) < 0.25:
            return products(dtype, min(size, 2 * side))
        return 2 * side ** 3 / best(product)

    # FLOP/s of the largest products that do not take long.
    matmul = {dtype: products(dtype, min(size, 256)) for dtype in LIMIT}
    # Bytes/s of the best copy.
    source = torch.ones(copy_mib * MIB // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * copy_mib * MIB / best(lambda i: target.copy_(source))
    return Machine(device, warmup, repeats, matmul, copy, **limits)


# ---- memory ----

def peak_mib(device, run):
    """MiB that run() allocates, at their highest."""
    # CUDA: the allocator keeps the count.
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    # CPU: add up the profiler's events in the order of time.
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()                          # negative for what is given back
        peak = max(peak, live)
    return peak / MIB


def if_it_fits(run):
    """run(), or None if the memory of the GPU does not suffice."""
    try:
        return run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def saved_mib(run, parameters=()):
    """MiB that autograd keeps for the backward pass of run(), which returns its output."""
    left_out = {p.untyped_storage().data_ptr() for p in parameters}
    kept = {}                                           # address of a storage -> its bytes

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        # holds all that was kept, so no address comes twice
        y = run()
    del y
    return sum(kept.values()) / MIB


# ---- correctness ----

def check(path, shape, names, got, want, dtype):
    """Raises BenchError for the first tensor of `got` that is further than LIMIT from its twin in
    `want`, by the norm of the difference over the norm of the twin."""
    for name, a, b in zip(names, got, want, strict=True):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        if not error <= LIMIT[dtype]:                   # NaN fails too
            raise BenchError(f"{shape}, {str(dtype)[6:]}: path {path} is wrong: its {name} has a "
                             f"relative error of {error:.1e}, above {LIMIT[dtype]:.0e}; the bench "
                             "stops here")


# ---- other packages ----

def version_of(package):
    """The version of a package that is installed, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Peer(nn.Module):
    """Another package's layer, (1, T, d) -> (1, T, d), called as ours are. What make() raises, it
    raises when it is called."""

    def __init__(self, make):
        super().__init__()
        self.layer = self.error = None
        try:
            self.layer = make()
        except Exception as e:          # whatever another package does, the bench goes on
            self.error = e

    def forward(self, x, ctx):
        if self.error:
            raise self.error
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y, None


# ---- rows ----

def prepare(machine, one):
    """(seconds of a call, peak MiB, note) of a Contestant; without seconds it cannot be timed,
    without a peak it was called once, and the note says why."""
    if time.perf_counter() > machine.end:
        return None, None, "not measured: the time is over"
    try:
        first = whole = first_call(machine.device, one.run)
        # what another package tries out in its first call is no part of its time
        if one.peer:
            first = min(first, first_call(machine.device, one.run))
        tuning = f"first call {whole:.0f} s" if whole > max(1, 10 * first) else None
        # memory is found in a second call, and timed in a third
        if time.perf_counter() + 2 * first > machine.end:
            return first, None, "one call, for the time is over"
        start = time.perf_counter()
        peak = peak_mib(machine.device, lambda: one.run(0))
        return min(first, time.perf_counter() - start), peak, tuning
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, None, "does not fit into memory"
    except Exception as e:
        if not one.peer:
            raise
        why = " ".join(f"{type(e).__name__}: {e}".split())
        return None, None, f"cannot run: {why[:90]}"


def measure(machine, bench, shape, dtype, direction, contestants):
    """Rows, one for each of {name: Contestant}. A ratio is to the contestant `dense`, of a compiled
    one to `dense compiled`."""
    # Memory first, which shows who can run and how long that takes; a bar where someone looks on.
    device, rows, ready = machine.device, [], {}
    for name, one in tqdm(contestants.items(), f"{shape} {direction}", leave=False, disable=None,
                          file=sys.stderr):
        ready[name] = prepare(machine, one)
    # Then the times: one call of what is slow, rounds of the others.
    times = {name: [1e3 * first] for name, (first, peak, _) in ready.items()
             if first is not None and peak is None}
    rounds = {name: rounds_in(machine.budget, first, machine.repeats)
              for name, (first, peak, _) in ready.items() if peak is not None}
    runs = {name: contestants[name].run for name in rounds}
    times |= interleave(device, runs, machine.warmup, machine.repeats, rounds)
    for name, one in contestants.items():
        ms = ratio = None
        if name in times:
            ms = statistics.median(times[name])
            dense = times.get("dense compiled" if name.endswith(" compiled") else "dense")
            if dense:
                ratio = statistics.median(a / b for a, b in zip(times[name], dense))
        _, peak, note = ready[name]
        rows.append(make_row(bench, device, shape, name, dtype, direction, one, ms, ratio, peak,
                             note))
    return rows


def skipped_row(bench, device, table, note):
    """The row of a Table that is not measured."""
    return make_row(bench, device, table.title, "all", table.dtype, "", Contestant(None), None,
                    note=note)


def make_row(bench, device, shape, path, dtype, direction, one, ms, ratio=None, peak=None,
             note=None):
    """A row of a Contestant: a dict with exactly KEYS, numbers to five digits."""
    tflops = one.flops / ms / 1e9 if ms and one.flops else None
    share = one.floor_ms / ms if ms and one.floor_ms else None
    names = bench, device, str(shape), path, str(dtype).removeprefix("torch."), direction
    numbers = ms, ratio, tflops, share, peak, one.saved_mib
    rounded = (None if n is None else float(f"{n:.5g}") for n in numbers)
    return dict(zip(KEYS, (*names, *rounded, note), strict=True))


def ceiling_rows(bench, machine):
    """What ceiling_share is a share of; the shape column says on which machine."""
    flops, n_bytes, where = 1e12, 2 ** 30, machine.name()
    ceilings = [(f"10^12 FLOPs on {where}", "ceiling: matrix product", dtype,
                 Contestant(None, flops, machine.compute_ms(flops, dtype)))
                for dtype in machine.matmul]
    ceilings.append((f"2^30 bytes, read or written, on {where}", "ceiling: copy", torch.float32,
                     Contestant(None, 0, machine.copy_ms(n_bytes))))
    return [make_row(bench, machine.device, shape, path, dtype, "fwd", one, one.floor_ms)
            for shape, path, dtype, one in ceilings]


COLUMNS = {"path": "path", "direction": "direction", "ms": "ms", "ratio_to_dense": "x dense",
           "tflops": "TFLOP/s", "ceiling_share": "% ceiling", "peak_mib": "peak MiB",
           "saved_mib": "saved MiB"}


def show(value, key):
    """A cell of the table."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if key == "ceiling_share":
        return f"{100 * value:.0f}"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if key == "tflops" else f"{value:.2f}"


def print_table(rows, extra=None):
    """Prints rows that share shape and dtype as an aligned table, their notes behind it, and
    returns them; extra: (heading, row -> text) of one more column."""
    lines = [list(COLUMNS.values())]
    lines += [[show(row[key], key) for key in COLUMNS] for row in rows]
    if extra:
        heading, text_of = extra
        for line, text in zip(lines, [heading, *map(text_of, rows)]):
            line.append(text)
    # Names to the left, numbers to the right.
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{rows[0]['shape']}, {rows[0]['dtype']}")
    for line, note in zip(lines, ["", *(row["note"] or "" for row in rows)]):
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w)
                 for i, (cell, w) in enumerate(zip(line, widths))]
        print("  " + "  ".join([*cells, note]).rstrip(), flush=True)
    return rows
