"""Where a model sends which text: the share of each expert in every corpus and sparse layer, as
Branch-Train-MiX (2403.07816) shows for its domains.

Two shares are counted over validation tokens, each summing to 1 over the experts: `top`, of the
tokens whose expert of largest weight it is, and `load`, of all pairs (token, expert). With one
expert a token they agree.
"""
import csv
import io
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from grow.parents import open_parents, summed, validation
from model import sparse_layers
from runtime.files import write_text, written
from runtime.device import as_trained, pick_device
from settings import ConfigError

MOST = 16               # experts of which a table or a map of them can still show each number


def expert_shares(parent, corpora):
    """{(corpus, layer): {"top": (E,), "load": (E,)}} over the validation batches of these
    corpora."""
    model, layers = parent.model, sparse_layers(parent.config)
    device = next(model.parameters()).device

    def count(x, y, domain):
        # the number by which its training knew this corpus, for the router "domain"
        name, label = corpora[int(domain[0])], None
        if name in parent.corpora:
            label = torch.full_like(domain, parent.corpora.index(name)).to(device)
        with as_trained(model):
            stats = model(x.to(device), domain=label).stats
        # two counts for each layer, one after the other
        counts = []
        for layer in layers:
            load = stats[layer].load.cpu().double().numpy()
            first = stats[layer].top_expert.cpu().flatten()
            counts += [np.bincount(first, minlength=len(load)), load]
        return counts

    # counts -> shares
    shares = {}
    for corpus, (*counts, _, _) in summed(validation(parent, corpora), count).items():
        for layer, top, load in zip(layers, counts[::2], counts[1::2]):
            shares[corpora[corpus], layer] = dict(top=top / top.sum(), load=load / load.sum())
    return shares


def as_text(shares):
    """A table for each layer, a line for each corpus: top shares of all experts, or of the
    busiest."""
    lines = []
    # a head and a line for each corpus, layer after layer
    for layer in dict.fromkeys(layer for _, layer in shares):
        rows = {name: share["top"] for (name, at), share in shares.items() if at == layer}
        E = len(next(iter(rows.values())))
        if E <= MOST:
            head = "".join(f"{f'expert {e}':>11}" for e in range(E))
        else:
            head = f"  the busiest of {E} experts"
        lines.append(f"layer {layer:<10}{head}")
        for name, top in rows.items():
            if E <= MOST:
                numbers = "".join(f"{share:>11.3f}" for share in top)
            else:
                busiest = np.argsort(-top, kind="stable")[:MOST // 2]
                numbers = "".join(f"  {e}: {top[e]:.3f}" for e in busiest)
            lines.append(f"{name:<16}{numbers}")
    return "\n".join(lines)


def as_csv(shares):
    """Text of a table with a row for each corpus, layer and expert."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["corpus", "layer", "expert", "top_share", "load_share"])
    for (name, layer), share in shares.items():
        for e, (top, load) in enumerate(zip(share["top"], share["load"])):
            rows.writerow([name, layer, e, f"{top:.6f}", f"{load:.6f}"])
    return text.getvalue()


def draw(shares, title):
    """Figure with a map of the top shares for each layer: corpora down, experts across."""
    names = list(dict.fromkeys(name for name, _ in shares))
    layers = list(dict.fromkeys(layer for _, layer in shares))
    # at most four maps side by side; sizes in inches
    E, columns = len(shares[names[0], layers[0]]["top"]), min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    width = columns * max(2.5, 0.5 * min(E, MOST)) + 2.5
    figure = Figure(figsize=(width, rows * (0.5 * len(names) + 1.2) + 0.5), layout="constrained",
                    dpi=150)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axis in axes[len(layers):]:
        axis.set_axis_off()
    for axis, layer in zip(axes, layers):
        top = np.stack([shares[name, layer]["top"] for name in names])              # (corpora, E)
        # as in the lab's maps: dark is little, yellow is much, and white, which is masked, is none
        image = axis.imshow(np.ma.masked_equal(top, 0), cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axis.set(title=f"layer {layer}", xlabel="expert", yticks=range(len(names)),
                 yticklabels=names)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for (i, j), share in np.ndenumerate(top) if E <= MOST else ():
            colour = "white" if 0 < share < 0.6 else "black"
            axis.text(j, i, f"{share:.0%}", ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label="share of tokens")
    figure.suptitle(title)
    return figure


def command(options, overrides):
    """Counts, prints, writes routing.csv and routing.png. Raises ConfigError, CheckpointError,
    DataError."""
    (parent,) = open_parents([options.run], pick_device(options.device))
    if not parent.is_moe:
        raise ConfigError(f"{options.run} has ffn.kind = \"{parent.config.ffn.kind}\", no experts "
                          "that a router chooses; give a run with ffn.kind = \"moe\"")
    # a folder that cannot be made is told before the counting
    out = Path(options.out or options.run)
    out.mkdir(parents=True, exist_ok=True)
    shares = expert_shares(parent, options.corpora)
    print("share of the tokens whose expert of largest weight it is\n" + as_text(shares))
    write_text(out / "routing.csv", as_csv(shares))
    figure = draw(shares, f"{options.run}: share of tokens by first expert")
    with written(out / "routing.png") as file:
        figure.savefig(file, format="png")
    print(f"written: {out / 'routing.csv'}, {out / 'routing.png'}")


def add_options(parser):
    parser.add_argument("--corpora", nargs="+", metavar="CORPUS", required=True,
                        help="names or paths")
    parser.add_argument("--out", metavar="DIR",
                        help="folder for the two files (default: the run folder)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                        help="auto takes cuda, then mps, then cpu (default: auto)")
