"""python -m lab.bench peer: retrieval and expert paths of a PEER layer apart, then the whole layer beside others.

Gradient buffers are kept, on every side: a pass adds to the .grad that is there, as in every step but the first of a
run that keeps them. Whole layers are also run by PEER-pytorch (pip install PEER-pytorch) where it is importable, with
its competing scores: its default takes one expert per head, 8 rows of each table in place of 128.
"""
import copy
import dataclasses
from typing import Callable, NamedTuple

import torch

from config import load_config
from kernels import HAS_TRITON
from lab.measure import INPUTS, Arm, check, make_row, measure, print_table
from moe import MLP
from peer import PEER, GatheredExperts, TopKLean, experts_readable, retrieve, topk_readable
from routers import Context

CHECKED = 256           # tokens that correctness is checked on: the oracle holds their rows in float64


class PEERShape(NamedTuple):
    """A layer of m^2 experts: T tokens of width d, h heads that retrieve k experts each by queries of width d_key."""
    m: int
    d: int
    h: int
    k: int
    T: int
    d_key: int = 128
    id: str = ""                    # of PERFORMANCE.md

    def __str__(self):
        return f"{self.id} N{self.m}^2 T{self.T} d{self.d} h{self.h} k{self.k}".strip()

    def floor_bytes(self, dtype):
        """What a forward pass must read: the chosen rows of both tables. Backward must read them again, and write as
        many numbers of their gradient: both directions together take three times this."""
        return self.T * self.h * self.k * 2 * self.d * dtype.itemsize


# The first two are `--shapes quick`.
PEER_SHAPES = dict(
    cpu=[PEERShape(64, 128, 4, 8, 1024, 64), PEERShape(128, 256, 8, 16, 1024), PEERShape(1024, 256, 8, 16, 1024)],
    cuda=[PEERShape(1024, 256, 8, 16, 16384, id="P1"), PEERShape(1024, 512, 8, 16, 16384, id="P2"),
          PEERShape(1024, 1024, 8, 16, 16384, id="P3"), PEERShape(1024, 512, 8, 16, 65536, id="P2")])


def build_peer(shape, dtype, device):
    settings = {"model.n_embd": shape.d, "ffn.kind": "peer", "ffn.n_keys": shape.m, "ffn.peer_heads": shape.h,
                "ffn.peer_top_k": shape.k, "ffn.d_key": shape.d_key}
    config = load_config(None, [(key, str(value)) for key, value in settings.items()])
    torch.manual_seed(0)
    with torch.device(device):
        layer = PEER(config.ffn, shape.d, config.model.n_layer)
    layer.table.data = layer.table.data.to(dtype)
    return layer


def draw_experts(shape, spread, device):
    """Experts (T, R) int32: uniform, or Zipf(1): expert of rank r, in an order of no meaning, with probability ~ 1/r."""
    N, pairs = shape.m ** 2, (shape.T, shape.h * shape.k)
    if spread == "uniform":
        return torch.randint(N, pairs, device=device, dtype=torch.int32)
    rank = torch.rand(pairs, device=device, dtype=torch.float64).mul_(torch.tensor(float(N)).log()).exp_().long() - 1
    return torch.randperm(N, device=device)[rank.clamp_(max=N - 1)].int()


def expert_paths(dtype, device):
    """{name: path(x, table, idx, gate)}. The tables of a model are float32; in bfloat16, readable and lean need the
    gates rounded as well, the kernels do not."""
    def readable(x, table, idx, gate):
        return experts_readable(x, table, idx, gate.to(dtype), "gelu")

    def lean(x, table, idx, gate):
        return GatheredExperts.apply(x, table, idx, gate.to(dtype), "gelu", "lean")

    def fused(x, table, idx, gate):
        return GatheredExperts.apply(x, table, idx, gate, "gelu", "fused")

    paths = dict(readable=readable, lean=lean)
    if device == "cuda":
        paths["readable compiled"] = torch.compile(readable, dynamic=False)
    return paths | (dict(fused=fused) if device == "cuda" and HAS_TRITON else {})


def check_experts(shape, dtype, paths, table, x, idx, gate):
    """Every path on the whole table against the readable one in float64 on the rows that are chosen; no other row may
    get a gradient."""
    names = "output", "gradient of input", "gradient of gates", "gradient of chosen rows"
    dy = torch.randn_like(x)
    chosen, place = idx.unique(return_inverse=True)
    leaves = [t.detach().double().requires_grad_() for t in (x, gate, table.index_select(0, chosen))]
    y = experts_readable(leaves[0], leaves[2], place, leaves[1], "gelu")
    want = [y, *torch.autograd.grad(y, leaves, dy.double())]
    for name, path in paths.items():
        table.grad, (a, b) = None, (t.detach().requires_grad_() for t in (x, gate))
        y = path(a, table, idx, b)
        y.backward(dy)
        rows = table.grad.index_select(0, chosen)
        if table.grad.index_fill_(0, chosen.long(), 0).count_nonzero():
            rows = rows + torch.nan                                     # fails the check, by its name
        check(name, shape, names, [y, a.grad, b.grad, rows], want, dtype)


class Contestant(NamedTuple):
    forward: Callable               # forward(i) -> output, on input set i
    flops: float                    # of the forward pass
    floor_ms: float                 # of the forward pass


def both_ways(machine, title, dtype, contestants, leaves):
    """Rows of the contestants {name: Contestant}, forward and forward+backward, which takes three times the FLOPs and
    the floor. Gradients are added to the kept ones of the leaves."""
    for t in leaves:
        t.grad = torch.zeros_like(t)
    rows = []
    for direction, factor in ("fwd", 1), ("fwd+bwd", 3):
        arms = {}
        for name, c in contestants.items():
            dy = torch.randn_like(c.forward(0))
            run = c.forward if factor == 1 else lambda i, c=c, dy=dy: c.forward(i).backward(dy)
            arms[name] = Arm(run, c.flops * factor, c.floor_ms * factor)
        rows += measure(machine, "peer", title, dtype, direction, arms)
    return rows


def bench_experts(machine, shape, dtype, layer, spread):
    """Rows of the expert paths alone, on given experts and gates, after the floor."""
    device, table, pairs = machine.device, layer.table, (shape.T, shape.h * shape.k)
    sets = [(torch.randn(shape.T, shape.d, device=device).to(dtype).requires_grad_(), draw_experts(shape, spread, device),
             torch.rand(pairs, device=device).div_(shape.k).requires_grad_()) for _ in range(INPUTS)]
    paths = expert_paths(dtype, device)
    check_experts(shape, dtype, paths, table, *(t.detach()[:CHECKED] for t in sets[0]))
    title, floor = f"{shape} experts alone, {spread}", shape.floor_bytes(dtype) / machine.copy * 1e3
    flops = 4 * shape.d * pairs[0] * pairs[1]                   # x . u and the sum of v: a multiply-add per number
    rows = [make_row("peer", device, title, "floor", dtype, direction, ms, None, Arm(None, 0, ms), None)
            for direction, ms in (("fwd", floor), ("fwd+bwd", 3 * floor))]
    contestants = {name: Contestant(lambda i, path=path: path(sets[i][0], table, *sets[i][1:]), flops, floor)
                   for name, path in paths.items()}
    leaves = [table, *(t for x, _, gate in sets for t in (x, gate))]
    return rows + both_ways(machine, title, dtype, contestants, leaves)


def bench_retrieval(machine, shape, dtype, layer, xs):
    """Rows of retrieval alone, queries included, always float32: materialised scores, and in slices or by the kernel."""
    c = layer.config
    flops = shape.T * c.peer_heads * (2 * shape.d * c.d_key + 2 * c.n_keys * c.d_key + layer.candidates.shape[1])
    floor = flops / machine.matmul[torch.float32] * 1e3
    contestants = {name: Contestant(lambda i, topk=topk: retrieve(layer.queries(xs[i][0]), layer.sub_keys, shape.k,
                                                                  layer.candidates, topk)[0], flops, floor)
                   for name, topk in (("readable", topk_readable), ("lean, fused", TopKLean.apply))}
    return both_ways(machine, f"{shape} retrieval alone", dtype, contestants, [*xs, *layer.parameters()])


def their_layer(shape):
    """PEER-pytorch's layer of this shape, or None without the package."""
    try:
        from PEER_pytorch import PEER as Theirs
    except ImportError:
        return None
    return Theirs(shape.d, heads=shape.h, num_experts=shape.m ** 2, num_experts_per_head=shape.k,
                  dim_key=shape.d_key // 2, non_competing_scores=False)


def bench_layer(machine, shape, dtype, layer, xs):
    """Rows of whole layers: the dense twin of equal FLOPs, every path (bfloat16 tables: fused alone), PEER-pytorch."""
    device, flops = machine.device, layer.flops_per_token() * shape.T
    ctx = Context(torch.zeros(1, shape.T, dtype=torch.long, device=device))
    dense = MLP(shape.d, max(8, round(flops / shape.T / (6 * shape.d * 8)) * 8), "swiglu").to(device, dtype)
    floor = shape.floor_bytes(dtype) / machine.copy * 1e3
    contestants = {"dense": Contestant(lambda i: dense(xs[i]), flops, flops / machine.matmul[dtype] * 1e3)}
    for path in expert_paths(dtype, device):
        if "compiled" not in path and (dtype == torch.float32 or path == "fused"):
            twin = copy.copy(layer)
            twin.config = dataclasses.replace(layer.config, peer_path=path)
            contestants[path] = Contestant(lambda i, twin=twin: twin(xs[i], ctx)[0], flops, floor)
    theirs = their_layer(shape)
    if theirs is not None:
        theirs.to(device, dtype)
        contestants["PEER-pytorch"] = Contestant(lambda i: theirs(xs[i]), flops, floor)
    leaves = [*xs, *layer.parameters(), *dense.parameters(), *(theirs.parameters() if theirs is not None else ())]
    return both_ways(machine, f"{shape} layer", dtype, contestants, leaves)


def compare(rows):
    """Prints, for the fastest of our paths, its time beside PEER-pytorch's and its memory beside the readable path's."""
    both = {row["path"]: row for row in rows if row["direction"] == "fwd+bwd" and row["ms"]}
    ours = min((both[p] for p in ("readable", "lean", "fused") if p in both), key=lambda row: row["ms"])
    for path in both.keys() & {"PEER-pytorch", "readable"} - {ours["path"]}:
        print(f"  fwd+bwd: {ours['path']} takes {ours['ms'] / both[path]['ms']:.2f} of the time of {path} and "
              f"{ours['peak_mib'] / both[path]['peak_mib']:.3f} of its peak memory")


def bench_peer(machine, shapes):
    """Yields the rows of one table at a time. BenchError if a path is wrong."""
    print("A PEER layer in parts: its experts alone by each path, beside the floor (the time in which a copy moves as many\n"
          "bytes as the chosen rows hold); retrieval alone; whole layers, beside the dense layer of equal active FLOPs.\n"
          "Peak: beyond tables and their gradients. Every path of the experts was checked against float64 first.")
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16) if machine.device == "cuda" else (torch.float32,):
            layer = build_peer(shape, dtype, machine.device)
            xs = [torch.randn(1, shape.T, shape.d, device=machine.device).to(dtype).requires_grad_() for _ in range(INPUTS)]
            for spread in "uniform", "zipf":
                yield print_table(bench_experts(machine, shape, dtype, layer, spread))
            if dtype == torch.float32:
                yield print_table(bench_retrieval(machine, shape, dtype, layer, xs))
            rows = bench_layer(machine, shape, dtype, layer, xs)
            yield print_table(rows)
            compare(rows)
