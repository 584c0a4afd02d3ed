"""Bytes that autograd keeps from forward to backward, for each token and layer:

    python -m lab.timing.saved [--json results/saved-bytes.json]

Feed-forward layers of a 124M model (d 768) of equal active width, router and retrieval included;
parameters are left out, and so is what does not grow with the tokens. The input of the layer counts
where it is kept. No GPU is needed: the path fused runs in Triton's interpreter, with the choices
that CUDA makes, and what it keeps is the same there. bfloat16 is autocast.

The file: {"d", "torch", "rows": [{"layer", "path", "dtype", "bytes"}]}, a row for each line of the
table.
"""
import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")      # read when triton is imported

import json
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

from ffn import Context
from kernels import parts, product_keys
from kernels.common import HAS_TRITON, use_triton
from lab.timing.measure import MIB, saved_mib
from model import build_ffn, load_config
from runtime.config import Parser, parse
from runtime.ending import Ending
from runtime.files import write_text

D = 768
# what is kept does not depend on the size of PEER's table
PEER = {"ffn.kind": "peer", "ffn.n_keys": 32, "ffn.peer_heads": 8, "ffn.peer_top_k": 16,
        "ffn.d_key": 128}
LAYERS = {
    "dense, d_ff 2048": ({"ffn.kind": "dense", "ffn.d_ff": 2048}, None),
    "mixture, E 8, k 2, w 1024": (
        {"ffn.kind": "moe", "ffn.n_expert": 8, "ffn.top_k": 2, "ffn.d_expert": 1024},
        "ffn.dispatch"),
    "fine-grained, E 64, k 8, w 256": (
        {"ffn.kind": "moe", "ffn.n_expert": 64, "ffn.top_k": 8, "ffn.d_expert": 256},
        "ffn.dispatch"),
    "PEER, h 8, k 16": (PEER, "ffn.peer_path")}
PATHS = {None: ["-"], "ffn.dispatch": ["loop", "grouped", "fused"],
         "ffn.peer_path": ["readable", "lean", "fused"]}
DTYPES = torch.float32, torch.bfloat16


def build(settings, key, path):
    """The layer, in the only block of a model."""
    base = {"model.n_layer": 1, "model.n_embd": D, "model.vocab_size": 256}
    more = {key: path} if key else {}
    torch.manual_seed(0)
    return build_ffn(load_config(None, list((base | settings | more).items())), 0)


def as_on_cuda(path, dtype):
    """A context in which the interpreter takes what CUDA takes for this path."""
    stack = ExitStack()
    if path == "fused":
        stack.enter_context(mock.patch.object(product_keys, "fuses", use_triton))
        by_parts = lambda x, weight: x.dtype == torch.bfloat16               # noqa: E731
        stack.enter_context(mock.patch.object(parts, "pays_by_parts", by_parts))
    stack.enter_context(torch.autocast("cpu", dtype, enabled=dtype != torch.float32))
    return stack


def kept(layer, path, dtype, T):
    """Bytes kept for T tokens."""
    x = torch.randn(1, T, D).requires_grad_()
    ctx = Context(torch.zeros(1, T, dtype=torch.long))
    with as_on_cuda(path, dtype):
        return saved_mib(lambda: layer(x, ctx)[0], layer.parameters()) * MIB


def rows_of(name, T=16):
    """Rows of a layer, by path and dtype: what T more tokens add, divided by T."""
    settings, key = LAYERS[name]
    rows = []
    for path in PATHS[key]:
        if path == "fused" and not HAS_TRITON:
            continue
        layer = build(settings, key, path)
        for dtype in DTYPES:
            added = kept(layer, path, dtype, 2 * T) - kept(layer, path, dtype, T)
            rows.append(dict(layer=name, path=path, dtype=str(dtype)[6:], bytes=round(added / T)))
    return rows


def main(argv=None):
    with Ending() as end:
        parser = Parser(prog="python -m lab.timing.saved", description=__doc__.split("\n")[0])
        parser.add_argument("--json", metavar="FILE", help="also write the rows there")
        options, _ = parse(parser, argv)
        rows = [row for name in LAYERS for row in rows_of(name)]
        print(f"{'layer':31} {'path':9} {'dtype':9} bytes a token")
        for row in rows:
            print(f"{row['layer']:31} {row['path']:9} {row['dtype']:9} {row['bytes']:>13,}")
        if options.json:
            found = dict(d=D, torch=torch.__version__, rows=rows)
            write_text(Path(options.json), json.dumps(found, indent=1) + "\n")
    return end.status


if __name__ == "__main__":
    sys.exit(main())
