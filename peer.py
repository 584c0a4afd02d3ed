"""A million experts: product-key retrieval, PEER (2407.04153), and PKM (1907.05242), which it grew from.

An expert is one neuron, e_i(x) = act(x . u_i) v_i; a token uses R = h k of the E = m^2 there are:

    q = norm(x W_q)                     h queries, each cut into two halves q', q"
    s_ij = q' . c_i + q" . c'_j         score of expert i m + j: 2 m dot products make m^2 scores
    y = sum over heads and their k best experts of softmax(s) act(x . u) v          (PKM: softmax(s) v)

`retrieve` and `experts_readable` are the paper. The fast paths, in kernels/, never hold the gathered rows
(N, R, 2, d): 256 KiB a token at R = 128, d = 256, each of them used once.

- u_i and v_i lie side by side in one table (E, 2, d), which all heads share: one index, one gradient.
- Queries, scores and gates are float32, also under autocast: a rounded score flips a choice. So are tables.
- loss.backward() adds a table's gradient to the .grad that is there: see kernels.peer.GatheredExperts.

Letters as in ffn.py: N tokens, d width, E experts, h heads, k experts of a head, R = h k rows of a token,
m sub-keys of each half (n_keys); here also p, the 2 halves of a query, and c, the width of one.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from ffn import ACTIVATIONS, FeedForward, Stats, by_hand
from runtime.parallel import global_mean, world


class BatchNorm(nn.Module):
    """Batch norm of (N, width). Evaluation goes by running statistics alone: no token depends on its neighbours.
    Training goes by the micro-batch of all processes, where padding counts as text. ValueError for one token."""

    def __init__(self, width, momentum=0.1):
        super().__init__()
        self.momentum = momentum
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.mean, self.var, self.weight, self.bias)
        if len(x) * world() < 2:
            raise ValueError('ffn.query_norm = "batchnorm" cannot train on one token; take "layernorm"')
        # several processes: by the moments of all of them, of which the variance is remembered unbiased
        if world() > 1:
            mean, n = global_mean(x.mean(0)), len(x) * world()
            var = global_mean((x - mean).square().mean(0))
            self.remember(mean.detach(), var.detach() * (n / (n - 1)))
            return (x - mean) * (var + 1e-5).rsqrt() * self.weight + self.bias
        with torch.no_grad():
            var, mean = torch.var_mean(x, 0)
            self.remember(mean, var)
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)

    def remember(self, mean, var):
        """Moves the running statistics: the mean over all batches until there are 1 / momentum of them, then
        a moving average. (The usual start at 0 and 1 still weighs 12 % after 20 steps.)"""
        self.batches += 1
        rate = (1 / self.batches).clamp_min(self.momentum)
        self.mean.lerp_(mean, rate)
        self.var.lerp_(var, rate)


class Queries(nn.Module):
    """x (N, d) -> (N, h, 2, c): linear, then batchnorm of 2hc features, layernorm of each query, or none."""

    def __init__(self, d, heads, d_key, norm):
        super().__init__()
        self.heads, self.weight = heads, nn.Parameter(torch.randn(heads * d_key, d) * d ** -0.5)
        if norm == "batchnorm":
            self.norm = BatchNorm(heads * d_key)
        else:
            self.norm = nn.LayerNorm(d_key) if norm == "layernorm" else nn.Identity()

    def forward(self, x):
        from kernels.parts import linear32                  # F.linear, on tensor cores where that pays
        q = linear32(x, self.weight)                                                    # (N, 2hc)
        q = q.view(len(x), self.heads, -1) if isinstance(self.norm, nn.LayerNorm) else q
        return self.norm(q).view(len(x), self.heads, 2, -1)


def cartesian_candidates(k):
    """Ranks (i, j), two int64 tensors, of the pairs that can be among the k largest sums of two descending
    lists: those with (i + 1)(j + 1) <= k, 50 of 256 at k = 16."""
    # each other pair is matched or beaten by k pairs of better ranks, so that leaving it out changes no value
    # of the top k, ties and rounded sums included
    rank = torch.arange(1, k + 1)
    return (rank[:, None] * rank <= k).nonzero(as_tuple=True)


def retrieve(q, sub_keys, k, candidates, topk):
    """The k best of the m^2 experts for each query: q (N, h, 2, c), sub_keys (2, m, c), or of each head's own
    (h, 2, m, c) -> scores (N, h, k), descending, and experts (N, h, k) int32. Exact; to which of equal ones
    the scores belong is up to `topk`, the function that finds the k best sub-keys of each half."""
    if sub_keys.dim() == 3:
        scores, indices = topk(q, sub_keys, k)                                          # (N, h, 2, k)
    else:
        each = [topk(one, own, k) for one, own in zip(q.split(1, 1), sub_keys)]         # h times (N, 1, 2, k)
        scores, indices = (torch.cat(part, 1) for part in zip(*each))
    first, second = scores.unbind(2)                                                    # (N, h, k) each
    i, j = candidates                                                                   # 50 pairs at k = 16
    # s_ij = q' . c_i + q" . c'_j of the candidates, and the k best of them
    best, at = (first.index_select(2, i) + second.index_select(2, j)).topk(k, -1)
    # expert i m + j, from the sub-keys' own numbers
    first, second = indices.unbind(2)
    expert = first.index_select(2, i) * sub_keys.shape[-2] + second.index_select(2, j)
    return best, expert.gather(2, at).int()


def topk_readable(q, sub_keys, k):
    """Scores and indices (N, h, 2, k) of the k best sub-keys of each half."""
    return torch.einsum("nhpc,pmc->nhpm", q, sub_keys).topk(k, -1)


def experts_readable(x, table, idx, gate, activation):
    """The path to read first, and the oracle of the others; any dtype. x (N, d), table (E, 2, d), experts idx
    (N, R), gate (N, R) -> y (N, d). PKM: table (E, 1, d), which holds v alone, and activation None."""
    rows = table.index_select(0, idx.flatten()).view(*idx.shape, *table.shape[1:])      # (N, R, 2, d)
    *u, v = rows.unbind(2)
    # act(x . u) weighs v, beside the router's gate
    if activation:
        gate = ACTIVATIONS[activation](torch.einsum("nd,nrd->nr", x, *u)) * gate        # (N, R)
    return torch.einsum("nr,nrd->nd", gate, v)


def second_moment(activation):
    """E[act(z)^2] for z ~ N(0, 1/2), what a first matrix of ffn.draw gives; swiglu: times E[up^2] = 1/2."""
    z = torch.linspace(-6, 6, 2001, device="cpu", dtype=torch.float64)
    p = (-z.square()).exp()
    function, factor = (F.silu, 0.5) if activation == "swiglu" else (ACTIVATIONS[activation], 1)
    return (function(z).square() @ p / p.sum()).item() * factor


class PEER(FeedForward):
    """The feed-forward layer of single-neuron experts (kind "peer"), or of values without neurons ("pkm").

    PEER(config, d, n_layer=L): an FFNConfig, completed and checked (ConfigError) if made by hand. Stats.load is
    the router weight of each expert. Causal, and no sequence sees another, but for BatchNorm in training.
    """
    many = True
    steerable = True
    columns = ("n_keys", "peer_heads", "peer_top_k")
    reads = ("n_keys", "peer_heads", "peer_top_k", "keys_per_head", "d_key", "query_norm", "peer_score",
             "peer_activation", "peer_path")

    def __init__(self, config, d, vocab_size=0, layer=0, n_layer=1):
        super().__init__()
        if not (config.d_ff and config.d_key):
            config = by_hand(config, d, fill_keys, self.checks)
        self.config = config
        self.n_expert = config.n_keys ** 2
        self.n_active = config.peer_heads * config.peer_top_k
        self.activation = config.peer_activation if config.kind == "peer" else None
        self.queries = Queries(d, config.peer_heads, config.d_key, config.query_norm)
        own = [config.peer_heads] if config.keys_per_head else []
        self.sub_keys = nn.Parameter(torch.empty(*own, 2, config.n_keys, config.d_key // 2))
        self.table = nn.Parameter(torch.empty(self.n_expert, 2 if self.activation else 1, d))
        self.table.keep_grad = True             # 2 GiB of fresh memory cost a CPU more than filling it
        with torch.device("cpu"):                                       # nonzero() has no meta version
            candidates = torch.stack(cartesian_candidates(config.peer_top_k))
        self.register_buffer("candidates", candidates.to(self.table.device), persistent=False)
        self.draw_weights(n_layer)              # here and not in init_weights: a million rows are drawn once

    @torch.no_grad()
    def draw_weights(self, n_layer):
        """So that the output starts with the variance of the dense layer in its place, E[act^2] / (4 n_layer) by
        ffn.draw. Here it is var(v) E[act^2] S, S the expected sum of a token's squared gates over experts."""
        c, h, k, E = self.config, self.config.peer_heads, self.config.peer_top_k, self.n_expert
        # Scores have variance 1, and the best k are so close that softmax is nearly uniform: a head gives its
        # k experts about 1/k each (the spread adds 5 % to the square). Two heads meet in k^2 / E experts.
        S = 1.05 * h / k + h * (h - 1) / E
        # Sigmoid gates do not sum to 1: S is larger by (k g)^2, where g is the sigmoid of sqrt(2 log(E / k)),
        # since there lie the best k of E normal scores.
        if c.peer_score == "sigmoid":
            S *= (k / (1 + math.exp(-math.sqrt(2 * math.log(E / k))))) ** 2
        # u is drawn like a dense first matrix, v so that the variances agree
        own = second_moment(self.activation) if self.activation else 1
        std_u = (2 * self.table.shape[2]) ** -0.5
        std_v = (second_moment(c.activation) / (4 * n_layer * own * S)) ** 0.5
        # sub-keys all have squared length 1/2: no expert is favoured
        self.sub_keys.copy_(F.normalize(torch.randn_like(self.sub_keys), dim=-1) * 0.5 ** 0.5)
        self.table.normal_().mul_(torch.tensor([std_u, std_v])[-self.table.shape[1]:, None])

    def forward(self, x, ctx):
        from kernels.peer import GatheredExperts, choose_path       # fast paths are read where they are used
        from kernels.product_keys import RetrieveFused, TopKLean, fuses
        c, (B, T, d) = self.config, x.shape
        flat = x.reshape(B * T, d)
        path = choose_path(c.peer_path, self.table)
        # h queries of each token, and the k best experts of each query, (N, h, k)
        with torch.autocast(x.device.type, enabled=False):
            q = self.queries(flat)                                                      # (N, h, 2, c)
            if path != "readable" and self.sub_keys.dim() == 3 and fuses(q):
                score, idx = RetrieveFused.apply(q, self.sub_keys, c.peer_top_k)
            else:
                topk = topk_readable if path == "readable" else TopKLean.apply
                score, idx = retrieve(q, self.sub_keys, c.peer_top_k, self.candidates, topk)
        # gates, each head's own
        gate = score.softmax(-1) if c.peer_score == "softmax" else score.sigmoid()      # (N, h, k)
        # the R = h k experts of each token, weighted and summed
        chosen = self.table, idx.flatten(1), gate.flatten(1), self.activation
        if path == "readable":
            y = experts_readable(flat, *chosen)
        else:
            y = GatheredExperts.apply(flat.to(self.table.dtype), *chosen, path)
        return y.to(x.dtype).view(B, T, d), self.stats(idx.flatten(1), gate.detach(), (B, T))

    def stats(self, idx, gate, shape):
        """Stats of experts idx (N, R) and gates (N, h, k)."""
        zero, weight = torch.zeros((), device=gate.device), gate.flatten(1).float()
        load = zero.new_zeros(self.n_expert).index_add_(0, idx.flatten(), weight.flatten())
        entropy = torch.special.entr(gate / gate.sum(-1, keepdim=True)).sum(-1).mean().float()
        top = idx.gather(1, weight.argmax(1, keepdim=True)).view(shape).long()
        return Stats(load, top, zero, zero, zero, zero, entropy)

    @staticmethod
    def checks(config):
        f = config.ffn
        return FeedForward.checks(config) + [
            (f.peer_top_k > f.n_keys, "ffn.peer_top_k", f"is more than ffn.n_keys = {f.n_keys}"),
            (f.peer_top_k == 1 and f.peer_score == "softmax", "ffn.peer_top_k", "makes every gate 1, so that "
             "queries and sub-keys would never learn; take more, or ffn.peer_score = \"sigmoid\""),
            (f.d_key % 2, "ffn.d_key", "must be even: each half queries one table of sub-keys")]

    @staticmethod
    def usual_layers(n_layer):
        return [n_layer // 2]                   # the paper replaces one layer, in the middle

    def describe(self, dtype):
        from kernels.peer import choose_path
        c, path = self.config, choose_path(self.config.peer_path, self.table)
        own = ", each head its sub-keys" if c.keys_per_head else ""
        return f"{self.n_expert:,} rows, {c.peer_heads} heads x {c.peer_top_k} a token{own}, path {path}"

    def inactive_params(self):
        return max(0, self.n_expert - self.n_active) * self.table[0].numel()

    def flops_per_token(self):
        """Forward FLOPs: queries, scores of both halves, an addition per candidate, and the R experts."""
        c, (_, parts, d) = self.config, self.table.shape
        experts = 2 * c.peer_top_k * parts * d
        return c.peer_heads * (2 * d * c.d_key + 2 * c.n_keys * c.d_key + self.candidates.shape[1] + experts)

    def not_grown(self):
        return "an expert is a pair of sub-keys, so they come a whole row and column of a grid at a time"

    def by_parts(self):
        return ["ffn.query_norm"] if self.config.query_norm == "batchnorm" else []

    def remedy(self):
        return "ffn.query_norm = \"batchnorm\", or a lower train.lr"


class PKM(PEER):
    """The same with values in the place of neurons."""
    reads = tuple(name for name in PEER.reads if name != "peer_activation")


def fill_keys(config, d):
    """Sets the width of a query that is 0 in a Config: half of n_embd, made even."""
    config.ffn.d_key = config.ffn.d_key or 2 * (d // 4) or 2
