"""The feed-forward slot of a block: what a layer in it gets, what it tells, and the dense layer.

Every kind is called as `ffn(x, ctx) -> (y, stats)` with x and y (B, T, d). It is a FeedForward with a line in
model.KINDS that overrides what is true of it; others ask these methods, never which kind it is.

Letters, here and in the whole repository: B sequences, T positions, d width, V vocabulary; N = B T tokens;
E experts, w hidden width of one; k choices of a token, P = N k pairs (token, expert); h heads, m sub-keys of
a half, R = h k rows of a token.
"""
import copy
import math
from typing import NamedTuple, NewType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from settings import Config


class Context(NamedTuple):
    """What a feed-forward layer may know beside its input."""
    token_ids: Tensor                   # (B, T)
    domain: Tensor | None = None        # (B,) index of the corpus that each sequence came from
    step: Tensor | int = 0     # optimizer step; a 0-d tensor under torch.compile, which would guard on an int
    generating: bool = False            # a KV cache is in use: x holds the newest positions only


# A () tensor of a layer that is averaged over micro-steps, processes and sparse layers, and gets a column of
# its name in log.csv: to log one more, declare it in Stats and return it. None: the layer has none.
Number = NewType("Number", Tensor)


class Stats(NamedTuple):
    """What a feed-forward layer reports upward, the same for every kind."""
    load: Tensor                        # (E,) pairs sent to each expert; PEER: router weight given to each
    top_expert: Tensor                  # (B, T) the expert of largest weight
    aux_loss: Number                    # added to the training objective, coefficients applied
    balance_loss: Number | None = None  # before its coefficient
    z_loss: Number | None = None        # before its coefficient
    dropped: Number | None = None       # share of the pairs that found no slot
    entropy: Number | None = None       # mean entropy of the routing distribution, nats
    routing: tuple | None = None        # in evaluation the whole choice, a routers.Routing
    log_prob: Tensor | None = None      # (B, T) log-probability of the expert that a router sampled
    baseline: Tensor | None = None      # (B, T) the reward that this router expected


NUMBERS = [name for name, kind in Stats.__annotations__.items() if kind in (Number, Number | None)]


class FeedForward(nn.Module):
    """What every layer in the slot answers; the answers here are those of a layer without experts."""
    n_expert = 1            # experts E
    n_active = 1            # of these, how many one token visits
    n_frozen = 0            # the first ones of them never change in training
    many = False            # too many experts to be watched and drawn one by one
    steerable = False       # something can even out their load, so that a collapse is worth a warning
    inserted = False        # it follows the dense layer of its block, and reads the residual stream
    columns = ()            # settings of [ffn] that tell two layers of this kind apart, for tables of models
    reads = ()              # settings of [ffn] that it reads and not every other kind

    @staticmethod
    def checks(config):
        """[(is wrong, key, why)] of a complete Config with this kind of layer."""
        return [(config.ffn.n_frozen, "ffn.n_frozen", f"needs experts, and {config.ffn.kind} has none")]

    @staticmethod
    def usual_layers(n_layer):
        """Where it stands if the config does not say; empty: in every layer."""
        return []

    def describe(self, dtype):
        """A few words on what it holds and how it computes in `dtype`; ValueError if it cannot."""
        return ""

    def remarks(self):
        """What a reader of sampled text should know of it: list of texts."""
        return []

    def init_weights(self, n_layer):
        """Draws the parameters that the constructor left open; GPT calls it once, layer after layer."""

    def after_step(self, load):
        """Called after every optimizer step with the (E,) load of the whole step, all processes together."""

    def set_token_counts(self, counts):
        """Told before training: how often each token id occurs in the corpus, (V,)."""

    def inactive_params(self):
        """Parameters that a token does not use."""
        return 0

    def flops_per_token(self):
        """Forward FLOPs: a multiply-add, 2, for each number of a matrix that a token meets."""
        # without low-rank adapters, which are folded into the weights wherever the model is used
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.dim() > 1 and "lora_" not in name)
        return 2 * (matrices - self.inactive_params())

    def not_compiled(self):
        """Why torch.compile cannot take it, or an empty text."""
        return ""

    def not_captured(self, dtype):
        """Why a training step in `dtype` cannot be a CUDA graph, or an empty text."""
        return self.not_compiled()

    def not_grown(self):
        """Why more experts cannot be added to a trained one, or an empty text."""
        return "it has no experts; `python -m grow.btx upcycle` makes them"

    def by_parts(self):
        """Keys of the settings by which it trains otherwise if a batch is cut into parts."""
        return []

    def remedy(self):
        """What evens out the load of its experts."""
        return ""


def plain_stats(ctx):
    """Stats of a layer without experts: every token visits the one there is."""
    zero = torch.zeros((), device=ctx.token_ids.device)
    load = torch.full((1,), float(ctx.token_ids.numel()), device=zero.device)
    return Stats(load, torch.zeros_like(ctx.token_ids), zero, zero, zero, zero, zero)


# One line here is a new activation for dense layers and experts. The grouped and fused paths also need its
# gradient, in kernels/common.py; without one, experts take the loop.
ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "relu2": lambda h: F.relu(h).square()}


def hidden_rows(width, activation):
    """Rows of the first matrix: swiglu stacks [gate | up]."""
    return 2 * width if activation == "swiglu" else width


def activation_of(h, kind):
    """Non-linearity of the pre-activation: (..., 2w) -> (..., w) for swiglu, else (..., w) -> (..., w)."""
    # SwiGLU (2002.05202 eq. 6): silu(gate) * up
    if kind == "swiglu":
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up
    return ACTIVATIONS[kind](h)


def fill_widths(config, d):
    """Sets the hidden widths of an FFNConfig that are 0."""
    # 4 d; 8/3 d for swiglu, which has three matrices, and so as many parameters; to a multiple of 8
    if not config.d_ff:
        config.d_ff = 8 * math.ceil(d * (1 if config.activation == "swiglu" else 1.5) / 3)
    config.d_dense = config.d_dense or config.d_ff


def by_hand(config, d, fill, checks):
    """An FFNConfig made in Python, completed by fill(Config, d) and checked, as a copy. Raises ConfigError."""
    # a Config of which only [ffn] means anything
    whole = Config(ffn=copy.copy(config))
    fill_widths(whole.ffn, d)
    fill(whole, d)
    for wrong, key, why in checks(whole):
        if wrong and key.startswith("ffn."):
            whole.fail(key, why)
    return whole.ffn


@torch.no_grad()
def draw(weight, n_layer=0):
    """Fills a matrix (..., out, in); n_layer: of one that writes to the residual stream."""
    # N(0, 1 / (2 in)): of an input of variance 1, as the norm gives, each output has variance 1/2
    std = (2 * weight.shape[-1]) ** -0.5
    # the sum of all 2 n_layer writes to the residual stream has the size of one
    weight.normal_(std=std / (2 * n_layer) ** 0.5 if n_layer else std)


class MLP(nn.Module):
    """One feed-forward layer, (..., d) -> (..., d), hidden width w."""

    def __init__(self, d, width, activation):
        super().__init__()
        self.activation = activation
        self.w_in = nn.Linear(d, hidden_rows(width, activation), bias=False)
        self.w_out = nn.Linear(width, d, bias=False)

    def init_weights(self, n_layer):
        draw(self.w_in.weight)
        draw(self.w_out.weight, n_layer)

    def forward(self, x):
        return self.w_out(activation_of(self.w_in(x), self.activation))


class Dense(FeedForward):
    """The dense layer in the slot: one expert that every token visits."""

    def __init__(self, d, width, activation):
        super().__init__()
        self.mlp = MLP(d, width, activation)

    def init_weights(self, n_layer):
        self.mlp.init_weights(n_layer)

    def forward(self, x, ctx):
        return self.mlp(x), plain_stats(ctx)
