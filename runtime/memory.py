"""How much memory a run needs at least, and how much there is."""
import contextlib
import math
import os
import re
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from runtime import parallel
from settings import ConfigError

SMALLER = "make the model ([model], [ffn]) or train.batch_size smaller"


def machine():
    """Bytes of memory and swap that this machine gives, inf where it does not tell. A container's limit
    counts as well."""
    there = math.inf
    with contextlib.suppress(OSError, ValueError, AttributeError):          # Windows has no sysconf
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, TypeError):
        there += 1024 * int(re.search(r"SwapTotal:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    with contextlib.suppress(OSError, ValueError):                          # ValueError: "max", no limit
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return there


def memory_of(device):
    """Bytes of memory of a torch.device."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else machine()


def needed(config, params):
    """(bytes, what for) that one process needs at least: its parameters, and its part of a batch."""
    m, t, held = config.model, config.train, config.lifelong
    # weights; gradients and AdamW's two averages of what learns; float32
    some_learn = held.freeze or held.lora_rank
    weights = params * (4 if some_learn else 16) / (parallel.world() if parallel.sharded(config) else 1)
    # tokens and targets; what each layer passes on, kept for the backward pass, in bfloat16 at least
    rows = t.batch_size / parallel.world() * m.block_size
    batch = 16 * rows + rows / t.grad_accum * m.n_embd * (m.n_layer + 1) * 2
    return weights + batch, (f"{size(weights)} for {params:,} parameters{'' if some_learn else ' and AdamW'}, "
                             f"{size(batch)} for a batch of {t.batch_size} x {m.block_size} tokens")


def check(config, device, build):
    """Raises ConfigError for a model and a batch that no memory holds. build(config): the model, made here
    without memory (on the device meta)."""
    try:
        with torch.device("meta"):
            params = sum(p.numel() for p in build(config).parameters())
    except (RuntimeError, TypeError, OverflowError, MemoryError):           # a size beyond 64 bits
        params = math.inf
    if params == math.inf:
        raise ConfigError(f"a tensor of this model is larger than any memory; {SMALLER}")
    there, (bytes, what) = memory_of(device), needed(config, params)
    if bytes > there:
        raise ConfigError(f"not enough memory on {device}: training needs at least {size(bytes)} ({what}), "
                          f"there are {size(there)}; {SMALLER}")


def check_texts(model, num, device):
    """Raises ConfigError for more texts at once than memory holds: each has a cache of block_size positions."""
    one = sum(t.numel() * t.element_size() for t in tree_leaves(model.new_cache(1).states))
    bytes, there = num * one, memory_of(torch.device(device))
    if bytes > there:
        raise ConfigError(f"--num {num}: these texts need at least {size(bytes)} of memory, there are "
                          f"{size(there)}")


def shortage(error):
    """What to tell of an error if it means that memory ran out, else an empty text."""
    text = str(error).partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):               # of a GPU, with what there is
        return f"{'. '.join(text.split('. ')[:3])}; {SMALLER}"
    if not isinstance(error, MemoryError) and "allocate memory" not in text:
        return ""
    wanted = re.search(r"allocate (\d+) bytes", text)
    more = f": {size(int(wanted[1]))} more were wanted" if wanted else ""
    return f"not enough memory{more}, this machine has {size(machine())}; {SMALLER}"


def size(bytes):
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB", "TB", "PB"):
        if bytes < 1000:
            return f"{bytes:.4g} {unit}"
        bytes /= 1000
    return f"{bytes:.4g} EB"
