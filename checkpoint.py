"""The run folder: atomic save, checked load, lock, ancestry.

    runs/<name>/config.toml      what ran, every value resolved
               log.csv          one row per logged step
               ckpt_last.pt     everything needed to go on exactly: weights, buffers, optimizer, header
               ckpt_prev.pt     the checkpoint before that, taken when ckpt_last is damaged
               ckpt_best.pt     weights only, of the lowest validation loss

A checkpoint is data: tensors by name and a JSON header, read with weights_only=True, which executes nothing.
A new one is written beside the old one, flushed to the disk and renamed over it, so that at every moment one
of them is whole.
"""
import csv
import errno
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from config import Config, all_fields, load_config, resolve, show
from data.tokenizers import Tokenizer
from model import GPT

try:
    import fcntl
except ImportError:                                   # Windows has no flock: there a run folder is not locked
    fcntl = None

FORMAT = 1
# A resumed run may change these; everything else would make it another run.
CHANGEABLE = {"train." + name for name in ("max_steps", "eval_every", "eval_batches", "log_every", "save_every",
              "sample_every", "sample_tokens", "device", "compile", "keep", "grad_accum")} | {
              "ffn.dispatch", "ffn.peer_path", "data.dir"}
# A run that starts from another's weights may change these parts of [model] and [ffn]: no tensor depends on
# them.
RETRAINABLE = {"model.dropout", "model.loss_chunks"} | {"ffn." + name for name in (
    "balance", "balance_loss", "load_loss", "device_loss", "comm_loss", "z_loss", "bias_rate", "capacity_factor",
    "eval_capacity_factor", "dispatch", "jitter", "rl_loss", "gumbel_rate", "peer_path")}
LAST, PREVIOUS, BEST = "ckpt_last.pt", "ckpt_prev.pt", "ckpt_best.pt"


class CheckpointError(RuntimeError):
    """A run folder or checkpoint that cannot be used; the message names the file and the remedy."""


class Checkpoint(NamedTuple):
    """What a file holds. header: format, step, tokens, seconds, val_loss, config, tokenizer, ancestry."""
    header: dict
    model: dict                         # name -> tensor
    optimizer: dict                     # "parameter name/state name" -> tensor; empty in ckpt_best


def plain_names(state):
    """Tensors by the names of the uncompiled model."""
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}


def save(path, header, model_state, optimizer_state=None):
    """Writes a checkpoint so that `path` holds the old one or the new one, never a part.

    Raises CheckpointError if the disk is full or the folder cannot be written; the old file then stays.
    """
    path, model_state = Path(path), plain_names(model_state)
    parts = dict(model=model_state, optimizer=optimizer_state or {})
    content = dict(header=json.dumps(dict(header, format=FORMAT)), **parts)
    needed = sum(t.numel() * t.element_size() for part in parts.values() for t in part.values())
    partial = path.with_suffix(".tmp")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as e:
        partial.unlink(missing_ok=True)
        code = getattr(e, "errno", None) or getattr(e.__cause__ or e.__context__, "errno", None)
        free = shutil.disk_usage(path.parent).free if path.parent.exists() else 0
        if code in (errno.ENOSPC, errno.EDQUOT) or free < needed:
            raise CheckpointError(
                f"{path}: the disk is full: {needed / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free; "
                "the checkpoint before it is untouched") from None
        raise CheckpointError(f"{path}: cannot be written: {e}") from None


def load(path, device="cpu"):
    """The Checkpoint in a file, every byte checked. Raises CheckpointError if it is missing, damaged or
    foreign."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:         # torch itself does not compare the checksums it stores
            damaged = archive.testzip()
        if damaged:
            raise zipfile.BadZipFile(f"checksum of {damaged}")
        content = torch.load(path, map_location=device, weights_only=True)
        header = json.loads(content["header"])
        checkpoint = Checkpoint(header, content["model"], content["optimizer"])
    except (zipfile.BadZipFile, EOFError) as e:
        raise CheckpointError(f"{path}: damaged or cut short ({e}); delete it, or copy it again") from None
    except Exception as e:                              # unpickling a foreign file can raise anything at all
        why = f"{type(e).__name__}: {e}".strip().split("\n")[0]
        raise CheckpointError(f"{path}: not a checkpoint of this program ({why})") from None
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: has format {header.get('format')}, this code reads format {FORMAT}")
    return checkpoint


def load_last(folder, device="cpu", say=lambda text: print(text, file=sys.stderr)):
    """The newest whole checkpoint of a run folder: ckpt_last, else the one before it, and says so."""
    try:
        return load(Path(folder) / LAST, device)
    except CheckpointError as e:
        if not (Path(folder) / PREVIOUS).is_file():
            raise
        say(f"{e}; going back to {PREVIOUS}")
        return load(Path(folder) / PREVIOUS, device)


def save_last(folder, header, model_state, optimizer_state, keep_previous=True):
    """Writes ckpt_last.pt and, unless told not to, keeps the one before it as ckpt_prev.pt."""
    folder = Path(folder)
    fresh = folder / "ckpt_new.pt"
    save(fresh, header, model_state, optimizer_state)
    if keep_previous and (folder / LAST).exists():
        os.replace(folder / LAST, folder / PREVIOUS)
    os.replace(fresh, folder / LAST)


def optimizer_tensors(model, optimizer):
    """State of the optimizer by parameter name: {"blocks.0.attention.out.weight/exp_avg": tensor, ...}."""
    names = {p: n for n, p in model.named_parameters()}
    return {f"{names[p]}/{key}": value for p, state in optimizer.state.items()
            for key, value in state.items()}


def load_optimizer(model, optimizer, tensors):
    """Puts saved optimizer state back, parameter by parameter."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, _, what = key.rpartition("/")
        optimizer.state[parameters[name]][what] = value


def load_weights(model, state, where):
    """load_state_dict whose error names the file, the missing and unknown tensors and the changed shapes."""
    own = model.state_dict()
    missing, unknown = [n for n in own if n not in state], [n for n in state if n not in own]
    changed = [f"{n} {tuple(state[n].shape)} -> {tuple(own[n].shape)}" for n in own
               if n in state and state[n].shape != own[n].shape]
    for what, names in (("lacks", missing), ("has the unknown", unknown), ("differs in", changed)):
        if names:
            some = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            raise CheckpointError(f"{where}: {what} {some}: it was saved by other code or another config")
    model.load_state_dict(state)


def load_model(folder, device="cpu", which="best"):
    """(model in evaluation mode, Config, Tokenizer, header) of a run folder.

    which: "best", or "last"; best falls back to last where a run has not been evaluated. Raises
    CheckpointError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such run folder; `python train.py` makes one")
    best = folder / BEST
    checkpoint = load(best, device) if which == "best" and best.exists() else load_last(folder, device)
    config = resolve(Config.from_dict(checkpoint.header["config"], str(folder)))
    model = GPT(config).to(device)
    load_weights(model, checkpoint.model, folder)
    return model.eval(), config, Tokenizer.from_dict(checkpoint.header["tokenizer"]), checkpoint.header


class Lock:
    """Holds a run folder for one process: `with Lock(folder): ...`. The lock ends with the process, however
    it ends."""

    def __init__(self, folder):
        self.path = Path(folder) / "run.lock"

    def __enter__(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+")
        except OSError as e:
            raise CheckpointError(f"{self.path.parent}: cannot be written ({e.strerror}); choose another folder "
                                  "with --out") from None
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise CheckpointError(f"{self.path.parent}: another process is using this run folder; wait for it, "
                                  "or choose another with --out") from None
        return self

    def __exit__(self, *_):
        self.file.close()


def has_run(folder):
    """True if the folder holds a checkpoint."""
    return any((Path(folder) / name).exists() for name in (LAST, PREVIOUS, BEST))


def clear_run(folder):
    """Deletes what a run wrote, and nothing else."""
    for name in (LAST, PREVIOUS, BEST, "ckpt_new.pt", "ckpt_new.tmp", "ckpt_best.tmp", "log.csv",
                 "config.toml"):
        (Path(folder) / name).unlink(missing_ok=True)


def write_text(path, text):
    """Writes a small text file atomically."""
    partial = Path(path).with_suffix(".part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def cut_log(path, step):
    """Drops the rows of log.csv that a resumed run will write again: those past the checkpoint's step, and a
    last row that a killed process left unfinished."""
    if not Path(path).exists():
        return
    csv.field_size_limit(1 << 24)                 # expert_load of many wide layers is longer than csv's limit
    with (open(path, newline="", encoding="utf-8") as old,
          open(f"{path}.part", "w", newline="", encoding="utf-8") as new):
        rows, writer = csv.reader(old), csv.writer(new)
        columns = next(rows, [])
        writer.writerow(columns)
        for row in rows:
            if len(row) == len(columns) and row[0].isdigit() and int(row[0]) <= step:
                writer.writerow(row)
    os.replace(f"{path}.part", path)


def load_init(config, out):
    """The Checkpoint of train.init_from; takes [model] and [ffn] from it into the config. Raises ConfigError
    for a setting in the config file or on the command line that says otherwise: it would not be the same
    model."""
    folder = Path(config.train.init_from)
    which = BEST if (folder / BEST).exists() else LAST
    origin = load(folder / which)
    theirs = Config.from_dict(origin.header["config"], str(folder))
    for key, spec in all_fields():
        section, name = key.split(".")
        mine, its = getattr(getattr(config, section), name), getattr(getattr(theirs, section), name)
        if section not in ("model", "ffn") or key in RETRAINABLE and key in config.sources:
            continue
        if key in config.sources and mine != its:
            config.fail(key, f"but {folder} has {show(its)}; leave it out, the model comes from there")
        setattr(getattr(config, section), name, its)
    if "data.tokenizer" not in config.sources:          # read the text as the model learned to
        tokenizer = Tokenizer.from_dict(origin.header["tokenizer"])
        tokenizer.save(out / "tokenizer.json")
        known = tokenizer.kind in ("byte", "gpt2")
        config.data.tokenizer = tokenizer.kind if known else str(out / "tokenizer.json")
    return origin


def resume_config(folder, path, overrides, say):
    """Config to go on with: the folder's own, with the changes that leave it the same run, each of them
    printed.

    Raises ConfigError for a change that would make it another run.
    """
    config = load_config(folder / "config.toml")
    changed = load_config(path, overrides) if path else load_config(folder / "config.toml", overrides)
    for key in changed.sources if path else [k for k, _ in overrides]:
        section, name = key.split(".")
        old, new = getattr(getattr(config, section), name), getattr(getattr(changed, section), name)
        if old == new or new == "auto":
            continue
        if key not in CHANGEABLE:
            changed.fail(key, f"but this run was started with {show(old)}; start a new run with --out")
        say(f"resume: {key} = {show(new)} (was {show(old)})")
        setattr(getattr(config, section), name, new)
    return config
