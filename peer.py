"""A million experts: product-key retrieval, PEER (2407.04153), and PKM (1907.05242), which it grew from.

An expert is one neuron, e_i(x) = act(x . u_i) v_i; a token uses R = h k of the N = m^2 there are:

    q = norm(x W_q)                     h queries, each cut into two halves q', q"
    s_ij = q' . c_i + q" . c'_j         score of expert i m + j: 2 m dot products make m^2 scores
    y = sum over heads and their k best experts of softmax(s) act(x . u) v          (PKM: softmax(s) v)

`retrieve` and `experts_readable` are the paper. The rest is about never holding the gathered rows
(n, R, 2, d), 256 KiB a token at R = 128, d = 256, each of them used once.

- u_i and v_i lie side by side in one table (N, 2, d): one index, one gradient, one optimizer entry. Sub-keys
  and experts are shared by all heads, as in the paper.
- Queries, scores and gates are float32, also under autocast: a rounded score flips a choice. Tables stay
  float32 and are never converted as a whole: readable converts the rows it gathered, lean and fused compute
  in float32.
- A table's gradient is added to the .grad that is there, if there is one: see GatheredExperts.

Axis letters: B sequences, T positions, n = B*T tokens, d width, h heads, k experts per head, R = h*k rows per
token, N experts, p the 2 halves of a query, c width of a half, m sub-keys of each half (n_keys).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from kernels.common import ACTIVATIONS, use_triton
from kernels.peer import GatheredExperts
from kernels.product_keys import TopKLean
from routers import Stats
from runtime.parallel import global_mean, world


class BatchNorm(nn.Module):
    """Batch norm of (n, width) whose running statistics are of use after a few steps: the mean over all
    batches until there are 1 / momentum of them, then a moving average. (The usual start at 0 and 1 still
    weighs 12 % after 20 steps.)

    Evaluation uses them alone: no token depends on its neighbours. Training uses the micro-batch, of all
    processes together, in which a padded position counts like a real one: do not pad. ValueError for one
    training token.
    """

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
        if world() > 1:
            y, mean, var = normalise(x)
            self.remember(mean.detach(), var.detach())
            return y * self.weight + self.bias
        with torch.no_grad():
            var, mean = torch.var_mean(x, 0)
            self.remember(mean, var)
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True)

    def remember(self, mean, var):
        """Moves the running statistics."""
        self.batches += 1
        rate = (1 / self.batches).clamp_min(self.momentum)
        self.mean.lerp_(mean, rate)
        self.var.lerp_(var, rate)


def normalise(x):
    """(x, (n, width), normalised, mean, unbiased variance) by the moments of all processes' x together."""
    mean = global_mean(x.mean(0))
    centred, n = x - mean, len(x) * world()
    var = global_mean(centred.square().mean(0))
    return centred * (var + 1e-5).rsqrt(), mean, var * (n / (n - 1))


def cartesian_candidates(k):
    """Ranks (i, j), two int64 tensors, of the pairs that can be among the k largest sums of two descending
    lists: those with (i + 1)(j + 1) <= k, 50 of 256 at k = 16. Each other pair is matched or beaten by k
    pairs of better ranks, so leaving it out changes no value of the top k, ties and rounded sums included.
    Keep as buffers."""
    rank = torch.arange(1, k + 1)
    return (rank[:, None] * rank <= k).nonzero(as_tuple=True)


class Queries(nn.Module):
    """x (n, d) -> (n, h, 2, c): linear, then batchnorm of each of the 2hc features, layernorm of each query,
    or none. Starts at unit variance for x of unit variance."""

    def __init__(self, d, heads, d_key, norm):
        super().__init__()
        self.heads, self.weight = heads, nn.Parameter(torch.randn(heads * d_key, d) * d ** -0.5)
        self.norm = (BatchNorm(heads * d_key) if norm == "batchnorm" else
                     nn.LayerNorm(d_key) if norm == "layernorm" else nn.Identity())

    def forward(self, x):
        q = F.linear(x.to(self.weight.dtype), self.weight)
        q = q.view(len(x), self.heads, -1) if isinstance(self.norm, nn.LayerNorm) else q
        return self.norm(q).view(len(x), self.heads, 2, -1)


def retrieve(q, sub_keys, k, candidates, topk):
    """The k best of the m^2 experts for each query: q (n, h, 2, c), sub_keys (2, m, c) -> scores (n, h, k),
    descending, and experts (n, h, k) int32.

    Exact: the sum of ranks i and j is matched or beaten by (i + 1)(j + 1) - 1 others, so that only
    `candidates`, the pairs with (i + 1)(j + 1) <= k, are needed. Ties: the scores are always the k highest;
    to which of several equal experts they belong is up to topk.
    """
    scores, indices = topk(q, sub_keys, k)                                          # (n, h, 2, k)
    i, j = candidates                                                               # 50 pairs at k = 16
    best, at = (scores[:, :, 0].index_select(2, i) + scores[:, :, 1].index_select(2, j)).topk(k, -1)
    expert = indices[:, :, 0].index_select(2, i) * sub_keys.shape[1] + indices[:, :, 1].index_select(2, j)
    return best, expert.gather(2, at).int()


def topk_readable(q, sub_keys, k):
    """Scores and indices (n, h, 2, k) of the k best sub-keys of each half."""
    return torch.einsum("nhpc,pmc->nhpm", q, sub_keys).topk(k, -1)


# ---- experts: x (n, d), table (N, 2, d), experts idx (n, R), gate (n, R) -> y (n, d)
# ---- PKM: table (N, 1, d), which holds v alone, and activation None


def experts_readable(x, table, idx, gate, activation):
    """The path to read first, and the oracle of the others; any dtype."""
    rows = table.index_select(0, idx.flatten()).view(*idx.shape, *table.shape[1:])          # (n, R, 2, d)
    *u, v = rows.unbind(2)
    if activation:
        gate = ACTIVATIONS[activation](torch.einsum("nd,nrd->nr", x, *u)) * gate
    return torch.einsum("nr,nrd->nd", gate, v)


def choose_path(wanted, table):
    """The path that `ffn.peer_path = auto` takes, and the refusal of an explicit one that cannot run.

    PEER on CUDA with Triton: fused. CPU, where Triton could only be interpreted, and PKM on CUDA, whose
    forward is one kernel as it is, embedding_bag: lean. Elsewhere, on MPS: readable, which needs only gathers
    and products. Raises ValueError for an explicit fused that cannot run.
    """
    refusal = ("PKM has no neurons" if table.shape[1] == 1 else
               "" if use_triton(table) else "it needs a CUDA device and Triton")
    if wanted == "fused" and refusal:
        raise ValueError(f'ffn.peer_path = "fused" cannot run: {refusal}; use "auto" or "lean"')
    if wanted != "auto":
        return wanted
    if table.is_cuda:
        return "lean" if refusal else "fused"
    return "lean" if table.device.type == "cpu" else "readable"


def second_moment(activation):
    """E[act(z)^2] for z ~ N(0, 1/2), what a first matrix of model.py gives; swiglu: times E[up^2] = 1/2."""
    z = torch.linspace(-6, 6, 2001, device="cpu", dtype=torch.float64)
    p = (-z.square()).exp()
    return (ACTIVATIONS[activation](z).square() @ p / p.sum()).item() * (0.5 if activation == "swiglu" else 1)


class PEER(nn.Module):
    """The feed-forward layer of single-neuron experts (kind "peer"), or of values without neurons ("pkm").

    PEER(config.ffn, n_embd, n_layer); forward(x (B, T, d), ctx) -> (y (B, T, d), Stats); Stats.load is the
    router weight that each of the N experts got. Causal, and no sequence sees another, but for BatchNorm in
    training.
    """

    def __init__(self, config, d, n_layer):
        super().__init__()
        self.config, self.n_expert = config, config.n_keys ** 2
        self.activation = config.peer_activation if config.kind == "peer" else None
        self.queries = Queries(d, config.peer_heads, config.d_key, config.query_norm)
        self.sub_keys = nn.Parameter(torch.empty(2, config.n_keys, config.d_key // 2))
        self.table = nn.Parameter(torch.empty(self.n_expert, 2 if self.activation else 1, d))
        with torch.device("cpu"):                                       # nonzero() has no meta version
            candidates = torch.stack(cartesian_candidates(config.peer_top_k))
        self.register_buffer("candidates", candidates.to(self.table.device), persistent=False)
        self.init_weights(n_layer)

    @torch.no_grad()
    def init_weights(self, n_layer):
        """The output starts with the variance of the dense layer that it replaces: E[act^2] / (4 n_layer), by
        GPT.init_weights. Here it is var(v) E[act^2] S, u being drawn like a dense first matrix, and S the
        expected sum, over experts, of the squared gate that a token gives them. Sub-keys all have squared
        length 1/2: no expert is favoured, scores have variance 1, and the best k are so close that softmax is
        nearly uniform. A head gives its k experts about 1/k each (the spread adds 5 % to the square); two
        heads meet in k^2/N experts: S = 1.05 h/k + h(h-1)/N. Sigmoid gates do not sum to 1: S is larger by
        (k g)^2, g = sigmoid(sqrt(2 log(N/k))), since there lie the best k of N normal scores.
        """
        c, h, k, N = self.config, self.config.peer_heads, self.config.peer_top_k, self.n_expert
        S = 1.05 * h / k + h * (h - 1) / N
        if c.peer_score == "sigmoid":
            S *= (k / (1 + math.exp(-math.sqrt(2 * math.log(N / k))))) ** 2
        own = second_moment(self.activation) if self.activation else 1
        std_u = (2 * self.table.shape[2]) ** -0.5
        std_v = (second_moment(c.activation) / (4 * n_layer * own * S)) ** 0.5
        self.sub_keys.copy_(F.normalize(torch.randn_like(self.sub_keys), dim=-1) * 0.5 ** 0.5)
        self.table.normal_().mul_(torch.tensor([std_u, std_v])[-self.table.shape[1]:, None])

    def forward(self, x, ctx):
        c, (B, T, d) = self.config, x.shape
        flat, path = x.reshape(B * T, d), choose_path(c.peer_path, self.table)
        with torch.autocast(x.device.type, enabled=False):
            topk = topk_readable if path == "readable" else TopKLean.apply
            score, idx = retrieve(self.queries(flat), self.sub_keys, c.peer_top_k, self.candidates, topk)
        gate = score.softmax(-1) if c.peer_score == "softmax" else score.sigmoid()          # (n, h, k)
        chosen = self.table, idx.flatten(1), gate.flatten(1), self.activation
        if path == "readable":
            y = experts_readable(flat, *chosen)
        else:
            y = GatheredExperts.apply(flat.to(self.table.dtype), *chosen, path)
        return y.to(x.dtype).view(B, T, d), self.stats(idx.flatten(1), gate.detach(), (B, T))

    def stats(self, idx, gate, shape):
        """Stats of experts idx (n, R) and gates (n, h, k)."""
        zero, weight = torch.zeros((), device=gate.device), gate.flatten(1).float()
        load = zero.new_zeros(self.n_expert).index_add_(0, idx.flatten(), weight.flatten())
        entropy = torch.special.entr(gate / gate.sum(-1, keepdim=True)).sum(-1).mean().float()
        top = idx.gather(1, weight.argmax(1, keepdim=True)).view(shape).long()
        return Stats(zero, zero, zero, load, zero, entropy, top)

    def inactive_params(self):
        """Parameters of the rows that a token does not retrieve."""
        active = min(self.config.peer_heads * self.config.peer_top_k, self.n_expert)
        return (self.n_expert - active) * self.table[0].numel()

    def flops_per_token(self):
        """Forward FLOPs: queries, scores of both halves, an addition per candidate, and the R experts."""
        c, (_, parts, d) = self.config, self.table.shape
        experts = 2 * c.peer_top_k * parts * d
        return c.peer_heads * (2 * d * c.d_key + 2 * c.n_keys * c.d_key + self.candidates.shape[1] + experts)


def usage(load):
    """(share of experts used, unevenness) of accumulated router weights (N,): log N + sum z log z with z the
    normalised load, 0 when even, log N when one expert gets all (2407.04153 sec. 3.3). Sum the loads of a
    whole validation set first: a few tokens cannot reach a million experts."""
    z = load.double() / load.sum(dtype=torch.float64)
    uneven = math.log(load.numel()) - torch.special.entr(z).sum()
    return (load > 0).double().mean().item(), uneven.item()
