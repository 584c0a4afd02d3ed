"""Part `check` of lab/gpu.py: every fast path against its twin in float64, outputs and gradients.

Dispatch paths against dispatch_loop; kernels against their _torch twins; PEER's paths against
experts_readable; the retrieval; the loss; whole models of every kind and router, fast against slow.
Sizes are odd, experts are empty or have everything, and free memory holds NaN before each call.
"""
from functools import partial
from typing import NamedTuple

import torch

import kernels.loss as loss
import kernels.mamba as kernels_mamba
import kernels.moe as kernels_moe
import kernels.order as kernels_order
import kernels.peer as kernels_peer
import kernels.product_keys as product_keys
import moe
from kernels.common import HAS_TRITON, INTERPRETED
from kernels.parts import LinearByParts, split
from lab.timing import gpu_graph
from lab.timing.gpu_models import model_units
from lab.timing.gpu_unit import CUDA, DEVICE, LIMIT, Unit, error_rows, poison
from peer import cartesian_candidates, experts_readable, retrieve, topk_readable
from routers import Routing, pairs

RUNS = HAS_TRITON and (CUDA or INTERPRETED)             # whether there are kernels to check
DTYPES = torch.float32, torch.bfloat16
PATHS = [path for path in moe.DISPATCH if RUNS or path != "fused"]


class Sizes(NamedTuple):
    """Widths are multiples of 8, which a grouped product needs; all else is odd."""
    N: int
    d: int
    w: int
    E: int
    k: int
    R: int          # rows of a token in PEER
    m: int          # sub-keys of a half
    V: int


CARD, TOY = Sizes(1031, 776, 264, 9, 3, 37, 1001, 5003), Sizes(7, 24, 16, 5, 3, 5, 11, 37)


def draw(*shape, dtype=torch.float32):
    """Normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def choose(high, *shape):
    """Integers below `high`, the same on every device."""
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high)).to(DEVICE)


# ---- dispatch ----

def routings(s):
    """{case: Routing} of N tokens."""
    gates = draw(s.N, s.k).sigmoid()
    any_expert = choose(s.E, s.N, s.k)
    keep = draw(s.N * s.k) > -0.5
    P = s.N * s.k - 1
    return {
        "uneven": pairs(any_expert.square() // s.E, gates),
        "every second expert empty": pairs(any_expert // 2 * 2, gates),
        "one expert has everything": pairs(torch.full_like(any_expert, s.E - 1), gates),
        "dropped pairs": pairs(any_expert, gates, keep=keep & (any_expert.flatten() > 0)),
        # tokens differ in their number of experts, as with expert choice
        "ragged": Routing(choose(s.E, P), gates.flatten()[:P], choose(s.N, P), 0)}


def layer_results(path, x, routing, experts, dy):
    """[output, gradients of x, the gates, both matrices]."""
    weight = routing.weight.detach().requires_grad_()
    x = x.detach().requires_grad_()
    y = path(x, routing._replace(weight=weight), experts)
    leaves = [x, weight, *experts.parameters()]
    return [y, *torch.autograd.grad(y, leaves, dy)]


def check_dispatch(s, path, dtype, activations, end):
    names = "output", "gradient of x", "of the gates", "of w_in", "of w_out"
    rows = []
    x, dy = draw(s.N, s.d, dtype=dtype), draw(s.d, s.N, dtype=dtype).T
    for activation in activations:
        torch.manual_seed(0)
        experts = moe.Experts(s.E, s.d, s.w, activation)
        for p in experts.parameters():
            torch.nn.init.normal_(p, std=(2 * p.shape[-1]) ** -0.5)
        experts = experts.to(DEVICE, dtype)
        exact = moe.Experts(s.E, s.d, s.w, activation).to(DEVICE, torch.float64)
        exact.load_state_dict(experts.state_dict())
        for case, routing in routings(s).items():
            want = layer_results(moe.dispatch_loop, x.double(), routing, exact, dy.double())
            poison()
            got = layer_results(moe.DISPATCH[path], x, routing, experts, dy)
            rows += error_rows(names, got, want, LIMIT[dtype],
                               dict(case=f"{activation}, {case}", dtype=str(dtype)[6:]))
    return rows


# ---- kernels: each gives (names, results of the kernel, results of the twin in float64) ----

def expert_order(s):
    order = choose(s.E, s.N * s.k).argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=DEVICE))
    return order, inverse


def kernel_permute(s, dtype):
    order, inverse = expert_order(s)
    x, y = draw(s.N, s.d, dtype=dtype), draw(s.N * s.k, s.d, dtype=dtype)
    short, back = kernels_moe.invert(order, True)
    got = [kernels_moe.permute(x, short, s.k, True), kernels_moe.unpermute(y, back, s.k, True)]
    want = [kernels_moe.permute_torch(x.double(), order, s.k),
            kernels_moe.unpermute_torch(y.double(), inverse, s.k)]
    return ("permute", "unpermute"), got, want


def kernel_activation(activation, s, dtype):
    P, rows = s.N * s.k, 2 * s.w + 2 if activation == "swiglu" else s.w + 1
    h, weight, da = draw(P, rows, dtype=dtype), draw(P).sigmoid(), draw(P, s.w + 1, dtype=dtype)
    got = [kernels_moe.gated_activation(h, weight, activation, True),
           *kernels_moe.gated_activation_backward(da.clone(), h, weight, activation, True)]
    h, weight, da = h.double(), weight.double(), da.double()
    want = [kernels_moe.gated_activation_torch(h, weight, activation),
            *kernels_moe.gated_activation_backward_torch(da, h, weight, activation)]
    return ("activation", "gradient of h", "of the gates", "activation again"), got, want


def chosen(s, case, E):
    """(N, R) experts of PEER."""
    idx = choose(E, s.N, s.R)
    few = {"uniform": idx, "few": idx % 3, "one": torch.full_like(idx, E - 1)}
    return few[case].int()


def kernel_peer(case, s, dtype):
    E, d = s.m, s.d + 1
    idx, gate = chosen(s, case, E), draw(s.N, s.R).sigmoid()
    x, dy = draw(s.N, d, dtype=dtype), draw(s.N + 1, d, dtype=dtype)[1:]
    table = draw(E, 2, d, dtype=dtype) * d ** -0.5
    y, h = kernels_peer.peer_forward(x, table, idx, gate, "gelu", True)
    tokens = kernels_peer.peer_backward_tokens(dy, table, idx, gate, h, "gelu", True)
    _, dh, a, _ = tokens
    backward = partial(kernels_peer.peer_backward_table, x, dy, dh, a, idx, E, kernel=True)
    before = draw(E, 2, d)
    # over NaN, and added to what is there
    tables = [backward(out=torch.full_like(before, torch.nan), share=7),
              backward(out=before.clone(), accumulate=True)]
    wide = [t.double() for t in (x, dy, dh, a)]
    exact = kernels_peer.peer_backward_table_torch(*wide, idx, E)
    want = [*kernels_peer.peer_forward_torch(wide[0], table.double(), idx, gate.double(), "gelu"),
            *kernels_peer.peer_backward_tokens_torch(wide[1], table.double(), idx, gate.double(),
                                                     h.double(), "gelu"), exact, exact + before]
    names = ("y", "h", "dx", "dh", "a", "gradient of the gates", "of the table",
             "of the table, added")
    return names, [y, h, *tokens, *tables], want


def kernel_keys(s, dtype):
    """Scores against the twin's. The experts are judged by their scores, because those that are
    equal up to rounding may change places."""
    q, keys = draw(s.N, 2, 2, 40, dtype=dtype), draw(2, s.m, 40, dtype=dtype)
    scores, experts = product_keys.product_key_experts(q, keys, s.R // 2, True)
    exact, _ = product_keys.product_key_experts_torch(q.double(), keys.double(), s.R // 2)
    a, b = torch.einsum("nhpc,pmc->nhpm", q.double(), keys.double()).unbind(2)
    found = a.gather(2, experts.long() // s.m) + b.gather(2, experts.long() % s.m)
    _, chosen = product_keys.product_key_topk_torch(q, keys, s.R // 2)
    d_scores = draw(*chosen.shape)
    got = product_keys.sub_key_gradient(q, d_scores, chosen, s.m, True, share=7)
    want = product_keys.sub_key_gradient_torch(q.double(), d_scores.double(), chosen, s.m)
    return (("scores", "scores of the experts", "gradient of the sub-keys"),
            [scores, found, got], [exact, exact, want])


def kernel_split(s, dtype):
    """Sums of the parts, which are the number itself, or 16 of its bits."""
    t = draw(s.N, s.d + 1)
    got = [split(t, backward, True).float() for backward in (False, True)]
    return (("three parts", "two parts"), [got[0][:, :3].sum(1), got[1][:, :2].sum(1)],
            [t.double()] * 2)


def kernel_scan(s, dtype):
    """Float32 whatever the dtype: that is what mamba.py hands over."""
    B, T, c, n = 2, s.N, s.w - 1, 13
    x, delta, write = draw(B, T, c), draw(T, B, c).transpose(0, 1).exp(), draw(B, T, n)
    tensors = [x, delta, -draw(n, c).exp(), write, write.flip(1), draw(B, n, c)]
    dy, dh = x.flip(1), draw(B, n, c)
    wide = [t.double() for t in tensors]
    y, starts = kernels_mamba.scan(*tensors, kernel=True)
    y64, starts64 = kernels_mamba.scan(*wide, kernel=False)
    got = kernels_mamba.scan_backward(dy, dh, *tensors[:5], starts, kernel=True)
    want = kernels_mamba.scan_backward(dy.double(), dh.double(), *wide[:5], starts64, kernel=False)
    names = "x", "delta", "rate", "write", "read", "h"
    return (("y", "states", *(f"gradient of {name}" for name in names)), [y, starts, *got],
            [y64, starts64, *want])


def kernel_softmax(s, dtype):
    z, targets = draw(s.N, s.V, dtype=dtype), choose(s.V, s.N)
    targets[::5] = loss.IGNORE
    return (("loss", "gradient"), loss.softmax_gradient(z.clone(), targets, True),
            loss.softmax_gradient_torch(z.double(), targets))


KERNELS = {"permute": kernel_permute,
           **{f"activation {name}": partial(kernel_activation, name)
              for name in ("swiglu", "gelu", "silu", "relu", "relu2")},
           **{f"peer {case}": partial(kernel_peer, case) for case in ("uniform", "few", "one")},
           "product keys": kernel_keys, "bfloat16 parts": kernel_split,
           "selective scan": kernel_scan, "softmax gradient": kernel_softmax}


def check_kernel(function, s, dtype, end):
    poison()
    with torch.no_grad():
        names, got, want = function(s, dtype)
    return error_rows(names, got, want, LIMIT[dtype], dict(dtype=str(dtype)[6:]))


# ---- the sort, products by parts, retrieval, PEER's paths, and the loss ----

def check_order(s, E, end):
    """The counting sort of pairs among E experts against torch.sort: every number the same."""
    names, rows = ("order", "inverse", "token", "gate", "ends", "gradient of the gates"), []
    P = 100 * s.N - 1
    for case, expert in (("any", choose(E, P)), ("last", torch.full_like(choose(E, P), E - 1))):
        token, weight, dy = choose(s.N, P), draw(P).requires_grad_(), draw(P + 1)[1:]
        order, *want, ends = kernels_order.expert_order_torch(expert, token, weight, E)
        want = [*kernels_moe.invert_torch(order), *want, ends]
        poison()
        got = kernels_order.expert_order(expert, token, weight, E, fused=True)
        got, want = ([*t, *torch.autograd.grad(t[3], weight, dy)] for t in (got, want))
        rows += error_rows(names, got, want, 0, dict(case=case))
    return rows



def check_parts(s, E, end):
    """The product in bfloat16 parts against F.linear in float64; E outputs."""
    leaves = [draw(s.N, s.d, dtype=torch.bfloat16), draw(E, s.d) * s.d ** -0.5]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    leaves = [t.detach().requires_grad_() for t in leaves]
    dy = draw(s.N, E)
    y64 = torch.nn.functional.linear(*exact)
    poison()
    y = LinearByParts.apply(*leaves)
    got, want = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(y64, exact, dy.double())
    # the gradient of x is rounded to bfloat16
    rows = error_rows(["gradient of x"], got[:1], want[:1], LIMIT[torch.bfloat16])
    return rows + error_rows(("output", "gradient of W"), [y, got[1]], [y64, want[1]], 3e-5)


def check_retrieval(s, end):
    """The retrieval in one launch against peer.retrieve in float64."""
    k, leaves = s.R // 2, [draw(s.N, 2, 2, 40), draw(2, s.m, 40)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    leaves = [t.detach().requires_grad_() for t in leaves]
    candidates = torch.stack(cartesian_candidates(k)).to(DEVICE)
    scores64, _ = retrieve(*exact, k, candidates, topk_readable)
    poison()
    scores, _ = product_keys.RetrieveFused.apply(*leaves, k)
    d_scores = draw(s.N, 2, k)
    got = [scores, *torch.autograd.grad(scores, leaves, d_scores)]
    want = [scores64, *torch.autograd.grad(scores64, exact, d_scores.double())]
    return error_rows(("scores", "gradient of q", "of the sub-keys"), got, want,
                      LIMIT[torch.float32])



def check_peer(s, path, dtype, parts, end):
    """GatheredExperts of one path against experts_readable; parts 1 is PKM."""
    names, rows = ("output", "gradient of the gates", "of the table", "of x"), []
    activation = "gelu" if parts == 2 else None
    for case in ("uniform", "few", "one"):
        idx, dy = chosen(s, case, s.m), draw(s.N, s.d, dtype=dtype)
        leaves = [draw(s.N, s.R).sigmoid(), draw(s.m, parts, s.d, dtype=dtype) * s.d ** -0.5,
                  draw(s.N + 1, s.d, dtype=dtype)[1:]]
        gate, table, x = exact = [t.detach().double().requires_grad_() for t in leaves]
        y64 = experts_readable(x, table, idx, gate, activation)
        gate, table, x = leaves = [t.detach().requires_grad_() for t in leaves]
        poison()
        if path == "readable":
            y = experts_readable(x, table, idx, gate, activation)
        else:
            y = kernels_peer.GatheredExperts.apply(x, table, idx, gate, activation, path)
        # PKM's values do not read x
        got = [y, *torch.autograd.grad(y, leaves[:parts + 1], dy)]
        want = [y64, *torch.autograd.grad(y64, exact[:parts + 1], dy.double())]
        rows += error_rows(names[:parts + 2], got, want, LIMIT[dtype],
                           dict(case=case, dtype=str(dtype)[6:]))
    return rows


def check_loss(s, kernel, dtype, end):
    targets = choose(s.V, s.N)
    targets[::5] = loss.IGNORE
    leaves = [draw(s.N, s.d, dtype=dtype), draw(s.V, s.d, dtype=dtype) * s.d ** -0.5]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    leaves = [t.detach().requires_grad_() for t in leaves]
    mean64, tokens64 = loss.head_loss_torch(*exact, targets)
    poison()
    mean, tokens = loss.head_loss(*leaves, targets, s.N // 3, kernel)
    got = [mean, tokens, *torch.autograd.grad(mean, leaves)]
    want = [mean64, tokens64, *torch.autograd.grad(mean64, exact)]
    names = "mean", "loss of each token", "gradient of x", "of the weight"
    return error_rows(names, got, want, LIMIT[dtype], dict(dtype=str(dtype)[6:]))


def units(toy, place):
    s, found = TOY if toy else CARD, []
    activations = ["swiglu"] if toy else ["swiglu", "gelu", "relu2"]

    def add(name, function, *words):
        found.extend(Unit(f"{name} {str(dtype)[6:]}", partial(function, *words[:-1], dtype,
                                                              *words[-1]))
                     for dtype in DTYPES)

    for path in PATHS:
        add(f"dispatch {path}", check_dispatch, s, path, [activations])
    for name, function in KERNELS.items() if RUNS else ():
        add(f"kernel {name}", check_kernel, function, s, [])
    if RUNS:
        found.extend(Unit(f"expert order, {E} experts", partial(check_order, s, E))
                     for E in (s.E, s.m))
        # few outputs, then many: two layouts of the parts
        found.extend(Unit(f"product by parts, {E} outputs", partial(check_parts, s, E))
                     for E in (8, s.d))
        found.append(Unit("retrieval in one launch", partial(check_retrieval, s)))
    for kernel in [False, True] if RUNS else [False]:
        add(f"head_loss {'kernel' if kernel else 'twin'}", check_loss, s, kernel, [])
    # The paths in plain PyTorch run in float32 alone, as in a model.
    for path in ("readable", "lean"):
        for kind, parts in (("PEER", 2), ("PKM", 1)):
            found.append(Unit(f"{kind} {path} float32",
                              partial(check_peer, s, path, torch.float32, parts)))
    if RUNS:
        add("PEER fused", check_peer, s, "fused", [2])
    if INTERPRETED and not CUDA:
        # the interpreter's dot product takes bfloat16 for integers
        found = [unit for unit in found if unit.name != "kernel product keys bfloat16"]
    return found + model_units(toy) + gpu_graph.units(place)
