"""python -m lab.bench peer: expert paths and retrieval of a PEER layer apart, then whole layers.

Gradient buffers are kept, on every side: a pass adds to the .grad that is there, as all steps but
the first do in a run that keeps them. Where PEER-pytorch is installed (pip install PEER-pytorch),
its layer runs too, with weights of its own and with competing scores: its default takes one expert
per head, 8 rows of each table in place of 128.
"""
import copy
import dataclasses
from functools import partial
from typing import NamedTuple

import torch

from ffn import MLP, Context
from kernels.common import HAS_TRITON
from kernels.peer import GatheredExperts
from kernels.product_keys import RetrieveFused, TopKLean, fuses
from lab.timing.measure import (INPUTS, Contestant, Peer, Table, check, if_it_fits, make_row,
                                measure, print_table, saved_mib, version_of)
from model import load_config
from peer import PEER, experts_readable, retrieve, topk_readable

# tokens that correctness is checked on: the oracle holds their rows in float64
CHECKED = 256


class PEERShape(NamedTuple):
    """m^2 experts; T tokens of width d; h heads that retrieve k experts each by a query of width
    d_key."""
    m: int
    d: int
    h: int
    k: int
    T: int
    d_key: int = 128
    label: str = ""                 # P1 to P3

    def __str__(self):
        return f"{self.label} N{self.m}^2 T{self.T} d{self.d} h{self.h} k{self.k}".strip()

    def chosen_bytes(self, dtype):
        """Size of the chosen rows of both tables. A forward pass must read as much; forward and
        backward move three times as much: they read the rows again and write as many numbers of
        gradient."""
        return self.T * self.h * self.k * 2 * self.d * dtype.itemsize


# The first two are `--shapes quick`.
PEER_SHAPES = dict(
    cpu=[PEERShape(64, 128, 4, 8, 1024, d_key=64), PEERShape(128, 256, 8, 16, 1024),
         PEERShape(1024, 256, 8, 16, 1024)],
    cuda=[PEERShape(1024, 256, 8, 16, 16384, label="P1"),
          PEERShape(1024, 512, 8, 16, 16384, label="P2"),
          PEERShape(1024, 1024, 8, 16, 16384, label="P3"),
          PEERShape(1024, 512, 8, 16, 65536, label="P2")])


def build_peer(shape, dtype, device):
    settings = {"model.n_embd": shape.d, "ffn.kind": "peer", "ffn.n_keys": shape.m,
                "ffn.peer_heads": shape.h,
                "ffn.peer_top_k": shape.k, "ffn.d_key": shape.d_key}
    config = load_config(None, [(key, str(value)) for key, value in settings.items()])
    torch.manual_seed(0)
    with torch.device(device):
        layer = PEER(config.ffn, shape.d, n_layer=config.model.n_layer)
    layer.table.data = layer.table.data.to(dtype)
    return layer


def rows_of(machine, title, dtype, contestants, leaves):
    """Rows of {name: Contestant}, forward and forward+backward. A contestant's run is the forward
    pass, which returns the output; forward and backward count as three times its work. Gradients
    are added to kept ones of the leaves; that of the output is the output itself."""
    def both(forward, i):
        y = forward(i)
        y.backward(y.detach())

    for t in leaves:
        t.grad = torch.zeros_like(t)
    rows = measure(machine, "peer", title, dtype, "fwd", contestants)
    whole = {name: one._replace(run=partial(both, one.run), flops=3 * one.flops,
                                floor_ms=3 * one.floor_ms)
             for name, one in contestants.items()}
    rows += measure(machine, "peer", title, dtype, "fwd+bwd", whole)
    return rows


# ---- the experts alone ----

def draw_experts(shape, spread, device):
    """(T, R) int32: uniform, or Zipf(1): the expert of rank r with probability ~ 1/r, ranks at
    random."""
    N, pairs = shape.m ** 2, (shape.T, shape.h * shape.k)
    if spread == "uniform":
        return torch.randint(N, pairs, device=device, dtype=torch.int32)
    # density 1 / rank on [1, N]
    rank = N ** torch.rand(pairs, device=device, dtype=torch.float64)
    return torch.randperm(N, device=device)[rank.long().clamp_(1, N) - 1].int()


def paths_of(dtype, device):
    """{name: path(x, table, idx, gate)}, the best last. A model's tables are float32; on bfloat16
    ones only the kernels run, which sum in float32. The others add gradient to gradient in
    bfloat16: a relative error of 0.035 after 256 tokens of Zipf."""
    def readable(x, table, idx, gate):
        return experts_readable(x, table, idx, gate, "gelu")

    def gathered(path, x, table, idx, gate):
        return GatheredExperts.apply(x, table, idx, gate, "gelu", path)

    paths = {}
    if dtype == torch.float32:
        paths |= {"readable": readable, "lean": partial(gathered, "lean")}
    if dtype == torch.float32 and device == "cuda":
        paths["readable compiled"] = torch.compile(readable, dynamic=False)
    if device == "cuda" and HAS_TRITON:
        paths["fused"] = partial(gathered, "fused")
    return paths


def check_experts(shape, dtype, paths, table, x, idx, gate):
    """Every path, on the whole table, against the readable one in float64 on the chosen rows. No
    other row may get a gradient."""
    names = "output", "gradient of x", "gradient of the gates", "gradient of the table"
    dy, (chosen, place) = torch.randn_like(x), idx.long().unique(return_inverse=True)
    leaves = [t.detach().double().requires_grad_()
              for t in (x, gate, table.index_select(0, chosen))]
    y = experts_readable(leaves[0], leaves[2], place, leaves[1], "gelu")
    want = [y, *torch.autograd.grad(y, leaves, dy.double())]
    for name, path in paths.items():
        table.grad, (x, gate) = None, (t.detach().requires_grad_() for t in (x, gate))
        y = path(x, table, idx, gate)
        y.backward(dy)
        rows = table.grad.index_select(0, chosen)
        if table.grad.index_fill_(0, chosen, 0).count_nonzero():
            rows = rows * torch.nan                     # fails the check under its name
        check(name, shape, names, [y, x.grad, gate.grad, rows], want, dtype)


def bench_experts(machine, shape, dtype, spread):
    """Rows of the expert paths on given experts and gates, after the floor. BenchError if a path
    is wrong."""
    device, table = machine.device, build_peer(shape, dtype, machine.device).table
    N, R = shape.T, shape.h * shape.k                   # tokens, rows of each
    xs = [torch.randn(N, shape.d, device=device).to(dtype).requires_grad_() for _ in range(INPUTS)]
    gates = [torch.rand(N, R, device=device).div_(shape.k).requires_grad_() for _ in range(INPUTS)]
    experts = [draw_experts(shape, spread, device) for _ in range(INPUTS)]
    # Every path is right before it is timed.
    paths = paths_of(dtype, device)
    check_experts(shape, dtype, paths, table,
                  *(t[0].detach()[:CHECKED] for t in (xs, experts, gates)))

    def forward(path, i):
        return path(xs[i], table, experts[i], gates[i])

    title, floor = f"{shape} experts alone, {spread}", machine.copy_ms(shape.chosen_bytes(dtype))
    # x . u and the sum of v: a multiply-add per number
    flops = 4 * N * R * shape.d
    saved = {name: if_it_fits(lambda: saved_mib(lambda: forward(path, 0), [table]))
             for name, path in paths.items()}
    contestants = {name: Contestant(partial(forward, path), flops, floor, saved[name])
                   for name, path in paths.items()}
    floors = [make_row("peer", device, title, "floor", dtype, direction, Contestant(None, 0, ms),
                       ms)
              for direction, ms in (("fwd", floor), ("fwd+bwd", 3 * floor))]
    return print_table(floors + rows_of(machine, title, dtype, contestants, [table, *xs, *gates]))


# ---- retrieval alone, whole layers ----

def draw_inputs(shape, dtype, device):
    return [torch.randn(1, shape.T, shape.d, device=device).to(dtype).requires_grad_()
            for _ in range(INPUTS)]


def bench_retrieval(machine, shape):
    """Rows of retrieval, queries included, always float32: with all scores at once, or as the paths
    lean and fused have it, on CUDA in one launch."""
    dtype = torch.float32
    layer = build_peer(shape, dtype, machine.device)
    xs = draw_inputs(shape, dtype, machine.device)

    def forward(topk, i):
        # (T, h, 2, d_key / 2)
        queries = layer.queries(xs[i][0])
        # (T, h, k)
        if topk is not topk_readable and fuses(queries):
            return RetrieveFused.apply(queries, layer.sub_keys, shape.k)[0]
        return retrieve(queries, layer.sub_keys, shape.k, layer.candidates, topk)[0]

    c = layer.config
    per_head = 2 * shape.d * c.d_key + 2 * c.n_keys * c.d_key + layer.candidates.shape[1]
    flops = shape.T * c.peer_heads * per_head
    paths = {"readable": topk_readable, "lean, fused": TopKLean.apply}
    scores = [forward(topk, 0) for topk in paths.values()]
    check("lean, fused", shape, ["scores"], scores[1:], scores[:1], dtype)
    contestants = {name: Contestant(partial(forward, topk), flops, machine.compute_ms(flops, dtype))
                   for name, topk in paths.items()}
    return print_table(rows_of(machine, f"{shape} retrieval alone", dtype, contestants,
                               [*xs, *layer.parameters()]))


def peer_pytorch(shape, dtype, device):
    """PEER-pytorch's layer of this shape."""
    import PEER_pytorch
    layer = PEER_pytorch.PEER(shape.d, heads=shape.h, num_experts=shape.m ** 2,
                              num_experts_per_head=shape.k,
                              dim_key=shape.d_key // 2, non_competing_scores=False)
    return layer.to(device, dtype)


def bench_layer(machine, shape, dtype):
    """Rows of whole layers: the dense twin of equal FLOPs, our paths, and PEER-pytorch. TFLOP/s
    count what ours needs."""
    device = machine.device
    layer, xs = build_peer(shape, dtype, device), draw_inputs(shape, dtype, device)
    flops = layer.flops_per_token() * shape.T
    ctx = Context(torch.zeros(1, shape.T, dtype=torch.long, device=device))
    width = max(8, round(layer.flops_per_token() / (2 * 3 * shape.d * 8)) * 8)
    # The dense twin, then a layer for each path on the same weights.
    modules = {"dense": MLP(shape.d, width, "swiglu").to(device, dtype)}
    for path in [path for path in paths_of(dtype, device) if "compiled" not in path]:
        modules[path] = copy.copy(layer)
        modules[path].config = dataclasses.replace(layer.config, peer_path=path)
    # PEER-pytorch, where it is installed.
    if version := version_of("PEER-pytorch"):
        theirs = partial(peer_pytorch, shape, dtype, device)
        modules[f"PEER-pytorch {version}"] = Peer(theirs)

    def forward(module, i):
        return module(xs[i]) if isinstance(module, MLP) else module(xs[i], ctx)[0]

    floor = machine.copy_ms(shape.chosen_bytes(dtype))
    contestants = {name: Contestant(partial(forward, m), flops, floor, peer=isinstance(m, Peer))
                   for name, m in modules.items()}
    contestants["dense"] = contestants["dense"]._replace(floor_ms=machine.compute_ms(flops, dtype))
    leaves = {p for module in modules.values() for p in module.parameters()}
    rows = print_table(rows_of(machine, f"{shape} layer", dtype, contestants, [*xs, *leaves]))
    compare(rows, [name for name, one in contestants.items() if one.peer])
    return rows


def compare(rows, peers):
    """Prints what our best path needs beside the readable one and the peers."""
    both = {row["path"]: row for row in rows if row["direction"] == "fwd+bwd" and row["peak_mib"]}
    ours = [row for path, row in both.items() if path in ("readable", "lean", "fused")][-1:]
    for path in ["readable", *peers] if ours else []:
        if path in both and path != ours[0]["path"]:
            time, peak = (ours[0][key] / both[path][key] for key in ("ms", "peak_mib"))
            print(f"  fwd+bwd: {ours[0]['path']} takes {time:.2f} of the time of {path}, "
                  f"{peak:.3f} of its peak")


def bench_peer(machine, shapes):
    """The Tables of the bench."""
    print("A PEER layer in parts: its experts alone by each path, beside the floor, the time in "
          "which a\ncopy moves as many bytes as the chosen rows hold; retrieval alone; whole "
          "layers, beside the\ndense one of equal FLOPs. Peak: beyond tables and their gradients. "
          "Before it is timed, every\npath of the experts is checked against float64: output and "
          "all gradients.", flush=True)
    dtypes = [torch.float32]
    if machine.device == "cuda" and HAS_TRITON:
        dtypes.append(torch.bfloat16)
    tables = []
    for shape in shapes:
        for dtype in dtypes:
            # The experts alone, retrieval alone, the whole layer.
            tables += [Table(f"{shape} experts alone, {spread}", dtype,
                             partial(bench_experts, machine, shape, dtype, spread))
                       for spread in ("uniform", "zipf")]
            if dtype == torch.float32:
                tables.append(Table(f"{shape} retrieval alone", dtype,
                                    partial(bench_retrieval, machine, shape)))
            tables.append(Table(f"{shape} layer", dtype,
                                partial(bench_layer, machine, shape, dtype)))
    return tables
