"""How tokens travel: experts, four ways to dispatch tokens to them, and the MoE layer in five steps.

Design decisions:
- Experts are 3-D parameters (E, out, in): one optimizer entry, and what grouped products take without a copy.
- The routing weight multiplies the activation, not the expert's output: W2 (p act(h)) = p W2 act(h), but the
  (P, d) output need not be kept for the router's gradient, which is then a product over w numbers, not d.
- The grouped path keeps layer input and pre-activation for backward and computes everything else again.
- Dropless is the default. A dropped pair has weight 0, so that all paths agree on what a capacity limit means.

Letters as in ffn.py: N tokens, d width, E experts of hidden width w, k choices of a token, P = N k pairs.
"""
from functools import partial

import torch
from torch import nn

from balance import (BY_BIAS, OF_MICRO_BATCH, auxiliary_losses, coefficients, entropy, expert_counts,
                     remember_prices, update_bias, update_quantile)
from ffn import MLP, FeedForward, Stats, activation_of, by_hand, draw, hidden_rows
from routers import ROUTERS, Routing, top_expert, visited
from runtime.parallel import announce, exchange, held


class Experts(nn.Module):
    """E feed-forward layers of hidden width w as two 3-D parameters."""

    def __init__(self, n_expert, d, width, activation):
        super().__init__()
        self.activation, self.spread = activation, False    # spread over processes: parallel.share_experts
        self.w_in = nn.Parameter(torch.empty(n_expert, hidden_rows(width, activation), d))   # (E, w or 2w, d)
        self.w_out = nn.Parameter(torch.empty(n_expert, d, width))                           # (E, d, w)


def pair_weights(routing, dtype):
    """(P,) gates, 0 where the pair does not travel."""
    weight = routing.weight if routing.keep is None else routing.weight * routing.keep
    return weight.to(dtype)


def dispatch_loop(x, routing, experts):
    """The path to read first: for each expert, gather its tokens, run it, add the weighted result back.

    x (N, d) -> (N, d). Any dtype, any width: the oracle of the others. It waits for the host per expert."""
    y = torch.zeros_like(x)
    weight = pair_weights(routing, x.dtype)
    for e in range(experts.w_in.shape[0]):
        # the pairs of expert e, in token order, and their tokens
        pair = (routing.expert == e).nonzero().squeeze(1)
        token = routing.token.index_select(0, pair)
        # p W2 act(W1 x), the gate applied once, after the activation
        h = x.index_select(0, token) @ experts.w_in[e].to(x.dtype).T                    # (rows, w or 2w)
        a = activation_of(h, experts.activation) * weight.index_select(0, pair).unsqueeze(1)
        # home again: each row is added to its token
        y = y.index_add(0, token, a @ experts.w_out[e].to(x.dtype).T)
    return y


def rank_in_expert(routing, n_expert):
    """Place of each pair in its expert's queue, in pair order, (P,); -1 for pairs that do not travel."""
    # pairs that do not travel queue at an expert number E
    expert = routing.expert if routing.keep is None else torch.where(routing.keep, routing.expert, n_expert)
    # sorted by expert, a pair's rank is its place minus where its expert's pairs begin
    held, order = torch.sort(expert, stable=True)
    start = torch.searchsorted(held, torch.arange(n_expert + 1, device=held.device))
    rank = torch.arange(held.numel(), device=held.device) - start.index_select(0, held)
    rank = torch.where(held < n_expert, rank, -1)
    # back from sorted order to pair order
    return torch.empty_like(rank).scatter_(0, order, rank)


def dispatch_padded(x, routing, experts, slots=None):
    """All experts have equally many slots, (E, slots, d), and run as one batched product (GShard, Switch). x
    (N, d) -> (N, d). slots: pairs beyond it get none; None takes the largest load, which waits for the host.
    Pairs that the routing drops take no slot."""
    E, d = experts.w_in.shape[0], x.shape[1]
    rank = rank_in_expert(routing, E)                                                   # (P,)
    slots = slots or max(int(expert_counts(routing.expert, E, routing.keep).max()), 1)
    used = (rank >= 0) & (rank < slots)
    # one row past the end takes the pairs without a slot: cut off on the way in, zero on the way back
    place = torch.where(used, routing.expert * slots + rank, E * slots)                 # (P,)
    queue = x.new_zeros(E * slots + 1, d).index_copy(0, place, x.index_select(0, routing.token))
    # all experts at once, (E, slots, d) -> (E, slots, w or 2w) -> (E, slots, d)
    h = torch.bmm(queue[:-1].view(E, slots, d), experts.w_in.to(x.dtype).transpose(1, 2))
    out = torch.bmm(activation_of(h, experts.activation), experts.w_out.to(x.dtype).transpose(1, 2))
    # each pair's row, weighted, is added to its token
    out = torch.cat([out.view(E * slots, d), x.new_zeros(1, d)]).index_select(0, place)             # (P, d)
    return torch.zeros_like(x).index_add(0, routing.token, out * pair_weights(routing, x.dtype).unsqueeze(1))


def dispatch_grouped(x, routing, experts, fused=False, function=None):
    """Sort the pairs by expert, run all in one grouped product, bring the results home. x (N, d) -> (N, d).

    Every shape is known without looking at the loads, which are values of `offsets`: nothing waits for the
    host or is compiled again. Widths must divide into 16 bytes (kernels.moe.grouped_refusal). fused: with the
    Triton kernels. function: one of the autograd Functions of kernels/moe.py; None takes the faster one.
    """
    from kernels.moe import pick_function                   # fast paths are read where they are used
    from kernels.order import expert_order
    # a stable sort of the pairs by expert: which pair comes at each place and where each pair goes, token and
    # gate at each place, (P,), and where each expert's pairs end, (E,), as the grouped product wants it
    order, inverse, token, gate, offsets = expert_order(
        routing.expert, routing.token, pair_weights(routing, torch.float32), experts.w_in.shape[0], fused)
    # every expert's rows by its own two matrices, and back to their tokens
    function = function or pick_function(x, token, experts, fused)
    return function.apply(x, experts.w_in.to(x.dtype), experts.w_out.to(x.dtype), gate, order, inverse, token,
                          offsets, routing.k, experts.activation, fused)


# fused is grouped, with the Triton kernels of kernels/moe.py moving rows and applying the gated activation
DISPATCH = dict(loop=dispatch_loop, padded=dispatch_padded, grouped=dispatch_grouped,
                fused=partial(dispatch_grouped, fused=True))


def dispatch_across(x, routing, experts, path):
    """Experts that are spread: rows travel to the process of their expert, by the path `path` through it, and
    home. x (N, d) -> (N, d), the tokens of this process, which may choose any expert."""
    # first how many rows will come; pairs that do not travel have an expert number E
    E = len(experts.w_in)
    expert = routing.expert if routing.keep is None else torch.where(routing.keep, routing.expert, E)
    sent, came, visited_here = announce(expert, E)
    # then the rows and their gates, in the order of their experts, and so of the processes
    order = torch.sort(expert, stable=True).indices[:sum(sent)]
    token = routing.token.index_select(0, order)
    rows = exchange(x.index_select(0, token), sent, came)                               # (rows, d)
    gate = exchange(routing.weight.index_select(0, order), sent, came)
    # each that came is a token with one expert; home, and to their tokens
    visits = Routing(visited_here, gate, torch.arange(len(rows), device=x.device), 1)
    y = exchange(DISPATCH[path](rows, visits, held(experts)), came, sent)
    return torch.zeros_like(x).index_add(0, token, y)


def limit_capacity(routing, n_expert, slots, shape):
    """The routing with only the first `slots` pairs of each expert kept (Switch 2101.03961 sec. 2.2). Earlier
    positions go first, so that none depends on what comes after it; at one position first choices, then the
    first sequences. GShard (2006.16668 alg. 1) serves all first choices before. shape = (B, T)."""
    (B, T), k = shape, routing.k

    def by_position(t):                          # (P,) in token order -> position, then choice, then sequence
        return t.view(B, T, k).permute(1, 2, 0).reshape(-1)

    # the queue in that order, and each pair's place in it
    keep = None if routing.keep is None else by_position(routing.keep)
    queue = routing._replace(expert=by_position(routing.expert), keep=keep)
    rank = rank_in_expert(queue, n_expert)
    # back to token order: who came in time
    kept = ((rank >= 0) & (rank < slots)).view(T, k, B).permute(2, 0, 1).reshape(-1)
    return routing._replace(keep=kept)


def choose_dispatch(wanted, experts, x):
    """The path that `ffn.dispatch = auto` takes; ValueError for an explicit grouped or fused that cannot run."""
    from kernels.common import use_triton
    from kernels.moe import grouped_refusal
    refusal = grouped_refusal(experts, x.dtype)
    if wanted in ("grouped", "fused") and refusal:
        raise ValueError(f"ffn.dispatch = \"{wanted}\" cannot run: {refusal}; use \"auto\" or \"loop\"")
    if wanted == "fused" and not use_triton(x):
        raise ValueError('ffn.dispatch = "fused" needs a CUDA device and Triton; use "auto" or "grouped"')
    if wanted != "auto":
        return wanted
    # auto: the loop for what the grouped paths refuse; fused on CUDA alone: a CPU could only interpret it
    if refusal:
        return "loop"
    return "fused" if x.is_cuda and use_triton(x) else "grouped"


def compute_dtype(x):
    """Of matrix products: autocast's, which does not reach F.grouped_mm, where it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class MoE(FeedForward):
    """Router, experts, shared experts, balancing: the sparse feed-forward layer.

    y = sum over the token's experts of p_i E_i(x), plus the shared experts: n_shared of them are one MLP
    n_shared times as wide (the same function), weighed by sigmoid(x w) if shared_gate (Qwen2 2407.10671).
    inserted (BASE): x is the residual stream, the router reads x, experts LN(x), and their second matrices
    start at 0. LN is one for all: an expert's own scale is part of its first matrix, its own shift left out.

    MoE(config, d, vocab_size, layer, n_layer): an FFNConfig, completed and checked (ConfigError) if it was
    made by hand; vocab_size and layer are for hash tables. A loop of one's own calls after_step(load).
    """
    columns = ("router", "n_expert", "top_k", "granularity", "output_norm")
    reads = ("n_expert", "top_k", "granularity", "d_expert", "n_shared", "d_shared", "shared_gate",
             "output_norm", "n_frozen", "frozen_routes", "router", "balance", "z_loss", "dispatch",
             "capacity_factor", "eval_capacity_factor", "inserted")

    def __init__(self, config, d, vocab_size=0, layer=0, n_layer=1):
        super().__init__()
        if not (config.d_ff and config.topk_groups) or config.balance == "auto":
            config = by_hand(config, d, fill_choices, self.checks)
        self.config = config
        width = config.d_shared or config.n_shared * config.expert_width
        self.router = ROUTERS[config.router](config, d, vocab_size, layer)
        self.experts = Experts(config.experts, d, config.expert_width, config.activation)
        self.shared = MLP(d, width, config.activation) if width else None
        self.shared_gate = nn.Linear(d, 1, bias=False) if config.shared_gate else None
        self.norm = nn.LayerNorm(d, bias=False) if config.output_norm else None
        self.n_expert, self.n_active, self.n_frozen = config.experts, visited(config), config.n_frozen
        self.steerable, self.inserted = self.router.traits.steerable, config.inserted
        with torch.random.fork_rng(devices=[]):         # whole by itself; a GPT draws once more, in its order
            self.init_weights(n_layer)

    def init_weights(self, n_layer):
        """No expert starts like another, nor, if not inserted, at zero. The router's constructor drew it."""
        draw(self.experts.w_in)
        draw(self.experts.w_out, n_layer)
        if self.inserted:
            nn.init.zeros_(self.experts.w_out)
        if self.shared is not None:
            self.shared.init_weights(n_layer)
        if self.shared_gate is not None:
            nn.init.zeros_(self.shared_gate.weight)

    def forward(self, x, ctx):
        c, (B, T, d) = self.config, x.shape
        flat = x.reshape(B * T, d).to(compute_dtype(x))
        # 1. every token chooses
        routing = self.router(flat, ctx)
        if self.inserted:
            x = nn.functional.layer_norm(x, (d,))
            flat = x.reshape(B * T, d).to(flat.dtype)
        # 2. count before anything is dropped; the losses that keep the choice even, and what a batch does so
        load = expert_counts(routing.expert, c.experts, routing.keep)                   # (E,)
        aux, balance, z = auxiliary_losses(routing, load, c, (B, T))
        if self.training and c.balance == "quantile":
            update_quantile(self.router.bias, routing.logits.detach().sigmoid(), self.n_active)
        if routing.prices is not None:
            remember_prices(self.router, routing.prices)
        # 3. queues of limited length, if there is a limit
        factor = c.capacity_factor if self.training else c.eval_capacity_factor
        slots, dropped = None, torch.zeros((), device=x.device)
        if factor and not ctx.generating:
            # factor P / E, rounded up, in whole numbers: 1.1 x 200 / 4 in floating point is above 55
            slots = min(B * T, -(-round(factor * 10**12) * routing.expert.numel() // (c.experts * 10**12)))
            routing = limit_capacity(routing, c.experts, slots, (B, T))
            dropped = 1 - routing.keep.sum() / load.sum()
        # 4. there and back; one new token of each text on a card goes by the path that waits for nothing
        path = choose_dispatch(c.dispatch, self.experts, flat)
        if ctx.generating and T == 1 and x.is_cuda:
            path, slots = "padded", B
        more = dict(slots=slots) if path == "padded" else {}
        go = partial(dispatch_across, path=path) if self.experts.spread else partial(DISPATCH[path], **more)
        y = go(flat, routing, self.experts).view(B, T, d)
        # 5. what every token visits
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)
        if self.norm is not None:
            y = self.norm(y)
        log_prob, baseline = routing.log_prob, routing.baseline
        return y, Stats(load, top_expert(routing, (B, T)), aux, balance, z, dropped,
                        entropy(routing.probs, load), None if self.training else routing,
                        None if log_prob is None else log_prob.view(B, T),
                        None if baseline is None else baseline.view(B, T))

    def after_step(self, load):
        """Moves the selection bias of loss_free."""
        # experts whose routes are frozen keep theirs; the others are balanced among themselves
        first = self.n_frozen if self.config.frozen_routes else 0
        if self.config.balance == "loss_free" and first < self.n_expert:
            update_bias(self.router.bias[first:], load[first:], self.config.bias_rate)

    def set_token_counts(self, counts):
        self.router.set_token_counts(counts)

    @staticmethod
    def checks(config):
        from runtime.fits import moe_checks                         # what fits together, and the words for it
        return moe_checks(config, {name: router.traits for name, router in ROUTERS.items()}, visited(config.ffn))

    def describe(self, dtype):
        from kernels.moe import grouped_refusal
        c, weight = self.config, self.experts.w_in
        x = torch.empty(0, dtype=dtype, device=weight.device)
        path, refusal = choose_dispatch(c.dispatch, self.experts, x), grouped_refusal(self.experts, dtype)
        why = f" ({refusal})" if c.dispatch == "auto" and refusal else ""
        # what acts on the router beside the loss of the text, by its setting
        own = [name for name in self.router.traits.reads if name.endswith("_loss")]
        losses = ", ".join(f"{name} {getattr(c, name):g}" for name in (*coefficients(c.balance), "z_loss", *own)
                           if getattr(c, name))
        return (f"{self.n_expert} experts, {self.n_active} a token, router {c.router}, balance {c.balance}"
                f"{losses and f' ({losses})'}, dispatch {path}{why}")

    def remarks(self):
        c, traits = self.config, self.router.traits
        label = "; ".join(filter(None, [traits.looks(), traits.sampling]))
        found = [f"router {c.router}: {label}"] if label else []
        if c.eval_capacity_factor:
            found.append(f"ffn.eval_capacity_factor = {c.eval_capacity_factor}: sequences compete for slots in "
                         "evaluation; sampling drops nothing")
        return found

    def inactive_params(self):
        one = self.experts.w_in[0].numel() + self.experts.w_out[0].numel()
        return one * (self.n_expert - self.n_active)

    def by_parts(self):
        c, traits = self.config, self.router.traits
        counted = c.balance in OF_MICRO_BATCH and any(getattr(c, name) for name in coefficients(c.balance))
        counted = counted or c.balance == "quantile"
        noise = traits.noise and (c.jitter or "jitter" not in traits.reads)
        found = [(traits.across or noise, "ffn.router"),
                 (c.capacity_factor, "ffn.capacity_factor"), (counted, "ffn.balance")]
        return [key for true, key in found if true]

    def not_compiled(self):
        why = "train.parallel expert: loads decide how many rows travel" if self.experts.spread else ""
        return why if self.router.traits.compiles else f"ffn.router {self.config.router}: its work depends on data"

    def not_captured(self, dtype):
        path = choose_dispatch(self.config.dispatch, self.experts, self.experts.w_in.new_empty(0, dtype=dtype))
        # F.grouped_mm is one kernel in bfloat16, elsewhere a product for each group, whose ends it asks for
        known = path == "padded" and self.config.capacity_factor or path in ("grouped", "fused") and (
            dtype == torch.bfloat16)
        return self.not_compiled() or ("" if known else f"dispatch {path} in {str(dtype)[6:]}: it waits for loads")

    def not_grown(self):
        return self.router.traits.not_grown

    def remedy(self):
        if not self.steerable:
            return self.router.traits.remedy
        if self.config.balance == "none":
            return "ffn.balance = \"none\" lets them: set it to \"auto\" or \"switch\""
        if self.config.balance == "loss_free":
            return "A larger ffn.bias_rate, or a lower train.lr"
        return "A larger ffn.balance_loss, a lower train.lr, or a router that draws noise (noisy_topk)"


def fill_choices(config, d=0):
    """Sets what of a Config's [ffn] follows from the router: groups and balance."""
    f = config.ffn
    f.topk_groups = f.topk_groups or f.n_groups
    if f.balance == "auto":
        f.balance = ROUTERS[f.router].traits.balance
    # a bias balances without a loss, unless one is asked for
    if f.balance in BY_BIAS and "ffn.balance_loss" not in config.sources and f.balance_loss == 0.01:
        f.balance_loss = 0.0
