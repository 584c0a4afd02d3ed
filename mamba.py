"""Mamba, a selective state space layer, in the slot of attention (2312.00752; inside Jamba, 2403.19887).

Where attention keeps every position, it keeps a state of fixed size: each channel has n numbers, which every
position lets decay, adds to, and reads. How much of each it does follows from the position's own input: that
is the selection. The time for a text grows with its length, not with the square, and a cache has one size.

Letters as in ffn.py; also c channels (expand * d), n numbers in the state of each (d_state), K positions of
the convolution (d_conv), r the width of what delta is made from (dt_rank). The paper's A, B, C and D are
called rate, write, read and skip, since B means sequences.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from ffn import draw


def scan_loop(x, delta, rate, write, read, h):
    """The selective scan as a loop over positions: x, delta (B, T, c); rate (n, c); write, read (B, T, n);
    h (B, n, c) the state before them -> y (B, T, c), and the state after them.

    The one to read; kernels/mamba.py has the one to train with. A position of small delta leaves the state
    nearly as it is, one of large delta lets it decay and writes itself.
    """
    ys = []
    for t in range(x.shape[1]):
        # eq. 4, zero-order hold of A: each number of the state decays at its rate, which is negative
        decay = torch.exp(delta[:, t, None] * rate)                                 # (B, n, c)
        # eq. 2a: h_t = exp(delta A) h_(t-1) + delta B x, with B by the first-order rule of the authors' code
        h = decay * h + write[:, t, :, None] * (delta[:, t] * x[:, t])[:, None]
        # eq. 2b: y_t = C h_t
        ys.append((read[:, t, :, None] * h).sum(1))
    return torch.stack(ys, 1), h


def scan(x, delta, rate, write, read, h):
    """scan_loop in chunks: the same numbers, fast (kernels/mamba.py)."""
    from kernels.mamba import Scan
    return Scan.apply(x, delta, rate, write, read, h)


def convolve(x, weight, bias):
    """The last K positions of each channel, weighted: x (B, K - 1 + T, c), weight (K, c), bias (c,) ->
    (B, T, c). The last weight is that of the position itself."""
    K, T = len(weight), x.shape[1] - len(weight) + 1
    y = bias
    for k in range(K):
        y = torch.addcmul(y, x[:, k:k + T], weight[k])
    return y


class Mamba(nn.Module):
    """The layer (2312.00752 fig. 3) with Jamba's norms on what the selection is made from: (B, T, d) ->
    (B, T, d). A mixer (see model.Attention) that ignores rotary positions, since the order of positions is in
    the states. Its cache: the last K - 1 inputs of the convolution, and the state of the scan."""

    def __init__(self, config):
        super().__init__()
        d, self.channels, self.n = config.n_embd, config.expand * config.n_embd, config.d_state
        self.rank = config.dt_rank or math.ceil(d / 16)
        self.w_in = nn.Linear(d, 2 * self.channels, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(config.d_conv, self.channels))
        self.conv_bias = nn.Parameter(torch.zeros(self.channels))
        self.w_select = nn.Linear(self.channels, self.rank + 2 * self.n, bias=False)
        self.norm_delta, self.norm_write, self.norm_read = (
            nn.RMSNorm(width, eps=1e-6) for width in (self.rank, self.n, self.n))
        self.w_delta = nn.Linear(self.rank, self.channels)
        self.log_rate = nn.Parameter(torch.empty(self.n, self.channels))
        self.skip = nn.Parameter(torch.ones(self.channels))
        self.out = nn.Linear(self.channels, d, bias=False)

    @torch.no_grad()
    def init_weights(self, n_layer):
        for weight in (self.w_in.weight, self.w_select.weight, self.w_delta.weight):
            draw(weight)
        draw(self.out.weight, n_layer)
        # of K inputs of variance 1, the sum has variance 1/3
        self.conv_weight.uniform_(-1, 1).div_(len(self.conv_weight) ** 0.5)
        # A = -(1 .. n) in every channel (S4D-Real, sec. 3.6)
        self.log_rate.copy_(torch.arange(1, self.n + 1).log().unsqueeze(1).expand_as(self.log_rate))
        # delta starts log-uniform in [0.001, 0.1]: the bias is softplus^-1 of that, log(e^delta - 1)
        delta = torch.exp(torch.empty_like(self.w_delta.bias).uniform_(math.log(0.001), math.log(0.1)))
        self.w_delta.bias.copy_(delta + torch.log(-torch.expm1(-delta)))

    def forward(self, x, rotary, state, start):
        # what is to enter the states, and the gate
        x, gate = self.w_in(x).chunk(2, -1)                                         # (B, T, c)
        tail, h = self.new_state(len(x), 0, x.dtype) if state is None else state
        # short convolution over time, each channel by itself
        x = torch.cat([tail.to(x.dtype), x], 1)                                     # (B, K - 1 + T, c)
        last = x[:, x.shape[1] - tail.shape[1]:]
        x = F.silu(convolve(x, self.conv_weight, self.conv_bias))
        # the selection: step size, what is written and what is read, of each position; in Jamba with norms
        delta, write, read = self.w_select(x).to(self.skip.dtype).split([self.rank, self.n, self.n], -1)
        delta = F.softplus(self.w_delta(self.norm_delta(delta)).to(h.dtype))        # (B, T, c), alg. 2
        write, read = self.norm_write(write).to(h.dtype), self.norm_read(read).to(h.dtype)      # (B, T, n)
        # the states, in float32; the rates are negative, so that they decay
        with torch.autocast(x.device.type, enabled=False):
            y, final = scan(x.to(h.dtype), delta, -self.log_rate.to(h.dtype).exp(), write, read, h)
        if state is not None:
            tail.copy_(last)
            h.copy_(final)
        # the input itself, D x; the gate; back to width d
        y = y.to(x.dtype) + self.skip * x
        return self.out(y * F.silu(gate))

    def new_state(self, batch_size, block_size, dtype):
        """(tail (B, K - 1, c), state (B, n, c) in float32 at least), of one size for every block_size."""
        zeros, wide = self.skip.new_zeros, torch.promote_types(self.skip.dtype, torch.float32)
        return (zeros(batch_size, len(self.conv_weight) - 1, self.channels, dtype=dtype),
                zeros(batch_size, self.n, self.channels, dtype=wide))

    def flops_per_token(self, context):
        """Forward FLOPs: a multiply-add is 2. For a number of a state 6, of its decay's exponent, of what is
        added, of the step and of what is read, without exp itself. Whatever the context."""
        matrices = (self.w_in, self.w_select, self.w_delta, self.out)
        weights = sum(matrix.weight.numel() for matrix in matrices) + self.conv_weight.numel() + self.channels
        return 2 * weights + 6 * self.n * self.channels
