"""How tokens choose experts: every router, one screen each.

A router is called as `router(x, ctx) -> Routing` with x (n, d), the n = B*T tokens of a batch in (sequence,
position) order. Its answer is a list of P pairs (token, expert, weight), P known from shapes alone, so that
nothing waits for the host. Logits, softmax and gates are float32 whatever the model computes in: a rounded
logit flips a top-k choice.

Axis letters: B sequences, T positions, n = B*T tokens, d width, E experts, k experts per token, P pairs.

What a router may look at decides where it can be used, so each docstring answers three questions:
  gate        is it normalised before or after the selection?
  causal      can a later token of the sequence change this token's output?
  neighbours  can another sequence of the batch change it?
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Context(NamedTuple):
    """What a feed-forward layer may know beside its input."""
    token_ids: Tensor                   # (B, T)
    domain: Tensor | None = None        # (B,) index of the corpus that each sequence came from
    step: Tensor | int = 0     # optimizer step; a 0-d tensor under torch.compile, which would guard on an int
    generating: bool = False            # a KV cache is in use: x holds the newest positions only


class Stats(NamedTuple):
    """What a feed-forward layer reports upward, the same for every kind."""
    aux_loss: Tensor                  # () what the layer adds to the training objective, coefficients applied
    balance_loss: Tensor                # () before its coefficient
    z_loss: Tensor                      # () before its coefficient
    load: Tensor                    # (E,) pairs sent to each expert; PEER: router weight given to each expert
    dropped: Tensor                     # () share of the pairs that found no slot
    entropy: Tensor                     # () mean entropy of the routing distribution, nats
    top_expert: Tensor                  # (B, T) the expert of largest weight
    log_prob: Tensor | None = None      # (B, T) of the sampled expert, and the reward expected: a router that
    baseline: Tensor | None = None   # learns from the token's own loss (rl) leaves its objective to the model


class Routing(NamedTuple):
    """P pairs (token, expert, weight); when every token chooses k, pair p belongs to token p // k."""
    expert: Tensor                      # (P,)
    weight: Tensor                      # (P,) float32
    token: Tensor                       # (P,)
    k: int                              # 0: tokens do not all have the same number of experts
    logits: Tensor | None = None        # (n, E) for the z-loss
    probs: Tensor | None = None         # (n, E) for the balance losses, each row sums to 1
    keep: Tensor | None = None          # (P,) bool, pairs that travel; None: all
    smooth_load: Tensor | None = None   # (E,) differentiable estimate of the load (Shazeer)
    log_prob: Tensor | None = None      # (n,)
    baseline: Tensor | None = None      # (n,)


def pairs(indices, weights, **more):
    """Routing of tokens that choose k experts each; indices, weights (n, k)."""
    n, k = indices.shape
    token = torch.arange(n, device=indices.device).repeat_interleave(k)
    return Routing(indices.flatten(), weights.flatten(), token, k, **more)


class Linear32(nn.Module):
    """x W^T in float32 even under autocast: (n, d) -> (n, out)."""

    def __init__(self, d, out, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, d) * 0.02)
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight, self.bias)


class Router(nn.Module):
    """What most routers share: E, k, and the logits z = x W_r, (n, d) -> (n, E)."""

    def __init__(self, config, d):
        super().__init__()
        self.config, self.n_expert, self.k = config, config.experts, config.active
        self.score = Linear32(d, self.n_expert)


def limit_groups(scores, n_groups, topk_groups, best):
    """scores (n, E) with -inf outside the topk_groups groups whose `best` highest scores sum highest.

    -inf, not 0: a zero can still win against negative scores. (DeepSeek-V2 2405.04434, best = 1; V3, best =
    2.)
    """
    if topk_groups == n_groups:
        return scores
    n, E = scores.shape
    grouped = scores.view(n, n_groups, E // n_groups)
    rank = grouped.topk(min(best, E // n_groups), -1).values.sum(-1)              # (n, groups)
    allowed = torch.zeros_like(rank, dtype=torch.bool).scatter(1, rank.topk(topk_groups, -1).indices, True)
    return grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).view(n, E)


class TopK(Router):
    """Softmax top-k. Mixtral 2401.04088 sec. 2.1: softmax over the k chosen logits. Switch, DeepSeekMoE
    2401.06066 eq. 4-5 and Qwen2: softmax over all E, then the k largest, as they are or renormalised. With
    n_groups > 1 only the experts of the token's topk_groups best groups can be chosen (DeepSeek-V2 2405.04434
    sec. 2.2.2).

    gate: after (topk_then_softmax) or before (softmax_then_topk) the selection. causal: yes. neighbours:
    none.
    """

    def forward(self, x, ctx):
        c, logits = self.config, self.score(x)
        probs = logits.softmax(-1)
        allowed = limit_groups(probs, c.n_groups, c.topk_groups, best=1)
        indices = allowed.topk(self.k, -1).indices
        if c.gate_order == "topk_then_softmax":
            weights = logits.gather(1, indices).softmax(-1)
        else:
            weights = probs.gather(1, indices)
            if c.gate_order == "softmax_then_topk_renorm":
                weights = weights / weights.sum(-1, keepdim=True)
        return pairs(indices, weights * c.route_scale, logits=logits, probs=probs)


class NoisyTopK(Router):
    """Shazeer et al. 2017 (1701.06538) eq. 3-5 and appendix A: H = x W_g + N(0,1) softplus(x W_n), softmax
    over the k largest. Both matrices start at zero, so that all experts begin equal and the noise breaks the
    ties.

    The smooth load is the chance that expert i stays among the top k if only its own noise is drawn again
    (eq. 8-10).
    gate: after the selection. causal: yes. neighbours: none. Draws noise in training, none in evaluation.
    """

    def __init__(self, config, d):
        super().__init__(config, d)
        self.noise = Linear32(d, self.n_expert)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.noise.weight)

    def forward(self, x, ctx):
        clean, smooth = self.score(x), None
        noisy = clean
        if self.training:
            std = F.softplus(self.noise(x))
            noisy = clean + torch.randn_like(clean) * std
        top, indices = noisy.topk(min(self.k + 1, self.n_expert), -1)                       # (n, k+1)
        if self.training and self.k < self.n_expert:
            # The bar for expert i is the k-th largest of the others: the (k+1)-th of all if i itself is
            # chosen.
            bar = torch.where(noisy > top[:, self.k:], top[:, self.k:], top[:, self.k - 1:self.k])
            smooth = torch.special.ndtr((clean - bar) / std).sum(0)
        weights = top[:, :self.k].softmax(-1)
        return pairs(indices[:, :self.k], weights, logits=noisy, probs=noisy.softmax(-1), smooth_load=smooth)


class Switch(Router):
    """Switch Transformer (2101.03961) eq. 1-2: one expert per token, y = p_i E_i(x) with p the softmax over
    all E. The gate is kept, never renormalised: a constant 1 would leave the router without a gradient. In
    training the router's input is multiplied by U(1-j, 1+j) (jitter). W_r starts with variance 0.1 / d, a
    tenth of the usual one (sec. 2.4; there all weights do, here the router's).

    gate: before the selection. causal: yes. neighbours: none. Draws noise in training unless jitter = 0.
    """

    def __init__(self, config, d):
        super().__init__(config, d)
        nn.init.normal_(self.score.weight, std=(0.1 / d) ** 0.5)

    def forward(self, x, ctx):
        x, j = x.float(), self.config.jitter
        if self.training and j > 0:
            x = x * torch.empty_like(x).uniform_(1 - j, 1 + j)
        logits = self.score(x)
        probs = logits.softmax(-1)
        weights, indices = probs.max(-1, keepdim=True)
        return pairs(indices, weights, logits=logits, probs=probs)


class GShard(Router):
    """GShard (2006.16668) algorithm 1: the two best experts with gates renormalised to sum 1; in training the
    second is visited only with probability min(1, 2 g_2), in evaluation always.

    gate: softmax over all, renormalised over the two. causal: yes. neighbours: none. Draws noise in training.
    """

    def forward(self, x, ctx):
        logits = self.score(x)
        probs = logits.softmax(-1)
        top, indices = probs.topk(2, -1)
        weights = top / top.sum(-1, keepdim=True)
        keep = None
        if self.training:
            second = torch.rand_like(weights[:, 1]) < 2 * weights[:, 1]
            keep = torch.stack([torch.ones_like(second), second], -1).flatten()
        return pairs(indices, weights, logits=logits, probs=probs, keep=keep)


class Sigmoid(Router):
    """DeepSeek-V3 (2412.19437) eq. 13-16 with loss-free balancing (2408.15664): s = sigmoid(z), the k largest
    s + b are chosen, gates are s / (sum of the chosen s) without b, times route_scale. Groups are ranked by
    the sum of their two best biased scores. b is a buffer, moved by `balance.update_bias` after each
    optimizer step.

    gate: renormalised after the selection (as they are when k = 1: s / s would be a constant).
    causal: yes (b comes from finished batches only). neighbours: none.
    """

    def __init__(self, config, d):
        super().__init__(config, d)
        self.register_buffer("bias", torch.zeros(self.n_expert))

    def forward(self, x, ctx):
        c, logits = self.config, self.score(x)
        s = logits.sigmoid()
        choice = limit_groups(s.detach() + self.bias, c.n_groups, c.topk_groups, best=2)
        indices = choice.topk(self.k, -1).indices
        weights = s.gather(1, indices)
        if self.k > 1:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        return pairs(indices, weights * c.route_scale, logits=logits, probs=s / s.sum(-1, keepdim=True))


class Sinkhorn(Router):
    """S-BASE (Clark et al. 2202.01169 sec. 3.1): one expert per token, the largest entry of a transport plan
    K = exp(z / tau) whose rows are scaled to sum 1 and columns to n/E, a fixed number of times and without
    gradient.

    gate: sigmoid of the chosen raw logit. Training looks across the whole batch, later positions included;
    evaluation takes the argmax of the logits. causal: in evaluation. neighbours: none in evaluation.
    """

    def plan(self, logits):
        """Log of the plan, (n, E) -> (n, E)."""
        plan = logits.detach() / self.config.sinkhorn_tau
        columns = math.log(plan.shape[0] / plan.shape[1])
        for _ in range(self.config.sinkhorn_iters):
            plan = plan - plan.logsumexp(0, keepdim=True) + columns
            plan = plan - plan.logsumexp(1, keepdim=True)
        return plan

    def forward(self, x, ctx):
        logits = self.score(x)
        indices = (self.plan(logits) if self.training else logits).argmax(-1, keepdim=True)
        return pairs(indices, logits.gather(1, indices).sigmoid(), logits=logits, probs=logits.softmax(-1))


def balanced_assignment(scores, epsilon=None):
    """Expert of each token, (n, E) -> (n,), with at most ceil(n/E) tokens each and the sum of scores within n
    epsilon of the largest possible: an auction (Bertsekas). Tokens without an expert bid on the one that
    offers most at its present price, by as much as it is better than the second; a full expert keeps its
    highest bidders.

    The number of rounds depends on the data, hence no torch.compile.
    """
    n, E = scores.shape
    slots = -(-n // E)
    scores = scores.float().nan_to_num()        # a NaN would be bid on for ever; the loss will tell of it
    epsilon = epsilon or 1e-3 * float(scores.max() - scores.min()) + 1e-6
    price, bid = scores.new_zeros(E), scores.new_zeros(n)
    owner = torch.full((n,), -1, device=scores.device)
    while E > 1 and (free := (owner < 0).nonzero().squeeze(1)).numel():
        value, expert = (scores[free] - price).topk(2, -1)                          # (free, 2)
        owner[free] = expert[:, 0]
        bid[free] = price[expert[:, 0]] + value[:, 0] - value[:, 1] + epsilon
        order = bid.argsort(descending=True, stable=True)
        order = order[owner[order].argsort(stable=True)]                        # by expert, highest bid first
        held = owner[order]
        start = torch.searchsorted(held, torch.arange(E, device=held.device))
        rank = torch.arange(n, device=held.device) - start[held.clamp_min(0)]
        last = held.ge(0) & (rank == slots - 1)                              # a full expert's lowest kept bid
        price[held[last]] = bid[order[last]]
        owner[order[held.ge(0) & (rank >= slots)]] = -1
    return owner.clamp_min(0)


class Base(Router):
    """BASE layers (Lewis et al. 2103.16716): in training tokens are assigned so that each expert gets n/E of
    them and the summed affinity is largest; in evaluation each takes its best. With the block's residual
    connection the paper's alpha f(x) + (1 - alpha) x is x + alpha E(x), alpha the sigmoid of the affinity.
    Centroids start orthogonal.

    gate: sigmoid, no normalisation. Training looks across the whole batch, later positions included.
    causal: in evaluation. neighbours: none in evaluation.
    """

    def __init__(self, config, d):
        super().__init__(config, d)
        nn.init.orthogonal_(self.score.weight, gain=0.1)
        self.assign = torch.compiler.disable(balanced_assignment)       # not at import: it takes 2 seconds

    def forward(self, x, ctx):
        logits = self.score(x)
        choice = self.assign(logits.detach()) if self.training else logits.argmax(-1)
        indices = choice.unsqueeze(-1)
        return pairs(indices, logits.gather(1, indices).sigmoid(), logits=logits, probs=logits.softmax(-1))


def hash_table(vocab_size, n_expert, counts=None, seed=0):
    """Expert of each token id, (vocab_size,): an even random deal, or with `counts` (how often each id
    occurs) ids in falling order of count, each to the expert with the least so far (Roller et al. 2106.04426
    sec. 3.1, "balanced")."""
    table = torch.arange(vocab_size) % n_expert
    if counts is None:
        return table[torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))]
    load = torch.zeros(n_expert, dtype=torch.float64)
    for token in torch.as_tensor(counts).argsort(descending=True, stable=True).tolist():
        expert = int(load.argmin())
        table[token] = expert
        load[expert] += float(counts[token])
    return table


class Hash(nn.Module):
    """Hash layers (Roller et al. 2106.04426): the expert is a fixed table of the token's id. Nothing is
    learned.

    gate: constant 1. causal: yes. neighbours: none.
    """

    def __init__(self, config, d, vocab_size, layer):
        super().__init__()
        self.n_expert = config.experts
        table = hash_table(vocab_size, config.experts, seed=layer)
        # A balanced table needs the corpus (GPT.set_token_counts): expert -1 fails at once where that is
        # forgotten
        self.register_buffer("table", table if config.hash_table == "random" else torch.full_like(table, -1))

    def balance(self, counts):
        """Deals the ids anew by how often each occurs in the training corpus, counts (vocab_size,)."""
        self.table.copy_(hash_table(len(self.table), self.n_expert, counts))

    def forward(self, x, ctx):
        indices = self.table[ctx.token_ids.flatten()].unsqueeze(-1)
        return pairs(indices, torch.ones_like(indices, dtype=torch.float32))


def gumbel_like(logits):
    """Independent draws of the Gumbel distribution: argmax(logits + draws) is a sample of softmax(logits)."""
    return -torch.empty_like(logits).exponential_().clamp_min(1e-20).log()


class RL(Router):
    """RL-R (Clark et al. 2202.01169 sec. 3.3): the router is a policy pi = softmax(x W_r). Training samples
    one expert, the reward is the log-likelihood of the token's own target, and the model adds the REINFORCE
    objective with the learned baseline b(x) to its loss (GPT.forward). Coefficients, gate and loss of the
    baseline were not checked against the paper; here the gate is constant, so that the reward alone teaches
    the router.

    gate: constant 1. causal: yes. neighbours: none. Draws noise in training; evaluation takes the likeliest
    expert.
    """

    def __init__(self, config, d):
        super().__init__(config, d)
        self.value = Linear32(d, 1, bias=True)

    def forward(self, x, ctx):
        logits = self.score(x)
        log_pi = logits.log_softmax(-1)
        noise = gumbel_like(logits) if self.training else 0.0
        indices = (log_pi + noise).argmax(-1, keepdim=True)             # the Gumbel-max trick samples from pi
        baseline = self.value(x.detach()).squeeze(-1)
        return pairs(indices, torch.ones_like(log_pi[:, :1]), logits=logits, probs=log_pi.exp(),
                     log_prob=log_pi.gather(1, indices).squeeze(-1), baseline=baseline)


class ExpertChoice(Router):
    """Expert choice (Zhou et al. 2202.09368), grouped as in Krajewski et al. 2402.07871: at every position t
    each expert takes the C = B k / E sequences that score highest for it, s = softmax over experts. Load is
    even by construction; a token may get no expert or several. C is rounded and at least 1: with B a multiple
    of E / k a token visits k experts on average, as flops_per_token counts.

    gate: before the selection. causal: yes, for choosing among sequences at one position cannot see later
    ones.
    neighbours: YES, in training and evaluation alike: the other sequences compete for the slots. Generation
    has no group to choose from, so there each token takes its own k best scores; the loss this costs is to be
    measured.
    """

    def forward(self, x, ctx):
        (B, T), E = ctx.token_ids.shape, self.n_expert
        logits = self.score(x)
        probs = logits.softmax(-1)
        if ctx.generating:
            weights, indices = probs.topk(self.k, -1)
            return pairs(indices, weights, logits=logits, probs=probs)
        C = min(B, max(1, round(B * self.k / E)))
        weights, sequence = probs.view(B, T, E).topk(C, dim=0)                                  # (C, T, E)
        token = sequence * T + torch.arange(T, device=x.device).view(1, T, 1)
        expert = torch.arange(E, device=x.device).expand_as(token)
        return Routing(expert.reshape(-1), weights.reshape(-1), token.reshape(-1), 0, logits, probs)


class Soft(Router):
    """All experts, weighed by a softmax: the costly upper baseline of BTX (2403.07816 sec. 3.3).

    gate: softmax over all. causal: yes. neighbours: none.
    """

    def forward(self, x, ctx):
        logits = self.score(x)
        probs = logits.softmax(-1)
        indices = torch.arange(self.n_expert, device=x.device).expand_as(probs)
        return pairs(indices, probs, logits=logits, probs=probs)


class SampleTop1(Router):
    """Sample Top-1 of BTX (2403.07816 sec. 3.3): Gumbel-softmax at temperature tau = max(0.5, exp(-r step)),
    of which only the largest component is kept; in evaluation the likeliest expert with gate 1.

    gate: before the selection. causal: yes. neighbours: none. Draws noise in training.
    """

    def forward(self, x, ctx):
        logits = self.score(x)
        probs = logits.softmax(-1)
        if not self.training:
            indices = logits.argmax(-1, keepdim=True)
            return pairs(indices, torch.ones_like(probs[:, :1]), logits=logits, probs=probs)
        step = torch.as_tensor(ctx.step, dtype=torch.float32, device=x.device)
        tau = torch.exp(-self.config.gumbel_rate * step).clamp_min(0.5)
        weights, indices = ((logits + gumbel_like(logits)) / tau).softmax(-1).max(-1, keepdim=True)
        return pairs(indices, weights, logits=logits, probs=probs)


class Domain(nn.Module):
    """DEMix (Gururangan et al. 2108.05036): the expert of the sequence's known domain; nothing is learned.
    Without a label (sampling) every layer averages its experts' outputs, a stand-in: the paper mixes the
    predictions of whole models by the posterior of the domain, as grow.ensemble does.

    gate: constant. causal: yes. neighbours: none.
    """

    def __init__(self, config, d):
        super().__init__()
        self.n_expert = config.experts

    def forward(self, x, ctx):
        B, T = ctx.token_ids.shape
        if ctx.domain is None:
            indices = torch.arange(self.n_expert, device=x.device).expand(B * T, -1)
            return pairs(indices, torch.full(indices.shape, 1 / self.n_expert, device=x.device))
        indices = ctx.domain.repeat_interleave(T).unsqueeze(-1)
        return pairs(indices, torch.ones_like(indices, dtype=torch.float32))


ROUTERS = dict(topk=TopK, noisy_topk=NoisyTopK, switch=Switch, gshard=GShard, sigmoid=Sigmoid,
               sinkhorn=Sinkhorn, base=Base, hash=Hash, rl=RL, expert_choice=ExpertChoice, soft=Soft,
               sample_top1=SampleTop1, domain=Domain)


def build_router(config, d, vocab_size, layer):
    """The router that an FFNConfig names, for width d; vocab_size and layer serve the hash tables only."""
    if config.router == "hash":
        return Hash(config, d, vocab_size, layer)
    return ROUTERS[config.router](config, d)
