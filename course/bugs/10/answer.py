"""Bug 10: a delta of the wrong sign."""
import torch

BUG = "(q - p).detach()"
RIGHT = "(p - q).detach()"

WHY = """\
An optimizer walks against what it finds in .grad, so Delta must point from the new weights back to
the old ones. Here it points the way the workers went, and the outer step undoes it: each meeting
moves the model away from what was learned, and with momentum ever faster: in the demonstration of
layer.py the loss explodes. With a small outer rate the bug hides. With rate 0.1, no momentum and H
= 100 the common model goes from a loss of 0.36 to 1.51 in twelve rounds, while the workers, just
before they meet, have 0.11 in the first round and 0.25 in the last: who logs those alone sees a run
that works. Log the loss right after a meeting, and on text that no worker reads. What catches it is
a case whose answer is known: with outer rate 1 and no momentum, the model must be the mean of its
workers."""


def test(layer):
    torch.manual_seed(0)
    model = layer.Mixture(d=8, n_expert=4)
    workers = [layer.train(model, [(torch.randn(16, 8), torch.randn(16, 1))] * 3) for _ in range(3)]
    layer.Outer(model, lr=1.0, momentum=0.0).meet(workers)
    for name, p in model.named_parameters():
        mean = torch.stack([dict(w.named_parameters())[name] for w in workers]).mean(0)
        far = (p - mean).abs().max()
        assert far < 1e-5, f"rate 1, no momentum: {name} is {far:.3f} from the workers' mean"
