"""The routing of published models: its measures against counting by hand, and the experiment on two small random
models of other families. Skips where transformers or safetensors is missing."""
import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

import test_hub
from lab import experiment
from lab.papers import jobs, published
from lab.papers.by_layer import by_layer, choices, favourite, of_layer, repeated
from lab.papers.tables import read_table
from model import load_model

pytest.importorskip("transformers", reason="needs transformers")
ROOT = Path(__file__).parent.parent
FILE = ROOT / "configs/papers/real_routing.toml"
FAMILIES = {"OLMoE-1B-7B-0924": "olmoe", "Qwen1.5-MoE-A2.7B": "qwen2_moe"}
SMALLER = " --corpora words.txt sums.txt --windows 4 --context 32"


# ---- measures

@st.composite
def chosen_experts(draw):
    """(S, T, n) with n different experts of E for each token, and E."""
    n, E = draw(st.integers(1, 2)), draw(st.integers(2, 5))
    S, T = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    rows = draw(st.lists(st.permutations(range(E)), min_size=S * T, max_size=S * T))
    return torch.tensor(rows)[:, :n].view(S, T, n), E


@settings(max_examples=60, deadline=None)
@given(chosen_experts())
def test_repeats_and_their_chance_are_counts_of_pairs(given_):
    chosen, E = given_
    share, chance = repeated(chosen, E)
    rows = [[set(token) for token in row] for row in chosen.tolist()]
    near = [bool(a & b) for row in rows for a, b in zip(row, row[1:])]
    every = [token for row in rows for token in row]
    assert share == pytest.approx(sum(near) / len(near))
    assert chance == pytest.approx(sum(bool(a & b) for a in every for b in every) / len(every) ** 2)


def test_chance_is_what_independent_choices_give():
    """Of 8 experts 2 at random: 1/8 for the first, 1 - 6/8 5/7 for one of the two, as in Mixtral's table 5."""
    draw = torch.Generator().manual_seed(0)
    chosen = torch.rand(40, 500, 8, generator=draw).argsort(-1)[..., :2]
    for n, expected in (1, 1 / 8), (2, 1 - 6 / 8 * 5 / 7):
        for value in repeated(chosen[..., :n], 8):
            assert value == pytest.approx(expected, abs=0.012)
    tokens, labels = torch.randint(9, (40, 500), generator=draw), torch.arange(40) % 2
    for name, (value, chance) in of_layer(tokens, labels, chosen, 8):
        assert value == pytest.approx(chance, abs=0.012), name


def test_what_experts_go_by_is_told_apart():
    """A layer that goes by the token, one that goes by the corpus, one that goes by blocks of neighbours."""
    draw = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(8, (20, 64), generator=draw), torch.arange(20) % 2
    go_by = dict(token=tokens // 2, corpus=labels.view(-1, 1) * 2 + tokens * 0,
                 neighbour=torch.randint(4, (20, 16), generator=draw).repeat_interleave(4, 1))
    found = {way: {name: value - chance for name, (value, chance) in of_layer(tokens, labels, expert.unsqueeze(-1), 4)}
             for way, expert in go_by.items()}
    assert found["token"]["favourite"] > 0.5 > 0.1 > found["neighbour"]["favourite"]
    assert found["corpus"]["domain"] > math.log(2) / 2 > 0.02 > found["token"]["domain"]
    assert found["neighbour"]["repeat"] > 0.5 > 0.1 > abs(found["token"]["repeat"])
    # within a corpus all is one expert, so that chance explains it
    assert found["corpus"]["repeat"] == 0
    # kinds that are rare have no favourite: 8 of the first, 7 of the second, which would be 1
    rare = torch.tensor([0] * 8 + [1] * 7)
    assert favourite(rare, torch.tensor([2] * 6 + [0] * 2 + [1] * 7), 3) == 6 / 8
    assert favourite(rare[1:], rare[1:], 3) is None


# ---- the experiment

@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to run in: two small models with a tokenizer, two texts, the experiment on them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(test_hub.SMALL, "vocab_size", 500)
    tokenizer = json.dumps(test_hub.their_tokenizer("gpt2")[1])
    for folder, family in FAMILIES.items():
        at = tmp_path / "data/downloads" / folder
        at.parent.mkdir(parents=True, exist_ok=True)
        test_hub.save_theirs(test_hub.their_model(family), at, family)
        (at / "tokenizer.json").write_text(tokenizer)
    (tmp_path / "words.txt").write_text("".join(f"the thing thinks then {i * i}\n" for i in range(2000)))
    (tmp_path / "sums.txt").write_text("".join(f"{i} + {7 * i} = {8 * i}\n" for i in range(2000)))
    text = re.sub(r" --corpora [^\"]*", SMALLER, FILE.read_text())
    (tmp_path / "small.toml").write_text(text)
    return tmp_path


def main(*words, status=0):
    assert experiment.main([str(word) for word in words]) == status


def test_the_experiment_on_two_small_models(here, capsys, monkeypatch):
    def start(job, stage, words):                       # in this process, for the sake of time
        assert words[:2] == ["-m", "lab.papers.published"]
        status, job.stage = published.main(words[2:]), stage
        job.process = SimpleNamespace(poll=lambda: status)

    monkeypatch.setattr(jobs.Job, "start", start)
    main("small.toml", "--quiet")
    out = here / "results/small/cpu"
    rows = {(row["arm"], row["seed"]): row for row in read_table(out / "runs.csv")}
    assert list(rows) == [(arm, part) for part in range(3) for arm in ("olmoe", "qwen")]
    # every claim has its numbers
    verdict = (out / "verdict.md").read_text()
    claims = re.findall(r"^\| (\w[\w-]*) \| .* \| \*\*(.*)\*\* \|", verdict, re.MULTILINE)
    assert [name for name, _ in claims] == ["R1", "R1-two", "R2", "D1", "D2", "D3", "V1"]
    assert not any("not measured" in words for _, words in claims), claims
    assert (out / "figure.png").read_bytes()[1:4] == b"PNG"
    # the parts are of one model and of three texts
    assert len({row["val_loss_sums.txt"] for row in rows.values()}) == 6
    assert rows["olmoe", 0]["total_params"] == rows["olmoe", 2]["total_params"]
    assert {"words", "sums"} == {name.partition("-")[0] for name in names(here / "runs/small/cpu/OLMoE-1B-7B-0924/text")}
    # routing.csv: both layers of OLMoE, the one sparse layer of Qwen2-MoE here
    routes = read_table(out / "routing.csv")
    assert {(row["arm"], row["layer"]) for row in routes} == {("olmoe", 0), ("olmoe", 1), ("qwen", 1)}
    # the models were made into runs once, and nothing runs again
    main("small.toml")
    assert "nothing to run" in capsys.readouterr().out


def names(folder):
    return [path.name for path in folder.iterdir() if path.is_dir()]


def test_choices_are_those_of_transformers(here):
    """The experts of each token, the first one first, and the columns that come from them."""
    folder = "data/downloads/OLMoE-1B-7B-0924"
    published.import_once(here / folder, here / "run", "", 32)
    model, config, _, _ = load_model(here / "run")
    ids = torch.randint(400, (4, 32), generator=torch.Generator().manual_seed(0))
    batches = [(x, x, torch.zeros(2, dtype=torch.long), 0, name) for x, name in zip(ids.split(2), ("one", "two"))]
    tokens, labels, found = choices(model, batches, {0, 1}, torch.device("cpu"), "float32")
    assert torch.equal(tokens, ids) and labels.tolist() == [0, 0, 1, 1]
    theirs = test_hub.their_model("olmoe")
    logits = theirs(ids, output_router_logits=True).router_logits
    for layer in (0, 1):
        assert torch.equal(found[layer], logits[layer].topk(3).indices.view(4, 32, 3))
    row = by_layer(model, batches, config, torch.device("cpu"), "float32")
    assert {name.rpartition("_")[2] for name in row} == {"first", "middle", "last"}
    expected = repeated(found[1][:2, :, :1], 4)[0] / 2 + repeated(found[1][2:, :, :1], 4)[0] / 2
    assert row["repeat_last"] == pytest.approx(expected)


def test_what_cannot_be_asked_is_one_line(here, capsys):
    def fails(*words, status=2):
        assert published.main([str(word) for word in ("data/downloads/OLMoE-1B-7B-0924", "--out", "runs/x", *words)]) == status
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1
        return text

    folder = here / "data/downloads/OLMoE-1B-7B-0924"
    assert published.main([str(folder), "--out", "runs/x", *SMALLER.split()]) == 0
    assert json.loads((here / "runs/x/evaluation.json").read_text())["repeat_first"] > 0
    capsys.readouterr()
    assert "choose one of 0 to 2" in fails("--part", 3)
    assert "too short for 900 parts" in fails(*SMALLER.split(), "--parts", 900)
    assert "context of 32; remove it" in fails("--context", 16)
    # a run that is there serves without its folder; without both nothing does
    shutil.rmtree(here / "runs")
    folder.rename(here / "away")
    assert "there is no such folder; download a/b into it" in fails("--model", "a/b")
    (here / "away").rename(folder)
    # token ids alone, as of Mixtral; no experts
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["byte_fallback"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "cannot be asked about text" in (text := fails()) and "byte_fallback" in text
    shutil.rmtree(folder)
    test_hub.save_theirs(test_hub.their_model("llama"), folder, "llama")
    assert "has no experts" in fails()
    assert not list((here / "runs").glob("*/ckpt*"))


def test_the_experiment_says_what_to_download(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(FILE, "--only", "qwen", "--seeds", 1, status=1)
    assert "download Qwen/Qwen1.5-MoE-A2.7B into it" in capsys.readouterr().err
    assert not list(tmp_path.glob("results/**/verdict.md"))
