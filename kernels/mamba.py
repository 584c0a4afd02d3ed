"""The selective scan of Mamba (2312.00752 eq. 2 and 4), position after position within a chunk, and
chunk after chunk; its gradient; the Function that ties them together.

    h_t = exp(delta_t rate) h_(t-1) + delta_t x_t write_t        y_t = sum over n of read_t h_t

rate, write and read are the paper's A, B and C. Letters: B sequences, T positions, c channels, each
with a state of n numbers; a state is (B, n, c), so that neighbours in memory are channels.

Backward has the states before each chunk, T / CHUNK of them, and makes those between anew. In a
chunk it goes back through g_t = read_t dy_t + exp(delta_(t+1) rate) g_(t+1), the gradient of h_t;
from g and h follow all others. exp is taken of delta_t rate alone, which is never positive, not of
sums over positions or of their negatives: nothing overflows, whatever delta.

All numbers are float32, or float64. The rules of all kernels stand in kernels/__init__.py.
"""
import math

import torch
from torch import Tensor

from kernels.common import ceil_div, choose, contiguous, power_of_2, tl, triton, use_triton

CHUNK = 32              # positions: three buffers of (CHUNK, B, n, c) stay in the cache of a CPU
LOG2_E = 1 / math.log(2)


# ---- forward ----

def chunk_states(h, drive, delta, rate, write, decay, states):
    """The states of L <= CHUNK positions. h (B, n, c) the state before them; drive = delta x and
    delta (L, B, c), write (L, B, n); rate times log2 e. Writes into the buffers and returns their
    parts: decay (L, B, n, c), and states (L + 1, B, n, c) with h first."""
    L = len(drive)
    decay, states = decay[:L], states[:L + 1]
    # exp(x) = 2^(x log2 e), and 2^x takes a CPU a fourth of the time of exp
    torch.mul(delta.unsqueeze(2), rate, out=decay).exp2_()
    torch.mul(write.unsqueeze(3), drive.unsqueeze(2), out=states[1:])
    states[0] = h
    rows = states.unbind(0)
    for a, before, here in zip(decay.unbind(0), rows, rows[1:]):
        here.addcmul_(a, before)
    return decay, states


def by_time(*tensors):
    """(B, T, ...) as (T, B, ...), row-major: a chunk is then one piece of memory."""
    return [t.transpose(0, 1).contiguous() for t in tensors]


def scan_torch(x, delta, rate, write, read, h):
    x, delta, write, read = by_time(x, delta, write, read)
    T, B, c = x.shape
    # (chunks + 1, B, n, c)
    starts = h.new_empty(ceil_div(T, CHUNK) + 1, *h.shape)
    decay, states = h.new_empty(CHUNK, *h.shape), h.new_empty(CHUNK + 1, *h.shape)
    y, drive, rate = torch.empty_like(x), delta * x, rate * LOG2_E
    starts[0] = h
    for i, t in enumerate(range(0, T, CHUNK)):
        s = slice(t, t + CHUNK)
        _, here = chunk_states(starts[i], drive[s], delta[s], rate, write[s], decay, states)
        # y_t = sum over n of read_t h_t, a product (1, n) (n, c) for each sequence and position
        torch.matmul(read[s].unsqueeze(2), here[1:], out=y[s].unsqueeze(2))
        starts[i + 1] = here[-1]
    return y.transpose(0, 1), starts


@triton.jit
def _scan_kernel(X, DELTA, RATE, WRITE, READ, H, Y, STARTS, T, B, WIDTH, STATE, CHUNKS,
                 LENGTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """BLOCK_C channels of one sequence per program, their states (BLOCK_C, BLOCK_N) in registers,
    the positions one after the other. RATE (n, c) is times log2 e; LENGTH positions are a chunk.
    Traffic: each input and y once, the states once a chunk. Limits: offsets are 64-bit; the blocks
    of channels are the grid's y, at most 65,535."""
    seq = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    # The place of each number in one state (n, c), and which of them exist
    place = n[None, :].to(tl.int64) * WIDTH + c[:, None]
    inside = (c < WIDTH)[:, None] & (n < STATE)[None, :]
    rate = tl.load(RATE + place, mask=inside, other=0.0)
    h = tl.load(H + seq * STATE * WIDTH + place, mask=inside, other=0.0)
    chunk = 0
    while chunk < CHUNKS:
        tl.store(STARTS + (seq + chunk * B) * STATE * WIDTH + place, h, mask=inside)
        for i in tl.range(0, LENGTH):
            t = chunk * LENGTH + i
            # Beyond the last position delta and x are 0, which keeps the state.
            row = seq * T + t
            live = (c < WIDTH) & (t < T)
            x = tl.load(X + row * WIDTH + c, mask=live, other=0.0)
            delta = tl.load(DELTA + row * WIDTH + c, mask=live, other=0.0)
            write = tl.load(WRITE + row * STATE + n, mask=(n < STATE) & (t < T), other=0.0)
            read = tl.load(READ + row * STATE + n, mask=(n < STATE) & (t < T), other=0.0)
            h = tl.exp2(delta[:, None] * rate) * h + (delta * x)[:, None] * write[None, :]
            tl.store(Y + row * WIDTH + c, tl.sum(h * read[None, :], 1), mask=live)
        chunk += 1
    tl.store(STARTS + (seq + CHUNKS * B) * STATE * WIDTH + place, h, mask=inside)


def launch_shape(c, n):
    """BLOCK_C, BLOCK_N: 512 numbers of state on one warp, 16 a thread, so that sums over channels
    or over a state never leave the warp."""
    block_n = power_of_2(n)
    return max(1, min(power_of_2(c), 512 // block_n, 64)), block_n


def scan(x, delta, rate, write, read, h, kernel=None):
    """x, delta (B, T, c); rate (n, c); write, read (B, T, n); h (B, n, c) the state before them ->
    y (B, T, c), and starts (chunks + 1, B, n, c): the states before each chunk, then the final
    one."""
    if not choose(kernel, x, delta, rate, write, read, h):
        return scan_torch(x, delta, rate, write, read, h)
    x, delta, rate, write, read, h = contiguous(x, delta, rate * LOG2_E, write, read, h)
    (B, T, c), n, chunks = x.shape, len(rate), ceil_div(x.shape[1], CHUNK)
    y, starts = torch.empty_like(x), h.new_empty(chunks + 1, B, n, c)
    blocks = launch_shape(c, n)
    _scan_kernel[(B, ceil_div(c, blocks[0]))](x, delta, rate, write, read, h, y, starts, T, B, c, n,
                                              chunks, CHUNK, *blocks, num_warps=1)
    return y, starts


# ---- backward ----

def scan_backward_torch(dy, dh, x, delta, rate, write, read, starts):
    dy, x, delta, write, read = by_time(dy, x, delta, write, read)
    shape, drive, rate2 = starts.shape[1:], delta * x, rate * LOG2_E
    decay, states, grads = (x.new_empty(CHUNK + i, *shape) for i in (0, 1, 0))
    d_drive, d_delta, d_write, d_read = map(torch.empty_like, (x, x, write, read))
    d_rate, carry = torch.zeros_like(rate), dh.clone()
    for i in reversed(range(len(starts) - 1)):
        s = slice(i * CHUNK, (i + 1) * CHUNK)
        a, h = chunk_states(starts[i], drive[s], delta[s], rate2, write[s], decay, states)
        # g_t = read_t dy_t + a_(t+1) g_(t+1), from the last position to the first; carry is the
        # second part of the last one
        g = torch.mul(read[s].unsqueeze(3), dy[s].unsqueeze(2), out=grads[:len(a)])
        g[-1] += carry
        rows, ahead = g.unbind(0), a.unbind(0)
        for t in reversed(range(len(rows) - 1)):
            rows[t].addcmul_(ahead[t + 1], rows[t + 1])
        # read, write and drive: sums of h and g over channels or states. As (1, c) (c, n) a
        # product of matrices takes a tenth of its time as (n, c) (c, 1).
        torch.matmul(dy[s].unsqueeze(2), h[1:].mT, out=d_read[s].unsqueeze(2))
        torch.matmul(drive[s].unsqueeze(2), g.mT, out=d_write[s].unsqueeze(2))
        torch.matmul(write[s].unsqueeze(2), g, out=d_drive[s].unsqueeze(2))
        # the exponent delta_t rate: g_t a_t h_(t-1)
        g *= a
        carry.copy_(g[0])
        g *= h[:-1]
        d_rate += torch.mul(g, delta[s].unsqueeze(2), out=a).sum((0, 1))
        torch.sum(g.mul_(rate), 2, out=d_delta[s])
    # drive = delta x
    d_delta.addcmul_(d_drive, x)
    dx, d_delta, d_write, d_read = (t.transpose(0, 1)
                                    for t in (d_drive.mul_(delta), d_delta, d_write, d_read))
    return dx, d_delta, d_rate, d_write, d_read, carry


@triton.jit
def _scan_backward_kernel(DY, DH, X, DELTA, RATE, WRITE, READ, STARTS, STATES, DX, D_DELTA, D_RATE,
                          D_WRITE, D_READ, T, B, WIDTH, STATE, CHUNKS, LENGTH: tl.constexpr,
                          BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """As _scan_kernel, from the last chunk to the first. STATES (LENGTH, B, n, c) holds the states
    of the chunk at hand, which only this program writes and reads. DH is the gradient of the final
    state, and in the end that of the first. What sums over the channels of other programs has a row
    for each: D_WRITE and D_READ (blocks, B, T, n); D_RATE (B, n, c) has one for each sequence."""
    seq = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    place = n[None, :].to(tl.int64) * WIDTH + c[:, None]
    inside = (c < WIDTH)[:, None] & (n < STATE)[None, :]
    rate = tl.load(RATE + place, mask=inside, other=0.0)
    g = tl.load(DH + seq * STATE * WIDTH + place, mask=inside, other=0.0)
    d_rate = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    back = 0
    while back < CHUNKS:
        chunk = CHUNKS - 1 - back
        # The states before each position of the chunk
        h = tl.load(STARTS + (seq + chunk * B) * STATE * WIDTH + place, mask=inside, other=0.0)
        for i in tl.range(0, LENGTH):
            t = chunk * LENGTH + i
            row = seq * T + t
            live = (c < WIDTH) & (t < T)
            x = tl.load(X + row * WIDTH + c, mask=live, other=0.0)
            delta = tl.load(DELTA + row * WIDTH + c, mask=live, other=0.0)
            write = tl.load(WRITE + row * STATE + n, mask=(n < STATE) & (t < T), other=0.0)
            tl.store(STATES + (seq + i * B) * STATE * WIDTH + place, h, mask=inside)
            h = tl.exp2(delta[:, None] * rate) * h + (delta * x)[:, None] * write[None, :]
        tl.debug_barrier()
        # Back through them: g is a_(t+1) g_(t+1) at first, the gradient of h_t with read_t dy_t
        for j in tl.range(0, LENGTH):
            i = LENGTH - 1 - j
            t = chunk * LENGTH + i
            row = seq * T + t
            live = (c < WIDTH) & (t < T)
            some = (n < STATE) & (t < T)
            x = tl.load(X + row * WIDTH + c, mask=live, other=0.0)
            dy = tl.load(DY + row * WIDTH + c, mask=live, other=0.0)
            delta = tl.load(DELTA + row * WIDTH + c, mask=live, other=0.0)
            write = tl.load(WRITE + row * STATE + n, mask=some, other=0.0)
            read = tl.load(READ + row * STATE + n, mask=some, other=0.0)
            before = tl.load(STATES + (seq + i * B) * STATE * WIDTH + place, mask=inside, other=0.0)
            a = tl.exp2(delta[:, None] * rate)
            h = a * before + (delta * x)[:, None] * write[None, :]
            g += dy[:, None] * read[None, :]
            part = ((block * B + seq) * T + t) * STATE + n
            tl.store(D_READ + part, tl.sum(h * dy[:, None], 0), mask=some)
            tl.store(D_WRITE + part, tl.sum(g * (delta * x)[:, None], 0), mask=some)
            d_drive = tl.sum(g * write[None, :], 1)
            tl.store(DX + row * WIDTH + c, d_drive * delta, mask=live)
            g = g * a
            exponent = g * before
            d_rate += exponent * delta[:, None]
            d_delta = tl.sum(exponent * rate, 1) * 0.6931471805599453 + d_drive * x
            tl.store(D_DELTA + row * WIDTH + c, d_delta, mask=live)
        # The next chunk's states overwrite these.
        tl.debug_barrier()
        back += 1
    tl.store(D_RATE + seq * STATE * WIDTH + place, d_rate, mask=inside)
    tl.store(DH + seq * STATE * WIDTH + place, g, mask=inside)


def scan_backward(dy, dh, x, delta, rate, write, read, starts, kernel=None):
    """dy (B, T, c) and dh (B, n, c), the gradients of y and of the final state; the inputs of
    `scan` and its starts -> the gradients of x, delta, rate, write, read and of the first
    state."""
    if not choose(kernel, dy, dh, x, delta, rate, write, read, starts):
        return scan_backward_torch(dy, dh, x, delta, rate, write, read, starts)
    dy, x, delta, rate, write, read, starts = contiguous(dy, x, delta, rate * LOG2_E, write, read,
                                                         starts)
    (B, T, c), n, dh = x.shape, len(rate), dh.clone(memory_format=torch.contiguous_format)
    blocks = launch_shape(c, n)
    parts = ceil_div(c, blocks[0])
    dx, d_delta = torch.empty_like(x), torch.empty_like(x)
    d_write, d_read = x.new_empty(parts, B, T, n), x.new_empty(parts, B, T, n)
    d_rate, states = x.new_empty(B, n, c), x.new_empty(CHUNK, B, n, c)
    _scan_backward_kernel[(B, parts)](
        dy, dh, x, delta, rate, write, read, starts, states, dx, d_delta, d_rate, d_write, d_read,
        T, B, c, n, len(starts) - 1, CHUNK, *blocks, num_warps=1)
    return dx, d_delta, d_rate.sum(0), d_write.sum(0), d_read.sum(0), dh


# ---- the Function ----

@torch.library.custom_op("kernels::scan", mutates_args=())
def opaque_scan(x: Tensor, delta: Tensor, rate: Tensor, write: Tensor, read: Tensor, h: Tensor
                ) -> tuple[Tensor, Tensor]:
    """scan_torch as one operator: a compiler would unroll its loop over positions."""
    y, starts = scan_torch(x, delta, rate, write, read, h)
    return y.contiguous(), starts


@opaque_scan.register_fake
def _(x, delta, rate, write, read, h):
    return x.new_empty(x.shape), h.new_empty(ceil_div(x.shape[1], CHUNK) + 1, *h.shape)


@torch.library.custom_op("kernels::scan_backward", mutates_args=())
def opaque_backward(dy: Tensor, dh: Tensor, x: Tensor, delta: Tensor, rate: Tensor, write: Tensor,
                    read: Tensor, starts: Tensor
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """scan_backward_torch as one operator."""
    grads = scan_backward_torch(dy, dh, x, delta, rate, write, read, starts)
    return tuple(contiguous(*grads))


@opaque_backward.register_fake
def _(dy, dh, x, delta, rate, write, read, starts):
    return tuple(t.new_empty(t.shape) for t in (x, delta, rate, write, read, dh))


class Scan(torch.autograd.Function):
    """scan_loop of mamba.py: x, delta (B, T, c), rate (n, c), write, read (B, T, n), h (B, n, c) ->
    y (B, T, c) and the state after the last position (B, n, c). It saves its inputs and a state in
    CHUNK, where autograd would keep some five tensors (B, T, n, c)."""

    @staticmethod
    def forward(ctx, x, delta, rate, write, read, h):
        # on a CPU Triton could only interpret the kernels
        ctx.kernel = x.is_cuda and use_triton(x)
        if torch.compiler.is_compiling() and not ctx.kernel:
            y, starts = opaque_scan(x, delta, rate, write, read, h)
        else:
            y, starts = scan(x, delta, rate, write, read, h, ctx.kernel)
        ctx.save_for_backward(x, delta, rate, write, read, starts)
        return y, starts[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dh):
        if torch.compiler.is_compiling() and not ctx.kernel:
            return opaque_backward(dy, dh, *ctx.saved_tensors)
        return scan_backward(dy, dh, *ctx.saved_tensors, ctx.kernel)
