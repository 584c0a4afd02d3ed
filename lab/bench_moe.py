"""python -m lab.bench moe: one mixture-of-experts layer by every dispatch path, beside its dense twin.

Each contestant is the whole layer as training calls it: router, counting, sort, experts, combine. They share one set
of weights. The grouped experts of Hugging Face transformers join in where that package is importable; its batched_mm
does not, since it copies the weights of an expert for every pair (16 GB at T4096 k8 n256).
"""
import contextlib
import copy
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn

import moe
from config import load_config
from kernels import HAS_TRITON
from lab.measure import INPUTS, check, measure, print_table, saved_mib
from routers import Context



class MoEShape(NamedTuple):
    """A layer: T tokens of width d, E experts of hidden width n of which a token visits k, and shared ones."""
    T: int
    d: int
    E: int
    k: int
    n: int
    shared: int = 0
    skew: str = ""                  # zipf | half | empty: see Imposed
    id: str = ""                    # of PERFORMANCE.md

    def __str__(self):
        k = f"{self.k}+{self.shared}" if self.shared else self.k
        return f"{self.id} T{self.T} d{self.d} E{self.E} k{k} n{self.n} {self.skew}".strip()

    @property
    def active_width(self):
        """Hidden units that a token meets, and so the hidden width of the dense twin."""
        return (self.k + self.shared) * self.n

    def flops(self, direction):
        """Useful FLOPs: a multiply-add for each token and each weight of the three matrices that it meets; backward
        twice as many. The router is left out: it is part of the price."""
        return 2 * 3 * self.T * self.d * self.active_width * (3 if direction == "fwd+bwd" else 1)


# The first two are `--shapes quick`.
MOE_SHAPES = dict(
    cpu=[MoEShape(2048, 256, 32, 4, 128), MoEShape(4096, 256, 8, 2, 512), MoEShape(4096, 256, 64, 8, 128),
         MoEShape(4096, 256, 8, 2, 1024), MoEShape(4096, 256, 64, 8, 256)],
    cuda=[MoEShape(16384, 768, 8, 2, 1024, id="M4"), MoEShape(40960, 768, 32, 2, 1024, id="M3"),
          MoEShape(40960, 768, 64, 4, 512, id="M2"), MoEShape(40960, 768, 128, 8, 256, id="M1"),
          MoEShape(65536, 768, 8, 2, 1024, id="M4"), MoEShape(65536, 768, 64, 7, 256, shared=1, id="M5"),
          *(MoEShape(40960, 768, 64, 4, 512, skew=skew, id="M6") for skew in ("zipf", "half", "empty"))])


class Imposed(nn.Module):
    """Stands in for a router's scores: adds fixed logits (T, E) that decide who is chosen, while the price of
    choosing and the router's gradient stay.

    zipf: expert e is chosen in proportion to 1 / (e + 1) (Gumbel top-k); half: every second token goes to expert 0;
    empty: nobody goes to the first eighth of the experts, 8 of 64.
    """

    def __init__(self, score, shape):
        super().__init__()
        self.score, (T, E) = score, (shape.T, shape.E)
        logits = -torch.empty(T, E).exponential_().log()
        if shape.skew == "zipf":
            logits -= torch.arange(1, E + 1).log()
        elif shape.skew == "half":
            logits[::2, 0] = 1e4
        else:
            logits[:, :E // 8] = -1e4
        self.register_buffer("logits", logits, persistent=False)

    def forward(self, x):
        return self.score(x) + self.logits


class AnyPath(moe.MoE):
    """The MoE layer with `path(x, routing, experts)` for its dispatch, so that other people's experts fit in."""

    def travel(self, x, routing, slots):
        return self.path(x, routing, self.experts)


def build_moe(shape, dtype, device):
    """The layer, experts in `dtype` and router in float32, every matrix with the scale that GPT gives it."""
    settings = {"model.n_embd": shape.d, "ffn.n_expert": shape.E, "ffn.top_k": shape.k, "ffn.d_expert": shape.n,
                "ffn.n_shared": shape.shared, "ffn.balance": "none"}
    config = load_config(None, [(key, str(value)) for key, value in settings.items()])
    torch.manual_seed(0)
    layer = AnyPath(config.ffn, shape.d, 256, 0)
    if shape.skew:
        layer.router.score = Imposed(layer.router.score, shape)
    for w in layer.experts.parameters():
        nn.init.normal_(w, std=(2 * w.shape[-1]) ** -0.5)
    for part in filter(None, (layer.experts, layer.shared)):
        part.to(dtype)
    return layer.to(device)


def grouped_mm(x, routing, experts):
    """The grouped path with F.grouped_mm also where it would go expert by expert, which it does on a CPU."""
    with mock.patch.object(moe, "ExpertByExpert", moe.GroupedExperts):
        return moe.dispatch_grouped(x, routing, experts)


def transformers_grouped(x, routing, experts):
    """The grouped experts of Hugging Face transformers on our weights, which have their layout."""
    from transformers.integrations.moe import grouped_mm_experts_forward
    theirs = TheirExperts(experts)
    return grouped_mm_experts_forward(theirs, x, routing.expert.view(-1, routing.k), routing.weight.view(-1, routing.k))


class TheirExperts:
    """What transformers' experts functions read from the module that they are called on."""
    has_gate, has_bias, is_transposed, act_fn = True, False, False, staticmethod(nn.functional.silu)

    def __init__(self, experts):
        self.gate_up_proj, self.down_proj, self.num_experts = experts.w_in, experts.w_out, len(experts.w_in)

    def _apply_gate(self, h):
        return moe.activation_of(h, "swiglu")


def moe_paths(device):
    """{name: dispatch function} of what can run here."""
    paths = dict(moe.DISPATCH)
    if device == "cpu":
        paths["grouped_mm"] = grouped_mm
    if device == "cpu" or not HAS_TRITON:
        del paths["fused"]
    with contextlib.suppress(ImportError):
        import transformers.integrations.moe  # noqa: F401
        paths["transformers"] = transformers_grouped
    return paths


def results(layer, x, dy, ctx):
    """(names, tensors): the output and the gradient of the input and of every parameter."""
    names, params = zip(*layer.named_parameters())
    y = layer(x, ctx)[0]
    return ("output", *("gradient of " + name for name in ("input", *names))), [y, *torch.autograd.grad(y, [x, *params], dy)]


def moe_layers(shape, dtype, machine):
    """{name: module} of the contestants: the dense twin and one layer for each path, all on the same weights. CUDA:
    the twin, the path that `auto` takes, and transformers also compiled."""
    device = machine.device
    layer = build_moe(shape, dtype, device)
    layers = {"dense": moe.Dense(shape.d, shape.active_width, "swiglu").to(device, dtype)}
    for name, path in moe_paths(device).items():
        layers[name] = copy.copy(layer)
        layers[name].path = path
    if device == "cuda" and dtype == torch.bfloat16:        # grouped products compile in no other dtype
        for name in {"dense", "fused" if HAS_TRITON else "grouped", "transformers"} & layers.keys():
            layers[name + " compiled"] = torch.compile(layers[name], dynamic=False)
    return layers


def check_moe(shape, dtype, layers, x, dy, ctx):
    """Every layer but the twin against the loop in float64, on the same rounded weights and the same routing."""
    oracle = copy.deepcopy(layers["loop"])
    for part in filter(None, (oracle.experts, oracle.shared)):
        part.double()
    x64 = x.detach().double().requires_grad_()
    names, want = results(oracle, x64, dy.double(), ctx)
    for path, layer in layers.items():
        if not path.startswith("dense"):
            check(path, shape, names, results(layer, x, dy, ctx)[1], want, dtype)


def moe_saved(layer, x, ctx):
    """MiB kept for backward by the dense twin, or by experts and dispatch: what the router keeps is the same for every
    path and left out. None for a compiled layer, which cannot be cut there."""
    if isinstance(layer, moe.Dense):
        return saved_mib(lambda: layer(x, ctx), layer.parameters())
    if not isinstance(layer, moe.MoE):
        return None
    routing = layer.router(x[0].detach(), ctx)
    routing = routing._replace(weight=routing.weight.detach().requires_grad_())
    return saved_mib(lambda: layer.path(x[0], routing, layer.experts), layer.parameters())


def moe_arm(layer, shape, dtype, direction, machine, xs, dy, ctx):
    def forward(i):
        layer(xs[i], ctx)

    def both(i):
        torch.autograd.grad(layer(xs[i], ctx)[0], [xs[i], *layer.parameters()], dy)

    run = forward if direction == "fwd" else both
    return machine.compute_arm(run, shape.flops(direction), dtype, saved_mib=moe_saved(layer, xs[0], ctx))


def bench_moe(machine, shapes):
    """Yields the rows of one table at a time. BenchError if a path is wrong."""
    device = machine.device
    print("One feed-forward layer (SwiGLU; router, sort and combine included) by each path, beside the dense layer of\n"
          "equal active FLOPs. Saved: what experts and dispatch keep for backward. Every path was checked against the\n"
          "loop in float64 first: output and all gradients.")
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            if device == "cuda" and dtype == torch.float32 and shape is not shapes[0]:
                continue                                    # no tensor cores, and no grouped kernel: once is enough
            layers = moe_layers(shape, dtype, machine)
            ctx = Context(torch.zeros(1, shape.T, dtype=torch.long, device=device))
            *xs, dy = (torch.randn(1, shape.T, shape.d, device=device).to(dtype) for _ in range(INPUTS + 1))
            xs = [x.requires_grad_() for x in xs]
            check_moe(shape, dtype, layers, xs[0], dy, ctx)
            rows = []
            for direction in ("fwd", "fwd+bwd"):
                arms = {name: moe_arm(layer, shape, dtype, direction, machine, xs, dy, ctx) for name, layer in layers.items()}
                rows += measure(machine, "moe", shape, dtype, direction, arms)
            yield print_table(rows)
