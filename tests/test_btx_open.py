"""What Branch-Train-MiX left open: information between expert and domain, experts that are knocked
out, whole sequences to one expert, mixtures of data, loss on answers alone."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

import train
from data.answers import IGNORE, spans
from data.batches import Batches
from data.binfile import DataError, open_bin
from data.corpora.arithmetic import as_text
from data.prepare import prepare
from data.tokenizers import Tokenizer
from grow.btx import mix
from grow.parents import Parent
from kernels import loss
from lab.papers import inside, probes
from lab.papers.evaluate import routing as routing_row
from routers import pairs
from runtime import checkpoint
from tiny import batch_of, model_of, run

CPU = torch.device("cpu")
SHARES = st.integers(1, 5).flatmap(lambda C: st.integers(1, 6).flatmap(lambda E: st.lists(
    st.lists(st.integers(0, 50), min_size=E, max_size=E).filter(any), min_size=C, max_size=C)))


# --- mutual information ---


@settings(max_examples=60, deadline=None)
@given(SHARES, st.randoms(use_true_random=False))
def test_information_is_bounded_and_knows_no_names(rows, rng):
    """At least 0, at most log min(E, C), the same for any order of experts and of corpora."""
    table = inside.alike(torch.tensor(rows, dtype=torch.float64))
    C, E = table.shape
    found = inside.information(table)
    assert -1e-12 <= found <= math.log(min(C, E)) + 1e-12
    shuffled = table[rng.sample(range(C), C)][:, rng.sample(range(E), E)]
    assert inside.information(shuffled) == pytest.approx(found, abs=1e-12)
    # what a row of results calls specialisation
    if C > 1:
        loads = {0: {str(c): table[c] for c in range(C)}}
        row = routing_row(loads, [str(c) for c in range(C)])
        assert row["specialisation"] == pytest.approx(found, abs=1e-12)


def test_information_of_equal_rows_is_none_and_of_a_permutation_all():
    equal = torch.tensor([[3.0, 1, 0]]).double().expand(4, 3)
    assert inside.information(equal) == pytest.approx(0, abs=1e-12)
    assert inside.information(torch.eye(4).double()[[2, 0, 3, 1]]) == pytest.approx(math.log(4))


def two_corpora(n=6, T=8):
    """n batches of 3 sequences, three of each corpus; corpus b has other tokens than a."""
    batches = []
    for seed in range(n):
        x, y, _ = batch_of(T=T, vocab=16, seed=seed)
        other = 16 * (seed % 2)
        batches.append((x + other, y + other, torch.full((3,), seed % 2), 0, "ab"[seed % 2]))
    return batches


def force(model, expert):
    """Every layer sends every token to expert(token ids (B, T)) alone."""
    for block in model.blocks:
        def choose(x, ctx, router=block.ffn.router):
            best = expert(ctx.token_ids).reshape(-1, 1)
            probs = torch.full((len(x), router.n_expert), 1 / router.n_expert)
            return pairs(best, torch.ones(len(x), 1), probs=probs)
        block.ffn.router.forward = choose


def measured(probe, model, batches=None):
    return probe(model.eval(), batches or two_corpora(), model.config, CPU, "float32")


def test_chance_is_the_information_of_shuffled_labels():
    model = model_of("switch")
    force(model, lambda ids: ids // 16)                             # the corpus decides
    row = measured(inside.chance, model)
    # 18 sequences, a balanced split of which meets the true one in 2 of 48,620 draws
    assert 0 < row["specialisation_chance"] < 0.2 and row["specialisation_p"] < 0.02
    force(model, lambda ids: torch.zeros_like(ids))
    assert measured(inside.chance, model) == dict(specialisation_chance=0, specialisation_p=1)
    assert measured(inside.chance, model, [two_corpora()[0]]) == {}
    assert measured(inside.chance, model_of("dense")) == {}


def test_inside_tells_domains_from_bytes():
    model = model_of("switch")
    force(model, lambda ids: ids % 4)                               # the token decides
    row = measured(inside.inside, model)
    assert row["domain_beyond_byte"] == pytest.approx(0, abs=1e-9)
    assert row["byte_information"] == pytest.approx(math.log(4), abs=0.05)
    # the same text in both corpora, and the corpus decides
    for block in model.blocks:
        block.ffn.router.forward = lambda x, ctx: pairs(
            ctx.domain.repeat_interleave(8).view(-1, 1), torch.ones(len(x), 1),
            probs=torch.full((len(x), 4), 0.25))
    row = measured(inside.inside, model, [(x % 16, y, *rest) for x, y, *rest in two_corpora(1)
                                          for rest in (rest, [1 - rest[0], 0, "b"])])
    assert row["byte_information"] == pytest.approx(0, abs=1e-12)
    assert row["domain_beyond_byte"] == pytest.approx(math.log(2))
    for kind in ("dense", "peer", "pkm"):
        assert measured(inside.inside, model_of(kind)) == {}


def test_the_bytes_of_an_expert_are_those_that_it_gets_more_often_than_others():
    p = torch.full((256, 2), 1e-6, dtype=torch.float64)
    p[ord("e"), 0], p[10, 1], p[200, 1], p[32] = 0.3, 0.2, 0.1, 0.2     # a space says nothing
    first, second = inside.telling(p / p.sum())
    assert first.split()[0] == "e" and second.split()[:2] == ["newline", "0xc8"]


# --- knock-out ---


def test_without_an_expert_that_nobody_uses_nothing_changes():
    model, (idx, _, _) = model_of("topk").eval(), batch_of()
    with torch.no_grad():
        for block in model.blocks:                                  # three experts for all tokens
            block.ffn.router.score.weight[3] = 0
            block.ffn.router.score.weight[0] = -block.ffn.router.score.weight[1]
    before = model(idx)
    used = {int(e) for s in before.stats for e in s.routing.expert}
    row = measured(inside.inside, model, [(*batch_of()[:2], torch.zeros(3).long(), 0, "a")])
    for e in range(4):
        with inside.without(model, e):
            after = model(idx)
        assert all(e not in s.routing.expert for s in after.stats)
        assert torch.equal(before.logits, after.logits) == (e not in used)
        assert (row[f"without_{e}_a"] == 0) == (e not in used)
    assert torch.equal(before.logits, model(idx).logits)            # put back


def test_knocked_out_experts_swap_as_their_names_do():
    model, order = model_of("topk"), torch.tensor([2, 0, 3, 1])
    before = measured(inside.inside, model)
    with torch.no_grad():
        for block in model.blocks:
            for p in (block.ffn.router.score.weight, *block.ffn.experts.parameters()):
                p.copy_(p[order].clone())
    after = measured(inside.inside, model)
    for e, old in enumerate(order.tolist()):
        assert after[f"without_{e}_a"] == pytest.approx(before[f"without_{old}_a"], abs=1e-5)
    for name in ("byte_information", "domain_beyond_byte"):
        assert after[name] == pytest.approx(before[name], abs=1e-9)


# --- whole sequences ---


def test_a_sequence_of_one_token_is_routed_as_its_token():
    model, (idx, _, domain) = model_of("topk").eval(), batch_of(B=8, T=1)
    found = []
    for way in ("token", "start", "mean"):
        with inside.one_expert(model, way):
            found.append(model(idx, domain=domain).logits)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], model(idx).logits)             # which has two experts a token


def test_whole_sequences_go_to_one_expert_and_tokens_do_not():
    model, (idx, _, domain) = model_of("topk").eval(), batch_of(B=4, T=12)
    for way in inside.WAYS:
        with inside.one_expert(model, way):
            stats = model(idx, domain=domain).stats
        experts = torch.stack([s.routing.expert.view(4, 12) for s in stats])
        assert (experts == experts[..., :1]).all() == (way != "token")
        if way == "label":
            assert torch.equal(experts[..., 0], domain.expand(2, 4))


def branch(seed_model, change):
    """A Parent with other hidden units than the seed, all else alike."""
    model = model_of("dense", DENSE).eval()
    model.load_state_dict(seed_model.state_dict())
    generator = torch.Generator().manual_seed(change)
    for name, p in model.named_parameters():
        if ".ffn." in name and change:
            p.data += 0.3 * torch.randn(p.shape, generator=generator)
    header = dict(ancestry=dict(kind="train", start="same", parents=[]))
    return Parent(f"runs/{change}", model, model.config, Same(), header)


class Same:
    name = fingerprint = "same"


DENSE = {"ffn.d_ff": 16, "ffn.activation": "gelu"}


def test_with_one_trunk_the_label_gives_the_branch():
    seed = model_of("dense", DENSE)
    parents = [branch(seed, change) for change in (1, 2, 3)]
    _, mixed = mix(parents, [], seed=0)
    idx, _, _ = batch_of()
    assert not torch.allclose(parents[0].model(idx).logits, parents[1].model(idx).logits)
    for j, parent in enumerate(parents):
        with inside.one_expert(mixed, "label"):
            logits = mixed(idx, domain=torch.full((3,), j)).logits
        torch.testing.assert_close(logits, parent.model(idx).logits)


def test_one_more_expert_that_is_never_chosen_changes_nothing():
    seed = model_of("dense", DENSE)
    parents = [branch(seed, change) for change in (1, 2, 3, 4)]
    (_, three), (_, four) = mix(parents[:3], [], seed=0), mix(parents, [], seed=0)
    idx, _, _ = batch_of()
    with torch.no_grad():
        for ours, theirs in zip(four.blocks, three.blocks):
            ours.ffn.router.score.weight[:3] = theirs.ffn.router.score.weight
    with inside.without(four, 3):
        torch.testing.assert_close(four(idx).logits, three(idx).logits)


def test_the_probe_of_whole_sequences(monkeypatch):
    monkeypatch.setattr(inside, "START", 3)
    model, batches = model_of("topk").eval(), two_corpora()
    row = measured(probes.PROBES["whole_sequence"], model, batches)
    tail = [torch.nn.functional.cross_entropy(model(x, domain=d).logits[:, 3:].flatten(0, 1),
                                              y[:, 3:].flatten()).item()
            for x, y, d, *_ in batches]
    assert row["val_loss_tail"] == pytest.approx(sum(tail) / len(tail))
    assert set(row) == {"val_loss_tail", *(f"val_loss_by_{way}" for way in inside.WAYS)}
    assert len(set(row.values())) == 5
    for kind in ("dense", "peer", "hash"):
        assert measured(probes.PROBES["whole_sequence"], model_of(kind), batches) == {}


# --- mixtures of data ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    for name, line in (("one", "def f(x): return x + 1\n"), ("two", "all happy families. "),
                       ("three", "1 + 1 = 2\n")):
        (home / f"{name}.txt").write_text("".join(f"{i} {line}" for i in range(100)))
    return prepare([str(home / f"{n}.txt") for n in ("one", "two", "three")],
                   out=home / "prepared", quiet=True)


def test_weights_of_one_domain_are_going_on_with_that_domain(folders):
    alone, weighed = Batches(folders[:1], [], 16, 4, 3), Batches(folders, [1, 0, 0], 16, 4, 3)
    for step in (0, 1, 7, 300):
        for a, b in zip(alone.batch(step), weighed.batch(step)):
            assert torch.equal(a, b)


# --- the loss of answers alone ---


QUESTIONS = "".join(f"Q: {i} + {i}?\nA: {i} + {i} = {2 * i}\n\nsure\n#### {2 * i}\n\n"
                    for i in range(1, 300))


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Prepared folders of a text of questions: by bytes, and by a BPE."""
    home = tmp_path_factory.mktemp("asked")
    (home / "asked.txt").write_text(QUESTIONS)
    return {kind: prepare([str(home / "asked.txt")], kind, 300, out=home / kind, quiet=True)
            for kind in ("byte", "bpe")}


def test_answers_reach_to_the_next_question():
    text = b"Q: a\nb?\nA: one\n\ntwo\n\nQ: c\nA: three"
    assert [text[a:b] for a, b in spans(text)] == [b" one\n\ntwo\n\n", b" three"]
    assert spans(b"# " + text) == [] and spans(b"") == []
    for questions in (as_text("x?", "1 + 1 = 2", "2") * 3, QUESTIONS):
        ends = [questions[b - 2:b] for _, b in spans(questions.encode())]
        assert ends == ["\n\n"] * questions.count("Q: ")


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_targets_are_the_tokens_of_answers_alone(asked, kind):
    """What is left of the targets, decoded, is what stands behind each A: in the window."""
    folder = asked[kind][0]
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    plain, only = Batches([folder], [], 64, 4, 0), Batches([folder], [], 64, 4, 0, True)
    for step in range(6):
        (x, y, domain), (x2, y2, domain2) = plain.batch(step), only.batch(step)
        assert torch.equal(x, x2) and torch.equal(domain, domain2)
        kept = y2 != IGNORE
        assert torch.equal(y2[kept], y[kept]) and kept.any() and not kept.all()
        for row, keep in zip(y, kept):
            text, first = tokenizer.decode(row.tolist()), row.tolist()
            begin = text.find("Q: ")
            # from the first whole question of the window on
            skip = next(i for i in range(65) if len(tokenizer.decode(first[:i])) >= begin)
            rest = tokenizer.decode(first[skip:])
            if kind == "byte" and begin >= 0:
                want = "".join(rest[a:b] for a, b in spans(rest.encode()))
                got = tokenizer.decode([t for t, k in zip(first[skip:], keep[skip:]) if k])
                assert got == want
            # a question is never learned
            got = tokenizer.decode([t for t, k in zip(first, keep) if k])
            assert "Q: " not in got and "?" not in got


def test_other_text_keeps_its_targets_and_alone_is_refused(asked, folders):
    plain, only = (Batches([folders[0], asked["byte"][0]], [], 16, 8, 0, flag)
                   for flag in (False, True))
    x, y, domain = only.batch(0)
    assert torch.equal(y[domain == 0], plain.batch(0)[1][domain == 0])
    assert (y[domain == 1] == IGNORE).any()
    with pytest.raises(DataError, match="data.answers_only: none of the corpora"):
        Batches(folders, [], 16, 8, 0, True)
    assert IGNORE == loss.IGNORE


@pytest.mark.parametrize("chunks", [1, 3])
def test_a_mask_of_ones_is_the_plain_loss_and_prompts_get_no_gradient(chunks):
    """To the last bit; and with ignored targets it is the mean over the others alone."""
    model, (idx, y, _) = model_of("topk", {"model.loss_chunks": chunks}), batch_of()
    out = run(model, idx, y)
    if chunks == 1:
        plain = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), y.flatten(),
                                                  reduction="none").mean()
        assert torch.equal(out.loss, plain)
    part = y.clone()
    part[:, :5] = part[2] = IGNORE
    model.zero_grad()
    found = run(model, idx, part)
    found.loss.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    theirs = torch.nn.functional.cross_entropy(run(model, idx).logits[:2, 5:].flatten(0, 1),
                                               y[:2, 5:].flatten())
    theirs.backward()
    torch.testing.assert_close(found.loss, theirs)
    for a, p in zip(ours, model.parameters()):
        torch.testing.assert_close(a, p.grad, atol=1e-6, rtol=1e-4)
    # the balance loss sees all tokens
    assert torch.equal(found.aux_loss, out.aux_loss)
    # nothing to learn: loss 0, no gradient
    none = run(model, idx, torch.full_like(y, IGNORE)).loss
    assert none == 0
    model.zero_grad()
    none.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_logits_of_prompts_get_no_gradient():
    model, (idx, y, _) = model_of("dense"), batch_of()
    y = y.clone()
    y[:, :5] = IGNORE
    kept = []
    model.head.register_forward_hook(lambda m, x, z: z.retain_grad() or kept.append(z))
    run(model, idx, y).loss.backward()
    assert not kept[0].grad[:, :5].any() and kept[0].grad[:, 5:].abs().sum(-1).all()


def test_training_on_answers_goes_on_to_the_same_bits(asked, tmp_path):
    (tmp_path / "empty.toml").write_text("")
    keys = {"model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 32,
            "ffn.d_ff": 16, "data.name": "asked", "data.dir": asked["byte"][0].parent,
            "data.answers_only": "true", "train.batch_size": 4, "train.warmup_steps": 1,
            "train.schedule": "constant", "train.sample_tokens": 0, "train.device": "cpu",
            "train.eval_batches": 1}

    def trained(out, steps):
        words = [tmp_path / "empty.toml", "--out", tmp_path / out, "--quiet",
                 f"--train.max_steps={steps}"]
        assert train.main([*map(str, words), *(f"--{k}={v}" for k, v in keys.items())]) == 0

    trained("half", 2)
    trained("whole", 4)
    assert train.main(["--out", str(tmp_path / "half"), "--resume", "--quiet",
                       "--train.max_steps", "4"]) == 0
    ends = [checkpoint.load(tmp_path / name / checkpoint.LAST).model for name in ("half", "whole")]
    assert all(torch.equal(a, b) for a, b in zip(ends[0].values(), ends[1].values()))
    keys["data.answers_only"] = "false"
    trained("plain", 4)
    other = checkpoint.load(tmp_path / "plain" / checkpoint.LAST).model
    assert not all(torch.equal(a, b) for a, b in zip(ends[1].values(), other.values()))


def test_the_probe_of_answers(tmp_path):
    """Against a sum over the tokens of every answer."""
    prepare(["math"], out=tmp_path, max_tokens=3000, quiet=True)
    model = model_of("dense", {"model.vocab_size": 256, "data.dir": str(tmp_path),
                               "train.batch_size": 4, "train.eval_batches": 3}).eval()
    row = probes.answers(model, [], model.config, CPU, "float32")
    text = bytes(open_bin(tmp_path / "math-byte" / "val.bin")[0])
    nats, tokens, T = 0.0, 0, 12
    fit = (len(text) - 1) // T
    # the twelve windows of the validation batches
    for start in (i * fit // 12 * T for i in range(12)):
        window = torch.tensor(list(text[start:start + T + 1]))
        log_p = model(window[None, :-1]).logits[0].log_softmax(-1)
        for t in range(T):
            if any(a <= start + t + 1 < b for a, b in spans(text)):
                nats, tokens = nats - log_p[t, window[t + 1]].item(), tokens + 1
    assert row["answer_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert 0 <= row["answer_tokens_right"] < 0.1
