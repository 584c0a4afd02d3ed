"""Branch-Adapt-Route: experts learned apart from one base model, beside an anchor that stays."""
import torch
import pytest

import train
from data.prepare import prepare
from grow import bar
from grow.parents import Parent, open_parents
from routers import pairs
from runtime import checkpoint
from settings import ConfigError
from tiny import batch_of, model_of

DENSE = {"ffn.d_ff": 16, "ffn.activation": "gelu"}
FROZEN = "--lifelong.freeze=" + bar.SHARED


class Same:
    name = fingerprint = "same"


def parent(model, name="runs/x"):
    header = dict(ancestry=dict(kind="train", start="same", parents=[]))
    return Parent(name, model, model.config, Same(), header)


def branches(n=3, base_seed=0, change=True):
    """(the base model, n Parents): branches whose second experts have learned something."""
    base = model_of("dense", DENSE, base_seed).eval()
    made = []
    for j in range(n):
        _, model = bar.branch(parent(base), [], seed=j)
        with torch.no_grad():
            for block in model.blocks if change else ():
                for p in block.ffn.experts.parameters():
                    drawn = torch.Generator().manual_seed(j)
                    p[1] += 0.3 * torch.randn(p[1].shape, generator=drawn)
        made.append(parent(model, f"runs/{j}"))
    return base, made


def fixed(model, expert):
    """The model with every token at one expert of each layer, gate 1."""
    for block in model.blocks:
        block.ffn.router.forward = lambda x, ctx, E=block.ffn.n_expert: pairs(
            torch.full((len(x), 1), expert), torch.ones(len(x), 1),
            probs=torch.full((len(x), E), 1 / E))
    return model


# --- identities ---


def test_a_branch_starts_as_the_base_model():
    base, (one, *_) = branches(1, change=False)
    idx, _, _ = batch_of()
    torch.testing.assert_close(one.model(idx).logits, base(idx).logits)
    ffn = one.config.ffn
    assert (ffn.n_frozen, ffn.frozen_routes, ffn.balance, ffn.top_k) == (1, False, "none", 2)


def test_at_the_anchor_every_mixture_is_the_base_model_to_the_last_bit():
    base, made = branches()
    _, joined = bar.join(made, [])
    # the base model by the same products as an expert
    _, twin = bar.branch(parent(base), [])
    idx, _, _ = batch_of()
    want = fixed(twin, 0)(idx).logits
    torch.testing.assert_close(want, base(idx).logits)
    for model in (made[0].model, made[2].model, joined):
        assert not torch.allclose(model(idx).logits, want)
        assert torch.equal(fixed(model, 0)(idx).logits, want)


def test_at_another_expert_it_is_what_that_branch_learned():
    _, made = branches()
    _, joined = bar.join(made, [])
    idx, _, _ = batch_of()
    assert joined.config.ffn.n_expert == joined.config.ffn.n_frozen == 4
    for j, one in enumerate(made):
        assert torch.equal(fixed(joined, j + 1)(idx).logits, fixed(one.model, 1)(idx).logits)


def test_one_branch_joined_is_that_branch():
    """With its router's rows."""
    _, (one,) = branches(1)
    _, joined = bar.join([one], [])
    for ours, theirs in zip(joined.blocks, one.model.blocks):
        ours.ffn.router.load_state_dict(theirs.ffn.router.state_dict())
    idx, _, _ = batch_of()
    assert torch.equal(joined(idx).logits, one.model(idx).logits)


def test_what_diverged_is_averaged():
    base, made = branches(2)
    with torch.no_grad():
        made[1].model.embedding.weight += 1
    _, joined = bar.join(made, [])
    torch.testing.assert_close(joined.embedding.weight, base.embedding.weight + 0.5)
    assert torch.equal(joined.norm.weight, base.norm.weight)


def test_a_replaced_expert_leaves_the_others():
    _, made = branches(4)
    (_, one), (_, other) = bar.join(made[:3], []), bar.join([*made[:2], made[3]], [])
    for ours, theirs in zip(one.blocks, other.blocks):
        for a, b in zip(ours.ffn.experts.parameters(), theirs.ffn.experts.parameters()):
            assert [torch.equal(x, y) for x, y in zip(a, b)] == [True, True, True, False]


# --- what is refused ---


def test_only_branches_of_one_anchor_are_joined():
    base, made = branches(2)
    with pytest.raises(ConfigError, match="runs/x is no branch with an anchor"):
        bar.join([made[0], parent(base)], [])
    with pytest.raises(ConfigError, match="runs/0 has another anchor than runs/1 in layer 0"):
        bar.join([made[1], branches(1, base_seed=1)[1][0]], [])
    with pytest.raises(ConfigError, match="--ffn.n_frozen cannot be chosen here"):
        bar.branch(parent(base), [("ffn.n_frozen", "0")])
    with pytest.raises(ConfigError, match="only a dense model"):
        bar.branch(made[0], [])
    with pytest.raises(ConfigError, match="--ffn.n_expert cannot be chosen here"):
        bar.join(made, [("ffn.n_expert", "9")])


# --- the programs ---


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base model and two trained branches, one of which learned answers and its embedding."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "empty.toml").write_text("")
    (folder / "one.txt").write_text("".join(f"def f{i}(x): return x + {i}\n" for i in range(200)))
    (folder / "two.txt").write_text("".join(f"Q: {i} + 1?\nA: {i + 1}\n\n" for i in range(400)))
    prepare([str(folder / f"{name}.txt") for name in ("one", "two")], out=folder / "prepared",
            quiet=True)
    trained(folder, "base", ["--model.n_layer=2", "--model.n_head=2", "--model.n_embd=16",
                             "--model.block_size=16", "--ffn.kind=dense", "--ffn.d_ff=16"])
    answers = ["--lifelong.freeze=*norm*,*attention*", "--data.answers_only=true"]
    for name, more in (("one", [FROZEN]), ("two", answers)):
        made(["branch", folder / "base", "--out", folder / f"{name}-start"])
        trained(folder, name, [f"--train.init_from={folder / name}-start", f"--data.name={name}",
                               *more])
    return folder


def made(words):
    assert bar.main([str(word) for word in words]) == 0


def trained(home, out, more):
    keys = {"data.name": "one,two", "data.dir": home / "prepared", "train.batch_size": 4,
            "train.max_steps": 4, "train.warmup_steps": 1, "train.lr": 0.02, "train.eval_every": 0,
            "train.eval_batches": 2, "train.sample_tokens": 0, "train.device": "cpu"}
    words = [home / "empty.toml", "--out", home / out, "--quiet",
             *(f"--{key}={value}" for key, value in keys.items()), *more]
    assert train.main(list(map(str, words))) == 0


def changed(before, after):
    """Names of the tensors of two checkpoints that differ; of experts with the rows that do."""
    found = set()
    for name, a in checkpoint.load_plain(before).model.items():
        b = checkpoint.load(after / checkpoint.LAST).model[name]
        rows = range(len(a)) if ".experts." in name else [...]
        found |= {name.split(".ffn.")[-1] + (f" {e}" if ".experts." in name else "")
                  for e in rows if not torch.equal(a[e], b[e])}
    return found


EXPERT = {"experts.w_in 1", "experts.w_out 1", "router.score.weight"}


def test_a_branch_learns_its_expert_and_its_router_alone(home):
    assert changed(home / "one-start", home / "one") == EXPERT
    assert {"embedding.weight"} <= changed(home / "two-start", home / "two") - EXPERT <= {
        "embedding.weight", "head.weight"}


def test_a_joined_mixture_learns_its_router_alone(home, capsys):
    made(["join", home / "one", home / "two", "--out", home / "joined"])
    said = capsys.readouterr().out
    assert "3 experts, 2 a token" in said and f"--lifelong.freeze '{bar.SHARED}'" in said
    trained(home, "bar", [f"--train.init_from={home / 'joined'}", FROZEN])
    assert changed(home / "joined", home / "bar") == {"router.score.weight"}
    ancestry = checkpoint.load_plain(home / "bar").header["ancestry"]
    assert [p["kind"] for p in ancestry["parents"]] == ["join"]
    # the second expert of each branch, behind the anchor
    joined, (one, two) = (open_parents([home / name for name in names])
                          for names in (["bar"], ["one", "two"]))
    for i, block in enumerate(joined[0].model.blocks):
        for name in ("w_in", "w_out"):
            rows = [getattr(p.model.blocks[i].ffn.experts, name) for p in (one, two)]
            assert torch.equal(getattr(block.ffn.experts, name),
                               torch.stack([rows[0][0], rows[0][1], rows[1][1]]))


@pytest.mark.parametrize("words, status, said", [
    ([], 2, "COMMAND"), (["graft"], 2, "graft"), (["branch", "base"], 2, "--out"),
    (["branch", "nowhere", "--out", "x"], 1, "nowhere"),
    (["branch", "one", "--out", "x"], 2, "only a dense model"),
    (["join", "one", "base", "--out", "x"], 2, "no branch with an anchor"),
    (["join", "one", "two", "--top_k", "0", "--out", "x"], 2, "--top_k 0"),
    (["join", "one", "two", "--top_k", "4", "--out", "x"], 2, "ffn.top_k = 4"),
    (["join", "one", "two", "--out", "one"], 2, "one")])
def test_bad_input_is_refused_in_one_line(home, monkeypatch, capsys, words, status, said):
    monkeypatch.chdir(home)
    try:
        found = bar.main(words)
    except SystemExit as end:                           # argparse
        found = end.code
    error = capsys.readouterr().err
    assert found == status and said in error
    assert not words or error.count("\n") == 1


def test_help(capsys):
    for words in (["--help"], ["branch", "--help"], ["join", "--help"]):
        with pytest.raises(SystemExit) as ended:
            bar.main(words)
        assert ended.value.code == 0
    assert "the anchor" in capsys.readouterr().out
