"""How tokens choose experts: every router, one screen each.

A router is called as `router(x, ctx) -> Routing` with x (N, d), the tokens of a batch in (sequence, position)
order. Its answer is a list of P pairs (token, expert, weight), P known from shapes alone, so that nothing waits
for the host. Logits, softmax and gates are float32: a rounded logit flips a top-k choice.

What a router may look at decides where it can be used, so each class says it as data, in its traits: whether
a later token can change where one goes (ahead), and whether another sequence can (across). Help, the README's
table, warnings and tests are made from them. A new router is a class with its traits and a line in ROUTERS.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ALL = -1                                # Traits.k of a router that sends every token to every expert
DIFFERS = "differs under several processes"


class Traits(NamedTuple):
    """What is true of a router. Its k is the number of experts of a token; 0: ffn.top_k decides."""
    says: str                           # what it does, in a few words
    paper: str                          # whose it is, and its arXiv number
    gate: str                           # what its weights are
    k: int = 0
    balance: str = "switch"             # what ffn.balance = "auto" becomes
    steerable: bool = True              # it gives probs, which a balancing loss can move
    logits: bool = True                 # it gives logits, x W_r in self.score: it learns, and has a z-loss
    noise: bool = False                 # it draws in training
    ahead: str = ""                     # "in training", "always", or never
    across: str = ""                    # likewise
    capacity: bool = True               # its pairs may compete for slots
    compiles: bool = True
    least: int = 1                      # fewest experts of a token with which its gates are no constant
    by_corpus: bool = False             # expert i is that of corpus i
    reads: tuple = ()                   # settings of [ffn] that no other layer or loss reads
    not_grown: str = ""                 # why a trained layer can get no more experts; empty: it can
    remedy: str = ""                    # what evens out its load, where no balancing can
    sampling: str = ""                  # what a reader of sampled text should know

    def looks(self):
        """What else than the token's own past decides its experts, as a text for people."""
        where = "ahead and across the batch" if self.ahead else "across the batch"
        found = [(self.noise, "draws noise in training"), (self.across, f"looks {where} {self.across}"),
                 (not self.compiles, "never compiled"), (self.differs(), DIFFERS)]
        return "; ".join(text for true, text in found if true)

    def differs(self):
        """Whether several processes train another model with it than one process would."""
        return self.noise or bool(self.across)


class Routing(NamedTuple):
    """P pairs (token, expert, weight); when every token chooses k, pair p belongs to token p // k."""
    expert: Tensor                      # (P,)
    weight: Tensor                      # (P,) float32
    token: Tensor                       # (P,)
    k: int                              # 0: tokens do not all have the same number of experts
    logits: Tensor | None = None        # (N, E) for the z-loss
    probs: Tensor | None = None         # (N, E) for the balance losses, each row sums to 1
    keep: Tensor | None = None          # (P,) bool, pairs that travel; None: all
    smooth_load: Tensor | None = None   # (E,) differentiable estimate of the load (Shazeer)
    log_prob: Tensor | None = None      # (N,) of the expert that was sampled
    baseline: Tensor | None = None      # (N,) the reward that was expected
    prices: Tensor | None = None        # (E,) of the experts, in training, where these balance the batch

    def by_token(self):
        """(experts, weights), both (N, k); only where every token chooses k."""
        return self.expert.view(-1, self.k), self.weight.view(-1, self.k)


def pairs(indices, weights, **more):
    """Routing of tokens that choose k experts each; indices, weights (N, k)."""
    N, k = indices.shape
    token = torch.arange(N, device=indices.device).repeat_interleave(k)
    return Routing(indices.flatten(), weights.flatten(), token, k, **more)


def top_expert(routing, shape):
    """(B, T) expert of largest weight; expert choice: the expert that scores the token highest."""
    if not routing.k:
        return routing.probs.argmax(-1).view(shape)
    experts, weights = routing.by_token()
    return experts.gather(1, weights.argmax(-1, keepdim=True)).view(shape)


class Linear32(nn.Module):
    """x W^T in float32 even under autocast: (N, d) -> (N, out)."""

    def __init__(self, d, out, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, d) * 0.02)
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x):
        from kernels.parts import linear32                      # F.linear, on tensor cores where that pays
        with torch.autocast(x.device.type, enabled=False):
            return linear32(x, self.weight, self.bias)


class Router(nn.Module):
    """What routers share: E, k, and the logits z = x W_r, (N, d) -> (N, E), of those that have any. config: an
    FFNConfig; vocab_size and layer are for routers that go by the token's id."""
    traits: Traits

    def __init__(self, config, d, vocab_size=0, layer=0):
        super().__init__()
        self.config, self.n_expert, self.k = config, config.experts, visited(config)
        if self.traits.logits:
            self.score = Linear32(d, self.n_expert)

    def set_token_counts(self, counts):
        """Told before training: how often each token id occurs in the corpus, (V,)."""


def limit_groups(scores, n_groups, topk_groups, best):
    """scores (N, E) with -inf outside the topk_groups groups whose `best` highest scores sum highest.
    (DeepSeek-V2 2405.04434 sec. 2.2.2, best = 1; V3, best = 2.)"""
    if topk_groups == n_groups:
        return scores
    grouped = scores.unflatten(1, (n_groups, -1))                                 # (N, groups, E / groups)
    rank = grouped.topk(min(best, grouped.shape[2]), -1).values.sum(-1)           # (N, groups)
    chosen = rank.topk(topk_groups, -1).indices
    allowed = torch.zeros_like(rank, dtype=torch.bool).scatter(1, chosen, True)
    # -inf, not 0: a zero can still win against negative scores
    return grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)


class TopK(Router):
    """Softmax top-k, with the three orders of ffn.gate_order (Mixtral 2401.04088 sec. 2.1; DeepSeekMoE
    2401.06066 eq. 4-5; Qwen2). With n_groups > 1 a token keeps to its topk_groups best groups (DeepSeek-V2)."""
    traits = Traits("softmax top-k", "Mixtral 2401.04088, DeepSeekMoE 2401.06066, Qwen2 2407.10671; groups: "
                    "DeepSeek-V2 2405.04434", "softmax, after or before the selection",
                    reads=("gate_order", "n_groups", "topk_groups", "route_scale"))

    def forward(self, x, ctx):
        c = self.config
        logits = self.score(x)
        probs = logits.softmax(-1)
        # the k best experts of each token, (N, k)
        allowed = limit_groups(probs, c.n_groups, c.topk_groups, best=1)
        indices = allowed.topk(self.k, -1).indices
        # Mixtral: softmax over the chosen logits
        if c.gate_order == "topk_then_softmax":
            weights = logits.gather(1, indices).softmax(-1)
        # DeepSeekMoE eq. 4-5: what softmax over all E gave them, here and there divided by its sum
        else:
            weights = probs.gather(1, indices)
            if c.gate_order == "softmax_then_topk_renorm":
                weights = weights / weights.sum(-1, keepdim=True)
        return pairs(indices, weights * c.route_scale, logits=logits, probs=probs)


class NoisyTopK(Router):
    """Noisy top-k (Shazeer et al. 1701.06538 sec. 2.1, appendix A), without noise in evaluation."""
    traits = Traits("noisy top-k", "Shazeer 1701.06538", "softmax, after the selection",
                    balance="importance_load", noise=True, least=2)

    def __init__(self, config, d, vocab_size=0, layer=0):
        super().__init__(config, d)
        self.noise = Linear32(d, self.n_expert)
        # both at zero: all experts begin equal, and the noise breaks the ties
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.noise.weight)

    def forward(self, x, ctx):
        # eq. 4: H(x) = x W_g + N(0,1) softplus(x W_n). A floor keeps the noise alive and eq. 8 finite: 0.01, as
        # the authors' code adds; a larger deviation stays as it is
        clean = self.score(x)
        noisy, smooth = clean, None
        if self.training:
            std = F.softplus(self.noise(x)).clamp_min(0.01)
            noisy = clean + torch.randn_like(clean) * std
        top, indices = noisy.topk(min(self.k + 1, self.n_expert), -1)                   # (N, k+1)
        # the smooth load: the chance that expert i stays among the top k if its own noise is drawn again
        # eq. 9: its bar is the k-th largest H of the others, which is the (k+1)-th of all if i is chosen
        # eq. 8: P(x, i) = Phi((x W_g - bar) / std); eq. 10: the load is its sum
        if self.training and self.k < self.n_expert:
            bar = torch.where(noisy > top[:, self.k:], top[:, self.k:], top[:, self.k - 1:self.k])
            smooth = torch.special.ndtr((clean - bar) / std).sum(0)                     # (E,)
        # eq. 3 and 5: softmax over the k largest
        weights = top[:, :self.k].softmax(-1)
        return pairs(indices[:, :self.k], weights, logits=noisy, probs=noisy.softmax(-1), smooth_load=smooth)


class Switch(Router):
    """Switch Transformer (2101.03961): one expert per token. Its gate is p_i: a constant 1 has no gradient."""
    traits = Traits("top-1, its input jittered", "Switch 2101.03961", "softmax, before the selection", k=1,
                    noise=True, reads=("jitter",))

    def __init__(self, config, d, vocab_size=0, layer=0):
        super().__init__(config, d)
        # sec. 2.4: a tenth of the usual variance 1 / d (there all weights have it, here the router's)
        nn.init.normal_(self.score.weight, std=(0.1 / d) ** 0.5)

    def forward(self, x, ctx):
        # sec. 2.4: in training the router's input is multiplied by U(1 - j, 1 + j)
        x, j = x.float(), self.config.jitter
        if self.training and j > 0:
            x = x * torch.empty_like(x).uniform_(1 - j, 1 + j)
        # eq. 1: p = softmax(x W_r); the best expert with its own p for a gate
        logits = self.score(x)
        probs = logits.softmax(-1)
        weights, indices = probs.max(-1, keepdim=True)
        return pairs(indices, weights, logits=logits, probs=probs)


class GShard(Router):
    """GShard (2006.16668) algorithm 1: the two best experts, in training the second only by chance."""
    traits = Traits("top-2, the second by chance", "GShard 2006.16668", "softmax, renormalised over the two",
                    k=2, balance="gshard", noise=True)

    def forward(self, x, ctx):
        logits = self.score(x)
        probs = logits.softmax(-1)
        # gates of the two best, renormalised to sum 1
        top, indices = probs.topk(2, -1)                                                # (N, 2)
        weights = top / top.sum(-1, keepdim=True)
        # the second travels by a coin that falls for it with probability 2 g_2
        keep = None
        if self.training:
            second = torch.rand_like(weights[:, 1]) < 2 * weights[:, 1]
            keep = torch.stack([torch.ones_like(second), second], -1).flatten()         # (P,)
        return pairs(indices, weights, logits=logits, probs=probs, keep=keep)


class Sigmoid(Router):
    """DeepSeek-V3 (2412.19437) eq. 13-16. After each batch b moves: loss-free (2408.15664), or by quantiles."""
    traits = Traits("sigmoid scores, for loss-free balancing", "DeepSeek-V3 2412.19437, 2408.15664",
                    "sigmoid, renormalised after the selection", balance="loss_free",
                    reads=("n_groups", "topk_groups", "route_scale"))

    def __init__(self, config, d, vocab_size=0, layer=0):
        super().__init__(config, d)
        self.register_buffer("bias", torch.zeros(self.n_expert))

    def forward(self, x, ctx):
        c = self.config
        # eq. 15: s = sigmoid(x W_r)
        logits = self.score(x)
        s = logits.sigmoid()
        # eq. 16: the k largest s + b, within the groups whose two best sum highest
        choice = limit_groups(s.detach() + self.bias, c.n_groups, c.topk_groups, best=2)
        indices = choice.topk(self.k, -1).indices                                       # (N, k)
        # eq. 13: gates are s without b, divided by their sum; s as it is when k = 1: s / s is a constant
        weights = s.gather(1, indices)
        if self.k > 1:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        return pairs(indices, weights * c.route_scale, logits=logits, probs=s / s.sum(-1, keepdim=True))


class Priced(Router):
    """In training each expert has a price, such that the best logit minus price spreads a batch evenly:
    assign(z (N, E)) -> (experts (N,), prices (E,)). In evaluation each token goes by its own logits, raw or
    minus `prices`, the moving average that balance.remember_prices keeps (ffn.eval_prices)."""

    def __init__(self, config, d, vocab_size=0, layer=0):
        super().__init__(config, d)
        self.register_buffer("prices", torch.zeros(self.n_expert))
        told = "has no prices yet, so that ffn.eval_prices = \"ema\" chooses as \"raw\" does"
        self.may_lack = dict(prices=told if config.eval_prices == "ema" else "")

    def forward(self, x, ctx):
        logits = self.score(x)
        value = logits - self.prices if self.config.eval_prices == "ema" else logits
        indices, prices = self.assign(logits.detach()) if self.training else (value.argmax(-1), None)
        # the gate is the sigmoid of the chosen raw logit
        indices = indices.unsqueeze(-1)
        return pairs(indices, logits.gather(1, indices).sigmoid(), logits=logits, probs=logits.softmax(-1),
                     prices=prices)


class Sinkhorn(Priced):
    """S-BASE (Clark 2202.01169 sec. 3.1): in training the largest entry of a balanced transport plan."""
    traits = Traits("S-BASE, a balanced transport plan", "Clark 2202.01169", "sigmoid", k=1, balance="none",
                    ahead="in training", across="in training",
                    reads=("sinkhorn_iters", "sinkhorn_tau", "eval_prices"))

    def plan(self, logits):
        """Log of the plan exp(z / tau), (N, E): rows sum to 1, columns to N / E; without gradient."""
        plan = logits.detach() / self.config.sinkhorn_tau
        columns = math.log(plan.shape[0] / plan.shape[1])
        for _ in range(self.config.sinkhorn_iters):
            plan = plan - plan.logsumexp(0, keepdim=True) + columns
            plan = plan - plan.logsumexp(1, keepdim=True)
        return plan

    def assign(self, logits):
        plan = self.plan(logits)
        # log plan_ij = z_ij / tau - u_i - v_j: tau v_j, plus a number common to all, is what expert j costs
        return plan.argmax(-1), (logits - self.config.sinkhorn_tau * plan).mean(0)


class Base(Priced):
    """BASE layers (Lewis et al. 2103.16716): in training each expert gets N/E tokens, so that the summed
    affinity is largest; in evaluation a token takes its best. With the block's residual connection the
    paper's alpha f(x) + (1 - alpha) x is x + alpha E(x), alpha the sigmoid of the affinity (ffn.inserted)."""
    traits = Traits("balanced assignment", "BASE 2103.16716", "sigmoid", k=1, balance="none",
                    ahead="in training", across="in training", compiles=False, reads=("eval_prices",))

    def __init__(self, config, d, vocab_size=0, layer=0):
        super().__init__(config, d)
        from kernels.assignment import auction
        nn.init.orthogonal_(self.score.weight, gain=0.1)
        self.assign = torch.compiler.disable(auction)                   # not at import: it takes 2 seconds


def hash_table(vocab_size, n_expert, counts=None, seed=0):
    """Expert of each token id, (V,): a random deal, or by `counts` in a corpus (Roller 2106.04426 sec. 3.1)."""
    # an even deal: V / E ids for each expert
    table = torch.arange(vocab_size) % n_expert
    if counts is None:
        return table[torch.randperm(vocab_size, generator=torch.Generator().manual_seed(seed))]
    # or the most frequent id first, each to the expert that has the fewest tokens so far
    counts, load = torch.as_tensor(counts, dtype=torch.float64), torch.zeros(n_expert, dtype=torch.float64)
    for token in counts.argsort(descending=True, stable=True).tolist():
        table[token] = load.argmin()
        load[table[token]] += counts[token]
    return table


class Hash(Router):
    """Hash layers (Roller et al. 2106.04426): the expert is a fixed table of the token's id."""
    traits = Traits("a fixed table of token ids", "Roller 2106.04426", "1", k=1, balance="none",
                    steerable=False, logits=False, reads=("hash_table",),
                    not_grown="its table sends no token id to a new expert, and another table would send old "
                    "ids elsewhere", remedy="ffn.hash_table = \"balanced\" counts how often a token occurs")

    def __init__(self, config, d, vocab_size=0, layer=0):
        super().__init__(config, d)
        table = hash_table(vocab_size, config.experts, seed=layer)
        # a balanced table needs the corpus: expert -1 fails at once where set_token_counts was forgotten
        self.register_buffer("table", table if config.hash_table == "random" else torch.full_like(table, -1))

    def set_token_counts(self, counts):
        """Deals the ids of a balanced table anew."""
        if self.config.hash_table == "balanced":
            self.table.copy_(hash_table(len(self.table), self.n_expert, counts))

    def forward(self, x, ctx):
        # a look-up, which learns nothing
        indices = self.table[ctx.token_ids.flatten()].unsqueeze(-1)
        return pairs(indices, torch.ones_like(indices, dtype=torch.float32))


def gumbel_like(logits):
    """Independent draws of the Gumbel distribution: argmax(logits + draws) is a sample of softmax(logits)."""
    return -torch.empty_like(logits).exponential_().clamp_min(1e-20).log()


class RL(Router):
    """RL-R (Clark et al. 2202.01169 sec. 3.3): the router is a policy pi = softmax(x W_r), its reward the
    log-likelihood of the token's own target (balance.policy_loss). The gate is constant, so that the reward
    alone teaches the router; gate, coefficients and the baseline's loss were not checked against the paper."""
    traits = Traits("REINFORCE on the token's own loss", "RL-R, Clark 2202.01169", "1", k=1, noise=True,
                    reads=("rl_loss",))

    def __init__(self, config, d, vocab_size=0, layer=0):
        super().__init__(config, d)
        self.value = Linear32(d, 1, bias=True)

    def forward(self, x, ctx):
        logits = self.score(x)
        log_pi = logits.log_softmax(-1)
        # training samples from pi by the Gumbel-max trick, evaluation takes the likeliest expert
        noise = gumbel_like(logits) if self.training else 0.0
        indices = (log_pi + noise).argmax(-1, keepdim=True)
        # b(x), the reward expected, learns from the reward but not through the layers below
        baseline = self.value(x.detach()).squeeze(-1)
        return pairs(indices, torch.ones_like(log_pi[:, :1]), logits=logits, probs=log_pi.exp(),
                     log_prob=log_pi.gather(1, indices).squeeze(-1), baseline=baseline)


class ExpertChoice(Router):
    """Expert choice (Zhou et al. 2202.09368), grouped as in Krajewski et al. 2402.07871: at every position
    each expert takes the C = B k / E sequences that score highest for it. A token may get no expert or
    several, k on average with B a multiple of E / k, as flops_per_token counts. No later position is seen."""
    traits = Traits("experts choose among the sequences at one position", "Zhou 2202.09368, by position as in "
                    "Krajewski 2402.07871", "softmax, before the selection", balance="none", steerable=False,
                    across="always", capacity=False, not_grown="an expert takes its share of the tokens; "
                    "among more experts the old ones, frozen or not, would take fewer",
                    sampling="sampling takes each token's own best scores instead")

    def forward(self, x, ctx):
        (B, T), E = ctx.token_ids.shape, self.n_expert
        logits = self.score(x)
        probs = logits.softmax(-1)
        # generation has no group to choose from: each token takes its own k best scores
        if ctx.generating:
            weights, indices = probs.topk(self.k, -1)
            return pairs(indices, weights, logits=logits, probs=probs)
        # each expert's C best sequences at each position, C rounded and at least 1
        C = min(B, max(1, round(B * self.k / E)))
        weights, sequence = probs.view(B, T, E).topk(C, dim=0)                          # (C, T, E)
        token = sequence * T + torch.arange(T, device=x.device).view(1, T, 1)
        expert = torch.arange(E, device=x.device).expand_as(token)
        return Routing(expert.reshape(-1), weights.reshape(-1), token.reshape(-1), 0, logits, probs)


class Soft(Router):
    """All experts, weighed by a softmax: the costly upper baseline of BTX (2403.07816 sec. 3.3)."""
    traits = Traits("all experts, weighted", "BTX 2403.07816", "softmax over all", k=ALL, balance="none",
                    capacity=False)

    def forward(self, x, ctx):
        logits = self.score(x)
        probs = logits.softmax(-1)
        # every token, every expert
        indices = torch.arange(self.n_expert, device=x.device).expand_as(probs)
        return pairs(indices, probs, logits=logits, probs=probs)


class SampleTop1(Router):
    """Sample Top-1 of BTX (2403.07816 sec. 3.3): the largest component of a Gumbel-softmax."""
    traits = Traits("a sampled top-1", "BTX 2403.07816", "Gumbel-softmax, before the selection", k=1,
                    noise=True, reads=("gumbel_rate",))

    def forward(self, x, ctx):
        logits = self.score(x)
        probs = logits.softmax(-1)
        # evaluation: the likeliest expert, with gate 1
        if not self.training:
            indices = logits.argmax(-1, keepdim=True)
            return pairs(indices, torch.ones_like(probs[:, :1]), logits=logits, probs=probs)
        # the temperature falls from 1 to 0.5: tau = max(0.5, exp(-r step))
        step = torch.as_tensor(ctx.step, dtype=torch.float32, device=x.device)
        tau = torch.exp(-self.config.gumbel_rate * step).clamp_min(0.5)
        weights, indices = ((logits + gumbel_like(logits)) / tau).softmax(-1).max(-1, keepdim=True)
        return pairs(indices, weights, logits=logits, probs=probs)


class Domain(Router):
    """DEMix (Gururangan et al. 2108.05036): the expert of the sequence's known domain; nothing is learned. The
    paper mixes the predictions of whole models where the domain is unknown, as grow.ensemble does."""
    traits = Traits("the expert of the corpus", "DEMix 2108.05036", "1", k=1, balance="none", steerable=False,
                    logits=False, by_corpus=True, not_grown="expert i belongs to corpus i; a new expert needs a "
                    "new corpus, not an expansion", remedy="Their corpora give no text: see data.weights",
                    sampling="a sampled text has no label, all experts are mixed with equal weight")

    def forward(self, x, ctx):
        B, T = ctx.token_ids.shape
        # without a label (sampling) every layer averages its experts' outputs, a stand-in
        if ctx.domain is None:
            indices = torch.arange(self.n_expert, device=x.device).expand(B * T, -1)
            return pairs(indices, torch.full(indices.shape, 1 / self.n_expert, device=x.device))
        # with one, all tokens of the sequence go to its expert
        indices = ctx.domain.repeat_interleave(T).unsqueeze(-1)
        return pairs(indices, torch.ones_like(indices, dtype=torch.float32))


ROUTERS = dict(topk=TopK, noisy_topk=NoisyTopK, switch=Switch, gshard=GShard, sigmoid=Sigmoid,
               sinkhorn=Sinkhorn, base=Base, hash=Hash, rl=RL, expert_choice=ExpertChoice, soft=Soft,
               sample_top1=SampleTop1, domain=Domain)


def visited(config):
    """Routed experts that a token visits, of an FFNConfig: G * top_k, or all of them."""
    return config.experts if ROUTERS[config.router].traits.k == ALL else config.top_k * config.granularity


def help_text():
    """What each router does and looks at, for --help."""
    return "; ".join(f"{name}: {router.traits.says} [{router.traits.looks() or 'its own past alone'}]"
                     for name, router in ROUTERS.items())
