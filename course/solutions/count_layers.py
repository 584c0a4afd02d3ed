"""What a layer of Mixtral and of DeepSeek costs.

lecture 1 · difficulty 2 of 5 · importance 5 of 5 · 30 minutes · 5 points

Parameters, active parameters, FLOPs and bytes tell what a sparse layer costs, and one of them alone
misleads. Compute them from the dimensions that the papers publish (Mixtral 2401.04088 table 1,
DeepSeek-V2 2405.04434, DeepSeek-V3 2412.19437), for the feed-forward part of one layer:

- It has E routed experts of hidden width w, of which a token visits k, and n_shared more of the
  same width that every token visits. Each is a SwiGLU, W2 (silu(W1 x) * W3 x), without biases.
- The router is one matrix from d to E, without a bias.

Parameters fill memory. Active parameters, those that one token meets, are read for every token that
is generated, and each costs one multiply-add, counted as 2 FLOPs. Attention with n_head query heads
of width d / n_head, and n_kv_head heads of keys and of values (2305.13245), has four projections.
"""

LAYERS = {
    "Mixtral 8x7B": dict(d=4096, w=14336, E=8, k=2, n_shared=0),
    "DeepSeek-V2": dict(d=5120, w=1536, E=160, k=6, n_shared=2),
    "DeepSeek-V3": dict(d=7168, w=2048, E=256, k=8, n_shared=1),
}


def feed_forward(d, w, E, k, n_shared):
    """A dict of whole numbers: `total` and `active` parameters; `flops`, forward, of one token;
    `memory`, bytes of all weights in bfloat16; `read`, bytes of those that one token meets."""
    # SwiGLU has three matrices, two into the hidden layer and one out of it
    expert = 3 * d * w
    router = d * E
    total = router + (E + n_shared) * expert
    # to choose, a token needs its score for all E experts: the whole router is active
    active = router + (k + n_shared) * expert
    # a multiply and an add for each weight that the token meets
    flops = 2 * active
    # bfloat16 is 16 bits; the next token may choose any expert, so all of them must lie in memory
    memory = 2 * total
    return dict(total=total, active=active, flops=flops, memory=memory, read=2 * active)


def attention(d, n_head, n_kv_head):
    """Parameters of the four projections, without biases."""
    head = d // n_head
    # queries and output have d columns and rows; keys and values only n_kv_head heads of them
    return 2 * d * d + 2 * d * n_kv_head * head


# ---- the check ----
import torch  # noqa: E402

from course.check import ask  # noqa: E402
from model import Attention  # noqa: E402
from moe import MoE  # noqa: E402
from settings import FFNConfig, ModelConfig  # noqa: E402

OTHERS = {"a small layer with shared experts": dict(d=10, w=3, E=5, k=2, n_shared=2),
          "a small layer": dict(d=6, w=5, E=7, k=1, n_shared=0)}


def oracle(d, w, E, k, n_shared):
    """The repository's layer of these dimensions, on the meta device, where it takes no memory."""
    config = FFNConfig(d_expert=w, n_expert=E, top_k=k, n_shared=n_shared, activation="swiglu",
                       router="topk", gate_order="softmax_then_topk", balance="none")
    with torch.device("meta"):
        layer = MoE(config, d).bfloat16()
    total, memory = (sum(p.numel() * size for p in layer.parameters())
                     for size in (1, layer.experts.w_in.element_size()))
    active = total - layer.inactive_params()
    return dict(total=total, active=active, flops=layer.flops_per_token(), memory=memory,
                read=active * memory // total)


def check(mine):
    for name, layer in {**OTHERS, **LAYERS}.items():
        got, want = mine.feed_forward(**layer), oracle(**layer)
        ask(isinstance(got, dict), f"feed_forward returns a {type(got).__name__}, not a dict")
        ask(set(got) == set(want), f"feed_forward returns {sorted(got)}, not {', '.join(want)}")
        for key, mistakes in likely(want, **layer).items():
            case = f"{key} of {name} is {got[key]:,}, not {want[key]:,}"
            for value, why in mistakes:
                ask(got[key] == want[key] or got[key] != value, f"{case}: {why}")
            ask(got[key] == want[key], f"{case}, with {layer}")
    for heads in ((12, 6, 2), (8, 4, 4), (4096, 32, 8)):
        projections(mine.attention(*heads), *heads)


def likely(want, d, w, E, k, n_shared):
    """{key: [(what comes out of a usual mistake, why it is one)]}."""
    total, active, expert, router = want["total"], want["active"], 3 * d * w, d * E
    matrices = "an expert has two matrices in your count: SwiGLU has three, W1, W3 and W2"
    shared = "shared experts are missing"
    return dict(
        total=[(total - router, f"the router is missing, d E = {router:,}"),
               (total - (E + n_shared) * expert // 3, matrices),
               (total - n_shared * expert, shared),
               (total + E, "the router has no bias"),
               (active, "this is what one token meets: all E experts are parameters")],
        active=[(active - router, f"the whole router is missing, d E = {router:,}"),
                (active - router + d * k, "a token needs the scores of all E experts to choose k"),
                (active - (k + n_shared) * expert // 3, matrices),
                (active - n_shared * expert, shared + ": every token visits them"),
                (active - (k - 1) * expert, f"a token visits k = {k} experts, not one"),
                (total * k // E, "the part k / E of everything: the router and shared experts are "
                 "active in whole"),
                (total, "a token visits only k of the E experts")],
        flops=[(active, "a multiply-add is 2 FLOPs"),
               (2 * total, "experts that the token does not visit do nothing: count the active"),
               (6 * active, "this is forward and backward; count the forward pass alone"),
               (2 * (active - router), "the router is a matrix product as well")],
        memory=[(4 * total, "bfloat16 has 16 bits, 2 bytes; 4 are those of float32"),
                (16 * total, "bytes, not bits"),
                (2 * active, "the next token may choose any expert, so all must lie in memory"),
                (total, "a number in bfloat16 takes 2 bytes")],
        read=[(4 * active, "bfloat16 has 16 bits, 2 bytes; 4 are those of float32"),
              (2 * total, "a token reads the experts that it visits, not all of them"),
              (active, "a number in bfloat16 takes 2 bytes")])


def projections(got, d, n_head, n_kv_head):
    with torch.device("meta"):
        attention = Attention(ModelConfig(n_embd=d, n_head=n_head, n_kv_head=n_kv_head))
    want = sum(p.numel() for p in attention.parameters())
    case = (f"attention with d = {d}, {n_head} heads, and {n_kv_head} of keys and of values, has "
            f"{got:,} parameters, not {want:,}")
    for value, why in (
            (4 * d * d, "keys and values have n_kv_head heads"),
            (want - d * d, "there are four projections; is the output's missing?"),
            (want - d * n_kv_head * (d // n_head), "keys and values have a projection each")):
        ask(got == want or got != value, f"{case}: {why}")
    ask(got == want, case)


WRONG = [
    ("expert = 3 * d * w", "expert = 2 * d * w", "SwiGLU has three"),
    ("total = router + (E", "total = (E", "the router is missing"),
    ("(E + n_shared) * expert", "E * expert", "shared experts are missing"),
    ("(k + n_shared) * expert", "k * expert", "every token visits them"),
    ("active = router + (k + n_shared) * expert", "active = total * k // E", "active in whole"),
    ("active = router + (k", "active = d * k + (k", "the scores of all E experts"),
    ("flops = 2 * active", "flops = active", "a multiply-add is 2 FLOPs"),
    ("flops = 2 * active", "flops = 6 * active", "forward and backward"),
    ("memory = 2 * total", "memory = 2 * active", "may choose any expert"),
    ("memory = 2 * total", "memory = 4 * total", "those of float32"),
    ("read=2 * active", "read=2 * total", "the experts that it visits"),
    ("2 * d * d + 2 * d * n_kv_head * head", "4 * d * d", "n_kv_head heads"),
]
