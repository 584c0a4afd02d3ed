"""Experts for new text in a trained model (Lifelong-MoE, Chen et al. 2305.12281).

    python -m grow.lifelong expand runs/old --add 2 --out runs/grown
    python train.py configs/continue.toml --train.init_from runs/grown --data.name docs --lifelong.distill 1

The first makes a run folder whose sparse layers have more experts and router rows, the old ones frozen; the
number of experts that a token visits stays. The second trains it on new text: the new experts, the new rows
and all that every token shares (attention, embeddings, norms). That shared part is where forgetting enters;
what holds it is in grow/retain.py.
"""
import sys

import torch

from data.batches import EvalBatches
from data.binfile import DataError
from data.prepare import prepared
from grow.retain import kl_divergence
from model import GPT, load_model, sparse_layers
from routers import ALL, traits_of
from runtime import checkpoint
from runtime.config import Ending, Parser, from_tables, parse
from settings import ConfigError, show

ROUTER_NOISE = 0.01         # of a copied router row, as a share of the rows' size: equal rows would tie


def refuse(model):
    """Raises ConfigError for a model whose experts cannot become more."""
    f = model.config.ffn
    layer = model.blocks[model.sparse[0] if model.sparse else 0].ffn
    if layer.not_grown():
        name = getattr(layer, "router", None) and f.router or f.kind
        raise ConfigError(f"a {name} model cannot be expanded: {layer.not_grown()}")
    if f.n_groups > 1:
        raise ConfigError(f"a model with ffn.n_groups = {f.n_groups} cannot be expanded: groups are "
                          "neighbours, and among more experts the old ones would change groups")


def grown_config(config, add):
    """The expanded model's Config. A loss that evens out the load of old and new experts would send the new
    text to experts that cannot learn it, so there is none; loss_free balances the new ones alone (moe.py)."""
    grown = from_tables(config.to_dict())
    f = grown.ffn
    f.n_frozen, f.frozen_routes, f.n_expert = f.experts, True, f.n_expert + add
    if f.balance == "loss_free":
        f.balance_loss = 0.0                            # of the loss that it may have beside the bias
    else:
        f.balance = "none"
    return grown


def grow(state, config, grown, init, seed):
    """Weights of the expanded model: the old ones, and behind each layer's old experts the new ones.

    init "copy": each copies a different old expert, drawn by `seed` (one twice only if more are added than
    there are); so does its router row, up to ROUTER_NOISE. A copy that is exact in both would tie with its
    original: no token could prefer either. "random": fresh, as a new model of this seed has them.
    """
    torch.manual_seed(seed)
    fresh, made, old_count = GPT(grown).state_dict(), dict(state), config.ffn.experts
    more = grown.ffn.experts - old_count
    for layer in sparse_layers(config):
        rounds = -(-more // old_count)
        chosen = torch.cat([torch.randperm(old_count) for _ in range(rounds)])[:more]           # (more,)
        for name, new in fresh.items():
            if not name.startswith(f"blocks.{layer}.ffn.") or new.shape == state[name].shape:
                continue
            new, old = new[old_count:], state[name]
            if init == "copy":
                noise = torch.randn_like(new) if name.endswith("weight") else 0.0           # rows, no biases
                new = old[chosen] + ROUTER_NOISE * old.square().mean().sqrt() * noise
            made[name] = torch.cat([old, new])
    return made


def comparison(config, tokenizer):
    """(batches (x, domain), what they are): validation text of the run's corpora, or else random tokens."""
    d, T, rows = config.data, config.model.block_size, min(config.train.batch_size, 32)
    try:
        folders, theirs = prepared(d)
        if theirs.fingerprint != tokenizer.fingerprint:
            raise DataError("it was prepared with another tokenizer")
        valid = EvalBatches(folders, T, rows, 4, tokenizer.token_lengths())
        return [(x, domain) for x, _, domain, _ in valid], f"validation text of {show(d.name)}"
    except DataError as e:
        x = torch.randint(tokenizer.vocab_size, (rows, T), generator=torch.Generator().manual_seed(0))
        why = str(e).partition(";")[0]
        return [(x, torch.zeros(rows, dtype=torch.long))], f"one batch of random tokens (no text: {why})"


@torch.no_grad()
def mean_divergence(old, new, batches):
    """KL(p_old || p_new), nats, mean over the tokens of all batches."""
    sums = [(kl_divergence(*(m(x, domain=domain).logits for m in (old, new))).item() * x.numel(), x.numel())
            for x, domain in batches]
    return sum(kl for kl, _ in sums) / sum(n for _, n in sums)


def expand(run, add, out, init="copy", seed=0, overwrite=False, say=print):
    """Makes the run folder `out`: the best weights of `run` with `add` more experts (times ffn.granularity)
    in each sparse layer, the old ones frozen. Raises ConfigError, CheckpointError."""
    old, config, tokenizer, header = load_model(run)
    refuse(old)
    grown = grown_config(config, add)
    with checkpoint.Lock(out):
        checkpoint.check_free(out, overwrite, [run])
        state = grow(old.state_dict(), config, grown, init, seed)
        checkpoint.clear_run(out)
        parent = header["ancestry"] | dict(run=str(run))                # where it is now, not where it was
        ancestry = dict(kind="expand", run=str(out), added=add, init=init, seed=seed, parents=[parent])
        checkpoint.save_made(out, grown, state, tokenizer, ancestry)
    new = GPT(grown).eval()
    new.load_state_dict(state)
    say(f"{out}: {init} experts, " + compare(old, new, config, grown, tokenizer))
    say(f"Next:\n  python train.py configs/continue.toml --train.init_from {out} --lifelong.distill 1 "
        "--data.name NAME --out DIR")


def compare(old, new, config, grown, tokenizer):
    """What changed, in lines: experts, parameters, FLOPs, balancing, and how far the predictions moved."""
    before, after, traits = old.num_params(), new.num_params(), traits_of(config.ffn)
    batches, text = comparison(config, tokenizer)
    lines = [f"{config.ffn.experts} -> {grown.ffn.experts} in each of layers {sparse_layers(config)}; the "
             f"first {grown.ffn.n_frozen} and their router rows are frozen",
             f"parameters {before.total:,} -> {after.total:,}, active {before.active:,} -> {after.active:,}",
             f"forward FLOPs per token {old.flops_per_token():,} -> {new.flops_per_token():,}: "
             + ("every expert is visited" if traits.k == ALL else "the new router rows"),
             f"KL(old || new) = {mean_divergence(old, new, batches):.4g} nats a token at step 0, on {text}"]
    if config.ffn.balance != grown.ffn.balance:
        lines.append(f"balance {config.ffn.balance} -> none: a loss would send new text to frozen experts")
    if traits.across == "in training":
        lines.append(f"note: in training {config.ffn.router} gives old and new experts equal shares, by construction")
    return "\n".join(lines)


# ---- the program


def build_parser():
    parser = Parser(prog="python -m grow.lifelong", description="Expand a trained mixture of experts: new experts and "
                    "router rows, the old ones frozen. Train the result with train.py, whose [lifelong] "
                    "settings say how the old knowledge is held.")
    parser.add_argument("command", choices=["expand"], help="what to do")
    parser.add_argument("run", metavar="RUN", help="run folder of a trained mixture of experts")
    parser.add_argument("--add", type=int, required=True, metavar="N", help="experts to add to every sparse "
                        "layer, counted like ffn.n_expert: times ffn.granularity in a split layer")
    parser.add_argument("--out", required=True, metavar="DIR", help="run folder to make")
    parser.add_argument("--init", choices=["copy", "random"], default="copy", help="new experts and router "
                        "rows: copies of old ones, the rows with a little noise, or fresh (default: copy)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of what is drawn (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is in DIR")
    return parser


def main(argv=None):
    """The program; returns its exit status: 0 done, 1 a run folder that cannot be used, 2 a mistake in what
    was asked for."""
    with Ending() as end:
        o, _ = parse(build_parser(), argv)
        if o.add < 1 or not 0 <= o.seed < 2**62:
            raise ConfigError(f"--add {o.add} must be at least 1, --seed {o.seed} at least 0")
        expand(o.run, o.add, o.out, o.init, o.seed, o.overwrite)
    return end.status


if __name__ == "__main__":
    sys.exit(main())
