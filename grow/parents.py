"""The runs that a model is made from: whether they fit together, and text to measure them on.

Weights can be averaged only if they mean the same: one tokenizer, one shape, one seed. Two networks
of different seeds may compute the same function with their hidden units in different orders. The
average of two such networks computes nothing like it (Branch-Train-Merge 2208.03306 found
perplexities in the thousands).
"""
import shlex
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from data.batches import EvalBatches
from data.binfile import DataError
from data.prepare import prepared
from data.tokenizers import Tokenizer
from model import GPT, load_model, sparse_layers
from runtime import checkpoint
from runtime.config import all_fields, from_tables
from settings import Config, ConfigError, show

# What sparse branches must agree in, and the mix takes from them.
LAYOUT = ("moe_every", "moe_layers", "n_dense_first", "d_dense", "n_shared", "d_shared",
          "shared_gate", "output_norm")


class Parent(NamedTuple):
    """A run that a model is made from."""
    folder: Path
    model: GPT
    config: Config
    tokenizer: Tokenizer
    header: dict

    @property
    def is_moe(self):
        return self.config.ffn.kind == "moe"

    @property
    def experts(self):
        """Experts that it brings to a layer, after any granularity split; of a dense layer 1."""
        return self.config.ffn.experts if self.is_moe else 1

    @property
    def width(self):
        """Hidden units of each of these experts."""
        return self.config.ffn.expert_width if self.is_moe else self.config.ffn.d_ff

    @property
    def corpora(self):
        return self.config.data.names


def open_parents(folders, device="cpu"):
    """The best weights of each run: list of Parent. Raises CheckpointError."""
    return [Parent(Path(folder), *load_model(folder, device)) for folder in folders]


# --- whether they fit together ---


def check_alike(parents, what, values, remedy):
    """Raises ConfigError naming the run whose value most others do not have (of two runs, the
    second)."""
    usual = Counter(values).most_common(1)[0][0] if values else None
    for parent, value in zip(parents, values):
        if value != usual:
            other = parents[values.index(usual)].folder
            raise ConfigError(f"{parent.folder} has {what} {value}, {other} has {usual}; {remedy}")


def check_tokenizers(parents):
    names = [f"{p.tokenizer.name} ({p.tokenizer.fingerprint})" for p in parents]
    check_alike(parents, "the tokenizer", names,
                "a token id must mean the same text to all of them")


def check_settings(parents, *sections, names=None):
    """Compares the settings of these sections (only `names`, where given) that decide what the
    model computes. Raises ConfigError."""
    # a run may change the others when it starts from another's weights
    for key in (key for key, _ in all_fields() if key not in checkpoint.RETRAINABLE):
        section, name = key.split(".")
        if section in sections and (names is None or name in names):
            values = [show(getattr(getattr(p.config, section), name)) for p in parents]
            check_alike(parents, f"{key} =", values, "only models of one shape fit together")


def starts(ancestry):
    """Fingerprints of the weights that a run and its ancestors began with."""
    return {ancestry.get("start")}.union(*map(starts, ancestry["parents"])) - {None}


def strangers(parents):
    """Folders of the runs that did not grow from the weights that most of the others grew from."""
    known = [starts(p.header["ancestry"]) for p in parents]
    common = Counter(start for some in known for start in sorted(some)).most_common(1)
    return [p.folder for p, some in zip(parents, known) if not common or common[0][0] not in some]


def check_branches(parents):
    """Raises ConfigError unless the runs are branches of one seed, with one tokenizer and one
    shape."""
    check_tokenizers(parents)
    for p in parents:
        if p.config.ffn.kind not in ("dense", "moe"):
            raise ConfigError(f"{p.folder} has ffn.kind = \"{p.config.ffn.kind}\"; only dense and "
                              "moe models can be mixed")
    check_settings(parents, "model")
    check_settings(parents, "ffn", names=["activation"])
    check_settings([p for p in parents if p.is_moe], "ffn", names=LAYOUT)
    check_alike(parents, "experts of hidden width", [p.width for p in parents],
                "all experts of a layer must have one width")
    for folder in strangers(parents):
        raise ConfigError(f"{folder} did not grow from the same seed as the other runs, and an "
                          "average of unrelated weights is noise; train every branch with "
                          "--train.init_from SEED")


def check_layers(parent, config):
    """Raises ConfigError unless every layer of the run has its place in the mix."""
    ffn, mine, theirs = config.ffn, sparse_layers(config), sparse_layers(parent.config)
    # a sparse run's experts go where they were
    if parent.is_moe and mine != theirs:
        raise ConfigError(f"{parent.folder} has experts in layers {theirs}, the mix would in "
                          f"{mine}; leave out --ffn.moe_every, --ffn.moe_layers and "
                          "--ffn.n_dense_first")
    # a dense run has no shared expert and no norm, and one width for all its layers
    narrow = len(mine) < config.model.n_layer and ffn.d_dense != parent.width
    if not parent.is_moe and (ffn.n_shared or ffn.d_shared or ffn.output_norm or narrow):
        raise ConfigError(f"{parent.folder} is dense: it lacks the shared experts, the output norm "
                          "or the other width of dense layers that the sparse runs have")


# --- what they share with the model that is made ---


def joined_config(parents):
    """The first run's config as tables, with the corpora of all the runs, and without how it was
    trained from another run."""
    tables = parents[0].config.to_dict()
    names = list(dict.fromkeys(name for p in parents for name in p.corpora))
    if names != parents[0].corpora:
        tables["data"].update(name=names, weights=[])
    tables["train"]["init_from"] = ""
    return {name: table for name, table in tables.items() if name != "lifelong"}


def next_command(out, names, data, *more):
    """The command that trains the run in `out` further on corpora `names`, to be copied into a
    shell. data: a DataConfig, which says where prepared corpora are."""
    # a list in brackets where a name holds the comma that separates names
    listed = show(names) if any("," in name for name in names) else ",".join(names)
    words = ["python", "train.py", "configs/continue.toml", "--train.init_from", Path(out),
             "--data.name", listed]
    if data.dir:
        words += ["--data.dir", data.dir]
    words += [*more, "--out", f"{Path(out)}-trained"]
    return "Next:\n  " + shlex.join(map(str, words))


# --- validation text ---


def validation(parent, names, block_size=0, batch_size=0, n_batches=0):
    """EvalBatches of corpora, by name or path, read with the run's tokenizer. A number that is 0 is
    that of its training; with all of them 0, its own corpora give the batches that its training
    evaluated on. Raises DataError."""
    # the corpora in the parent's tokens, prepared now if they are not
    config = from_tables(parent.config.to_dict())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.carry_tokenizer(config, parent.tokenizer, Path(folder))
        folders, found = prepared(config.data, names, quiet=False)
    # a corpus of symbols has a tokenizer of its own
    if found.fingerprint != parent.tokenizer.fingerprint:
        raise DataError(f"{', '.join(names)}: has another tokenizer ({found.name}) than "
                        f"{parent.folder} ({parent.tokenizer.name}); give corpora that it can read")
    return EvalBatches(folders, block_size or config.model.block_size,
                       batch_size or config.train.batch_size,
                       n_batches or config.train.eval_batches, found.token_lengths())


@torch.no_grad()
def summed(batches, measure):
    """{index of a corpus: list}. The list holds what measure(x, y, domain) returns, numbers and
    tensors, each summed over the batches of the corpus; then its tokens, then their bytes."""
    totals = {}
    for x, y, domain, n_bytes in batches:
        corpus = int(domain[0])                         # a batch holds one corpus
        new = [*measure(x, y, domain), y.numel(), n_bytes]
        if corpus in totals:
            new = [a + b for a, b in zip(totals[corpus], new)]
        totals[corpus] = new
    return totals
