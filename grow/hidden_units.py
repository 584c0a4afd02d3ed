"""A feed-forward layer as a set of hidden units, and models that are put together from such sets.

The layer is a sum over its hidden units, w_out[:, u] act(w_in[u] x). Their order means nothing, and
any set of them is a smaller layer. So an expert is a row in a table of unit numbers (E, w):
copies of one dense layer (sparse upcycling), slices of shuffled copies (Qwen2), the layers of
several branches one after the other (Branch-Train-MiX), parts of these (split), or a part of each
of them in every expert (blend).

Axis letters: E experts, w hidden units of one, U units in all, d width of the model.
"""
import torch

from ffn import Dense
from model import GPT, sparse_layers
from settings import ConfigError


def hidden_units(ffn):
    """The hidden units of a dense layer, or of all experts one after the other: their rows of the
    first matrix (U, 1 or 2, d), 2 where SwiGLU has gate and up, and their columns of the second
    (U, d)."""
    if isinstance(ffn, Dense):
        w_in, w_out = ffn.mlp.w_in.weight.unsqueeze(0), ffn.mlp.w_out.weight.unsqueeze(0)
    else:
        w_in, w_out = ffn.experts.w_in, ffn.experts.w_out           # (E, w or 2w, d), (E, d, w)
    E, d, w = w_out.shape
    # swiglu stacks [gate | up]: the two rows of one unit lie w rows apart
    rows = w_in.view(E, -1, w, d).transpose(1, 2)                   # (E, w, 1 or 2, d)
    return rows.reshape(E * w, -1, d), w_out.transpose(1, 2).reshape(E * w, d)


def from_units(units, table):
    """The units that each row of a table (E, w) names, as expert matrices (E, w or 2w, d) and
    (E, d, w)."""
    rows, columns = (part[table] for part in units)                 # (E, w, 1 or 2, d), (E, w, d)
    return rows.transpose(1, 2).flatten(1, 2), columns.transpose(1, 2)


def slices(width, E, w, generator=None):
    """Table (E, w), cut from as many copies of a layer of `width` units as that takes. With a
    generator each copy is shuffled before the cut (Qwen2 2407.10671 sec. 2.2.2). w = width: whole
    copies (Komatsuzaki 2212.05055)."""
    n_copies = -(-E * w // width)                                   # E w / width, rounded up
    if generator is None:
        copies = [torch.arange(width)] * n_copies
    else:
        copies = [torch.randperm(width, generator=generator) for _ in range(n_copies)]
    # units that are left over at the end of the last copy belong to no expert
    return torch.cat(copies)[:E * w].view(E, w)


def blended(n_branch, width):
    """Table (n_branch, width): expert j holds the j-th part of every branch's layer (BTX 2403.07816
    sec. 3.3)."""
    units = torch.arange(n_branch * width).view(n_branch, n_branch, -1)     # (branch, part, unit)
    return units.transpose(0, 1).reshape(n_branch, width)


def average(tensors, weights=None):
    """Weighted mean of tensors of one shape; weights sum to 1 (None: uniform). Whole numbers (a
    hash table) have no mean: raises ConfigError unless they are equal."""
    if not tensors[0].is_floating_point():
        if any(not torch.equal(t, tensors[0]) for t in tensors):
            raise ConfigError("the runs have different hash tables, of which there is no average")
        return tensors[0]
    weights = weights or [1 / len(tensors)] * len(tensors)
    # in float64, so that the mean of equal tensors is that tensor to the last bit
    return sum(w * t.double() for w, t in zip(weights, tensors)).to(tensors[0].dtype)


@torch.no_grad()
def put_together(config, parents, make_table, seed, reinit=0.0, generator=None):
    """A model of this Config whose experts hold the hidden units of the parents. make_table() gives
    the table (E, w) of one layer; it is called once a layer, so that it can draw each anew.
    reinit: the share of every expert's numbers that are drawn instead of copied."""
    # the model as its seed draws it: router, shared gate and output norm stay like this
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(config).eval()
    # all that the parents have outside the experts: their averages (BTX 2403.07816 sec. 3.2)
    states = [p.model.state_dict() for p in parents]
    for name, tensor in model.state_dict().items():
        if name in states[0] and ".ffn.router." not in name and ".ffn.experts." not in name:
            tensor.copy_(average([state[name] for state in states]))
    # experts: the units of all parents in one row, dealt out by the table
    for layer in sparse_layers(config):
        experts = model.blocks[layer].ffn.experts
        of_each = [hidden_units(p.model.blocks[layer].ffn) for p in parents]
        units = [torch.cat(part) for part in zip(*of_each)]         # (U, 1 or 2, d), (U, d)
        for mine, given in zip((experts.w_in, experts.w_out), from_units(units, make_table())):
            # Qwen2 sec. 2.2.2: some numbers of every expert stay as the new model drew them
            if reinit:
                drawn = torch.rand(given.shape, generator=generator) < reinit
                given = torch.where(drawn, mine, given)
            mine.copy_(given)
    return model
