"""How fast a config trains when it has the machine to itself, and in how much memory:

    python -m lab.papers.speed CONFIG.toml --json FILE [--steps 20] [--section.key VALUE ...]

tokens_per_second: the median step, forward, backward and optimizer together, after the first
quarter of them; batches are read within it. peak_mib: CUDA: the most that the allocator held at
once. CPU: the largest resident size of the process, which counts Python and PyTorch themselves
(about 300 MiB); empty on Windows, which does not tell.
"""
import argparse
import json
import statistics
import sys
import time

import torch

try:
    import resource
except ImportError:                     # Windows
    resource = None

from data.batches import token_counts
from model import check, load_config
from runtime import checkpoint
from runtime.config import Parser, add_settings, parse
from runtime.ending import Ending, tell
from runtime.device import resolve_device, resolve_dtype, speed_up
from runtime.start import make_ready
from train import Trainer


def measure(config, steps):
    """dict(tokens_per_second, peak_mib) of a config. Raises ConfigError, DataError,
    CheckpointError."""
    # The Trainer that train.py would make, compiled where it would be.
    config, _, folders, tokenizer = make_ready(config, None, True, check)
    device = resolve_device(config.train.device)
    config.train.dtype, _ = resolve_dtype(config.train.dtype, device)
    trainer = Trainer(config, folders, tokenizer, device)
    trainer.model.set_token_counts(token_counts(folders, config.model.vocab_size))
    speed_up(trainer, tell)
    # Whole steps; on CUDA a step ends when the device has done its work.
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        trainer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    tokens = config.train.batch_size * config.model.block_size
    return dict(tokens_per_second=tokens / statistics.median(times[steps // 4:]),
                peak_mib=peak_mib(device))


def peak_mib(device):
    """MiB, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024          # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def main(argv=None):
    """The program; returns its exit status."""
    parser = Parser(prog="python -m lab.papers.speed", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.toml")
    parser.add_argument("--json", required=True, metavar="FILE", help="where the numbers go")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="default: %(default)s")
    add_settings(parser)
    with Ending() as end:
        options, overrides = parse(parser, argv)
        result = measure(load_config(options.config, overrides), options.steps)
        checkpoint.write_text(options.json, json.dumps(result))
        peak = "memory unknown" if result["peak_mib"] is None else f"{result['peak_mib']:,.0f} MiB"
        print(f"{result['tokens_per_second']:,.0f} tokens/s, {peak}")
    return end.status


if __name__ == "__main__":
    sys.exit(main())
