"""What a run tells: a row of log.csv for each step, and lines and a bar on the terminal."""
import csv
import math
import sys
import time

import torch
from tqdm import tqdm

from config import sparse_layers
from moe import choose_dispatch, grouped_refusal
from peer import choose_path, usage
from sample import sample_text

COLUMNS = ["step", "tokens", "seconds", "loss", "val_loss", "val_bpb", "lr", "grad_norm", "tokens_per_second",
           "balance_loss", "z_loss", "aux_loss", "max_expert_share", "entropy", "dropped", "experts_used", "unevenness",
           "expert_load"]
MAX_LOGGED_EXPERTS = 1024                               # a million numbers do not belong in a row of a table


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what is safe."""


class Log:
    """log.csv, one row per logged step. Rows wait as tensors and are fetched together: on a GPU every look at
    a number stops the queue, so it is done once in 20 steps. Seconds are those of training steps: evaluation
    is not counted."""

    def __init__(self, path, trainer):
        self.trainer, self.rows, self.since = trainer, [], time.perf_counter()
        self.patience = 20 if trainer.device.type == "cuda" else 1
        columns = COLUMNS + [f"val_loss_{name}" for name in trainer.corpora if len(trainer.corpora) > 1]
        new = not path.exists()
        self.file = open(path, "a", newline="", encoding="utf-8")
        self.writer = csv.DictWriter(self.file, columns)
        if new:
            self.writer.writeheader()

    def settle(self):
        """Turns the waiting rows into numbers and takes the time. Raises TrainingError at a value that is not
        finite."""
        rows, self.rows = [to_numbers(row, self.trainer) for row in self.rows], []
        if rows:
            seconds = (time.perf_counter() - self.since) / len(rows)
            for row in rows:
                self.trainer.seconds += seconds
                row.update(seconds=round(self.trainer.seconds, 3),
                           tokens_per_second=round((row["tokens"] / row["step"]) / seconds, 1))
                for what in ("loss", "grad_norm"):
                    if not math.isfinite(row[what]):
                        raise TrainingError(
                            f"{what} of step {row['step']} is {row[what]}; training stops, the last good checkpoint "
                            "is kept. Try a lower train.lr, a longer train.warmup_steps or a smaller train.grad_clip")
        return rows

    def write(self, rows, **more):
        """Writes the rows, `more` into the last one, and starts the clock of the next ones."""
        if more:
            rows[-1].update(more)
        every = self.trainer.config.train.log_every
        self.writer.writerows({k: f"{v:.8g}" if isinstance(v, float) else v for k, v in row.items()}
                              for row in rows if row["step"] % every == 0 or "val_loss" in row)
        self.file.flush()
        self.since = time.perf_counter()


def to_numbers(row, trainer):
    """A row of tensors as a row of numbers; what the sparse layers report is averaged over them."""
    layers = row.pop("layers")
    row = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in row.items()}
    chosen = [layers[i] for i in sparse_layers(trainer.config)]
    if not chosen:
        return row
    mean = {name: (sum(getattr(s, name) for s in chosen) / len(chosen)).item()
            for name in ("balance_loss", "z_loss", "dropped", "entropy")}
    loads = [s.load.float().cpu() for s in chosen]
    used, uneven = zip(*(usage(load) for load in loads))
    row.update(mean, max_expert_share=max((load.max() / load.sum()).item() for load in loads),
               experts_used=sum(used) / len(used), unevenness=sum(uneven) / len(uneven))
    if max(load.numel() for load in loads) <= MAX_LOGGED_EXPERTS:
        sparse = sparse_layers(trainer.config)
        row["expert_load"] = ";".join(" ".join(f"{v:g}" for v in s.load.tolist()) if i in sparse else ""
                                      for i, s in enumerate(layers))
    return row


def progress(trainer, quiet):
    """The bar: loss, tokens a second, time left; nothing but plain lines where stderr is no terminal."""
    return tqdm(total=trainer.config.train.max_steps, initial=trainer.done, unit="step", dynamic_ncols=True,
                disable=quiet or not sys.stderr.isatty(), file=sys.stderr,
                bar_format="{n_fmt}/{total_fmt} steps |{bar}| {elapsed}, {remaining} left{postfix}")


def describe(trainer, say, arithmetic):
    """Says what is about to run."""
    config, t, params = trainer.config, trainer.config.train, trainer.model.num_params()
    f, sparse = config.ffn, sparse_layers(config)
    kind = f"{f.kind} in layers {sparse}, {paths(trainer, sparse)}" if sparse else "dense"
    say(f"model      {config.model.n_layer} layers, {config.model.n_embd} wide, {kind}\n"
        f"           {params.total:,} parameters, {params.active:,} active, "
        f"{trainer.model.flops_per_token() / 1e6:.2f} MFLOP a token forward\n"
        f"arithmetic {trainer.device}, {arithmetic}")
    passes = ", ".join(f"{e:.2f}" for e in trainer.batches.epochs(t.max_steps))
    say(f"data       {config.data.name}, tokenizer {trainer.tokenizer.name}; {t.max_steps:,} steps of "
        f"{t.batch_size} x {config.model.block_size} tokens read it {passes} times")


def paths(trainer, sparse):
    """What the sparse layers hold, and the path they take. Raises ValueError for a path that cannot run."""
    f, ffn = trainer.config.ffn, trainer.model.blocks[sparse[0]].ffn
    if f.kind != "moe":
        return f"{f.n_keys ** 2:,} rows, {f.peer_heads} heads x {f.peer_top_k} a token, " \
               f"path {choose_path(f.peer_path, ffn.table)}"
    x = torch.empty(0, dtype=getattr(torch, trainer.config.train.dtype), device=trainer.device)
    path, refusal = choose_dispatch(f.dispatch, ffn.experts, x), grouped_refusal(ffn.experts, x.dtype)
    return (f"{f.experts} experts, {f.active} a token, router {f.router}, balance {f.balance}, "
            f"dispatch {path}" + (f" ({refusal})" if f.dispatch == "auto" and refusal else ""))


def finish(trainer, out, stop, say):
    """The last words: a sample, the result, what to do next."""
    t = trainer.config.train
    if stop.name:
        return say(f"stopped by {stop.name} after step {trainer.done}; everything is saved. Go on with:\n"
                   f"  python train.py --out {out} --resume")
    if t.sample_tokens:
        text = sample_text(trainer.model, trainer.tokenizer, tokens=t.sample_tokens, seed=t.seed)
        say(f"--- sample ---\n{text}\n--------------")
    say(f"best validation loss {trainer.best:.4f} nats a token; {trainer.done} steps took {trainer.seconds:.0f} s. "
        f"Next:\n"
        f"  python sample.py {out} --prompt \"def \" --show-experts\n"
        f"  python -m lab.plots {out}\n"
        f"  python train.py --out {out} --resume --train.max_steps {2 * t.max_steps}\n"
        f"  python train.py configs/dense.toml        # other models: ls configs")
