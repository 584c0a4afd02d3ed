"""parallel.py: two processes train what one trains, by ddp and by fsdp; one checkpoint for any number
of them."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from parallel_job import objective
from test_train import ROOT, TINY, rows, weights
from tiny import KINDS as TINY_KINDS
from tiny import batch_of, model_of

import train
from data.prepare import prepare
from model import load_config, load_model
from routers import DIFFERS, ROUTERS
from runtime import checkpoint, parallel
from settings import ConfigError

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or not Path("/proc/self/task").exists(),
                                reason="needs torch.distributed and /proc")
KINDS = {
    "dense": {"ffn.kind": "dense"}, "topk": {}, "soft": {"ffn.router": "soft"},
    "accumulated": {"train.grad_accum": 2, "ffn.z_loss": 0.1, "ffn.balance_loss": 1},
    "gshard loss": {"ffn.balance": "gshard", "ffn.balance_loss": 1},
    "btx loss": {"ffn.balance": "btx", "ffn.balance_loss": 1},
    "sequence loss": {"ffn.balance": "deepseek", "ffn.balance_loss": 1},
    "switch": {"ffn.router": "switch", "ffn.top_k": 1, "ffn.jitter": 0, "ffn.balance_loss": 1},
    "sigmoid": {"ffn.router": "sigmoid", "ffn.bias_rate": 0.1, "train.grad_accum": 2},
    "hash": {"ffn.router": "hash", "ffn.top_k": 1, "ffn.hash_table": "balanced"},
    "domain": {"ffn.router": "domain", "ffn.n_expert": 2, "ffn.top_k": 1, "data.name": "one,two"},
    "peer": {"ffn.kind": "peer", "ffn.n_keys": 8, "ffn.peer_top_k": 4, "train.grad_accum": 2,
             "train.seed": 1},                          # of seed 0 two keys are so alike that rounding decides
    "pkm": {"ffn.kind": "pkm", "ffn.n_keys": 8, "ffn.peer_top_k": 4},
    "frozen": {"lifelong.freeze": "embedding*"},
}
SHARDED = ["topk", "accumulated", "sigmoid", "peer"]                # a few of them again, by fsdp
FSDP = {"train.parallel": "fsdp"}
HALF = {"train.schedule": "constant", "train.max_steps": 3}         # of the six steps that TINY has
WHOLE = {"train.schedule": "constant"}


def arguments(folder, out, *more, **settings):
    """The command line of a tiny run."""
    keys = TINY | {"data.name": "two", "data.dir": folder / "prepared", "train.batch_size": 8,
                   "train.eval_batches": 4} | settings
    return [str(folder / "tiny.toml"), "--out", str(folder / out), *more,
            *(f"--{k}={v}" for k, v in keys.items())]


def torchrun(*command):
    """A torchrun of two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return subprocess.Popen([*launcher, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two prepared corpora, and half a run of one process, twice."""
    folder = tmp_path_factory.mktemp("parallel")
    for name, line, n in (("one", "def f(x): return x + 1\n", 120),
                          ("two", "all happy families are alike. ", 110)):
        (folder / f"{name}.txt").write_text(line * n)
        prepare([str(folder / f"{name}.txt")], out=folder / "prepared", quiet=True)
    (folder / "tiny.toml").write_text("")
    assert train.main(arguments(folder, "ddp resumes", "--quiet", **HALF)) == 0
    shutil.copytree(folder / "ddp resumes", folder / "fsdp resumes")
    assert train.main(arguments(folder, "one process", "--quiet", **WHOLE)) == 0
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """(status, output) of both ranks by name of run; one torchrun made them all."""
    jobs = {f"{kind} ddp": arguments(folder, f"{kind} ddp", **KINDS[kind]) for kind in KINDS}
    jobs |= {f"{kind} fsdp": arguments(folder, f"{kind} fsdp", **KINDS[kind], **FSDP) for kind in SHARDED}
    resume = "--resume", "--train.max_steps=6"
    jobs |= {"half fsdp": arguments(folder, "half fsdp", **HALF, **FSDP),
             "ddp resumes": ["--out", str(folder / "ddp resumes"), *resume],
             "fsdp resumes": ["--out", str(folder / "fsdp resumes"), *resume, "--train.parallel=fsdp"],
             "noise": arguments(folder, "noise", **{"ffn.router": "noisy_topk", "model.dropout": 0.1}),
             "cannot be cut": arguments(folder, "bad", **{"train.grad_accum": 8}),
             "unknown setting": ["--train.max_stesp=3"],
             "locked": ["--out", str(folder / "locked"), "--resume"],
             "no run": ["--out", str(folder / "none"), "--resume"]}
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    with checkpoint.Lock(folder / "locked"):
        process = torchrun(Path(__file__).with_name("parallel_job.py"), folder)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "Warning" not in err, out + err
    ranks = [json.loads((folder / f"results{r}.json").read_text()) for r in (0, 1)]
    return dict(zip(jobs, zip(*ranks)))


def same_numbers(out, reference):
    """Every number of two logs, but for times, within float rounding."""
    mine, theirs = rows(out), rows(reference)
    assert len(mine) == len(theirs) == 7
    for a, b in zip(mine, theirs):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", "tokens_per_second"}:
            x, y = ([float(v) for v in row[name].replace(";", " ").split()] for row in (a, b))
            assert x == pytest.approx(y, rel=1e-5, abs=1e-6), (name, a["step"])


# --- the same training ---

@pytest.mark.parametrize("run", [f"{kind} ddp" for kind in KINDS] + [f"{kind} fsdp" for kind in SHARDED])
def test_two_processes_train_what_one_trains(run, folder, results):
    """Every logged number of every step: losses, balance statistics, loads, gradient norms, validation."""
    (status, said), (other, silence) = results[run]
    assert status == other == 0 and silence == "" and said.count("best validation loss") == 1
    assert DIFFERS not in said
    alone = folder / f"{run} alone"
    assert train.main(arguments(folder, alone, "--quiet", **KINDS[run.rsplit(" ", 1)[0]])) == 0
    same_numbers(folder / run, alone)
    assert weights(folder / run).model.keys() == weights(alone).model.keys()
    assert weights(folder / run).optimizer.keys() == weights(alone).optimizer.keys()


def test_gradients_of_global_statistics_are_those_of_one_process(folder, results):
    parts, alone = [torch.load(folder / f"gradients{r}.pt") for r in (0, 1)], objective(0, 1)
    for name in ("switch_loss", "importance_loss", "btx_loss", "x"):        # by token
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), alone[name], rtol=1e-4, atol=1e-7)
    for name in ("weight", "bias"):                                 # parameters: averaged over processes
        torch.testing.assert_close(parts[0][name] + parts[1][name], alone[name], rtol=1e-4, atol=1e-6)
    for name in ("mean", "var"):
        torch.testing.assert_close(parts[0][name], alone[name])
        assert torch.equal(parts[0][name], parts[1][name])


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_every_parameter_gets_a_gradient(kind):
    """On which ddp relies: it waits for each of them."""
    model = model_of(kind)
    out = model(*batch_of()[:2], domain=batch_of()[2])
    (out.loss + out.aux_loss).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_labels_of_routers(results):
    """A router without the label is among those that were compared."""
    alike = {name for name, router in ROUTERS.items() if not router.traits.differs()}
    assert alike | {"switch"} == {settings.get("ffn.router", "topk") for settings in KINDS.values()}
    assert ROUTERS["switch"].traits.noise                   # but not with ffn.jitter = 0, as above


def test_what_differs_is_said_once(results):
    (status, said), (_, silence) = results["noise"]
    assert status == 0 and silence == ""
    assert said.count(f"{DIFFERS}: ffn.router noisy_topk") == 1 and said.count("dropout") == 1


# --- checkpoints ---

def test_a_checkpoint_goes_on_with_any_number_of_processes(folder, results):
    """Six steps of one process are three of one, three of two; and three of two, three of one; ddp and
    fsdp."""
    for run in ("ddp resumes", "fsdp resumes", "half fsdp"):
        assert [status for status, _ in results[run]] == [0, 0]
    again = ["--out", str(folder / "half fsdp"), "--resume", "--quiet", "--train.max_steps", "6"]
    assert train.main(again) == 0
    for run in ("ddp resumes", "fsdp resumes", "half fsdp"):
        same_numbers(folder / run, folder / "one process")
        for part in ("model", "optimizer"):
            mine, theirs = (getattr(weights(folder / name), part) for name in (run, "one process"))
            assert mine.keys() == theirs.keys()
            for name in mine:
                torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4,
                                           msg=f"{run} {name}")


def test_an_fsdp_checkpoint_is_one_plain_file(folder, results):
    """Same tensors, types, size and use as one that a single process wrote; tied weights are in it once."""
    model, config, _, header = load_model(folder / "topk fsdp")
    assert header["step"] == 6 and config.train.parallel == "fsdp"
    assert model(torch.zeros(1, 4, dtype=torch.int64)).logits.isfinite().all()
    sharded, ddp = folder / "topk fsdp" / checkpoint.LAST, folder / "topk ddp" / checkpoint.LAST
    assert abs(sharded.stat().st_size - ddp.stat().st_size) < 2000
    for part in ("model", "optimizer"):
        a, b = getattr(checkpoint.load(sharded), part), getattr(checkpoint.load(ddp), part)
        assert {n: (type(t), t.dtype, t.shape) for n, t in a.items()} == {n: (type(t), t.dtype, t.shape)
                                                                         for n, t in b.items()}


# --- errors and stops ---

@pytest.mark.parametrize("run, status, wanted", [
    ("cannot be cut", 2, "train.batch_size = 8 cannot be cut into train.grad_accum = 8 x 2"),
    ("unknown setting", 2, "train.max_steps"), ("locked", 1, "another process"),
    ("no run", 1, "no such checkpoint")])
def test_what_rank_0_refuses_ends_all_with_one_line(run, status, wanted, results):
    (mine, said), (other, silence) = results[run]
    assert mine == status and other != 0
    assert wanted in said and said.count("error:") == 1 and silence == ""


def test_fsdp_refuses_what_reaches_into_rows(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 2)
    for settings in ([("ffn.n_frozen", "2")], [("lifelong.l2", "1"), ("train.init_from", "x")]):
        config = load_config(None, [("train.parallel", "fsdp"), *settings])
        with pytest.raises(ConfigError, match="train.parallel"):
            parallel.check(config, torch.device("cpu"))


def workers(process, out, steps):
    """Process ids of both ranks, once the run has logged so many steps."""
    deadline = time.time() + 60
    while not (out / "log.csv").exists() or len(rows(out)) < steps:
        assert time.time() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(c) for c in children if "train.py" in Path(f"/proc/{c}/cmdline").read_text()]


def test_a_signal_stops_all_after_the_same_step_and_a_dead_process_ends_the_others(folder):
    out = folder / "stopped"
    long = dict(HALF, **{"train.max_steps": 100000, "train.eval_every": 0, "train.save_every": 5})
    process = torchrun(ROOT / "train.py", *arguments(folder, out, **long))
    assert len(workers(process, out, 4)) == 2
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert err.count("stopped by SIGTERM after step") == 1 and "error:" not in err
    step = weights(out).header["step"]
    assert step == int(rows(out)[-1]["step"])

    process = torchrun(ROOT / "train.py", "--out", out, "--resume")
    os.kill(workers(process, out, step + 12)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count("another process of this run ended") == 1, err
    assert err.count("error:") == 1 and "train.py\", line" not in err, err        # no traceback of ours
    saved = weights(out).header["step"]
    assert saved > step
    assert train.main(["--out", str(out), "--resume", "--quiet", "--train.max_steps", str(saved + 1)]) == 0
    assert [int(r["step"]) for r in rows(out)] == list(range(saved + 2))
