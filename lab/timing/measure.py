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
"""
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "6")          # else the profiler greets on stderr

KEYS = ("bench", "device", "shape", "path", "dtype", "direction", "ms", "ratio_to_dense", "tflops",
        "ceiling_share", "peak_mib", "saved_mib")
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}     # error that a path may have, see check
INPUTS = 3                                              # input sets that take turns
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


class Machine(NamedTuple):
    """Where and how often things are run, and the ceilings found there."""
    device: str                     # cpu or cuda
    warmup: int
    repeats: int
    matmul: dict                    # torch.dtype -> FLOP/s
    copy: float                     # bytes/s, read and written ones together

    def name(self):
        """Hardware, threads and PyTorch, for people."""
        threads = f", {torch.get_num_threads()} threads" if self.device == "cpu" else ""
        return f"{device_name(self.device)}{threads}, torch {torch.__version__}"

    def compute_ms(self, flops, dtype):
        """The floor of FLOPs: their time in the best matrix product."""
        return flops / self.matmul[dtype] * 1e3

    def copy_ms(self, n_bytes):
        """The floor of bytes: their time in the best copy."""
        return n_bytes / self.copy * 1e3


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


def interleave(device, runs, warmup, repeats):
    """{name: [ms of each round]} of runs {name: run(i)}."""
    marks = {name: [] for name in runs}
    cushion = torch.empty(2 ** 28, device=device) if device == "cuda" else None
    # Every contestant once a round, so that a slow moment of the machine hits all.
    for i in range(warmup + repeats):
        for name, run in runs.items():
            if cushion is not None:
                cushion.zero_()
            start = mark(device)
            run(i % INPUTS)
            marks[name].append((start, mark(device)))
    if device == "cuda":
        torch.cuda.synchronize()
    return {name: [milliseconds(*pair) for pair in pairs[warmup:]] for name, pairs in marks.items()}


def find_machine(device, warmup, repeats, size=2048, copy_mib=256):
    """A Machine with its ceilings: the best of 20 (size, size) products in each dtype, and of 20
    copies that read copy_mib MiB and write as many."""
    def best(run):
        return min(interleave(device, {"": run}, 3, 20)[""]) / 1e3

    # FLOP/s of the best matrix product in each dtype.
    matmul = {}
    for dtype in LIMIT:
        a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        matmul[dtype] = 2 * size ** 3 / best(lambda i: torch.mm(a, b, out=out))
    # Bytes/s of the best copy.
    source = torch.ones(copy_mib * MIB // 4, device=device)
    target = torch.empty_like(source)
    return Machine(device, warmup, repeats, matmul,
                   2 * copy_mib * MIB / best(lambda i: target.copy_(source)))


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


# ---- rows ----

def measure(machine, bench, shape, dtype, direction, contestants):
    """Rows, one for each of {name: Contestant}. A ratio is to the contestant `dense`, of a compiled
    one to `dense compiled`. One that does not fit into CUDA memory gets a row without a time."""
    def peak(one):
        one.run(0)                                      # compiles, and makes what is made only once
        return peak_mib(device, lambda: one.run(0))

    # Memory first, which shows who fits; then the times of those.
    device, rows = machine.device, []
    peaks = {name: if_it_fits(lambda: peak(one)) for name, one in contestants.items()}
    runs = {name: one.run for name, one in contestants.items() if peaks[name] is not None}
    times = interleave(device, runs, machine.warmup, machine.repeats)
    for name, one in contestants.items():
        ms = ratio = None
        if name in times:
            ms = statistics.median(times[name])
            dense = times.get("dense compiled" if name.endswith(" compiled") else "dense")
            if dense:
                ratio = statistics.median(a / b for a, b in zip(times[name], dense))
        rows.append(make_row(bench, device, shape, name, dtype, direction, one, ms, ratio,
                             peaks[name]))
    return rows


def make_row(bench, device, shape, path, dtype, direction, one, ms, ratio=None, peak=None):
    """A row of a Contestant: a dict with exactly KEYS, numbers to five digits."""
    tflops = one.flops / ms / 1e9 if ms and one.flops else None
    share = one.floor_ms / ms if ms and one.floor_ms else None
    names = bench, device, str(shape), path, str(dtype).removeprefix("torch."), direction
    numbers = ms, ratio, tflops, share, peak, one.saved_mib
    rounded = (None if n is None else float(f"{n:.5g}") for n in numbers)
    return dict(zip(KEYS, (*names, *rounded), strict=True))


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
    """Prints rows that share shape and dtype as an aligned table, and returns them; extra:
    (heading, row -> text) of one more column."""
    lines = [list(COLUMNS.values())]
    lines += [[show(row[key], key) for key in COLUMNS] for row in rows]
    if extra:
        heading, text_of = extra
        for line, text in zip(lines, [heading, *map(text_of, rows)]):
            line.append(text)
    # Names to the left, numbers to the right.
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(f"\n{rows[0]['shape']}, {rows[0]['dtype']}")
    for line in lines:
        cells = [cell.ljust(w) if i < 2 else cell.rjust(w)
                 for i, (cell, w) in enumerate(zip(line, widths))]
        print("  " + "  ".join(cells).rstrip(), flush=True)
    return rows
