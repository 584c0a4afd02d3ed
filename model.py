"""A GPT in one file: embeddings, rotary causal attention with a KV cache, and blocks with two open slots, for
what mixes positions and for the feed-forward layer.

What stands in the slots is looked up in MIXERS and KINDS; the rest of the model does not know. A feed-forward
layer answers with output and Stats; what only trains routers never mixes with the loss that is reported.

Letters as in ffn.py; here also S, cached and new positions together.
"""
import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe
import peer
from balance import LOSSES, OF_MICRO_BATCH, coefficients, policy_loss
from ffn import ACTIVATIONS, Context, Dense, Stats, draw, fill_widths
from mamba import Mamba
from moe import MoE
from peer import PEER, PKM
from routers import ROUTERS, Linear32


class Attention(nn.Module):
    """Causal attention with rotary positions (None: without); query heads share n_kv_head keys and values
    (2305.13245). It answers what a mixer does: forward(x (B, T, d), rotary, state, start) -> (B, T, d), where x
    follows `start` positions that `state` remembers, a tensor or several that new_state makes and forward
    writes in; init_weights; flops_per_token."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.dropout = config.n_head, config.n_kv_head, config.dropout
        self.head, self.window = config.head_width, config.window or config.block_size
        heads, width = self.n_head + 2 * self.n_kv_head, self.n_head * self.head
        self.qkv = nn.Linear(config.n_embd, heads * self.head, bias=config.qkv_bias)
        self.out = nn.Linear(width, config.n_embd, bias=config.out_bias)
        # norms of queries and of keys, over the width of one head or of all
        one, self.norm_q, self.norm_k = config.qk_norm == "head", None, None
        if config.qk_norm != "none":
            self.norm_q = RMSNorm(self.head if one else width, config.norm_eps)
            self.norm_k = RMSNorm(self.head if one else self.n_kv_head * self.head, config.norm_eps)

    def init_weights(self, n_layer):
        draw(self.qkv.weight)
        draw(self.out.weight, n_layer)
        for bias in (b for b in (self.qkv.bias, self.out.bias) if b is not None):
            nn.init.zeros_(bias)

    def forward(self, x, rotary, state, start):
        B, T = x.shape[:2]
        # one product for queries, keys and values; the first two are turned by their positions
        turned = self.n_head + self.n_kv_head
        qk, v = self.qkv(x).view(B, T, -1, self.head).split([turned, self.n_kv_head], 2)
        qk = qk if self.norm_q is None else self.normed(qk)
        qk = qk if rotary is None else rotate(qk, rotary)
        qk, v = qk.transpose(1, 2), v.transpose(1, 2)                               # (B, heads, T, head)
        q, k = qk.split([self.n_head, self.n_kv_head], 1)
        # with a cache: all S keys and values so far
        captured = isinstance(start, Tensor)
        if captured:
            # of any length, for a CUDA graph: the whole room
            state.index_copy_(3, start, torch.stack([k, v]).to(state.dtype))
            k, v = state                                                            # (B, n_kv_head, room, head)
        elif state is not None:
            state[:, :, :, start:start + T] = torch.stack([k, v])
            k, v = state[:, :, :, :start + T]                                       # (B, n_kv_head, S, head)
        # position i sees j if 0 <= i - j < window; no mask: one new token sees all, of a text each sees up to i
        mask, S = None, k.shape[2]
        if captured or T > 1 and start or S > self.window:
            i, j = torch.arange(T, device=x.device) + start, torch.arange(S, device=x.device)
            behind = i.unsqueeze(1) - j                                             # (T, S)
            mask = (behind >= 0) & (behind < self.window)
        y = F.scaled_dot_product_attention(
            q.to(v.dtype), k.to(v.dtype), v, mask, self.dropout if self.training else 0.0,
            is_causal=T > 1 and mask is None, enable_gqa=self.n_head != self.n_kv_head)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))

    def normed(self, qk):
        """Queries and keys (B, T, heads, head), each normed over as many numbers as its norm has weights."""
        both = zip((self.norm_q, self.norm_k), qk.split([self.n_head, self.n_kv_head], 2))
        return torch.cat([norm(x.reshape(*x.shape[:2], -1, len(norm.weight))).view_as(x) for norm, x in both], 2)

    def new_state(self, batch_size, block_size, dtype):
        """Room for the keys and values of block_size positions, (2, B, n_kv_head, block_size, head)."""
        return self.out.weight.new_zeros(2, batch_size, self.n_kv_head, block_size, self.head, dtype=dtype)

    def flops_per_token(self, context):
        """Forward FLOPs: projections, and scores and sums over the positions that the mean token sees."""
        # token i sees min(i, w): (T + 1) / 2 on the mean, without a window
        weights, w = self.qkv.weight.numel() + self.out.weight.numel(), min(self.window, context)
        return 2 * weights + 2 * 2 * self.out.in_features * (w - w * (w - 1) / (2 * context))


def rotary_table(m):
    """cos and signed sin of position * frequency, (2, block_size, 1, head) (RoFormer 2104.09864)."""
    # pair i turns by base^(-2i/head) from one position to the next
    frequency = m.rope_base ** (-torch.arange(0, m.head_width, 2) / m.head_width)
    # for longer texts slower: linear (2306.15595) all pairs, llama3 those of few turns in the context before
    kept = 0.0
    if m.rope_scaling == "llama3":
        turns = m.rope_original * frequency / (2 * math.pi)
        kept = ((turns - m.rope_low) / (m.rope_high - m.rope_low)).clamp(0, 1)      # 1: as it was
    if m.rope_scaling != "none":
        frequency = frequency * (kept + (1 - kept) / m.rope_factor)
    angle = torch.outer(torch.arange(m.block_size), frequency)                      # (block_size, head/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).unsqueeze(2)


def rotate(x, table):
    """Turns x (B, T, heads, head) by its positions' angles; table (2, T, 1, head)."""
    # eq. 34, for each pair (i, i + head/2); the paper pairs neighbours: the same up to the features' order
    cos, sin = table.to(x.dtype)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class RMSNorm(nn.Module):
    """Root-mean-square norm (1910.07467 eq. 4), (..., d) -> (..., d)."""

    def __init__(self, d, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(d)), eps

    def forward(self, x):
        from kernels.norm import rms_norm               # eq. 4: F.rms_norm, faster on a CPU
        return rms_norm(x, self.weight, self.eps)


# The names in a config of what can stand in the two slots of a block: a line here is a new mixer or layer.
MIXERS = dict(attention=Attention, mamba=Mamba)
KINDS = dict(dense=Dense, moe=MoE, peer=PEER, pkm=PKM)


def build_ffn(config, layer):
    """The feed-forward layer of block `layer`: of the kind of [ffn] where that stands, else dense."""
    f, m, sparse = config.ffn, config.model, sparse_layers(config)
    # a dense model has layers of width d_ff, the dense layers of a sparse one d_dense
    if layer in sparse:
        return KINDS[f.kind](f, m.n_embd, vocab_size=m.vocab_size, layer=layer, n_layer=m.n_layer)
    return Dense(m.n_embd, f.d_dense if sparse else f.d_ff, f.activation)


class Block(nn.Module):
    """x + mixer(norm x), then x + ffn(norm x); ffn.inserted: x + dense(norm x) between, then x + ffn(x)."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm_attention = RMSNorm(config.model.n_embd, config.model.norm_eps)
        mixer = "attention" if layer in attention_layers(config.model) else config.model.mixer
        self.attention = MIXERS[mixer](config.model)
        self.norm_ffn = RMSNorm(config.model.n_embd, config.model.norm_eps)
        self.ffn, f = build_ffn(config, layer), config.ffn
        self.dense = Dense(config.model.n_embd, f.d_dense, f.activation) if self.ffn.inserted else None
        self.dropout = nn.Dropout(config.model.dropout)

    def forward(self, x, ctx, rotary, state, start):
        # tokens exchange what they know, then each by itself goes through its feed-forward layer
        x = x + self.dropout(self.attention(self.norm_attention(x), rotary, state, start))
        h = self.norm_ffn(x)
        # an inserted layer comes after the block's dense one, and gets the residual stream as it is
        if self.dense is not None:
            h = x = x + self.dropout(self.dense(h, ctx)[0])
        y, stats = self.ffn(h, ctx)
        return x + self.dropout(y), stats


class Output(NamedTuple):
    logits: Tensor | None               # (B, T, V); None in training with loss_chunks > 1
    loss: Tensor | None                 # () mean cross-entropy alone, nats per token; None without targets
    aux_loss: Tensor                    # () everything else in the training objective, coefficients applied
    stats: list[Stats]                  # one per layer


class ParamCount(NamedTuple):
    """Parameters in all, and those that one token uses."""
    total: int
    active: int


class Cache:
    """What the mixers remember of the positions seen so far, a state per layer. length: how many they are, which
    GPT.forward moves on; a (1,) tensor where a CUDA graph reads one token after the other."""

    def __init__(self, states):
        self.states, self.length = states, 0


class GPT(nn.Module):
    """The language model of a Config, which is completed and checked here (ConfigError, ValueError).

    forward(idx (B, T), targets (B, T) or None, cache or None, domain (B,) or None, step) -> Output. With a
    cache, idx holds only the new tokens; more than block_size positions are a ValueError. A training loop of
    one's own minimises loss + aux_loss and calls after_step([s.load for s in stats]) after each step.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config = check(resolve(copy.deepcopy(config)))
        self.sparse = sparse_layers(config)
        m = config.model
        if not m.vocab_size:
            raise ValueError("model.vocab_size = 0: take it from the tokenizer before building the model")
        self.embedding = nn.Embedding(m.vocab_size, m.n_embd)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(m.n_layer))
        self.norm = RMSNorm(m.n_embd, m.norm_eps)
        self.head = nn.Linear(m.n_embd, m.vocab_size, bias=False)
        self.dropout = nn.Dropout(m.dropout)
        self.register_buffer("rotary", rotary_table(m) if m.rope else None, persistent=False)
        self.init_weights()
        if m.tie_embeddings:
            self.head.weight = self.embedding.weight

    def init_weights(self):
        """Every layer draws its own (ffn.draw); routers and PEER tables are drawn where they are made."""
        # embedding and head get std 0.02: first logits near 0, first loss near log V
        nn.init.normal_(self.embedding.weight, std=0.02)
        for block in self.blocks:
            for part in filter(None, (block.attention, block.dense, block.ffn)):
                part.init_weights(len(self.blocks))
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, idx, targets=None, cache=None, domain=None, step=0):
        B, T = idx.shape
        start = 0 if cache is None else cache.length
        captured = isinstance(start, Tensor)
        if not captured and start + T > self.config.model.block_size:
            raise ValueError(f"{start + T} positions: model.block_size = {self.config.model.block_size}")
        # embeddings, then block after block
        ctx = Context(idx, domain, step, cache is not None)
        rotary = self.rotary
        if rotary is not None:
            rotary = rotary.index_select(1, start) if captured else rotary[:, start:start + T]
        states = [None] * len(self.blocks) if cache is None else cache.states
        x, stats = self.dropout(self.embedding(idx)), []                            # (B, T, d)
        for block, state in zip(self.blocks, states):
            x, s = block(x, ctx, rotary, state, start)
            stats.append(s)
        if cache is not None:
            cache.length += T
        # what the layers add to the objective, apart from the loss that is reported
        x, aux = self.norm(x), sum(s.aux_loss for s in stats)
        # the output layer; a router that learns from the tokens' losses (rl) gets its objective now
        if targets is None:
            return Output(self.head(x), None, aux, stats)
        logits, loss, token_loss = self.token_loss(x, targets)
        return Output(logits, loss, aux + policy_loss(stats, token_loss, self.config.ffn.rl_loss), stats)

    def token_loss(self, x, targets):
        """(logits, mean cross-entropy (), cross-entropy of each token (B, T)), float32. In training with
        loss_chunks > 1 there are no logits, and the mean alone carries a gradient."""
        chunks = self.config.model.loss_chunks
        if chunks > 1 and self.training:
            # loss and gradient of the logits in one pass, a slice of the tokens at a time
            from kernels.loss import head_loss
            rows = -(-targets.numel() // chunks)
            mean, loss = head_loss(x.flatten(0, 1), self.head.weight, targets.flatten(), rows)
            return None, mean, loss.view_as(targets)
        logits = self.head(x)                                                       # (B, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        kept = (targets != -100).sum().clamp(min=1)             # a target of -100 counts for nothing
        return logits, loss.mean() * (targets.numel() / kept), loss.view_as(targets)

    def new_cache(self, batch_size=1, dtype=None):
        """An empty Cache for `batch_size` sequences on the model's device."""
        dtype, T = dtype or self.embedding.weight.dtype, self.config.model.block_size
        return Cache([block.attention.new_state(batch_size, T, dtype) for block in self.blocks])

    def after_step(self, loads):
        """After each optimizer step: hands every layer its (E,) load, by which loss-free biases move."""
        for block, load in zip(self.blocks, loads):
            block.ffn.after_step(load)

    def set_token_counts(self, counts):
        """Before training: how often each token id occurs in the corpus, (V,), for balanced hash tables."""
        for block in self.blocks:
            block.ffn.set_token_counts(counts)

    def per_micro_batch(self):
        """Settings by which train.grad_accum changes what is trained, as texts; none: it only saves memory."""
        found = [key for block in self.blocks for key in block.ffn.by_parts()]
        found += ["model.dropout"] if self.config.model.dropout else []
        return [f"{key} {self.config.get(key)}" for key in dict.fromkeys(found)]

    def differences(self):
        """Those by which several processes would not train the model that one process would."""
        # balance losses and batch norms are put together over processes, quantiles are averaged
        together = *(f"ffn.balance {name}" for name in OF_MICRO_BATCH - {"quantile"}), "ffn.query_norm"
        return [text for text in self.per_micro_batch() if not text.startswith(together)]

    def not_compiled(self):
        """Why torch.compile cannot take it, or an empty text."""
        return next(filter(None, (block.ffn.not_compiled() for block in self.blocks)), "")

    def not_captured(self, dtype):
        """Why a training step in `dtype` cannot be a CUDA graph, or an empty text."""
        return next(filter(None, (block.ffn.not_captured(dtype) for block in self.blocks)), "")

    def num_params(self):
        """ParamCount(total, active): a tied head counts once; of the routed experts only those that a token
        visits; LoRA adapters do not, for they are folded into the weights wherever the model is used."""
        total = sum(p.numel() for name, p in self.named_parameters() if ".lora_" not in name)
        return ParamCount(total, total - sum(block.ffn.inactive_params() for block in self.blocks))

    def flops_per_token(self, context=None):
        """Forward FLOPs per token, a multiply-add as 2, router and retrieval included. Training: 3 times."""
        m, T = self.config.model, context or self.config.model.block_size
        blocks = sum(b.attention.flops_per_token(T) + b.ffn.flops_per_token() for b in self.blocks)
        blocks += sum(b.dense.flops_per_token() for b in self.blocks if b.dense is not None)
        return int(blocks + 2 * m.n_embd * m.vocab_size)


# ---- the config of a model: what follows from what, and what fits together


def sparse_layers(config):
    """Indices of the layers whose feed-forward slot holds the kind of [ffn]; all others are dense."""
    f = config.ffn
    if KINDS[f.kind] is Dense:
        return []
    every = [i for i in range(config.model.n_layer) if (i + 1) % f.moe_every == 0]
    return [i for i in (sorted(set(f.moe_layers)) or every) if i >= f.n_dense_first]


def attention_layers(m):
    """Indices of the blocks with attention among those with another mixer, of a ModelConfig."""
    # in the middle of each so many blocks, as in Jamba
    every = [i for i in range(m.n_layer) if m.attention_every and i % m.attention_every == m.attention_every // 2]
    return sorted(set(m.attention_layers)) or every


def resolve(config):
    """Fills in, in place, the values that follow from others (0 in the file). ConfigError for unknown names."""
    from runtime.config import check_names
    m, f = config.model, config.ffn
    check_names(config, {
        "model.mixer": MIXERS, "ffn.kind": KINDS, "ffn.router": ROUTERS, "ffn.balance": ["auto", "none", *LOSSES],
        "ffn.activation": ["swiglu", *ACTIVATIONS]})
    # widths, heads, balance
    m.n_kv_head = m.n_kv_head or m.n_head
    fill_widths(f, m.n_embd)
    peer.fill_keys(config, m.n_embd)
    moe.fill_choices(config)
    # where the sparse layers stand
    if not f.moe_every:
        f.moe_every = 1
        f.moe_layers = f.moe_layers or KINDS[f.kind].usual_layers(m.n_layer)
    return config


def check(config):
    """The config, if model and layers fit together; raises ConfigError naming the first key that does not."""
    from runtime.fits import model_checks, refuse               # what fits together, and the words for it
    kind, some_attention = KINDS[config.ffn.kind], bool(attention_layers(config.model))
    some_sparse = kind is Dense or bool(sparse_layers(config))
    return refuse(config, model_checks(config, some_attention, some_sparse) + kind.checks(config))


def load_config(path=None, overrides=()):
    """The complete Config of a TOML file and of (key, value) pairs, values of Python or text. With
    train.init_from the model is not known yet, and nothing is checked but each value. Raises ConfigError."""
    from runtime.config import check_run, read_config
    from runtime.given import refuse_unread
    config = resolve(read_config(path, overrides))
    if not config.train.init_from:
        check_run(check(config))
        refuse_unread(config, readers())
    return config


def readers():
    """[(choice, value, names)]: the settings of [ffn] that are read with ffn.CHOICE = value."""
    # where the sparse layers stand matters to all kinds but dense
    placed = ("d_dense", "moe_every", "moe_layers", "n_dense_first")
    return [*(("kind", name, kind.reads + (() if kind is Dense else placed)) for name, kind in KINDS.items()),
            *(("router", name, router.traits.reads) for name, router in ROUTERS.items()),
            *(("balance", name, coefficients(name)) for name in LOSSES)]


def load_model(folder, device="cpu", which="best", dtype=torch.float32):
    """(GPT in evaluation mode, Config, Tokenizer, header) of a run folder. which: "best", which is "last" where
    there is no evaluation, or "last". dtype: of the weights (a router's are float32); None: as they are stored,
    views of the file. Raises CheckpointError."""
    from data.tokenizers import Tokenizer
    from runtime import checkpoint, config
    mapped = dtype != torch.float32
    saved = checkpoint.load_plain(folder, device, which, mapped)
    settings = resolve(config.from_tables(saved.header["config"], str(folder)))
    with checkpoint.undrawn(mapped):
        model = GPT(settings).to(device)
    checkpoint.load_weights(model, saved.model, folder, mapped)
    for part in model.to(dtype).modules():
        part.to(torch.float32 if mapped and isinstance(part, Linear32) else None)
    return model.eval(), settings, Tokenizer.from_dict(saved.header["tokenizer"]), saved.header
