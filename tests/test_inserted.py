"""ffn.inserted: a sparse layer behind the dense one of its block, as BASE layers stand."""
import pytest
import torch
import torch.nn.functional as F
from tiny import batch_of, model_of, run

from ffn import Context, activation_of
from model import load_config
from settings import ConfigError

INSERTED = {"ffn.inserted": True, "ffn.d_dense": 24, "ffn.moe_layers": [1]}


@pytest.mark.parametrize("kind", ["base", "topk"])
def test_it_starts_as_the_dense_model_that_it_is_inserted_into(kind):
    model = model_of(kind, INSERTED)
    dense = model_of("dense", {"ffn.d_ff": 24})
    state = {n.replace("blocks.1.dense.", "blocks.1.ffn."): t for n, t in model.state_dict().items()
             if not n.startswith("blocks.1.ffn.")}
    dense.load_state_dict(state)
    idx, targets, _ = batch_of()
    assert torch.equal(run(model, idx, targets).logits, run(dense, idx, targets).logits)
    assert [b.dense is None for b in model.blocks] == [True, False]


def test_each_token_by_hand():
    """x + W2 (alpha act(W1 LN(x))), alpha the sigmoid of the affinity to the residual stream itself."""
    model = model_of("base", INSERTED).eval()
    layer = model.blocks[1].ffn
    with torch.no_grad():
        layer.experts.w_out.normal_()
    x = 3 * torch.randn(2, 5, 16) + 1
    y, stats = layer(x, Context(torch.zeros(2, 5, dtype=torch.long)))
    assert stats.load.sum() == 10 and len(stats.load) == 4
    for token, mine in zip(x.view(10, 16), y.view(10, 16)):
        affinity = layer.router.score.weight @ token
        e = int(affinity.argmax())
        normed = (token - token.mean()) / (token.var(correction=0) + 1e-5).sqrt()
        h = activation_of(layer.experts.w_in[e] @ normed, layer.experts.activation) * affinity[e].sigmoid()
        torch.testing.assert_close(mine, layer.experts.w_out[e] @ h, rtol=1e-4, atol=1e-5)


def test_the_block_adds_all_three_and_generation_agrees():
    model = model_of("base", INSERTED).eval()
    block = model.blocks[1]
    with torch.no_grad():
        block.ffn.experts.w_out.normal_()
    idx, _, _ = batch_of()
    x, ctx, rotary = torch.randn(3, 8, 16), Context(idx), model.rotary[:, :8]
    with torch.no_grad():
        y, stats = block(x, ctx, rotary, None, 0)
        x = x + block.attention(block.norm_attention(x), rotary, None, 0)
        x = x + block.dense.mlp(block.norm_ffn(x))
        torch.testing.assert_close(y, x + block.ffn(x, ctx)[0])
        assert torch.equal(stats.load, block.ffn(x, ctx)[1].load)
        cache = model.new_cache(3)
        steps = torch.cat([model(idx[:, t:t + 1], cache=cache).logits for t in range(8)], 1)
        torch.testing.assert_close(steps, model(idx).logits, rtol=1e-4, atol=1e-5)


def test_every_expert_learns_though_it_starts_at_zero():
    model = model_of("base", INSERTED)
    idx, targets, _ = batch_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run(model, idx, targets).loss.backward()
    experts, router = model.blocks[1].ffn.experts, model.blocks[1].ffn.router
    assert not experts.w_out.any() and experts.w_out.grad.flatten(1).any(1).all()
    optimizer.step()
    run(model, idx, targets).loss.backward()
    assert experts.w_in.grad.flatten(1).any(1).all() and router.score.weight.grad.any()


def test_parameters_and_flops():
    model, without = model_of("base", INSERTED), model_of("base", INSERTED | {"ffn.inserted": False})
    width, d = 24, 16                                   # swiglu: three matrices of the dense layer come on top
    more = [a - b for a, b in zip(model.num_params(), without.num_params())]
    assert more == [3 * width * d] * 2
    assert model.flops_per_token() - without.flops_per_token() == 2 * 3 * width * d


def test_the_norm_is_in_float32_and_shared_experts_read_it_too():
    model = model_of("topk", INSERTED | {"ffn.n_shared": 1})
    layer, x = model.blocks[1].ffn, 3 * torch.randn(2, 5, 16) + 1
    ctx = Context(torch.zeros(2, 5, dtype=torch.long))
    torch.testing.assert_close(layer(x, ctx)[0], layer.shared(F.layer_norm(x, (16,))))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x, ctx)[0].dtype == torch.bfloat16


def test_other_kinds_refuse_it(tmp_path):
    (tmp_path / "a.toml").write_text('[ffn]\nkind = "pkm"\ninserted = true\n')
    with pytest.raises(ConfigError, match='ffn.inserted.*has no effect.*"moe"'):
        load_config(str(tmp_path / "a.toml"))
