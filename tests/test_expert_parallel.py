"""Expert parallelism: rows travel to the experts of two processes and home, and the model that comes out is that
of one process. `torchrun ... tests/test_expert_parallel.py FOLDER` is what both processes run: exchanges of
random rows, models of every
router, then the training runs of jobs.json."""
import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
from parallel_job import run
from test_parallel import arguments, same_numbers, torchrun
from test_train import rows, weights
from tiny import batch_of, model_of
from tiny import run as run_model

import lab.bench as bench
import sample
import train
from data.prepare import prepare
from lab.timing import measure
from lab.timing.moe import MoEShape
from model import GPT, load_config
from moe import DISPATCH, Experts, MoE, dispatch_across, dispatch_loop
from routers import ROUTERS, Routing
from runtime import checkpoint, parallel
from runtime.device import resolve_compile
from runtime.graph import resolve_graph
from settings import ConfigError

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or not Path("/proc/self/task").exists(),
                                reason="needs torch.distributed and /proc")
EXPERT = {"train.parallel": "expert"}
SAME = {                                                        # as one process trains them
    "topk": {"ffn.router": "topk", "ffn.z_loss": 0.1, "ffn.balance_loss": 1, "train.grad_accum": 2,
             "ffn.n_shared": 1, "train.grad_clip": 0.1},
    "sigmoid": {"ffn.router": "sigmoid", "ffn.bias_rate": 0.1, "ffn.dispatch": "padded"},
    "soft": {"ffn.router": "soft", "ffn.dispatch": "loop", "lifelong.freeze": "*experts.w_in"},
    "hash": {"ffn.router": "hash", "ffn.top_k": 1, "ffn.hash_table": "balanced"},
    # all tokens are of domain 0, so that nobody visits the experts of the second process
    "domain": {"ffn.router": "domain", "ffn.n_expert": 2, "ffn.top_k": 1, "data.name": "two,one",
               "data.weights": "1,0"}}
# each process draws, limits or assigns for itself, as it does in ddp
ROUTED = {name: {} for name in ROUTERS} | {"limited": {"ffn.capacity_factor": 1}}
HALF = {"train.schedule": "constant", "train.max_steps": 3}


# ---- what both processes run

def tokens_of(part, E, k, d, generator, allowed):
    """(x, Routing) of one process: random tokens, `part` of them, that visit only some experts, and some pairs
    that stay at home."""
    x = torch.randn(part, d, generator=generator)
    expert = allowed[torch.randint(len(allowed), (part * k,), generator=generator)]
    weight = torch.rand(part * k, generator=generator)
    keep = torch.rand(part * k, generator=generator) < 0.8
    token = torch.arange(part).repeat_interleave(k)
    return x.requires_grad_(), Routing(expert, weight.requires_grad_(), token, k, keep=keep)


def one_exchange(seed, path):
    """Compares outputs and gradients of this process's tokens, and gradients of its experts, with the loop over
    all experts and all tokens. Even seeds: no token visits the experts of process seed // 2 % 2."""
    generator, rank = torch.Generator().manual_seed(seed), parallel.rank()
    E, k, d, w = 2 * (1 + seed % 3), 1 + seed % 2, 8, 4
    allowed = torch.arange(E)
    if seed % 2 == 0:
        allowed = allowed.chunk(2)[1 - seed // 2 % 2]
    parts = [tokens_of(n, E, k, d, generator, allowed) for n in (5, 1 + seed)]
    experts = Experts(E, d, w, "swiglu")
    for p in experts.parameters():
        torch.nn.init.normal_(p, generator=generator)
    # all by one process
    wanted = sum((dispatch_loop(x, routing, experts).pow(2).sum() for x, routing in parts), torch.zeros(()))
    x, routing = parts[rank]
    own = x, routing.weight
    want = [dispatch_loop(x, routing, experts), *torch.autograd.grad(wanted, (*own, *experts.parameters()))]
    # by both
    parallel.share_experts(experts, torch.device("cpu"))
    y = dispatch_across(x, routing, experts, path)
    y.pow(2).sum().backward()
    got = [y, x.grad, routing.weight.grad]
    got += [2 * p.grad.full_tensor() for p in experts.parameters()]         # the mean of both processes
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert experts.w_in.to_local().shape[0] == E // 2


def one_model(kind, more):
    """Compares loss and gradients of a model before and after its experts are shared."""
    model, rank = model_of(kind, more), parallel.rank()
    idx, targets, domain = batch_of(seed=rank)
    found = []
    for _ in range(2):
        model.zero_grad()
        out = run_model(model, idx, targets, seed=rank, domain=domain)
        (out.loss + out.aux_loss).backward()
        grads = {name: parallel.whole(p.grad).clone() for name, p in model.named_parameters()}
        found.append((out.loss, grads))
        parallel.share_experts(model, torch.device("cpu"))
    (loss, want), (shared_loss, got) = found
    torch.testing.assert_close(shared_loss, loss)
    for name, g in want.items():
        # as ddp averages them; the others it averages now as before
        if ".experts." in name:
            g = parallel.summed(g) / 2
        torch.testing.assert_close(got[name], g, rtol=1e-4, atol=1e-6, msg=f"{kind} {name}")


def main(folder):
    torch.set_num_threads(1)
    with parallel.processes():
        rows, sizes = torch.randn(3, 4).bfloat16(), [[1, 2], [2, 1]][parallel.rank()]
        assert parallel.exchange(parallel.exchange(rows, sizes, sizes), sizes, sizes).equal(rows)
        for seed in range(8):
            for path in ("loop", "padded", "grouped"):
                one_exchange(seed, path)
        for name, more in ROUTED.items():
            one_model("topk" if name == "limited" else name, more)
        results = [run(arguments) for arguments in json.loads((folder / "jobs.json").read_text())]
        (folder / f"results{parallel.rank()}.json").write_text(json.dumps(results))
        torch.distributed.barrier()
        os._exit(0)                                             # as in parallel_job.py


# ---- what is asked of it

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expert")
    for name, line, n in (("one", "def f(x): return x + 1\n", 120),
                          ("two", "all happy families are alike. ", 110)):
        (folder / f"{name}.txt").write_text(line * n)
        prepare([str(folder / f"{name}.txt")], out=folder / "prepared", quiet=True)
    (folder / "tiny.toml").write_text("")
    assert train.main(arguments(folder, "expert resumes", "--quiet", **HALF)) == 0
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """(status, output) of both processes by name of run."""
    jobs = {kind: arguments(folder, kind, **more, **EXPERT) for kind, more in SAME.items()}
    jobs |= {"half": arguments(folder, "half", **HALF | {"train.sample_tokens": 8}, **EXPERT),
             "expert resumes": ["--out", str(folder / "expert resumes"), "--resume", "--train.max_steps=6",
                                "--train.parallel=expert"],
             "odd": arguments(folder, "odd", **EXPERT, **{"ffn.n_expert": 3}),
             "dense": arguments(folder, "dense", **EXPERT, **{"ffn.kind": "dense"}),
             "compiled": arguments(folder, "compiled", **EXPERT, **{"train.compile": "on"})}
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    process = torchrun(__file__, folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "Warning" not in err, out + err
    ranks = [json.loads((folder / f"results{r}.json").read_text()) for r in (0, 1)]
    return dict(zip(jobs, zip(*ranks)))


def same_weights(a, b):
    for part in ("model", "optimizer"):
        mine, theirs = (getattr(weights(out), part) for out in (a, b))
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert type(mine[name]) is torch.Tensor
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4, msg=f"{a.name} {name}")


@pytest.mark.parametrize("kind", SAME)
def test_two_processes_train_what_one_trains(kind, folder, results):
    """Every logged number of every step, and the weights and optimizer state at the end."""
    (status, said), (other, silence) = results[kind]
    assert status == other == 0 and silence == "" and "processes  2, expert" in said, said
    alone = folder / f"{kind} alone"
    assert train.main(arguments(folder, alone, "--quiet", **SAME[kind])) == 0
    same_numbers(folder / kind, alone)
    same_weights(folder / kind, alone)
    if kind == "domain":
        assert {row["expert_load"] for row in rows(alone)[1:]} == {"128 0;128 0"}


def test_every_router_that_is_the_same_in_ddp_is_here():
    alike = {name for name, router in ROUTERS.items() if not router.traits.differs()}
    assert alike == {more.get("ffn.router", "topk") for more in SAME.values()}


def test_a_checkpoint_goes_on_with_any_number_of_processes(folder, results):
    """Six steps of one process are three of one and three of two, and three of two and three of one."""
    assert [status for run in ("half", "expert resumes") for status, _ in results[run]] == [0] * 4
    assert train.main(arguments(folder, "whole", "--quiet", **HALF | {"train.max_steps": 6})) == 0
    assert train.main(["--out", str(folder / "half"), "--resume", "--quiet", "--train.max_steps", "6"]) == 0
    for out in ("half", "expert resumes"):
        same_numbers(folder / out, folder / "whole")
        same_weights(folder / out, folder / "whole")
        assert abs((folder / out / checkpoint.LAST).stat().st_size
                   - (folder / "whole" / checkpoint.LAST).stat().st_size) < 2000


def test_sampling_and_what_is_told(folder, results, capsys):
    """Both processes sample together; parameters are those of the whole model; anyone reads the checkpoint."""
    (_, said), _ = results["half"]
    assert "--- sample ---" in said
    whole = GPT(load_config(folder / "half" / "config.toml", []))
    assert f"{whole.num_params().total:,} parameters, {whole.num_params().active:,} active" in said
    assert sample.main([str(folder / "half"), "--tokens", "4", "--seed", "1"]) == 0
    assert capsys.readouterr().out


# ---- refusals

@pytest.mark.parametrize("run, wanted", [
    ("odd", "cannot share 3 experts equally among 2 processes: start a number of them that divides it, or use ddp"),
    ("dense", "needs ffn.kind = \"moe\": use ddp"),
    ("compiled", "train.compile = \"on\" cannot be with train.parallel expert: loads decide")])
def test_what_cannot_be_is_one_line(run, wanted, results):
    (status, said), (other, silence) = results[run]
    assert status == 2 and other != 0
    assert wanted in said + silence and (said + silence).count("error:") == 1


def test_neither_compiled_nor_captured(monkeypatch):
    config = load_config(None, [("model.vocab_size", "8"), ("model.n_layer", "1"), *EXPERT.items()])
    model = GPT(config)
    (layer,) = (m for m in model.modules() if isinstance(m, MoE))
    layer.experts.spread = True
    monkeypatch.setattr(parallel, "world", lambda: 2)
    cuda = SimpleNamespace(type="cuda")
    assert resolve_compile(config, cuda, model, 10 ** 6, False) == (
        False, "auto: not with train.parallel expert: loads decide how many rows travel")
    assert resolve_graph(config, cuda, model.not_captured(torch.float32)) == (
        False, "auto: not with several processes")
    config.train.graph = "on"
    with pytest.raises(ConfigError, match="several processes"):
        resolve_graph(config, cuda, "")


def test_bench_counts_bytes(tmp_path, monkeypatch):
    """Every token visits both experts, so that each process sends all its 8 tokens away, and brings 8 home."""
    monkeypatch.setattr(bench, "find_machine", partial(measure.find_machine, size=64, copy_mib=1))
    monkeypatch.setattr(bench, "MOE_SHAPES", {"cpu": [MoEShape(T=16, d=32, E=2, k=2, n=16)]})
    assert bench.main(["parallel", "--device", "cpu", "--shapes", "quick", "--json", str(tmp_path / "rows")]) == 0
    table = [row for row in json.loads((tmp_path / "rows").read_text()) if "ceiling" not in row["path"]]
    assert [row["path"] for row in table] == 2 * ["one process", "two processes", "exchange"]
    assert all(row["ms"] > 0 for row in table)
    there, home = 8 * (4 * 32 + 4), 8 * 4 * 32
    for row, n_bytes in zip(table[2::3], (8 + there + home, 8 + 2 * (there + home))):
        assert row["note"].startswith(f"{n_bytes / 2 ** 20:.3g} MiB to the other process")


def test_no_rows():
    """A process to whose experts no token goes has nothing to compute, and gradients of 0."""
    for path in ("loop", "padded", "grouped"):
        experts = Experts(2, 8, 4, "swiglu")
        for p in experts.parameters():
            torch.nn.init.normal_(p)
        none, rows = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8, requires_grad=True)
        y = DISPATCH[path](rows, Routing(none, torch.zeros(0), none, 1), experts)
        y.sum().backward()
        assert y.shape == (0, 8) and all(p.grad.eq(0).all() for p in experts.parameters()), path


if __name__ == "__main__":
    main(Path(sys.argv[1]))
