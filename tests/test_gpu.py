"""lab/gpu.py without a GPU: the rehearsal, and that what fails or ends early costs nothing else."""
import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import train
from lab import gpu
from lab.timing import gpu_bench, gpu_check, gpu_models, gpu_papers, gpu_train, measure, moe
from lab.timing.gpu_unit import Place, Unit
from lab.timing.measure import Machine
from model import KINDS
from routers import ROUTERS


def status_of(out):
    return {key: e["state"] for key, e in json.loads((out / "status.json").read_text()).items()}


def rehearse(out, *more):
    return gpu.main(["--rehearse", "--out", str(out), *more])


# ---- the rehearsal ----

def test_rehearsal_does_every_part_and_a_second_call_nothing(tmp_path, capsys):
    out = tmp_path / "gpu"
    trainer = train.Trainer
    assert rehearse(out) == 0, capsys.readouterr().out
    files = sorted(path.name for path in out.iterdir())
    assert files == ["bench.json", "bench.png", "check.csv", "compile.csv", "kernels.csv",
                     "status.json", "train.csv"]
    assert all(path.stat().st_size < 2 ** 24 for path in out.iterdir())
    states = status_of(out)
    assert set(states.values()) == {"held"}
    assert {key.split("/")[0] for key in states} == set(gpu.PARTS)
    # every row says where it was measured
    bench = json.loads((out / "bench.json").read_text())
    tables = [gpu.read_table(out / name) for name in files if name.endswith(".csv")]
    for row in bench + sum(tables, []):
        assert row["card"] and row["torch"] and row["triton"] and row["commit"]
    assert train.Trainer is trainer
    before = contents(out)
    capsys.readouterr()
    assert rehearse(out) == 0
    assert " ..." not in capsys.readouterr().out            # no unit was begun
    assert before == contents(out)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.suffix != ".png"}


def test_units_have_names_of_their_own_and_cover_kinds_and_routers():
    every = {*KINDS, *ROUTERS} - {"moe"}
    for part in (gpu_check.units, gpu_models.compile_units, gpu_bench.units):
        names = [unit.name for unit in part(False, None)]
        assert len(set(names)) == len(names)
    assert every == {unit.name.removeprefix("model ") for unit in gpu_models.model_units(False)}
    compiled = {unit.name.split()[0].strip(",") for unit in gpu_models.compile_units(False, None)}
    refused = {name for name, router in ROUTERS.items() if not router.traits.compiles}
    assert every - compiled == refused


def test_every_experiment_has_its_place_in_the_order():
    names, folder = gpu_papers.order(), gpu.ROOT / "configs/papers"
    assert names[:2] == ["peer_experts", "peer_isoflop"] and set(gpu_papers.FIRST) <= set(names)
    assert sorted(names) == sorted(path.stem for path in folder.glob("*.toml"))


def test_a_wrong_path_is_found():
    """A result that lacks a row, and NaN in another."""
    def wrong(s, dtype):
        exact = gpu_check.draw(4, 4)
        zero, nan = exact.clone(), exact.clone()
        zero[1], nan[2, 2] = 0, float("nan")
        return ("zero", "nan", "fine"), [zero, nan, exact], [exact] * 3

    rows = gpu_check.check_kernel(wrong, gpu_check.TOY, torch.float32, 0)
    assert [row["held"] for row in rows] == [False, False, True]
    assert gpu.judge(rows)[0] == "failed"


# ---- failures, resuming, refusals ----

@pytest.fixture
def toys(monkeypatch):
    """Parts of units that note that they ran, and {name: what run does} of those that do more."""
    ran, special = [], {}

    def run(name, end):
        ran.append(name)
        return special.get(name, lambda: [dict(value=1)])()

    def units(part, toy, place):
        if part in special:
            special[part]()
        return [Unit(f"{part} {i}", partial(run, f"{part} {i}"), least=0) for i in range(2)]

    parts = {part: partial(units, part) for part in ("check", "compile", "train")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    return ran, special


def fail():
    raise ValueError("broken\nbeyond repair")


def test_what_fails_is_a_line_and_the_others_still_run(tmp_path, capsys, toys):
    ran, special = toys
    special["check 0"] = special["compile"] = fail
    wrong = dict(held=False, case="one", error=0.5, limit=0.1)
    special["train 0"] = lambda: [dict(held=True), wrong]
    assert rehearse(tmp_path) == 1
    assert ran == ["check 0", "check 1", "train 0", "train 1"]
    out = capsys.readouterr().out
    assert "failed: check/check 0: ValueError: broken beyond repair" in out
    assert "failed: compile/units: ValueError" in out
    assert "1 of 2 rows, first case one: error 5.0e-01 above 1e-01" in out
    # what failed is tried again, last; what held is not
    special.clear()
    ran.clear()
    assert rehearse(tmp_path) == 0
    assert ran == ["check 0", "compile 0", "compile 1", "train 0"]
    assert set(status_of(tmp_path).values()) == {"held"}


def test_only_and_what_the_time_did_not_allow(tmp_path, toys):
    ran, special = toys
    special["check 0"] = lambda: [dict(held=None)]
    assert rehearse(tmp_path, "--only", "check") == 3
    assert ran == ["check 0", "check 1"]
    assert status_of(tmp_path) == {"check/check 0": "left", "check/check 1": "held"}
    assert rehearse(tmp_path, "--minutes", "0") == 3
    assert len(ran) == 2                                    # nothing begins when no time is left
    special.clear()
    # a call that was killed leaves its unit as running
    gpu.put(Place(tmp_path, tmp_path), "check/check 0", state="running", since=0, limit=1)
    assert rehearse(tmp_path) == 0
    assert ran[2:] == ["check 0", "compile 0", "compile 1", "train 0", "train 1"]


def test_refusals(tmp_path, capsys, toys):
    (tmp_path / "file").write_text("")
    for words, why in ((["--rehearse", "--out", str(tmp_path / "file")], "must be a folder"),
                       (["--rehearse", "--out", str(tmp_path / "file/in")], "must be a folder"),
                       (["--rehearse", "--minutes", "-1"], "at least 0"),
                       (["--rehearse", "--only", "nothing"], "invalid choice")):
        with_status(words, 2)
        assert why in capsys.readouterr().err
    if not gpu.CUDA:
        with_status(["--out", str(tmp_path / "out")], 2)
        assert "no CUDA device" in capsys.readouterr().err
    place = Place(tmp_path, tmp_path)
    gpu.put(place, "check/x", state="held", card="another", call="", seconds=1)
    with_status(["--rehearse", "--out", str(tmp_path)], 2)
    assert "holds results of another" in capsys.readouterr().err


def with_status(words, status):
    try:
        assert gpu.main(words) == status
    except SystemExit as error:                             # argparse's own
        assert error.code == status


# ---- processes of a part's own ----

CHILD = """
import json, os, sys, time
path, what = sys.argv[1:]
status = json.load(open(path))
key = next((k for k, e in status.items() if e["call"] != "now"), None)
if key is None:
    sys.exit(0)
if what != "mute":
    status[key].update(state="running", call="now", since=time.time(),
                       limit=0.1 if what == "hang" else 60)
    json.dump(status, open(path + ".new", "w"))
    os.rename(path + ".new", path)
if what == "hang":
    time.sleep(60)
os._exit(9)
"""


@pytest.mark.parametrize("what,said", [("crash", "its process ended with status 9"),
                                       ("hang", "took longer than its limit"), ("mute", "")])
def test_a_process_that_crashes_or_hangs_costs_one_unit(tmp_path, toys, monkeypatch, what, said):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    place, end = Place(tmp_path, tmp_path), time.time() + 60
    gpu.watch("check", place, end, end, "now",
              [sys.executable, "-c", CHILD, str(tmp_path / "status.json"), what])
    entries = gpu.load(place)
    if what == "mute":                  # no unit was begun: the part itself is at fault
        assert entries["check/process"]["state"] == "failed"
        assert entries["check/check 0"]["state"] == "left"
    else:
        assert [entries[f"check/check {i}"]["said"] for i in (0, 1)] == [said] * 2
        assert set(status_of(tmp_path).values()) == {"failed"}


def test_a_process_ends_with_the_call(tmp_path, toys, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    place, start = Place(tmp_path, tmp_path), time.time()
    code = CHILD.replace("0.1", "60")
    gpu.watch("check", place, start + 1, start + 1, "now",
              [sys.executable, "-c", code, str(tmp_path / "status.json"), "hang"])
    assert time.time() - start < 20
    assert set(status_of(tmp_path).values()) == {"left"}


def test_papers_keep_their_tables_and_go_on_elsewhere(tmp_path, monkeypatch):
    """lab.experiment is replaced by a program that writes a run, or that waits for a signal."""
    def stub(folder, wait):
        code = ("import pathlib, signal, sys, time\n"
                "def stop(*_): sys.exit(1)\n"
                "signal.signal(signal.SIGTERM, stop)\n"
                "folder = pathlib.Path(sys.argv[1]); folder.mkdir(parents=True, exist_ok=True)\n"
                f"(folder / 'runs.csv').write_text('arm\\none\\n'); time.sleep({wait})")
        return [sys.executable, "-c", code, str(folder)]

    path, real = tmp_path / "papers.json", gpu_papers.subprocess.Popen
    monkeypatch.setattr(gpu_papers, "SAVING", 6)

    def popen(words, **more):
        return real(stub(Path(words[words.index("--out") + 1]) / "gpu", waits), **more)

    monkeypatch.setattr(gpu_papers.subprocess, "Popen", popen)
    for waits, held in ((0, True), (60, None)):
        rows = gpu_papers.run_experiment("toy", tmp_path / "one", path, [], time.time() + 8)
        assert rows == [dict(runs=1, held=held)]
    kept = json.loads(path.read_text())["toy"]
    assert kept["files"] == {"runs.csv": "arm\none\n"} and kept["card"] and kept["commit"]
    gpu_papers.unpack(tmp_path / "two", gpu_papers.read_kept(path))
    assert (tmp_path / "two/toy/gpu/runs.csv").read_text() == "arm\none\n"


def test_utilisation_is_its_formula(monkeypatch):
    monkeypatch.setattr(gpu_train, "where", lambda: dict(card="NVIDIA H100 80GB HBM3"))
    log = [dict(step=i, tokens_per_second=450_000.0, seconds=1.0, loss=5.0) for i in range(5)]
    found = dict(parameters=(2, 1), flops_per_token=250e6, peak_mib=1.0,
                 kernels=[["a", 1, 2.0], ["b", 1, 3.0]])
    row = gpu_train.row_of({}, found, log)
    assert row["utilisation"] == pytest.approx(3 * 250e6 * 450_000 / 989e12)
    assert row["kernel_ms"] == 5


def test_autotuning_is_told_apart_from_the_time(monkeypatch):
    calls = iter([50.0, 0.1])
    monkeypatch.setattr(measure, "first_call", lambda device, run: next(calls))
    one = measure.Contestant(lambda i: None, peer=True)
    seconds, _, note = measure.prepare(Machine("cpu", 1, 1, {}, 1.0), one)
    assert seconds <= 0.1 and note == "first call 50 s"


def test_a_table_that_the_time_cut_is_left(monkeypatch):
    rows = [dict(note="not measured: the time is over"), dict(note=None)]
    table = measure.Table("a", torch.float32, lambda: rows)
    monkeypatch.setattr(gpu_bench, "tables_of", lambda toy, machine: dict(moe=[table]))
    monkeypatch.setattr(gpu_bench, "this_machine", lambda toy: Machine("cpu", 1, 1, {}, 1.0))
    assert gpu.judge(gpu_bench.measure_table(True, "moe", 0, 0.0))[0] == "left"


def test_bench_tables_are_found_again_by_their_place():
    """What is listed with a stand-in for the machine is what is measured."""
    def listed(repeats):
        tables = gpu_bench.tables_of(False, Machine("cpu", 1, repeats, {}, 1.0))
        return [(name, t.title, t.dtype) for name, own in tables.items() for t in own]

    assert listed(1) == listed(2)


def test_other_packages_join_where_they_are_installed(monkeypatch):
    """Here they are not: what importing them raises is kept for their row."""
    monkeypatch.setattr(moe, "version_of", lambda package: "9.9")
    cpu, cuda = (moe.peers_of(gpu_bench.TOY_MOE, torch.float32, d) for d in ("cpu", "cuda"))
    assert list(cpu) == ["transformers 9.9"]
    assert list(cuda) == ["transformers 9.9", "liger-kernel 9.9"]
    if measure.version_of("liger-kernel") is None:
        assert isinstance(cuda["liger-kernel 9.9"].error, ImportError)
