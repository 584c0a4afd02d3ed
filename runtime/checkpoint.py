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
import contextlib
import hashlib
import json
import math
import os
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from data.binfile import DataError, replacing
from data.tokenizers import Tokenizer
from runtime import parallel
from runtime.config import all_fields, from_tables, tell, to_toml
from settings import ConfigError, LifelongConfig, show

try:
    import fcntl
except ImportError:                                   # Windows has no flock: there a run folder is not locked
    fcntl = None

FORMAT = 1
# A resumed run may change these; everything else would make it another run.
CHANGEABLE = {"train." + name for name in ("max_steps", "eval_every", "eval_batches", "log_every",
              "save_every", "sample_every", "sample_tokens", "device", "compile", "keep", "grad_accum",
              "parallel")} | {"ffn.dispatch", "ffn.peer_path", "data.dir", "lifelong.teacher"}
# A run that starts from another's weights may change these parts of [model] and [ffn]: no tensor depends on
# them.
RETRAINABLE = {"model.dropout", "model.loss_chunks"} | {"ffn." + name for name in (
    "balance", "balance_loss", "load_loss", "device_loss", "comm_loss", "z_loss", "bias_rate",
    "capacity_factor", "eval_capacity_factor", "dispatch", "jitter", "rl_loss", "gumbel_rate", "peer_path",
    "n_frozen", "frozen_routes")}
LAST, PREVIOUS, BEST = "ckpt_last.pt", "ckpt_prev.pt", "ckpt_best.pt"


class CheckpointError(RuntimeError):
    """A run folder or checkpoint that cannot be used; the message names the file and the remedy."""
    status = 1


class Checkpoint(NamedTuple):
    """What a file holds. header: format, step, tokens, seconds, val_loss, config, tokenizer, ancestry."""
    header: dict
    model: dict                         # name -> tensor
    optimizer: dict                     # "parameter name/state name" -> tensor; empty in ckpt_best


def save(path, header, model_state, optimizer_state=None):
    """Writes a checkpoint so that `path` holds the old one or the new one, never a part.

    Raises CheckpointError if the disk is full or the folder cannot be written; the old file then stays.
    """
    parts = dict(model=model_state, optimizer=optimizer_state or {})
    content = dict(header=json.dumps(dict(header, format=FORMAT)), **parts)
    needed = sum(t.numel() * t.element_size() for part in parts.values() for t in part.values())
    with written(path, needed) as file:
        try:
            torch.save(content, file)
        except RuntimeError as e:                           # torch's own, raised over the OSError of the file
            raise e.__context__ if isinstance(e.__context__, OSError) else OSError(str(e))


@contextlib.contextmanager
def written(path, needed=0):
    """data.binfile.replacing for what lies in a run folder: its failures are CheckpointErrors."""
    try:
        with replacing(path, needed) as file:
            yield file
    except DataError as e:
        raise CheckpointError(str(e)) from None


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
        checkpoint = Checkpoint(json.loads(content["header"]), content["model"], content["optimizer"])
        if (version := checkpoint.header["format"]) == FORMAT:
            check_content(checkpoint)
    except (zipfile.BadZipFile, EOFError) as e:
        raise CheckpointError(f"{path}: damaged or cut short ({e}); delete it, or copy it again") from None
    except Exception as e:                              # unpickling a foreign file can raise anything at all
        why = f"{type(e).__name__}: {e}".strip().split("\n")[0]
        raise CheckpointError(f"{path}: not a checkpoint of this program ({why})") from None
    if version != FORMAT:
        raise CheckpointError(f"{path}: has format {version}, this code reads format {FORMAT}; use the code "
                              "that wrote it")
    return checkpoint


def check_content(checkpoint):
    """Raises some exception unless all is there that is read later, and the settings are known here."""
    from_tables(checkpoint.header["config"])
    Tokenizer.from_dict(checkpoint.header["tokenizer"])
    whole = isinstance(checkpoint.header["step"], int) and "ancestry" in checkpoint.header
    if not whole or not all(isinstance(t, torch.Tensor) for part in checkpoint[1:] for t in part.values()):
        raise ValueError("parts of it are missing")


def load_last(folder, device="cpu", say=tell):
    """The newest whole checkpoint of a run folder: ckpt_last, else the one before it, and says so."""
    try:
        return load(Path(folder) / LAST, device)
    except CheckpointError as e:
        if not can_resume(folder) and (Path(folder) / BEST).is_file():
            raise CheckpointError(f"{folder}: holds {BEST} alone, which lacks what it takes to go on; start "
                                  "from it with --train.init_from, or replace it: --overwrite") from None
        if not (Path(folder) / PREVIOUS).is_file():
            raise
        say(f"{e}; going back to {PREVIOUS}")
        return load(Path(folder) / PREVIOUS, device)


def save_last(folder, header, model_state, optimizer_state, keep_previous=True):
    """Writes ckpt_last.pt and, unless told not to, keeps the one before it as ckpt_prev.pt."""
    folder = Path(folder)
    fresh = folder / "ckpt_new.pt"
    save(fresh, header, model_state, optimizer_state)
    try:
        if keep_previous and (folder / LAST).exists():
            os.replace(folder / LAST, folder / PREVIOUS)
        os.replace(fresh, folder / LAST)
    except OSError as e:                                            # a folder has this name, for instance
        raise CheckpointError(f"{folder / LAST}: cannot be replaced ({e.strerror}); move it away, the new "
                              f"checkpoint is whole and lies in {fresh}") from None


def header_of(trainer):
    """What a training run's checkpoint says beside its tensors."""
    return dict(step=trainer.done, tokens=trainer.tokens, seconds=trainer.seconds, val_loss=trainer.best,
                data=trainer.batches.checksums, config=trainer.config.to_dict(),
                tokenizer=trainer.tokenizer.to_dict(), ancestry=trainer.ancestry)


def save_run(folder, trainer):
    """Writes everything that is needed to go on exactly: ckpt_last.pt. Of several processes, one writes."""
    model = parallel.gather(trainer.model.state_dict(keep_vars=True))
    optimizer = parallel.gather(optimizer_tensors(trainer.model, trainer.optimizer))
    if parallel.rank() == 0:
        keep = trainer.config.train.keep == "all"
        save_last(folder, header_of(trainer), model, optimizer, keep_previous=keep)


def save_best(folder, trainer):
    """Writes ckpt_best.pt: the weights alone."""
    model = parallel.gather(trainer.model.state_dict(keep_vars=True))
    if parallel.rank() == 0:
        save(Path(folder) / BEST, header_of(trainer), model)


def restore(trainer, saved):
    """Takes up a training run's Checkpoint where it stopped."""
    check_text(saved, trainer.batches.checksums, trainer.config)
    load_weights(trainer.model, parallel.spread(saved.model, trainer.model), "the checkpoint")
    load_optimizer(trainer.model, trainer.optimizer, parallel.spread(saved.optimizer, trainer.model))
    trainer.done, trainer.seconds = saved.header["step"], saved.header["seconds"]
    trainer.best, trainer.ancestry = saved.header["val_loss"], saved.header["ancestry"]


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
        optimizer.state[parameters[name]][what] = value.to(parameters[name].device)


def check_text(saved, checksums, config):
    """Raises ConfigError if the run was started with other text than its corpora hold now. A model that was
    made, not trained, has read none."""
    if saved.header.get("data", checksums) != checksums:
        config.fail("data.name", "holds other text than when this run was started; prepare that again, or "
                    "start a new run from these weights with train.init_from")


def check_vocabulary(config, tokenizer, origin):
    """Sets model.vocab_size from the tokenizer; raises ConfigError where model, checkpoint and data do not
    fit."""
    if origin and origin.header["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        raise ConfigError(f"data.name = {show(config.data.name)} was prepared with another tokenizer "
                          f"({tokenizer.name}) than the checkpoint was trained with; set data.tokenizer to "
                          "that one")
    if config.model.vocab_size and config.model.vocab_size < tokenizer.vocab_size:
        config.fail("model.vocab_size", f"is less than the {tokenizer.vocab_size} tokens of the tokenizer")
    config.model.vocab_size = config.model.vocab_size or tokenizer.vocab_size


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


def fold_adapters(state, alpha):
    """Plain weights W + (alpha / r) B A from those of a run with low-rank adapters (lifelong.LoRA); a state
    without adapters as it is."""
    plain = {n: t for n, t in state.items() if not n.endswith((".lora_a", ".lora_b"))}
    for name in (n for n in state if n.endswith(".lora_a")):
        layer, a = name.removesuffix(".lora_a"), state[name]                                # (r, in)
        plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + alpha / len(a) * state[f"{layer}.lora_b"] @ a
    return plain


def load_plain(folder, device="cpu", which="best"):
    """The Checkpoint of a run folder with the weights of a plain GPT, adapters folded in.

    which: "best", or "last"; best falls back to last where a run has not been evaluated. Raises
    CheckpointError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such run folder; `python train.py` makes one")
    best = folder / BEST
    checkpoint = load(best, device) if which == "best" and best.exists() else load_last(folder, device)
    alpha = checkpoint.header["config"].get("lifelong", {}).get("lora_alpha", 0.0)
    return checkpoint._replace(model=fold_adapters(checkpoint.model, alpha))


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
            raise CheckpointError(f"{self.path.parent}: cannot be written ({e.strerror}); choose another "
                                  "folder with --out") from None
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.file.close()
            raise CheckpointError(f"{self.path.parent}: another process is using this run folder; wait for "
                                  "it, or choose another with --out") from None
        return self

    def __exit__(self, *_):
        self.file.close()


def has_run(folder):
    """True if the folder holds a checkpoint."""
    return any((Path(folder) / name).exists() for name in (LAST, PREVIOUS, BEST))


def can_resume(folder):
    """True if the folder holds a checkpoint to go on from; a run that was killed early may have none but
    ckpt_best."""
    return any((Path(folder) / name).exists() for name in (LAST, PREVIOUS))


def clear_run(folder):
    """Deletes what a run wrote, and nothing else."""
    for name in (LAST, PREVIOUS, BEST, "ckpt_new.pt", "log.csv", "config.toml"):
        (Path(folder) / name).unlink(missing_ok=True)
        (Path(folder) / f".{name}.tmp").unlink(missing_ok=True)         # left by a process that was killed


def check_free(out, overwrite, sources=()):
    """Raises ConfigError if a run folder holds a run that a new one may not replace, or that the new one is
    made from (`sources`: run folders, or empty texts). Call it within the folder's Lock; clear_run comes
    later, in the moment before the first file of the new run is written."""
    if any(source and Path(source).resolve() == Path(out).resolve() for source in sources):
        raise ConfigError(f"{out} is what the new run is made from; choose another folder with --out")
    if has_run(out) and not overwrite:
        raise ConfigError(f"{out} already holds a run: `python train.py --out {out} --resume` goes on with "
                          "it, --overwrite replaces it, --out DIR takes another folder")


def save_made(out, config, state, tokenizer, ancestry):
    """Writes a model that was made, not trained (expanded, mixed, averaged), as an ordinary run folder at
    step 0, which trains on (--resume, train.init_from), samples and is plotted like any other.

    config: resolved, of the made model; how its parents came to be (train.init_from, [lifelong]) is left out
    of what is written. state: tensors by plain names. ancestry: dict(kind, run, parents, ...). Call it within
    Lock(out), after check_free() and clear_run().
    """
    config = from_tables(config.to_dict())
    config.train.init_from, config.lifelong = "", LifelongConfig()
    header = dict(step=0, tokens=0, seconds=0.0, val_loss=math.inf, config=config.to_dict(),
                  tokenizer=tokenizer.to_dict(), ancestry=ancestry)
    write_text(Path(out) / "config.toml", to_toml(config))
    save(Path(out) / BEST, header, state)
    save(Path(out) / LAST, header, state)


def write_text(path, text):
    """Writes a small text file atomically. Raises CheckpointError."""
    with written(path) as file:
        file.write(text.encode())


def tokenizer_of(saved):
    """The Tokenizer that a Checkpoint's model reads with."""
    return Tokenizer.from_dict(saved.header["tokenizer"])


def carry_tokenizer(config, tokenizer, out):
    """Makes a config read its corpora with this tokenizer, which is put into the folder `out`."""
    tokenizer.save(out / "tokenizer.json")
    known = tokenizer.kind in ("byte", "gpt2")
    config.data.tokenizer = tokenizer.kind if known else str(out / "tokenizer.json")


def sign(ancestry, folder, table):
    """Notes in an ancestry whose folder it is and, once, what its run began with: a short hash of the
    embedding table, equal for two runs that start from one trained model, or from one draw of random
    numbers."""
    ancestry["run"] = str(folder)
    numbers = table.detach().float().cpu().numpy()
    ancestry.setdefault("start", hashlib.sha256(numbers.tobytes()).hexdigest()[:12])


def adopt(config, origin, folder):
    """Takes [model] and [ffn] into a config from the Checkpoint `origin` that its run starts from. Raises
    ConfigError for a setting in the config file or on the command line that says otherwise: it would not be
    the same model."""
    theirs = from_tables(origin.header["config"], str(folder))
    for key, spec in all_fields():
        section, name = key.split(".")
        mine, its = config.get(key), theirs.get(key)
        if section not in ("model", "ffn") or key in RETRAINABLE and key in config.sources:
            continue
        if key in config.sources and mine != its:
            config.fail(key, f"but {folder} has {show(its)}; leave it out, the model comes from there")
        setattr(getattr(config, section), name, its)


def resume_config(folder, saved, changed):
    """Config to go on with: that of the Checkpoint `saved`, with what the Config `changed` (the folder's
    config.toml or another file, and the command line) says otherwise, as long as that leaves it the same run;
    each change is printed.

    Raises ConfigError for a change that would make it another run.
    """
    config = from_tables(saved.header["config"], f"{folder}/{LAST}")
    for key in changed.sources:
        section, name = key.split(".")
        old, new = config.get(key), changed.get(key)
        if old == new or new == "auto":
            continue
        if key not in CHANGEABLE:
            changed.fail(key, f"but this run was started with {show(old)}; start a new run with --out")
        tell(f"resume: {key} = {show(new)} (was {show(old)})", sys.stdout)
        setattr(getattr(config, section), name, new)
    return config
