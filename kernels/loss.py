"""The loss of the output layer, without ever making all the logits.

With V = 50,304 columns, the logits of 65,536 tokens fill 13 GB in float32. `head_loss` makes them
for one chunk of tokens after the other. The same pass makes their gradient, so that backward
neither keeps the logits nor makes them again: it multiplies two finished gradients by one number.

    head_loss_torch    the slow twin: all logits at once, and autograd; defines what is computed
    head_loss          the chunks
    softmax_gradient   the pass over the logits of one chunk, with its own twin and kernel

Letters: N tokens, d width, V vocabulary; rows are the tokens of one chunk.
"""
import torch
import torch.nn.functional as F

from kernels.common import choose, contiguous, power_of_2, tl, triton, use_triton

IGNORE = -100  # a target that counts for nothing, as in F.cross_entropy


def at_least_float32(dtype):
    return torch.promote_types(dtype, torch.float32)


# ---- from the logits of a chunk to their gradient ----

def softmax_gradient_torch(z, targets):
    kept = targets != IGNORE
    column = targets.where(kept, 0).unsqueeze(1)  # (rows, 1); any column does for an ignored row
    log_p = z.log_softmax(-1, dtype=at_least_float32(z.dtype))
    loss = -log_p.gather(1, column)
    p = log_p.exp_()
    p.scatter_(1, column, torch.expm1(-loss))  # p - 1 at the target, without cancellation
    p.masked_fill_(~kept.unsqueeze(1), 0)
    return loss.squeeze(1).masked_fill(~kept, 0), p.to(z.dtype)


@triton.jit
def _softmax_gradient_kernel(Z, TARGET, LOSS, V: tl.constexpr, IGNORED: tl.constexpr,
                             BLOCK: tl.constexpr):
    """One row per program, BLOCK columns at a time. The first sweep keeps a maximum and a sum in
    each lane; the second writes the gradient over the logits. A target that is no column gives a
    NaN loss. Traffic: rows V elements written, 2 rows V read; a row of 100 KB is read the second
    time from the L2 cache."""
    row = tl.program_id(0).to(tl.int64)  # row * V passes 2**31 at real sizes
    z = Z + row * V
    target = tl.load(TARGET + row)
    kept = target != IGNORED
    # Read before any thread writes: threads wait for each other at the sums between the sweeps.
    column = (target >= 0) & (target < V)
    at_target = tl.load(z + target, mask=column, other=float("nan")).to(tl.float32)
    # The lowest float32, not -inf: a lane without a column subtracts it from itself.
    largest = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)  # sum of exp(z - largest)
    for start in tl.range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        value = tl.load(z + col, mask=col < V, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(largest, value)
        total = total * tl.exp(largest - larger) + tl.exp(value - larger)
        largest = larger
    # The lanes together: log of the sum of exp(z) over the whole row.
    highest = tl.max(largest, 0)
    log_sum = highest + tl.log(tl.sum(total * tl.exp(largest - highest), 0))
    for start in tl.range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        p = tl.exp(tl.load(z + col, mask=col < V, other=0.0).to(tl.float32) - log_sum)
        gradient = tl.where(kept, tl.where(col == target, p - 1.0, p), 0.0)
        tl.store(z + col, gradient.to(Z.dtype.element_ty), mask=col < V)
    tl.store(LOSS + row, tl.where(kept, log_sum - at_target, 0.0))


def softmax_gradient(z, targets, kernel=None):
    """Logits z (rows, V) and targets (rows,) int64 -> cross-entropy (rows,), float32 or wider, and
    its gradient softmax(z) - onehot(targets), (rows, V) in z's dtype. Both are 0 where the target
    is IGNORE. z is consumed: the kernel writes the gradient over it."""
    if not choose(kernel, z):
        return softmax_gradient_torch(z, targets)
    z, targets = contiguous(z, targets)
    loss = z.new_empty(len(z), dtype=torch.float32)
    if len(z):
        V = z.shape[1]
        block = min(4096, power_of_2(V))
        _softmax_gradient_kernel[(len(z),)](z, targets, loss, V, IGNORE, block, num_warps=8)
    return loss, z


# ---- the output layer and its loss ----

def head_loss_torch(x, weight, targets):
    logits = F.linear(x, weight)                                                         # (N, V)
    token_loss = cross_entropy(logits, targets)
    return mean_of_kept(token_loss, targets), token_loss.detach()


def head_loss(x, weight, targets, chunk_tokens, kernel=None):
    """Cross-entropy of the output layer: x (N, d), weight (V, d), targets (N,) int64 ->
    (mean (), token_loss (N,)), float32 or wider.

    The mean is over the tokens whose target is not IGNORE; it is 0 where there are none.
    token_loss is 0 where the target is IGNORE. Only the mean carries a gradient. token_loss has
    none, because the gradient of the weight is already summed over the tokens when backward begins.

    Products are made in autocast's dtype; the weight is cast once per call. The gradient of the
    weight is summed over the chunks in float32, each chunk's share rounded to the products' dtype,
    and a float32 weight gets the sum as it is. The sum (V, d) lives from forward to backward. The
    largest other tensors are the logits of `chunk_tokens` rows.

    kernel: None for Triton where x is on a GPU; True or False as the caller says. No kernel runs
    where no gradient is needed. ValueError for chunk_tokens < 1; RuntimeError in a backward with
    create_graph=True.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens}: a chunk needs at least one token")
    dtype = product_dtype(x)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        kernel = x.is_cuda and use_triton(x) if kernel is None else kernel
        return HeadLoss.apply(x, weight, targets, chunk_tokens, dtype, kernel)
    w = weight.to(dtype)
    token_loss = torch.cat([cross_entropy(rows.to(dtype) @ w.T, target) for rows, target in
                            zip(x.split(chunk_tokens), targets.split(chunk_tokens))])
    return mean_of_kept(token_loss, targets), token_loss


def product_dtype(x):
    """The dtype of a product with x: autocast's where it is on, but it leaves float64 alone."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def cross_entropy(logits, targets):
    logits = logits.to(at_least_float32(logits.dtype))
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE)


def count_kept(targets):
    """Tokens that count, (); at least 1, because a sum over none of them is divided by it."""
    return (targets != IGNORE).sum().clamp(min=1)


def mean_of_kept(token_loss, targets):
    return token_loss.sum() / count_kept(targets)


class HeadLoss(torch.autograd.Function):
    """See head_loss. Forward makes the gradients of the summed loss. Backward multiplies them by
    the upstream gradient of the mean, divided by the count of tokens."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk_tokens, dtype, kernel):
        want_x, want_weight = ctx.needs_input_grad[:2]
        w = weight.to(dtype)
        d_weight = torch.zeros_like(weight, dtype=at_least_float32(dtype)) if want_weight else None
        losses, d_rows = [], []
        for rows, target in zip(x.split(chunk_tokens), targets.split(chunk_tokens)):
            rows = rows.to(dtype)
            # The logits (rows, V) have no name: their gradient dz takes their place.
            loss, dz = softmax_gradient(rows @ w.T, target, kernel)
            losses.append(loss)
            if want_x:
                d_rows.append(dz @ w)                                                  # (rows, d)
            if want_weight:
                d_weight += dz.T @ rows                                                # (V, d)
            del dz  # before the next logits are made
        # Joined, not written into: torch 2.11's compiler loses the gradient of a Function that
        # returns a tensor it wrote into.
        token_loss = torch.cat(losses)
        dx = torch.cat(d_rows) if want_x else None
        ctx.save_for_backward(dx, d_weight, count_kept(targets))
        ctx.dtypes = x.dtype, weight.dtype
        ctx.mark_non_differentiable(token_loss)
        return mean_of_kept(token_loss, targets), token_loss

    @staticmethod
    def backward(ctx, d_mean, _):
        # Autograd enables gradients here for create_graph alone. once_differentiable is not enough:
        # it says nothing where d_mean needs no gradient. A compiled backward refuses by itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("head_loss has no second derivative, so no create_graph=True: "
                               "use head_loss_torch")
        dx, d_weight, count = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        scale = d_mean / count
        # Not in place: with retain_graph a second backward finds the same sums.
        dx = None if dx is None else dx.to(x_dtype) * scale
        d_weight = None if d_weight is None else (d_weight * scale).to(weight_dtype)
        return dx, d_weight, None, None, None, None
