"""How much memory an imported model of 1.3 billion parameters takes: python -m lab.timing.hub.

A folder like those that are downloaded is generated (bfloat16, OLMoE's layers, random numbers), imported, and
opened and sampled. Each step is a process of its own, whose peak of resident memory Linux tells (VmHWM;
ru_maxrss would count the process that started it). Opening is compared with the size of the file: pages of it that are read count as memory.
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from runtime import shards
from runtime.config import Parser, parse
from runtime.ending import Ending
from runtime.files import write_text

ROOT = Path(__file__).parents[2]
OLMOE = dict(model_type="olmoe", hidden_size=1024, intermediate_size=1024, num_experts=24, num_experts_per_tok=4,
             num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=2048, norm_topk_prob=False,
             rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, vocab_size=50304)


def generate(folder, layers):
    """A folder of a random model; a layer is a shard. Returns its bytes."""
    d, w, E, V = (OLMOE[key] for key in ("hidden_size", "intermediate_size", "num_experts", "vocab_size"))
    parts = [{"model.embed_tokens.weight": (V, d), "lm_head.weight": (V, d), "model.norm.weight": (d,)}]
    for i in range(layers):
        at, attention = f"model.layers.{i}.", f"model.layers.{i}.self_attn."
        shapes = {f"{attention}{name}_proj.weight": (d, d) for name in "qkvo"}
        shapes |= {f"{attention}{name}_norm.weight": (d,) for name in "qk"}
        shapes |= {f"{at}{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
        shapes |= {f"{at}mlp.experts.{e}.{name}_proj.weight": (d, w) if name == "down" else (w, d)
                   for e in range(E) for name in ("gate", "up", "down")}
        parts.append(shapes | {f"{at}mlp.gate.weight": (E, d)})
    places = {}
    for i, shapes in enumerate(parts):
        file = f"model-{i + 1:05}-of-{len(parts):05}.safetensors"
        part = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) if len(shape) > 1 else
                torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        shards.needed().torch.save_file(part, folder / file)
        places |= dict.fromkeys(shapes, file)
    (folder / "config.json").write_text(json.dumps(OLMOE | dict(num_hidden_layers=layers)))
    (folder / shards.INDEX).write_text(json.dumps(dict(weight_map=places)))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def peak(*words):
    """(peak bytes, seconds, what it said) of a program of this repository in a process of its own."""
    code = ("import runpy, sys; sys.argv = sys.argv[1:]\n"
            "try: runpy.run_module(sys.argv[0], run_name='__main__')\n"
            "except SystemExit as e: assert not e.code, e.code\n"
            "print('PEAK', next(line for line in open('/proc/self/status') if 'VmHWM' in line).split()[1])")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    kilobytes = int(done.stdout.rpartition("PEAK")[2])
    return kilobytes * 1024, time.perf_counter() - start, done.stderr


def command(options):
    """Prints the table; returns its rows."""
    with tempfile.TemporaryDirectory(dir=options.dir) as place:
        folder, run = Path(place) / "folder", Path(place) / "run"
        folder.mkdir()
        size, rows = generate(folder, options.layers), []
        for name, words in [
                ("nothing but torch", ["torch.version"]), ("import", ["grow.hub", "import", folder, "--out", run]),
                ("sample, bfloat16, mapped", ["sample", run, "--tokens", 8, "--prompt", "1 2 3"]),
                ("sample, float32, copied", ["sample", run, "--tokens", 8, "--prompt", "1 2 3", "--dtype", "float32"])
                ][:4 if options.copied else 3]:
            bytes, seconds, said = peak(*words)
            rows.append(dict(step=name, peak=bytes, of_file=bytes / size, seconds=seconds,
                             said=said.strip().rpartition("\n")[2] if "sample" in name else ""))
    print(f"{size:,} bytes of weights, {size // 2:,} parameters")
    for row in rows:
        print(f"{row['step']:<26}{row['peak'] / 1e9:>8.2f} GB {row['of_file']:>6.2f} of the file "
              f"{row['seconds']:>7.1f} s  {row['said']}")
    if options.json:
        write_text(options.json, json.dumps(dict(size=size, rows=rows)))
    return rows


def main(argv=None):
    """The program; returns its exit status."""
    parser = Parser(prog="python -m lab.timing.hub", description=__doc__)
    parser.add_argument("--layers", type=int, default=15, help="15 are 1.3 billion parameters (default: 15)")
    parser.add_argument("--dir", help="where 5 GB have room for a while (default: the temporary folder)")
    parser.add_argument("--copied", action="store_true", help="the float32 copy, too")
    parser.add_argument("--json", metavar="FILE", help="write the rows")
    with Ending() as end:
        command(parse(parser, argv)[0])
    return end.status


if __name__ == "__main__":
    sys.exit(main())
