"""Bug 6: the balance loss in the reported loss."""
import math

import torch

BUG = "        nats += model(idx, targets).loss.item() * targets.numel()\n"
RIGHT = """\
        logits = model(idx, targets).logits
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
"""

WHY = """\
out.loss is the objective of training, with the balance loss in it; bits_per_byte prints it as if it
were the cross-entropy. The models are the same and only the numbers are wrong: each is too high by
coefficient x balance / ln 2, so a dense model looks better than it should beside a mixture, a
larger coefficient looks worse than it is, and a perplexity is not that of any code. In a training
curve a part of what falls is the balance loss. Several public models return such a sum under the
name loss, which is right for training and wrong for every table. What catches it is an invariant of
the report: a coefficient changes the objective of training, and no number that is measured on one
and the same set of weights."""


def test(layer):
    torch.manual_seed(0)
    model = layer.ByteModel(d=16, width=16, n_expert=4)
    batches = [(torch.randint(256, (2, 8)), torch.randint(256, (2, 8))) for _ in range(2)]
    model.coefficient = 0.0
    without = layer.bits_per_byte(model, batches)
    model.coefficient = 10.0
    found = layer.bits_per_byte(model, batches)
    assert math.isclose(found, without, rel_tol=1e-5), \
        f"the same weights: {without:.3f} bits a byte with coefficient 0, {found:.3f} with 10"
