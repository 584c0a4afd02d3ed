"""The prices of S-BASE and BASE: they carry a plan's choices over to single tokens, their average is kept in
training alone, and evaluation by them is causal, saved, and changes nothing where it is not asked for."""
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import arguments, corpora, same_tensors, weights  # noqa: F401 (a fixture)
from tiny import batch_of, config_of, model_of, run

import balance
import train
from balance import PRICE_RATE, remember_prices
from ffn import Context
from kernels.assignment import auction, balanced_assignment
from model import load_config
from routers import ROUTERS
from runtime import checkpoint
from settings import ConfigError

EMA = {"ffn.eval_prices": "ema"}
either = pytest.mark.parametrize("name", ["sinkhorn", "base"])


def logits_of(N, E, seed, scale=1.0):
    """Logits with a favourite expert."""
    return scale * (torch.randn(N, E, generator=torch.Generator().manual_seed(seed)) + torch.linspace(3, 0, E))


def router_of(name, E=4, d=16, more=EMA, **settings):
    torch.manual_seed(0)
    router = ROUTERS[name](config_of(name, {"ffn.n_expert": E, **more, **settings}).ffn, d)
    with torch.no_grad():
        router.score.weight.normal_(std=0.5)
    return router


# ---- what a price is


@given(N=st.integers(1, 60), E=st.integers(1, 6), tau=st.sampled_from([0.1, 1.0, 4.0]), iters=st.integers(1, 12),
       seed=st.integers(0, 10 ** 6))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_logits_minus_prices_choose_as_the_transport_plan(N, E, tau, iters, seed):
    router = router_of("sinkhorn", E, **{"ffn.sinkhorn_tau": tau, "ffn.sinkhorn_iters": iters})
    z = logits_of(N, E, seed)
    experts, prices = router.assign(z)
    value, plan = z - prices, tau * router.plan(z)
    assert torch.equal(experts, plan.argmax(-1)) and prices.shape == (E,)
    # the two differ by a number for each token, so that no choice differs that rounding does not decide
    torch.testing.assert_close(value - value[:, :1], plan - plan[:, :1], rtol=0, atol=1e-4)
    chosen = value.gather(1, experts.unsqueeze(1)).squeeze(1)
    assert (value.max(-1).values - chosen).max() < 1e-4


@given(N=st.integers(1, 60), E=st.integers(1, 6), scale=st.sampled_from([0.1, 1.0, 10.0]), seed=st.integers(0, 10 ** 6))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_no_token_of_the_auction_would_gain_elsewhere(N, E, scale, seed):
    """By more than epsilon, in score minus price: what makes the assignment nearly the best."""
    z = logits_of(N, E, seed, scale)
    experts, prices = auction(z)
    assert torch.equal(experts, balanced_assignment(z)) and experts.bincount(minlength=E).max() <= -(-N // E)
    value = z - prices
    epsilon = 1e-3 * float(z.max() - z.min()) + 1e-5
    assert (value.max(-1).values - value.gather(1, experts.unsqueeze(1)).squeeze(1)).max() <= epsilon


@either
def test_a_batchs_own_prices_balance_it_and_the_gate_is_of_the_raw_logit(name):
    router, x = router_of(name, **{"ffn.sinkhorn_iters": 50}), torch.randn(512, 16) + 0.7
    with torch.no_grad():
        router.score.weight[0] += 2 * x.mean(0) / x.mean(0).norm() ** 2             # a favourite
    ctx = Context(torch.zeros(8, 64, dtype=torch.long))
    trained = router.train()(x, ctx)
    remember_prices(router, trained.prices)
    by_prices = router.eval()(x, ctx)
    router.config.eval_prices = "raw"
    raw = router(x, ctx)
    most = [int(r.expert.bincount(minlength=4).max()) for r in (trained, by_prices, raw)]
    assert by_prices.prices is None and raw.prices is None
    assert (by_prices.expert == trained.expert).float().mean() > 0.98
    assert most[1] < 1.1 * 128 and most[2] > 1.5 * 128, most
    for r in (trained, by_prices, raw):
        gate = (x @ router.score.weight.T).gather(1, r.expert.unsqueeze(1)).squeeze(1).sigmoid()
        torch.testing.assert_close(r.weight, gate)


# ---- the average


def test_the_average_begins_at_the_first_batch_and_stays_at_mean_0():
    router, g = router_of("sinkhorn"), torch.Generator().manual_seed(0)
    batches = torch.randn(300, 4, generator=g) * 5 + 100
    expected = None
    for prices in batches:
        remember_prices(router, prices)
        own = prices.double() - prices.double().mean()
        expected = own if expected is None else (1 - PRICE_RATE) * expected + PRICE_RATE * own
        torch.testing.assert_close(router.prices.double(), expected, rtol=0, atol=1e-4)
        assert abs(router.prices.mean()) < 1e-5
    # unbiased from the start: equal batches give their price at once, and for ever
    again = router_of("sinkhorn")
    for _ in range(3):
        remember_prices(again, torch.tensor([3.0, 1.0, 0.0, 0.0]))
        torch.testing.assert_close(again.prices, torch.tensor([2.0, 0.0, -1.0, -1.0]))


def test_processes_remember_the_mean_of_theirs(monkeypatch):
    other = torch.tensor([0.0, 0.0, 4.0, -4.0])
    monkeypatch.setattr(balance, "global_mean", lambda x: (x + other) / 2)
    router = router_of("base")
    remember_prices(router, torch.tensor([6.0, 2.0, 0.0, 0.0]))
    assert router.prices.tolist() == [2.0, 0.0, 1.0, -3.0]


@either
def test_only_a_training_pass_moves_it_and_once(name, monkeypatch):
    calls = []
    monkeypatch.setattr("moe.remember_prices", lambda *args: calls.append(1) or remember_prices(*args))
    model, (idx, targets, _) = model_of(name), batch_of()
    buffers = [block.ffn.router.prices for block in model.blocks]
    run(model.eval(), idx, targets)
    assert not calls and not any(b.any() for b in buffers)
    out = run(model.train(), idx, targets)
    (out.loss + out.aux_loss).backward()
    assert len(calls) == 2 and all(b.any() and not b.requires_grad for b in buffers)
    assert all(b is block.ffn.router.prices for b, block in zip(buffers, model.blocks)), "in place"
    model.after_step([s.load for s in out.stats])
    assert len(calls) == 2


# ---- evaluation


def with_prices(name, more=EMA):
    """A model in evaluation whose prices decide."""
    model = model_of(name, more).eval()
    for i, block in enumerate(model.blocks):
        block.ffn.router.prices.copy_(torch.randn(4, generator=torch.Generator().manual_seed(i)) * 2)
    return model


@either
def test_evaluation_by_prices_is_causal_and_sees_no_neighbour(name):
    model, (idx, *_) = with_prices(name), batch_of()
    other = torch.cat([idx[:, :5], (idx[:, 5:] + 7) % 32], 1)
    neighbours = torch.cat([idx[:1], (idx[1:] + 5) % 32])
    with torch.no_grad():
        mine, later, beside = (model(t).logits for t in (idx, other, neighbours))
    torch.testing.assert_close(mine[:, :5], later[:, :5])
    torch.testing.assert_close(mine[0], beside[0])
    assert (mine[:, 5:] - later[:, 5:]).abs().max() > 1e-3
    # token by token with a cache as all at once
    cache = model.new_cache(3)
    with torch.no_grad():
        steps = torch.cat([model(idx[:, t:t + 1], cache=cache).logits for t in range(8)], 1)
    torch.testing.assert_close(steps, mine, rtol=1e-4, atol=1e-5)


@either
def test_without_the_setting_prices_change_nothing(name):
    idx, targets, _ = batch_of()
    plain = run(model_of(name).eval(), idx, targets)
    priced = with_prices(name, {})
    assert torch.equal(run(priced, idx, targets).logits, plain.logits)
    priced.config.ffn.eval_prices = "ema"                       # a trained model is evaluated both ways
    assert not torch.equal(run(priced, idx, targets).logits, plain.logits)


# ---- checkpoints


def test_a_resumed_run_has_the_same_prices_and_evaluations(corpora, tmp_path):        # noqa: F811
    """(test_train: the prices of both routers, where evaluation is raw.)"""
    given = dict(ffn__router="sinkhorn", ffn__top_k=1, ffn__eval_prices="ema", train__schedule="constant")
    assert train.main(arguments(corpora, tmp_path / "whole", **given)) == 0
    assert train.main(arguments(corpora, tmp_path / "halves", **given, train__max_steps=3)) == 0
    assert train.main(["--out", str(tmp_path / "halves"), "--resume", "--quiet", "--train.max_steps", "6"]) == 0
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert same_tensors(whole.model, halves.model) and whole.header["val_loss"] == halves.header["val_loss"]
    assert whole.model["blocks.0.ffn.router.prices"].any()


def test_a_checkpoint_from_before_there_were_prices_loads(capsys):
    old = {n: t for n, t in model_of("base", seed=1).state_dict().items() if not n.endswith("prices")}
    words = 'old.pt: has no prices yet, so that ffn.eval_prices = "ema" chooses as "raw" does\n'
    for more, told in (({}, ""), (EMA, words)):
        model = model_of("base", more)
        checkpoint.load_weights(model, old, "old.pt")
        assert capsys.readouterr().err == told
        assert same_tensors(old, {n: model.state_dict()[n] for n in old})
        assert not model.blocks[0].ffn.router.prices.any()
    with pytest.raises(checkpoint.CheckpointError, match="lacks norm.weight"):
        checkpoint.load_weights(model, {n: t for n, t in old.items() if n != "norm.weight"}, "old.pt")


def test_it_is_refused_where_nothing_reads_it():
    with pytest.raises(ConfigError, match="ffn.eval_prices.*has no effect.*sinkhorn.*base"):
        load_config(None, [("ffn.eval_prices", "ema")])


@pytest.mark.parametrize("name, more", [("sinkhorn", EMA), ("sigmoid", {"ffn.balance": "quantile"})])
def test_buffers_move_in_a_compiled_graph_as_without(name, more):
    """In one graph, which breaks nowhere, in place: a captured step finds them where they were."""
    idx, targets, _ = batch_of()
    found = []
    for compiled in (False, True):
        model = model_of(name, more | {"model.n_layer": 1})
        buffers = {n: b for n, b in model.named_buffers() if ".router." in n}
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        losses = [run(forward, idx, targets).loss.detach() for _ in range(3)]
        assert all(dict(model.named_buffers())[n] is b and b.any() for n, b in buffers.items())
        found.append([*losses, *buffers.values()])
    torch.testing.assert_close(*found)
