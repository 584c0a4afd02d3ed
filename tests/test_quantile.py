"""ffn.balance = "quantile": the bias of one step against a second writing, and what it promises of the loads."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import batch_of, config_of, model_of, run

from balance import BY_BIAS, LOSSES, update_bias, update_quantile
from settings import ConfigError

QUANTILE = {"ffn.balance": "quantile"}


def scores_of(N, E, skew=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(N, E, generator=g) + torch.linspace(skew, 0, E)).sigmoid()


def max_violation(scores, bias, k):
    """How far the largest load lies above an even one, as a share of it."""
    N, E = scores.shape
    load = (scores + bias).topk(k, -1).indices.flatten().bincount(minlength=E)
    return float(load.max()) * E / (N * k) - 1


@given(N=st.integers(1, 40), E=st.integers(1, 8), k=st.integers(1, 8), seed=st.integers(0, 10 ** 6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_one_step_against_sorted_lists(N, E, k, seed):
    """c_i the (k+1)-th largest s + b of a token, b_j the quantile at k / E of c_i - s_ij, then the mean goes."""
    k = min(k, E)
    s, bias = scores_of(N, E, 1.0, seed), torch.linspace(-0.2, 0.3, E)
    before = bias.clone()
    update_quantile(bias, s, k)
    cutoff = [sorted((s[i] + before).tolist(), reverse=True)[min(k, E - 1)] for i in range(N)]
    wanted = [sorted(cutoff[i] - float(s[i, j]) for i in range(N))[max(1, N * k // E) - 1] for j in range(E)]
    mean = sum(wanted) / E
    assert bias.tolist() == pytest.approx([w - mean for w in wanted], abs=1e-5)
    assert abs(float(bias.mean())) < 1e-6


def test_one_step_from_zero_is_within_two_percent_of_even():
    s, bias = scores_of(16384, 64), torch.zeros(64)
    assert max_violation(s, bias, 8) > 0.03
    update_quantile(bias, s, 8)
    assert max_violation(s, bias, 8) < 0.02


@pytest.mark.parametrize("N, E, k", [(4096, 16, 1), (4096, 16, 4), (1024, 8, 2)])
def test_steps_on_one_batch_end_even(N, E, k):
    """Also of scores of which half of the experts are far ahead, within a few ties."""
    s, bias = scores_of(N, E, 3.0), torch.zeros(E)
    assert max_violation(s, bias, k) > 0.9
    for _ in range(60):
        update_quantile(bias, s, k)
    assert max_violation(s, bias, k) < 0.02


@pytest.mark.parametrize("rate", [0.001, 0.01])
def test_new_batches_are_more_even_than_by_the_sign_rule(rate):
    """After 50 batches of one distribution, each chosen by the bias that the batches before it left."""
    E, k, ours, sign, seen = 16, 2, torch.zeros(16), torch.zeros(16), []
    for step in range(50):
        s = scores_of(2048, E, 2.0, seed=step)
        seen.append((max_violation(s, ours, k), max_violation(s, sign, k)))
        load = (s + sign).topk(k, -1).indices.flatten().bincount(minlength=E).float()
        update_bias(sign, load, rate)
        update_quantile(ours, s, k)
    last = torch.tensor(seen[-10:]).mean(0)
    assert last[0] < 0.25 and last[0] < 0.8 * last[1], last


def test_training_moves_the_bias_for_the_next_batch():
    """Not that of evaluation; the present batch is chosen by the bias before; gradients know nothing of it."""
    idx, targets, _ = batch_of()
    model, twin = model_of("sigmoid", QUANTILE), model_of("sigmoid", {"ffn.balance": "none"})
    assert model.config.ffn.balance_loss == 0
    bias = [block.ffn.router.bias for block in model.blocks]
    run(model.eval(), idx, targets)
    assert not any(b.any() for b in bias)
    a, b = (run(m.train(), idx, targets) for m in (model, twin))
    assert torch.equal(a.logits, b.logits) and a.aux_loss.item() == 0
    for out in (a, b):
        (out.loss + out.aux_loss).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters()))
    assert all(block.ffn.router.bias is b and b.any() and abs(b.mean()) < 1e-6 for b, block in zip(bias, model.blocks))
    moved = [b.clone() for b in bias]
    model.after_step([s.load for s in a.stats])
    assert all(torch.equal(b, m) for b, m in zip(bias, moved))
    again = run(model, idx, targets)
    for before, after in zip(a.stats[:1], again.stats[:1]):     # the first layer's input is the same
        assert after.load.max() < before.load.max()


def test_where_it_cannot_work_it_is_refused():
    assert set(BY_BIAS) <= set(LOSSES)
    for router, more, words in (("topk", {}, 'needs ffn.router = "sigmoid"'),
                                ("sigmoid", {"ffn.n_groups": 2, "ffn.topk_groups": 1}, "knows neither groups"),
                                ("sigmoid", {"ffn.n_frozen": 1}, "frozen routes")):
        with pytest.raises(ConfigError, match=words):
            config_of(router, QUANTILE | more)
    config_of("sigmoid", QUANTILE | {"ffn.n_frozen": 1, "ffn.frozen_routes": False})


def test_it_is_said_that_it_goes_by_a_micro_batch_and_by_a_process():
    model = model_of("sigmoid", QUANTILE)
    assert model.per_micro_batch() == model.differences() == ["ffn.balance quantile"]
