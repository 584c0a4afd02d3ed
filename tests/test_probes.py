"""Measurements of lab/papers/probes.py."""
import ast
import math
from itertools import islice
from pathlib import Path

import pytest
import torch

from data.corpora.arithmetic import as_text, problems, prompt
from data.tokenizers import Tokenizer
from lab.papers import probes
from lab.papers.evaluate import goes_by_corpus
from routers import ROUTERS, pairs
from sample import Step
from tiny import batch_of, config_of, model_of

T, NEW = 96, 36             # block, and the tokens of it that an answer may take


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the corpus math is prepared, in small."""
    from data.prepare import prepare
    place = tmp_path_factory.mktemp("prepared")
    prepare(["math"], out=place, max_tokens=2000, quiet=True)
    return place


def math_right(folder, monkeypatch, answer, block=T):
    """math_right of a model that continues every prompt, given as text, with answer(i, prompt), cut
    to length."""
    model = model_of("dense", {"model.block_size": block, "model.vocab_size": 256,
                               "data.dir": str(folder)}).eval()
    seen = []

    def generate(model, ids, tokens, temperature):
        assert temperature == 0 and ids.shape[1] + tokens == block
        seen.extend(map(Tokenizer.byte().decode, ids.tolist()))
        texts = [answer(i, text).encode().ljust(tokens)[:tokens] for i, text in enumerate(seen)]
        yield from (Step(torch.tensor(column), []) for column in zip(*texts))

    monkeypatch.setattr(probes, "generate", generate)
    return probes.math_right(model, [], model.config, torch.device("cpu"),
                             "float32").get("math_right"), seen


def test_math_right_counts_the_answers_that_are_right(folder, monkeypatch):
    worked = {prompt(p[0]): as_text(*p)[len(prompt(p[0])):]
              for p in islice(problems(2, "val"), 4000)}

    def right(i, text):
        return worked[text[text.rindex("Q: "):]]            # asked whole, and last

    assert math_right(folder, monkeypatch, right)[0] == 1
    assert math_right(folder, monkeypatch, lambda i, text: right(i, text) if i % 4
                      else "no idea")[0] == 0.75
    assert math_right(folder, monkeypatch, lambda i,
                      text: right(i, text).replace("#### ", "#### 1"))[0] == 0
    # an answer to a question of its own
    late = "no idea\nQ: What is 1 + 1?\nA: 1 + 1 = 2\n#### 2"
    assert math_right(folder, monkeypatch, lambda i, text: late)[0] == 0


def test_math_right_asks_after_worked_problems_and_only_what_fits(folder, monkeypatch):
    _, asked = math_right(folder, monkeypatch, lambda i, text: "")
    assert len(set(asked)) > 150 and all(len(text) == T - NEW for text in asked)
    # the problem before a short question
    assert any("\n#### " in text for text in asked)
    assert math_right(folder, monkeypatch, lambda i, text: "", block=20) == (None, [])


def test_math_right_of_an_untrained_model_is_nothing(folder):
    model = model_of("topk", {"model.block_size": T, "model.vocab_size": 256,
                              "data.dir": str(folder)}).eval()
    assert probes.math_right(model, [], model.config, torch.device("cpu"),
                             "float32") == {"math_right": 0.0}


# --- who is asked ---

LAB = Path(__file__).parent.parent / "lab"
BUILDS = {"bench.py", "gpu_models.py", "moe.py", "peer.py", "ptx.py"}      # what they time, they name


def test_the_lab_asks_for_no_kind_and_names_no_router():
    """A layer or a router that it has never heard of must be as good as any other."""
    names = set(ROUTERS) - {"soft", "base", "hash", "domain", "switch", "gshard"}
    for path in LAB.rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        asked = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Compare)
                 and any(isinstance(side, ast.Attribute) and side.attr in ("kind", "router")
                         and ast.unparse(side.value).endswith("ffn")
                         for side in (node.left, *node.comparators))]
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not asked, (path, asked)
        assert path.name in BUILDS or not texts & names, (path, texts & names)


# these are in test_btx_open.py and test_mamba.py
OTHERS = ("inside", "chance", "whole_sequence", "answers", "recall")


@pytest.mark.parametrize("kind", ["dense", "peer", "pkm", "hash", "topk"])
@pytest.mark.parametrize("name", sorted(set(probes.PROBES) - {"math_right", *OTHERS}))
def test_every_probe_takes_every_kind(name, kind):
    row = measured(probes.PROBES[name], model_of(kind))
    assert all(math.isfinite(value) for value in row.values())
    assert (row == {}) == (kind in ("dense", "peer", "pkm") or name == "groups"
                           or kind == "hash" and name in ("logits", "surgery"))


def test_only_a_layer_that_goes_by_the_corpus_refuses_another():
    assert goes_by_corpus(config_of("domain"))
    assert not any(goes_by_corpus(config_of(kind)) for kind in ("dense", "peer", "topk", "hash"))


CPU = torch.device("cpu")


def measured(probe, model, T=8):
    batches = [(*batch_of(T=T, seed=seed), 0, "a") for seed in (1, 2)]
    return probe(model.eval(), batches, model.config, CPU, "float32")


def force(model, layer, expert):
    """Makes a layer's router send every token to this expert first."""
    router = model.blocks[layer].ffn.router

    def choose(x, ctx):
        best = expert(ctx.token_ids) if callable(expert) else torch.full((len(x),), expert)
        probs = torch.full((len(x), router.n_expert), 1 / router.n_expert)
        return pairs(best.view(-1, 1), torch.ones(len(x), 1), probs=probs)

    router.forward = choose


def test_repeats_of_known_choices():
    """Expert by the token's id: neighbours meet as their tokens do; all to one expert: chance is
    1."""
    model = model_of("switch")
    force(model, 0, lambda ids: ids % 4)
    force(model, 1, 2)
    row = measured(probes.repeats, model, T=12)
    x = torch.cat([batch_of(T=12, seed=seed)[0] for seed in (1, 2)])
    expert, differ = x % 4, x[:, 1:] != x[:, :-1]
    same = expert[:, 1:] == expert[:, :-1]
    share = torch.bincount(expert.flatten(), minlength=4) / x.numel()
    # every pair of independent tokens
    one, other = x.flatten().view(-1, 1), x.flatten().view(1, -1)
    chance = ((one % 4 == other % 4) & (one != other)).sum() / (one != other).sum()
    rate = same.float().mean()
    want = dict(repeat_first=rate, repeat_excess_first=rate - (share ** 2).sum(),
                repeat_differ_excess_first=same[differ].float().mean() - chance)
    for name, value in want.items():
        assert row[name] == pytest.approx(value.item(), abs=1e-6), name
    assert row["repeat_last"] == 1 and row["repeat_excess_last"] == pytest.approx(0)
    assert measured(probes.repeats, model_of("dense")) == {}


SOFTMAX = {"ffn.gate_order": "softmax_then_topk"}


def mean_loss(model):
    return sum(model.eval()(*batch_of(T=8, seed=seed)[:2]).loss.item() for seed in (1, 2)) / 2


def test_surgery_takes_experts_away_and_puts_them_back():
    model = model_of("topk", SOFTMAX | {"ffn.n_shared": 1})
    before = mean_loss(model)
    row = measured(probes.surgery, model)
    assert mean_loss(model) == before
    # no shared expert, one more routed
    twin = model_of("topk", SOFTMAX | {"ffn.top_k": 3})
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if ".shared." not in k})
    assert row["rise_without_shared"] == pytest.approx(mean_loss(twin) - before)
    assert "rise_without_shared" not in measured(probes.surgery, model_of("topk"))
    assert measured(probes.surgery, model_of("dense")) == {}


def test_surgery_of_one_of_two_experts_leaves_the_other():
    two = SOFTMAX | {"ffn.n_expert": 2, "ffn.top_k": 1}
    model, only = model_of("topk", two), [model_of("topk", two) for _ in range(2)]
    for expert, twin in enumerate(only):
        for layer in range(2):
            force(twin, layer, expert)
    rise = sum(map(mean_loss, only)) / 2 - mean_loss(model)
    assert measured(probes.surgery, model)["rise_without_routed"] == pytest.approx(rise, abs=1e-5)


def test_overflow_is_what_passes_the_room_of_an_expert():
    model = model_of("switch")
    # 24 tokens of a batch, room for 8
    force(model, 0, 1)
    force(model, 1, lambda ids: torch.arange(ids.numel()) % 4)
    assert measured(probes.overflow, model)["overflow"] == pytest.approx((16 / 24 + 0) / 2)


@pytest.mark.parametrize("allowed", [1, 2, 4])
def test_groups_counts_the_groups_of_a_token(allowed):
    model = model_of("topk", {"ffn.n_expert": 8, "ffn.n_groups": 4, "ffn.topk_groups": allowed})
    row = measured(probes.groups, model)
    assert row["groups_per_token"] == min(allowed, 2) and row["group_load_cv"] > 0
    assert measured(probes.groups, model_of("topk")) == {}


def test_group_load_cv_of_even_and_of_one_group():
    model = model_of("topk", {"ffn.n_expert": 4, "ffn.top_k": 2, "ffn.n_groups": 2})
    force(model, 0, 3)
    force(model, 1, lambda ids: torch.arange(ids.numel()) % 4)
    assert measured(probes.groups, model)["group_load_cv"] == pytest.approx((1 + 0) / 2)


def test_expert_cosine_of_copies_shuffled_copies_and_strangers():
    model = model_of("topk", {"ffn.d_ff": 64})
    strangers = measured(probes.expert_cosine, model)["expert_cosine"]
    for block in model.blocks:
        experts = block.ffn.experts
        order = torch.randperm(64)
        experts.w_in.data[1] = experts.w_in.data[0].view(2, 64, -1)[:, order].flatten(0, 1)
        experts.w_out.data[1] = experts.w_out.data[0][:, order]
    # two of four experts have a twin
    half = measured(probes.expert_cosine, model)["expert_cosine"]
    assert strangers < 0.7 and half == pytest.approx((1 + strangers) / 2, abs=0.02)
    assert measured(probes.expert_cosine, model_of("dense")) == {}


def test_logits():
    model = model_of("topk")
    for block, size in zip(model.blocks, (2.0, 4.0)):
        block.ffn.router.score.forward = (
            lambda x, z=size: torch.tensor([z, -z, z, 0.0]).repeat(len(x), 1))
    row = measured(probes.logits, model)
    assert row["logit_size"] == pytest.approx(0.75 * 3) and row["logit_max"] == pytest.approx(3)
    sums = [math.log(2 * math.exp(z) + math.exp(-z) + 1) for z in (2, 4)]
    assert row["logit_sum"] == pytest.approx(sum(sums) / 2)
    assert row["logit_spread"] == pytest.approx(3 * math.sqrt(3 / 4 - 1 / 16))
    assert measured(probes.logits, model_of("hash")) == {}
