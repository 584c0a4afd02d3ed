"""Where a model sends which text: the share of each expert in every corpus and sparse layer, as Branch-Train-
MiX (2403.07816) shows for its domains.

Two shares are counted over validation tokens, each summing to 1 over the experts: `top`, of the tokens whose
expert of largest weight it is, and `load`, of all pairs (token, expert). With one expert a token they agree.
"""
import csv
import io
import math
import os
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from grow.parents import open_parents, validation
from model import sparse_layers
from runtime.checkpoint import write_text
from runtime.device import as_trained, pick_device
from settings import ConfigError

MOST = 16                               # experts of which a table or a map of them can still show each number


@torch.no_grad()
def expert_shares(parent, corpora):
    """{(corpus, layer): {"top": (E,), "load": (E,)}} over the validation batches of these corpora."""
    model, counts = parent.model, {}
    device = next(model.parameters()).device
    for x, _, domain, _ in validation(parent, corpora, parent.config.model.block_size):
        name = corpora[int(domain[0])]
        known = name in parent.corpora          # the label that router "domain" knows this corpus by
        label = torch.full_like(domain, parent.corpora.index(name)).to(device) if known else None
        with as_trained(model):
            stats = model(x.to(device), domain=label).stats
        for layer in sparse_layers(parent.config):
            load = stats[layer].load.cpu().double().numpy()
            top = np.bincount(stats[layer].top_expert.cpu().flatten(), minlength=len(load))
            total = counts.setdefault((name, layer), dict(top=0, load=0))
            total["top"], total["load"] = total["top"] + top, total["load"] + load
    return {key: {what: n / n.sum() for what, n in total.items()} for key, total in counts.items()}


def as_text(shares):
    """A table for each layer, a line for each corpus: top shares of all experts, or of the busiest."""
    lines = []
    for layer in dict.fromkeys(layer for _, layer in shares):
        rows = {name: share["top"] for (name, at), share in shares.items() if at == layer}
        E = len(next(iter(rows.values())))
        lines.append(f"layer {layer:<10}" + ("".join(f"{f'expert {e}':>11}" for e in range(E)) if E <= MOST
                                             else f"  the busiest of {E} experts"))
        for name, top in rows.items():
            busiest = np.argsort(-top, kind="stable")[:MOST // 2]
            lines.append(f"{name:<16}" + ("".join(f"{share:>11.3f}" for share in top) if E <= MOST else
                                          "".join(f"  {e}: {top[e]:.3f}" for e in busiest)))
    return "\n".join(lines)


def write_csv(path, shares):
    """A row for each corpus, layer and expert."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["corpus", "layer", "expert", "top_share", "load_share"])
    for (name, layer), share in shares.items():
        for e, (top, load) in enumerate(zip(share["top"], share["load"])):
            rows.writerow([name, layer, e, f"{top:.6f}", f"{load:.6f}"])
    write_text(path, text.getvalue())


def draw(shares, title):
    """Figure with a map for each layer: corpora down, experts across, dark where the tokens go."""
    names, layers = (list(dict.fromkeys(key[i] for key in shares)) for i in (0, 1))
    E, columns = len(shares[names[0], layers[0]]["top"]), min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    size = columns * max(2.5, 0.5 * min(E, MOST)) + 1.5, rows * (0.5 * len(names) + 1.2) + 0.5
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, layer in zip(axes, layers):
        top = np.stack([shares[name, layer]["top"] for name in names])                          # (corpora, E)
        axis.set_axis_on()
        axis.imshow(top, cmap="cividis_r", vmin=0, vmax=1, aspect="auto")
        axis.set(title=f"layer {layer}", xlabel="expert", yticks=range(len(names)), yticklabels=names)
        for (i, j), share in np.ndenumerate(top) if E <= MOST else ():
            colour = "white" if share > 0.5 else "black"
            axis.text(j, i, f"{share:.0%}", ha="center", va="center", color=colour)
    figure.suptitle(title)
    return figure


def run(o, overrides):
    """Counts, prints, writes routing.csv and routing.png. Raises ConfigError, CheckpointError, DataError."""
    (parent,) = open_parents([o.run], pick_device(o.device))
    if not parent.is_moe:
        raise ConfigError(f"{o.run} has ffn.kind = \"{parent.config.ffn.kind}\", no experts that a router "
                          "chooses; give a run with ffn.kind = \"moe\"")
    shares, out = expert_shares(parent, o.corpora), Path(o.out or o.run)
    print("share of the tokens whose expert of largest weight it is\n" + as_text(shares))
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "routing.csv", shares)
    draw(shares, f"{o.run}: share of tokens by first expert").savefig(out / "routing.part", format="png")
    os.replace(out / "routing.part", out / "routing.png")
    print(f"written: {out / 'routing.csv'}, {out / 'routing.png'}")


def add_options(parser):
    parser.add_argument("--corpora", nargs="+", metavar="CORPUS", required=True, help="names or paths")
    parser.add_argument("--out", metavar="DIR", help="folder for the two files (default: the run folder)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                        help="auto takes cuda, then mps, then cpu (default: auto)")
