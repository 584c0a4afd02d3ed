"""Workers that seldom meet: the identities of DiLoCo and elastic averaging, resume, processes."""
import csv
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from data.prepare import prepare, prepared
from grow import outer, workers
from grow.workers import Part, elastic, outer_gradient, plain_sgd
from model import load_config, load_model
from lab.papers.arms import expand
from lab.papers.spec import read_experiment
from runtime import checkpoint, memory
from sample import sample_text
from test_train import ROOT, TINY

RUN = TINY | {"train.batch_size": 8, "train.max_steps": 8, "train.eval_every": 4, "train.warmup_steps": 2,
              "train.keep": "all"}
QUIET = dict(workers=4, every=2, outer="average", outer_lr=0.7, outer_momentum=0.9, alpha=0.2, inner="adamw",
             inner_momentum=0.0, split="shards")
PLAIN = {"train.grad_clip": 0, "train.weight_decay": 0, "train.schedule": "constant", "train.warmup_steps": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two prepared corpora."""
    folder = tmp_path_factory.mktemp("outer")
    for name, line in (("one", "def f(x): return x + 1\n"), ("two", "all happy families are alike. ")):
        (folder / f"{name}.txt").write_text(line * 150)
        prepare([str(folder / f"{name}.txt")], out=folder / "prepared", quiet=True)
    (folder / "tiny.toml").write_text("")
    return folder


def arguments(home, out, *more, **keys):
    """A command line of train.py, and of grow.outer."""
    keys = RUN | {"data.name": "one", "data.dir": home / "prepared"} | keys
    return [str(home / "tiny.toml"), "--out", str(out), "--quiet", *map(str, more),
            *(f"--{k}={v}" for k, v in keys.items())]


def team_of(home, options=(), **keys):
    """A Team before its first step."""
    keys = RUN | {"data.name": "one", "data.dir": home / "prepared", "train.dtype": "float32"} | keys
    config = load_config(None, {k: str(v) for k, v in keys.items()})
    folders, tokenizer = prepared(config.data)
    config.model.vocab_size = tokenizer.vocab_size
    centre = train.Trainer(config, folders, tokenizer, torch.device("cpu"))
    centre.say = print
    return workers.Team(centre, folders, outer.Options(**QUIET | dict(options)))


def rounds(team, n, every=2):
    for _ in range(n):
        for _ in range(every):
            team.step()
        team.meet()
    return team


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def rows(out):
    with open(out / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def content(out):
    """Everything of a run's last checkpoint that is a number."""
    saved = checkpoint.load(out / checkpoint.LAST)
    return saved.model | saved.optimizer


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- DiLoCo ---

@pytest.mark.parametrize("kind", [{"ffn.kind": "dense"}, {"ffn.router": "noisy_topk"}, {"ffn.router": "sigmoid"}])
def test_one_worker_that_is_averaged_is_plain_training(kind, home, tmp_path):
    """k = 1, outer rate 1, no momentum: to rounding, since theta - (theta - theta_1) is not exact."""
    assert train.main(arguments(home, tmp_path / "plain", **kind)) == 0
    one = arguments(home, tmp_path / "one", "--workers", 1, "--every", 2, "--outer", "average", **kind)
    sgd = arguments(home, tmp_path / "sgd", "--workers", 1, "--every", 2, "--outer_lr", 1, "--outer_momentum", 0, **kind)
    assert outer.main(one) == outer.main(sgd) == 0
    a = content(tmp_path / "plain")
    for name in ("one", "sgd"):
        b = content(tmp_path / name)
        for key in checkpoint.load(tmp_path / name / checkpoint.LAST).model:
            torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=1e-4)
        assert [float(r["loss"]) for r in rows(tmp_path / "plain")[1:]] == pytest.approx(
            [float(r["loss"]) for r in rows(tmp_path / name)[1:]], rel=1e-5)


def test_equal_workers_on_equal_data_are_one(home):
    team, alone = team_of(home), team_of(home)
    for worker in team.workers:
        worker.batches, worker.config.train.seed = team.workers[0].batches, 0
    rounds(team, 2)
    for _ in range(4):                                          # the inner optimizer's state goes on
        alone.workers[0].step()
    torch.testing.assert_close(vector(team.centre.model), vector(alone.workers[0].model), atol=1e-6, rtol=1e-5)


def test_plain_inner_steps_that_meet_at_once_are_steps_on_the_mean_gradient(home):
    more = PLAIN | {"ffn.balance": "none"}
    team = team_of(home, dict(inner="sgd"), **more)
    whole = team_of(home, dict(workers=1), **more).workers[0]
    whole.optimizer = plain_sgd(whole.optimizer, whole.config.train.lr, 0.0)
    start = vector(whole.model)
    for _ in range(3):
        team.step()
        team.meet()
        whole.step()
    assert (vector(whole.model) - start).abs().max() > 1e-3
    torch.testing.assert_close(vector(team.centre.model), vector(whole.model), atol=1e-6, rtol=1e-4)


def test_the_outer_gradient_points_to_the_old_weights(home):
    """With the other sign the loss rises."""
    old, new = torch.tensor([3.0]), [torch.tensor([1.0]), torch.tensor([2.0])]
    assert outer_gradient(old, new, 2).tolist() == [1.5]
    team = team_of(home, dict(outer="nesterov"), **{"train.schedule": "constant"})
    valid = train.EvalBatches([home / "prepared" / "one-byte"], 16, 4, 2, team.centre.tokenizer.token_lengths())

    def loss():
        return team.centre.evaluate(valid)["one"][0]

    rounds(team, 8)
    before, theta = loss(), [p.detach().clone() for p in team.learned]
    rounds(team, 1)
    after = loss()
    with torch.no_grad():
        for p, old in zip(team.learned, theta):
            p.copy_(2 * old - p)
    assert after < before < loss()


def test_the_outer_optimizer_is_sgd_with_nesterovs_momentum(home):
    team = team_of(home, dict(outer="nesterov"))
    p, v = team.learned[0], 0
    for shift in (1.0, -0.5, 0.25):
        old = p.detach().clone()
        with torch.no_grad():
            for i, worker in enumerate(team.workers):           # shifts of i, whose mean is 1.5
                worker.learned[0].add_(shift * i)
        team.meet()
        gradient = -1.5 * shift
        v = 0.9 * v + gradient
        torch.testing.assert_close(p.detach(), old - 0.7 * (gradient + 0.9 * v), atol=1e-5, rtol=1e-5)
        assert all(torch.equal(worker.learned[0], p) for worker in team.workers)


@pytest.mark.parametrize("rule", ["nesterov", "average", "elastic"])
def test_workers_may_change_places(rule, home):
    teams = [team_of(home, dict(outer=rule), **{"ffn.router": "sigmoid"}) for _ in range(2)]
    for _ in range(2):
        for team in teams:
            team.step(), team.step()
            team.meet()
            team.workers.reverse()
        teams[1].workers.reverse()                              # the second is never reversed
    for a, b in zip(*(team.centre.model.state_dict().values() for team in teams)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# --- elastic averaging ---

numbers = st.floats(-10, 10, allow_nan=False)


def tensors(values):
    return [torch.tensor([v], dtype=torch.float64) for v in values]


@settings(deadline=None, max_examples=50)
@given(numbers, st.lists(numbers, min_size=1, max_size=6), st.floats(0, 1))
def test_elastic_averaging_keeps_the_sum_and_shrinks_the_spread(c, values, alpha):
    centre, (x, p) = tensors([c])[0], (tensors(values), len(values))
    elastic(centre, x, alpha)
    assert float(sum(x) + centre) == pytest.approx(sum(values) + c, abs=1e-9)
    mean, before = float(sum(x)) / p, sum(values) / p
    for new, old in zip(x, values):
        assert float(new) - mean == pytest.approx((1 - alpha) * (old - before), abs=1e-9)
    assert mean - float(centre) == pytest.approx((1 - alpha - p * alpha) * (before - c), abs=1e-9)


@settings(deadline=None, max_examples=20)
@given(numbers, st.integers(1, 6), st.floats(0, 1))
def test_equal_weights_are_a_fixed_point(c, p, alpha):
    centre, x = tensors([c])[0], tensors([c] * p)
    elastic(centre, x, alpha)
    assert {float(t) for t in (centre, *x)} == {c}


def test_without_a_pull_workers_are_independent_and_one_with_the_whole_pull_swaps(home):
    centre, x = tensors([1.0])[0], tensors([4.0])
    elastic(centre, x, 1.0)
    assert (float(centre), float(x[0])) == (4.0, 1.0)
    team, alone = (team_of(home, dict(outer="elastic", alpha=0.0)) for _ in range(2))
    start = vector(team.centre.model)
    rounds(team, 2)
    for _ in range(4):
        alone.step()
    assert torch.equal(vector(team.centre.model), start)
    for a, b in zip(team.workers, alone.workers):
        assert torch.equal(vector(a.model), vector(b.model))


def test_on_a_quadratic_elastic_averaging_is_a_linear_recurrence():
    """Workers of loss h_i (x - b_i)^2 / 2 take tau gradient steps between two meetings."""
    h, b, rate, alpha, tau = [1.0, 2.0, 0.5], [0.3, -1.0, 2.0], 0.1, 0.25, 4
    state = np.array([5.0, -3.0, 1.0, 0.5])                     # three workers and the centre
    x, centre = tensors(state[:3]), tensors(state[3:])[0]
    local = np.diag([*((1 - rate * hi) for hi in h), 1.0])
    push = np.array([*(rate * hi * bi for hi, bi in zip(h, b)), 0.0])
    meeting = np.eye(4)
    meeting[:3, :3] -= alpha * np.eye(3)
    meeting[:3, 3] = meeting[3, :3] = alpha
    meeting[3, 3] = 1 - 3 * alpha
    for _ in range(20):
        for _ in range(tau):
            for xi, hi, bi in zip(x, h, b):
                xi.sub_(rate * hi * (xi - bi))
            state = local @ state + push
        elastic(centre, x, alpha)
        state = meeting @ state
        assert [float(t) for t in (*x, centre)] == pytest.approx(state.tolist(), abs=1e-12)


# --- what the workers share ---

@pytest.mark.parametrize("rule", ["nesterov", "elastic"])
@pytest.mark.parametrize("kind", [{"ffn.router": "sigmoid", "ffn.bias_rate": 0.1},
                                  {"ffn.kind": "peer", "ffn.n_keys": 8, "ffn.peer_top_k": 4}])
def test_statistics_become_the_mean_of_the_workers(kind, rule, home):
    team = team_of(home, dict(outer=rule), **kind)
    team.step(), team.step()
    own = [[b.clone() for b in workers.statistics(worker.model)] for worker in team.workers]
    assert own[0] and not all(torch.equal(a, b) for a, b in zip(own[0], own[1]))
    team.meet()
    for model in team.models:
        for b, *parts in zip(workers.statistics(model), *own):
            torch.testing.assert_close(b, sum(parts) / 4)


def test_what_is_frozen_stays_to_the_last_bit(home):
    team = team_of(home, dict(workers=2, outer="nesterov"), **{"lifelong.freeze": "embedding*", "ffn.n_frozen": 2})
    before = {name: p.detach().clone() for name, p in team.centre.model.named_parameters()}
    rounds(team, 2)
    for name, p in team.centre.model.named_parameters():
        rows = 2 if ".experts." in name or ".router." in name else None
        assert torch.equal(p[:2], before[name][:2]) == (rows == 2 or name.startswith("embedding")), name
        assert torch.equal(p, before[name]) == name.startswith("embedding"), name


def test_shards_are_the_parts_of_what_train_reads(home):
    team = team_of(home, **{"data.name": "one,two", "data.weights": "0.7,0.3", "train.grad_accum": 2})
    for step in (0, 5):
        for micro in (0, 1):
            whole = team.centre.batches.batch(step, micro, 2)
            parts = [worker.batches.batch(step, micro, 2, 0, 1) for worker in team.workers]
            assert all(torch.equal(torch.cat(some), all_) for some, all_ in zip(zip(*parts), whole))


def test_domains_are_one_corpus_a_worker(home):
    team = team_of(home, dict(split="domains"), **{"data.name": "one,two"})
    for i, worker in enumerate(team.workers):
        x, _, domain = worker.micro_batch(0)
        text = worker.tokenizer.decode(x.flatten().tolist())
        assert domain.tolist() == [i % 2] * 2 and ("happy" in text or "families" in text) == (i % 2 == 1)
    first, third = (team.workers[i].micro_batch(0)[0] for i in (0, 2))
    assert not torch.equal(first, third)                        # two of one corpus share its batch
    assert isinstance(team.workers[0].batches, Part)


# --- the run folder ---

KINDS = {"topk": {}, "noise": {"ffn.router": "noisy_topk", "model.dropout": 0.1},
         "bias": {"ffn.router": "sigmoid", "ffn.bias_rate": 0.1, "train.grad_accum": 2},
         "peer": {"ffn.kind": "peer", "ffn.n_keys": 8, "ffn.peer_top_k": 4}}
RULES = {"topk": ["--outer", "nesterov"], "noise": ["--outer", "elastic", "--inner", "sgd"],
         "bias": ["--outer", "elastic", "--alpha", 0.3], "peer": ["--outer", "average"]}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_goes_on_to_the_same_bits(kind, home, tmp_path, monkeypatch):
    """Killed within a round, a round after the last checkpoint; then stopped by a signal."""
    more = ["--workers", 2, "--every", 2, *RULES[kind]]
    assert outer.main(arguments(home, tmp_path / "whole", *more, **KINDS[kind])) == 0
    step, calls = workers.Team.step, []

    def killed(team):
        calls.append(team)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(team)

    def stopped(team):
        if team.centre.done % 2 == 0:                           # once: the second time it ends at once
            os.kill(os.getpid(), signal.SIGTERM)
        return step(team)

    monkeypatch.setattr(workers.Team, "step", killed)
    out = tmp_path / "cut"
    assert outer.main(arguments(home, out, *more, **KINDS[kind])) == 130
    assert checkpoint.load(out / checkpoint.LAST).header["step"] == 4
    monkeypatch.setattr(workers.Team, "step", stopped)
    resume = ["--out", str(out), "--resume", "--quiet"]
    assert outer.main(resume) == 0
    assert checkpoint.load(out / checkpoint.LAST).header["step"] == 6
    monkeypatch.setattr(workers.Team, "step", step)
    assert outer.main(resume) == 0
    assert same_bits(content(out), content(tmp_path / "whole"))
    for a, b in zip(rows(out), rows(tmp_path / "whole"), strict=True):
        assert {k: v for k, v in a.items() if k not in ("seconds", "tokens_per_second")} == {
            k: v for k, v in b.items() if k not in ("seconds", "tokens_per_second")}


def test_the_run_folder_is_an_ordinary_one(home, tmp_path, capsys):
    out = tmp_path / "run"
    more = "--workers", 2, "--every", 4, "--outer", "elastic"
    assert outer.main(arguments(home, out, *more, **{"ffn.router": "sigmoid"})) == 0
    model, config, tokenizer, header = load_model(out)
    assert isinstance(sample_text(model, tokenizer, tokens=4), str)
    assert header["ancestry"]["kind"] == "outer" and header["ancestry"]["alpha"] == 0.45
    assert load_config(out / "config.toml").train.batch_size == 8 and header["tokens"] == 8 * 8 * 16
    # a worker sends its weights and its biases, twice
    last, numbers = rows(out)[-1], sum(p.numel() for p in model.parameters()) + 2 * 4
    assert int(last["bytes_sent"]) == 2 * 4 * numbers
    assert float(last["worker_loss"]) > 0 and float(last["val_loss"]) == pytest.approx(header["val_loss"])
    # train.py starts from it, and leaves its workers alone
    begin = arguments(home, tmp_path / "next", **{"train.init_from": out})
    begin = [word for word in begin if not word.startswith(("--model", "--ffn"))]
    assert train.main(begin) == 0
    assert train.main(["--out", str(out), "--resume"]) == 2
    assert "python -m grow.outer --out" in capsys.readouterr().err


@pytest.mark.parametrize("more, keys, wanted", [
    (["--workers", 0], {}, "--workers 0 must be at least 1"),
    (["--every", 3], {}, "train.max_steps = 8 is no multiple of --every 3"),
    (["--workers", 3, "--every", 2], {}, "cannot be cut into train.grad_accum = 1 x 3 workers"),
    (["--alpha", 0.5], {}, "--alpha 0.5 has no effect: it is read with --outer elastic"),
    (["--outer", "average", "--outer_lr", 0.5], {}, "--outer_lr 0.5 has no effect"),
    (["--inner_momentum", 0.5], {}, "--inner_momentum 0.5 has no effect"),
    (["--outer", "elastic", "--alpha", "nan"], {}, "--alpha nan must be at least 0 and at most 1"),
    (["--outer_momentum", 1], {}, "--outer_momentum 1.0 must be at least 0 and below 1"),
    (["--outer", "mean"], {}, "invalid choice: 'mean'"),
    (["--every", 2, "--split", "domains"], {"data.name": "one,two", "data.weights": "1,2"},
     "data.weights = [1.0, 2.0] does not go with --split domains"),
    (["--evry", 2], {}, "unknown option --evry (did you mean --every?)")])
def test_what_does_not_fit_is_refused_in_one_line(more, keys, wanted, home, tmp_path, capsys):
    try:
        status = outer.main(arguments(home, tmp_path / "run", *more, **keys))
    except SystemExit as e:
        status = e.code
    said = capsys.readouterr().err
    assert status == 2 and wanted in said and len(said.splitlines()) == 1
    assert not checkpoint.has_run(tmp_path / "run")


def test_all_workers_of_a_process_must_fit_into_memory(home, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "memory_of", lambda device: 800_000)        # one model takes 200,000
    assert train.main(arguments(home, tmp_path / "plain")) == 0
    assert outer.main(arguments(home, tmp_path / "run", "--workers", 4, "--every", 2)) == 2
    assert "not enough memory" in capsys.readouterr().err


def test_an_arm_of_an_experiment_may_be_trained_by_this_program():
    path = ROOT / "configs" / "papers" / "diloco.toml"
    spec = read_experiment(path)
    arms = {arm.name: arm for arm in expand(spec, path, "cpu", [0])}
    program = ["-m", "grow.outer", "--workers", "4", "--every", "50", "--outer"]
    assert arms["diloco-50"].arguments()[:8] == [*program, "nesterov"]
    assert arms["diloco-50"].resume_arguments()[7:10] == ["nesterov", "--out", str(arms["diloco-50"].folder)]
    assert arms["synchronous"].arguments()[0] == arms["synchronous"].resume_arguments()[0] == "train.py"
    keys = {arm.key for arm in arms.values()}
    assert len(keys) == len(arms)                               # of one config, told apart by the program
    for arm in arms.values():
        if arm.program:
            given = outer.parse(outer.add_options(outer.build_parser()), arm.arguments()[2:])[0]
            outer.options_of(vars(given), load_config(ROOT / arm.config, arm.settings), None)


def test_a_run_keeps_its_options(home, tmp_path, capsys):
    out = tmp_path / "run"
    assert outer.main(arguments(home, out, "--workers", 2, "--every", 4)) == 0
    assert outer.main(["--out", str(out), "--resume", "--every", "2"]) == 2
    assert "--every 2: but this run was started with 4" in capsys.readouterr().err
    assert outer.main(["--out", str(out), "--resume", "--quiet", "--train.max_steps", "12"]) == 0
    assert checkpoint.load(out / checkpoint.LAST).header["step"] == 12
    assert train.main(arguments(home, tmp_path / "plain")) == 0
    assert outer.main(["--out", str(tmp_path / "plain"), "--resume"]) == 2
    assert "is a run of one worker" in capsys.readouterr().err


# What torchrun runs: both processes end once all is written, before gloo's teardown can abort.
JOB = """
import os, sys
import torch
from grow import outer
from runtime import parallel
with parallel.processes():
    status = outer.main(sys.argv[1:])
    torch.distributed.barrier()
    os._exit(status)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_one_worker_a_process_is_workers_that_take_turns(home, tmp_path):
    """To the last bit, the checkpoint included."""
    keys = {"ffn.router": "sigmoid", "ffn.bias_rate": 0.1, "model.dropout": 0.1}
    more = "--workers", 2, "--every", 2, "--outer", "elastic"
    assert outer.main(arguments(home, tmp_path / "one", *more, **keys)) == 0
    (tmp_path / "job.py").write_text(JOB)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, tmp_path / "job.py", *arguments(home, tmp_path / "two", *more, **keys)],
                          capture_output=True, text=True, timeout=120,
                          env=dict(os.environ, OMP_NUM_THREADS=str(torch.get_num_threads()), PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr
    assert same_bits(content(tmp_path / "one"), content(tmp_path / "two"))
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for name in ("val_loss", "worker_loss", "bytes_sent", "tokens"):
            if a[name]:
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-6), name
