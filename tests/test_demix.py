"""DEMix: experts that belong to domains, read one by one, mixed without a label, and removed."""
import json
import math
import sys

import pytest
import torch

import train
from data.batches import Batches
from data.prepare import prepare
from grow import btx, ensemble
from grow.parents import Parent
from lab.papers import shuffled
from runtime import checkpoint
from settings import ConfigError
from tiny import batch_of, model_of, run

DENSE = {"ffn.d_ff": 16, "ffn.activation": "gelu"}


def demix(E=4, seed=0, **more):
    names = ",".join("abcdefgh"[:E]) if E > 1 else '["a"]'
    return model_of("domain", DENSE | {"ffn.n_expert": E, "data.name": names} | more, seed).eval()


def dense_with(model, expert):
    """The dense model whose every layer is this expert of a DEMix model."""
    dense = model_of("dense", DENSE).eval()
    state = {name: p for name, p in model.state_dict().items() if ".ffn." not in name}
    for i, block in enumerate(model.blocks):
        for name in ("w_in", "w_out"):
            state[f"blocks.{i}.ffn.mlp.{name}.weight"] = getattr(block.ffn.experts, name)[expert]
    dense.load_state_dict(state)
    return dense


# --- identities ---


def test_one_domain_is_the_dense_model():
    """Logits, loss and every gradient."""
    model = demix(1)
    dense, (idx, y, _) = dense_with(model, 0), batch_of()
    outs = [one(idx, y, domain=torch.zeros(3, dtype=torch.long)) for one in (model, dense)]
    torch.testing.assert_close(outs[0].logits, outs[1].logits)
    for out in outs:
        out.loss.backward()
    for name, p in dense.named_parameters():
        if ".ffn." not in name:
            torch.testing.assert_close(dict(model.named_parameters())[name].grad, p.grad)
    for ours, theirs in zip(model.blocks, dense.blocks):
        grads = [ours.ffn.experts.w_in.grad[0], ours.ffn.experts.w_out.grad[0]]
        for grad, p in zip(grads, theirs.ffn.parameters()):
            torch.testing.assert_close(grad, p.grad.view_as(grad))


def test_of_equal_experts_the_label_is_irrelevant():
    model, (idx, _, domain) = demix(), batch_of(4)
    before = [model(idx, domain=label).logits for label in (domain, domain.flip(0))]
    assert not torch.allclose(*before)
    with torch.no_grad():
        for block in model.blocks:
            for p in (block.ffn.experts.w_in, block.ffn.experts.w_out):
                p.copy_(p[:1].expand_as(p))
    after = [model(idx, domain=label).logits for label in (domain, domain.flip(0))]
    torch.testing.assert_close(*after)


def grads_of(model, idx, y, domain):
    model.zero_grad()
    run(model, idx, y, domain=domain).loss.backward()
    return [(block.ffn.experts.w_in.grad, block.ffn.experts.w_out.grad) for block in model.blocks]


def test_an_expert_gets_no_gradient_from_other_domains():
    model, (idx, y, _) = demix(), batch_of(4)
    for layer in grads_of(model, idx, y, torch.tensor([0, 2, 2, 0])):
        for grad in layer:
            size = grad.flatten(1).abs().amax(1)
            assert (size > 0).tolist() == [True, False, True, False]


def test_with_a_frozen_trunk_an_expert_depends_on_its_own_text_alone():
    """Some steps with other text in domain 1: experts 0, 2 and 3 are the same to the last bit."""
    found = []
    for seed in (1, 2):
        model, (idx, y, domain) = demix(), batch_of(4)
        other = batch_of(4, seed=seed)
        idx, y = idx.clone(), y.clone()
        idx[1], y[1] = other[0][1], other[1][1]
        experts = []
        for name, p in model.named_parameters():
            p.requires_grad_(".experts." in name)
            experts += [p] if p.requires_grad else []
        optimizer = torch.optim.AdamW(experts, lr=0.01)
        for _ in range(4):
            grads_of(model, idx, y, domain)
            optimizer.step()
        found.append(experts)
    for ours, theirs in zip(*found):
        same = [torch.equal(a, b) for a, b in zip(ours, theirs)]
        assert same == [True, False, True, True]


# --- mixing without a label ---


def views(model):
    header = dict(ancestry=dict(kind="train", start="same", parents=[]))
    return ensemble.experts_of(Parent("runs/x", model, model.config, None, header))


@pytest.mark.parametrize("kind", ensemble.POSTERIORS)
def test_views_of_one_model_are_an_ensemble_of_models(kind):
    """E reads of one DEMix model and E dense models, by the loss and in cached generation."""
    model, (x, y, _) = demix(3), batch_of(2, 8)
    model.embedding.weight.data.mul_(20)                                # predictions that differ
    with torch.no_grad():
        for block in model.blocks:
            block.ffn.experts.w_out.mul_(30)
    log_prior = torch.tensor([0.5, 0.2, 0.3]).double().log()
    both = views(model), [dense_with(model, e) for e in range(3)]
    batch = [(x, y, torch.zeros(2, dtype=torch.long), 16)]
    ours, theirs = (ensemble.evaluate(models, batch, ["a"], log_prior, kind)["a"] for models in both)
    assert ours["alone"][0] != pytest.approx(ours["alone"][1], rel=1e-3)
    for name in ("loss", "bpb", "alone"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    torch.testing.assert_close(*(torch.tensor(each["posterior"]) for each in (ours, theirs)),
                               atol=1e-4, rtol=1e-4)
    mixtures = [ensemble.Ensemble(models, log_prior, kind).eval() for models in both]
    caches = [mixture.new_cache(2) for mixture in mixtures]
    for start, end in ((0, 3), (3, 4), (4, 8)):
        with torch.no_grad():
            logits = [mixture(x[:, start:end], cache).logits
                      for mixture, cache in zip(mixtures, caches)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_a_view_is_the_model_with_that_label():
    model, (idx, _, _) = demix(3), batch_of()
    for j, view in enumerate(views(model)):
        label = torch.full((3,), j)
        assert torch.equal(view(idx).logits, model(idx, domain=label).logits)


def test_an_expert_without_prior_is_removed():
    model, (x, y, _) = demix(3), batch_of(2, 8)
    batch = [(x, y, torch.zeros(2, dtype=torch.long), 16)]
    prior = torch.tensor([0.0, 1, 1]).double()
    found = ensemble.evaluate(views(model), batch, ["a"], prior.log().log_softmax(0))["a"]
    rest = ensemble.evaluate(views(model)[1:], batch, ["a"], torch.full((2,), -math.log(2)).double())
    assert found["loss"] == pytest.approx(rest["a"]["loss"], rel=1e-9)
    assert found["posterior"][0] == [0] * 8


def test_only_experts_of_domains_are_views():
    for kind in ("topk", "dense"):
        with pytest.raises(ConfigError, match="--experts: runs/x"):
            views(model_of(kind))


# --- the runs ---


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two corpora, and a DEMix run on them."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "empty.toml").write_text("")
    for name, line in (("one", "def f(x): return x + 1  # note\n"),
                       ("two", "all happy families are one. ")):
        (folder / f"{name}.txt").write_text(line * 120)
    prepare([str(folder / "one.txt"), str(folder / "two.txt")], out=folder / "prepared", quiet=True)
    trained(folder, "labels", train.main)
    return folder


def trained(home, out, program, more=(), begin=()):
    keys = {"model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 16,
            "ffn.kind": "moe", "ffn.router": "domain", "ffn.n_expert": 2, "ffn.top_k": 1, "ffn.d_ff": 16,
            "data.name": "one,two", "data.dir": home / "prepared", "train.batch_size": 4,
            "train.max_steps": 6, "train.warmup_steps": 2, "train.eval_every": 3, "train.lr": 0.02,
            "train.eval_batches": 2, "train.sample_tokens": 0, "train.device": "cpu"} | dict(more)
    argv = [home / "empty.toml", "--out", home / out, "--quiet", *begin]
    assert program([*map(str, argv), *(f"--{key}={value}" for key, value in keys.items())]) == 0


def test_the_program_mixes_and_removes_the_experts_of_a_run(home, tmp_path, capsys):
    path, labels = tmp_path / "x.json", str(home / "labels")
    words = ["ensemble", labels, "--experts", "--eval", "one", "two", "--json", str(path)]
    assert btx.main([*words, "--prompt", "all", "--tokens", "5"]) == 0
    assert f"model 1 is {labels}, expert of two" in capsys.readouterr().out
    found = json.loads(path.read_text())
    whole = found["corpora"]["one"]
    assert found["models"][0] == f"{labels}, expert of one" and len(whole["alone"]) == 2
    # removed: what the other says alone
    assert btx.main([*words, "--prior", "0", "1"]) == 0
    rest = json.loads(path.read_text())["corpora"]["one"]
    assert rest["loss"] == pytest.approx(whole["alone"][1])
    capsys.readouterr()
    for words, said in [(["ensemble", labels, labels, "--experts"], "give one run, not 2"),
                        (["ensemble", labels, "--experts", "--top_k", "3"], "at most 2"),
                        (["ensemble", labels, "--experts", "--prior", "1"], "each of the 2 models")]:
        assert btx.main([*words, "--eval", "one"]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_shuffled_labels_are_the_same_text_with_labels_in_another_order(home):
    folders = [home / "prepared" / f"{name}-byte" for name in ("one", "two")]
    plain, other = (kind(folders, [], 16, 12, 3) for kind in (Batches, shuffled.Shuffled))
    differ = 0
    for step in range(20):
        x, y, domain = plain.batch(step)
        x2, y2, labels = other.batch(step)
        assert torch.equal(x, x2) and torch.equal(y, y2)
        assert torch.equal(domain.sort().values, labels.sort().values)
        differ += int((domain != labels).sum())
        # every cut into micro-batches and processes gives the same labels
        cut = [other.batch(step, micro, 2, rank, 3)[2] for micro in range(2) for rank in range(3)]
        assert torch.equal(torch.cat(cut), labels)
    assert 0.3 < differ / 240 < 0.7


def test_a_run_with_shuffled_labels_goes_on_to_the_same_bits(home):
    trained(home, "shuffled", shuffled.main)
    trained(home, "half", shuffled.main, {"train.max_steps": 3, "train.schedule": "constant"})
    trained(home, "whole", shuffled.main, {"train.schedule": "constant"})
    words = ["--out", str(home / "half"), "--resume", "--quiet", "--train.max_steps", "6"]
    assert shuffled.main(words) == 0
    ends = [checkpoint.load(home / run_name / checkpoint.LAST).model
            for run_name in ("half", "whole", "shuffled", "labels")]
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values()))
    assert not all(torch.equal(a, b) for a, b in zip(ends[2].values(), ends[3].values()))
    assert train.Batches is Batches and "lab.papers.shuffled" in sys.modules
