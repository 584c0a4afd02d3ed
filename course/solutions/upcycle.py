"""Upcycling: a dense model becomes a sparse one.

lecture 5 · difficulty 3 of 5 · importance 4 of 5 · 40 minutes · 6 points

A trained dense model need not be thrown away. Sparse upcycling (Komatsuzaki 2022, 2212.05055)
copies its feed-forward layers, all or some of them, into E experts each, takes over all other
weights, and draws a router. If a token's gates sum to 1, the copies give the dense layer's output,
whichever experts the router picks:

    y = sum of g_i FFN(x) = FFN(x)

So the first step starts from the dense model's predictions, with a KL divergence of 0 nats. Not
all gates sum to 1. This repository has three orders, ffn.gate_order, and a factor ffn.route_scale
on the gates:

    topk_then_softmax           the softmax over the k logits that are kept
    softmax_then_topk           the softmax over all E, of which k are kept
    softmax_then_topk_renorm    the same, divided by their sum

Qwen2 (2407.10671, sec. 2.2.2) makes many narrow experts instead. It copies the layer, shuffles the
hidden units of each copy, and cuts the copies into experts of width w. (Then it draws half of all
numbers anew; you need not.) A layer is a sum over its hidden units, so their order means nothing,
and the experts of one copy, all at gate 1, add up to the layer:

    FFN(x) = sum over units u of w_out[:, u] act(w_in[u] x)         a unit: a row and a column

Here h is the hidden width of the dense layer (not a number of heads), w that of a narrow expert.
SwiGLU has two rows for each unit, stacked: w_in (2 h, d) holds all h gate rows, then all h up rows.

It matters because a mistake here does not stop a run. It starts from a worse model, and nobody
sees why; a KL of 0 at step 0 is the test that finds it.
"""
import torch


@torch.no_grad()
def upcycle(dense, moe):
    """Gives moe, in place, what makes it the upcycled dense; dense stays as it is. Both are GPTs of
    this repository with parameters of the same names and shapes, but for the layers that are sparse
    in moe, where

    dense   blocks.0.ffn.mlp.w_in.weight (h or 2 h, d)      blocks.0.ffn.mlp.w_out.weight (d, h)
    moe     blocks.0.ffn.experts.w_in (E, h or 2 h, d)      blocks.0.ffn.experts.w_out (E, d, h)
            blocks.0.ffn.router.score.weight (E, d), drawn already"""
    old = dense.state_dict()
    # the tensors of a state dict are the model's own: to write into them is to change the model
    # (the router stays as it was drawn: equal rows would tie, all tokens go to the same experts)
    for name, tensor in moe.state_dict().items():
        # embeddings, attention, norms, head, layers that stay dense: the same in both
        if name in old:
            tensor.copy_(old[name])
        # every expert gets its own copy of the whole layer; copy_ repeats it along E
        elif ".experts." in name:
            tensor.copy_(old[name.replace("experts", "mlp") + ".weight"])


def route_scale(gate_order, E, k):
    """(scale, exact) of a layer upcycled to E copies of which a token visits k.

    scale: the factor on the gates with which they sum to 1 while all logits are equal, as they
    nearly are at step 0. exact: whether they then sum to 1 whatever the logits are."""
    # softmax over all E gives k of E equal logits k / E; as the logits spread, the k best get more
    if gate_order == "softmax_then_topk":
        return E / k, k == E
    # both others divide by the sum of the k that are kept
    return 1.0, True


def cut_and_shuffle(w_in, w_out, E, w, generator):
    """Qwen2's experts of a layer w_in (h or 2 h, d), w_out (d, h): new tensors (E, w or 2 w, d) and
    (E, d, w). From as many copies as E w units take, each shuffled anew by draws from generator.
    Expert 0 gets the first units of the first copy; nobody gets what the last copy has left."""
    d, h = w_out.shape
    # an order for each copy: equal ones would make equal experts
    copies = -(-E * w // h)
    orders = [torch.randperm(h, generator=generator) for _ in range(copies)]
    units = torch.cat(orders)[:E * w].view(E, w)
    # the same unit numbers pick rows of w_in, gate and up alike, and columns of w_out
    rows = w_in.view(-1, h, d)[:, units]                            # (1 or 2, E, w, d)
    columns = w_out[:, units]                                       # (d, E, w)
    return rows.transpose(0, 1).flatten(1, 2), columns.transpose(0, 1)


# ---- the check ----
from pathlib import Path  # noqa: E402

from course.check import ask, close, shape  # noqa: E402
from data.tokenizers import Tokenizer  # noqa: E402
from ffn import MLP, activation_of  # noqa: E402
from grow import btx  # noqa: E402
from grow.parents import Parent  # noqa: E402
from model import GPT  # noqa: E402
from settings import Config, FFNConfig, ModelConfig  # noqa: E402

EXACT = ("topk_then_softmax", "softmax_then_topk_renorm")


def check(mine):
    for activation, more in (("swiglu", dict(n_expert=4)), ("gelu", dict(n_expert=3, moe_every=2))):
        check_upcycle(mine, activation, **more)
    check_scale(mine)
    for size in (("gelu", 12, 6, 4), ("swiglu", 12, 6, 4), ("swiglu", 10, 4, 6), ("gelu", 8, 3, 8)):
        check_cut(mine, *size)


def model_of(**ffn):
    model = ModelConfig(n_layer=2, n_embd=16, n_head=2, block_size=12, vocab_size=32)
    return GPT(Config(model, FFNConfig(d_ff=24, **ffn))).eval()


def dense_of(activation):
    """A dense model that predicts something: weights as after training, norms that are not 1."""
    dense = model_of(kind="dense", activation=activation)
    with torch.no_grad():
        for p in dense.parameters():
            p.mul_(3).add_(torch.randn_like(p) * 0.1)
    return dense


def upcycled_here(dense, **ffn):
    """The same by this repository."""
    parent = Parent(Path("dense"), dense, dense.config, Tokenizer.byte(), {})
    return btx.upcycle(parent, [(f"ffn.{name}", str(value)) for name, value in ffn.items()])[1]


def check_upcycle(mine, activation, n_expert, **more):
    dense = dense_of(activation)
    moe = model_of(activation=activation, n_expert=n_expert, **more)
    drawn, old = ({name: t.clone() for name, t in m.state_dict().items()} for m in (moe, dense))
    mine.upcycle(dense, moe)
    want = upcycled_here(dense, n_expert=n_expert, **more).state_dict()
    for name, t in dense.state_dict().items():
        ask(torch.equal(t, old[name]), f"upcycle changed {name} of the dense model")
    for name, t in moe.state_dict().items():
        shape(name, t, drawn[name].shape)
        if ".router." in name:
            ask(torch.equal(t, drawn[name]), f"{name} was changed: " + (
                "its rows are equal, so that all experts tie and get the same gradient"
                if torch.equal(t[0], t[1]) else "the dense model has no router, so it stays as it was drawn"))
        else:
            ask(not torch.equal(t, drawn[name]) or torch.equal(t, want[name]),
                f"{name} is still as it was drawn")
            if ".experts." in name:
                check_expert(name, t, want[name])
            close(name, t, want[name])
    check_own(dense, moe)
    kl, most = btx.drift(dense, moe)
    ask(kl < 1e-6 and most < 1e-4, f"the KL from the dense model is {kl:.2g} nats a token, logits differ by "
        f"{most:.2g}: it should be 0 but for rounding")


def check_expert(name, t, want):
    ratio = t.norm() / want.norm()
    ask(not torch.allclose(t, want * ratio, rtol=1e-3, atol=1e-6) or abs(ratio - 1) < 1e-4,
        f"{name} is {ratio:.3g} times the dense layer's: the gates sum to 1 already, so copies stay whole")
    ask(torch.equal(t[1:], want[1:]) or not torch.equal(t[0], want[0]),
        f"{name}: expert 0 is the dense layer, the others are not: every expert is a copy")


def check_own(dense, moe):
    """Whether each expert has its own numbers."""
    layer = moe.blocks[1].ffn.experts
    for name in ("w_in", "w_out"):
        tensor, other = getattr(layer, name), getattr(dense.blocks[1].ffn.mlp, name).weight
        before = tensor.detach().clone(), other.detach().clone()
        with torch.no_grad():
            tensor[0, 0, 0] += 1
        ask(torch.equal(tensor[1:], before[0][1:]) and torch.equal(other, before[1]), f"experts.{name}: a "
            "change of expert 0 also changes another expert or the dense model: they share memory, so copy")
        with torch.no_grad():
            tensor[0, 0, 0] = before[0][0, 0, 0]


def check_scale(mine):
    dense = dense_of("swiglu")
    for order in (*EXACT, "softmax_then_topk"):
        for E, k in ((4, 2), (6, 3), (3, 3), (4, 1)):
            if k == 1 and order in EXACT:
                continue                                # the house refuses a gate that is always 1
            given, found = f"route_scale({order!r}, {E}, {k})", mine.route_scale(order, E, k)
            ask(isinstance(found, tuple) and len(found) == 2,
                f"{given} is {found!r}, not a tuple (scale, exact)")
            scale, exact = found
            ask(isinstance(scale, (int, float)) and scale > 0,
                f"{given} has the scale {scale!r}, not a number above 0")
            moe = upcycled_here(dense, n_expert=E, top_k=k, gate_order=order, route_scale=float(scale))
            one_scale(given, scale, exact, dense, moe)


def one_scale(given, scale, exact, dense, moe):
    """The answer against this repository's router: what its gates sum to, by equal and by spread logits."""
    routers, sums = [block.ffn.router for block in moe.blocks], []
    for spread in (0, 2):
        with torch.no_grad():
            for router in routers:
                router.score.weight.normal_().mul_(spread)
        kl, _ = btx.drift(dense, moe)
        sums.append(routers[0](torch.randn(50, 16), None).by_token()[1].sum(-1))
    ask((sums[0] - 1).abs().max() < 1e-5,
        f"{given} has the scale {scale:g}: with equal logits the gates of a "
        f"token then sum to {sums[0][0]:.3g}, not to 1")
    low, high = sums[1].min().item(), sums[1].max().item()
    true = max(abs(low - 1), abs(high - 1)) < 1e-5
    what = "still sum to 1" if true else f"sum to {low:.2f} to {high:.2f}"
    ask(exact == true,
        f"{given} says exact = {exact!r}: with spread logits the gates {what}, and the KL from "
        f"the dense model is {kl:.2g} nats a token")


def check_cut(mine, activation, h, E, w, d=5):
    given = f"cut_and_shuffle of {activation}, h = {h}, E = {E}, w = {w}"
    parts = 2 if activation == "swiglu" else 1
    # numbers that name their unit: u + 1 in the gate row and the column of unit u, -(u + 1) in its up row
    tag = torch.arange(1., h + 1)
    w_in = torch.cat([tag, -tag][:parts])[:, None].repeat(1, d)
    w_out = tag.repeat(d, 1)
    new_in, new_out = mine.cut_and_shuffle(w_in, w_out, E, w, torch.Generator().manual_seed(3))
    shape(f"w_in of {given}", new_in, (E, parts * w, d))
    shape(f"w_out of {given}", new_out, (E, d, w))
    check_units(given, new_in.detach(), new_out.detach(), h, w, parts)
    again, other = (mine.cut_and_shuffle(w_in, w_out, E, w, torch.Generator().manual_seed(s))[1]
                    for s in (3, 4))
    ask(torch.equal(again, new_out) and not torch.equal(other, new_out),
        f"{given}: the shuffle does not follow "
        "the generator: give it to torch.randperm, and draw nothing elsewhere")
    check_sum(mine, given, activation, h, E, w, d)


def check_units(given, new_in, new_out, h, w, parts):
    """Which units each expert holds, read off their tags."""
    column, gate, up = new_out[:, 0].abs(), new_in[:, :w, 0], new_in[:, -w:, 0]
    if parts == 2:
        kinds = "".join("g" if row > 0 else "u" for row in new_in[0, :, 0])
        ask((gate > 0).all() and (up < 0).all(),
            f"{given}: the rows of expert 0 are {kinds} (g gate, u up), not "
            f"{'g' * w + 'u' * w}: w_in is all gates, then all ups, so the two rows of a unit lie h apart")
        ask(torch.equal(gate, -up),
            f"{given}: the gate and up rows of expert 0 are of units {units(gate[0])} "
            f"and {units(-up[0])}: both rows of a unit stay together")
    ask(torch.equal(gate, column),
        f"{given}: expert 0 has rows of units {units(gate[0])} and columns of units "
        f"{units(column[0])}: one order for w_in and w_out")
    order = column.flatten()
    copies = order.split(h)
    for copy in copies:
        twice = [int(u) - 1 for u in copy.unique() if (copy == u).sum() > 1]
        ask(not twice, f"{given}: units {twice} occur twice in the {h} of one copy, and others not at all: "
            "shuffle the copy, then cut it")
    ask(not torch.equal(copies[0].sort().values, copies[0]),
        f"{given}: the hidden units are still in their old "
        "order: shuffle each copy along the hidden axis")
    ask(len(copies) == 1 or not torch.equal(copies[1], copies[0][:len(copies[1])]),
        f"{given}: the second copy "
        "has the order of the first, so that its experts are the same: shuffle each copy anew")


def units(tags):
    return [int(t) - 1 for t in tags]


def check_sum(mine, given, activation, h, E, w, d):
    """All experts of one copy at gate 1 are the dense layer."""
    layer, x = MLP(d, h, activation), torch.randn(7, d)
    generator = torch.Generator().manual_seed(5)
    w_in, w_out = mine.cut_and_shuffle(layer.w_in.weight, layer.w_out.weight, E, w, generator)
    # where experts do not reach over the end of a copy: h / w of them
    size = h // w if h % w == 0 else E + 1
    for first in range(0, E - size + 1, size):
        one = range(first, first + size)
        y = sum(activation_of(x @ w_in[e].T, activation) @ w_out[e].T for e in one)
        close(f"the sum over experts {list(one)} of {given}", y, layer(x), 1e-4, 1e-5,
              "the dense layer's output")


WRONG = [
    ("        if name in old:", "        if name in old and \"norm\" not in name:",
     "is still as it was drawn"),
    ("        elif \".experts.\" in name:", "        elif \".experts.w_in\" in name:",
     "w_out is still as it was drawn"),
    ("+ \".weight\"])", "+ \".weight\"] / len(tensor))", "the gates sum to 1 already"),
    ("tensor.copy_(old[name.replace", "tensor[0].copy_(old[name.replace", "every expert is a copy"),
    ("        elif \".experts.\" in name:",
     "        elif \".router.\" in name:\n            tensor.zero_()\n        elif \".experts.\" in name:",
     "all experts tie"),
    ("            tensor.copy_(old[name.replace(\"experts\", \"mlp\") + \".weight\"])",
     "            layer, part = moe.blocks[int(name.split(\".\")[1])].ffn.experts, name.split(\".\")[-1]\n"
     "            source = old[name.replace(\"experts\", \"mlp\") + \".weight\"]\n"
     "            getattr(layer, part).data = source.expand(len(tensor), -1, -1)", "share memory"),
    ("return E / k, k == E", "return 1.0, True", "not to 1"),
    ("return E / k, k == E", "return float(E), False", "not to 1"),
    ("return E / k, k == E", "return E / k, True", "and the KL from the dense model is"),
    ("return 1.0, True", "return 1.0, False", "the gates still sum to 1"),
    ("return E / k, k == E", "return E / k, False", "the gates still sum to 1"),
    ("rows = w_in.view(-1, h, d)[:, units] ", "rows = w_in.view(h, -1, d)[units].permute(2, 0, 1, 3)",
     "the two rows of a unit lie h apart"),
    ("columns = w_out[:, units]", "columns = w_out[:, units.flip(1)]", "one order for w_in and w_out"),
    ("torch.randperm(h, generator=generator)", "torch.randint(h, (h,), generator=generator)", "occur twice"),
    ("torch.randperm(h, generator=generator)", "torch.arange(h)", "still in their old order"),
    ("[torch.randperm(h, generator=generator) for _ in range(copies)]",
     "[torch.randperm(h, generator=generator)] * copies", "shuffle each copy anew"),
    ("torch.randperm(h, generator=generator)", "torch.randperm(h)", "does not follow the generator"),
]
