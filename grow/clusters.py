"""Domains that nobody has labelled: text cut into k clusters of one size, for c-BTM (Gururangan et
al. 2303.14177).

    python -m grow.clusters python docs math --k 3
        clusters-0, clusters-1, clusters-2: corpora that train.py reads by name (--data.name), each
        for a branch of one seed (--train.init_from)
    python -m grow.btx ensemble runs/a runs/b runs/c --centres data/prepared/clusters.npz \\
            --eval docs
        the branches, weighed by how near the text so far is to their clusters

The text is cut into windows of 1 KiB, each a vector of byte trigrams (grow/trigrams.py). Balanced
k-means takes turns: windows are assigned to k centres by the least sum of squared distances with
which the sizes of clusters differ by at most one; then each centre becomes the mean of its windows.
Validation windows are assigned to the last centres by the same rule. A cluster keeps
its windows in the order of the text.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from data.batches import keyed_generator
from data.binfile import DataError, explained, open_bin, replacing
from data.building import build
from data.console import plain, progress, working
from data.corpora.corpus import Corpus, short_hash
from data.corpora.sources import is_known
from data.folders import folders_of, inspect_folder, one_at_a_time
from data.prepare import prepared, shown
from grow.trigrams import FEATURES, distances, vectors
from kernels.assignment import balanced_assignment
from runtime.config import Parser, parse
from runtime.ending import Ending
from runtime.files import write_text
from settings import ConfigError, DataConfig

WINDOW = 1024           # bytes
ROUNDS = 50             # of k-means, at most


# --- balanced k-means ---


def assign(distance):
    """The cluster of each window, (N, k) -> (N,): sizes differ by at most one. The sum of distances
    is least, up to the auction's tolerance, where k divides N."""
    N, k = distance.shape
    scores, whole = torch.from_numpy(-distance), N - N % k
    # the last N mod k windows go to as many different clusters, after the others
    parts = [part for part in (scores[:whole], scores[whole:]) if len(part)]
    return torch.cat([balanced_assignment(part) for part in parts]).numpy()


def first_centres(x, k, rng):
    """k windows, (k, F): each drawn in proportion to its squared distance to those before it."""
    chosen = [int(rng.integers(x.n))]
    while len(chosen) < k:
        far = distances(x, x.dense(chosen)).min(1).clip(1e-9)
        chosen.append(int(rng.choice(x.n, p=far / far.sum())))
    return x.dense(chosen)


def means(x, cluster, k):
    """(k, F): the mean vector of each cluster."""
    total = np.bincount(cluster[x.row] * FEATURES + x.feature, x.value, k * FEATURES)
    return total.reshape(k, FEATURES) / np.bincount(cluster, minlength=k)[:, None]


def balanced_kmeans(x, k, rng):
    """(cluster (N,), centres (k, F), the sum of squared distances after each assignment)."""
    def total(assigned):
        return float(distance[np.arange(x.n), assigned].sum())

    centres, cluster, history = first_centres(x, k, rng), None, []
    for _ in range(ROUNDS):
        distance = distances(x, centres)
        new = assign(distance)
        # an assignment is best up to the auction's tolerance: one that is no better is the end
        if cluster is not None and total(new) >= total(cluster):
            break
        cluster, centres = new, means(x, new, k)
        history.append(total(cluster))
    return cluster, centres, history


# --- corpora ---


def windows_of(folders, part, most, lengths):
    """(windows, corpus (N,)): arrays of tokens of about 1 KiB, and which folder each is from; of
    more than `most` in one folder that many, evenly spaced (0: all)."""
    windows, sizes = [], []
    for folder in folders:
        tokens, _ = open_bin(folder / f"{part}.bin")
        begins = lengths[tokens].cumsum() - lengths[tokens]
        cuts = np.searchsorted(begins, np.arange(WINDOW, begins[-1] + 1, WINDOW))
        pieces = np.split(tokens, cuts)
        n = min(most or len(pieces), len(pieces))
        windows += [pieces[i] for i in np.arange(n) * len(pieces) // n]
        sizes.append(n)
    return windows, np.repeat(np.arange(len(folders)), sizes)


def read_bytes(windows, tokenizer, quiet):
    """Yields the bytes of each window, uint8 (n,)."""
    with progress(len(windows), "counting trigrams", quiet, unit=" windows") as bar:
        for ids in windows:
            bar.update()
            yield np.frombuffer(tokenizer.decode_bytes(ids), np.uint8)


def cut(options, folders, tokenizer):
    """({part: [windows of each cluster]}, table (k, corpora) of training windows, centres, idf,
    history) of prepared folders. Raises DataError."""
    k, quiet, lengths = options.k, options.quiet, tokenizer.token_lengths()
    train, label = windows_of(folders, "train", options.windows, lengths)
    val, _ = windows_of(folders, "val", -(-options.windows // 10), lengths)
    for part, windows in (("training", train), ("validation", val)):
        if len(windows) < k:
            raise DataError(f"{', '.join(options.corpora)}: the {part} part has {len(windows)} "
                            f"windows of {WINDOW} bytes, fewer than --k {k}; give more text or "
                            "fewer clusters")
    x, idf = vectors(read_bytes(train, tokenizer, quiet))
    with working("balanced k-means", quiet):
        cluster, centres, history = balanced_kmeans(x, k, keyed_generator(options.seed))
        x, _ = vectors(read_bytes(val, tokenizer, quiet), idf)
        val_cluster = assign(distances(x, centres))
    table = [np.bincount(label[cluster == j], minlength=len(folders)) for j in range(k)]
    made = {part: [[window for window, at in zip(windows, assigned) if at == j] for j in range(k)]
            for part, windows, assigned in (("train", train, cluster), ("val", val, val_cluster))}
    return made, np.stack(table), centres, idf, history


def write(options, made, source, folders, tokenizer):
    """Makes the clusters' prepared folders; returns the checksums of their training tokens."""
    checksums = []
    for j, folder in enumerate(folders):
        corpus = Corpus(f"{options.name}-{j}", lambda part: iter(made[part][j]), source,
                        sum(map(len, made["train"][j])), "windows", tokenizer=tokenizer)
        settings = dict(label=folder.name, source=source, max_tokens=0, trained_on=None)
        (train, _), _ = build(folder, corpus, tokenizer, settings, quiet=options.quiet,
                              replaces=inspect_folder(folder) is not None)
        checksums.append(train["sha256"])
    return checksums


# --- the program ---


def check_options(o):
    """Raises ConfigError for options that make no sense."""
    word = o.name and Path(o.name).name == o.name and o.name.isprintable()
    for fine, text in [
            (o.k >= 1, f"--k {o.k} must be at least 1"),
            (o.windows >= 0, f"--windows {o.windows} must be at least 0"),
            (o.seed >= 0, f"--seed {o.seed} must be at least 0"),
            (word, f"--name {plain(o.name)} must be a word, with which the clusters' names begin"),
            (not is_known(f"{o.name}-0"), f"--name {o.name}: {o.name}-0 is another corpus")]:
        if not fine:
            raise ConfigError(text)


def command(options):
    """Makes the clusters, says what they hold. Raises ConfigError, DataError, CheckpointError."""
    check_options(options)
    data = DataConfig(tokenizer=options.tokenizer, dir=options.out or "")
    sources, tokenizer = prepared(data, options.corpora, options.quiet)
    made, table, centres, idf, history = cut(options, sources, tokenizer)
    # how pure they are: the share of windows from the corpus that most in their cluster are from
    row = dict(purity=float(table.max(1).sum() / table.sum()), objective=history[-1],
               rounds=len(history), windows=int(table.sum()))
    # the corpora, and last the centres
    names, out = [f"{options.name}-{j}" for j in range(options.k)], sources[0].parent
    source = (f"{options.k} clusters of {', '.join(options.corpora)}, seed {options.seed}, state "
              + short_hash(centres.tobytes(), row))
    with explained(out), one_at_a_time(out):
        folders = folders_of(names, str(sources[0] / "tokenizer.json"), dir=out)
        about = dict(row, source=source, checksums=write(options, made, source, folders, tokenizer))
        with replacing(out / f"{options.name}.npz") as file:
            np.savez(file, centres=centres, idf=idf, about=json.dumps(about))
    if options.json:
        write_text(options.json, json.dumps(row))
    # which corpora the windows of each cluster are from
    lines = [("windows from", *(Path(name).name for name in options.corpora)),
             *((name, *counts) for name, counts in zip(names, table))]
    if not options.quiet:
        print(*(f"{name:<16}" + "".join(f"{cell:>12}" for cell in cells) for name, *cells in lines),
              f"purity {row['purity']:.3f}, sum of squared distances {history[-1]:.1f} after "
              f"{len(history)} rounds; in {shown(out)}, with {options.name}.npz", sep="\n")


def main(argv=None):
    """The program; returns its exit status."""
    parser = Parser(prog="python -m grow.clusters", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", metavar="CORPUS", help="names, text files or folders")
    for name, default, meta, meaning in [
            ("k", 4, "K", "clusters"),
            ("name", "clusters", "NAME", "they are NAME-0, NAME-1, ...; NAME.npz has the centres"),
            ("windows", 0, "N", "at most N training windows of each corpus, a tenth of that for "
             "validation; 0: all"),
            ("seed", 0, "S", "of the first centres"),
            ("tokenizer", "byte", "KIND", "as in data/prepare.py; that of the seed")]:
        parser.add_argument(f"--{name}", type=type(default), default=default, metavar=meta,
                            help=f"{meaning} (default: {default})")
    parser.add_argument("--out", metavar="DIR", help="where the corpora are prepared and the "
                        "clusters are made, a config's data.dir (default: data/prepared)")
    parser.add_argument("--json", metavar="FILE", help="write purity and sum of squared distances")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    with Ending() as end:
        command(parse(parser, argv)[0])
    return end.status


if __name__ == "__main__":
    sys.exit(main())
