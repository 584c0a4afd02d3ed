"""The board accepts a run that keeps the rules, and says of each rule which one a run breaks."""
import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

import train
from course import board
from data.prepare import prepare
from ffn import Context
from model import GPT, KINDS, load_config
from runtime.checkpoint import BEST, Lock, save_made
from runtime.files import save
from tiny import config_of

REAL = board.CONFIGS

TINY = {"model.n_layer": 2, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 16, "ffn.d_ff": 16,
        "ffn.n_expert": 4, "train.batch_size": 4, "train.max_steps": 4, "train.warmup_steps": 2,
        "train.eval_batches": 2, "train.sample_tokens": 0, "train.device": "cpu"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text, and the runs that the tests share."""
    folder = tmp_path_factory.mktemp("board")
    words = "".join(f"def f{i}(x):\n    return x + {i * i}  # \u00e9\n" for i in range(400))
    (folder / "text.txt").write_text(words)
    return folder


@pytest.fixture(scope="module")
def rules(place):
    return board.Rules(flops=1e9, corpus=str(place / "text.txt"), dir=str(place / "prepared"))


def run(place, rules, name, **settings):
    """A tiny run in place/name; its folder."""
    keys = TINY | {"data.name": rules.corpus, "data.dir": rules.dir} | {
        k.replace("__", "."): v for k, v in settings.items()}
    (place / "tiny.toml").write_text("")
    out = place / name
    words = [str(place / "tiny.toml"), "--out", str(out), "--quiet", *(f"--{k}={v}" for k, v in keys.items())]
    assert train.main(words) == 0
    return out


@pytest.fixture(scope="module")
def mine(place, rules):
    return run(place, rules, "mine")


@pytest.fixture
def entry(mine):
    """The run, in memory, where a test may break a rule of it."""
    found = board.read(mine)
    return found._replace(header=copy.deepcopy(found.header), config=copy.deepcopy(found.config))


def only(entry, rules):
    """The one sentence that is said of an entry."""
    found, line = board.judge(entry, rules)
    assert len(found) == 1 and line == "", found
    return found[0]


# ---- what is accepted ----

def test_a_run_within_the_rules_gets_its_row(mine, rules, entry, capsys):
    assert board.main([mine], rules) == 0
    head, dashes, row = capsys.readouterr().out.splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | ")))
    assert cells["run"] == "mine" and cells["tokenizer"] == "byte" and cells["seed"] == "0"
    assert cells["layer"] == "moe, router topk, n_expert 4, top_k 2, granularity 1"
    assert cells["tokens"] == str(4 * 4 * 16)
    assert float(cells["TFLOP"]) == pytest.approx(3 * entry.model.flops_per_token() * 256 / 1e12, rel=1e-3)
    params = entry.model.num_params()
    assert cells["parameters"] == f"{params.total:,}" and cells["active"] == f"{params.active:,}"
    assert dashes.count("|") == head.count("|") == row.count("|")
    # the bits, a window after the other and a token after the other
    text = (board.text_folder(rules) / "val.bin").read_bytes()[4096:]
    bits = 0.0
    with torch.no_grad():
        for start in range(0, len(text) - 1, 16):
            window = torch.tensor(list(text[start:start + 17]))
            log_p = entry.model(window[None, :-1]).logits[0].log_softmax(-1)
            bits -= log_p[torch.arange(len(window) - 1), window[1:]].sum().item() / math.log(2)
    assert float(cells["bits a byte"]) == pytest.approx(bits / (len(text) - 1), abs=6e-5)


def test_every_tokenizer_has_the_same_bytes(place, rules, mine):
    bpe = board.read(run(place, rules, "bpe", data__tokenizer="bpe", data__vocab_size=300))
    found, line = board.judge(bpe, rules)
    assert not found and "| bpe300 |" in line
    counted = []
    for one in (bpe, board.read(mine)):
        tokens, _ = board.open_bin(board.text_folder(rules, one.config.data) / "val.bin")
        lengths = one.tokenizer.token_lengths()
        bits, n = board.bits_per_byte(one.model, tokens, lengths)
        counted.append(n + int(lengths[tokens[0]]))
        assert 1 < bits < 9
    assert counted[0] == counted[1]             # beside the first token


def test_the_last_weights_count_not_the_best(place, rules, mine, entry):
    other = place / "best"
    shutil.copytree(mine, other)
    save(other / BEST, entry.header, {name: 0.5 * t for name, t in entry.model.state_dict().items()})
    assert not torch.equal(board.load_model(other)[0].norm.weight, entry.model.norm.weight)
    assert board.judge(board.read(other), rules) == ([], board.judge(entry, rules)[1].replace("mine", "best"))


# ---- one rule broken at a time ----

def test_a_run_that_stopped(entry, rules):
    entry.config.train.max_steps = 99
    assert "stopped after step 4 of 99; go on with `python train.py --out " in only(entry, rules)


def test_a_run_from_other_weights(place, rules, mine, capsys):
    second = run(place, rules, "second", train__init_from=mine)
    assert board.main([second], rules) == 1
    said = capsys.readouterr().out
    assert said == f"{second}: does not start from random weights of its own but from {mine}\n"


def test_a_model_that_was_made(place, rules, entry):
    out = place / "made"
    with Lock(out):
        save_made(out, entry.config, entry.model.state_dict(), entry.tokenizer)
    found, line = board.judge(board.read(out), rules)
    assert not line and any("stopped after step 0" in s for s in found)
    assert any("does not start from random weights of its own but from a model that was made (made)" in s for s in found)


def test_a_run_with_a_teacher(entry, rules):
    entry.config.lifelong.teacher = "runs/large"
    assert only(entry, rules) == "learns from another model, lifelong.teacher = runs/large"


def test_a_run_over_the_budget(entry, rules):
    batch = 3 * entry.model.flops_per_token() * 4 * 16
    assert board.judge(entry, rules._replace(flops=4 * batch))[1]
    said = only(entry, rules._replace(flops=4 * batch - 1))
    assert said.startswith("took ") and said.endswith("of this model and batch at most 3 steps are within")
    # the number of tokens that the header claims is not asked for
    entry.header["tokens"] = 1
    assert only(entry, rules._replace(flops=4 * batch - 1)) == said


def test_other_text(entry, rules):
    data = entry.config.data
    for change, sentence in [
            (dict(name="docs"), "is trained on docs, not on "),
            (dict(name=[rules.corpus, "docs"]), "docs, not on "),
            (dict(tokenizer="gpt2"), "reads with a tokenizer that knows other text, gpt2; take one of byte, char, bpe"),
            (dict(tokenizer="my/tokenizer.json"), "knows other text, my/tokenizer.json"),
            (dict(max_tokens=5000), "reads a part of the text, data.max_tokens = 5000; leave that out")]:
        old = {name: getattr(data, name) for name in change}
        for name, value in change.items():
            setattr(data, name, value)
        assert sentence in only(entry, rules)
        for name, value in old.items():
            setattr(data, name, value)
    assert board.judge(entry, rules)[1]
    entry.header["data"] = ["0" * 64]
    assert "its tokens have the checksum 000000000000, those here " in only(entry, rules)


def test_the_text_of_today_counts(place, rules, entry):
    """A text that changed since the run is another one; the old tokens are kept for the run."""
    other = place / "other"
    shutil.copytree(place / "prepared", other)
    text = place / "text.txt"
    old = text.read_text()
    try:
        text.write_text(old + "print()\n" * 40)
        assert "is trained on other text than the " in only(entry, rules._replace(dir=str(other)))
    finally:
        text.write_text(old)
    assert board.judge(entry, rules)[1]


def probe(kind, **more):
    torch.manual_seed(0)
    model = GPT(config_of(kind, {"model.block_size": 16, "model.vocab_size": 256} | more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    tokens = torch.randint(256, (200,), generator=torch.Generator().manual_seed(1)).byte().numpy()
    return [*board.leaks(model, tokens)]


@pytest.mark.parametrize("kind", ["dense", "topk", "sigmoid", "switch", "hash", "sinkhorn", "peer", "pkm"])
def test_what_reads_from_left_to_right_passes(kind):
    assert probe(kind) == []


def test_what_looks_at_neighbours_is_refused():
    for found in (probe("expert_choice"), probe("topk", **{"ffn.eval_capacity_factor": 0.5})):
        assert len(found) == 1 and found[0].startswith("another sequence of the batch changes what it predicts")


def test_what_looks_ahead_is_refused(monkeypatch):
    def everything(self, x, ctx: Context):
        y, stats = forward(self, x, ctx)
        return y + x.mean(1, keepdim=True), stats
    forward = KINDS["dense"].forward
    monkeypatch.setattr(KINDS["dense"], "forward", everything)
    found = probe("dense")
    assert len(found) == 1 and found[0].startswith("a later token changes what it predicts, a logit by up to")


def test_what_is_no_run(tmp_path, mine, rules, capsys):
    assert board.main([tmp_path], rules) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "is no run folder; `python train.py CONFIG.toml --out" in said
    assert board.main([], rules) == board.main([mine, "--baselines"], rules) == 2


# ---- the baselines ----

def test_each_kind_has_a_baseline_that_uses_the_budget():
    assert {path.stem for path in board.CONFIGS.glob("*.toml")} == set(KINDS)
    for kind in KINDS:
        config = load_config(board.CONFIGS / f"{kind}.toml", {"model.vocab_size": 256})
        assert config.ffn.kind == kind and config.data.names == ["python"]
        with torch.device("meta"):
            model = GPT(config)
        assert config.train.max_steps == board.steps_within(board.Rules(), model, config)
    # the example of the page
    config = load_config(board.CONFIGS / "moe.toml", {"model.vocab_size": 256, "ffn.n_expert": 16})
    with torch.device("meta"):
        steps = board.steps_within(board.Rules(), GPT(config), config)
    assert f"--ffn.n_expert 16 --train.max_steps {steps}\n" in board.PAGE.read_text("utf-8")


def test_the_baselines_fill_the_page_and_go_on(place, rules, tmp_path, monkeypatch, capsys):
    # the layers of the real configs in a smaller model
    monkeypatch.setattr(train, "sample_of", lambda trainer: "")
    monkeypatch.setattr(board, "CONFIGS", tmp_path / "configs")
    (tmp_path / "configs").mkdir()
    for kind in KINDS:
        text = (REAL / f"{kind}.toml").read_text("utf-8")
        for a, b in (("n_layer = 4", "n_layer = 2"), ("n_embd = 128", "n_embd = 16"), ("n_keys = 128", "n_keys = 8"),
                     ("block_size = 128", "block_size = 16"), ("d_dense = 512", "d_dense = 16")):
            text = text.replace(a, b)
        (tmp_path / "configs" / f"{kind}.toml").write_text(text)
    page, tiny = tmp_path / "board.md", rules._replace(flops=1e9)
    page.write_text(board.PAGE.read_text("utf-8"), "utf-8")
    assert board.baselines(tiny, tmp_path / "runs", page) == 0
    rows = [text for text in page.read_text("utf-8").splitlines() if text.startswith("| ")][1:]
    assert {row.split(" | ")[1] for row in rows} == set(KINDS) and rows == sorted(rows)
    head, tail = board.PAGE.read_text("utf-8").split(board.BEGIN)
    assert page.read_text("utf-8").startswith(head)
    assert page.read_text("utf-8").endswith(tail.split(board.END)[1])
    # a second call trains what is missing alone, and the table is the same but for the time
    trained, real = [], train.main
    monkeypatch.setattr(train, "main", lambda words: trained.append(words[0]) or real(words))
    shutil.rmtree(tmp_path / "runs" / "pkm")
    assert board.baselines(tiny, tmp_path / "runs", page) == 0
    assert trained == [str(board.CONFIGS / "pkm.toml")]
    again = [text for text in page.read_text("utf-8").splitlines() if text.startswith("| ")][1:]
    assert [row.split(" | ")[:3] for row in again] == [row.split(" | ")[:3] for row in rows]


def test_bits_are_those_of_the_loss():
    """A model that knows nothing costs log2 V bits a token."""
    class Uniform(torch.nn.Module):
        config = config_of("dense")

        def forward(self, x, y):
            logits = torch.zeros(*x.shape, 32)
            return type("Out", (), dict(loss=F.cross_entropy(logits.flatten(0, 1), y.flatten())))
    tokens = torch.randint(32, (1000,)).byte().numpy()
    bits, n = board.bits_per_byte(Uniform(), tokens, torch.full((32,), 2).numpy())
    assert n == 2 * 999 and bits == pytest.approx(2.5)


def test_preparing_is_not_repeated(rules):
    assert prepare([rules.corpus], out=rules.dir, quiet=True)[0] == board.text_folder(rules)
