"""Bad files: cut short, bits flipped, empty, of another kind, made to do harm. Each must end in one line that
names the file, with status 1 or 2; where a program can do without the file, or mend it, it must say so."""
import os
import pickle
import shutil

import torch

import sample
import train
from data import prepare as preparing
from grow import btx, lifelong
from lab import experiment, plots
from lab.papers import evaluate
from runtime import checkpoint
from runtime.config import all_fields

from .home import TINY, call, same_checkpoints, words
from .programs import EXPERIMENT

FOREIGN = [b"\0", b"\xff\xfe\xfd", b"hello\n", b"[]", b"{}", b"null", b"[model]\nn_layer = 2\n",
           b"step,loss\n1,2\n", b"PK\3\4", b"PK\5\6" + bytes(18), b"\x89PNG\r\n\x1a\n" + bytes(40),
           b"\x1f\x8b\x08" + bytes(40), b"MOETOKEN", b"[" * 200_000, b'{"a":' * 200_000,
           b"a = " + b"[" * 200_000, b"\r\n" * 50, "ünïcödé\U0001f600".encode()]


class Harm:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def damage(rng, path, mark, others):
    """Damages a file; returns the name of what was done. mark: folder that a harmful file would make; others:
    files of other kinds."""
    raw, kind = path.read_bytes(), rng.choice(DAMAGES)
    if kind == "cut":
        raw = raw[:rng.randrange(len(raw))]
    elif kind == "flip":
        raw = bytearray(raw)
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif kind == "longer":
        raw += rng.choice(FOREIGN)
    elif kind == "noise":
        raw = rng.randbytes(rng.choice([1, 10, 5000]))
    elif kind == "swapped":
        raw = rng.choice(others).read_bytes()
    elif kind == "foreign":
        raw = rng.choice(FOREIGN)
    elif kind == "pickle":
        raw = pickle.dumps(Harm(mark))
    elif kind == "torch pickle":
        harmless = {"weights": torch.zeros(3)}
        torch.save(rng.choice([Harm(mark), {"header": Harm(mark)}, harmless, [1, 2]]), path)
        return kind
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(b"" if kind == "empty" else raw)
    return kind


DAMAGES = ["cut", "cut", "flip", "flip", "flip", "empty", "longer", "noise", "swapped", "foreign", "foreign",
           "pickle", "torch pickle", "folder", "missing"]


def check_input(rng, home, folder):
    """(kind of file, damage, what came of it, what is wrong or "")."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    case = rng.choice(list(CASES))
    return case, *CASES[case](rng, home, folder)


def outcome(kind, result, names, mark, fine):
    """(damage, "refused" or "done without", what is wrong). fine(result): whether it may have succeeded."""
    if mark.exists():
        return kind, "", f"the {kind} file was executed"
    said = result.refusal()
    if result.status == 0 and fine(result):
        return kind, "done without", ""
    if said is None:
        return kind, "", f"{kind}: ended with {result.status}: {result.out[-500:]} {result.err[-3000:]}"
    return kind, "refused", "" if any(name in said for name in names) else f"{kind}: names no file: {said}"


def readers(rng, home, run, new):
    """(program, the checkpoint that it reads, its arguments) for a run folder, by chance."""
    grows = {"moe": (lifelong.main, checkpoint.BEST, ["expand", run, "--add", "1", "--out", new]),
             "dense": (btx.main, checkpoint.BEST, ["upcycle", run, "--out", new, "--n_expert", "2"]),
             "peer": (btx.main, checkpoint.BEST, ["merge", run, home.folder / "peer", "--out", new])}
    starts = [word for word in home.command(new, {"train.init_from": run})
              if not str(word).startswith(("--model.", "--ffn."))]              # which are the run's
    resumes = ["--out", run, "--resume", "--quiet", "--train.max_steps", "5"]
    return rng.choice([grows[run.name], (train.main, checkpoint.BEST, starts), (train.main, checkpoint.LAST, resumes),
                       (sample.main, checkpoint.BEST, [run, "--tokens", "3"]), (evaluate.main, checkpoint.LAST, [run]),
                       (plots.main, checkpoint.BEST, [run])])


def bad_checkpoint(rng, home, folder):
    """A run whose checkpoint is bad, read by every program that reads one."""
    name, mark = rng.choice(list(home.RUNS)), folder / "harm"
    run = shutil.copytree(home.folder / name, folder / name)
    program, reads, argv = readers(rng, home, run, folder / "new")
    victim, good = run / reads, shutil.copy(run / reads, folder / "good.pt")
    previous = rng.random() < 0.4
    if not previous:
        (run / checkpoint.PREVIOUS).unlink()
    kind = damage(rng, victim, mark, others(home))
    whole = unharmed(victim, good)                  # now: training will replace it
    result = call(program, *argv)

    another = kind == "swapped" and is_checkpoint(victim)

    def fine(result):                               # it was replaced, and that was said; or it is unharmed
        not_needed = kind == "missing" and (program is not train.main or reads == checkpoint.BEST)
        replaced = previous and "going back" in result.err
        return not_needed or replaced or another or program is plots.main or whole

    names = [victim.name, str(run)] + [""] * another
    return outcome(kind, result, names, mark, fine)


def is_checkpoint(path):
    try:
        return bool(checkpoint.load(path))
    except checkpoint.CheckpointError:
        return False


def unharmed(path, good):
    return is_checkpoint(path) and not same_checkpoints(path, good)


def others(home):
    files = "prepared/one-byte/train.bin", "prepared/one-byte/tokenizer.json", "one.txt", "moe/log.csv", \
        "moe/config.toml", f"dense/{checkpoint.BEST}"
    return [home.folder / name for name in files]


def bad_data(rng, home, folder):
    """A prepared corpus with a bad file: training refuses it, preparing mends it."""
    tokenizer, data, mark = rng.choice(["byte", "char", "bpe"]), folder / "prepared", folder / "harm"
    prepares = ["--tokenizer", tokenizer, "--vocab_size", "260", "--out", data, "--quiet"]
    call(preparing.main, home.folder / "one.txt", *prepares)
    prepared, = (path for path in data.iterdir() if path.is_dir())
    whole = {path.name: path.read_bytes() for path in prepared.iterdir()}
    victim = prepared / rng.choice(sorted(whole))
    kind = damage(rng, victim, mark, others(home))
    if rng.random() < 0.4:
        result = call(preparing.main, home.folder / "one.txt", *prepares)
    else:
        settings = {"data.dir": data, "data.tokenizer": tokenizer, "data.vocab_size": 260}
        result = home.train(folder / "run", settings)

    def fine(result):                                       # mended, or swapped for one that is the same
        return {path.name: path.read_bytes() for path in prepared.iterdir()} == whole

    return outcome(kind, result, [victim.name], mark, fine)


def bad_tokenizer(rng, home, folder):
    """A tokenizer.json given by its path."""
    own, mark = folder / "own.json", folder / "harm"
    shutil.copy(home.data / rng.choice(["one-byte", "two-byte"]) / "tokenizer.json", own)
    for path in home.data.glob("*-bpe*/tokenizer.json"):
        if rng.random() < 0.7:
            shutil.copy(path, own)
    kind = damage(rng, own, mark, others(home))
    argv = home.folder / "one.txt", "--tokenizer", own, "--out", folder / "out", "--quiet"
    result = call(preparing.main, *argv)
    return outcome(kind, result, [own.name], mark, lambda result: kind in ("flip", "longer", "swapped"))


def bad_config(rng, home, folder):
    """A settings file, of a new run or in the folder of one that goes on."""
    mark = folder / "harm"
    run = shutil.copytree(home.folder / rng.choice(list(home.RUNS)), folder / "run")
    own = shutil.copy(run / "config.toml", folder / "own.toml")
    victim = rng.choice([run / "config.toml", own])
    kind = damage(rng, victim, mark, others(home))
    more = words({k: v for k, v in TINY.items() if k.startswith("train.")})   # no flipped digit makes it long
    resumes = ["--out", run, "--resume", "--quiet", "--train.max_steps", "5"]
    argv = resumes if victim.parent == run else [victim, "--out", folder / "new", "--quiet", *more]
    result = call(train.main, *argv)
    keys = [key for key, _ in all_fields()]
    lost = "one: is neither"                        # cut between two lines: where its corpus is, is not there
    names = [victim.name, lost, *keys]
    return outcome(kind, result, names, mark, lambda result: True)                  # it may still be a config


def bad_log(rng, home, folder):
    """A log.csv, for a run that goes on and for the figures."""
    name, mark = rng.choice(list(home.RUNS)), folder / "harm"
    run = shutil.copytree(home.folder / name, folder / name)
    kind = damage(rng, run / "log.csv", mark, others(home))
    resumes = ["--out", run, "--resume", "--quiet", "--train.max_steps", "5"]
    result = call(train.main, *resumes) if rng.random() < 0.5 else call(plots.main, run)
    return outcome(kind, result, ["log.csv"], mark, lambda result: True)            # whole rows are kept


def bad_text(rng, home, folder):
    """A corpus of the user's."""
    victim, mark = folder / "text.txt", folder / "harm"
    shutil.copy(home.folder / rng.choice(["one.txt", "two.txt"]), victim)
    kind = damage(rng, victim, mark, others(home))
    if kind == "folder":
        (victim / "inside.txt").write_bytes(rng.choice(FOREIGN))
    tokenizer = rng.choice(["byte", "char", "bpe"])
    argv = [victim, "--tokenizer", tokenizer, "--vocab_size", "300", "--out", folder / "out", "--quiet"]
    names = ["text.txt", "text:", "inside.txt"]
    return outcome(kind, call(preparing.main, *argv), names, mark, lambda result: True)


def bad_experiment(rng, home, folder):
    """An experiment file; its arms are listed, not run."""
    victim, mark = folder / "own.toml", folder / "harm"
    victim.write_text(EXPERIMENT.format(empty=home.empty, data=home.data))
    kind = damage(rng, victim, mark, others(home))
    return outcome(kind, call(experiment.main, victim, "--list"), ["own.toml"], mark, lambda result: True)


CASES = dict(checkpoint=bad_checkpoint, data=bad_data, tokenizer=bad_tokenizer, config=bad_config,
             log=bad_log, text=bad_text, experiment=bad_experiment)
