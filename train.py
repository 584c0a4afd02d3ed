"""Train a GPT with a dense or sparse feed-forward layer: `python train.py [CONFIG.toml] [--section.key X]`.

The loop is flat: batch -> forward and backward -> step -> log -> evaluate -> checkpoint. Three rules make
runs repeatable:
- The generator is seeded from (seed, step, micro-step) before each micro-step, and layers draw from it. There
  is no generator state to save, and two runs of one seed start each micro-step alike.
- Batches follow from the step number (data/batches.py), so that N + M steps are N steps, a restart, M steps.
- Reported losses are cross-entropy alone; auxiliary losses are in the objective and in a column of their own.
"""
import sys

if __name__ == "__main__":                                      # the other imports take seconds
    sys.path.insert(0, __file__.rpartition("train.py")[0])      # python -P and -I leave this folder out
    import runtime.first

import math
import time
from contextlib import ExitStack
from functools import partial

import torch
from torch.utils._pytree import tree_map

from data.batches import Batches, EvalBatches, token_counts
from ffn import NUMBERS, Stats
from grow.retain import Past, adapters
from model import GPT, check, load_config
from routers import help_text
from runtime import checkpoint, parallel
from runtime.config import to_toml
from runtime.device import go_on_uncompiled, precision, resolve_device, resolve_dtype, speed_up
from runtime.ending import Ending
from runtime.graph import Calls
from runtime.report import Log, StopSignal, describe, finish, keep_best, progress, speaker
from runtime.start import make_ready, open_run
from sample import sample_text


class Trainer:
    """One run: model, optimizer, data and counters."""

    def __init__(self, config, folders, tokenizer, device):
        t = config.train
        self.config, self.device, self.tokenizer = config, device, tokenizer
        # the model, what in it may not change (grow/retain.py), and what is called in its place
        torch.manual_seed(t.seed)
        self.model = GPT(config).to("cpu" if parallel.sharded(config) else device)
        self.past = Past(self.model, config, tokenizer, device)
        self.forward = self.whole_forward = parallel.wrap(self.model, config, device)
        self.optimizer = build_optimizer(self.model, t, device)
        self.batches = Batches(folders, config.data.weights, config.model.block_size, t.batch_size,
                               config.data.seed, config.data.answers_only)
        # where the run stands
        self.corpora, self.numbers = config.data.names, NUMBERS
        self.count = torch.zeros((), device=device)     # the step, for layers; a number would be compiled in
        self.graphs, self.seen = Calls(device), None    # what runs a step's parts; what its micro-steps saw
        self.done, self.planned = 0, t.max_steps        # optimizer steps finished, and wanted before a resume
        self.seconds = 0.0                              # spent in them, earlier sittings included
        self.best = math.inf                            # lowest validation loss, nats per token
        self.ancestry = dict(kind="train", parents=[])

    def step(self):
        """One optimizer step; returns a row of log.csv, as tensors that nobody has waited for."""
        t = self.config.train
        rate = learning_rate(self.done, t)
        set_rate(self.optimizer, rate)
        self.count.fill_(self.done)
        self.model.train()
        try:
            loss, aux, norm, layers = self.whole_step()
        except torch._dynamo.exc.TorchDynamoException as e:             # it shows in the first step, if at all
            go_on_uncompiled(self, e)
            loss, aux, norm, layers = self.whole_step()
        self.done += 1
        return dict(step=self.done, tokens=self.tokens, lr=rate, loss=loss, aux_loss=aux,
                    grad_norm=parallel.whole(norm), layers=layers)

    def whole_step(self):
        """The gradient of the batch, a micro-batch at a time, and the update; as CUDA graphs where it can be."""
        self.graphs.begin()
        for micro in range(self.config.train.grad_accum):
            batch = self.micro_batch(micro)
            self.graphs.run(f"micro-step {min(micro, 1)}", partial(self.micro_step, micro), *batch)
        return self.graphs.kept("update", self.update)

    def micro_batch(self, micro):
        """Tokens (b, T), the tokens after them (b, T), the corpus of each sequence (b,): this process's part."""
        t = self.config.train
        # the same draws of noise and dropout whenever this micro-step is taken
        seed_draws(t.seed, self.done, micro, parallel.rank())
        batch = self.batches.batch(self.done, micro, t.grad_accum, parallel.rank(), parallel.world())
        # from pinned memory the copy to a card waits for nothing
        return [a.pin_memory() if self.device.type == "cuda" else a for a in batch]

    def micro_step(self, micro, x, y, domain):
        """Adds the gradient of a micro-batch, and what it saw: sums of loss, aux_loss, layers' stats, detached."""
        t = self.config.train
        if micro == 0:
            self.zero_grad()
        # cross-entropy, and what else is in the objective: balance, z-loss, policy; distillation, distance
        with precision(self.device, t.dtype), parallel.accumulating(self.forward, micro == t.grad_accum - 1):
            out = self.forward(x, y, domain=domain, step=self.count)
            aux = out.aux_loss + self.past.loss(x, domain, out.logits)
        # a mean over the micro-steps is the mean over the batch
        ((out.loss + aux) / t.grad_accum).backward()
        found = [out.loss.detach(), aux.detach(), [detached(s) for s in out.stats]]
        # sums in place, since a CUDA graph knows a tensor by its memory
        if t.grad_accum > 1 and micro == 0:
            found = tree_map(torch.clone, found)
        self.seen = found if micro == 0 else tree_map(torch.Tensor.add_, self.seen, found)

    def update(self):
        """Takes the step that the gradient asks for: (loss, aux_loss, gradient norm, layers' stats)."""
        t = self.config.train
        # clip; rows that are frozen stay as they are
        with self.past.rows_kept():
            norm = parallel.clip(self.model.parameters(), t.grad_clip or math.inf)
            self.optimizer.step()
        # what the micro-steps and the processes saw, together; loss-free balancing goes by that, afterwards
        loss, aux, layers = self.seen
        loss, aux, layers = parallel.over_processes(
            loss / t.grad_accum, aux / t.grad_accum, [mean_stats(s, t.grad_accum) for s in layers], NUMBERS)
        self.model.after_step([s.load for s in layers])
        return loss, aux, norm, layers

    def zero_grad(self):
        """Lets the gradients go; a PEER table on a CPU keeps its buffer (see PEER)."""
        for p in self.model.parameters():
            if p.grad is not None and getattr(p, "keep_grad", False) and p.device.type == "cpu":
                p.grad.zero_()
            else:
                p.grad = None

    @torch.no_grad()
    def evaluate(self, valid):
        """{corpus: (nats per token, bits per byte)} over fixed validation batches, without noise or updates."""
        self.model.eval()
        # a batch holds one corpus; with several processes each takes some of the batches
        sums = {name: [0.0, 0, 0] for name in self.corpora}                 # nats, tokens, bytes
        for (x, y, domain, n_bytes), counts in parallel.share(valid):
            with precision(self.device, self.config.train.dtype):
                out = self.model(x.to(self.device), y.to(self.device), domain=domain.to(self.device))
            if counts:
                total = sums[self.corpora[domain[0]]]
                total[:] = total[0] + out.loss.item() * y.numel(), total[1] + y.numel(), total[2] + n_bytes
        # nats a token; bits a byte = nats / ln 2 / bytes, whatever the tokenizer
        sums = {name: parallel.totals(total) for name, total in sums.items()}
        return {name: (nats / tokens, nats / n_bytes / math.log(2))
                for name, (nats, tokens, n_bytes) in sums.items()}

    @property
    def tokens(self):
        """Tokens trained on so far."""
        return self.done * self.config.train.batch_size * self.config.model.block_size


def train(trainer, valid, out, say, bar, log, stop):
    """Steps until max_steps or a signal; logs, evaluates, samples and saves when each is due."""
    t = trainer.config.train
    # where it starts: log V, or what init_from brought along
    if trainer.done == 0:
        row, news = keep_best(trainer, trainer.evaluate(valid), out)
        log.write([dict(step=0, tokens=0, seconds=0.0)], **row)
        say(news)
    ends = trainer.done >= t.max_steps
    while not ends:
        log.rows.append(trainer.step())
        # asked once a step: a signal that comes later waits for the next
        ends = trainer.done == t.max_steps or stop.asked()
        # evaluated a little more often at first, where a curve bends most
        early = t.eval_every >= 100 and trainer.done in (t.eval_every // 4, t.eval_every // 2)
        evaluates = early or trainer.done == t.max_steps or due(trainer.done, t.eval_every)
        saves = ends or due(trainer.done, t.save_every or t.eval_every)
        # log: on a GPU the rows wait, since every look at a number stops the queue
        if evaluates or saves or len(log.rows) >= log.patience:
            rows = log.settle()
            last = rows[-1]
            bar.set_postfix_str(f"loss {last['loss']:.3f}, {last['tokens_per_second']:,.0f} tokens/s", False)
            row, news = keep_best(trainer, trainer.evaluate(valid), out) if evaluates else ({}, "")
            log.write(rows, **row)
        bar.update()
        # saved before anything is said: a terminal that blocks or is gone costs no checkpoint
        if saves:
            checkpoint.save_run(out, trainer)
        if evaluates:
            say(news)
        if due(trainer.done, t.sample_every) and not ends:
            say(sample_of(trainer))
        if not log.rows:                         # else the clock is running for rows that are not settled yet
            log.since = time.perf_counter()


def due(step, every):
    return every > 0 and step % every == 0


def sample_of(trainer):
    """A text that the model writes now; empty if none is wanted."""
    t = trainer.config.train
    if not t.sample_tokens:
        return ""
    return sample_text(trainer.model, trainer.tokenizer, tokens=t.sample_tokens, seed=t.seed)


def detached(stats):
    """What is logged of a layer's Stats, {name: tensor}: the load and the numbers, their graph let go."""
    return {name: getattr(stats, name).detach() for name in ("load", *NUMBERS) if getattr(stats, name) is not None}


def mean_stats(total, n):
    """One layer's Stats over n micro-steps, from their sums: loads are summed, numbers are averaged."""
    return Stats(top_expert=None, **{name: x if name == "load" else x / n for name, x in total.items()})


def set_rate(optimizer, rate):
    """The learning rate of the next step; on CUDA it is a tensor, which a graph reads."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(step, t):
    """Rate of the step after `step` finished ones; the last step gets about min_lr * lr."""
    # linear warm-up
    if step < t.warmup_steps:
        return t.lr * (step + 1) / t.warmup_steps
    # then half a cosine; or stable, and linear at the end; or constant
    progress = (step - t.warmup_steps) / max(1, t.max_steps - t.warmup_steps)
    if t.schedule == "cosine":
        return t.lr * (t.min_lr + (1 - t.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1, progress))))
    if t.schedule == "wsd":
        left = (t.max_steps - step) / max(1.0, t.decay_share * t.max_steps)
        return t.lr * (t.min_lr + (1 - t.min_lr) * min(1.0, left))
    return t.lr


def seed_draws(seed, step, micro, rank=0):
    """Seeds the default generator for one micro-step."""
    # a mixture that keeps neighbours apart
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro * 0x94D049BB133111EB
    mixed = (mixed + rank * 0xD6E8FEB86659FD93) % 2**64
    torch.manual_seed(mixed ^ mixed >> 31)


def build_optimizer(model, t, device):
    """AdamW, fused where torch has it for the device; weight decay is for some parameters only."""
    # It is for matrices that multiply activations. It is not for norms and biases, nor for rows that only some
    # tokens touch (embeddings, PEER tables), which it would shrink in every step in which nobody reads them,
    # nor for PEER's sub-keys, whose length is the temperature of its scores, nor for Mamba's rates of decay.
    def decays(name, p):
        spared = name.startswith("embedding") or name.endswith(("table", "sub_keys", "log_rate"))
        return p.dim() > 1 and not spared

    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [dict(params=[p for n, p in named if decays(n, p)], weight_decay=t.weight_decay),
              dict(params=[p for n, p in named if not decays(n, p)], weight_decay=0.0)]
    groups = [dict(group, params=some) for group in groups for some in parallel.alike(group["params"])]
    captured = device.type == "cuda" and parallel.world() == 1
    optimizer = torch.optim.AdamW(groups, lr=t.lr, betas=(t.beta1, t.beta2), fused=device.type in ("cuda", "cpu"),
                                  capturable=captured)
    for group in optimizer.param_groups if captured else ():
        group["lr"] = torch.tensor(t.lr, device=device)         # a CUDA graph reads it at each replay
    return optimizer


def build(config, origin, folders, tokenizer, out, saved, say):
    """(Trainer, EvalBatches) of a run that starts anew, from another's weights, or where it stopped. Raises
    ConfigError."""
    t, device = config.train, resolve_device(config.train.device)
    t.dtype, why = resolve_dtype(t.dtype, device)
    trainer = Trainer(config, folders, tokenizer, device)
    valid = EvalBatches(folders, config.model.block_size, t.batch_size, t.eval_batches, tokenizer.token_lengths())
    # where it stopped, or another run's weights, or new ones
    if saved:
        checkpoint.restore(trainer, saved)
    elif origin:
        start = parallel.spread(origin.model, trainer.model) | adapters(trainer.model)
        checkpoint.load_weights(trainer.model, start, t.init_from)
        trainer.ancestry["parents"] = [origin.header["ancestry"]]
    else:
        trainer.model.set_token_counts(token_counts(folders, config.model.vocab_size))
    checkpoint.sign(trainer.ancestry, out, parallel.whole(trainer.model.embedding.weight))
    # how it computes; a dispatch that these widths or this machine refuse is told now
    arithmetic = f"{t.dtype} ({why}), {speed_up(trainer, say)}"
    describe(trainer, say, arithmetic, learning_rate)
    # until here the run folder was as it was: now it becomes this run's
    if parallel.rank() == 0:
        if not saved:
            checkpoint.clear_run(out)
            if origin and "data.tokenizer" not in config.sources:
                checkpoint.carry_tokenizer(config, tokenizer, out)
        checkpoint.write_text(out / "config.toml", to_toml(config))
    return trainer, valid


def main(argv=None):
    """The program; returns its exit status: 0 done, 1 a failure, 2 a mistake in what was asked for."""
    with Ending(parallel.first, output=False) as end, parallel.processes(), ExitStack() as held:
        # with one process, from_rank0(f) is f()
        config, out, saved, quiet = parallel.from_rank0(
            lambda: open_run(argv, held, load_config, check, {"ffn.router": help_text()}))
        config, origin, folders, tokenizer = parallel.from_rank0(
            lambda: make_ready(config, saved, quiet, check, GPT))
        quiet = quiet or parallel.rank() > 0
        say = speaker(quiet)
        trainer, valid = build(config, origin, folders, tokenizer, out, saved, say)
        with Log(out / "log.csv", trainer, say) as log, StopSignal() as stop, progress(trainer, quiet) as bar:
            train(trainer, valid, out, say, bar, log, stop)
        finish(trainer, out, stop, "" if stop.asked() else sample_of(trainer), say, learning_rate)
    return end.status


if __name__ == "__main__":
    sys.exit(main())
