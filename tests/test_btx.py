"""Models made from models: identities of upcycling, mixing, averages and ensembles; the folders."""
import csv
import errno
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import batch_of, model_of, run

import sample
import train
from data.prepare import prepare
from data.tokenizers import Tokenizer
from ffn import activation_of
from grow import btx, ensemble
from grow import hidden_units as units
from grow import parents
from grow import routing as routes
from model import load_model
from runtime import checkpoint
from settings import ConfigError

ROOT = Path(__file__).parents[1]
ACTIVATIONS = ["gelu", "relu", "relu2", "swiglu"]


def parent_of(kind="dense", more=(), seed=0):
    """A Parent that no folder holds; all of them say that they began with the same weights."""
    model = model_of(kind, more, seed).eval()
    header = dict(ancestry=dict(kind="train", start="same", parents=[]))
    return parents.Parent(Path(f"runs/{kind}{seed}"), model, model.config, Tokenizer.byte(), header)


def ffn(**settings):
    return [(f"ffn.{key}", str(value)) for key, value in settings.items()]


def logits(model):
    with torch.no_grad():
        return run(model, batch_of()[0]).logits


def expert_output(experts, e, x):
    return activation_of(x @ experts.w_in[e].T, experts.activation) @ experts.w_out[e].T


def experts_of(model, layer=0):
    return model.blocks[layer].ffn.experts


def mlp_of(parent, layer=0):
    return parent.model.blocks[layer].ffn.mlp


# --- upcycling ---

@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_upcycled_is_the_dense_model_at_step_0(activation):
    dense = parent_of(more={"ffn.activation": activation})
    for overrides in (ffn(n_expert=4), ffn(n_expert=4, moe_every=2), ffn(n_expert=3, router="soft"),
                      ffn(n_expert=3, top_k=1, router="sample_top1"), ffn(n_expert=2, d_expert=16)):
        config, model = btx.upcycle(dense, overrides)
        torch.testing.assert_close(logits(model), logits(dense.model), atol=1e-6, rtol=1e-5)
        rows = model.blocks[1].ffn.router.score.weight
        assert config.ffn.kind == "moe" and not torch.equal(rows[0], rows[1])
    first, second = (btx.upcycle(dense, ffn(), seed=seed)[1].blocks[1].ffn.router
                     for seed in (0, 1))
    assert not torch.equal(first.score.weight, second.score.weight)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slices_of_one_copy_sum_to_the_dense_layer(activation):
    """Qwen2's cut without re-initialisation, all slices of a shuffled copy active at gate 1."""
    dense = parent_of(more={"ffn.activation": activation, "ffn.d_ff": 24})
    _, model = btx.upcycle(dense, ffn(n_expert=2, granularity=3), shuffle=True, seed=5)
    experts, x = experts_of(model), torch.randn(5, 16)
    assert experts.w_out.shape == (6, 16, 8)
    outputs = [expert_output(experts, e, x) for e in range(6)]
    for copy in (outputs[:3], outputs[3:]):
        torch.testing.assert_close(sum(copy), mlp_of(dense)(x))
    assert not torch.allclose(outputs[0], outputs[3], atol=1e-3)    # each copy has its own order
    _, whole = btx.upcycle(dense, ffn(n_expert=1, top_k=1, granularity=3, route_scale=3),
                           shuffle=True)
    for block in whole.blocks:
        torch.nn.init.zeros_(block.ffn.router.score.weight)         # gates 1/3, times 3
    torch.testing.assert_close(logits(whole), logits(dense.model), atol=1e-6, rtol=1e-5)


def test_a_cut_that_does_not_divide_takes_as_many_copies_as_it_needs():
    table = units.slices(10, 4, 6, torch.Generator().manual_seed(0))    # 24 units of 3 copies
    assert table.shape == (4, 6)
    for copy in table.flatten()[:20].view(2, 10):
        assert sorted(copy.tolist()) == list(range(10))
    assert units.slices(10, 2, 5).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_half_of_every_expert_is_drawn_anew_and_the_shared_expert_is_the_dense_layer():
    dense = parent_of(more={"ffn.d_ff": 64})
    settings = ffn(n_expert=2, granularity=2, d_shared=64, shared_gate="true")
    plain, reinit = (btx.upcycle(dense, settings, reinit=share, seed=3)[1] for share in (0.0, 0.5))
    for name in ("w_in", "w_out"):
        a, b = getattr(experts_of(plain), name), getattr(experts_of(reinit), name)
        for e in range(4):
            assert 0.4 < (a[e] == b[e]).float().mean() < 0.6
        assert 0.85 < b.std() / a.std() < 1.4                # a new model's numbers, not 0
    assert torch.equal(reinit.blocks[0].ffn.shared.w_in.weight, mlp_of(dense).w_in.weight)
    assert torch.equal(reinit.blocks[0].ffn.shared.w_out.weight, mlp_of(dense).w_out.weight)


@pytest.mark.parametrize("kind, settings, named", [
    ("topk", ffn(), "only a dense model"), ("dense", ffn(d_ff=8), "--ffn.d_ff"),
    ("dense", ffn(activation="relu"), "--ffn.activation"),
    ("dense", ffn(n_expert=2, top_k=3), "ffn.top_k"),
    ("dense", ffn(router="hash", top_k=1, hash_table="balanced"), "ffn.hash_table")])
def test_upcycling_refuses(kind, settings, named):
    with pytest.raises(ConfigError, match=named):
        btx.upcycle(parent_of(kind), settings)


# --- mixing ---

def branches(n=3, **more):
    settings = {f"ffn.{key}": value for key, value in more.items()}
    return [parent_of(more=settings, seed=seed) for seed in range(n)]


@pytest.mark.parametrize("router", ["topk", "soft", "sample_top1"])
def test_a_mix_of_identical_branches_is_the_branch(router):
    branch = parent_of()
    _, model = btx.mix([branch] * 3, [], router)
    torch.testing.assert_close(logits(model), logits(branch.model), atol=1e-6, rtol=1e-5)


def test_a_mix_stacks_the_layers_averages_the_rest_and_draws_a_router():
    many = branches(3)
    config, model = btx.mix(many, ffn(balance="btx", balance_loss=0.02), seed=4)
    assert (config.ffn.n_expert, config.ffn.top_k, config.ffn.balance) == (3, 2, "btx")
    for j, branch in enumerate(many):
        assert torch.equal(experts_of(model, 1).w_in[j], mlp_of(branch, 1).w_in.weight)
        assert torch.equal(experts_of(model, 1).w_out[j], mlp_of(branch, 1).w_out.weight)
    for name in ("embedding.weight", "head.weight", "blocks.0.attention.qkv.weight", "norm.weight"):
        own = [b.model.state_dict()[name] for b in many]
        torch.testing.assert_close(model.state_dict()[name], sum(own) / 3)
    mine, again, other = (made.blocks[0].ffn.router.score.weight for made in (
        model, btx.mix(many, [], seed=4)[1], btx.mix(many, [], seed=5)[1]))
    assert torch.equal(mine, again) and not torch.equal(again, other)


def test_layers_that_stay_dense_are_averaged():
    many = branches(2)
    _, model = btx.mix(many, ffn(moe_every=2))
    own = [mlp_of(b, 0).w_in.weight for b in many]
    torch.testing.assert_close(model.blocks[0].ffn.mlp.w_in.weight, sum(own) / 2)
    assert torch.equal(experts_of(model, 1).w_in[1], mlp_of(many[1], 1).w_in.weight)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_blended_and_split_experts_hold_every_unit_once(activation):
    """At gate 1 all experts together are all branches together, however the units are dealt."""
    many, x = branches(2, activation=activation), torch.randn(5, 16)
    whole = sum(mlp_of(branch)(x) for branch in many)
    for shape, top_k, more in ((2, 2, dict(blend=True)), (4, 2, dict(split=2)),
                               (4, 4, dict(split=2, top_k=4))):
        config, model = btx.mix(many, [], **more)
        experts = experts_of(model)
        assert len(experts.w_in) == shape and config.ffn.top_k == top_k
        torch.testing.assert_close(sum(expert_output(experts, e, x) for e in range(shape)), whole)
    _, blend = btx.mix(many, [], blend=True)
    for j in range(2):              # the j-th half of each branch's columns, branch by branch
        halves = [mlp_of(b).w_out.weight[:, 8 * j:8 * j + 8] for b in many]
        assert torch.equal(experts_of(blend).w_out[j], torch.cat(halves, 1))
    _, split = btx.mix(many, [], split=2)
    assert torch.equal(experts_of(split).w_out[3], mlp_of(many[1]).w_out.weight[:, 8:])


def test_a_mix_can_be_mixed_again():
    many = branches(3)
    config, model = btx.mix(many[:2], ffn(moe_every=2))
    first = many[0]._replace(folder=Path("runs/mix"), model=model, config=config)
    config, model = btx.mix([first, many[2]], ffn(moe_every=2), top_k=1, router="switch")
    assert config.ffn.n_expert == 3 and config.ffn.top_k == 1
    for j, branch in enumerate(many):
        assert torch.equal(experts_of(model, 1).w_in[j], mlp_of(branch, 1).w_in.weight)
    with pytest.raises(ConfigError, match="runs/mix has experts in layers"):
        btx.mix([first, first], ffn(moe_every=1, moe_layers="0,1"))
    with pytest.raises(ConfigError, match="runs/mix is sparse already"):
        btx.mix([first, first], [], split=2)


def test_mixing_names_the_run_that_does_not_fit():
    many = branches(3)
    odd = parent_of(more={"model.n_layer": 3}, seed=7)
    with pytest.raises(ConfigError, match="runs/dense7 has model.n_layer = 3, runs/dense0 has 2"):
        btx.mix([odd, *many], [])                       # the majority is right, not the first
    with pytest.raises(ConfigError, match="runs/dense7 has experts of hidden width 24"):
        btx.mix([many[0], parent_of(more={"ffn.d_ff": 24}, seed=7), many[1]], [])
    with pytest.raises(ConfigError, match="runs/dense7 has ffn.activation"):
        btx.mix([*many, parent_of(more={"ffn.activation": "relu"}, seed=7)], [])
    with pytest.raises(ConfigError, match="runs/dense1 has the tokenizer char"):
        btx.mix([many[0], many[1]._replace(tokenizer=Tokenizer.from_chars("abc")), many[2]], [])
    stranger = many[1]._replace(header=dict(ancestry=dict(kind="train", start="other", parents=[])))
    with pytest.raises(ConfigError, match="runs/dense1 did not grow from the same seed"):
        btx.mix([many[0], stranger, many[2]], [])
    with pytest.raises(ConfigError, match="runs/peer0 has ffn.kind"):
        btx.mix([many[0], parent_of("peer")], [])
    with pytest.raises(ConfigError, match="16 hidden units cannot be cut into 3"):
        btx.mix(many, [], blend=True)


def test_branches_of_branches_share_their_seed():
    def grown(start, *more):
        return dict(kind="train", start=start, parents=list(more))

    seed = grown("s0")
    mixed = dict(kind="mix", parents=[grown("s9", seed)])
    tree = [grown("s1", seed), grown("s2", grown("s1", seed)), seed, mixed]
    assert parents.strangers([parent_of()._replace(header=dict(ancestry=a)) for a in tree]) == []


# --- averaging ---

def test_averages():
    many = branches(2)
    same = btx.merge([many[0], many[0], many[0]], [1, 2, 4])[1]
    assert all(torch.equal(t, many[0].model.state_dict()[n]) for n, t in same.state_dict().items())
    _, model = btx.merge(many, [1, 3])
    for name, tensor in model.state_dict().items():
        a, b = (m.model.state_dict()[name] for m in many)
        torch.testing.assert_close(tensor, 0.25 * a + 0.75 * b)
    assert model.head.weight is model.embedding.weight
    for bad in ([1], [1, -1], [0, 0], [1, math.nan]):
        with pytest.raises(ConfigError, match="--weights"):
            btx.merge(many, bad)


def test_biases_are_averaged_less_their_mean_and_hash_tables_must_be_equal():
    """A bias of loss-free balancing counts against the others: their mean is noise."""
    many = [parent_of("sigmoid", seed=seed) for seed in (0, 1)]
    many[1].model.blocks[0].ffn.router.bias.copy_(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    merged = btx.merge(many)[1]
    assert merged.blocks[0].ffn.router.bias.tolist() == [-1.0, -0.5, 0.0, 1.5]
    assert merged.blocks[1].ffn.router.bias.tolist() == [0.0] * 4
    alone = many[1]
    torch.testing.assert_close(logits(btx.merge([alone, alone])[1]), logits(alone.model))
    mixed = btx.mix([alone, alone], ffn(router="sigmoid"))[1]
    assert mixed.blocks[0].ffn.router.bias.tolist() == [0.0] * 8
    many = [parent_of("hash", seed=seed) for seed in (0, 1)]
    btx.merge(many)
    many[1].model.blocks[0].ffn.router.table.add_(1)
    with pytest.raises(ConfigError, match="hash tables"):
        btx.merge(many)


# --- ensembles ---

UNIFORM = torch.zeros(3, dtype=torch.float64)


def brute_force(models, text, prior, kind, upto):
    """p(x | text) of the mixture, (V,), and the weights, by the formula in probabilities."""
    probs = [logits_of(m, text).double().softmax(-1) for m in models]       # each (T, V)
    weights = []
    for p, start in zip(probs, prior):
        likelihood = [float(p[s - 1, text[s]]) for s in range(1, upto + 1)]
        last = likelihood[-1] if likelihood else 1
        seen = dict(product=math.prod(likelihood), one_token=last, uniform=1)
        weights.append(start * seen[kind])
    weights = [w / sum(weights) for w in weights]
    return sum(w * p[upto] for w, p in zip(weights, probs)), weights


def logits_of(model, text):
    with torch.no_grad():
        return model(torch.tensor([text])).logits[0]


@pytest.mark.parametrize("kind", ensemble.POSTERIORS)
def test_the_mixture_is_the_formula_in_probabilities(kind):
    """Against plain loops: the loss, the weights, and the cached reading that generation does."""
    models, text = [b.model for b in branches(3)], batch_of(1, 7)[0][0].tolist()
    for model in models:
        model.embedding.weight.data.mul_(20)                            # predictions that differ
    prior = [0.5, 0.2, 0.3]
    log_prior = torch.tensor(prior, dtype=torch.float64).log()
    wanted, weights = zip(*(brute_force(models, text, prior, kind, i) for i in range(6)))
    x, y = torch.tensor([text[:-1]]), torch.tensor([text[1:]])
    batch = [(x, y, torch.tensor([0]), 6)]
    found = ensemble.evaluate(models, batch, ["a"], log_prior, kind)["a"]
    nats = -sum(math.log(p[t]) for p, t in zip(wanted, text[1:]))
    assert found["loss"] == pytest.approx(nats / 6, rel=1e-6)
    assert found["bpb"] == pytest.approx(found["loss"] / math.log(2))
    posterior = torch.tensor(found["posterior"])
    torch.testing.assert_close(posterior, torch.tensor(weights).T, atol=1e-5, rtol=1e-5)
    mixture = ensemble.Ensemble(models, log_prior, kind).eval()
    cache = mixture.new_cache()
    with torch.no_grad():
        for start, end in ((0, 2), (2, 3), (3, 6)):                     # a prompt, a token, several
            out = mixture(x[:, start:end], cache).logits
            torch.testing.assert_close(out[0, 0].exp(), wanted[end - 1], atol=1e-6, rtol=1e-5)
    assert cache.length == 6


def test_the_product_finds_the_model_and_the_top_k_are_kept():
    likelihood = torch.tensor([[0.0, -1, -1, -1], [0, -2, -2, -2], [0, -9, -9, 0]])
    likelihood = likelihood.unsqueeze(1).double()
    weights = ensemble.log_posterior(likelihood, UNIFORM).exp()[:, 0]
    assert torch.allclose(weights[:, 0], torch.full((3,), 1 / 3).double())
    assert float(weights[0, 3]) == pytest.approx(1 / (1 + math.exp(-3) + math.exp(-15)))
    one = ensemble.log_posterior(likelihood, UNIFORM, "one_token").exp()[:, 0]
    assert int(one[:, 3].argmax()) == 2
    top = ensemble.log_posterior(likelihood, UNIFORM, "product", 2).exp()[:, 0]
    assert (top > 0).sum(0).tolist() == [2] * 4
    assert torch.allclose(top.sum(0), torch.ones(4).double())
    assert float(top[0, 1]) == pytest.approx(1 / (1 + math.exp(-1)))
    best = ensemble.log_posterior(likelihood, UNIFORM, "product", 1).exp()[:, 0]
    assert best[0].tolist() == [1] * 4
    tiny = ensemble.log_posterior(likelihood.repeat(1, 1, 500), UNIFORM)    # no underflow
    assert tiny.isfinite().all() and float(tiny[0, 0, -1].exp()) == pytest.approx(1)


def test_an_ensemble_of_identical_models_is_the_model():
    model, (x, y, _) = parent_of().model, batch_of()
    batch = [(x, y, torch.zeros(3, dtype=torch.long), 24)]
    for kind in ensemble.POSTERIORS:
        found = ensemble.evaluate([model] * 3, batch, ["a"], UNIFORM, kind)["a"]
        with torch.no_grad():
            assert found["loss"] == pytest.approx(float(model(x, y).loss), rel=1e-6)
        assert found["alone"] == pytest.approx([found["loss"]] * 3)
    mixture = ensemble.Ensemble([model] * 3, UNIFORM).eval()
    tokenizer = Tokenizer.from_chars(map(chr, range(65, 97)))
    texts = [sample.sample_text(m, tokenizer, "ABC", 30, seed=2)            # past the block of 12
             for m in (model, mixture)]
    assert texts[0] == texts[1]


# --- run folders ---

TRAIN = {"train.batch_size": 4, "train.max_steps": 6, "train.warmup_steps": 2,
         "train.eval_every": 3, "train.eval_batches": 2, "train.sample_tokens": 0,
         "train.device": "cpu", "train.lr": 0.02}
MODEL = {"model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 16,
         "ffn.d_ff": 16, "ffn.kind": "dense"}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A folder with two corpora, a seed, its branches a and b, and a model of another seed."""
    folder = tmp_path_factory.mktemp("lab")
    (folder / "empty.toml").write_text("")
    for name, line in (("one", "def f(x): return x + 1  # note\n"),
                       ("two", "all happy families are one. ")):
        (folder / f"{name}.txt").write_text(line * 120)
        prepare([str(folder / f"{name}.txt")], out=folder / "prepared", quiet=True)
    trained(folder, "seed", "one,two", MODEL)
    trained(folder, "a", "one", {"train.init_from": folder / "seed"})
    trained(folder, "b", "two", {"train.init_from": folder / "seed"})
    trained(folder, "foreign", "two", MODEL | {"train.seed": 1, "train.max_steps": 1})
    return folder


def trained(lab, out, data, more):
    settings = TRAIN | {"data.name": data, "data.dir": lab / "prepared"} | more
    argv = [str(lab / "empty.toml"), "--out", str(lab / out), "--quiet"]
    assert train.main(argv + [f"--{k}={v}" for k, v in settings.items()]) == 0


def program(folder, command, *args, status=0):
    """Runs grow.btx; words that are runs of the lab become their paths."""
    argv = [str(folder / a) if (folder / a).is_dir() else a for a in map(str, args)]
    assert btx.main([command, *argv]) == status


MADE = {"upcycle": ["seed", "--n_expert", "4"], "mix": ["a", "b", "seed"],
        "merge": ["a", "b", "--weights", "1", "3"]}


@pytest.mark.parametrize("command", MADE)
def test_what_is_made_is_an_ordinary_run_folder(command, lab, tmp_path, capsys):
    """It resumes, starts others, samples, mixes again, says what it is made of; its parents do not
    change."""
    before = {path: path.read_bytes() for run in ("seed", "a", "b")
              for path in (lab / run).iterdir()}
    out = tmp_path / "made"
    program(lab, command, *MADE[command], "--out", out)
    model, config, tokenizer, header = load_model(out, which="last")
    assert header["step"] == 0 and header["val_loss"] == math.inf
    assert checkpoint.load(out / checkpoint.LAST).optimizer == {}
    assert header["ancestry"]["kind"] == command and header["ancestry"]["run"] == str(out)
    assert header["ancestry"]["parents"][0]["run"] == str(lab / MADE[command][0])
    best = checkpoint.load(out / checkpoint.BEST).model
    assert torch.equal(best["norm.weight"], model.norm.weight)
    assert f"made by: {command}" in sample.remarks(model, header)[0]
    trained(lab, tmp_path / "next", "one,two", {"train.init_from": out})
    assert train.main(["--out", str(out), "--resume", "--quiet"]) == 0
    assert checkpoint.load(out / checkpoint.LAST).header["step"] == 6
    child = checkpoint.load(tmp_path / "next" / checkpoint.LAST).header
    assert child["ancestry"]["parents"][0]["kind"] == command
    assert sample.main([str(out), "--tokens", "3"]) == 0
    program(lab, "mix", out, tmp_path / "next", "--out", tmp_path / "again")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list(out.glob("*.part")) + list(out.glob("*.tmp"))


def test_a_mix_reads_the_corpora_of_its_branches(lab, tmp_path):
    more = ["--router", "switch", "--ffn.capacity_factor", "1.5"]
    program(lab, "mix", "a", "b", "--out", tmp_path / "mix", *more)
    config = load_model(tmp_path / "mix")[1]
    assert config.data.name == ["one", "two"] and config.train.init_from == ""
    assert config.ffn.router == "switch" and config.ffn.top_k == 1
    assert config.ffn.capacity_factor == 1.5


def test_frozen_experts_stay_as_they_are_while_the_router_learns(lab, tmp_path):
    program(lab, "mix", "a", "b", "--out", tmp_path / "mix", "--freeze-experts")
    before = checkpoint.load(tmp_path / "mix" / checkpoint.LAST).model
    assert train.main(["--out", str(tmp_path / "mix"), "--resume", "--quiet"]) == 0
    after = checkpoint.load(tmp_path / "mix" / checkpoint.LAST).model
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (".experts." in name), name


@pytest.mark.parametrize("args, said", [
    (["mix", "a"], "give two runs or more"),
    (["mix", "a", "foreign"], "did not grow from the same seed"),
    (["upcycle", "a", "--reinit", "2"], "--reinit 2.0"),
    (["mix", "a", "b", "--ffn.n_expert", "4"], "--ffn.n_expert"),
    (["mix", "a", "b", "--ffn.balanc", "btx"], "ffn.balance?"),
    (["mix", "a", "b", "--router", "best"], "--router"),
    (["merge", "a", "b", "--weights", "1"], "--weights"),
    (["mix", "a", "b", "--split", "3"], "3 equal parts")])
def test_mistakes_are_one_line_and_leave_nothing(args, said, lab, tmp_path, capsys):
    out = tmp_path / "out"
    try:
        program(lab, *args, "--out", out, status=2)
    except SystemExit as stop:                          # argparse's own
        assert stop.code == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("command", MADE)
def test_the_next_command_works_as_it_is_printed(command, lab, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    out = tmp_path / "it's made"                                        # a shell needs this quoted
    program(lab, command, *MADE[command], "--out", out)
    words = shlex.split(capsys.readouterr().out.split("Next:\n")[1])
    assert words[:2] == ["python", "train.py"]
    small = [f"--{key}={value}" for key, value in TRAIN.items()]
    assert train.main([*words[2:], *small, "--quiet"]) == 0
    trained = load_model(f"{out}-trained")[3]
    assert trained["ancestry"]["parents"][0]["run"] == str(out)


def test_a_folder_with_a_run_is_kept_unless_told_otherwise(lab, tmp_path, capsys):
    out = tmp_path / "made"
    program(lab, "merge", "a", "b", "--out", out)
    before = (out / checkpoint.LAST).read_bytes()
    program(lab, "mix", "a", "b", "--out", out, status=2)
    assert "--overwrite" in capsys.readouterr().err
    assert (out / checkpoint.LAST).read_bytes() == before
    program(lab, "mix", "a", "b", "--out", out, "--overwrite")
    assert load_model(out)[1].ffn.kind == "moe"
    # a parent is never replaced
    program(lab, "mix", "a", out, "--out", out, "--overwrite", status=2)
    assert "choose another folder" in capsys.readouterr().err and checkpoint.has_run(out)


def test_strangers_can_be_averaged_with_a_warning(lab, tmp_path, capsys):
    program(lab, "merge", "a", "b", "--out", tmp_path / "kin")
    assert capsys.readouterr().err == ""
    program(lab, "merge", "a", "foreign", "--out", tmp_path / "strangers")
    assert f"warning: {lab / 'foreign'} did not grow" in capsys.readouterr().err


def test_the_ensemble_measures_what_training_measures_and_writes_it_down(lab, tmp_path, capsys):
    path = tmp_path / "new" / "x.json"
    text = ["--prompt", "all", "--tokens", "20"]
    program(lab, "ensemble", "a", "b", "--eval", "one", "two", "--json", path, *text)
    printed, found = capsys.readouterr().out, json.loads(path.read_text())
    assert f"model 1 is {lab / 'b'}" in printed and "\nall" in printed
    for j, (run_name, corpus) in enumerate((("a", "one"), ("b", "two"))):
        with open(lab / run_name / "log.csv", newline="") as file:
            best = min(float(row["val_loss"]) for row in csv.DictReader(file) if row["val_loss"])
        assert found["corpora"][corpus]["alone"][j] == pytest.approx(best, rel=1e-5)
        weights = [model[-1] for model in found["corpora"][corpus]["posterior"]]
        assert sum(weights) == pytest.approx(1) and weights[j] > 0.8
    program(lab, "ensemble", "a", "b", "--eval", "one", "--prior", "1", status=2)
    assert "--prior" in capsys.readouterr().err
    program(lab, "ensemble", "a", "b", status=2)
    assert "--eval" in capsys.readouterr().err
    program(lab, "ensemble", "a", "--eval", "one", "--json", tmp_path, status=1)        # a folder
    assert capsys.readouterr().err.count("\n") == 1


def test_routes_are_counted_for_every_corpus_layer_and_expert(lab, tmp_path, capsys):
    program(lab, "mix", "a", "b", "seed", "--out", tmp_path / "mix")
    program(lab, "route", tmp_path / "mix", "--corpora", "one", "two")
    with open(tmp_path / "mix" / "routing.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3
    for what in ("top_share", "load_share"):
        for corpus in ("one", "two"):
            shares = [float(r[what]) for r in rows if r["corpus"] == corpus and r["layer"] == "1"]
            assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert max(float(r["load_share"]) for r in rows) <= 0.5 + 1e-6      # two experts a token
    assert max(float(r["top_share"]) for r in rows) > 0.5                   # but one is first
    assert (tmp_path / "mix" / "routing.png").read_bytes()[:4] == b"\x89PNG"
    assert "expert 2" in capsys.readouterr().out
    parent = parents.open_parents([tmp_path / "mix"])[0]
    shares = routes.expert_shares(parent, ["one", "two"])
    drawn = [axis for axis in routes.draw(shares, "").axes if axis.images]
    assert [axis.get_title() for axis in drawn] == ["layer 0", "layer 1"]
    for layer, axis in enumerate(drawn):
        wanted = [shares[name, layer]["top"].tolist() for name in ("one", "two")]
        assert axis.images[0].get_array().filled(0).tolist() == wanted
        assert axis.axison and len(axis.texts) == 6
        little, much = (sum(axis.images[0].to_rgba([[share]])[0, 0, :3]) for share in (0.05, 1.0))
        assert little < 1 < 1.8 < much and axis.images[0].cmap(np.ma.masked)[3] == 0        # none has no ink
    assert drawn[0].figure.axes[-1].get_ylabel() == "share of tokens"           # the colour bar
    program(lab, "route", "a", "--corpora", "one", "--out", tmp_path, status=2)
    assert "ffn.kind" in capsys.readouterr().err


# --- disks and folders ---

def test_what_cannot_be_written_is_one_line(lab, tmp_path, monkeypatch, capsys):
    """A file where a folder should be, then a disk that is full when the file is flushed."""
    program(lab, "mix", "a", "b", "--out", tmp_path / "mix")
    (tmp_path / "file").write_text("x")
    route = ["route", tmp_path / "mix", "--corpora", "one"]
    measure = ["ensemble", "a", "--eval", "one"]
    capsys.readouterr()

    def refused(*args, said):
        program(lab, *args, status=1)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and said in error, error

    refused(*route, "--out", tmp_path / "file", said=str(tmp_path / "file"))
    refused(*measure, "--json", tmp_path / "file" / "x.json", said=str(tmp_path / "file"))
    refused("merge", "a", "b", "--out", tmp_path / "file", said="--out")

    fsync = os.fsync

    def full(descriptor):                               # of the files in tmp_path
        written = os.fstat(descriptor).st_ino
        if any(path.stat().st_ino == written for path in tmp_path.rglob("*.tmp")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    refused(*route, said="routing.csv: the disk is full")
    monkeypatch.setattr(routes, "write_text", lambda path, text: None)
    refused(*route, said="routing.png: the disk is full")
    refused(*measure, "--json", tmp_path / "x.json", said="x.json: the disk is full")
    assert not list(tmp_path.rglob("routing.*")) + list(tmp_path.rglob("*.tmp"))


AS_NOBODY = """
import os, sys
sys.path.insert(0, sys.argv[1])
from grow import btx, lifelong
run = sys.argv[2]
os.setuid(65534)
out = ["--out", "/made"]
print([btx.main(["upcycle", run, *out]), btx.main(["merge", run, run, *out]),
       lifelong.main(["expand", run, "--add", "1", *out])])
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0,
                    reason="only root can become another user")
def test_a_run_that_may_not_be_read_is_one_line(lab, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    said = subprocess.run([sys.executable, "-c", AS_NOBODY, str(ROOT), str(closed / "run")],
                          capture_output=True, text=True, cwd="/")
    assert said.stdout == "[1, 1, 1]\n", said.stderr
    lines = said.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") and "Permission denied" in line for line in lines)
