"""Part `papers` of lab/gpu.py: the gpu sizes of configs/papers, resumable run by run.

The order of value: first what a CPU cannot show, a million experts, and the two papers on
granularity whose effects grow with the model; then what decides on dispatch and capacity; then
starts from trained weights; last the experiments on `python` and `docs`, whose text comes from the
Python of the machine, so that their losses compare within one machine alone. All others read
generated corpora.
"""
import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from functools import partial

from lab import experiment
from lab.papers.arms import ROOT
from lab.timing.gpu_unit import Unit, where
from runtime.checkpoint import write_text

FIRST = ["peer_experts", "peer_isoflop", "fine_grained", "deepseek_moe", "peer_active",
         "switch_capacity", "shazeer_capacity", "peer_batchnorm", "upcycling", "qwen2_upcycle",
         "routers", "loss_free_balance", "mixtral", "deepseek_v2_groups"]
DOWNLOADED = {"real_routing"}           # needs folders that only a user can download
KEPT = ["runs.csv", "curves.csv", "routing.csv", "verdict.md"]
SAVING = 30             # seconds that the runs get to save themselves at the end


def order():
    names = [path.stem for path in (ROOT / "configs/papers").glob("*.toml")]
    return [name for name in FIRST if name in names] + sorted(set(names) - set(FIRST))


def command(name, results, *more):
    """The words after `python -m lab.experiment`."""
    return [str(ROOT / f"configs/papers/{name}.toml"), "--size", "gpu", "--out",
            str(results / name), "--quiet", *more]


def unpack(results, kept):
    """Writes the tables of papers.json into the results where there are none: a fresh machine goes
    on where another was."""
    for name, entry in kept.items():
        folder = results / name / "gpu"
        if not (folder / "runs.csv").exists():
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in entry["files"].items():
                write_text(folder / file, text)


def read_kept(path):
    """papers.json: {name of the experiment: {where it was measured, files: {name: text}}}."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def run_experiment(name, results, path, seeds, end):
    """Runs what is missing of an experiment until the end, and keeps its tables in papers.json."""
    before = read_kept(path)
    unpack(results, before)
    words = [sys.executable, "-m", "lab.experiment", *command(name, results, *seeds)]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    stopped, said = False, ""
    try:
        _, said = process.communicate(timeout=max(1, end - SAVING - time.time()))
    except subprocess.TimeoutExpired:
        stopped = True
        process.send_signal(signal.SIGTERM)
        try:
            _, said = process.communicate(timeout=SAVING - 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    folder = results / name / "gpu"
    texts = {file: (folder / file).read_text(encoding="utf-8") for file in KEPT
             if (folder / file).exists()}
    if texts:
        write_text(path, json.dumps(before | {name: where() | dict(files=texts)}, indent=1))
    if process.returncode and not stopped:
        raise RuntimeError(last_line(said) or f"lab.experiment ended with {process.returncode}")
    runs = max(0, texts.get("runs.csv", "").count("\n") - 1)
    return [dict(runs=runs, held=None if stopped else True)]


def last_line(text):
    return text.strip().split("\n")[-1].removeprefix("error: ")


def list_experiment(name, results, end):
    """A rehearsal: the file expands at size gpu."""
    with contextlib.redirect_stdout(io.StringIO()):
        status = experiment.main([*command(name, results), "--list"])
    if status:
        raise RuntimeError(f"{name}: --list failed")
    return [dict(runs=0)]


def units(toy, place):
    """One seed of everything first, then all seeds."""
    if toy:
        return [Unit(name, partial(list_experiment, name, place.scratch)) for name in order()[:2]]
    results, path = ROOT / "results", place.out / "papers.json"
    unpack(results, read_kept(path))
    return [Unit(f"{name}, {says}", partial(run_experiment, name, results, path, seeds), least=90,
                 limit=3600)
            for says, seeds in (("one seed", ["--seeds", "1"]), ("all seeds", []))
            for name in order() if name not in DOWNLOADED]
