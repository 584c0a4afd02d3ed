"""Bug 1: the jitter reaches the experts."""
import torch

BUG = """\
        tokens = self.noisy(x.flatten(0, 1))                        # (N, d)
        logits = self.router(tokens)                                # (N, E)
"""
RIGHT = """\
        tokens = x.flatten(0, 1)                                    # (N, d)
        logits = self.router(self.noisy(tokens))                    # (N, E)
"""

WHY = """\
The name `tokens` is bound to the noisy copy, and the experts read the same name. Every expert then
computes on a token that is wrong by up to j in each feature, so that training is done on another
layer than evaluation, the more so the larger j is. Nothing fails, and the gradients are those of
the code: a run shows no more than a somewhat worse curve, which reads as "jitter does not help".
The class of test that catches it is an invariant between modes: where the choice cannot change,
training and evaluation give the same output. With one expert there is no choice: its gate is 1."""


def test(layer):
    torch.manual_seed(0)
    one = layer.SwitchLayer(d=16, width=32, n_expert=1, jitter=0.3)
    x = torch.randn(2, 8, 16)
    noisy, _ = one.train()(x)
    clean, _ = one.eval()(x)
    assert torch.allclose(noisy, clean, atol=1e-6), \
        f"with one expert, training and evaluation differ by {(noisy - clean).abs().max():.3f}"
