"""The run folder: what lies in it, its lock, going on with it, starting from it, ancestry.

    runs/<name>/config.toml      what ran, every value resolved
               log.csv          one row per logged step
               ckpt_last.pt     everything needed to go on exactly: weights, buffers, optimizer, header
               ckpt_prev.pt     the checkpoint before that, taken when ckpt_last is damaged
               ckpt_best.pt     weights only, of the lowest validation loss

A new checkpoint is written beside the old one, flushed to the disk and renamed over it (files.py), so that at
every moment one of them is whole.
"""
import contextlib
import hashlib
import math
import os
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.binfile import explain
from data.tokenizers import Tokenizer
from runtime import parallel
from runtime.config import all_fields, from_tables, to_toml
from runtime.ending import program, quoted, tell
from runtime.files import CheckpointError, load, save, save_each, there, write_text
from settings import ConfigError, LifelongConfig, show

try:
    import fcntl
except ImportError:                                   # Windows has no flock: there a run folder is not locked
    fcntl = None

# A resumed run may change these; everything else would make it another run.
CHANGEABLE = {"train." + name for name in ("max_steps", "eval_every", "eval_batches", "log_every",
              "save_every", "sample_every", "sample_tokens", "device", "compile", "keep", "grad_accum",
              "parallel")} | {"ffn.dispatch", "ffn.peer_path", "data.dir", "lifelong.teacher"}
# A run that starts from another's weights may change these parts of [model] and [ffn]: no tensor depends on
# them.
RETRAINABLE = {"model.dropout", "model.loss_chunks"} | {"ffn." + name for name in (
    "balance", "eval_prices", "balance_loss", "load_loss", "device_loss", "comm_loss", "z_loss", "bias_rate",
    "capacity_factor", "eval_capacity_factor", "dispatch", "jitter", "rl_loss", "gumbel_rate", "peer_path",
    "n_frozen", "frozen_routes")}
LAST, PREVIOUS, BEST = "ckpt_last.pt", "ckpt_prev.pt", "ckpt_best.pt"


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what is safe."""
    status = 1


def load_last(folder, device="cpu", say=tell, mapped=False):
    """The newest whole checkpoint of a run folder: ckpt_last, else the one before it, and says so."""
    try:
        return load(Path(folder) / LAST, device, mapped)
    except CheckpointError as e:
        if not can_resume(folder) and there(Path(folder) / BEST):
            raise CheckpointError(f"{folder}: holds {BEST} alone, which lacks what it takes to go on; start "
                                  "from it with --train.init_from, or replace it: --overwrite") from None
        # one that is whole but not ours to read is no reason to go back
        if isinstance(e.__cause__, PermissionError) or not there(Path(folder) / PREVIOUS):
            raise
        say(f"{e}; going back to {PREVIOUS}")
        return load(Path(folder) / PREVIOUS, device, mapped)


def save_last(folder, header, model_state, optimizer_state, keep_previous=True):
    """Writes ckpt_last.pt and, unless told not to, keeps the one before it as ckpt_prev.pt."""
    folder = Path(folder)
    fresh = folder / "ckpt_new.pt"
    save(fresh, header, model_state, optimizer_state)
    try:
        if keep_previous and there(folder / LAST):
            os.replace(folder / LAST, folder / PREVIOUS)
        os.replace(fresh, folder / LAST)
    except OSError as e:                                            # a folder has this name, for instance
        raise CheckpointError(f"{folder / LAST}: cannot be replaced ({e.strerror}); move it away, the new "
                              f"checkpoint is whole and lies in {fresh}") from None


def go_on(folder):
    """What to do when a run in this folder ended early."""
    if can_resume(folder):
        return f"go on with `{program('train.py')} --out {quoted(folder)} --resume`"
    return "run the command again with --overwrite"


@contextlib.contextmanager
def going_on(folder):
    """Lets a failure to write what a run leaves say how the run goes on."""
    try:
        yield
    except CheckpointError as e:
        raise CheckpointError(str(e).replace("run the command again", go_on(folder))) from None


def check_finite(folder, trainer, *parts):
    """Raises TrainingError if a number of the weights or the optimizer's state is infinite or none at all:
    such a checkpoint must not take the place of a good one."""
    for name, t in (item for part in parts for item in part.items()):
        if t.is_floating_point() and not t.isfinite().all():
            kept = "none was saved before"
            if can_resume(folder):
                kept = f"the checkpoint before is kept, {go_on(folder)}"
            raise TrainingError(f"after step {trainer.done} {name} is not finite; nothing is saved, {kept}, or "
                                "start anew with a lower train.lr, a longer train.warmup_steps or a smaller "
                                "train.grad_clip")


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
        check_finite(folder, trainer, model, optimizer)
        keep = trainer.config.train.keep == "all"
        with going_on(folder):
            save_last(folder, header_of(trainer), model, optimizer, keep_previous=keep)


def save_best(folder, trainer):
    """Writes ckpt_best.pt: the weights alone."""
    model = parallel.gather(trainer.model.state_dict(keep_vars=True))
    if parallel.rank() == 0:
        check_finite(folder, trainer, model)
        with going_on(folder):
            save(Path(folder) / BEST, header_of(trainer), model)


def restore(trainer, saved):
    """Takes up a training run's Checkpoint where it stopped."""
    check_text(saved, trainer.batches.checksums, trainer.config)
    # cut otherwise into micro-steps, some models would be trained for another objective
    old, why = saved.header["config"]["train"]["grad_accum"], trainer.model.per_micro_batch()
    if saved.header["step"] and trainer.config.train.grad_accum != old and why:
        trainer.config.fail("train.grad_accum", f"but this run was started with {old}, and it changes what is "
                            f"trained with {', '.join(why)}; start a new run with --out")
    load_weights(trainer.model, parallel.spread(saved.model, trainer.model), "the checkpoint")
    load_optimizer(trainer.model, trainer.optimizer, parallel.spread(saved.optimizer, trainer.model))
    trainer.done, trainer.seconds = saved.header["step"], saved.header["seconds"]
    trainer.planned = saved.header["config"]["train"]["max_steps"]
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


class Undrawn(TorchDispatchMode):
    """Leaves weights that are drawn as they are: memory that nobody writes in takes no room."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        drawn = func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
        return args[0] if drawn else func(*args, **(kwargs or {}))


def undrawn(true):
    """`with undrawn(true):` a model is made whose weights come from elsewhere."""
    return Undrawn() if true else contextlib.nullcontext()


def load_weights(model, state, where, mapped=False):
    """load_state_dict whose error names the file, the missing and unknown tensors and the changed shapes and
    dtypes. What a layer may_lack stays as it was made. mapped: the model takes the tensors themselves, in
    their dtype; else bfloat16 becomes what the model has."""
    own = model.state_dict()
    spare = {f"{path}.{name}": told for path, module in model.named_modules()
             for name, told in getattr(module, "may_lack", {}).items() if f"{path}.{name}" not in state}
    state = state | {name: own[name] for name in spare}
    for told in sorted(set(spare.values()) - {""}):
        tell(f"{where}: {told}")
    missing, unknown = [n for n in own if n not in state], [n for n in state if n not in own]
    def kind(t):
        text = f"{tuple(t.shape)} {t.dtype}".removesuffix(" torch.float32").removesuffix(" torch.bfloat16")
        return text.replace("torch.", "")

    changed = [f"{n} {kind(state[n])} -> {kind(own[n])}" for n in own
               if n in state and kind(state[n]) != kind(own[n])]
    for what, names in (("lacks", missing), ("has the unknown", unknown), ("differs in", changed)):
        if names:
            some = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            raise CheckpointError(f"{where}: {what} {some}: it was saved by other code or another config")
    if not mapped:
        model.load_state_dict(state)
        return
    for name, t in model.state_dict(keep_vars=True).items():
        t.data = state[name].data


def fold_adapters(state, alpha):
    """Plain weights W + (alpha / r) B A from those of a run with low-rank adapters (lifelong.LoRA); a state
    without adapters as it is."""
    plain = {n: t for n, t in state.items() if not n.endswith((".lora_a", ".lora_b"))}
    for name in (n for n in state if n.endswith(".lora_a")):
        layer, a = name.removesuffix(".lora_a"), state[name]                                # (r, in)
        plain[f"{layer}.weight"] = plain[f"{layer}.weight"] + alpha / len(a) * state[f"{layer}.lora_b"] @ a
    return plain


def load_plain(folder, device="cpu", which="best", mapped=False):
    """The Checkpoint of a run folder with the weights of a plain GPT, adapters folded in.

    which: "best", or "last"; best falls back to last where a run has not been evaluated. mapped: as in
    files.load. Raises CheckpointError.
    """
    if not str(folder):
        raise CheckpointError("the name of the run folder is empty; give one")
    folder = Path(os.path.expanduser(folder))
    if not there(folder):
        raise CheckpointError(f"{folder}: no such run folder; `{program('train.py')}` makes one")
    best = folder / BEST
    load_one = load if which == "best" and there(best) else load_last
    checkpoint = load_one(best if load_one is load else folder, device, mapped=mapped)
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
        except (OSError, ValueError) as e:
            remedy = "choose another folder with --out"
            raise CheckpointError(explain(e, self.path.parent, remedy=remedy)) from None
        try:
            if fcntl:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                tell("note: this system has no file locks; two runs in one folder are not prevented")
        except OSError:
            self.file.close()
            raise CheckpointError(f"{self.path.parent}: another process is using this run folder; wait for "
                                  "it, or choose another with --out") from None
        return self

    def __exit__(self, *_):
        self.file.close()


def has_run(folder):
    """True if the folder holds a checkpoint."""
    return any(there(Path(folder) / name) for name in (LAST, PREVIOUS, BEST))


def can_resume(folder):
    """True if the folder holds a checkpoint to go on from; a run that was killed early may have none but
    ckpt_best."""
    return any(there(Path(folder) / name) for name in (LAST, PREVIOUS))


def clear_run(folder):
    """Deletes what a run wrote, and nothing else; all of it or, if one is a folder, none (CheckpointError)."""
    names = LAST, PREVIOUS, BEST, "ckpt_new.pt", "log.csv", "config.toml"
    paths = [Path(folder) / name for name in (*names, *(f".{name}.tmp" for name in names))]    # .tmp: of a kill
    if odd := [path for path in paths if path.is_dir()]:
        raise CheckpointError(f"{odd[0]}: is a folder in the place of a run's file; move it away")
    try:
        for path in paths:
            path.unlink(missing_ok=True)
    except OSError as e:
        raise CheckpointError(explain(e, e.filename, done="deleted")) from None


def check_free(out, overwrite, sources=()):
    """Raises ConfigError if a run folder holds a run that a new one may not replace, or that the new one is
    made from (`sources`: run folders, or empty texts). Call it within the folder's Lock; clear_run comes
    later, in the moment before the first file of the new run is written."""
    if any(source and Path(source).resolve() == Path(out).resolve() for source in sources):
        raise ConfigError(f"{out} is what the new run is made from; choose another folder with --out")
    if has_run(out) and not overwrite:
        resume = f"`{program('train.py')} --out {quoted(out)} --resume` goes on with it"
        what = resume if can_resume(out) else f"of which {BEST} alone is left"
        raise ConfigError(f"{out} already holds a run: {what}, --overwrite replaces it, --out DIR takes "
                          "another folder")


def save_made(out, config, state, tokenizer, ancestry=None):
    """Writes a model that was made, not trained here (expanded, mixed, by hand), as an ordinary run folder at
    step 0, which trains on (--resume, train.init_from), samples and is plotted like any other.

    config: resolved, of the made model; how its parents came to be (train.init_from, [lifelong]) is left out
    of what is written. state: tensors by plain names. ancestry: dict(kind, run, parents, ...). Call it within
    Lock(out), after check_free() and clear_run().
    """
    Path(out).mkdir(parents=True, exist_ok=True)
    ancestry = ancestry or dict(kind="made", run=str(out), parents=[])
    config = from_tables(config.to_dict())
    config.train.init_from, config.lifelong = "", LifelongConfig()
    header = dict(step=0, tokens=0, seconds=0.0, val_loss=math.inf, config=config.to_dict(),
                  tokenizer=tokenizer.to_dict(), ancestry=ancestry)
    write_text(Path(out) / "config.toml", to_toml(config))
    with going_on(out):
        save(Path(out) / BEST, header, state)
        save(Path(out) / LAST, header, state)


def save_read(out, config, outlines, tensors, tokenizer, ancestry):
    """Writes a model that was read elsewhere as a run folder, like save_made, but a tensor at a time (see
    files.save_each), and as ckpt_last.pt alone."""
    header = dict(step=0, tokens=0, seconds=0.0, val_loss=math.inf, config=config.to_dict(),
                  tokenizer=tokenizer.to_dict(), ancestry=ancestry)
    write_text(Path(out) / "config.toml", to_toml(config))
    save_each(Path(out) / LAST, header, outlines, tensors)


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
