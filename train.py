"""Train a GPT with a dense or sparse feed-forward layer: `python train.py [CONFIG.toml] [--section.key X]`.

The loop is flat: batch -> forward and backward -> step -> log -> evaluate -> checkpoint. Three rules make
runs repeatable:
- The generator is seeded from (seed, step, micro-step) before each micro-step, and layers draw from it. There
  is no generator state to save, and two runs of one seed start each micro-step with the same batch and
  generator.
- Batches follow from the step number (data/batches.py), so that N + M steps are N steps, a restart, M steps.
- Reported losses are cross-entropy alone; auxiliary losses are in the objective and in a column of their own.
"""
import contextlib
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import checkpoint
from runtime import parallel
from runtime.config import ConfigError, Parser, add_settings, fail, load_config, parse, show
from data.batches import Batches, EvalBatches, token_counts
from data.binfile import DataError
from data.prepare import find_or_prepare
from model import GPT
from runtime.report import Log, StopSignal, TrainingError, describe, finish, progress
from grow.retain import Past, adapters
from sample import PLAIN, pick_device, sample_text

HERE = Path(__file__).parent


def resolve_device(name):
    """torch.device of train.device, for this process. Raises ConfigError if there is none."""
    return parallel.own(torch.device(pick_device(name, "train.device =")))


def resolve_dtype(name, device):
    """(dtype, reason) of train.dtype. auto is one rule for all machines, so that a config means the same
    everywhere: bfloat16 on CUDA, where it is several times faster; float32 on CPU, where few processors have
    it, and on MPS."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
        return name, f"auto: {name} on {device.type}"
    return name, "as configured"


def wants_compile(config, device):
    """(whether to torch.compile, reason). Raises ConfigError where it is asked for and cannot be."""
    mode, f = config.train.compile, config.ffn
    why_not = ("ffn.router base, whose rounds depend on the data"
               if f.kind == "moe" and f.router == "base" else
               "fsdp, which frees parameters between blocks" if parallel.sharded(config) else "")
    if why_not and mode == "on":
        raise ConfigError(f"train.compile = \"on\" cannot be with {why_not}; use \"auto\" or \"off\"")
    if mode == "auto" and (device.type != "cuda" or why_not):
        return False, f"auto: {'not with ' + why_not if why_not else 'it pays on CUDA only'}"
    return mode != "off", "auto: CUDA" if mode == "auto" else "as configured"


def parameter_groups(model, weight_decay):
    """Two AdamW groups. Decay is for matrices that multiply activations; not for norms and biases, nor for
    rows that only some tokens touch (embeddings, PEER tables), which decay would shrink in every step in
    which nobody reads them; not for PEER's sub-keys, whose length is the temperature of its scores."""
    def decays(name, p):
        return p.dim() > 1 and not name.startswith("embedding") and not name.endswith(("table", "sub_keys"))

    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [dict(params=[p for n, p in named if decays(n, p)], weight_decay=weight_decay),
            dict(params=[p for n, p in named if not decays(n, p)], weight_decay=0.0)]


def build_optimizer(model, t, device):
    """AdamW, fused where torch has it for the device."""
    return torch.optim.AdamW(parameter_groups(model, t.weight_decay), lr=t.lr, betas=(t.beta1, t.beta2),
                             fused=device.type in ("cuda", "cpu"))


def learning_rate(step, t):
    """Rate of the step after `step` finished ones: linear warm-up, then cosine, or stable and linear decay,
    or constant; the last step gets about min_lr * lr."""
    if step < t.warmup_steps:
        return t.lr * (step + 1) / t.warmup_steps
    progress = (step - t.warmup_steps) / max(1, t.max_steps - t.warmup_steps)
    if t.schedule == "cosine":
        return t.lr * (t.min_lr + (1 - t.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1, progress))))
    if t.schedule == "wsd":
        left = (t.max_steps - step) / max(1.0, t.decay_share * t.max_steps)
        return t.lr * max(t.min_lr, min(1.0, left))
    return t.lr


def seed_draws(seed, step, micro, rank=0):
    """Seeds the default generator for one micro-step, by a mixture that keeps neighbours apart."""
    mixed = seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro * 0x94D049BB133111EB
    mixed = (mixed + rank * 0xD6E8FEB86659FD93) % 2**64
    torch.manual_seed(mixed ^ mixed >> 31)


def precision(device, dtype):
    """Context in which forward and backward run: autocast for bfloat16, nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()


class Trainer:
    """One run: model, optimizer, data and counters. step() does one optimizer step, evaluate() the validation
    batches."""

    def __init__(self, config, folders, tokenizer, device):
        t = config.train
        self.config, self.device, self.tokenizer = config, device, tokenizer
        torch.manual_seed(t.seed)
        self.model = GPT(config).to("cpu" if parallel.sharded(config) else device)
        self.past = Past(self.model, config, tokenizer, device)     # what may not change, and the old model
        self.forward = parallel.wrap(self.model, config, device)
        self.optimizer = build_optimizer(self.model, t, device)
        self.batches = Batches(folders, config.data.weights, config.model.block_size, t.batch_size,
                               config.data.seed)
        names = config.data.name
        self.corpora = names if isinstance(names, list) else [names]
        self.done = 0                                   # optimizer steps finished
        self.seconds = 0.0                              # spent in them, earlier sittings included
        self.best = math.inf                            # lowest validation loss, nats per token
        self.ancestry = dict(kind="train", parents=[])

    @property
    def tokens(self):
        """Tokens trained on so far."""
        return self.done * self.config.train.batch_size * self.config.model.block_size

    def micro_step(self, micro):
        """Adds the gradient of one micro-batch; returns its (loss, aux_loss, layers' stats), detached."""
        t = self.config.train
        batch = self.batches.batch(self.done, micro, t.grad_accum, parallel.rank(), parallel.world())
        x, y, domain = (a.to(self.device, non_blocking=True) for a in batch)
        seed_draws(t.seed, self.done, micro, parallel.rank())
        with precision(self.device, t.dtype), parallel.accumulating(self.forward, micro == t.grad_accum - 1):
            step = torch.tensor(float(self.done), device=self.device)   # a Python number would be compiled in
            out = self.forward(x, y, domain=domain, step=step)
            aux = out.aux_loss + self.past.loss(x, domain, out.logits)
        ((out.loss + aux) / t.grad_accum).backward()
        return out.loss.detach(), aux.detach(), [detached(s) for s in out.stats]

    def step(self):
        """One optimizer step; returns a row for the log, as tensors that nobody has waited for."""
        t, rate = self.config.train, learning_rate(self.done, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.zero_grad()
        self.model.train()
        losses, aux, stats = zip(*(self.micro_step(micro) for micro in range(t.grad_accum)))
        with self.past.rows_kept():
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), t.grad_clip or math.inf)
            self.optimizer.step()
        loss, aux, layers = parallel.over_processes(sum(losses) / t.grad_accum, sum(aux) / t.grad_accum,
                                                    [mean_stats(layer) for layer in zip(*stats)])
        self.model.update_balance([s.load for s in layers])             # of the whole step, and only after it
        self.done += 1
        return dict(step=self.done, tokens=self.tokens, lr=rate, loss=loss, aux_loss=aux,
                    grad_norm=parallel.whole(norm), layers=layers)

    def zero_grad(self):
        """Lets the gradients go; a PEER table on a CPU keeps its buffer, since 2 GiB of fresh memory cost
        more than the backward pass that fills it."""
        for name, p in self.model.named_parameters():
            if p.grad is not None and name.endswith("ffn.table") and p.device.type == "cpu":
                p.grad.zero_()
            else:
                p.grad = None

    @torch.no_grad()
    def evaluate(self, valid):
        """{corpus: (nats per token, bits per byte)} over fixed validation batches; no noise, no dropout, no
        updates."""
        self.model.eval()
        sums = {name: [0.0, 0, 0] for name in self.corpora}                 # nats, tokens, bytes
        for (x, y, domain, n_bytes), counts in parallel.share(valid):
            with precision(self.device, self.config.train.dtype):
                out = self.model(x.to(self.device), y.to(self.device), domain=domain.to(self.device))
            if counts:
                total = sums[self.corpora[domain[0]]]
                total[:] = total[0] + out.loss.item() * y.numel(), total[1] + y.numel(), total[2] + n_bytes
        sums = {name: parallel.totals(total) for name, total in sums.items()}
        return {name: (nats / tokens, nats / n_bytes / math.log(2))
                for name, (nats, tokens, n_bytes) in sums.items()}

    def header(self):
        """What a checkpoint says beside its tensors."""
        return dict(step=self.done, tokens=self.tokens, seconds=self.seconds, val_loss=self.best,
                    data=self.batches.checksums, config=self.config.to_dict(),
                    tokenizer=self.tokenizer.to_dict(), ancestry=self.ancestry)

    def save(self, out):
        """Writes everything that is needed to go on exactly."""
        model = parallel.gather(self.model.state_dict(keep_vars=True))
        optimizer = parallel.gather(checkpoint.optimizer_tensors(self.model, self.optimizer))
        if parallel.rank() == 0:
            checkpoint.save_last(out, self.header(), model, optimizer, keep_previous=self.config.train.keep == "all")

    def restore(self, saved):
        """Takes up a Checkpoint where it stopped."""
        checkpoint.check_text(saved, self.batches.checksums, self.config)
        checkpoint.load_weights(self.model, parallel.spread(saved.model, self.model), "the checkpoint")
        checkpoint.load_optimizer(self.model, self.optimizer, parallel.spread(saved.optimizer, self.model))
        self.done, self.seconds = saved.header["step"], saved.header["seconds"]
        self.best, self.ancestry = saved.header["val_loss"], saved.header["ancestry"]


def detached(stats):
    """Stats whose graph is let go, and without what only the loss needed."""
    numbers = {k: getattr(stats, k).detach() for k in ("load", *parallel.AVERAGED)}
    return stats._replace(log_prob=None, baseline=None, **numbers)


def mean_stats(micro_steps):
    """One layer's Stats over the micro-steps of a step: loads are summed, the rest is averaged."""
    n = len(micro_steps)
    average = {k: sum(getattr(s, k) for s in micro_steps) / n for k in parallel.AVERAGED}
    return micro_steps[0]._replace(load=sum(s.load for s in micro_steps), **average)


def compile_or_say(trainer, say):
    """Compiles the model. A failure shows in the first step: `on` makes it an error, `auto` a warning."""
    eager, forward, mode = trainer.micro_step, trainer.forward, trainer.config.train.compile
    trainer.forward = torch.compile(forward, dynamic=False)
    trainer.past.compile()

    def micro_step(micro):
        try:
            return eager(micro)
        except torch._dynamo.exc.TorchDynamoException as e:
            why = str(e).strip().split("\n")[0]
            if mode == "on":
                raise TrainingError(f"train.compile = \"on\", but torch.compile failed: {why}") from None
            say(f"warning: torch.compile failed, training goes on uncompiled: {why}")
            trainer.forward, trainer.micro_step = forward, eager
            trainer.past.compile(False)
            trainer.zero_grad()
            return eager(micro)

    trainer.micro_step = micro_step


def make_ready(config, out, saved, quiet):
    """What a run needs before its model is built: (config, Checkpoint to start from or None, folders of the
    corpora, Tokenizer, whether to compile, what is said of the arithmetic)."""
    t, d, device = config.train, config.data, resolve_device(config.train.device)
    parallel.check(config, device)
    t.dtype, why = resolve_dtype(t.dtype, device)
    origin = saved or (checkpoint.load_init(config, out) if t.init_from else None)
    compiled, why_compiled = wants_compile(config, device)
    text = d.name, d.tokenizer, d.vocab_size, d.dir or None, d.max_tokens
    folders, tokenizer = find_or_prepare(*text, quiet)
    check_vocabulary(config, tokenizer, origin)
    arithmetic = f"{t.dtype} ({why}), compile {'on' if compiled else 'off'} ({why_compiled})"
    return config, origin, folders, tokenizer, compiled, arithmetic


def run(config, out, saved=None, quiet=False):
    """Trains a validated config into the folder `out`, going on from a Checkpoint if one is given."""
    config, origin, folders, tokenizer, compiled, arithmetic = parallel.from_rank0(
        lambda: make_ready(config, out, saved, quiet))
    t, device, quiet = config.train, resolve_device(config.train.device), quiet or parallel.rank() > 0
    say = (lambda text: None) if quiet else lambda text: tqdm.write(text, file=sys.stderr)
    trainer = Trainer(config, folders, tokenizer, device)
    valid = EvalBatches(folders, config.model.block_size, t.batch_size // parallel.world(),
                        t.eval_batches * parallel.world(), tokenizer.token_lengths())
    if saved:
        trainer.restore(saved)
    elif origin:
        start = parallel.spread(origin.model, trainer.model) | adapters(trainer.model)
        checkpoint.load_weights(trainer.model, start, t.init_from)
        trainer.ancestry["parents"] = [origin.header["ancestry"]]
    else:
        trainer.model.set_token_counts(token_counts(folders, config.model.vocab_size))
    checkpoint.sign(trainer.ancestry, out, parallel.whole(trainer.model.embedding.weight))
    if compiled:
        compile_or_say(trainer, say)
    try:
        describe(trainer, say, arithmetic)
    except ValueError as e:                             # a dispatch that these widths or this machine refuse
        raise ConfigError(str(e)) from None
    if parallel.rank() == 0:
        checkpoint.write_text(out / "config.toml", config.to_toml())
    with Log(out / "log.csv", trainer, say) as log, StopSignal() as stop, progress(trainer, quiet) as bar:
        loop(trainer, out, log, valid, stop, bar, say)
    finish(trainer, out, stop, say)


def loop(trainer, out, log, valid, stop, bar, say):
    """Steps until max_steps or a signal; logs, evaluates, samples and saves when each is due."""
    t = trainer.config.train
    if trainer.done == 0:                            # where it starts: log V, or what init_from brought along
        log.write([dict(step=0, tokens=0, seconds=0.0)], **assess(trainer, out, valid, say))
    ends = trainer.done >= t.max_steps
    while not ends:                          # asked once a step: a signal that comes later waits for the next
        log.rows.append(trainer.step())
        ends = trainer.done == t.max_steps or stop.asked()
        evaluates = trainer.done == t.max_steps or due(trainer.done, t.eval_every)
        saves = ends or due(trainer.done, t.save_every or t.eval_every)
        if evaluates or saves or len(log.rows) >= log.patience:
            rows = log.settle()
            last = rows[-1]
            bar.set_postfix_str(f"loss {last['loss']:.3f}, {last['tokens_per_second']:,.0f} tokens/s", False)
            log.write(rows, **(assess(trainer, out, valid, say) if evaluates else {}))
        bar.update()
        if saves:
            trainer.save(out)
        if due(trainer.done, t.sample_every) and not ends:
            text = sample_text(trainer.model, trainer.tokenizer, tokens=t.sample_tokens, seed=t.seed)
            say(text.translate(PLAIN))
        if not log.rows:                         # else the clock is running for rows that are not settled yet
            log.since = time.perf_counter()


def due(step, every):
    return every > 0 and step % every == 0


def assess(trainer, out, valid, say):
    """Evaluates, keeps the weights if they are the best so far, says so; returns the columns for the log."""
    t, results = trainer.config.train, trainer.evaluate(valid)
    weights = trainer.config.data.weights or [1.0] * len(results)
    loss, bpb = (sum(w * r[i] for w, r in zip(weights, results.values())) / sum(weights) for i in (0, 1))
    better = loss < trainer.best
    if better:
        trainer.best = loss
        if t.keep != "last" and (trainer.done or t.init_from):      # trained weights may stay the best
            state = parallel.gather(trainer.model.state_dict(keep_vars=True))
            if parallel.rank() == 0:
                checkpoint.save(out / checkpoint.BEST, trainer.header(), state)
    say(f"step {trainer.done:>6}/{t.max_steps}  validation {loss:.4f} nats a token, {bpb:.4f} bits a byte"
        f"{'  (best so far)' if better and trainer.done else ''}")
    row = dict(val_loss=loss, val_bpb=bpb)
    return row | ({f"val_loss_{name}": r[0] for name, r in results.items()} if len(results) > 1 else {})


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


def build_parser():
    parser = Parser(prog="train.py", allow_abbrev=False,
                    description="Train a GPT with a dense or sparse feed-forward layer.",
                    usage="%(prog)s [CONFIG.toml] [--out DIR] [--resume | --overwrite] [--quiet] "
                          "[--section.key VALUE ...]")
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="default: configs/quick.toml")
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/<config name>)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on with the run, exactly where it stopped")
    how.add_argument("--overwrite", action="store_true",
                     help="start anew in a folder that already holds a run")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    add_settings(parser)
    return parser


def open_run(argv, held):
    """(config, run folder, Checkpoint to go on from or None, quiet) that a command line asks for; the folder
    stays locked until the ExitStack `held` closes."""
    options, overrides = parse(build_parser(), argv)
    given = options.config or options.resume and options.out
    path = options.config if given else str(HERE / "configs" / "quick.toml")
    out = Path(options.out or Path("runs") / Path(path).stem)
    held.enter_context(checkpoint.Lock(out))
    saved = checkpoint.load_last(out) if options.resume else None
    if saved:
        return checkpoint.resume_config(out, saved, options.config, overrides, print), out, saved, options.quiet
    config = load_config(path, overrides)
    checkpoint.claim(out, options.overwrite, [config.train.init_from, config.lifelong.teacher])
    return config, out, None, options.quiet


def main(argv=None):
    """The program; returns its exit status: 0 done, 1 a failure, 2 a mistake in what was asked for."""
    try:
        with parallel.processes(), contextlib.ExitStack() as held:
            run(*parallel.from_rank0(lambda: open_run(argv, held)))
    except (ConfigError, DataError, TrainingError, checkpoint.CheckpointError, parallel.Lost, KeyboardInterrupt) as e:
        status = fail(e) if parallel.first() else 2
        return status if isinstance(e, (ConfigError, DataError, KeyboardInterrupt)) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
