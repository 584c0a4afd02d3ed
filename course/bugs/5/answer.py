"""Bug 5: one gate, divided by itself."""
import torch

BUG = "        if self.norm_topk:\n"
RIGHT = "        if self.norm_topk and self.top_k > 1:\n"

WHY = """\
With k = 1 the only gate of a token is divided by itself. It is 1, whatever the router says, and a
constant has no gradient: the router keeps the weights that it was drawn with. The model still
trains, for the experts learn to live with a random and fixed routing, as with a hash; so the loss
falls, and is only worse than that of a model that can choose. With a balance loss it is harder to
see, since the router then moves and the load is even: it learns to be even and nothing else. The
softmax over the chosen logit alone (Mixtral's order) has the same fault at k = 1. What catches it
is a test that asks each parameter for a gradient of the task's loss alone, at the smallest sizes
that are allowed."""


def test(layer):
    torch.manual_seed(0)
    for k in (1, 2):
        moe = layer.QwenLayer(d=16, width=8, n_expert=8, top_k=k)
        moe(torch.randn(2, 8, 16)).square().sum().backward()
        for name, p in moe.named_parameters():
            # an expert that no token chose has no gradient
            learns = p.grad is None or p.grad.abs().max() > 1e-6
            assert learns, f"k = {k}: {name} has a gradient of {p.grad.abs().max():.0e}"
