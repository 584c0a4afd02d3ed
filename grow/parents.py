"""The runs that a model is made from, and whether they fit together.

Weights can be averaged only if they mean the same: one tokenizer, one shape, and one seed. The last because
two networks that were drawn apart may well compute the same, but with their hidden units in another order,
and halfway between them lies neither (Branch-Train-Merge 2208.03306 found perplexities in the thousands).
"""
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from data.batches import EvalBatches
from data.binfile import DataError
from data.prepare import prepared
from data.tokenizers import Tokenizer
from model import GPT, load_model, sparse_layers
from runtime import checkpoint
from runtime.config import all_fields, from_tables
from settings import Config, ConfigError, show

# What sparse branches must agree in, and the mix takes from them.
LAYOUT = ("moe_every", "moe_layers", "n_dense_first", "d_dense", "n_shared", "d_shared", "shared_gate",
          "output_norm")


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
    def n_expert(self):
        """Experts that it brings to a layer: a dense one is one expert."""
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


def check_alike(parents, what, values, remedy):
    """Raises ConfigError naming the run whose value most others do not have (of two runs, the second)."""
    usual = Counter(values).most_common(1)[0][0] if values else None
    for parent, value in zip(parents, values):
        if value != usual:
            other = parents[values.index(usual)].folder
            raise ConfigError(f"{parent.folder} has {what} {value}, {other} has {usual}; {remedy}")


def check_tokenizers(parents):
    names = [f"{p.tokenizer.name} ({p.tokenizer.fingerprint})" for p in parents]
    check_alike(parents, "the tokenizer", names, "a token id must mean the same text to all of them")


def check_settings(parents, *sections, names=None):
    """The settings of these sections (only `names`, where given) that decide what the model computes."""
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
    """Raises ConfigError unless the runs are branches of one seed, with one tokenizer and one shape."""
    check_tokenizers(parents)
    for p in parents:
        if p.config.ffn.kind not in ("dense", "moe"):
            raise ConfigError(f"{p.folder} has ffn.kind = \"{p.config.ffn.kind}\"; only dense and moe models "
                              "can be mixed")
    check_settings(parents, "model")
    check_settings(parents, "ffn", names=["activation"])
    check_settings([p for p in parents if p.is_moe], "ffn", names=LAYOUT)
    check_alike(parents, "experts of hidden width", [p.width for p in parents],
                "all experts of a layer must have one width")
    for folder in strangers(parents):
        raise ConfigError(f"{folder} did not grow from the same seed as the other runs, and an average of "
                          "unrelated weights is noise; train every branch with --train.init_from SEED")


def check_layers(parent, config):
    """Raises ConfigError unless every layer of the run has its place in the mix."""
    f, mine, theirs = config.ffn, sparse_layers(config), sparse_layers(parent.config)
    if parent.is_moe and mine != theirs:
        raise ConfigError(f"{parent.folder} has experts in layers {theirs}, the mix would in {mine}; "
                          "leave out --ffn.moe_every, --ffn.moe_layers and --ffn.n_dense_first")
    narrow = len(mine) < config.model.n_layer and f.d_dense != parent.width
    if not parent.is_moe and (f.n_shared or f.d_shared or f.output_norm or narrow):
        raise ConfigError(f"{parent.folder} is dense: it lacks the shared experts, the output norm or the "
                          "other width of dense layers that the sparse runs have")


def joined_config(parents):
    """The first run's config as tables, with the corpora of all the runs, and without how it was trained from
    another run."""
    tables = parents[0].config.to_dict()
    names = list(dict.fromkeys(name for p in parents for name in p.corpora))
    if names != parents[0].corpora:
        tables["data"].update(name=names, weights=[])
    tables["train"]["init_from"] = ""
    return {name: table for name, table in tables.items() if name != "lifelong"}


def validation(parent, names, block_size):
    """EvalBatches of corpora, by name or path, read with the run's tokenizer: the batches that its own
    training evaluated on, if it was trained on these. Raises DataError."""
    config = from_tables(parent.config.to_dict())
    t = config.train
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.carry_tokenizer(config, parent.tokenizer, Path(folder))
        folders, found = prepared(config.data, names, quiet=False)
    if found.fingerprint != parent.tokenizer.fingerprint:
        raise DataError(f"{', '.join(names)}: has another tokenizer ({found.name}) than {parent.folder} "
                        f"({parent.tokenizer.name}); give corpora that it can read")
    return EvalBatches(folders, block_size, t.batch_size, t.eval_batches, found.token_lengths())
