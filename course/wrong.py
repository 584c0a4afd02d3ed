"""What a check says: one sentence about what is wrong, raised as Wrong."""
import torch


class Wrong(Exception):
    """What is wrong with a learner's answer: one sentence, with the numbers."""


def ask(condition, sentence):
    """Raises Wrong(sentence) unless the condition holds."""
    if not condition:
        raise Wrong(sentence)


def shape(name, tensor, want):
    """Raises Wrong unless this is a tensor of shape `want`."""
    kind = "None (is a `return` missing?)" if tensor is None else f"a {type(tensor).__name__}"
    ask(isinstance(tensor, torch.Tensor), f"{name} is {kind}, not a tensor of shape {tuple(want)}")
    got = tuple(tensor.shape)
    ask(got == tuple(want), f"{name} has shape {got}, not {tuple(want)}")


def close(name, got, want, rtol=1e-5, atol=1e-6, hint=""):
    """Raises Wrong with both numbers of the largest difference beyond atol + rtol |want|, their
    place and the hint. got: a tensor of the shape of `want`; or a number where that is one."""
    want = torch.as_tensor(want).detach()
    if not want.dim() and isinstance(got, (int, float)):
        got = torch.as_tensor(got)
    shape(name, got, want.shape)
    got, want = got.detach().cpu().double(), want.cpu().double()
    # equal infinities differ by nothing, a NaN differs from everything
    beyond = ((got - want).abs() - atol - rtol * want.abs()).nan_to_num(torch.inf)
    beyond = beyond.masked_fill(got == want, -1)
    if beyond.numel() and beyond.max() > 0:
        place = tuple(i.item() for i in torch.unravel_index(beyond.argmax(), want.shape))
        where = str(list(place)) if place else ""
        reason = f": {hint}" if hint else ""
        raise Wrong(f"{name}{where} is {got[place]:.6g}, not {want[place]:.6g}{reason}")


def grads(function, *tensors):
    """Gradients, one for each tensor, of what function(*tensors) returns (a tensor or several),
    summed with fixed random weights; 0 where it does not depend on the tensor."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    found = function(*leaves)
    random = torch.Generator().manual_seed(0)
    total = sum(t.sum() * 0 for t in leaves)
    for t in found if isinstance(found, (tuple, list)) else [found]:
        if t.is_floating_point():
            total = total + (t * torch.randn(t.shape, generator=random).to(t.dtype)).sum()
    return list(torch.autograd.grad(total, leaves))
