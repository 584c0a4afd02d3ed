"""What a run computes with: device, arithmetic, compiler."""
import contextlib
import functools
import os

import torch

from runtime import parallel
from runtime.report import TrainingError
from settings import ConfigError


def pick_device(name, option="--device"):
    """A device that is there; auto takes the fastest. Raises ConfigError."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(d for d, ok in there.items() if ok) if name == "auto" else name
    if not there[name]:
        raise ConfigError(f"{option} {name} is not available here; use auto or cpu")
    return name


def resolve_device(name):
    """torch.device of train.device, for this process. Raises ConfigError if there is none."""
    return parallel.own(torch.device(pick_device(name, "train.device =")))


def resolve_dtype(name, device):
    """(dtype, reason) of train.dtype. auto is one rule for all machines, so that a config means the same
    everywhere: bfloat16 on CUDA, where it is several times faster; float32 on CPU, where few processors have
    it, and on MPS."""
    if name != "auto":
        slow = name == "bfloat16" and device.type == "cpu" and not any(
            getattr(torch.cpu, has, bool)() for has in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return name, "as configured" + ("; this processor emulates it, which is slow" if slow else "")
    name = "bfloat16" if device.type == "cuda" else "float32"
    return name, f"auto: {name} on {device.type}"


def resolve_compile(config, device, why_not):
    """(whether to torch.compile, reason); why_not: what the layers have against it, or an empty text. Raises
    ConfigError where it is asked for and cannot be."""
    mode = config.train.compile
    if parallel.sharded(config):
        why_not = "fsdp, which frees parameters between blocks"
    if why_not and mode == "on":
        raise ConfigError(f"train.compile = \"on\" cannot be with {why_not}; use \"auto\" or \"off\"")
    if mode != "auto":
        return mode == "on", "as configured"
    if why_not:
        return False, f"auto: not with {why_not}"
    return device.type == "cuda", "auto: CUDA" if device.type == "cuda" else "auto: it pays on CUDA only"


def compile_forward(trainer, say):
    """Makes a Trainer call its model compiled. A failure shows in the first step: see go_on_uncompiled."""
    trainer.say = say
    trainer.forward = torch.compile(trainer.whole_forward, dynamic=False)
    trainer.past.compile()


def go_on_uncompiled(trainer, error):
    """After a failure of the compiler: TrainingError if compiling was asked for, else a warning."""
    why = str(error).strip().split("\n")[0]
    if trainer.config.train.compile == "on":
        raise TrainingError(f"train.compile = \"on\", but torch.compile failed: {why}") from None
    trainer.say(f"warning: torch.compile failed, training goes on uncompiled: {why}")
    trainer.forward = trainer.whole_forward
    trainer.past.compile(False)
    trainer.zero_grad()


def precision(device, dtype):
    """Context in which forward and backward run: autocast for bfloat16, nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


def as_trained(model):
    """Context in which a model computes as in its own training's evaluation."""
    return precision(next(model.parameters()).device, model.config.train.dtype)


# ---- threads, of what is sampled: a step of training adds up its numbers in an order that depends on theirs


SMALL = 1e8             # FLOPs of a step below which a second thread costs more than it takes over


def choose_threads(asked, flops, device):
    """Sets how many threads compute steps of this many FLOPs, and returns that as text: `asked`, or where that
    is 0 one for small steps on a CPU; else, and with OMP_NUM_THREADS set, torch's own number."""
    small = device == "cpu" and flops < SMALL and not os.environ.get("OMP_NUM_THREADS")
    if asked or small:
        torch.set_num_threads(asked or 1)
    n = torch.get_num_threads()
    return f"{n} thread{'s' if n > 1 else ''}"


def own_threads(run):
    """A function that may choose its number of threads; afterwards it is as before."""
    @functools.wraps(run)
    def restored(*args):
        before = torch.get_num_threads()
        try:
            return run(*args)
        finally:
            torch.set_num_threads(before)
    return restored
