"""What the first, the middle and the last layer of a mixture of experts go by: the neighbour, the
corpus or the token itself. These are the questions of Mixtral (2401.04088 sec. 5) and OLMoE
(2409.02060 sec. 5). A probe, as in lab/papers/probes.py.

Letters: S sequences of all batches, T positions, E experts, C corpora; k choices per token, the one
of the largest weight first.
"""
import torch

from lab.papers.inside import corpora_of, shuffled
from runtime.device import precision

SEEN = 8                # times that a token must occur to have a favourite expert
DRAWS = 8               # of shuffled experts


def choices(model, batches, layers, device, dtype):
    """(tokens (S, T), corpus of each sequence (S,), {layer: experts (S, T, k)}) of these layers;
    none of a layer in which tokens do not choose."""
    tokens, labels, found = [], [], {layer: [] for layer in layers}
    for x, _, domain, _, corpus in batches:
        with precision(device, dtype):
            stats = model(x.to(device), domain=domain.to(device)).stats
        tokens.append(x)
        labels += [corpora_of(batches).index(corpus)] * len(x)
        for layer in layers:
            if stats[layer].routing is not None and stats[layer].routing.k:
                experts, weights = stats[layer].routing.by_token()
                order = weights.argsort(dim=1, descending=True, stable=True)
                found[layer].append(experts.gather(1, order).view(*x.shape, -1).cpu())
    return torch.cat(tokens), torch.tensor(labels), {
        layer: torch.cat(parts) for layer, parts in found.items() if parts}


def squares(values):
    """The sum of the squares of how often each value occurs, a share of all."""
    counts = torch.bincount(values.flatten()).double()
    return (counts / counts.sum()).square().sum().item()


def repeated(chosen, E):
    """(share of the neighbours that have an expert in common, the same of two tokens drawn at
    random); chosen (S, T, n): the n = 1 or 2 experts of each token."""
    a, b = chosen[:, 1:].unsqueeze(-1), chosen[:, :-1].unsqueeze(-2)
    share = (a == b).flatten(2).any(-1).double().mean().item()
    # n^2 sum_e s_e^2 experts are in common on average, which counts twice who has both in common
    n = chosen.shape[-1]
    chance = n * n * squares(chosen)
    if n == 2:
        low, high = chosen.sort(-1).values.unbind(-1)
        chance -= squares(low * E + high)
    return share, chance


def favourite(tokens, first, E):
    """The share of tokens that go first to the expert to which their kind does most often, of the
    kinds that occur SEEN times; None without one. tokens, first: (N,)."""
    kind = tokens.unique(return_inverse=True)[1]
    counts = torch.bincount(kind * E + first, minlength=(int(kind.max()) + 1) * E).view(-1, E)
    counts = counts[counts.sum(1) >= SEEN]
    return (counts.amax(1).sum() / counts.sum()).item() if len(counts) else None


@torch.no_grad()
def by_layer(model, batches, config, device, dtype):
    """Columns for L = first, middle, last; excess is what is above chance:

    repeat_L, repeat_excess_L           neighbours with the same first expert, mean over the corpora
    repeat_two_L, repeat_two_excess_L   neighbours whose first two experts have one in common
    domain_L, domain_excess_L           mutual information of expert and corpus, nats; chance: the
                                        sequences swap their corpora
    favourite_L, favourite_excess_L     tokens that go to the favourite expert of their kind;
                                        chance: the tokens swap their experts
    """
    if not (sparse := model.sparse):
        return {}
    places = dict(first=sparse[0], middle=sparse[(len(sparse) - 1) // 2], last=sparse[-1])
    tokens, labels, found = choices(model, batches, set(places.values()), device, dtype)
    row = {}
    for place, layer in places.items():
        if layer in found:
            E = model.blocks[layer].ffn.n_expert
            for name, (value, chance) in of_layer(tokens, labels, found[layer], E):
                row |= {f"{name}_{place}": value, f"{name}_excess_{place}": value - chance}
    return row


def of_layer(tokens, labels, chosen, E):
    """Yields (name, (value, the same by chance)) of a layer; chosen (S, T, k)."""
    C = int(labels.max()) + 1
    for n, name in (1, "repeat"), (2, "repeat_two"):
        if chosen.shape[-1] >= n:
            each = [repeated(chosen[labels == c][..., :n], E) for c in range(C)]
            yield name, [sum(column) / C for column in zip(*each)]
    if C > 1:
        place = torch.arange(len(labels)).view(-1, 1, 1) * E + chosen
        table = torch.bincount(place.flatten(), minlength=len(labels) * E).view(-1, E)
        true, drawn = shuffled(table.double(), labels, C)
        yield "domain", (true, sum(drawn) / len(drawn))
    kinds, first = tokens.flatten(), chosen[..., 0].flatten()
    if (value := favourite(kinds, first, E)) is not None:
        generator = torch.Generator().manual_seed(0)
        drawn = [favourite(kinds, first[torch.randperm(len(first), generator=generator)], E)
                 for _ in range(DRAWS)]
        yield "favourite", (value, sum(drawn) / DRAWS)
