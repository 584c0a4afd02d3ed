"""Bug 2: softmax twice."""
import torch

BUG = "        return F.softmax(self.proj(x).float(), dim=-1)\n"
RIGHT = "        return self.proj(x).float()\n"

WHY = """\
The router already returns probabilities, and choose() takes the softmax of those again. Each of the
two lines is right alone. Probabilities lie between 0 and 1, so two of them differ by 1 at most, and
the second softmax makes of the surest choice there is a gate of e / (e + 1) = 0.73 instead of 1.
All gates lie between 0.5 and 0.73: the second expert always speaks, whether it has something to say
or not, and the router's gradient passes through two squashings. The gates still sum to 1, the right
experts are chosen, and the model trains; it is only worse than it could be. A test on sums and
shapes passes. What catches it is a test at the extremes: a token that is sure must have a gate near
1."""


def test(layer):
    torch.manual_seed(0)
    moe = layer.MixtralLayer(layer.Settings(d=8, width=16, n_expert=8, top_k=2))
    with torch.no_grad():
        moe.router.proj.weight.copy_(torch.eye(8))
    # logits 20, 0, ..., 0: the first expert's share of the two best is 1 / (1 + e^-20)
    gates, experts = moe.choose(20 * torch.eye(8))
    assert (experts[:, 0] == torch.arange(8)).all()
    assert (gates[:, 0] > 0.99).all(), f"a token that is sure has a gate of {gates[0, 0]:.2f}"
