"""What a run is worth:

    python -m lab.papers.evaluate RUN_DIR [--corpora NAME ...] [--probes NAME ...] [--json FILE]

One pass over fixed validation batches of each corpus, in evaluation mode, with the run's last
weights: losses, how evenly the experts are used over the whole pass (not over one batch), and which
corpus goes to which expert. The corpora are read with the run's own tokenizer; by default they are
those it was trained on. The row goes to FILE (default: RUN_DIR/evaluation.json).
"""
import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

from data.batches import EvalBatches
from data.binfile import DataError
from data.prepare import prepared
from lab.drawing.logs import read_columns
from lab.papers.inside import corpora_of
from lab.papers.probes import PROBES
from lab.timing.measure import device_name
from model import KINDS, load_model
from runtime import checkpoint
from runtime.config import Parser, nearest, parse
from runtime.ending import Ending
from runtime.device import precision, resolve_device, resolve_dtype
from runtime.watch import usage
from settings import ConfigError

MOST_EXPERTS = 64                       # of a layer whose traffic is written down expert by expert


def evaluate(folder, corpora=(), probes=()):
    """The row of a run folder, column -> number; "routing": [layer, corpus, [share of each expert]]
    lists.

    Raises CheckpointError, ConfigError, DataError.
    """
    # The model, and the corpora that it is evaluated on.
    folder, device = Path(folder), resolve_device("auto")
    which = "last" if (folder / checkpoint.LAST).exists() else "best"
    loaded = load_model(folder, device, which)
    _, config, tokenizer, _ = loaded
    names = config.data.name if isinstance(config.data.name, list) else [config.data.name]
    dtype, _ = resolve_dtype(config.train.dtype, device)
    batches = validation(config, list(corpora) or names, names, tokenizer)
    return measured(folder, loaded, batches, probes, device, dtype)


def measured(folder, loaded, batches, probes, device, dtype):
    """The row of a run folder: loaded is what load_model gave, batches those of validation."""
    # One pass over the validation batches gives losses and loads.
    (model, config, _, header), corpora = loaded, corpora_of(batches)
    sums, loads = one_pass(model, batches, corpora, device, dtype)
    # Everything that a row of runs.csv says of a model.
    params = model.num_params()
    row = losses(sums, corpora) | dict(
        active_params=params.active, total_params=params.total,
        flops_per_token=model.flops_per_token(),
        tokens=header.get("tokens", 0), step=header.get("step", 0),
        seconds=header.get("seconds", 0.0))
    row |= shape(config, model) | use_of_experts(loads) | sums["layers"] | routing(loads, corpora)
    row |= end_of_training(folder / "log.csv")
    for name in probes:
        row |= find_probe(name)(model, batches, config, device, dtype)
    return row | dict(device=device_name(device.type), torch=torch.__version__)


def shape(config, model):
    """What a table of many models is sorted by, and the fits of lab/scaling.py read."""
    row = dict(n_layer=config.model.n_layer, n_embd=config.model.n_embd,
               embedding_params=model.embedding.weight.numel())
    names = [name for block in model.blocks for name in block.ffn.columns]
    return row | {name: getattr(config.ffn, name) for name in names}


def validation(config, corpora, names, tokenizer):
    """List of (x, y, domain, bytes, corpus). domain is the corpus's place in the training data,
    which the domain router goes by."""
    folders, theirs = prepared(config.data, corpora)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise DataError(f"{', '.join(corpora)}: prepared with another tokenizer ({theirs.name}) "
                        f"than the run was trained with ({tokenizer.name}); prepare it with that "
                        "one")
    # A layer that goes by the corpus, and so refuses a run of none, knows those of the training.
    strangers = [name for name in corpora if name not in names]
    if strangers and goes_by_corpus(config):
        raise DataError(f"{strangers[0]}: is none of the corpora of this run ({', '.join(names)}), "
                        "so its router has no expert for it")
    place = [names.index(name) if name in names else 0 for name in corpora]
    batches = EvalBatches(folders, config.model.block_size, config.train.batch_size,
                          config.train.eval_batches, tokenizer.token_lengths())
    return [(x, y, torch.full_like(domain, place[domain[0]]), n_bytes, corpora[domain[0]])
            for x, y, domain, n_bytes in batches]


def goes_by_corpus(config):
    """Whether a layer of this Config needs to know which corpus a sequence is from."""
    without = dataclasses.replace(config, data=dataclasses.replace(config.data, name=""))
    checks = KINDS[config.ffn.kind].checks(without)
    return any(wrong and key == "data.name" for wrong, key, _ in checks)


@torch.no_grad()
def one_pass(model, batches, corpora, device, dtype):
    """({corpus: [nats, tokens, bytes], "layers": means over the sparse layers}, {layer: {corpus:
    (E,)}})."""
    sums = {name: [0.0, 0, 0] for name in corpora}
    loads, layers = {i: {} for i in model.sparse}, {}
    for x, y, domain, n_bytes, corpus in batches:
        with precision(device, dtype):
            out = model(x.to(device), y.to(device), domain=domain.to(device))
        # The loss is a mean over the batch's tokens; the sums are over all of them.
        total = sums[corpus]
        total[0] += out.loss.item() * y.numel()
        total[1] += y.numel()
        total[2] += n_bytes
        for i in model.sparse:
            loads[i][corpus] = loads[i].get(corpus, 0) + out.stats[i].load.double().cpu()
            # None: this kind of layer does not have the number
            for name in ("dropped", "entropy"):
                if (value := getattr(out.stats[i], name)) is not None:
                    share = value.item() * y.numel() / len(model.sparse)
                    layers[name] = layers.get(name, 0.0) + share
    tokens = sum(total[1] for total in sums.values())
    sums["layers"] = {name: value / tokens for name, value in layers.items()}
    return sums, loads


def losses(sums, corpora):
    """val_loss in nats a token and val_bpb, plain means over the corpora, then the loss on each."""
    nats = {name: sums[name][0] / sums[name][1] for name in corpora}
    bits = [sums[name][0] / sums[name][2] / math.log(2) for name in corpora]
    row = dict(val_loss=sum(nats.values()) / len(nats), val_bpb=sum(bits) / len(bits))
    if len(nats) > 1:
        row |= {f"val_loss_{name}": loss for name, loss in nats.items()}
    return row


def use_of_experts(loads):
    """Busiest and idlest expert over all layers, and PEER's measures as means over the layers."""
    pooled = [sum(layer.values()) for layer in loads.values()]
    if not pooled:
        return {}
    shares, used = [load / load.sum() for load in pooled], [usage(load) for load in pooled]
    return dict(max_expert_share=max(share.max().item() for share in shares),
                min_expert_share=min(share.min().item() for share in shares),
                experts_used=sum(u[0] for u in used) / len(used),
                unevenness=sum(u[1] for u in used) / len(used))


def routing(loads, corpora):
    """Which corpus goes where. In the last sparse layer, with several corpora, each counted alike:
    specialisation, the mutual information of corpus and expert in nats; diagonal, the least lead of
    expert i over all others on corpus i."""
    table = [[i, name, (load / load.sum()).tolist()] for i, layer in loads.items()
             for name, load in layer.items() if len(load) <= MOST_EXPERTS]
    row = dict(routing=table) if table else {}
    # Of the last layer: the mutual information sum_c 1/C sum_e p(e|c) log(p(e|c) / p(e)), and
    # expert i's lead.
    if loads and len(corpora) > 1:
        last = loads[max(loads)]
        # (corpora, E)
        share = torch.stack([last[name] / last[name].sum() for name in corpora])
        information = torch.special.xlogy(share,
                                          share / share.mean(0).clamp_min(1e-30)).sum(1).mean()
        row["specialisation"] = information.item()
        if share.shape[1] >= len(corpora):
            own = share.diagonal()
            others = share.scatter(1, torch.arange(len(corpora)).unsqueeze(1), -1.0).amax(1)
            row["diagonal"] = (own - others).min().item()
    return row


def end_of_training(log):
    """Means over the last rows of a log: the loss over 5 % of them, drops and busiest expert over
    20 %; and what the workers of grow.outer had at the end: their loss, the bytes that one sent."""
    row = {}
    if log.exists():
        last = ("worker_loss", "bytes_sent")
        columns = read_columns(log, ("loss", "dropped", "max_expert_share", *last))
        for name, part in (("loss", 0.05), ("dropped", 0.2), ("max_expert_share", 0.2)):
            values = columns[name][~np.isnan(columns[name])]
            if len(values):
                row[f"train_{name}"] = float(values[-max(1, int(part * len(values))):].mean())
        row |= {name: float(columns[name][-1]) for name in last
                if len(columns[name]) and not np.isnan(columns[name][-1])}
    return row


def find_probe(name):
    """The probe of this name. Raises ConfigError."""
    if name not in PROBES:
        raise ConfigError(f"lab/papers/probes.py has no probe {name}{nearest(name, PROBES)}; it "
                          f"has {', '.join(PROBES)}")
    return PROBES[name]


def main(argv=None):
    """The program; returns its exit status."""
    parser = Parser(prog="python -m lab.papers.evaluate", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN_DIR")
    parser.add_argument("--corpora", nargs="+", default=[], metavar="NAME",
                        help="default: its training's")
    parser.add_argument("--probes", nargs="+", default=[], metavar="NAME",
                        help="functions of lab/papers/probes.py")
    parser.add_argument("--json", metavar="FILE", help="default: RUN_DIR/evaluation.json")
    with Ending() as end:
        options, _ = parse(parser, argv)
        row = evaluate(options.run, options.corpora, options.probes)
        checkpoint.write_text(options.json or Path(options.run) / "evaluation.json",
                              json.dumps(row))
        for name, value in row.items():
            if name != "routing":
                print(f"{name:22} {value:.6g}" if isinstance(value, float)
                      else f"{name:22} {value}")
    return end.status


if __name__ == "__main__":
    sys.exit(main())
