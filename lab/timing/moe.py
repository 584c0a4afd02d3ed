"""python -m lab.bench moe: one mixture-of-experts layer by every dispatch path, beside its dense
twin.

Each contestant is the whole layer as training calls it: router, counting, sort, experts, combine.
They share one set of weights. The Mixtral block of Hugging Face transformers joins in where that
package is installed, with its grouped experts and weights of its own, and on CUDA Liger's experts
likewise, whose autotuning happens in the first call and is told apart.
"""
import copy
import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn

import moe
from ffn import Context, Dense, draw
from kernels.common import HAS_TRITON
from kernels.moe import GroupedExperts
from lab.timing.measure import (INPUTS, Contestant, Peer, Table, check, if_it_fits, measure,
                                print_table, saved_mib, version_of)
from model import load_config


class MoEShape(NamedTuple):
    """T tokens of width d; E experts of hidden width n, of which a token visits k, and shared
    ones."""
    T: int
    d: int
    E: int
    k: int
    n: int
    shared: int = 0
    skew: str = ""                  # zipf | half | empty, see Imposed
    label: str = ""                 # M1 to M6: published shapes

    def __str__(self):
        k = f"{self.k}+{self.shared}" if self.shared else self.k
        return f"{self.label} T{self.T} d{self.d} E{self.E} k{k} n{self.n} {self.skew}".strip()

    @property
    def active_width(self):
        """Hidden units that a token meets: the hidden width of the dense twin."""
        return (self.k + self.shared) * self.n

    def flops(self, direction):
        """Useful FLOPs: a multiply-add for each token and each weight of the three matrices that it
        meets, backward twice as many. The router does not count: it is part of the price."""
        return 2 * 3 * self.T * self.d * self.active_width * (3 if direction == "fwd+bwd" else 1)


# The first two are `--shapes quick`. M1 to M3 are SonicMoE's (2512.14080 fig. 13, 14); the first
# shape of the CPU is the one for which moe.py states its saved memory.
MOE_SHAPES = dict(
    cpu=[MoEShape(2048, 256, 32, 4, 128), MoEShape(4096, 256, 8, 2, 512),
         MoEShape(4096, 256, 64, 8, 128),
         MoEShape(4096, 256, 8, 2, 1024), MoEShape(4096, 256, 64, 8, 256)],
    cuda=[MoEShape(16384, 768, 8, 2, 1024, label="M4"),
          MoEShape(40960, 768, 32, 2, 1024, label="M3"),
          MoEShape(40960, 768, 64, 4, 512, label="M2"),
          MoEShape(40960, 768, 128, 8, 256, label="M1"),
          MoEShape(65536, 768, 8, 2, 1024, label="M4"),
          MoEShape(65536, 768, 64, 7, 256, 1, label="M5"),
          *(MoEShape(40960, 768, 64, 4, 512, skew=s, label="M6")
            for s in ("zipf", "half", "empty"))])


class Imposed(nn.Module):
    """Stands in for a router's scores: adds fixed logits (T, E) that decide who is chosen, while
    the price of choosing and the router's gradient stay.

    zipf: experts are drawn in proportion to 1, 1/2, 1/3 ... (Gumbel top-k). half: every second
    token visits expert 0. empty: no token visits the first eighth of the experts, 8 of 64.
    """

    def __init__(self, score, shape):
        super().__init__()
        logits = -torch.empty(shape.T, shape.E).exponential_().log()
        if shape.skew == "zipf":
            logits -= torch.arange(1, shape.E + 1).log()
        elif shape.skew == "half":
            logits[::2, 0] = 30                 # decides, and leaves the others' softmax above zero
        else:
            logits[:, :shape.E // 8] = -30
        self.score = score
        self.register_buffer("logits", logits, persistent=False)

    def forward(self, x):
        return self.score(x) + self.logits


# ---- the contestants ----

def build_moe(shape, dtype, device):
    """The layer, router in float32 and the rest in dtype, experts at the scale that GPT gives
    them."""
    settings = {"model.n_embd": shape.d, "ffn.n_expert": shape.E, "ffn.top_k": shape.k,
                "ffn.d_expert": shape.n, "ffn.n_shared": shape.shared, "ffn.balance": "none"}
    config = load_config(None, [(key, str(value)) for key, value in settings.items()])
    torch.manual_seed(0)
    layer = moe.MoE(config.ffn, shape.d, vocab_size=256, layer=0)
    if shape.skew:
        layer.router.score = Imposed(layer.router.score, shape)
    for w in layer.experts.parameters():
        nn.init.normal_(w, std=(2 * w.shape[-1]) ** -0.5)
    return cast_experts(layer, dtype).to(device)


def cast_experts(layer, dtype):
    """The layer, all but its router in dtype."""
    for part in layer.experts, layer.shared:
        if part is not None:
            part.to(dtype)
    return layer


def grouped_mm(x, routing, experts):
    """dispatch_grouped with F.grouped_mm also where a CPU would go expert by expert
    (kernels.moe.pick_function)."""
    return moe.dispatch_grouped(x, routing, experts, function=GroupedExperts)


def mixtral_block(shape, dtype, device):
    """transformers' layer of this shape, router included: softmax over the k best of E logits, as
    in the layer beside it."""
    from transformers import MixtralConfig              # importing it takes seconds
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    config = MixtralConfig(hidden_size=shape.d, intermediate_size=shape.n,
                           num_local_experts=shape.E, num_experts_per_tok=shape.k,
                           experts_implementation="grouped_mm")
    block = MixtralSparseMoeBlock(config)
    for weight in block.parameters():
        draw(weight)
    return block.to(device, dtype)


class LigerLayer(nn.Module):
    """Liger's experts of this shape behind our router."""

    def __init__(self, shape, dtype, device):
        from liger_kernel.transformers.swiglu import LigerExperts
        super().__init__()
        self.router = build_moe(shape, dtype, device).router
        self.experts = LigerExperts(SimpleNamespace(
            num_local_experts=shape.E, hidden_size=shape.d, intermediate_size=shape.n,
            hidden_act="silu")).to(device, dtype)
        for weight in self.experts.parameters():
            draw(weight)

    def forward(self, x):
        experts, gates = self.router(x.flatten(0, 1), None).by_token()
        return self.experts(x, experts, gates.to(x.dtype))


def peers_of(shape, dtype, device):
    """{name: Peer} of what is installed and can have this shape."""
    if shape.shared or shape.skew:
        return {}
    makers = {"transformers": mixtral_block}
    if device == "cuda":
        makers["liger-kernel"] = LigerLayer
    return {f"{package} {version}": Peer(partial(make, shape, dtype, device))
            for package, make in makers.items() if (version := version_of(package))}


def paths_of(device):
    """{name: dispatch function} of what can run here."""
    paths = dict(moe.DISPATCH)
    if device == "cpu":
        paths["grouped_mm"] = grouped_mm
    if device == "cpu" or not HAS_TRITON:
        del paths["fused"]
    return paths


def compiled_of(device, dtype):
    """Contestants that also run compiled: on CUDA the twin and the path of `dispatch = auto`; in
    bfloat16, the one dtype in which a grouped product compiles."""
    if device == "cpu" or dtype != torch.bfloat16:
        return []
    return ["dense", "fused" if HAS_TRITON else "grouped"]


def dtypes_of(device, first):
    """float32 and bfloat16; on CUDA, where float32 has no grouped kernel, float32 at the first
    shape only."""
    return (torch.float32, torch.bfloat16) if device == "cpu" or first else (torch.bfloat16,)


def build_layers(shape, dtype, device, paths, compiled=()):
    """{name: layer} of our contestants: the dense twin and, on the same weights, a layer for each
    path; those named in `compiled` also compiled."""
    layer = build_moe(shape, dtype, device)
    # a layer finds its path there, by the name in its config
    moe.DISPATCH.update(paths)
    layers = {"dense": Dense(shape.d, shape.active_width, "swiglu").to(device, dtype)}
    for name in paths:
        layers[name] = copy.copy(layer)
        layers[name].config = dataclasses.replace(layer.config, dispatch=name)
    for name in compiled:
        layers[f"{name} compiled"] = torch.compile(layers[name], dynamic=False)
    return layers


# ---- the bench ----

def check_layers(shape, dtype, layers, x, dy, ctx):
    """Output and all gradients of every layer but the twin against the loop in float64, which gets
    the same rounded weights and, its router being float32 as well, the same routing."""
    def results(layer, x, dy):
        y, params = layer(x, ctx)[0], layer.parameters()
        return [y, *torch.autograd.grad(y, [x, *params], dy)]

    oracle = cast_experts(copy.deepcopy(layers["loop"]), torch.float64)
    want = results(oracle, x.detach().double().requires_grad_(), dy.double())
    names = ["output", "gradient of x", *(f"gradient of {name}"
                                          for name, _ in oracle.named_parameters())]
    for path, layer in layers.items():
        if not path.startswith("dense"):
            check(path, shape, names, results(layer, x, dy), want, dtype)


def saved_by(layer, x, ctx):
    """MiB kept for backward by the dense twin, or by experts and dispatch: what the router keeps is
    the same for every path and left out. None for a compiled layer, which cannot be cut there."""
    if isinstance(layer, Dense):
        return saved_mib(lambda: layer(x, ctx), layer.parameters())
    if not isinstance(layer, moe.MoE):
        return None
    routing = layer.router(x[0].detach(), ctx)
    routing = routing._replace(weight=routing.weight.detach().requires_grad_())
    path = moe.DISPATCH[layer.config.dispatch]
    return saved_mib(lambda: path(x[0], routing, layer.experts), layer.parameters())


def rows_of(machine, shape, dtype, layers, xs, dy, ctx):
    """Rows of the layers, ours and others', forward and forward+backward."""
    def forward(layer, i):
        return layer(xs[i], ctx)[0]

    def both(layer, i):
        return torch.autograd.grad(forward(layer, i), [xs[i], *layer.parameters()], dy)

    saved = {name: if_it_fits(lambda: saved_by(layer, xs[0], ctx))
             for name, layer in layers.items()}
    # The dense twin's FLOPs count for every path.
    rows = []
    for direction, run in ("fwd", forward), ("fwd+bwd", both):
        flops = shape.flops(direction)
        floor = machine.compute_ms(flops, dtype)
        contestants = {name: Contestant(partial(run, layer), flops, floor, saved[name],
                                        isinstance(layer, Peer))
                       for name, layer in layers.items()}
        rows += measure(machine, "moe", shape, dtype, direction, contestants)
    return rows


def bench_shape(machine, shape, dtype):
    """Rows of one table. BenchError if a path is wrong."""
    device = machine.device
    layers = build_layers(shape, dtype, device, paths_of(device), compiled_of(device, dtype))
    ctx = Context(torch.zeros(1, shape.T, dtype=torch.long, device=device))
    *xs, dy = (torch.randn(1, shape.T, shape.d, device=device).to(dtype)
               for _ in range(INPUTS + 1))
    xs = [x.requires_grad_() for x in xs]
    # Every path of ours is right before it is timed.
    check_layers(shape, dtype, layers, xs[0], dy, ctx)
    layers |= peers_of(shape, dtype, device)
    return print_table(rows_of(machine, shape, dtype, layers, xs, dy, ctx))


def bench_moe(machine, shapes):
    """The Tables of the bench."""
    print("One feed-forward layer (SwiGLU; router, sort and combine included) by each path, beside "
          "the\ndense layer of equal active FLOPs. Saved: what experts and dispatch keep for "
          "backward. Before it\nis timed, every path is checked against the loop in float64: "
          "output and all gradients. Another\npackage's layer has weights of its own and is not "
          "checked.", flush=True)
    return [Table(str(shape), dtype, partial(bench_shape, machine, shape, dtype))
            for shape in shapes for dtype in dtypes_of(machine.device, shape is shapes[0])]
