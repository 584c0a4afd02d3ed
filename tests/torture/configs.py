"""Random settings: whatever validation accepts builds, trains, saves, resumes and samples; whatever it
refuses is refused in one line that names the key."""
import csv
import math
import re
import shutil

import sample
import train
from runtime.config import all_fields
from balance import LOSSES
from ffn import ACTIVATIONS
from model import KINDS, MIXERS
from routers import ROUTERS
from settings import show

from .home import TINY, call, words

FIELDS = dict(all_fields())
# What keeps a model tiny and a run short. A setting without an entry takes any value of its type and range.
SMALL = {"model.n_layer": [1, 2, 3], "model.n_head": [1, 2, 3, 4], "model.n_kv_head": [0, 1, 2, 4],
         "model.n_embd": [2, 4, 6, 8, 12, 16, 20, 24], "model.block_size": [1, 2, 7, 16, 40],
         "model.attention_every": [0, 1, 2, 3], "model.attention_layers": [[], [0], [1, 0], [5]],
         "model.d_state": [1, 2, 5], "model.d_conv": [1, 2, 4], "model.expand": [1, 2, 3],
         "model.dt_rank": [0, 1, 3],
         "model.head_dim": [0, 0, 1, 2, 4, 6], "model.window": [0, 1, 3, 100], "model.rope_original": [1, 4, 8192],
         "model.rope_factor": [1.0, 1.5, 8.0], "model.rope_low": [0.0, 1.0, 4.0],
         "model.vocab_size": [0, 0, 100, 256, 263, 300], "model.loss_chunks": [1, 2, 5, 100],
         "ffn.d_ff": [0, 1, 2, 6, 8, 16, 24], "ffn.d_dense": [0, 1, 8, 20], "ffn.moe_every": [0, 1, 2, 3],
         "ffn.moe_layers": [[], [0], [1], [1, 0], [2], [5]], "ffn.n_dense_first": [0, 1, 2],
         "ffn.n_expert": [1, 2, 3, 4, 6, 9], "ffn.top_k": [1, 2, 3, 4], "ffn.granularity": [1, 2, 3, 4],
         "ffn.d_expert": [0, 1, 4, 8], "ffn.n_frozen": [0, 1, 2, 4, 20], "ffn.n_shared": [0, 1, 2],
         "ffn.d_shared": [0, 3, 8], "ffn.n_groups": [1, 2, 3], "ffn.topk_groups": [0, 1, 2],
         "ffn.n_keys": [2, 3, 4, 8], "ffn.sinkhorn_iters": [1, 2, 8], "ffn.peer_heads": [1, 2, 3],
         "ffn.peer_top_k": [1, 2, 4, 8],
         "ffn.d_key": [0, 2, 3, 4, 10], "ffn.capacity_factor": [0.0, 0.01, 0.5, 1.0, 3.0],
         "ffn.eval_capacity_factor": [0.0, 0.01, 0.5, 1.0, 3.0], "ffn.route_scale": [0.0, 0.5, 1.0, 2.5],
         "data.name": ["one", "two", ["one", "two"], ["two", "one"], ["one", "one"], "", "none-such"],
         "data.weights": [[], [1.0, 1.0], [0.3, 0.7], [1.0, 0.0], [0.0, 0.0], [1.0], [1.0, 1e-4], [-1.0, 2]],
         "data.tokenizer": ["byte", "char", "bpe", "bype"], "data.vocab_size": [100, 257, 260],
         "data.max_tokens": [0, 1, 30, 500], "data.dir": [],
         "train.batch_size": [1, 2, 3, 4, 8], "train.grad_accum": [1, 2, 3, 4], "train.max_steps": [2],
         "train.lr": [0.0, 1e-4, 0.01, 0.1], "train.warmup_steps": [0, 1, 5], "train.eval_every": [0, 1, 3],
         "train.eval_batches": [1, 2], "train.log_every": [1, 2, 5], "train.save_every": [0, 1, 2, 5],
         "train.sample_every": [0, 1, 2], "train.sample_tokens": [0, 3, 30], "train.compile": ["auto", "off"],
         "train.weight_decay": [0.0, 0.1, 1.0], "train.grad_clip": [0.0, 0.1, 1.0],
         "train.device": ["auto", "cpu", "mps", "cuda"],
         "lifelong.freeze": [[], "embedding*", ["*attention*"], ["*"], ["nothing*"], "*ffn*"],
         "lifelong.lora_rank": [0, 1, 3, 40]}
NAMED = {"ffn.kind": list(KINDS), "ffn.router": list(ROUTERS), "ffn.balance": ["auto", "none", *LOSSES],
         "ffn.activation": ["swiglu", *ACTIVATIONS], "model.mixer": list(MIXERS)}
SEEDS = [0, 1, 12345, 2**40, 2**63, 2**70]


def random_settings(rng, home):
    """Settings by dotted names: a kind of model that works, then some settings at random."""
    settings = {"ffn.kind": rng.choice(["dense", "moe", "moe", "moe", "peer", "pkm"])}
    if settings["ffn.kind"] == "moe":
        router = settings["ffn.router"] = rng.choice(list(ROUTERS))
        settings["ffn.top_k"] = ROUTERS[router].traits.k if ROUTERS[router].traits.k > 0 else 2
        if router == "domain":
            settings |= {"data.name": ["one", "two"], "ffn.n_expert": 2}
    else:
        settings |= {"ffn.n_keys": rng.choice([4, 8]), "ffn.peer_top_k": rng.choice([1, 2, 4])}
    if rng.random() < 0.25:                             # from a trained model, which gives [model] and [ffn]
        settings = {"train.init_from": home.folder / rng.choice(list(home.RUNS))}
    for key in rng.sample(sorted(FIELDS), rng.choice([0, 1, 2, 3, 5, 8, 12])):
        if (value := random_value(rng, key, home)) is not None:
            settings[key] = value
    return settings


def random_value(rng, key, home):
    """A value for a setting, mostly within its range; None to leave it as it is."""
    spec = FIELDS[key]
    if key in ("train.init_from", "lifelong.teacher"):
        name = rng.choice([*home.RUNS, "none", None])
        return name and home.folder / name
    if key in SMALL:
        return rng.choice(SMALL[key]) if SMALL[key] else None
    if spec.type is bool:
        return rng.random() < 0.5
    choices = spec.metadata["choices"] or NAMED.get(key)
    if choices:
        return "no-such" if rng.random() < 0.1 else rng.choice(choices)
    if spec.type is int:
        return rng.choice(SEEDS)
    low, high = spec.metadata["low"], spec.metadata["high"]
    return rng.choice([low, low + 0.01, low + 0.5, low - 1, low + 1 if high is None else high, "x"])


def as_text(value):
    return show(value) if isinstance(value, (list, bool)) else str(value)


def check_config(rng, home, out):
    """("accepted" or "refused", what is wrong or "", the command line) of a random config."""
    settings = {key: as_text(value) for key, value in random_settings(rng, home).items()}
    if "train.init_from" in settings:               # which gives [model] and [ffn]: set what is drawn alone
        settings = {key: None for key in TINY if key.startswith(("model.", "ffn."))} | settings
    shutil.rmtree(out, ignore_errors=True)
    if any(key.startswith("data.") for key in settings):    # no trial prepares the corpora of the next one
        settings = {"data.dir": shutil.copytree(home.data, out / "prepared")} | settings
    argv = [word for word in home.command(out, settings) if not str(word).endswith("=None")]
    line = " ".join(str(word) for word in argv)
    result = call(train.main, *argv)
    if result.status in (1, 2):
        return "refused", why_not_refused(result), line
    return "accepted", why_not_accepted(result, out, settings), line


def why_not_refused(result):
    """What is wrong with a refusal; empty if it is one line that names a key, or what a key points to."""
    said = result.refusal()
    if said is None:
        return f"refused in other ways than one line: {result.err}"
    named = {key for key in FIELDS if re.search(rf"\b{re.escape(key)}\b", said)}
    of_files = re.search(r"\b(tokenizer|vocab_size|max_tokens)\b|none-such|/none\b", said)
    return "" if named or of_files else f"names no key: {said}"


def why_not_accepted(result, out, settings):
    """What went wrong with a config that was accepted; empty if all went well."""
    if result.status != 0:
        return f"training ended with {result.status}: {result.err}"
    steps = {"train.max_steps": 3, "train.log_every": 1}
    for what, main, *argv in [
            ("resuming", train.main, "--out", out, "--resume", "--quiet", *words(steps)),
            ("sampling", sample.main, out, "--tokens", 3, "--num", 2)]:
        result = call(main, *argv)
        if result.status != 0:
            return f"{what} ended with {result.status}: {result.err}"
    with open(out / "log.csv", newline="") as file:
        last = list(csv.DictReader(file))[-1]
    finite = math.isfinite(float(last["loss"])) and math.isfinite(float(last["val_loss"]))
    return "" if finite and last["step"] == "3" else f"the log ends with {last}"
