"""What a run notices by itself: gradients that explode, experts without tokens, a router that collapsed."""
import torch
from test_train import arguments, corpora  # noqa: F401 (a fixture)

import train
from model import GPT, load_config
from runtime.watch import EARLY, IDLE, KNOWN, MEMORY, SPIKES, STUCK, Watch, usage


def watching(**settings):
    """(Watch of a model of two sparse layers with 8 experts, list of what it says)."""
    base = {"model.n_layer": 2, "ffn.n_expert": 8} | {k.replace("__", "."): v for k, v in settings.items()}
    said = []
    return Watch(GPT(load_config(None, base | {"model.vocab_size": 32})), said.append), said


def see(watch, *loads, steps=1, first=0, losses=()):
    for step in range(first, first + steps):
        tensors = [torch.tensor(load) for load in loads]
        watch.experts(step, tensors, [usage(load)[1] for load in tensors], losses)


EVEN = [100.0] * 8


def test_exploding_gradients_are_said_once_and_single_spikes_not():
    watch, said = watching()
    norms = [1.0 + 0.1 * (i % 5) for i in range(400)]
    for i in (50, 160, 270):                                # one in a hundred steps is not an explosion
        norms[i] = 50.0
    for step, norm in enumerate(norms):
        watch.gradients(step, norm)
    assert not said
    for step in range(400, 460):
        watch.gradients(step, 50.0 if step % 10 == 0 else 1.0)
    assert len(said) == 1 and "gradients explode" in said[0] and "train.lr" in said[0]
    assert f"step {400 + 10 * (SPIKES - 1)}" in said[0]


def test_a_norm_that_grows_slowly_or_starts_high_is_no_explosion():
    watch, said = watching()
    for step in range(MEMORY * 10):
        watch.gradients(step, 1.02 ** step)
    watch, said_too = watching()
    for step in range(200):
        watch.gradients(step, 1000.0 if step < EARLY - 1 else 1.0)
    assert not said and not said_too


def test_a_dead_expert_is_said_once_with_its_layer_and_the_remedy():
    watch, said = watching()
    lame = EVEN[:3] + [0.0] + EVEN[4:]
    see(watch, EVEN, lame, steps=IDLE - 1)
    see(watch, EVEN, EVEN)                                  # a token just in time
    see(watch, EVEN, lame, steps=IDLE - 1)
    assert not said
    see(watch, EVEN, lame, steps=300)
    assert len(said) == 1 and "1 of 8 experts of layer 1" in said[0] and f"{IDLE} steps" in said[0]
    assert ": 3." in said[0] and "ffn.balance_loss" in said[0]


def test_an_expert_that_few_tokens_could_have_missed_is_not_dead():
    watch, said = watching()
    see(watch, [4.0] * 7 + [0.0], EVEN, steps=2 * IDLE)     # 3.5 pairs a step for each: 700 in all
    assert not said
    see(watch, [4.0] * 7 + [0.0], EVEN, steps=IDLE)
    assert len(said) == 1


def test_frozen_experts_may_be_idle():
    watch, said = watching(ffn__n_frozen=6)
    see(watch, [0.0] * 6 + [100.0] * 2, EVEN, steps=3 * IDLE)
    assert not any("no token" in text for text in said)
    see(watch, [0.0] * 7 + [100.0], EVEN, steps=3 * IDLE)
    assert any("6" in text and "no token" in text for text in said)


def test_the_remedy_fits_what_balances():
    for settings, wanted in [(dict(ffn__router="hash", ffn__top_k=1), "hash_table"),
                             (dict(ffn__balance="none"), '"auto"'),
                             (dict(ffn__router="sigmoid"), "bias_rate"),
                             (dict(ffn__kind="peer"), "query_norm")]:
        assert wanted in next(iter(watching(**settings)[0].layers.values())).remedy()


def test_collapse_is_all_tokens_at_the_same_few_experts():
    watch, said = watching()
    see(watch, [400.0, 390.0] + [2.0] * 6, EVEN, steps=STUCK - 1)
    see(watch, EVEN, EVEN)
    assert not said
    see(watch, [400.0, 390.0] + [2.0] * 6, EVEN, steps=STUCK + 10)
    assert len(said) == 1 and "router of layer 0 collapsed" in said[0] and "same 2 of 8 experts" in said[0]
    watch, said = watching()
    see(watch, [300.0, 160.0, 160.0, 160.0] + [5.0] * 4, EVEN, steps=3 * STUCK)     # uneven is not collapsed
    assert not said


def test_few_experts_collapse_too():
    """n < 2 k: of 3 experts, 2 do all the work."""
    watch, said = watching(ffn__n_expert=3)
    see(watch, [400.0, 300.0, 100.0], [1.0] * 3, steps=3 * STUCK)
    assert not said
    see(watch, [400.0, 390.0, 2.0], [1.0] * 3, steps=STUCK)
    assert len(said) == 1 and "same 2 of 3 experts" in said[0]
    watch, said = watching(ffn__n_expert=2)                         # all experts for every token: nothing to choose
    see(watch, [400.0, 400.0], [1.0, 1.0], steps=3 * STUCK)
    assert not said


def test_one_expert_that_gets_nearly_all_tokens_is_a_collapse():
    """94 % of the tokens at one of 8 experts: as many do the work as 1.4 with an equal share."""
    watch, said = watching(ffn__router="switch", ffn__top_k=1)
    rest = [0.06 / 7] * 7
    see(watch, [0.8] + [0.2 / 7] * 7, EVEN, steps=3 * STUCK)
    assert not said
    see(watch, [0.94] + rest, EVEN, steps=STUCK)
    assert len(said) == 1 and "one of 8 experts got nearly all tokens, now 94%" in said[0]
    watch, said = watching()                                        # two choices: half of the pairs is all tokens
    see(watch, [400.0, 130.0, 130.0, 130.0] + [2.0] * 4, EVEN, steps=STUCK)
    assert len(said) == 1 and "now 100%" in said[0]


def test_a_collapse_from_before_a_resume_is_said_soon():
    """Short sittings: the steps before were no other."""
    stuck = [400.0, 390.0] + [2.0] * 6
    watch, said = watching()
    see(watch, stuck, EVEN, first=501, steps=KNOWN - 1)
    assert not said
    see(watch, stuck, EVEN, first=501 + KNOWN, steps=1)
    assert len(said) == 1
    watch, said = watching()
    see(watch, EVEN, EVEN, first=501)                               # it was even: from here all of the steps count
    see(watch, stuck, EVEN, first=502, steps=STUCK - 1)
    assert not said


def test_a_balance_loss_of_1_beside_an_uneven_load_is_said():
    """Flat probabilities: E sum f P is 1 whatever the load f."""
    uneven = [300.0] + [71.4] * 7
    watch, said = watching(ffn__top_k=1, ffn__gate_order="softmax_then_topk")
    see(watch, uneven, EVEN, steps=3 * STUCK, losses=[1.3, 1.0])    # the loss sees it
    see(watch, EVEN, EVEN, steps=3 * STUCK, losses=[1.0, 1.0])
    see(watch, uneven, EVEN, steps=3 * STUCK)                       # no loss
    assert not said
    see(watch, uneven, EVEN, steps=STUCK, losses=[1.001, 1.0])
    assert len(said) == 1 and "balance loss of layer 0 is 1.00" in said[0] and "3.0 times the mean" in said[0]


def test_peer_collapses_by_router_weight_and_its_unused_experts_are_no_news():
    watch, said = watching(ffn__kind="peer", ffn__n_keys=32, ffn__peer_heads=2, ffn__peer_top_k=4)
    spread = torch.zeros(1024)
    spread[::8] = 1.0                                       # an eighth of a thousand experts
    see(watch, spread.tolist(), steps=3 * IDLE)
    assert not said
    stuck = torch.full((1024,), 1e-3)
    stuck[:8] = 100.0
    see(watch, stuck.tolist(), steps=STUCK)
    assert len(said) == 1 and "same 8 of 1024 experts" in said[0]


def test_training_says_it_and_goes_on(corpora, tmp_path, monkeypatch, capsys):              # noqa: F811
    """A router that sends all tokens to two experts of five: noticed, said once, trained to the end."""
    real = train.Trainer.step

    def step(self):
        with torch.no_grad():
            for block in self.model.blocks:
                block.ffn.router.bias.copy_(torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0]))
        return real(self)

    monkeypatch.setattr(train.Trainer, "step", step)
    more = dict(ffn__router="sigmoid", ffn__n_expert=5, train__max_steps=120, train__eval_every=0)
    quiet = arguments(corpora, tmp_path / "run", **more)
    assert train.main([word for word in quiet if word != "--quiet"]) == 0
    told = capsys.readouterr().err
    assert told.count("warning:") == 2 and told.count("collapsed") == 1 and told.count("no token in") == 1
    assert "5/120" not in told and "best validation loss" in told
    assert train.main([*quiet, "--overwrite"]) == 0 and "warning" not in capsys.readouterr().err
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) == 122
