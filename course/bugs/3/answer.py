"""Bug 3: a count that carries a gradient."""
import torch

BUG = "load, importance = choice.mean(0), probs.mean(0)"
RIGHT = "load, importance = choice.detach().mean(0), probs.mean(0)"

WHY = """\
The rows of `choice` hold zeros and ones, but they are straight-through: forward a one-hot row,
backward the soft sample. For the output that is wanted. For the count it is not: f gets the
gradient of the sample, and the balance loss pushes the router by f and by P at once. The value of
the loss is right to the last digit, so no printed number shows it. Its gradient points the same way
and is too long: 1.7 to 2.1 times on average for 1,024 tokens, 4 experts and temperatures from 0.1
to 1. A coefficient from a paper then acts like another one, which changes with the temperature. The
same happens wherever gates, or other weights with a gradient, are summed in the place of a count.
What catches it is a test of the gradient, not of the value: compare with the loss in which f is a
constant. (BTX's own loss has the mean gate in the place of f, with its gradient: there it is the
stated formula.)"""


def test(layer):
    torch.manual_seed(0)
    moe = layer.SampledLayer(d=8, width=16, n_expert=4)
    x = torch.randn(64, 16, 8)
    _, info = moe(x)
    P = moe.router(x.flatten(0, 1)).softmax(-1).mean(0)
    wanted = torch.autograd.grad(4 * (info.load.detach() * P).sum(), moe.router.weight)[0]
    found = torch.autograd.grad(info.balance, moe.router.weight)[0]
    assert torch.allclose(found, wanted, atol=1e-6), \
        f"its gradient has length {found.norm():.4f}; with a constant f it is {wanted.norm():.4f}"
