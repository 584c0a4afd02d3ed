"""The root-mean-square norm on a CPU."""
import torch


class NormOnCPU(torch.autograd.Function):
    """x / sqrt(mean x^2 + eps) * w, eps = 1e-5, in few passes over x. F.rms_norm, the same function, is one
    kernel on CUDA; on a CPU it is a dozen, and took a sixth of the step of a small model."""

    @staticmethod
    def forward(ctx, x, w):
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True)                                      # (..., 1)
        r.square_().div_(x.shape[-1]).add_(1e-5).rsqrt_()
        ctx.save_for_backward(x, r, w)
        return (x * r).mul_(w)

    @staticmethod
    def backward(ctx, dy):
        x, r, w = ctx.saved_tensors
        normed = x * r
        by_weight = dy * normed
        along = (by_weight @ w).div_(-x.shape[-1]).unsqueeze(-1)        # what lies along x changes nothing
        return (dy * w).addcmul_(normed, along).mul_(r), by_weight.flatten(0, -2).sum(0)
