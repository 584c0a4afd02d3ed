"""What the README says: its words, its tables, its commands, and its recipes for changing something."""
import csv
import importlib
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import TINY, corpora  # noqa: F401 (a fixture)
from torch import nn

import balance
import ffn
import model as models
import routers
import sample
import train
from data import prepare
from data.corpora import sources
from data.corpora.corpus import Corpus
from grow import bar, btx, clusters, lifelong, outer
from lab import experiment, page, plots, scaling
from lab.drawing.routers import router_table
from runtime import report
from runtime.checkpoint import load
from settings import Config, ConfigError, FFNConfig, ModelConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(zip(("by hand", "router", "kind"), re.findall(r"```python\n(.*?)```", README, re.DOTALL)))


def test_it_is_short_and_its_tables_are_true():
    assert len(README.split()) <= 1500
    assert router_table() in README
    equations = (ROOT / "course/equations.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \| (`[\w.]+`(?:, `[\w.]+`)*) \|$", equations, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([\w.]+\.[\w.]+)`", row)]
    assert len(names) > 20
    for name in names:
        room, _, function = name.rpartition(".")
        assert callable(getattr(importlib.import_module(room), function)), name
    for path in re.findall(r"\]\(([\w/.]+)\)", README) + re.findall(r"`([\w/]+\.(?:py|toml))`", README):
        assert (ROOT / path).exists(), path


# ---- its commands

PROGRAMS = {"train.py": train.main, "sample.py": sample.main, "lab.plots": plots.main, "data.prepare": prepare.main,
            "lab.page": page.main, "grow.bar": bar.main, "grow.btx": btx.main, "grow.clusters": clusters.main, "grow.outer": outer.main,
            "grow.lifelong": lifelong.main, "lab.experiment": experiment.main, "lab.scaling": scaling.main}
ELSEWHERE = {"minimal.py", "venv", "pytest", "course.tour", "course.check"}       # run by other tests, or by whoever reads this


def commands():
    """[(program, its words)] of the README's indented lines."""
    for line in re.findall(r"^    (.+)$", README, re.MULTILINE):
        for part in line.split("  #")[0].split("&&"):
            if part.split()[:1] not in (["python"], ["torchrun"]):
                continue                                    # a line of output
            words = shlex.split(part)
            if words[:1] == ["torchrun"]:
                words = ["python", *[word for word in words[1:] if not word.startswith("--standalone")
                                     and not word.startswith("--nproc")]]
            if words[:1] == ["python"]:
                module = words[2] if words[1] == "-m" else words[1]
                yield module, words[3 if words[1] == "-m" else 2:]


def test_every_command_runs(tmp_path, monkeypatch, corpora):                    # noqa: F811
    """In the order in which they stand, with small sizes added."""
    small = [f"--{key}={value}" for key, value in TINY.items() if not key.startswith("ffn.")]
    small += ["--train.max_steps=1", "--ffn.d_ff=16", "--data.name=one", f"--data.dir={corpora / 'prepared'}", "--quiet"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "results").symlink_to(ROOT / "results")
    (tmp_path / "my.txt").write_text("a text of many words, some of them often\n" * 1500)
    for name, more in (("dense", []), ("quick", []), ("seed", [])):
        config = "configs/dense.toml" if name != "quick" else "configs/quick.toml"
        assert train.main([config, "--out", f"runs/{name}", *small, *more]) == 0
    for name in "ab":
        assert train.main(["configs/continue.toml", "--out", f"runs/{name}", "--train.init_from", "runs/seed",
                           *[word for word in small if not word.startswith(("--model", "--ffn"))]]) == 0
    seen = 0
    for module, words in commands():
        if module in ELSEWHERE or module == "train.py" and not words:
            continue
        if module == "grow.outer":
            words = [*words, *small, "--every=1"]
        if module == "grow.clusters":
            words = [*words, "--out", "clustered", "--quiet"]
        if module == "train.py":
            words = [*words, *(small[-4:-3] + ["--train.max_steps=2", "--quiet"] if "--resume" in words else small)]
        if module == "lab.page":
            words = [*words, "--prompt", "def f(x):"]
        if module == "sample.py":
            words = [*words, "--tokens", "5"]
        if module == "data.prepare":
            words = [*words, "--out", "prepared", "--vocab_size", "257", "--quiet"]
        words = [word for word in words if not word.startswith("--ffn.d_ff") or "--resume" not in words]
        assert PROGRAMS[module](words) == 0, (module, words)
        seen += 1
    assert seen >= 10


# ---- its recipes

def run_block(name, **names):
    """The names that a block of the README defines."""
    space = dict(torch=torch, nn=nn, **names)
    exec(compile(BLOCKS[name], f"README: {name}", "exec"), space)               # noqa: S102
    return space


def tokens(B=4, T=16, V=256):
    text = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(0))
    return text[:, :-1], text[:, 1:]


def small_config(**more):
    return Config(ModelConfig(n_layer=2, n_embd=32, n_head=2, block_size=16, vocab_size=256), FFNConfig(**more))


def fitted(model):
    """Trains by hand for 20 steps on one batch; the losses."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for step in range(20):
        out = model(*tokens(), step=step)
        optimizer.zero_grad()
        (out.loss + out.aux_loss).backward()
        optimizer.step()
        model.after_step([s.load for s in out.stats])
        losses.append(out.loss.item())
    return losses


def command(tmp_path, corpora, *more):                                                      # noqa: F811
    """train.py with a tiny model of what the test has added."""
    settings = TINY | {"data.name": "one", "data.dir": corpora / "prepared"}
    return ["--out", str(tmp_path / "run"), "--quiet", *(f"--{k}={v}" for k, v in settings.items()), *more]


def everything(tmp_path, corpora, *more):                                                   # noqa: F811
    """Trains, resumes, samples and plots a run through the programs."""
    run = str(tmp_path / "run")
    assert train.main(command(tmp_path, corpora, *more)) == 0
    assert train.main(["--out", run, "--resume", "--quiet", "--train.max_steps", "8"]) == 0
    assert sample.main([run, "--tokens", "5", "--show_experts"]) == 0
    assert plots.main([run]) == 0
    return tmp_path / "run"


def test_a_model_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    idx, targets = tokens()
    space = run_block("by hand", idx=idx, targets=targets)
    assert space["experts"].shape == space["gates"].shape == (64, 2)
    torch.testing.assert_close(space["gates"].sum(-1), torch.ones(64))
    assert space["out"].loss < 5.4 and space["model"].blocks[0].ffn.router.bias.abs().sum() > 0
    assert sample.main(["runs/mine", "--tokens", "3"]) == 0


@pytest.mark.parametrize("kind", models.KINDS)
def test_a_model_of_every_kind_with_plain_values(kind):
    assert fitted(models.GPT(small_config(kind=kind)))[-1] < 5


def test_layers_by_hand_complete_and_check_themselves():
    x, ctx = torch.randn(2, 8, 32), ffn.Context(torch.zeros(2, 8, dtype=torch.long))
    for layer in (models.MoE(FFNConfig(), 32), models.PEER(FFNConfig(kind="peer"), 32)):
        y, stats = layer(x, ctx)
        assert y.shape == x.shape and y.isfinite().all() and y.std() > 0.01
    with pytest.raises(ConfigError, match="ffn.top_k = 9"):
        models.MoE(FFNConfig(top_k=9), 32)


def test_a_router(tmp_path, corpora, monkeypatch):                                          # noqa: F811
    monkeypatch.setitem(routers.ROUTERS, "random", run_block("router")["Random"])
    assert fitted(models.GPT(small_config(router="random")))[-1] < 5
    run = everything(tmp_path, corpora, "--ffn.router=random")
    assert load(run / "ckpt_last.pt").header["config"]["ffn"]["balance"] == "none"


def test_a_router_with_logits(tmp_path, corpora, monkeypatch):                              # noqa: F811
    class Cosine(routers.Router):
        traits = routers.Traits("the nearest direction", "nobody", "softmax, after the selection")

        def forward(self, x, ctx):
            logits = 5 * nn.functional.normalize(self.score(x), dim=-1)
            top, indices = logits.topk(self.k, -1)
            return routers.pairs(indices, top.softmax(-1), logits=logits, probs=logits.softmax(-1))

    monkeypatch.setitem(routers.ROUTERS, "cosine", Cosine)
    everything(tmp_path, corpora, "--ffn.router=cosine", "--ffn.z_loss=0.001")


def test_a_router_that_breaks_its_promise_is_a_sentence(monkeypatch):
    cls = run_block("router")["Random"]
    monkeypatch.setattr(cls, "traits", cls.traits._replace(steerable=True, balance="switch"))
    monkeypatch.setitem(routers.ROUTERS, "random", cls)
    with pytest.raises(ValueError, match=r"needs probs .* router random.* steerable=False .*routers.py"):
        models.GPT(small_config(router="random"))(*tokens())


def test_a_kind_of_layer(tmp_path, corpora, monkeypatch, capsys):                           # noqa: F811
    monkeypatch.setitem(models.KINDS, "sine", run_block("kind")["Sine"])
    assert fitted(models.GPT(small_config(kind="sine")))[-1] < 5
    run = everything(tmp_path, corpora, "--ffn.kind=sine")
    assert btx.main(["upcycle", str(run), "--out", str(tmp_path / "up")]) == 2
    assert "only a dense model" in capsys.readouterr().err


def test_a_mixer(tmp_path, corpora, monkeypatch):                                           # noqa: F811
    class Average(nn.Module):
        """Every position gets the mean of those before it and itself."""

        def __init__(self, config):
            super().__init__()
            self.out = nn.Linear(config.n_embd, config.n_embd, bias=False)

        def init_weights(self, n_layer):
            ffn.draw(self.out.weight, n_layer)

        def forward(self, x, rotary, state, start):
            total = x.cumsum(1) + (0 if state is None else state.sum(0))
            if state is not None:
                state[0] = total[:, -1:]
            count = torch.arange(start + 1, start + x.shape[1] + 1, device=x.device).unsqueeze(1)
            return self.out(total / count)

        def new_state(self, batch_size, block_size, dtype):
            return self.out.weight.new_zeros(1, batch_size, 1, self.out.in_features, dtype=dtype)

        def flops_per_token(self, context):
            return 2 * self.out.weight.numel()

    monkeypatch.setitem(models.MIXERS, "average", Average)
    everything(tmp_path, corpora, "--model.mixer=average")
    config = small_config()
    config.model.mixer = "average"
    model, (idx, _) = models.GPT(config).eval(), tokens()
    cache = model.new_cache(len(idx))
    parts = [model(idx[:, :7], cache=cache).logits, model(idx[:, 7:], cache=cache).logits]
    torch.testing.assert_close(torch.cat(parts, 1), model(idx).logits, rtol=1e-4, atol=1e-5)


def test_a_balancing_loss_and_an_activation(tmp_path, corpora, monkeypatch):                # noqa: F811
    monkeypatch.setitem(balance.LOSSES, "flat", lambda routing, load, config, shape: routing.probs.square().sum(-1).mean())
    monkeypatch.setitem(ffn.ACTIVATIONS, "sine", torch.sin)
    assert fitted(models.GPT(small_config(balance="flat", activation="sine")))[-1] < 5
    everything(tmp_path, corpora, "--ffn.balance=flat", "--ffn.activation=sine")


def test_a_corpus(tmp_path, monkeypatch):
    def counting(name):
        def documents(split):
            start = 0 if split == "train" else 10**6
            return (f"{n} comes before {n + 1}.\n" for n in itertools.count(start))
        return Corpus(name, documents, "counting 1", size=4000, unit="lines", generated=True)

    monkeypatch.setitem(sources.NAMES, "counting", "numbers, one after the other")
    monkeypatch.setitem(sources.MADE, "counting", counting)
    settings = TINY | {"data.name": "counting", "data.dir": tmp_path / "prepared"}
    argv = [f"--{key}={value}" for key, value in settings.items()]
    assert train.main(["--out", str(tmp_path / "run"), "--quiet", *argv]) == 0
    assert (tmp_path / "prepared/counting-byte/train.bin").exists()


def test_a_logged_number_of_a_layer_is_a_field_and_a_column(tmp_path, corpora):             # noqa: F811
    """In a copy of the repository: one line in ffn.Stats, and the layer that returns it."""
    for path in [*ROOT.glob("*.py"), *(p for room in ("runtime", "grow", "kernels", "data", "configs")
                                       for p in (ROOT / room).rglob("*") if p.suffix in (".py", ".toml"))]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text("utf-8"), "utf-8")
    contract, layer = tmp_path / "ffn.py", tmp_path / "moe.py"
    contract.write_text(contract.read_text().replace("    routing: tuple", "    size: Number | None = None\n    routing: tuple"))
    changed = re.sub(r"return y, (Stats\(.*?\n\n)", lambda m: "stats = " + m[1].rstrip()
                     + "\n        return y, stats._replace(size=y.square().mean())\n\n", layer.read_text(), flags=re.DOTALL)
    layer.write_text(changed)
    done = subprocess.run([sys.executable, tmp_path / "train.py", *command(tmp_path, corpora)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "run/log.csv", newline="") as file:
        assert float(list(csv.DictReader(file))[-1]["size"]) > 0


def test_a_logged_number_is_a_column_and_an_old_log_goes_on(tmp_path, corpora, monkeypatch):    # noqa: F811
    """Of a step: one more key of its row. An earlier log lacks the column, and goes on with it."""
    assert train.main(command(tmp_path, corpora)) == 0
    real = train.Trainer.step
    monkeypatch.setattr(train.Trainer, "step", lambda self: real(self) | dict(weight=self.model.norm.weight.norm()))
    assert train.main(["--out", str(tmp_path / "run"), "--resume", "--quiet", "--train.max_steps", "8"]) == 0
    lines = [line.split(",") for line in (tmp_path / "run/log.csv").read_text().splitlines()]
    assert lines[0][-1] == "weight" and lines[1][-1] == "" and float(lines[-1][-1]) > 0
    assert {len(line) for line in lines} == {len(report.COLUMNS) + 1}
    assert plots.main([str(tmp_path / "run")]) == 0
