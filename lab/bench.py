"""Speed and memory beside the naive twins and the physical floor: `python -m lab.bench
moe|model|peer|mamba|parallel`.

    moe     one mixture-of-experts layer by every dispatch path, beside the dense one of equal FLOPs
    model   a training step of whole models of equal active FLOPs (this file)
    peer    a PEER layer: its experts by every path, its retrieval, and the whole
    mamba   the selective scan, and a training step of configs/jamba.toml beside its twins
    parallel  a MoE layer whose experts two CPU processes share, and the exchange of its rows

The memory that an imported model takes has a program of its own: python -m lab.timing.hub.

What each number means is in lab/timing/measure.py; what is compared stands above each bench's
tables.
"""
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lab.timing.exchange import bench_parallel
from lab.timing.mamba import SCAN_SHAPES, bench_scans
from lab.timing.measure import (INPUTS, Contestant, Table, ceiling_rows, find_machine,
                                machine_name, measure, print_table, skipped_row)
from lab.timing.moe import MOE_SHAPES, bench_moe
from lab.timing.peer import PEER_SHAPES, bench_peer
from model import GPT, load_config
from runtime.checkpoint import write_text
from runtime.config import Parser, parse
from runtime.ending import Ending
from runtime.device import precision
from settings import ConfigError
from train import build_optimizer

# ---- model: a training step ----

CONFIGS = Path(__file__).parent.parent / "configs"
GPT_124M = {"model.n_layer": 12, "model.n_head": 12, "model.n_embd": 768, "model.block_size": 1024,
            "model.vocab_size": 50304, "model.loss_chunks": 8, "train.batch_size": 64,
            "ffn.d_ff": 2048}
E2_M4 = {"ffn.n_expert": 8, "ffn.top_k": 2, "ffn.d_expert": 1024}
E2_M5 = {"ffn.n_expert": 64, "ffn.top_k": 7, "ffn.d_expert": 256, "ffn.n_shared": 1}
E3 = {"ffn.kind": "peer", "ffn.n_keys": 1024, "ffn.peer_heads": 8, "ffn.peer_top_k": 16,
      "ffn.d_key": 128}


def model_config(path=None, **settings):
    """Config of a file, or of settings alone; a model without a vocabulary gets that of bytes."""
    settings = {"model.vocab_size": 256} | settings
    return load_config(path, [(key, str(value)) for key, value in settings.items()])


def model_sets(device):
    """{title: {name: Config}}: each time a dense model (E1) and another of equal active FLOPs, or,
    with PEER, one whose other layers are the same."""
    if device == "cpu":
        arms = {"dense": CONFIGS / "dense.toml", "moe E8 k2": CONFIGS / "quick.toml"}
        return {f"quick.toml {size}": {name: model_config(path, **{"train.batch_size": size})
                                       for name, path in arms.items()} for size in (12, 32)}
    dense = model_config(**GPT_124M, **{"ffn.kind": "dense"})
    arms = {"E2 (M4)": ("moe E8 k2", E2_M4), "E2 (M5)": ("moe E64 k7+1", E2_M5),
            "E3": ("peer N1024^2", E3)}
    return {title: {"dense": dense, name: model_config(**GPT_124M, **own)}
            for title, (name, own) in arms.items()}


def training_step(machine, config, dtype):
    """A Contestant: forward, backward, clipping and AdamW as in train.py, on random tokens;
    compiled on CUDA."""
    torch.manual_seed(0)
    device, t = torch.device(machine.device), config.train
    model = GPT(config).to(device)
    forward = model
    if device.type == "cuda":
        forward = torch.compile(model, dynamic=False, fullgraph=True)
    optimizer = build_optimizer(model, t, device)
    shape = t.batch_size, config.model.block_size + 1
    batches = [torch.randint(config.model.vocab_size, shape, device=device) for _ in range(INPUTS)]
    done = torch.zeros((), device=device)

    def step(i):
        with precision(device, str(dtype).removeprefix("torch.")):
            out = forward(batches[i][:, :-1], batches[i][:, 1:], step=done)
        (out.loss + out.aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), t.grad_clip)
        optimizer.step()
        # last, so that the peak of a step counts its gradients
        optimizer.zero_grad()

    flops = 3 * t.batch_size * config.model.block_size * model.flops_per_token()
    return Contestant(step, flops, machine.compute_ms(flops, dtype))


def bench_steps(machine, shape, configs, dtype, bench="model"):
    """Rows of one table: ms of a training step; peak memory beyond parameters and AdamW's
    moments."""
    m, t = (getattr(next(iter(configs.values())), part) for part in ("model", "train"))
    tokens = 1e3 * t.batch_size * m.block_size
    speed = "tokens/s", lambda row: f"{tokens / row['ms']:,.0f}" if row["ms"] else "-"
    steps = {name: training_step(machine, config, dtype) for name, config in configs.items()}
    return print_table(measure(machine, bench, shape, dtype, "fwd+bwd", steps), speed)


def bench_model(machine, sets):
    """The Tables of the bench."""
    print("A training step (forward, backward, clipping, AdamW) of whole models, beside the dense "
          "one of\nequal active FLOPs; bfloat16 is autocast over float32 parameters.", flush=True)
    dtypes = (torch.float32, torch.bfloat16) if machine.device == "cpu" else (torch.bfloat16,)
    tables = []
    for title, configs in sets.items():
        m, t = configs["dense"].model, configs["dense"].train
        shape = f"{title} B{t.batch_size} T{m.block_size} L{m.n_layer} d{m.n_embd} V{m.vocab_size}"
        tables += [Table(shape, dtype, partial(bench_steps, machine, shape, configs, dtype))
                   for dtype in dtypes]
    return tables


# ---- mamba: the scan, and the model of Jamba ----

JAMBA = {"attention": {"model.mixer": "attention"}, "hybrid": {},
         "mamba": {"model.attention_every": 0}}


def bench_mamba(machine, shapes):
    """The Tables of the bench; on CUDA compiled, as every training step here."""
    configs = {name: model_config(CONFIGS / "jamba.toml", **own) for name, own in JAMBA.items()}
    dtype = torch.float32 if machine.device == "cpu" else torch.bfloat16
    shape = "jamba.toml, all attention and all Mamba beside it"
    return [*bench_scans(machine, shapes), Table(
        shape, dtype, partial(bench_steps, machine, shape, configs, dtype, "mamba"))]


# ---- the program ----

ROUNDS = {("cpu", "quick"): (1, 3), ("cpu", "full"): (2, 9),                   # warm-up, counted
          ("cuda", "quick"): (3, 10), ("cuda", "full"): (10, 30)}
# Seconds: of the rounds of one contestant, and of the whole.
LIMITS = {"quick": (1, 180), "full": (20, math.inf)}
# Seconds before that end after which no table is begun, and nothing more is called.
LAST_TABLE, LAST_CALL = 60, 20


def build_parser():
    parser = Parser(prog="python -m lab.bench", allow_abbrev=False,
                    description=__doc__.split("\n")[0])
    parser.add_argument("bench", choices=["moe", "model", "peer", "mamba", "parallel"],
                        help="one MoE layer, whole models, a PEER layer, the scan of Mamba, or a "
                        "MoE layer in two processes")
    parser.add_argument("--device", choices=["cpu", "cuda"],
                        default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to run (default: cuda if there is one, else cpu)")
    parser.add_argument("--shapes", choices=["quick", "full"], default="full",
                        help="quick: the two smallest shapes, few repeats, three minutes at most "
                        "(default: full)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there (default: only print)")
    return parser


def run(options):
    """Yields the rows of one call of the program, table by table, the ceilings first; prints
    them."""
    device, n, start = options.device, 2 if options.shapes == "quick" else None, time.perf_counter()
    budget, whole = LIMITS[options.shapes]
    warmup, repeats = ROUNDS[device, options.shapes]
    print(f"{machine_name(device)}; median of {repeats} interleaved rounds, or of as many as fit "
          f"into {budget} s each", flush=True)
    size = dict(size=8192, copy_mib=2048) if device == "cuda" else {}
    machine = find_machine(device, warmup, repeats, **size, budget=budget,
                           end=start + whole - LAST_CALL)
    products = ", ".join(f"{flops / 1e12:.3g} in {str(dtype)[6:]}"
                         for dtype, flops in machine.matmul.items())
    print(f"ceilings: matrix product {products} TFLOP/s; copy {machine.copy / 1e9:.3g} GB/s\n",
          flush=True)
    # Then the tables of the bench.
    if options.bench == "moe":
        tables = bench_moe(machine, MOE_SHAPES[device][:n])
    elif options.bench == "model":
        tables = bench_model(machine, dict(list(model_sets(device).items())[:n]))
    elif options.bench == "peer":
        tables = bench_peer(machine, PEER_SHAPES[device][:n])
    elif options.bench == "parallel":
        tables = bench_parallel(machine, MOE_SHAPES[device][:n])
    else:
        tables = bench_mamba(machine, SCAN_SHAPES[device][:n])
    yield ceiling_rows(options.bench, machine)
    for i, table in enumerate(tables):
        gone = time.perf_counter() - start
        print(f"\n[table {i + 1} of {len(tables)}; {time_left(gone, i, len(tables), whole)}]",
              flush=True)
        if machine.emulates(table.dtype):
            times = machine.matmul[torch.float32] / machine.matmul[table.dtype]
            why = f"not measured: emulated here, a product takes {times:.0f} times that of float32"
        elif gone > whole - LAST_TABLE:
            why = "not measured: the time is over"
        else:
            yield table.rows()
            continue
        yield print_table([skipped_row(options.bench, device, table, why)])


def time_left(gone, done, tables, whole):
    """How long a bench goes on, from the pace of the tables that are done."""
    left, word = max(0, whole - gone), "at most"
    if done and gone / done * (tables - done) < left:
        left, word = gone / done * (tables - done), "about"
    if left == math.inf:
        return "time left unknown yet"
    return f"{word} {int(left) // 60}:{int(left) % 60:02} left"


def keep(rows, path):
    """Writes the rows as JSON, a row per line; atomically, so that a stop leaves the tables before
    it. Raises CheckpointError."""
    write_text(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def main(argv=None):
    """Returns the exit status: 0 done, 1 a path is wrong, 2 a mistake in what was asked for."""
    with Ending() as end:
        options, _ = parse(build_parser(), argv)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
        if options.device == "cuda" and options.bench == "parallel":
            raise ConfigError("parallel measures processes on a CPU: use --device cpu")
        if options.json and (Path(options.json).is_dir() or not Path(options.json).parent.is_dir()):
            raise ConfigError(f"--json {options.json}: must be a file in a folder that exists")
        rows = []
        for table in run(options):
            rows += table
            if options.json:
                keep(rows, options.json)
    return end.status


if __name__ == "__main__":
    sys.exit(main())
