"""How lab/bench.py measures: clocks, memory, ceilings, the check before any timing, and the table.

- Time. All arms of a comparison run in turn, round after round, so that a slow moment of the machine hits each
  of them; reported are the median of the rounds and the median of the ratios within a round. Three input sets
  take turns. CUDA: events on the stream, read after the last round. A round on a CPU is perf_counter.
- Peak memory: the most that was alive at once during a call beyond what was alive before it, so without weights
  and inputs, but with outputs and fresh gradients. CUDA: the allocator's own count. CPU: PyTorch's profiler
  notes every allocation of its allocator, operators' temporaries included; what MKL takes for itself is not seen.
- Saved memory: what autograd keeps from forward to backward, each storage once, parameters left out.
- Ceilings: the best matrix product and the best copy that this machine shows, not the ones on its data sheet.
"""
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Callable, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "6")      # the profiler greets on stderr; read when torch is imported

import torch  # noqa: E402

KEYS = ("bench", "device", "shape", "path", "dtype", "direction", "ms", "ratio_to_dense", "tflops", "ceiling_share",
        "peak_mib", "saved_mib")
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}     # relative norm of the error that a path may have
INPUTS = 3                                              # input sets that take turns


class BenchError(Exception):
    """A path whose numbers are wrong, so that its time means nothing."""


class Arm(NamedTuple):
    """One contestant: `run(i)` runs it once on input set i."""
    run: Callable
    flops: float = 0.0              # useful ones of a run: those of the mathematics, not of padding
    floor_ms: float | None = None   # what the run must take at the machine's ceiling
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
        if self.device == "cuda":
            return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        model = next((s.split(": ", 1)[1] for s in lines if s.startswith("model name")), platform.machine())
        return f"{model}, {torch.get_num_threads()} threads, torch {torch.__version__}"

    def compute_arm(self, run, flops, dtype, **more):
        """An Arm whose floor is the matrix product's."""
        return Arm(run, flops, flops / self.matmul[dtype] * 1e3, **more)


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
    for i in range(warmup + repeats):
        for name, run in runs.items():
            start = mark(device)
            run(i % INPUTS)
            marks[name].append((start, mark(device)))
    if device == "cuda":
        torch.cuda.synchronize()
    return {name: [milliseconds(*pair) for pair in pairs[warmup:]] for name, pairs in marks.items()}


def find_ceilings(device, warmup, repeats, size=2048, copy_mib=256):
    """A Machine with its ceilings: the best of five (size, size) products in each dtype, and of five copies that read
    and write copy_mib each."""
    def best(run):
        return min(interleave(device, {"": run}, 3, 20)[""]) / 1e3

    matmul = {}
    for dtype in LIMIT:
        a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        matmul[dtype] = 2 * size ** 3 / best(lambda i: torch.mm(a, b, out=out))
    source = torch.ones(copy_mib * 2 ** 18, device=device)
    target = torch.empty_like(source)
    return Machine(device, warmup, repeats, matmul, 2 * 4 * source.numel() / best(lambda i: target.copy_(source)))


# ---- memory ----


def peak_mib(device, run):
    """MiB of what run() allocates, at its highest."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2 ** 20
    with torch.autograd.profiler.profile(use_kineto=True, profile_memory=True) as profile:
        run()
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()                      # negative for what is given back
        peak = max(peak, live)
    return peak / 2 ** 20


def saved_mib(run, parameters=()):
    """MiB that autograd keeps for the backward pass of run(), which returns its output."""
    left_out, kept = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in left_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()                                   # alive to the end, and with it all that was kept
    total = sum(kept.values()) / 2 ** 20
    del y
    return total


# ---- correctness ----


def check(path, shape, names, got, want, dtype):
    """Raises BenchError for the first tensor of `got` whose error, relative to the norm of its twin in `want`,
    passes LIMIT."""
    for name, a, b in zip(names, got, want, strict=True):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        if not error <= LIMIT[dtype]:
            raise BenchError(f"{shape}, {str(dtype)[6:]}: path {path} is wrong: relative error {error:.1e} of its {name}, "
                             f"limit {LIMIT[dtype]:.0e}; nothing was timed")


# ---- rows ----


def measure(machine, bench, shape, dtype, direction, arms):
    """Rows, one for each of the arms {name: Arm}. A ratio is to the arm `dense`, of a compiled arm to
    `dense compiled`. An arm that does not fit into CUDA memory gets a row without a time."""
    peaks, device = {}, machine.device
    for name, arm in arms.items():
        try:
            peaks[name] = peak_mib(device, lambda: arm.run(0))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    times = interleave(device, {name: arms[name].run for name in peaks}, machine.warmup, machine.repeats)
    rows = []
    for name, arm in arms.items():
        ms, ratio = None, None
        if name in times:
            ms = statistics.median(times[name])
            dense = times.get("dense compiled" if name.endswith(" compiled") else "dense")
            ratio = dense and statistics.median(a / b for a, b in zip(times[name], dense))
        rows.append(make_row(bench, device, shape, name, dtype, direction, ms, ratio, arm, peaks.get(name)))
    return rows


def make_row(bench, device, shape, path, dtype, direction, ms, ratio, arm, peak):
    """A row: a dict with exactly KEYS, numbers to five digits."""
    tflops = arm.flops / ms / 1e9 if ms and arm.flops else None
    share = arm.floor_ms / ms if ms and arm.floor_ms else None
    numbers = (ms, ratio, tflops, share, peak, arm.saved_mib)
    return dict(zip(KEYS, (bench, device, str(shape), path, str(dtype).removeprefix("torch."), direction,
                           *(None if n is None else float(f"{n:.5g}") for n in numbers)), strict=True))


def ceiling_rows(bench, machine):
    """What ceiling_share is a share of; the shape column says on which machine."""
    rows = []
    for dtype, flops in machine.matmul.items():
        arm = Arm(None, 1e12, 1e15 / flops)                                     # per 10^12 FLOPs
        rows.append(make_row(bench, machine.device, f"10^12 FLOPs on {machine.name()}", "ceiling: matrix product", dtype,
                             "fwd", arm.floor_ms, None, arm, None))
    arm = Arm(None, 0, 2 ** 30 / machine.copy * 1e3)
    return rows + [make_row(bench, machine.device, f"1 GiB read and written on {machine.name()}", "ceiling: copy",
                            torch.float32, "fwd", arm.floor_ms, None, arm, None)]


COLUMNS = {"path": "path", "direction": "direction", "ms": "ms", "ratio_to_dense": "x dense", "tflops": "TFLOP/s",
           "ceiling_share": "% ceiling", "peak_mib": "peak MiB", "saved_mib": "saved MiB"}


def show_number(value, key):
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if key == "ceiling_share":
        return f"{100 * value:.0f}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if key == "tflops" else f"{value:.2f}"


def print_table(rows, extra=None):
    """Prints rows that share shape and dtype as an aligned table, and returns them; extra: (heading, row -> text) of
    one more column."""
    cells = [[*COLUMNS.values()]] + [[show_number(row[key], key) for key in COLUMNS] for row in rows]
    if extra:
        cells = [line + [extra[0] if i == 0 else extra[1](rows[i - 1])] for i, line in enumerate(cells)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print(f"\n{rows[0]['shape']}, {rows[0]['dtype']}")
    for line in cells:
        text = [cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))]
        print("  " + "  ".join(text).rstrip(), flush=True)
    return rows
