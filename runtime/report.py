"""What a run tells: a row of log.csv for each step, and lines and a bar on the terminal."""
import contextlib
import csv
import dataclasses
import io
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data.binfile import explain
from runtime import checkpoint, parallel
from runtime.checkpoint import TrainingError
from runtime.ending import program, quoted, tell, typed
from runtime.files import there, written
from runtime.terminal import PLAIN
from runtime.watch import Watch, usage
from settings import ConfigError

# The first columns of log.csv and their order. A row with another number gets a column for it: what train.step
# returns, what a layer's Stats holds, what an evaluation measured.
COLUMNS = ["step", "tokens", "seconds", "loss", "val_loss", "val_bpb", "lr", "grad_norm", "tokens_per_second",
           "balance_loss", "z_loss", "aux_loss", "max_expert_share", "entropy", "dropped", "experts_used",
           "unevenness", "expert_load"]
MAX_LOGGED_EXPERTS = 1024                               # a million numbers do not belong in a row of a table

def speaker(quiet):
    """say(text) for lines beside the bar, on stderr, control characters made visible; a terminal that is gone
    ends nothing."""
    def say(text):
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(text.translate(PLAIN), file=sys.stderr)
    return (lambda text: None) if quiet else say


class Log:
    """log.csv, one row per logged step. Rows wait as tensors and are fetched together: on a GPU every look at
    a number stops the queue, so it is done once in 20 steps. Seconds are those of training steps: evaluation
    is not counted. Raises CheckpointError if it cannot be written."""

    def __init__(self, path, trainer, say):
        self.trainer, self.rows, self.since = trainer, [], time.perf_counter()
        self.patience = 20 if trainer.device.type == "cuda" else 1
        self.watch = Watch(trainer.model, say)
        self.path = path if parallel.rank() == 0 else Path(os.devnull)
        self.open(COLUMNS)

    def open(self, columns):
        """Opens the file for the rows that come next, with these columns and those that it has."""
        if parallel.rank() == 0:
            columns = cut_log(self.path, self.trainer.done, columns)
        self.file = open(self.path, "a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, columns)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):              # rows that could not be written: that was said
            self.file.close()

    def settle(self):
        """Turns the waiting rows into numbers and takes the time. Raises TrainingError at a value that is not
        finite."""
        rows, self.rows = [to_numbers(row, self.trainer, self.watch) for row in self.rows], []
        if rows:
            seconds = (time.perf_counter() - self.since) / len(rows)
            for row in rows:
                self.trainer.seconds += seconds
                row.update(seconds=round(self.trainer.seconds, 3),
                           tokens_per_second=round((row["tokens"] / row["step"]) / seconds, 1))
                for what in ("loss", "grad_norm"):
                    if not math.isfinite(row[what]):
                        raise TrainingError(
                            f"{what} of step {row['step']} is {row[what]}; training stops, the last good "
                            "checkpoint is kept. Try a lower train.lr, a longer train.warmup_steps or a "
                            "smaller train.grad_clip")
        return rows

    def write(self, rows, **more):
        """Writes the rows, `more` into the last one, and starts the clock of the next ones."""
        if more:
            rows[-1].update(more)
        t = self.trainer.config.train
        rows = [row for row in rows if row["step"] % t.log_every == 0 or "val_loss" in row]
        new = [name for name in dict.fromkeys(name for row in rows for name in row)
               if name not in self.writer.fieldnames]
        try:
            if new:
                self.file.close()
                self.open([*self.writer.fieldnames, *new])
            self.writer.writerows({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()}
                                  for row in rows)
            self.file.flush()
        except OSError as e:
            whole = self.path.stat().st_size * t.max_steps / max(1, self.trainer.done)
            with checkpoint.going_on(self.path.parent):
                raise checkpoint.CheckpointError(explain(e, self.path, whole)) from None
        self.since = time.perf_counter()


def cut_log(path, step, columns):
    """Makes log.csv ready for the rows after `step` and returns its columns, those of `columns` that it lacks
    behind its own: a new one gets its header; an old one loses the rows that a resumed run will write again.
    An editor, a spreadsheet or git may have touched it: its line ends, a mark at its begin, quotes. Tells
    of lines that are no rows. Raises CheckpointError for a file that is no log."""
    with contextlib.ExitStack() as held:
        try:
            old = held.enter_context(open(path, encoding="utf-8-sig", errors="replace"))
        except FileNotFoundError:
            old = iter(())
        except OSError as e:
            raise checkpoint.CheckpointError(explain(e, path, done="read", remedy="move it away")) from None
        first = next(old, "")
        # a killed process may have left a part of the first line
        begun = csv_line(columns).startswith(first) and not first.endswith("\n")
        found = [] if begun else fields_of(first)
        if found and found[0] != "step":
            raise checkpoint.CheckpointError(f"{path}: is no log of a run, its first column is not `step`; "
                                             "move it away and --resume begins a new one")
        # a column that is new is empty in the old rows
        merged = found + [name for name in columns if name not in found]
        new = held.enter_context(written(path))
        new.write(csv_line(merged).encode())
        odd = []
        for number, line in enumerate(old, 2):
            row = fields_of(line)
            if len(row) == len(found) and row[0].isdecimal():
                if int(row[0]) <= step:
                    new.write(csv_line(row + [""] * (len(merged) - len(found))).encode())
            elif line.endswith("\n") and line.strip():          # else a killed process left a part of a row
                odd.append(number)
    if odd:
        tell(f"note: {path}: {len(odd)} lines are no rows of the log and were left out, the first is line "
             f"{odd[0]}")
    return merged


def csv_line(fields):
    """Fields as a line of a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow(fields)
    return text.getvalue()


def fields_of(line):
    """The fields of a line of a CSV file. Most have no quotes; csv refuses fields of a hundred thousand
    characters, which loads of many experts can be."""
    line = line.rstrip("\r\n")
    if '"' not in line:
        return line.split(",")
    try:
        return next(csv.reader([line]))
    except csv.Error:
        return [line]


def to_numbers(row, trainer, watch):
    """A row of tensors as a row of numbers; what the sparse layers report is averaged over them."""
    layers = row.pop("layers")
    row = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
    watch.gradients(row["step"], row["grad_norm"])
    sparse = trainer.model.sparse
    chosen = [layers[i] for i in sparse]
    if not chosen:
        return row
    # what each of them has as one number
    for name in trainer.numbers:
        values = [getattr(s, name) for s in chosen if getattr(s, name) is not None]
        if values and name != "aux_loss":
            row[name] = (sum(values) / len(values)).item()
    # how evenly their experts are used
    loads = [s.load.float().cpu() for s in chosen]
    used, uneven = zip(*(usage(load) for load in loads))
    balance = [0.0 if s.balance_loss is None else s.balance_loss.item() for s in chosen]
    watch.experts(row["step"], loads, uneven, balance)
    row.update(max_expert_share=max((load.max() / load.sum()).item() for load in loads),
               experts_used=sum(used) / len(used), unevenness=sum(uneven) / len(uneven))
    if max(load.numel() for load in loads) <= MAX_LOGGED_EXPERTS:
        row["expert_load"] = ";".join(" ".join(f"{v:g}" for v in s.load.tolist()) if i in sparse else ""
                                      for i, s in enumerate(layers))
    return row


def keep_best(trainer, results, out):
    """Keeps the weights if an evaluation's results are the best so far: (columns for the log, a line about it)."""
    t = trainer.config.train
    # the mean over the corpora, as they are weighted in training
    weights = trainer.config.data.weights or [1.0] * len(results)
    loss, bpb = (sum(w * r[i] for w, r in zip(weights, results.values())) / sum(weights) for i in (0, 1))
    better = loss < trainer.best
    if better:
        trainer.best = loss
        if t.keep != "last" and (trainer.done or t.init_from):      # trained weights may stay the best
            checkpoint.save_best(out, trainer)
    row = dict(val_loss=loss, val_bpb=bpb)
    row |= {f"val_loss_{name}": r[0] for name, r in results.items()} if len(results) > 1 else {}
    return row, (f"step {trainer.done:>6}/{t.max_steps}  validation {loss:.4f} nats a token, {bpb:.4f} bits a byte"
                 f"{'  (best so far)' if better and trainer.done else ''}")


class StopSignal:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP (the terminal was closed) into a flag that the loop asks for
    between steps; the second Ctrl-C or SIGTERM stops at once. SIGHUP stays ignored under nohup."""

    def __init__(self):
        self.received, self.name = 0, None

    def __enter__(self):
        hangup = [s for s in [getattr(signal, "SIGHUP", None)] if s and signal.getsignal(s) != signal.SIG_IGN]
        self.old = {s: signal.signal(s, self.receive) for s in (signal.SIGINT, signal.SIGTERM, *hangup)}
        return self

    def receive(self, number, frame):
        # a terminal that is closed may send SIGHUP twice, and SIGTERM after it
        if self.received and getattr(signal, "SIGHUP", None) not in (self.received, number):
            raise KeyboardInterrupt
        self.received = number

    def asked(self):
        """Whether any process got a signal: all hear the same, and so stop after the same step."""
        number = parallel.largest(self.received)
        self.name = signal.Signals(number).name if number else None
        return number > 0

    def __exit__(self, error, *_):
        if error and parallel.world() > 1:          # torchrun is about to end all: first tell what happened
            return
        for number, handler in self.old.items():
            signal.signal(number, handler)


def progress(trainer, quiet):
    """The bar: loss, tokens a second, time left; nothing but plain lines where stderr is no terminal."""
    return tqdm(total=trainer.config.train.max_steps, initial=trainer.done, unit="step", dynamic_ncols=True,
                disable=quiet or not sys.stderr.isatty(), file=sys.stderr,
                bar_format="{n_fmt}/{total_fmt} steps |{bar}| {elapsed}, {remaining} left{postfix}")


def describe(trainer, say, arithmetic, rate):
    """Says what is about to run. rate(step, TrainConfig): learning_rate of train.py. Raises ConfigError for a
    layer that cannot compute as asked."""
    config, model, t = trainer.config, trainer.model, trainer.config.train
    params, dtype = model.num_params(), getattr(torch, t.dtype)
    kinds = ["dense"]
    if model.sparse:
        try:
            how = model.blocks[model.sparse[0]].ffn.describe(dtype)
        except ValueError as e:
            raise ConfigError(str(e)) from None
        kinds = [f"{config.ffn.kind} in layers {model.sparse}", how]
    say(f"model      {config.model.n_layer} layers, {config.model.n_embd} wide, {', '.join(filter(None, kinds))}\n"
        f"           {params.total:,} parameters, {params.active:,} active, "
        f"{model.flops_per_token() / 1e6:.2f} MFLOP a token forward\n"
        f"arithmetic {trainer.device}, {arithmetic}")
    if parallel.world() > 1:
        say(f"processes  {parallel.world()}, {t.parallel}" + "".join(
            f"\n           differs under several processes: {why}" for why in model.differences()))
    if text := str(trainer.past):
        say(f"past       {text}")
    passes = ", ".join(f"{e:.2f}" for e in trainer.batches.epochs(t.max_steps))
    say(f"data       {config.data.name}, tokenizer {trainer.tokenizer.name}; {t.max_steps:,} steps of "
        f"{t.batch_size} x {config.model.block_size} tokens read it {passes} times")
    # a schedule that was at its end starts again higher where the run is made longer
    before = rate(max(0, trainer.done - 1), dataclasses.replace(t, max_steps=trainer.planned))
    now = rate(trainer.done, t)
    if trainer.done and now > 1.5 * before:
        say(f"rate       goes up from {before:.3g} to {now:.3g}, since train.max_steps was {trainer.planned:,}")
    if t.warmup_steps >= t.max_steps:
        say(f"rate       rises to the end: train.warmup_steps = {t.warmup_steps:,} of {t.max_steps:,} steps")


def finish(trainer, out, stop, sample, say, rate):
    """The last words: a sample, if there is one, the result, what to do next."""
    t, resume = trainer.config.train, f"{program('train.py')} --out {quoted(out)} --resume"
    if stop.asked():
        return say(f"stopped by {stop.name} after step {trainer.done}; everything is saved. Go on with:\n"
                   f"  {resume}")
    if sample:
        say(f"--- sample ---\n{sample}\n--------------")
    prompt = " --prompt \"def \"" if "python" in trainer.config.data.names else ""
    experts = " --show_experts" if trainer.model.sparse else ""
    last = out / checkpoint.LAST
    # longer training begins with another rate than this one ended with
    end, then = rate(trainer.done - 1, t), rate(trainer.done, dataclasses.replace(t, max_steps=2 * t.max_steps))
    again = f"        # the rate goes up again, from {end:.2g} to {then:.2g}" if then > 1.5 * end else ""
    size = f"; a checkpoint is {last.stat().st_size / 2**20:,.1f} MiB" if there(last) else ""
    say(f"best validation loss {trainer.best:.4f} nats a token; {trainer.done} steps took "
        f"{trainer.seconds:.0f} s{size}. Next:\n"
        f"  {program('sample.py')} {quoted(out)}{prompt}{experts}\n"
        f"  {program('lab.plots')} {quoted(out)}\n"
        f"  {resume} --train.max_steps {2 * t.max_steps}{again}\n"
        f"  {program('train.py')} {quoted(typed() / 'configs/dense.toml')}"
        f"        # other models: ls {quoted(typed() / 'configs')}")
