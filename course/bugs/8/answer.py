"""Bug 8: the gate, twice."""
import torch

BUG = "index_add(0, token, out * gate.unsqueeze(1))"
RIGHT = "index_add(0, token, out)"

WHY = """\
run() already multiplies the hidden numbers by the gate, and the sum that brings the rows home does
it again. Each place is a good one, and code that was moved from one to the other often keeps both.
The output is the sum of g_i^2 E_i(x): for 8 equal gates it is an eighth of what it should be, and
the smaller the gates, the less of an expert is heard. It looks like "finer experts do not help":
the more experts a token has, the weaker the layer. The shapes, the sums of the gates and every
gradient (of the code as it stands) are right. What catches it is a test of the layer against its
formula, by a plain loop over tokens, or in one line: where all experts are the same, a mixture
whose gates sum to 1 is that one."""


def test(layer):
    torch.manual_seed(0)
    moe = layer.FineGrained(d=16, width=32, n_expert=4, top_k=2, granularity=4)
    with torch.no_grad():
        for w in (moe.w_in, moe.w_out):
            w.copy_(w[:1].expand_as(w).clone())
    x = torch.randn(2, 8, 16)
    one = torch.nn.functional.silu(x @ moe.w_in[0]) @ moe.w_out[0]
    y, _ = moe(x)
    share = (y * one).sum() / one.square().sum()
    assert torch.allclose(y, one, atol=1e-5), f"the mixture of equal experts is {share:.2f} of one"
