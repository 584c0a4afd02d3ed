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
    raise NotImplementedError("yours")


def attention(d, n_head, n_kv_head):
    """Parameters of the four projections, without biases."""
    raise NotImplementedError("yours")
