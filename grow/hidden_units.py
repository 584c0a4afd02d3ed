"""A feed-forward layer as a set of hidden units, and models that are put together from such sets.

The layer is a sum over its hidden units, w_out[:, u] act(w_in[u] x): their order means nothing, and any set
of them is a smaller layer. So an expert is a row in a table of unit numbers (E, n): copies of one dense layer
(sparse upcycling), slices of shuffled copies (Qwen2), the layers of several branches one after the other
(Branch-Train-MiX), parts of these (split), or a part of each of them in every expert (blend).

Axis letters: E experts, n hidden units of one, U units in all, d width of the model.
"""
import torch

from ffn import Dense
from model import GPT, sparse_layers
from settings import ConfigError


def hidden_units(ffn):
    """The hidden units of a dense layer, or of all experts one after the other: their rows of the first
    matrix, (U, 1 or 2, d), gate and up of a SwiGLU unit together, and their columns of the second, (U, d)."""
    if isinstance(ffn, Dense):
        w_in, w_out = ffn.mlp.w_in.weight.unsqueeze(0), ffn.mlp.w_out.weight.unsqueeze(0)
    else:
        w_in, w_out = ffn.experts.w_in, ffn.experts.w_out                   # (E, n or 2n, d), (E, d, n)
    E, d, n = w_out.shape
    rows = w_in.view(E, -1, n, d).transpose(1, 2)                           # (E, n, 1 or 2, d)
    return rows.reshape(E * n, -1, d), w_out.transpose(1, 2).reshape(E * n, d)


def from_units(units, table):
    """The units that each row of a table (E, n) names, as expert matrices (E, n or 2n, d) and (E, d, n)."""
    rows, columns = (part[table] for part in units)                         # (E, n, 1 or 2, d), (E, n, d)
    return rows.transpose(1, 2).flatten(1, 2), columns.transpose(1, 2)


def slices(width, n_expert, n, generator=None):
    """Table (n_expert, n) cut from as many copies of a layer of `width` units as that takes; with a generator
    each copy is shuffled first (Qwen2 sec. 2.2.2). n = width: whole copies (Komatsuzaki)."""
    copies = [torch.arange(width) if generator is None else torch.randperm(width, generator=generator)
              for _ in range(-(-n_expert * n // width))]
    return torch.cat(copies)[:n_expert * n].view(n_expert, n)


def blended(n_branch, width):
    """Table (n_branch, width): expert j holds the j-th part of every branch's layer."""
    units = torch.arange(n_branch * width).view(n_branch, n_branch, -1)     # (branch, part, width / n_branch)
    return units.transpose(0, 1).reshape(n_branch, width)


def average(tensors, weights=None):
    """Weighted mean (None: uniform) in float64, so that the mean of equal tensors is that tensor. Whole
    numbers (a hash table) have no mean: raises ConfigError unless they are equal."""
    if not tensors[0].is_floating_point():
        if any(not torch.equal(t, tensors[0]) for t in tensors):
            raise ConfigError("the runs have different hash tables, of which there is no average")
        return tensors[0]
    weights = weights or [1 / len(tensors)] * len(tensors)
    return sum(w * t.double() for w, t in zip(weights, tensors)).to(tensors[0].dtype)


@torch.no_grad()
def put_together(config, parents, make_table, seed, reinit=0.0, generator=None):
    """A model whose experts hold the parents' hidden units as make_table() -> (E, n) deals them out in each
    layer, and whose other weights are the parents' averages. What no parent has (router, shared gate, output
    norm) and a share `reinit` of every expert's numbers stay as a new model draws them with this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(config).eval()
    states = [p.model.state_dict() for p in parents]
    for name, tensor in model.state_dict().items():
        if name in states[0] and ".ffn.router." not in name and ".ffn.experts." not in name:
            tensor.copy_(average([state[name] for state in states]))
    for layer in sparse_layers(config):
        experts = model.blocks[layer].ffn.experts
        units = [torch.cat(part) for part in zip(*(hidden_units(p.model.blocks[layer].ffn) for p in parents))]
        for mine, given in zip((experts.w_in, experts.w_out), from_units(units, make_table())):
            if reinit:
                given = torch.where(torch.rand(given.shape, generator=generator) < reinit, mine, given)
            mine.copy_(given)
    return model
