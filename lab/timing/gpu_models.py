"""Models of every kind and router for lab/gpu.py: fast paths against slow ones (part check), and
compiled against eager (part compile)."""
from functools import partial

import torch
import torch._inductor.config

from kernels.common import HAS_TRITON
from lab.timing.gpu_unit import CUDA, DEVICE, Unit, poison
from model import GPT, KINDS, load_config
from routers import ROUTERS
from runtime.device import precision

BASE = {"model.n_layer": 1, "model.n_head": 2, "model.block_size": 64, "model.n_embd": 64,
        "model.vocab_size": 96, "ffn.n_expert": 4, "ffn.d_ff": 64}
TABLE = {"ffn.n_keys": 16, "ffn.peer_heads": 2, "ffn.peer_top_k": 4, "ffn.moe_every": 1}
# Relative errors of a gradient, of which the loss and all parameters are asked.
LIMIT = {"float32": 1e-4, "bfloat16": 5e-2}


def names():
    """Every kind of layer, a mixture by the name of its router."""
    return [kind for kind in KINDS if kind != "moe"] + list(ROUTERS)


def settings_of(name):
    """The settings of a small model of a kind or router."""
    if name in KINDS:
        return BASE | {"ffn.kind": name} | (TABLE if name in ("peer", "pkm") else {})
    one = ROUTERS[name].traits.k == 1
    more = {"data.name": "a,b,c,d"} if name == "domain" else {}
    return BASE | {"ffn.router": name, "ffn.top_k": 1 if one else 2} | more


def fast_and_slow(name):
    """The settings of the path that is checked, and of the readable one."""
    if name == "dense":
        return {"model.loss_chunks": 3}, {}
    if name in KINDS:
        fast = "lean" if name == "pkm" or not HAS_TRITON else "fused"
        return {"ffn.peer_path": fast}, {"ffn.peer_path": "readable"}
    return {"ffn.dispatch": "fused" if HAS_TRITON else "grouped"}, {"ffn.dispatch": "loop"}


def build(name, more):
    """The model in training mode, router weights large, so that choices differ and do not tie."""
    torch.manual_seed(0)
    model = GPT(load_config(None, settings_of(name) | more))
    with torch.no_grad():
        for key, p in model.named_parameters():
            if ".router." in key and key.endswith("weight"):
                p.normal_(std=0.5)
    return model.to(DEVICE)


def batch(i):
    """Tokens, targets and domains; every second batch has few tokens, so that loads differ."""
    B, T = (5, 63) if CUDA else (2, 5)
    tokens = torch.randint(3 if i % 2 else 96, (B, T + 1),
                           generator=torch.Generator().manual_seed(i)).to(DEVICE)
    return tokens[:, :-1], tokens[:, 1:], (torch.arange(B, device=DEVICE) + i) % 4


def step(model, forward, dtype, i):
    """{quantity: tensor}: loss and all gradients of a batch. Equal seeds draw equal noise."""
    idx, targets, domain = batch(i)
    model.zero_grad()
    torch.manual_seed(i)
    with precision(torch.device(DEVICE), dtype):
        out = forward(idx, targets, domain=domain, step=torch.tensor(float(i), device=DEVICE))
    (out.loss + out.aux_loss).backward()
    grads = {key: torch.zeros_like(p) if p.grad is None else p.grad.clone()
             for key, p in model.named_parameters()}
    return {"loss": out.loss.detach()} | grads


def compare(name, dtype, got, want, limit):
    """A row for each quantity. A gradient that is a thousandth of all is judged by that."""
    whole = torch.stack([g.double().norm() for key, g in want.items() if key != "loss"]).norm()
    rows = []
    for key, b in want.items():
        size = b.double().norm() + (0 if key == "loss" else 1e-3 * whole)
        error = ((got[key].double() - b.double()).norm() / size).item()
        rows.append(dict(case=name, dtype=dtype, quantity=key, error=error, limit=limit,
                         held=error <= limit))
    return rows


def check_model(name, end):
    rows = []
    for dtype in LIMIT:
        got, want = {}, {}
        for found, more in zip((got, want), fast_and_slow(name)):
            model = build(name, more)
            poison()
            found.update(step(model, model, dtype, 0))
        rows += compare(name, dtype, got, want, LIMIT[dtype])
    return rows


def model_units(toy):
    """One for each kind and router."""
    chosen = ["dense", "peer", "topk"] if toy else names()
    return [Unit(f"model {name}", partial(check_model, name)) for name in chosen]


# ---- part compile ----

# As above, but a compiled step in bfloat16 may send a token elsewhere, where two experts are about
# equal. A gradient that is lost is 1.
COMPILED = {"float32": 1e-3, "bfloat16": 0.15}


def check_compiled(name, more, backend, dtype, end):
    """Whole graph, five batches of different loads without a second compilation, and the gradients
    of eager steps."""
    torch._dynamo.reset()
    model = build(name, more)
    forward = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    # Random numbers and roundings of an eager step; the compiler's own are others.
    like_eager = torch._inductor.config.patch(fallback_random=True, emulate_precision_casts=True)
    with torch._dynamo.config.patch(error_on_recompile=True), like_eager:
        compiled = [step(model, forward, dtype, i) for i in range(5)]
    rows = []
    for i in (0, 4):
        rows += compare(f"batch {i}", dtype, compiled[i], step(model, model, dtype, i),
                        COMPILED[dtype])
    return rows


def compile_units(toy, place):
    """Every kind and router that compiles, and the loss in chunks, in bfloat16 and then in
    float32."""
    backend = "eager" if toy else "inductor"
    fit = [name for name in names() if name in KINDS or ROUTERS[name].traits.compiles]
    models = {name: (name, {}) for name in fit}
    models["dense, loss in chunks"] = "dense", {"model.loss_chunks": 3}
    pairs = [(title, dtype) for dtype in ("bfloat16", "float32") for title in models]
    if toy:
        pairs = [("topk", "float32")]
    return [Unit(f"{title} {dtype}", partial(check_compiled, *models[title], backend, dtype),
                 least=20, limit=120) for title, dtype in pairs]
