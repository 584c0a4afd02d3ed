"""CUDA graphs: work that is launched again and again with the same shapes, recorded once.

A small model's step is some hundred launches, which take the host longer than the card. A graph is
one launch. It reads and writes the memory that it was recorded with, so that its inputs are copied
into tensors of its own, and its results are overwritten by the next replay. It draws what the
uncaptured function would: a replay reads the seed of the generator anew.
"""
import gc

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from runtime import parallel
from runtime.ending import tell
from settings import ConfigError

WARM = 3                # rounds before recording: kernels are compiled and optimizer state made in them


class Calls:
    """Runs functions of tensors as they are: Graphs where there are none."""

    def __init__(self, device):
        self.device = device

    def begin(self):
        """A new round."""

    def run(self, name, function, *inputs):
        """function(*inputs), on the device."""
        return function(*(x.to(self.device, non_blocking=True) for x in inputs))

    kept = run


class Graphs(Calls):
    """Runs functions of tensors, each under a name, as CUDA graphs. In every round (begin) the same
    names come in the same order. failed(error) is told if recording fails; then all goes on as it
    is."""

    def __init__(self, device, failed):
        self.device, self.failed, self.rounds = device, failed, 0
        # one stream for all that is recorded, and one pool, so that graphs share their memory
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.recorded = {}              # name -> (graph, its inputs, its results)

    def begin(self):
        self.rounds += 1
        if self.rounds == WARM + 1:     # what the rounds before left in the allocator is in the way
            gc.collect()
            torch.cuda.empty_cache()

    def run(self, name, function, *inputs):
        """function(*inputs). Its results are those of this round alone: the next replay overwrites
        them."""
        if self.rounds <= WARM or self.failed is None:
            return self.aside(function, [x.to(self.device, non_blocking=True) for x in inputs])
        if name not in self.recorded:
            own = [x.to(self.device, copy=True) for x in inputs]
            try:
                self.recorded[name] = self.record(function, own)
            except RuntimeError as e:   # out of memory too
                self.give_up(e)
                return self.aside(function, own)
        graph, own, results = self.recorded[name]
        for mine, x in zip(own, inputs):
            mine.copy_(x, non_blocking=True)
        graph.replay()
        return results

    def kept(self, name, function, *inputs):
        """The same of a function that gives a tree of float32 tensors, to keep."""
        return copied(self.run(name, function, *inputs))

    def aside(self, function, inputs):
        """Calls the function on the stream of the graphs: what autograd remembers belongs there."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            results = function(*inputs)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return results

    def record(self, function, inputs):
        """(graph, inputs, results) of a function; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            results = function(*inputs)
        return graph, inputs, results

    def give_up(self, error):
        """From now on nothing is recorded or replayed."""
        failed, self.failed = self.failed, None
        failed(str(error).strip().split("\n")[0])


class Decoding:
    """Reads a text token by token, each token as a CUDA graph. model: a GPT in evaluation mode."""

    def __init__(self, model, batch_size):
        self.model, self.cache = model, model.new_cache(batch_size)
        device = model.embedding.weight.device
        self.length = torch.zeros(1, dtype=torch.long, device=device)
        self.graphs = Graphs(device, lambda why: tell(
            f"note: a token cannot be a CUDA graph, the text comes slower: {why}"))

    def begin(self, ids):
        """Output of a text's first tokens (B, T), whatever was read before."""
        for state in tree_leaves(self.cache.states):
            state.zero_()
        self.cache.length = 0
        out = self.model(ids, cache=self.cache)
        self.length.fill_(self.cache.length)
        self.cache.length = self.length
        return out

    def read(self, ids):
        """Output of the next token (B, 1); it is overwritten by the one after."""
        self.graphs.begin()
        return self.graphs.run("token", self.token, ids)

    def token(self, ids):
        return self.model(ids, cache=self.cache)


def copied(tree):
    """A copy of a tree of float32 tensors, in two launches however many they are: results that
    outlive their round."""
    leaves, spec = tree_flatten(tree)
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    parts = iter(torch.cat([x.reshape(-1) for x in tensors]).split([x.numel() for x in tensors]))
    leaves = [next(parts).view(x.shape) if isinstance(x, torch.Tensor) else x for x in leaves]
    return tree_unflatten(leaves, spec)


def resolve_graph(config, device, why_not):
    """(whether the step is captured, reason) of train.graph; why_not: what the layers have against
    it, or an empty text. Raises ConfigError where it is asked for and cannot be."""
    mode = config.train.graph
    if device.type != "cuda":
        why_not = f"{device.type} has none"
    elif parallel.world() > 1:
        why_not = "not with several processes"
    elif why_not:
        why_not = f"not with {why_not}"
    if why_not and mode == "on":
        raise ConfigError(f"train.graph = \"on\" cannot be: {why_not}; use \"auto\" or \"off\"")
    if mode != "auto":
        return mode == "on", "as configured"
    return not why_not, f"auto: {why_not or device.type}"
