"""Bug 7: later tokens evict earlier ones."""
import torch

BUG = """\
        # the tokens line up, the surest ones first: what is dropped then matters least
        order = gate.argsort(descending=True, stable=True)
"""
RIGHT = """\
        # the tokens line up by position, over all sequences: none waits for one that comes later
        order = (torch.arange(len(gate)) % T).argsort(stable=True)
"""

WHY = """\
The surest tokens are served first, wherever they stand. A later token with a larger gate then takes
the last slot of an earlier one: what the layer gives position 3 depends on position 7. For images
that is a known and good rule (priority by gate); in a causal language model it lets the future into
the past. In training the model can read from "was I dropped?" something of what comes next; when it
writes text there is no next token, and it need not be as good as its validation loss says. Lining
up one sequence after the other is no better: there the early positions of a later sequence lose
their slots to the late ones of an earlier sequence. What catches it is the causality test, the
cheapest strong test there is for a language model: change the end, and compare the beginning."""


def test(layer):
    torch.manual_seed(0)
    moe = layer.CapacityLayer(d=16, width=32, n_expert=2, capacity_factor=1.0)
    for t in (4, 8, 12):
        x = torch.randn(3, 16, 16)
        other = x.clone()
        other[:, t:] = torch.randn(3, 16 - t, 16)
        change = (moe(x)[0] - moe(other)[0])[:, :t].abs().max()
        assert change < 1e-5, f"tokens from position {t} on change earlier outputs by {change:.3f}"
