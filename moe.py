"""How tokens travel: dense feed-forward layers, experts, four ways to dispatch, and the MoE layer.

A feed-forward layer of any kind is called as `ffn(x, ctx) -> (y, stats)`, x and y (B, T, d).

Design decisions, each with what it is for:
- Experts are 3-D parameters (E, out, in): one tensor, one optimizer entry, and a layout that grouped products
  take without a copy.
- The routing weight multiplies the activation, not the expert's output: W2 (p act(h)) = p W2 act(h), but the
  (P, d) output need not be kept for the router's gradient, which is then a product over the n hidden units
  instead of d.
- The grouped path keeps layer input and pre-activation for backward and computes everything else again.
- Dropless is the default. A dropped pair is a pair of weight 0, so every path agrees on what a capacity limit
  means.

Axis letters: B sequences, T positions, N = B*T tokens, d width, E experts, k per token, P = N*k pairs, n
expert width.
"""
import torch
import torch.nn.functional as F
from torch import nn

from balance import auxiliary_losses, expert_counts, update_bias
from kernels.common import ACTIVATIONS, use_triton
from kernels.moe import ExpertByExpert, GroupedExperts
from runtime.parallel import global_sum
from routers import Stats, build_router


def hidden_rows(width, activation):
    """Rows of the first matrix: swiglu stacks [gate | up]."""
    return 2 * width if activation == "swiglu" else width


def activation_of(h, kind):
    """Non-linearity of the pre-activation: (..., 2n) -> (..., n) for swiglu, else (..., n) -> (..., n)."""
    if kind == "swiglu":
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up
    return ACTIVATIONS[kind](h)


def compute_dtype(x):
    """Of matrix products: autocast's, which does not reach F.grouped_mm, where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class MLP(nn.Module):
    """One feed-forward layer, (..., d) -> (..., d), hidden width `width`."""

    def __init__(self, d, width, activation):
        super().__init__()
        self.activation = activation
        self.w_in = nn.Linear(d, hidden_rows(width, activation), bias=False)
        self.w_out = nn.Linear(width, d, bias=False)

    def forward(self, x):
        return self.w_out(activation_of(self.w_in(x), self.activation))

    def num_params(self):
        return self.w_in.weight.numel() + self.w_out.weight.numel()


class Dense(nn.Module):
    """The dense layer in the feed-forward slot: one expert that every token visits."""

    def __init__(self, d, width, activation):
        super().__init__()
        self.mlp = MLP(d, width, activation)

    def forward(self, x, ctx):
        zero = torch.zeros((), device=x.device)
        load = torch.full((1,), float(ctx.token_ids.numel()), device=x.device)
        return self.mlp(x), Stats(zero, zero, zero, load, zero, zero, torch.zeros_like(ctx.token_ids))

    def inactive_params(self):
        return 0

    def flops_per_token(self):
        return 2 * self.mlp.num_params()


class Experts(nn.Module):
    """E feed-forward layers of hidden width n as two 3-D parameters."""

    def __init__(self, n_expert, d, width, activation):
        super().__init__()
        self.activation = activation
        self.w_in = nn.Parameter(torch.empty(n_expert, hidden_rows(width, activation), d))   # (E, n or 2n, d)
        self.w_out = nn.Parameter(torch.empty(n_expert, d, width))                               # (E, d, n)


def dispatch_loop(x, routing, experts):
    """The path to read first: for each expert, gather its tokens, run it, add the weighted result back.

    x (N, d) -> (N, d). Any dtype, any width: the oracle of the others. It waits for the host once per expert.
    """
    y = torch.zeros_like(x)
    weight = pair_weights(routing, x.dtype)
    for e in range(experts.w_in.shape[0]):
        pair = (routing.expert == e).nonzero().squeeze(1)                  # pairs of expert e, in token order
        token = routing.token.index_select(0, pair)
        h = x.index_select(0, token) @ experts.w_in[e].to(x.dtype).T           # (rows, n or 2n)
        a = activation_of(h, experts.activation) * weight.index_select(0, pair).unsqueeze(1)
        y = y.index_add(0, token, a @ experts.w_out[e].to(x.dtype).T)
    return y


def dispatch_padded(x, routing, experts, slots=None):
    """Every expert gets the same number of slots, (E, slots, d), and all run as one batched product (GShard,
    Switch).

    slots: at least the largest load, else pairs beyond it get no slot; None takes the largest load, which
    waits for the host. Pairs that the routing drops take no slot. x (N, d) -> (N, d).
    """
    E, d = experts.w_in.shape[0], x.shape[1]
    rank = rank_in_expert(routing, E)                                       # (P,) place in the expert's queue
    slots = slots or max(int(rank.max()) + 1, 1)
    used = (rank >= 0) & (rank < slots)
    # One row past the end takes the pairs without a slot; it is cut off on the way in and zero on the way
    # back.
    place = torch.where(used, routing.expert * slots + rank, E * slots)
    queue = x.new_zeros(E * slots + 1, d).index_copy(0, place, x.index_select(0, routing.token))
    h = torch.bmm(queue[:-1].view(E, slots, d), experts.w_in.to(x.dtype).transpose(1, 2))
    out = torch.bmm(activation_of(h, experts.activation), experts.w_out.to(x.dtype).transpose(1, 2))
    out = torch.cat([out.view(E * slots, d), x.new_zeros(1, d)]).index_select(0, place)          # (P, d)
    return torch.zeros_like(x).index_add(0, routing.token, out * pair_weights(routing, x.dtype).unsqueeze(1))


def dispatch_grouped(x, routing, experts, fused=False, function=None):
    """Sort the pairs by expert, run all experts in one grouped product, bring the results home. x (N, d) ->
    (N, d).

    Every shape is known without looking at the loads: they live in the values of `offsets`. No host
    synchronisation, no graph break, no recompilation. Needs widths that divide into 16 bytes (see
    grouped_refusal).
    """
    E = experts.w_in.shape[0]
    narrow = torch.int16 if E < 2 ** 15 else torch.int64                # fewer digits for the radix sort
    sorted_expert, order = torch.sort(routing.expert.to(narrow), stable=True)
    ids = torch.arange(E, dtype=narrow, device=x.device)
    offsets = torch.searchsorted(sorted_expert, ids, right=True, out_int32=True)     # (E,) ends of the groups
    token = routing.token.index_select(0, order)
    gate = pair_weights(routing, torch.float32).index_select(0, order)
    if function is None:
        function = ExpertByExpert if pays_by_expert(x, token, experts) and not fused else GroupedExperts
    return function.apply(x, experts.w_in.to(x.dtype), experts.w_out.to(x.dtype), gate, order, token, offsets,
                          routing.k, experts.activation, fused)


def pays_by_expert(x, token, experts):
    """Where ExpertByExpert is the faster one (lab/bench.py moe): eager float32 on a CPU, and more than 2^25
    multiplications in an expert's first product. Below, its dozen calls for each expert cost more than they
    save."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    E, n, d = experts.w_in.shape
    return token.numel() * n * d > E * 2 ** 25


def dispatch_fused(x, routing, experts):
    """dispatch_grouped with the Triton kernels of kernels.py moving rows and applying the gated
    activation."""
    return dispatch_grouped(x, routing, experts, fused=True)


DISPATCH = dict(loop=dispatch_loop, padded=dispatch_padded, grouped=dispatch_grouped, fused=dispatch_fused)


def pair_weights(routing, dtype):
    """(P,) gates, 0 where the pair does not travel."""
    weight = routing.weight if routing.keep is None else routing.weight * routing.keep
    return weight.to(dtype)


def rank_in_expert(routing, n_expert):
    """Place of each pair in its expert's queue, in pair order, (P,); -1 for pairs that do not travel."""
    expert = routing.expert if routing.keep is None else torch.where(routing.keep, routing.expert, n_expert)
    held, order = torch.sort(expert, stable=True)
    start = torch.searchsorted(held, torch.arange(n_expert + 1, device=held.device))
    rank = torch.arange(held.numel(), device=held.device) - start.index_select(0, held)
    rank = torch.where(held < n_expert, rank, -1)
    return torch.empty_like(rank).scatter_(0, order, rank)


def limit_capacity(routing, n_expert, slots, shape):
    """The routing with only the first `slots` pairs of each expert kept (Switch 2101.03961 sec. 2.2). Earlier
    positions go first, at one position first choices before second ones, then in the order of the sequences.
    So no token's place depends on what comes after it, though sequences compete for slots; GShard (2006.16668
    alg. 1) serves all first choices before any second one. shape = (B, T)."""
    (B, T), k = shape, routing.k

    def by_position(t):                          # (P,) in token order -> position, then choice, then sequence
        return t.view(B, T, k).permute(1, 2, 0).reshape(-1)

    keep = None if routing.keep is None else by_position(routing.keep)
    queue = routing._replace(expert=by_position(routing.expert), keep=keep)
    rank = rank_in_expert(queue, n_expert)
    kept = ((rank >= 0) & (rank < slots)).view(T, k, B).permute(2, 0, 1).reshape(-1)
    return routing._replace(keep=kept)


def grouped_refusal(experts, dtype):
    """Why F.grouped_mm cannot run these experts in `dtype`, or an empty text: rows must be multiples of 16
    bytes."""
    per_row = {torch.bfloat16: 8, torch.float16: 8, torch.float32: 4}.get(dtype)
    d, n = experts.w_out.shape[1:]
    if per_row is None:
        return f"F.grouped_mm has no {dtype}"
    if d % per_row or n % per_row:
        return f"widths n_embd = {d} and expert {n} must be multiples of {per_row} in {str(dtype)[6:]}"
    return ""


def choose_dispatch(wanted, experts, x):
    """The path that `ffn.dispatch = auto` takes, and the refusal of an explicit one that cannot run.

    CPU: grouped (never fused, which a CPU could only interpret). CUDA with Triton: fused, whose kernels move
    each row once and keep nothing but layer input and pre-activation. Widths that the grouped product
    refuses, and dtypes that it does not know, take the loop. Raises ValueError for an explicit grouped or
    fused that cannot run.
    """
    refusal = grouped_refusal(experts, x.dtype)
    if wanted in ("grouped", "fused") and refusal:
        raise ValueError(f"ffn.dispatch = \"{wanted}\" cannot run: {refusal}; use \"auto\" or \"loop\"")
    if wanted == "fused" and not use_triton(x):
        raise ValueError("ffn.dispatch = \"fused\" needs a CUDA device and Triton; use \"auto\" or "
                         "\"grouped\"")
    if wanted != "auto":
        return wanted
    return "loop" if refusal else "fused" if x.is_cuda and use_triton(x) else "grouped"


class MoE(nn.Module):
    """Router, experts, shared experts, balancing: the sparse feed-forward layer.

    y = sum over the token's experts of p_i E_i(x), plus the shared experts: n_shared of them are one MLP
    n_shared times as wide (the same function), weighed by sigmoid(x w) if shared_gate (Qwen2 2407.10671).
    """

    def __init__(self, config, d, vocab_size, layer):
        super().__init__()
        self.config = config
        width = config.d_shared or config.n_shared * config.expert_width
        self.router = build_router(config, d, vocab_size, layer)
        self.experts = Experts(config.experts, d, config.expert_width, config.activation)
        self.shared = MLP(d, width, config.activation) if width else None
        self.shared_gate = nn.Linear(d, 1, bias=False) if config.shared_gate else None
        self.norm = nn.LayerNorm(d, bias=False) if config.output_norm else None

    def forward(self, x, ctx):
        c, (B, T, d) = self.config, x.shape
        flat = x.reshape(B * T, d).to(compute_dtype(x))
        routing = self.router(flat, ctx)                                    # 1. every token chooses
        load = expert_counts(routing.expert, c.experts, routing.keep)   # 2. count, before anything is dropped
        aux, balance, z = auxiliary_losses(routing, load, c, (B, T))
        factor = c.capacity_factor if self.training else c.eval_capacity_factor
        slots, dropped = None, torch.zeros((), device=x.device)
        if factor and not ctx.generating:                                   # 3. queues of limited length
            slots = min(B * T, -int(-factor * routing.expert.numel() // c.experts))
            routing = limit_capacity(routing, c.experts, slots, (B, T))
            dropped = 1 - routing.keep.sum() / load.sum()
        y = self.travel(flat, routing, slots).view(B, T, d)                 # 4. there and back
        if self.shared is not None:                                         # 5. what every token visits
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)
        y = y if self.norm is None else self.norm(y)
        policy = (None if t is None else t.view(B, T) for t in (routing.log_prob, routing.baseline))
        return y, Stats(aux, balance, z, load, dropped, entropy(routing.probs, load),
                        top_expert(routing, (B, T)), *policy)

    def travel(self, x, routing, slots):
        path = choose_dispatch(self.config.dispatch, self.experts, x)
        if path == "padded":
            return dispatch_padded(x, routing, self.experts, slots)
        return DISPATCH[path](x, routing, self.experts)

    def inactive_params(self):
        """Parameters of the routed experts that a token does not visit."""
        one = self.experts.w_in[0].numel() + self.experts.w_out[0].numel()
        return one * (self.config.experts - self.config.active)

    def flops_per_token(self):
        """Forward FLOPs: a multiply-add per parameter that the token meets, router and shared experts
        included."""
        return 2 * (sum(p.numel() for p in self.parameters() if p.dim() > 1) - self.inactive_params())

    def update_bias(self, load):
        """After each optimizer step, with the (E,) load of the whole step: moves the selection bias of
        loss_free. Experts whose routes are frozen keep theirs; the others are balanced among themselves."""
        first = self.config.n_frozen if self.config.frozen_routes else 0
        if self.config.balance == "loss_free" and first < self.config.experts:
            update_bias(self.router.bias[first:], load[first:], self.config.bias_rate)


def entropy(probs, load):
    """Mean entropy of the routing distribution in nats; without probabilities that of the load."""
    if probs is None:
        load = global_sum(load)
        probs = (load / load.sum()).unsqueeze(0)
    p = probs.detach()
    return -(p * p.clamp_min(1e-20).log()).sum(-1).mean()


def top_expert(routing, shape):
    """(B, T) expert of largest weight; expert choice: the expert that scores the token highest."""
    if not routing.k:
        return routing.probs.argmax(-1).view(shape)
    best = routing.weight.view(-1, routing.k).argmax(-1, keepdim=True)
    return routing.expert.view(-1, routing.k).gather(1, best).view(shape)
