"""What is inside a mixture of experts, measured without training (the questions that
Branch-Train-MiX 2403.07816 leaves open): what its experts know, whether they follow the domains
more than chance would, and how well whole sequences go to one expert. Probes, as in
lab/papers/probes.py.

The tables are of the last sparse layer and count pairs (token, expert). Letters: B sequences, T
positions, V vocabulary, E experts, C corpora.
"""
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from runtime.device import precision

DRAWS = 200             # of shuffled labels: a share of 5 % is then known to 1.5 %
START = 32              # tokens by which a whole sequence is sent on its way
MOST = 16               # experts that are taken away one by one
TOP = 8                 # bytes of an expert that are named
NAMES = {" ": "space", "\n": "newline", "\t": "tab"}


# --- tables ---

def information(table):
    """Mutual information, in nats, of row and column of a table of counts (R, C), float64."""
    p = table / table.sum()
    apart = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    # sum p log(p / (p_r p_c)); a cell without counts adds nothing
    return torch.special.xlogy(p, p / apart.clamp_min(1e-300)).sum().item()


def alike(table):
    """A table (C, ...) in which every corpus counts as much as any other."""
    return table / table.flatten(1).sum(1).view(-1, *[1] * (table.dim() - 1))


def last_layer(model, batches, device, dtype):
    """Yields (tokens x (B, T), number of the corpus, Routing) of the last layer that has experts,
    batch after batch."""
    for x, _, domain, _, corpus in batches:
        with precision(device, dtype):
            stats = model(x.to(device), domain=domain.to(device)).stats[model.sparse[-1]]
        if stats.routing is not None:
            yield x.to(device), corpora_of(batches).index(corpus), stats.routing


def corpora_of(batches):
    return list(dict.fromkeys(corpus for *_, corpus in batches))


def counted(place, routing, rows, E):
    """(rows, E) float64: how many pairs have a token of this row; place (N,) is the row of each
    token."""
    cell = place[routing.token] * E + routing.expert
    return torch.bincount(cell, minlength=rows * E).view(rows, E).double().cpu()


# --- probes ---

@torch.no_grad()
def chance(model, batches, config, device, dtype):
    """What specialisation, the mutual information of corpus and expert, would be by chance:

    specialisation_chance   its mean over DRAWS draws in which the sequences swap their labels
    specialisation_p        the share of these draws that reach the true value
    """
    corpora, tables, labels = corpora_of(batches), [], []
    if not model.sparse or len(corpora) < 2:
        return {}
    # (sequences, E), and the corpus of each
    E = model.blocks[model.sparse[-1]].ffn.n_expert
    for x, corpus, routing in last_layer(model, batches, device, dtype):
        sequence = torch.arange(len(x), device=device).repeat_interleave(x.shape[1])
        tables.append(counted(sequence, routing, len(x), E))
        labels += [corpus] * len(x)
    if not tables:
        return {}
    true, drawn = shuffled(torch.cat(tables), torch.tensor(labels), len(corpora))
    return dict(specialisation_chance=sum(drawn) / DRAWS,
                specialisation_p=sum(value >= true for value in drawn) / DRAWS)


def shuffled(table, labels, C):
    """Mutual information of corpus and expert, all corpora counted alike, in nats: (the true one,
    DRAWS in which the sequences swap their labels). table (sequences, E); labels: the corpus of
    each, below C."""
    def specialisation(labels):
        sums = table.new_zeros(C, table.shape[1]).index_add(0, labels, table)
        return information(alike(sums))

    generator = torch.Generator().manual_seed(0)
    drawn = [specialisation(labels[torch.randperm(len(labels), generator=generator)])
             for _ in range(DRAWS)]
    return specialisation(labels), drawn


@torch.no_grad()
def inside(model, batches, config, device, dtype):
    """What the experts of a layer know, all corpora counted alike:

    byte_information     mutual information of a token's expert and the token, nats (that of the
                         expert and the corpus is specialisation)
    domain_beyond_byte   of its expert and its corpus, the token being known
    bytes_E              the tokens that tell most of expert E: largest p(v, E) log(p(E | v) / p(E))
    without_E_CORPUS     rise of the loss on a corpus, nats a token, when no layer has expert E
    """
    V, corpora, table = config.model.vocab_size, corpora_of(batches), 0
    layers = [model.blocks[i].ffn for i in model.sparse]
    if not layers or layers[-1].n_expert > MOST:
        return {}
    E = layers[-1].n_expert
    # (C, V, E)
    for x, corpus, routing in last_layer(model, batches, device, dtype):
        new = torch.zeros(len(corpora), V, E, dtype=torch.float64)
        new[corpus] = counted(x.flatten(), routing, V, E)
        table = table + new
    if isinstance(table, int):
        return {}
    # I(E; corpus | token) = I(E; corpus and token) - I(E; token)
    p = alike(table) / len(corpora)
    both, by_token = information(p.flatten(0, 1)), information(p.sum(0))
    row = dict(byte_information=by_token, domain_beyond_byte=both - by_token)
    # the bytes of each expert, the most telling first
    if V == 256:
        row |= {f"bytes_{e}": text for e, text in enumerate(telling(p.sum(0)))}
    return row | knocked_out(model, batches, corpora, E, device, dtype)


def telling(p):
    """The TOP bytes that tell most of each expert, as a text for each; p (256, E) sums to 1."""
    apart = p.sum(1, keepdim=True) * p.sum(0)
    tells = torch.special.xlogy(p, p / apart.clamp_min(1e-300))
    best = tells.topk(TOP, 0).indices.T.tolist()
    return [" ".join(shown(v) for v in row) for row in best]


def shown(byte):
    """A byte as a word that a table can hold."""
    letter = chr(byte)
    return NAMES.get(letter) or (letter if letter.isascii() and letter.isprintable()
                                 else f"0x{byte:02x}")


def knocked_out(model, batches, corpora, E, device, dtype):
    """{without_E_CORPUS: rise of the loss} of each expert that a router's logits can leave out."""
    if not all(can_lose(model.blocks[i].ffn) for i in model.sparse):
        return {}
    whole, row = loss_on(model, batches, device, dtype), {}
    for e in range(E):
        with without(model, e):
            found = loss_on(model, batches, device, dtype)
        row |= {f"without_{e}_{name}": found[name] - whole[name] for name in corpora}
    return row


def can_lose(layer):
    """Whether its router goes by logits, so that an expert can be taken from it."""
    return hasattr(getattr(layer, "router", None), "score")


@contextmanager
def without(model, expert):
    """While no layer has this expert: its tokens take their next best."""
    gone = torch.tensor([expert], device=model.embedding.weight.device)
    # a logit of minus infinity is never chosen
    hooks = [model.blocks[i].ffn.router.score.register_forward_hook(
        lambda module, x, logits: logits.index_fill(-1, gone, -torch.inf)) for i in model.sparse]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def loss_on(model, batches, device, dtype, start=0):
    """{corpus: nats a token} over the positions from `start` on."""
    nats, tokens = Counter(), Counter()
    for x, y, domain, _, corpus in batches:
        with precision(device, dtype):
            logits = model(x.to(device), domain=domain.to(device)).logits
        y = y[:, start:].to(device)
        nats[corpus] += F.cross_entropy(logits[:, start:].float().flatten(0, 1), y.flatten(),
                                        reduction="sum").item()
        tokens[corpus] += y.numel()
    return {corpus: nats[corpus] / tokens[corpus] for corpus in nats}


# --- whole sequences ---

# (B, T, E) gates and (B,) corpora -> (B, T) or (B, 1): the one expert of each token
WAYS = {"token": lambda gates, domain: gates.argmax(-1),
        "start": lambda gates, domain: gates[:, :START].mean(1, keepdim=True).argmax(-1),
        "mean": lambda gates, domain: gates.mean(1, keepdim=True).argmax(-1),
        "label": lambda gates, domain: domain.unsqueeze(1)}


@contextmanager
def one_expert(model, way):
    """While every token goes to one expert of each layer, with gate 1: one of WAYS."""
    def reroute(router, args, routing):
        ctx = args[1]
        B, T = ctx.token_ids.shape
        expert = WAYS[way](routing.probs.view(B, T, -1), ctx.domain).expand(B, T).flatten()
        return routing._replace(expert=expert, weight=torch.ones_like(expert, dtype=torch.float32),
                                token=torch.arange(B * T, device=expert.device), k=1, keep=None)

    hooks = [model.blocks[i].ffn.router.register_forward_hook(reroute) for i in model.sparse]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def whole_sequence(model, batches, config, device, dtype):
    """The loss of a model whose router is overruled, in nats a token, mean over the corpora, all on
    the tokens from START on:

    val_loss_tail       as it was trained
    val_loss_by_token   each token goes to its best expert alone, in each layer
    val_loss_by_start   the whole sequence to that of the largest mean gate over its first START
                        tokens
    val_loss_by_mean    to that of the largest mean gate over all its tokens; looks ahead
    val_loss_by_label   to the expert whose number is that of its corpus
    """
    layers = [model.blocks[i].ffn for i in model.sparse]
    if not layers or not all(map(can_lose, layers)) or config.model.block_size <= START:
        return {}

    def mean_loss():
        found = loss_on(model, batches, device, dtype, START).values()
        return sum(found) / len(found)

    row = dict(val_loss_tail=mean_loss())
    for way in WAYS:
        if way != "label" or layers[0].n_expert >= len(config.data.names):
            with one_expert(model, way):
                row[f"val_loss_by_{way}"] = mean_loss()
    return row
