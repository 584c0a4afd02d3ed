"""What a run computes with: device, arithmetic, compiler."""
import contextlib
import functools
import os
import shutil

import torch

from runtime import parallel
from runtime.graph import Graphs, resolve_graph
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


def resolve_compile(config, device, model, steps, graph):
    """(whether to torch.compile, reason) for so many steps that are left; graph: they are captured. Raises
    ConfigError where it is asked for and cannot be."""
    mode, why_not = config.train.compile, model.not_compiled()
    if parallel.sharded(config) and not why_not:
        why_not = "fsdp, which frees parameters between blocks"
    if why_not and mode == "on":
        raise ConfigError(f"train.compile = \"on\" cannot be with {why_not}; use \"auto\" or \"off\"")
    if mode != "auto":
        return mode == "on", "as configured"
    if device.type not in COMPILING:
        return False, f"auto: not on {device.type}"
    if device.type == "cpu" and model.sparse:
        return False, "auto: on a CPU it makes experts slower"
    if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        return False, "auto: it needs a C++ compiler"
    if why_not:
        return False, f"auto: not with {why_not}"
    # On a CPU all steps of the run count: a run that goes on computes as it did, to the last bit.
    steps = config.train.max_steps if device.type == "cpu" else steps
    costs, saves = compiling(config, device.type, model, steps, graph)
    return saves > costs, f"auto: costs some {costs:.0f} s, saves some {saves:.0f} s"


# What compiling does, (seconds it costs a layer, share of a step that it saves, FLOPs a second of a step that
# is not compiled, seconds that a layer of one takes at least, captured and not). CUDA: one H100, bfloat16; a
# CPU: two cores, dense layers, float32.
COMPILING = {"cuda": (10, 0.4, 1.7e14, 5e-4, 5e-3), "cpu": (12, 0.2, 9e10, 0, 0)}


def compiling(config, device, model, steps, graph):
    """(seconds that compiling costs, seconds that it saves in so many steps), both estimated."""
    cost, share, speed, captured, launched = COMPILING[device]
    tokens, layers = config.train.batch_size * config.model.block_size, config.model.n_layer
    # forward and backward are three times the forward pass
    step = max(3 * model.flops_per_token() * tokens / speed, layers * (captured if graph else launched))
    return cost * layers, share * step * steps


def speed_up(trainer, say):
    """Makes a Trainer compute as its config asks: compiled, captured. Returns that as text. A failure of either
    shows in the first steps: see go_on_uncompiled, go_on_uncaptured. Raises ConfigError."""
    config, device, model = trainer.config, trainer.device, trainer.model
    trainer.say = say
    why_not = ""
    if device.type == "cuda":
        try:
            why_not = model.not_captured(getattr(torch, config.train.dtype))
        except ValueError as e:                     # a dispatch that cannot run at all
            raise ConfigError(str(e)) from None
    graph, why_graph = resolve_graph(config, device, why_not)
    if graph:
        trainer.graphs = Graphs(device, functools.partial(go_on_uncaptured, trainer))
    left = config.train.max_steps - trainer.done
    compiled, why = resolve_compile(config, device, model, left, graph)
    if compiled:
        compile_forward(trainer)
    text = f"compile {'on' if compiled else 'off'} ({why})"
    return text + (f", graph {'on' if graph else 'off'} ({why_graph})" if device.type == "cuda" else "")


def compile_forward(trainer):
    """Makes a Trainer call its model compiled."""
    trainer.forward = torch.compile(trainer.whole_forward, dynamic=False)
    trainer.past.compile()


def go_on_uncaptured(trainer, why):
    """After a failure of the capture: TrainingError if it was asked for, else a warning."""
    if trainer.config.train.graph == "on":
        raise TrainingError(f"train.graph = \"on\", but the step cannot be captured: {why}") from None
    trainer.say(f"warning: the step cannot be captured, training goes on without a CUDA graph: {why}")


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
