"""A GPT in one file: embeddings, rotary causal attention with a KV cache, and blocks whose feed-forward slot
is open.

What stands in the slot of each layer (dense, mixture of experts, PEER, PKM) is decided in one place,
build_ffn, from the config; the rest of the model does not know. Every slot answers with its output and a
Stats tuple, and GPT.forward hands both upward: losses that only train the router never mix with the
cross-entropy that is reported.

Axis letters: B sequences, T positions, S cached and new positions together, d = n_embd, V vocabulary.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.norm import NormOnCPU
from runtime.config import sparse_layers
from moe import Dense, MoE
from peer import PEER
from routers import Context, Stats


class Output(NamedTuple):
    """What a forward pass returns."""
    logits: Tensor | None               # (B, T, V); None in training with loss_chunks > 1
    loss: Tensor | None                 # () mean cross-entropy alone, nats per token; None without targets
    aux_loss: Tensor                    # () everything else in the training objective, coefficients applied
    stats: list[Stats]                  # one per layer


class ParamCount(NamedTuple):
    """Parameters in all, and those that one token uses."""
    total: int
    active: int


class Cache:
    """Keys and values of the positions seen so far, preallocated: two (n_layer, B, n_kv_head, block_size,
    head) tensors."""

    def __init__(self, config, batch_size, device, dtype):
        head = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_kv_head, config.block_size, head)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in range(2))
        self.length = 0                                         # positions filled; GPT.forward moves it on

    def extend(self, layer, k, v):
        """Writes the new keys and values (B, n_kv_head, T, head); returns all S of them."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


class RMSNorm(nn.Module):
    """Root-mean-square norm (1910.07467 eq. 4), (..., d) -> (..., d)."""

    def __init__(self, d):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x):
        if x.device.type == "cpu" and x.dtype == self.weight.dtype and not torch.compiler.is_compiling():
            return NormOnCPU.apply(x, self.weight)
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-5)


def rotary_table(head, block_size, base):
    """cos and signed sin of position * base^(-2i/head), (2, block_size, 1, head) (RoFormer 2104.09864 eq.
    34)."""
    frequency = base ** (-torch.arange(0, head, 2) / head)
    angle = torch.outer(torch.arange(block_size), frequency)                        # (block_size, head/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).unsqueeze(2)


def rotate(x, table):
    """Turns each pair (i, i + head/2) of x (B, T, heads, head) by its position's angle; table (2, T, 1,
    head). The paper pairs neighbours, which is the same up to the order of the features."""
    cos, sin = table.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    """Causal attention with rotary positions; query heads share n_kv_head keys and values (2305.13245)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.dropout = config.n_head, config.n_kv_head, config.dropout
        self.head = config.n_embd // config.n_head
        heads = self.n_head + 2 * self.n_kv_head
        self.qkv = nn.Linear(config.n_embd, heads * self.head, bias=config.qkv_bias)
        self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, table, cache, layer):
        B, T, d = x.shape
        turned = self.n_head + self.n_kv_head
        qk, v = self.qkv(x).view(B, T, -1, self.head).split([turned, self.n_kv_head], 2)
        qk, v = rotate(qk, table).transpose(1, 2), v.transpose(1, 2)                # (B, heads, T, head)
        q, k = qk.split([self.n_head, self.n_kv_head], 1)
        mask = None
        if cache is not None:
            k, v = cache.extend(layer, k.to(cache.k.dtype), v.to(cache.v.dtype))    # (B, n_kv_head, S, head)
            if T > 1 and cache.length:             # new token i sees all cached ones and the new ones up to i
                mask = torch.ones(T, k.shape[2], dtype=torch.bool, device=x.device).tril(cache.length)
        y = F.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, mask, self.dropout if self.training else 0.0,
            is_causal=T > 1 and mask is None, enable_gqa=self.n_head != self.n_kv_head)
        return self.out(y.transpose(1, 2).reshape(B, T, d))


def build_ffn(config, layer):
    """The feed-forward layer of block `layer`: the one place that knows which kinds there are."""
    f, d, sparse = config.ffn, config.model.n_embd, sparse_layers(config)
    if layer not in sparse:
        return Dense(d, f.d_dense if sparse else f.d_ff, f.activation)
    if f.kind == "moe":
        return MoE(f, d, config.model.vocab_size, layer)
    return PEER(f, d, config.model.n_layer)


class Block(nn.Module):
    """x + attention(norm x), then x + ffn(norm x)."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.norm_attention = RMSNorm(config.model.n_embd)
        self.attention = Attention(config.model)
        self.norm_ffn = RMSNorm(config.model.n_embd)
        self.ffn = build_ffn(config, layer)
        self.dropout = nn.Dropout(config.model.dropout)

    def forward(self, x, ctx, table, cache):
        x = x + self.dropout(self.attention(self.norm_attention(x), table, cache, self.layer))
        y, stats = self.ffn(self.norm_ffn(x), ctx)
        return x + self.dropout(y), stats


class GPT(nn.Module):
    """The language model of a Config (model.vocab_size must be set).

    forward(idx (B, T), targets (B, T) or None, cache or None, domain (B,) or None, step) -> Output. With a
    cache, idx holds only the new tokens, and cached positions and T together may not pass block_size
    (ValueError).
    """

    def __init__(self, config):
        super().__init__()
        m = config.model
        if not m.vocab_size:
            raise ValueError("model.vocab_size = 0: take it from the tokenizer before building the model")
        self.config = config
        self.embedding = nn.Embedding(m.vocab_size, m.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(m.n_layer))
        self.norm = RMSNorm(m.n_embd)
        self.head = nn.Linear(m.n_embd, m.vocab_size, bias=False)
        self.dropout = nn.Dropout(m.dropout)
        table = rotary_table(m.n_embd // m.n_head, m.block_size, m.rope_base)
        self.register_buffer("rotary", table, persistent=False)
        self.init_weights()
        if m.tie_embeddings:
            self.head.weight = self.embedding.weight

    @torch.no_grad()
    def init_weights(self):
        """Every matrix gets N(0, 1 / (2 fan_in)): with unit-variance input (the norm before it) each output
        starts at variance 1/2, whatever the width. Matrices that write to the residual stream are divided by
        sqrt(2 n_layer), so that the sum of all 2 n_layer writes, not each of them, has the size of one. The
        embedding, also the tied head, gets std 0.02: first logits near 0, first loss near log V. No expert
        starts at zero or like another. Routers and PEER tables are set where they are defined.
        """
        for name, p in self.named_parameters():
            if name.endswith(("attention.qkv.weight", "w_in.weight", "experts.w_in")):
                p.normal_(std=(2 * p.shape[-1]) ** -0.5)
            elif name.endswith(("attention.out.weight", "w_out.weight", "experts.w_out")):
                p.normal_(std=(2 * p.shape[-1]) ** -0.5 / (2 * len(self.blocks)) ** 0.5)
            elif name in ("embedding.weight", "head.weight"):
                p.normal_(std=0.02)
            elif name.endswith(("qkv.bias", "shared_gate.weight")):
                p.zero_()

    def forward(self, idx, targets=None, cache=None, domain=None, step=0):
        B, T = idx.shape
        start = 0 if cache is None else cache.length
        if start + T > self.config.model.block_size:
            raise ValueError(f"{start + T} positions do not fit model.block_size = "
                             f"{self.config.model.block_size}")
        ctx = Context(idx, domain, step, cache is not None)
        table = self.rotary[:, start:start + T]
        x, stats = self.dropout(self.embedding(idx)), []                    # (B, T, d)
        for block in self.blocks:
            x, s = block(x, ctx, table, cache)
            stats.append(s)
        if cache is not None:
            cache.length += T
        x, aux = self.norm(x), sum(s.aux_loss for s in stats)
        if targets is None:
            return Output(self.head(x), None, aux, stats)
        logits, token_loss = self.token_loss(x, targets)
        return Output(logits, token_loss.mean(), aux + self.policy_loss(stats, token_loss), stats)

    def token_loss(self, x, targets):
        """(logits, cross-entropy of each token (B, T) in float32); in slices and without logits if
        loss_chunks > 1."""
        def slice_loss(x, targets):
            return F.cross_entropy(self.head(x).float().flatten(0, -2), targets.flatten(), reduction="none")

        chunks = self.config.model.loss_chunks
        if chunks == 1 or not self.training:
            logits = self.head(x)
            loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
            return logits, loss.view_as(targets)
        parts = [checkpoint(slice_loss, a, t, use_reentrant=False)   # backward makes the slice's logits again
                 for a, t in zip(x.flatten(0, 1).chunk(chunks), targets.flatten().chunk(chunks))]
        return None, torch.cat(parts).view_as(targets)

    def policy_loss(self, stats, token_loss):
        """REINFORCE for routers that sampled an expert: -(r - b) log pi(e) and (r - b)^2, with the reward r
        the token's log-likelihood (Clark et al. 2202.01169). The advantage is whitened over the batch: r
        moves by nats while the model learns, and an unscaled step would follow the model's progress instead
        of the router's choice."""
        loss, reward = torch.zeros((), device=token_loss.device), -token_loss.detach()
        for s in stats:
            if s.log_prob is not None:
                advantage = (reward - s.baseline).detach()
                white = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-5)
                policy, value = -(white * s.log_prob).mean(), (reward - s.baseline).square().mean()
                loss = loss + self.config.ffn.rl_loss * (policy + value)
        return loss

    def new_cache(self, batch_size=1, dtype=None):
        """An empty Cache for `batch_size` sequences on the model's device."""
        weight = self.embedding.weight
        return Cache(self.config.model, batch_size, weight.device, dtype or weight.dtype)

    def update_balance(self, loads):
        """After each optimizer step: hands every layer the load that it saw in that step, a list of (E,)
        tensors."""
        for block, load in zip(self.blocks, loads):
            if isinstance(block.ffn, MoE):
                block.ffn.update_bias(load)

    def set_token_counts(self, counts):
        """Before training: how often each token id occurs in the corpus, (V,), for ffn.hash_table =
        "balanced"; nothing else looks at it."""
        f = self.config.ffn
        for block in self.blocks:
            if isinstance(block.ffn, MoE) and f.router == "hash" and f.hash_table == "balanced":
                block.ffn.router.balance(counts)

    def num_params(self):
        """ParamCount(total, active): a tied head counts once; of the routed experts only those that a token
        visits; LoRA adapters do not, for they are folded into the weights wherever the model is used."""
        total = sum(p.numel() for name, p in self.named_parameters() if ".lora_" not in name)
        return ParamCount(total, total - sum(block.ffn.inactive_params() for block in self.blocks))

    def flops_per_token(self, context=None):
        """Forward FLOPs per token, a product of (n, a) and (a, b) as 2ab: projections, scores over the mean
        number of positions that a causal token sees, feed-forward layers with router and retrieval, head.
        Training: 3 times."""
        m, T = self.config.model, context or self.config.model.block_size
        attention = sum(2 * layer.weight.numel() for layer in self.blocks[0].attention.children())
        attention += 2 * 2 * m.n_embd * (T + 1) / 2
        ffn = sum(block.ffn.flops_per_token() for block in self.blocks)
        return int(m.n_layer * attention + ffn + 2 * m.n_embd * m.vocab_size)
