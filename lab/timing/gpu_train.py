"""Part `train` of lab/gpu.py: runs of train.py as a user starts them, watched.

    python -m lab.timing.gpu_train FILE.json WORDS ...

is `python train.py WORDS ...`, and writes to FILE.json what log.csv does not tell: the peak memory
of the training steps, and the kernels of the last step by name, from torch.profiler.
"""
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial

import torch

import train
from lab.bench import CONFIGS, E2_M4, GPT_124M
from lab.papers.arms import ROOT
from lab.papers.speed import peak_mib
from lab.papers.tables import read_table
from lab.timing.gpu_unit import CUDA, Unit, where
from runtime.checkpoint import write_text

# bfloat16 FLOP/s of the data sheet, dense matrices
PEAK = {"H100": 989e12, "H200": 989e12}
FORMULA = "3 * forward FLOPs a token * tokens/s / FLOP/s of the data sheet"
# Corpora python and docs come from the Python of the machine; this one is generated.
COMMON = {"data.name": "markov", "train.eval_every": 0, "train.eval_batches": 1,
          "train.sample_every": 0, "train.sample_tokens": 0, "train.keep": "last"}
# 120 steps are too few for compile = auto, but it is the speed of long runs that is asked for.
LARGE = GPT_124M | {"train.max_steps": 120, "train.warmup_steps": 20, "train.lr": 6e-4,
                    "train.compile": "on"}
RUNS = {"moe 124M": ("empty", LARGE | E2_M4),
        "dense 124M": ("empty", LARGE | {"ffn.kind": "dense"}),
        "quick.toml": ("quick", {"train.max_steps": 600}),
        "dense.toml": ("dense", {"train.max_steps": 600}),
        "quick.toml uncaptured": ("quick", {"train.max_steps": 600, "train.graph": "off"}),
        "quick.toml compiled": ("quick", {"train.max_steps": 600, "train.compile": "on"})}
TOY = {"train.max_steps": 4, "train.batch_size": 2, "model.n_layer": 1, "model.n_embd": 16,
       "model.block_size": 16, "model.n_head": 2, "ffn.d_ff": 16, "train.warmup_steps": 1,
       "train.device": "cpu"}


class Watched(train.Trainer):
    """A Trainer that notes the peak of its steps and profiles the last one."""
    found = {}

    def step(self):
        if self.done == 0 and CUDA:
            torch.cuda.reset_peak_memory_stats()
        if self.done < self.config.train.max_steps - 1:
            return super().step()
        Watched.found = dict(peak_mib=peak_mib(self.device), parameters=self.model.num_params(),
                             flops_per_token=self.model.flops_per_token())
        with torch.profiler.profile() as profile:
            row = super().step()
            if CUDA:
                torch.cuda.synchronize()
        Watched.found["kernels"] = kernels_of(profile)
        return row


def kernels_of(profile):
    """The 60 longest kernels, on a CPU operators: [name, calls, ms]."""
    device = "CUDA" if CUDA else "CPU"
    # Annotations, such as that of the optimizer, span kernels that are listed too.
    events = [e for e in profile.key_averages() if e.device_type.name == device
              and not getattr(e, "is_user_annotation", False)]
    time_of = lambda e: e.self_device_time_total if CUDA else e.self_cpu_time_total   # noqa: E731
    events.sort(key=time_of, reverse=True)
    return [[e.key[:160], e.count, time_of(e) / 1e3] for e in events[:60]]


def main(argv):
    path, *words = argv
    before, train.Trainer = train.Trainer, Watched
    try:
        status = train.main(words)
    finally:
        train.Trainer = before
    write_text(path, json.dumps(Watched.found))
    return status


# ---- the units ----

def words_of(folder, config, settings):
    """The words of the command line; `empty` is a config that sets nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    path = CONFIGS / f"{config}.toml"
    if config == "empty":
        path = folder / "empty.toml"
        path.write_text("")
    return [str(path), "--out", str(folder / "run"), "--quiet",
            *(f"--{key}={value}" for key, value in settings.items())]


def measure_run(folder, config, settings, toy, end):
    """A row: speed, utilisation, memory, and the kernels of one step."""
    shutil.rmtree(folder, ignore_errors=True)
    words = [str(folder / "found.json"), *words_of(folder, config, settings)]
    try:
        if toy:
            status = main(words)
        else:
            command = [sys.executable, "-m", "lab.timing.gpu_train", *words]
            status = subprocess.run(command, cwd=ROOT, timeout=end - time.time()).returncode
        if status:
            raise RuntimeError(f"train.py ended with status {status}")
        found = json.loads((folder / "found.json").read_text())
        return [row_of(settings, found, read_table(folder / "run" / "log.csv"))]
    except subprocess.TimeoutExpired:
        return [dict(held=None)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)       # checkpoints of gigabytes


def row_of(settings, found, log):
    steps = [row for row in log if row["step"]]
    # The second half: compiling is over. The last step was profiled, hence the median.
    speed = statistics.median(row["tokens_per_second"] for row in steps[len(steps) // 2:])
    flops = 3 * found["flops_per_token"] * speed
    peak = next((value for name, value in PEAK.items() if name in where()["card"]), None)
    total, active = found["parameters"]
    return dict(tokens_per_second=speed, utilisation=flops / peak if peak else None,
                formula=FORMULA, peak_flops=peak, flops_per_token=found["flops_per_token"],
                total_params=total, active_params=active, peak_mib=found["peak_mib"],
                steps=len(steps), seconds=steps[-1]["seconds"], first_loss=steps[0]["loss"],
                last_loss=steps[-1]["loss"], settings=json.dumps(settings),
                kernel_ms=sum(ms for _, _, ms in found["kernels"]), kernels=found["kernels"],
                held=math.isfinite(steps[-1]["loss"]) and steps[-1]["loss"] < steps[0]["loss"] + 1)


def units(toy, place):
    if toy:
        place.scratch.mkdir(parents=True, exist_ok=True)
        text = place.scratch / "toy.txt"
        text.write_text("one and two are three, " * 200)
        settings = COMMON | TOY | {"data.name": text, "data.dir": place.scratch / "prepared"}
        settings = {key: str(value) for key, value in settings.items()}
        return [Unit("toy", partial(measure_run, place.scratch / "train", "quick", settings, True))]
    return [Unit(name, partial(measure_run, place.scratch / "train" / str(i), config,
                               COMMON | settings, False), least=60, limit=280)
            for i, (name, (config, settings)) in enumerate(RUNS.items())]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
