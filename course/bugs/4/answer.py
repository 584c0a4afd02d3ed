"""Bug 4: the bias in the gate."""
import torch

BUG = "        weights, experts = (scores + self.bias).topk(self.top_k, -1)\n"
RIGHT = """\
        experts = (scores + self.bias).topk(self.top_k, -1).indices
        weights = scores.gather(1, experts)
"""

WHY = """\
topk returns values beside the indices, and the values are s + b. The bias was to change the choice
alone; now it also changes how much an expert says, and always the wrong way: an expert that nobody
wants gets a bias and with it a larger gate than it deserves, a popular one is damped. A gate may
even be negative where b is below -s, and then the expert's output is subtracted. At the start all
biases are 0, so that the first steps are right and a test on a fresh layer sees nothing; the error
grows with training, and with u. What catches it is a test with a state that training would reach,
and an invariant: the same bias for all experts changes no choice, so it must change no output."""


def test(layer):
    torch.manual_seed(0)
    moe = layer.LossFreeLayer(d=16, width=8, n_expert=8, top_k=2)
    x = torch.randn(2, 8, 16)
    before, _ = moe(x)
    moe.bias += 0.5
    after, _ = moe(x)
    assert torch.allclose(before, after, atol=1e-5), \
        f"one bias for all experts changed the output by {(after - before).abs().max():.3f}"
