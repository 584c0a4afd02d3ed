"""How fast a config trains when it has the machine to itself, and in how much memory:

    python -m lab.papers.speed CONFIG.toml --json FILE [--steps 20] [--section.key VALUE ...]

tokens_per_second: the median step, forward, backward and optimizer together, after the first quarter of them;
batches are read within it. peak_mib: CUDA: the most that the allocator held at once. CPU: the largest
resident size of the process, which counts Python and PyTorch themselves (about 300 MiB).
"""
import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from runtime import checkpoint
from runtime.config import ConfigError, Parser, add_settings, fail, load_config, parse
from data.batches import token_counts
from data.binfile import DataError
from train import Trainer, compile_or_say, make_ready, resolve_device


def measure(config, steps):
    """dict(tokens_per_second, peak_mib) of a config. Raises ConfigError, DataError, CheckpointError."""
    with tempfile.TemporaryDirectory() as folder:
        config, _, folders, tokenizer, compiled, _ = make_ready(config, Path(folder), None, quiet=True)
    device = resolve_device(config.train.device)
    trainer = Trainer(config, folders, tokenizer, device)
    trainer.model.set_token_counts(token_counts(folders, config.model.vocab_size))
    if compiled:
        compile_or_say(trainer, lambda text: print(text, file=sys.stderr))
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        trainer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    tokens = config.train.batch_size * config.model.block_size
    return dict(tokens_per_second=tokens / statistics.median(times[steps // 4:]), peak_mib=peak_mib(device))


def peak_mib(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
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
    try:
        options, overrides = parse(parser, argv)
        result = measure(load_config(options.config, overrides), options.steps)
        checkpoint.write_text(options.json, json.dumps(result))
    except (ConfigError, DataError, checkpoint.CheckpointError, KeyboardInterrupt) as e:
        return fail(e)
    print(f"{result['tokens_per_second']:,.0f} tokens/s, {result['peak_mib']:,.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
