"""Speed and memory beside the naive twins and the physical floor: `python -m lab.bench moe|model|peer`.

    moe     one mixture-of-experts layer, by every dispatch path, beside the dense layer of equal active FLOPs
    model   a training step of whole models of equal active FLOPs (this file)
    peer    a PEER layer: its experts by every path, its retrieval, and the whole

What each number means is in lab/measure.py; what is compared stands above each bench's tables.
"""
import json
import sys
from pathlib import Path

from lab.measure import INPUTS, BenchError, ceiling_rows, find_ceilings, measure, print_table   # before torch

import torch
from torch import nn

from config import ConfigError, Parser, fail, load_config, parse
from lab.bench_moe import MOE_SHAPES, bench_moe
from lab.bench_peer import PEER_SHAPES, bench_peer
from model import GPT
from train import build_optimizer, precision

# ---- model: a training step ----

CONFIGS = Path(__file__).parent.parent / "configs"
GPT_124M = {"model.n_layer": 12, "model.n_head": 12, "model.n_embd": 768, "model.block_size": 1024,
            "model.vocab_size": 50304, "model.loss_chunks": 8, "train.batch_size": 64, "ffn.d_ff": 2048}


def model_config(path, settings):
    """Config of a model from a file, or from settings alone, with the vocabulary of bytes where none is given."""
    return load_config(path, [(key, str(value)) for key, value in ({"model.vocab_size": 256} | settings).items()])


def model_sets(device):
    """[{arm: Config}]: models of equal active FLOPs, the first of each set dense."""
    if device == "cpu":
        return [{"dense": model_config(CONFIGS / "dense.toml", {}), "moe E8 k2 n256": model_config(CONFIGS / "quick.toml", {})}]
    arms = {"moe E8 k2 n1024": {"ffn.n_expert": 8, "ffn.top_k": 2, "ffn.d_expert": 1024},
            "moe E64 k7+1 n256": {"ffn.n_expert": 64, "ffn.top_k": 7, "ffn.d_expert": 256, "ffn.n_shared": 1},
            "peer N1048576": {"ffn.kind": "peer", "ffn.n_keys": 1024, "ffn.peer_heads": 8, "ffn.peer_top_k": 16,
                              "ffn.d_key": 128, "ffn.moe_layers": 6}}
    dense = model_config(None, GPT_124M | {"ffn.kind": "dense"})
    return [{"dense": dense, name: model_config(None, GPT_124M | settings)} for name, settings in arms.items()]


def training_step(config, dtype, device):
    """(step(i), FLOPs): forward, backward and AdamW as train.py does them, on random tokens, compiled on CUDA."""
    torch.manual_seed(0)
    model, c = GPT(config).to(device), config
    forward = torch.compile(model, dynamic=False) if device == "cuda" else model
    optimizer = build_optimizer(model, c.train, torch.device(device))
    B, T = c.train.batch_size, c.model.block_size
    batches = [torch.randint(c.model.vocab_size, (B, T + 1), device=device) for _ in range(INPUTS)]
    done = torch.zeros((), device=device)

    def step(i):
        optimizer.zero_grad()
        with precision(torch.device(device), str(dtype).removeprefix("torch.")):
            out = forward(batches[i][:, :-1], batches[i][:, 1:], step=done)
        (out.loss + out.aux_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), c.train.grad_clip)
        optimizer.step()

    return step, 3 * B * T * model.flops_per_token()


def bench_model(machine, sets):
    """Yields the rows of one table at a time: ms of a training step."""
    print("A training step (forward, backward, clipping, AdamW; bfloat16 is autocast over float32 parameters) of whole\n"
          "models, beside the dense one of equal active FLOPs.")
    for arms in sets:
        m, t = arms["dense"].model, arms["dense"].train
        shape = f"B{t.batch_size} T{m.block_size} L{m.n_layer} d{m.n_embd} V{m.vocab_size}"
        for dtype in (torch.float32, torch.bfloat16) if machine.device == "cpu" else (torch.bfloat16,):
            steps = {name: machine.compute_arm(*training_step(config, dtype, machine.device), dtype)
                     for name, config in arms.items()}
            rows = measure(machine, "model", shape, dtype, "fwd+bwd", steps)
            tokens = t.batch_size * m.block_size
            yield print_table(rows, ("tokens/s", lambda row: f"{1e3 * tokens / row['ms']:,.0f}" if row["ms"] else "-"))


# ---- the program ----

def build_parser():
    parser = Parser(prog="python -m lab.bench", allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("bench", choices=["moe", "model", "peer"], help="one MoE layer, whole models, or a PEER layer")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where to run (default: cuda if there is one, else cpu)")
    parser.add_argument("--shapes", choices=["quick", "full"], default="full",
                        help="quick: the two smallest shapes, few repeats (default: full)")
    parser.add_argument("--json", metavar="FILE", help="write the rows there (default: only print)")
    return parser


ROUNDS = {("cpu", "quick"): (1, 5), ("cpu", "full"): (2, 9), ("cuda", "quick"): (3, 10), ("cuda", "full"): (10, 30)}


def run(options):
    """All rows of one call of the program, ceilings first, printed table by table."""
    device, n = options.device, 2 if options.shapes == "quick" else None
    size = dict(size=8192, copy_mib=2048) if device == "cuda" else {}
    machine = find_ceilings(device, *ROUNDS[device, options.shapes], **size)
    print(f"{machine.name()}\nceilings: " + ", ".join(
        f"matrix product {flops / 1e12:.3g} TFLOP/s in {str(dtype)[6:]}" for dtype, flops in machine.matmul.items())
        + f"; copy {machine.copy / 1e9:.0f} GB/s\nmedian of {machine.repeats} interleaved rounds\n")
    if options.bench == "moe":
        tables = bench_moe(machine, MOE_SHAPES[device][:n])
    elif options.bench == "model":
        tables = bench_model(machine, model_sets(device)[:n])
    else:
        tables = bench_peer(machine, PEER_SHAPES[device][:n])
    return ceiling_rows(options.bench, machine) + [row for rows in tables for row in rows]


def main(argv=None):
    """Returns the exit status: 0 done, 1 a path is wrong, 2 a mistake in what was asked for."""
    try:
        options, _ = parse(build_parser(), argv)
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
        if options.json and not Path(options.json).parent.is_dir():
            raise ConfigError(f"--json {options.json}: the folder {Path(options.json).parent} does not exist")
        rows = run(options)
    except ConfigError as e:
        return fail(e)
    except BenchError as e:
        fail(e)
        return 1
    if options.json:
        Path(options.json).write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
