"""Growing a trained model, holding its past: freezing, expansion, teacher, replay, adapters."""
import csv
import math
import os
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import LEARNED, ONE_EXPERT, batch_of, config_of, model_of

import train
from data.batches import Batches
from data.prepare import prepare, prepared
from grow import lifelong, retain
from model import GPT, load_config, load_model, resolve
from runtime import checkpoint
from sample import sample_text
from settings import ConfigError

TINY = {"model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 16,
        "ffn.d_ff": 16, "ffn.n_expert": 4}
TRAIN = {"train.batch_size": 4, "train.max_steps": 4, "train.warmup_steps": 1,
         "train.eval_every": 2, "train.eval_batches": 2, "train.sample_tokens": 0,
         "train.device": "cpu", "train.lr": 0.01, "train.weight_decay": 0.5}
GROWING = [r for r in LEARNED if r != "expert_choice"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two prepared corpora, the trained runs `old` and `dense`, and `grown`: `old`
    expanded."""
    folder = tmp_path_factory.mktemp("home")
    for name, line in (("one", "def f(x): return x + 1\n"),
                       ("two", "all happy families are alike. ")):
        (folder / f"{name}.txt").write_text(line * 120)
        prepare([str(folder / f"{name}.txt")], out=folder / "prepared", quiet=True)
    (folder / "empty.toml").write_text("")
    run(folder, folder / "old", **TINY)
    run(folder, folder / "dense", **TINY | {"ffn.kind": "dense"})
    lifelong.expand(folder / "old", 2, folder / "grown", say=lambda text: None)
    return folder


def run(home, out, *more, status=0, **settings):
    """train.py on corpus `one`."""
    keys = TRAIN | {"data.name": "one", "data.dir": home / "prepared"} | settings
    assert train.main([str(home / "empty.toml"), "--out", str(out), "--quiet", *more,
                       *(f"--{k}={v}" for k, v in keys.items())]) == status


def go_on(home, out, origin, **settings):
    """The same from another run's weights, on corpus `two`."""
    run(home, out, **{"train.init_from": home / origin, "data.name": "two"} | settings)


def trainer_of(home, origin, **settings):
    """A Trainer as train.run sets it up from another run's weights."""
    keys = TRAIN | {"data.name": "two", "data.dir": home / "prepared",
                    "train.init_from": home / origin}
    keys |= settings
    config = load_config(None, [(k, str(v)) for k, v in keys.items()])
    config.train.dtype = "float32"
    saved = checkpoint.load_plain(home / origin)
    checkpoint.adopt(config, saved, origin)
    folders, tokenizer = prepared(config.data)
    trainer = train.Trainer(config, folders, tokenizer, torch.device("cpu"))
    checkpoint.load_weights(trainer.model, saved.model | retain.adapters(trainer.model), origin)
    return trainer


def weights(out, name=checkpoint.LAST):
    return checkpoint.load(out / name).model


def rows(out):
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- freezing ---

@pytest.mark.parametrize("router", LEARNED)
def test_frozen_experts_and_routes_are_bit_identical_after_decay_and_stale_momentum(router, home):
    """Everything learns for three steps, which fills AdamW's momentum; then two experts freeze."""
    more = {"ffn.top_k": 1 if router in ONE_EXPERT else 2, "ffn.bias_rate": 0.5}
    run(home, home / router, **TINY | more | {"ffn.router": router, "train.max_steps": 1})
    trainer = trainer_of(home, router)
    for _ in range(3):
        trainer.step()
    trainer.config.ffn.n_frozen = 2
    for block in trainer.model.blocks:
        block.ffn.n_frozen = 2
    trainer.past.rows = retain.frozen_rows(trainer.model, trainer.config.ffn)
    before = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    for _ in range(3):
        trainer.step()
    of_experts = ("experts.w_in", "experts.w_out", "score.weight", "noise.weight", "router.bias")
    held = [n for n in before if n.endswith(of_experts)]
    assert len(held) == 2 * (3 + (router in ("noisy_topk", "sigmoid")))
    for name in held:
        after = trainer.model.state_dict()[name]
        assert torch.equal(after[:2], before[name][:2]), name
        assert not torch.equal(after[2:], before[name][2:]), name


def test_frozen_rows_are_not_in_the_norm_that_clips(home):
    trainer = trainer_of(home, "grown")
    norm = float(trainer.step()["grad_norm"])
    free = trainer_of(home, "grown", **{"ffn.n_frozen": 0})
    whole = float(free.step()["grad_norm"])
    clear = 0.0
    for name, p in free.model.named_parameters():
        part = p.grad[4:] if ".experts." in name or ".router." in name else p.grad
        before = part.div(min(1, 1 / (whole + 1e-6)))                       # it was clipped
        clear += before.square().sum().item()
    assert norm < whole and norm == pytest.approx(math.sqrt(clear), rel=1e-4)


def test_with_free_routes_only_the_experts_stay(home, tmp_path):
    go_on(home, tmp_path / "run", "old", **{"ffn.n_frozen": 4, "ffn.frozen_routes": "false"})
    old, new = weights(home / "old", checkpoint.BEST), weights(tmp_path / "run")
    for name in old:
        assert torch.equal(old[name], new[name]) == (".experts." in name), name


def test_n_frozen_is_checked_also_against_a_model_that_comes_from_elsewhere(home, tmp_path, capsys):
    with pytest.raises(ConfigError, match="ffn.n_frozen = 9 is more than the 8"):
        load_config(None, [("ffn.n_frozen", "9")])
    with pytest.raises(ConfigError, match="needs experts.*peer.* has none"):
        load_config(None, [("ffn.n_frozen", "1"), ("ffn.kind", "peer")])
    run(home, tmp_path / "run", status=2, **{"train.init_from": home / "grown", "ffn.n_frozen": 7})
    assert "ffn.n_frozen = 7 is more than the 6" in capsys.readouterr().err
    run(home, tmp_path / "wide", **TINY | {"ffn.n_expert": 12, "train.max_steps": 1})
    go_on(home, tmp_path / "run", tmp_path / "wide", **{"ffn.n_frozen": 10, "train.max_steps": 1})


def test_named_parameters_stay_and_a_name_that_is_none_is_an_error(home, tmp_path, capsys):
    go_on(home, tmp_path / "run", "old", **{"lifelong.freeze": "head.weight,blocks.?.attention.*"})
    old, new = weights(home / "old", checkpoint.BEST), weights(tmp_path / "run")
    for name in old:                                    # the head is tied to the embedding
        stays = name in ("embedding.weight", "head.weight") or ".attention." in name
        assert torch.equal(old[name], new[name]) == stays, name
    for pattern, wanted in (("embeding.weight", "did you mean embedding.weight?"),
                            ("*attn*", "names no parameter"), ("*", "leave nothing to train")):
        run(home, tmp_path / "bad", status=2, **TINY | {"lifelong.freeze": pattern})
        assert wanted in capsys.readouterr().err


# --- expansion ---

class NoNewExperts(torch.nn.Module):
    """A router's scores with those of new experts at minus infinity."""

    def __init__(self, score, n):
        super().__init__()
        self.weight, self.n = score.weight, n

    def forward(self, x):
        new = torch.full((len(x), len(self.weight) - self.n), -torch.inf)
        return torch.cat([F.linear(x.float(), self.weight[:self.n]), new], 1)


@pytest.mark.parametrize("init", ["copy", "random"])
@pytest.mark.parametrize("router", GROWING)
def test_with_new_logits_at_minus_infinity_the_old_logits_are_bit_equal(router, init):
    old, config = model_of(router).eval(), config_of(router)
    grown = lifelong.grown_config(config, 2)
    new = GPT(grown).eval()
    new.load_state_dict(lifelong.grow(old.state_dict(), config, grown, init, seed=3))
    idx, _, domain = batch_of()
    with torch.no_grad():               # so that new experts are chosen, until they cannot be
        for block in new.blocks:
            block.ffn.router.score.weight[4:].normal_(std=0.5)
    assert all(s.load[4:].sum() > 0 for s in new(idx, domain=domain).stats)
    for block in new.blocks:
        block.ffn.router.score = NoNewExperts(block.ffn.router.score, 4)
    a, b = (model(idx, domain=domain).logits for model in (old, new))
    # torch.sigmoid's own last bit depends on a number's place in its tensor
    if router == "sigmoid":
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(a, b)
    # 2 experts, 2 layers, width 16, multiply, add
    rows = 2 * 2 * 16 * 2 * (1 + (router == "noisy_topk"))
    assert new.flops_per_token() - old.flops_per_token() == rows or router == "soft"


def test_copies_are_of_distinct_experts_and_their_routes_do_not_tie(home):
    old, new = weights(home / "old", checkpoint.BEST), weights(home / "grown")
    for layer in range(2):
        experts, score = f"blocks.{layer}.ffn.experts.", f"blocks.{layer}.ffn.router.score.weight"
        sources = [next(e for e in range(4) if torch.equal(old[experts + "w_in"][e], row))
                   for row in new[experts + "w_in"][4:]]
        assert len(set(sources)) == 2
        assert torch.equal(new[experts + "w_out"][4:], old[experts + "w_out"][sources])
        gap = (new[score][4:] - old[score][sources]).square().mean() / old[score].square().mean()
        assert 0.003 < gap.sqrt() < 0.03
    assert all(torch.equal(new[n][:len(t)], t) for n, t in old.items())


def test_expand_makes_a_run_folder_and_says_what_changed(home, tmp_path, capsys):
    expand = ["expand", str(home / "old"), "--add", "2", "--out", str(tmp_path / "six")]
    assert lifelong.main(expand) == 0
    said = capsys.readouterr().out
    old, _, _, _ = load_model(home / "old")
    model, config, tokenizer, header = load_model(tmp_path / "six")
    f, ancestry = config.ffn, header["ancestry"]
    assert (f.n_expert, f.n_frozen, f.frozen_routes, f.balance) == (6, 4, True, "none")
    assert ancestry["kind"] == "expand" and ancestry["parents"][0]["run"] == str(home / "old")
    assert f"{old.flops_per_token():,} -> {old.flops_per_token() + 128:,}" in said
    valid = train.EvalBatches([home / "prepared" / "one-byte"], 16, 4, 4, tokenizer.token_lengths())
    with torch.no_grad():
        p, q = (torch.cat([m(x).logits.flatten(0, 1) for x, *_ in valid]).double().log_softmax(-1)
                for m in (old, model))
    kl = float(said.split("KL(teacher || grown) = ")[1].split()[0])
    assert kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=0.02)
    assert "validation text" in said
    # and it is like any other: it samples, resumes, is expanded again, and starts another run
    assert isinstance(sample_text(model, tokenizer, tokens=5), str)
    lifelong.expand(tmp_path / "six", 2, tmp_path / "eight")
    _, config, _, header = load_model(tmp_path / "eight")
    assert (config.ffn.n_expert, config.ffn.n_frozen) == (8, 6)
    assert header["ancestry"]["parents"][0]["kind"] == "expand"
    assert train.main(["--out", str(tmp_path / "six"), "--resume", "--quiet"]) == 0
    assert rows(tmp_path / "six")[-1]["step"] == "4" and rows(tmp_path / "six")[0]["val_loss"]


@pytest.mark.parametrize("init", ["copy", "random"])
def test_new_experts_get_tokens_from_a_router_whose_bias_has_drifted(init, home, tmp_path):
    """Loss-free balancing moves the mean of the biases, by which no old expert gains or loses."""
    run(home, tmp_path / "run", **TINY | {"ffn.router": "sigmoid", "train.max_steps": 1})
    saved = checkpoint.load(tmp_path / "run" / checkpoint.BEST)
    for name, tensor in saved.model.items():
        if name.endswith("router.bias"):
            tensor.copy_(0.3 + 0.02 * torch.randn(4))
    checkpoint.save(tmp_path / "run" / checkpoint.BEST, saved.header, saved.model)
    expand = ["expand", tmp_path / "run", "--add", 2, "--init", init, "--out", tmp_path / "grown"]
    assert lifelong.main(expand) == 0
    model = load_model(tmp_path / "grown")[0]
    with torch.no_grad():
        stats = model(batch_of(T=16)[0]).stats
    for layer, block in enumerate(model.blocks):
        old, bias = saved.model[f"blocks.{layer}.ffn.router.bias"], block.ffn.router.bias
        assert torch.equal(bias[:4], old)
        if init == "random":
            assert bias[4:].tolist() == pytest.approx([float(old.mean())] * 2)
        else:
            assert set(bias[4:].tolist()) <= set(old.tolist())
    assert sum(s.load[4:].sum() for s in stats) > 0


def test_the_next_command_works_as_it_is_printed(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parents[1])
    out = tmp_path / "it's grown"                                       # a shell needs this quoted
    assert lifelong.main(["expand", str(home / "old"), "--add", "1", "--out", str(out)]) == 0
    words = shlex.split(capsys.readouterr().out.split("Next:\n")[1])
    assert words[:2] == ["python", "train.py"] and "docs" in words
    words[words.index("docs")] = "two"                                  # which takes no preparation
    small = [f"--{key}={value}" for key, value in TRAIN.items()]
    assert train.main([*words[2:], *small, "--quiet"]) == 0
    trained = load_model(f"{out}-trained")[1]
    assert trained.ffn.n_expert == 5 and trained.lifelong.distill == 1


def test_expand_of_split_experts_counts_before_the_split(home, tmp_path):
    run(home, tmp_path / "split", **TINY | {"ffn.granularity": 2, "train.max_steps": 1})
    lifelong.expand(tmp_path / "split", 1, tmp_path / "out", say=lambda text: None)
    config = load_model(tmp_path / "out")[1]
    assert (config.ffn.n_expert, config.ffn.experts, config.ffn.n_frozen) == (5, 10, 8)


def test_without_its_corpus_the_divergence_is_of_random_tokens_and_says_so(home, tmp_path, capsys):
    run(home, tmp_path / "run", **TINY | {"train.max_steps": 1})
    saved = checkpoint.load(tmp_path / "run" / checkpoint.BEST)
    saved.header["config"]["data"]["name"] = "a corpus that is gone"
    checkpoint.save(tmp_path / "run" / checkpoint.BEST, saved.header, saved.model)
    lifelong.expand(tmp_path / "run", 1, tmp_path / "out")
    assert "one batch of random tokens (no text: " in capsys.readouterr().out


@pytest.mark.parametrize("settings, wanted", [
    ({"ffn.kind": "dense"}, "grow.btx upcycle"),
    ({"ffn.kind": "peer", "ffn.n_keys": 4, "ffn.peer_top_k": 2}, "pair of sub-keys"),
    ({"ffn.router": "hash", "ffn.top_k": 1}, "its table"),
    ({"ffn.router": "expert_choice"}, "would take fewer"),
    ({"ffn.n_groups": 2}, "would change groups"),
    ({"ffn.router": "domain", "ffn.top_k": 1, "data.name": "a,b,c,d"}, "new corpus")])
def test_models_that_cannot_be_expanded_are_refused_with_the_reason(settings, wanted):
    model = GPT(load_config(None, TINY | settings | {"model.vocab_size": 32}))
    with pytest.raises(ConfigError, match=wanted):
        lifelong.refuse(model)


def test_expand_refuses_what_would_overwrite(home, tmp_path, capsys):
    old, out = str(home / "old"), ["--out", str(tmp_path / "out"), "--add", "1"]
    assert lifelong.main(["expand", old, *out]) == 0
    assert lifelong.main(["expand", old, *out]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert lifelong.main(["expand", old, *out, "--init", "random", "--overwrite"]) == 0
    assert lifelong.main(["expand", old, *out, "--out", old, "--overwrite"]) == 2
    assert "is what the new run is made from" in capsys.readouterr().err
    assert lifelong.main(["expand", str(tmp_path / "none"), *out]) == 1
    assert lifelong.main(["expand", old, "--out", str(tmp_path / "x"), "--add", "0"]) == 2
    assert not (tmp_path / "x").exists() and checkpoint.has_run(home / "old")


# --- the teacher in the objective ---

def test_divergence_by_hand_and_its_gradient():
    """T^2 KL(p || q) of softmax(z / T): its gradient in the new logits is T (q - p) / tokens."""
    torch.manual_seed(0)
    old, new, T = torch.randn(2, 3, 5), torch.randn(2, 3, 5, requires_grad=True), 2.5
    kl = retain.kl_divergence(old, new, T)
    p, q = (z.detach().double().div(T).softmax(-1) for z in (old, new))
    assert kl.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    (T * T * kl).backward()
    torch.testing.assert_close(new.grad.double(), T * (q - p) / 6, rtol=1e-4, atol=1e-7)
    assert retain.kl_divergence(old, old).item() == 0


def test_the_objective_holds_both_terms_once_and_no_reported_loss_does(home):
    """By hand, over the micro-steps of one step; the teacher is the run before the expansion."""
    lam, T, l2 = 0.7, 2.0, 0.3
    settings = {"lifelong.distill": lam, "lifelong.distill_temperature": T, "lifelong.l2": l2,
                "train.grad_accum": 2}
    plain = trainer_of(home, "grown", **{"train.grad_accum": 2})
    held = trainer_of(home, "grown", **settings)
    with torch.no_grad():
        held.model.embedding.weight += 0.01
        plain.model.embedding.weight += 0.01
    old = load_model(home / "old")[0]
    assert held.past.folder == home / "old"
    x = torch.cat([held.batches.batch(0, micro, 2)[0] for micro in range(2)])
    with torch.no_grad():
        p, q = ((m(x).logits.double() / T).softmax(-1) for m in (old, held.model.eval()))
    kl, distance = (p * (p / q).log()).sum(-1).mean().item(), old.embedding.weight.numel() * 1e-4
    a, b = plain.step(), held.step()
    assert float(a["loss"]) == float(b["loss"])
    extra = float(b["aux_loss"]) - float(a["aux_loss"])
    assert extra == pytest.approx(lam * T * T * kl + l2 * distance, rel=1e-4)


def test_l2_pulls_old_weights_and_leaves_new_experts_alone(home):
    trainer = trainer_of(home, "grown", **{"lifelong.l2": 0.5})
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += 0.1
    old = dict(trainer.past.teacher.named_parameters())
    trainer.past.loss(None, None, None).backward()
    for name, p in trainer.model.named_parameters():
        n = len(old[name])
        torch.testing.assert_close(p.grad[:n], p.detach()[:n] - old[name])    # 2 * 0.5 * difference
        assert p.grad[n:].eq(0).all()


def test_the_teacher_is_found_and_must_fit(home, tmp_path, capsys):
    def folder_of(**settings):
        keys = {k.replace("__", "."): v for k, v in settings.items()}
        return retain.teacher_folder(load_config(None, [(k, str(v)) for k, v in keys.items()]))

    assert folder_of(train__init_from=home / "grown") == home / "old"
    assert folder_of(train__init_from=home / "old") == home / "old"
    named = folder_of(train__init_from=home / "grown", lifelong__teacher=home / "dense")
    assert named == home / "dense"
    origin = {"train.init_from": home / "grown", "train.max_steps": 1}
    distil = origin | {"lifelong.distill": 1}
    other = {"lifelong.l2": 1, "lifelong.teacher": home / "dense"}
    run(home, tmp_path / "a", status=1, **origin | other)
    assert "the teacher has none" in capsys.readouterr().err
    run(home, tmp_path / "b", status=1, **distil | {"lifelong.teacher": tmp_path / "gone"})
    assert "gone: no run is there" in capsys.readouterr().err
    run(home, tmp_path / "small", **TINY | {"model.block_size": 8, "train.max_steps": 1})
    run(home, tmp_path / "c", status=1, **distil | {"lifelong.teacher": tmp_path / "small"})
    assert "a shorter model.block_size" in capsys.readouterr().err
    run(home, tmp_path / "d", **distil | {"lifelong.teacher": home / "dense"})


@pytest.mark.parametrize("settings, wanted", [
    ({"lifelong.distill": 1}, "needs an old model"), ({"lifelong.l2": 1}, "needs old weights"),
    ({"lifelong.lora_rank": 2}, "adapts a trained model"),
    ({"lifelong.distill": 1, "lifelong.teacher": "x", "model.loss_chunks": 2}, "needs logits")])
def test_settings_that_have_nothing_to_hold_to_are_refused(settings, wanted):
    with pytest.raises(ConfigError, match=wanted):
        load_config(None, [(k, str(v)) for k, v in settings.items()])


def test_distillation_of_a_model_whose_loss_comes_in_slices_is_refused(home, tmp_path, capsys):
    sliced = {"model.loss_chunks": 2, "lifelong.distill": 1}
    run(home, tmp_path / "run", status=2, **sliced | {"train.init_from": home / "old"})
    assert "model.loss_chunks = 2" in capsys.readouterr().err


# --- replay ---

def test_replay_gives_old_text_its_share_and_both_losses(home, tmp_path):
    folders = [home / "prepared" / f"{name}-byte" for name in ("two", "one")]
    batches = Batches(folders, [0.9, 0.1], 16, 50, seed=0)
    domains = torch.cat([batches.batch(step)[2] for step in range(20)])
    assert domains.bincount().tolist() == [900, 100]
    go_on(home, tmp_path / "run", "old", **{"data.name": "two,one", "data.weights": "0.9,0.1"})
    last = rows(tmp_path / "run")[-1]
    new, old = float(last["val_loss_two"]), float(last["val_loss_one"])
    assert float(last["val_loss"]) == pytest.approx(0.9 * new + 0.1 * old, rel=1e-5)


# --- adapters ---

LORA = {"lifelong.lora_rank": 3, "lifelong.lora_alpha": 6.0, "train.lr": 0.05}


@pytest.mark.parametrize("origin", ["dense", "old"])
def test_adapters_start_as_the_model_learn_alone_and_fold_away(origin, home, tmp_path):
    trainer = trainer_of(home, origin, **LORA)
    old, _, tokenizer, _ = load_model(home / origin)
    x = batch_of(T=16)[0]
    assert torch.equal(trainer.model.eval()(x).logits, old(x).logits)
    learning = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    layers = 4 if origin == "dense" else 2          # qkv and out, w_in and w_out of a dense layer
    assert learning == set(retain.adapters(trainer.model)) and len(learning) == 2 * 2 * layers
    for _ in range(3):
        trainer.step()
    trained, before = trainer.model.state_dict(), old.state_dict()
    assert all(torch.equal(trained[n], t) for n, t in before.items())
    checkpoint.save_run(tmp_path, trainer)
    plain, config, _, _ = load_model(tmp_path, which="last")
    folded = plain.state_dict()
    moved = {n for n in before if not torch.equal(folded[n], before[n])}
    assert moved == {n.replace(".lora_a", ".weight") for n in learning if n.endswith("a")}
    name = "blocks.1.attention.out"
    product = trained[f"{name}.lora_b"] @ trained[f"{name}.lora_a"]
    by_hand = trained[f"{name}.weight"] + 2.0 * product
    torch.testing.assert_close(folded[f"{name}.weight"], by_hand)
    adapted = trainer.model.eval()(x).logits
    torch.testing.assert_close(plain(x).logits, adapted, rtol=1e-4, atol=1e-5)
    assert plain.num_params() == old.num_params() == trainer.model.num_params()
    assert trainer.model.flops_per_token() == old.flops_per_token()
    assert isinstance(sample_text(plain, tokenizer, tokens=3), str)


def test_a_run_with_adapters_is_a_plain_model_for_the_next_one(home, tmp_path):
    go_on(home, tmp_path / "lora", "old", **LORA)
    assert any(".lora_" in n for n in weights(tmp_path / "lora"))
    go_on(home, tmp_path / "next", tmp_path / "lora", **{"train.max_steps": 1})
    assert not any(".lora_" in n for n in weights(tmp_path / "next"))
    first = float(rows(tmp_path / "next")[0]["val_loss"])
    best = min(float(r["val_loss"]) for r in rows(tmp_path / "lora")[1:] if r["val_loss"])
    assert first == pytest.approx(best, rel=1e-5)
    lifelong.expand(tmp_path / "lora", 1, tmp_path / "grown", say=lambda text: None)
    assert not any(".lora_" in n for n in weights(tmp_path / "grown"))


# --- resume ---

HOLDING = {"distill": ("grown", {"lifelong.distill": 1, "lifelong.distill_temperature": 2}),
           "l2": ("grown", {"lifelong.l2": 0.1}), "frozen": ("grown", {}), "lora": ("dense", LORA),
           "all": ("grown", {"lifelong.distill": 1, "lifelong.l2": 0.1,
                             "lifelong.freeze": "emb*,*norm*"})}


@pytest.mark.parametrize("kind", HOLDING)
def test_resume_is_exact(kind, home, tmp_path):
    """N + M steps equal N steps, a restart, M steps, to the last bit."""
    origin, settings = HOLDING[kind]
    for out in ("whole", "halves"):
        go_on(home, tmp_path / out, origin, **settings | {"train.grad_accum": 2})
    (tmp_path / "halves" / checkpoint.LAST).unlink()
    os.replace(tmp_path / "halves" / checkpoint.PREVIOUS, tmp_path / "halves" / checkpoint.LAST)
    assert checkpoint.load(tmp_path / "halves" / checkpoint.LAST).header["step"] == 2
    assert train.main(["--out", str(tmp_path / "halves"), "--resume", "--quiet"]) == 0
    seen = [[(r["step"], r["loss"], r["val_loss"], r["aux_loss"]) for r in rows(tmp_path / out)]
            for out in ("whole", "halves")]
    assert seen[0] == seen[1] and len(seen[0]) == 5
    ends = [checkpoint.load(tmp_path / out / checkpoint.LAST) for out in ("whole", "halves")]
    for part in ("model", "optimizer"):
        a, b = (getattr(end, part) for end in ends)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_resume_without_the_teacher_says_so_and_takes_another_folder(home, tmp_path, capsys):
    lifelong.expand(home / "old", 1, tmp_path / "grown", say=lambda text: None)
    go_on(home, tmp_path / "run", tmp_path / "grown", **{"lifelong.distill": 1})
    for name in (checkpoint.BEST, checkpoint.LAST):
        (tmp_path / "grown" / name).unlink()
    again = ["--out", str(tmp_path / "run"), "--resume", "--quiet", "--train.max_steps", "5"]
    assert train.main(again) == 1
    error = capsys.readouterr().err
    assert "grown: no run is there" in error and "--lifelong.teacher" in error
    assert error.count("error:") == 1
    assert train.main([*again, "--lifelong.teacher", str(home / "old")]) == 0
