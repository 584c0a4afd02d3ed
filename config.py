"""Every setting of a run: five dataclasses, TOML files, `--section.key value` overrides and the text of
--help.

A dataclass field is the only place where a default, its meaning and its allowed range are written; the
parser, the help and the checks are generated from it. Whatever is wrong with a setting raises ConfigError,
whose message is one line for people: the key, the value, where it came from, and what to write instead.
"""
import argparse
import dataclasses
import difflib
import json
import math
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

# What each router does, and what it looks at: shown wherever a router can be chosen. A router with a word in
# brackets is not an independent, causal function of the token's own past in training, in evaluation, or in
# both. DIFFERS: torchrun with several processes does not train the model that one process would.
DIFFERS = "differs under several processes"
ROUTERS = {
    "topk": "softmax top-k (Mixtral, DeepSeekMoE, Qwen2; group-limited with n_groups)",
    "noisy_topk": f"Shazeer's noisy top-k [draws noise in training; {DIFFERS}]",
    "switch": f"top-1 with input jitter [draws noise in training; with jitter > 0 {DIFFERS}]",
    "gshard": f"top-2, the second by chance [draws noise in training; {DIFFERS}]",
    "sigmoid": "DeepSeek-V3's, for loss-free balancing",
    "sinkhorn": f"S-BASE [training looks across the batch and ahead, evaluation not; {DIFFERS}]",
    "base": "balanced assignment [training looks across the batch and ahead, evaluation not; never compiled; "
            f"{DIFFERS}]",
    "hash": "a fixed table of token ids",
    "rl": f"REINFORCE on the token's own loss [draws noise in training; {DIFFERS}]",
    "expert_choice": "experts choose among the sequences at one position [looks across the batch, always; "
                     f"{DIFFERS}]",
    "soft": "all experts, weighted",
    "sample_top1": f"BTX's Gumbel top-1 [draws noise in training; {DIFFERS}]",
    "domain": "DEMix, the expert of the corpus",
}
ONE_EXPERT = ("switch", "hash", "base", "sinkhorn", "rl", "sample_top1", "domain")    # routers with k = 1
NO_CHOICE = ("hash", "domain", "expert_choice")             # routers whose load no loss can change


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value, the file and the remedy."""


def opt(default, help, choices=None, low=None, high=None):
    """A config field: its default, its meaning, and the values that it may take (bounds are inclusive)."""
    meta = dict(help=help, choices=choices, low=low, high=high)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass
class ModelConfig:
    n_layer: int = opt(4, "number of blocks", low=1)
    n_head: int = opt(4, "query heads of attention", low=1)
    n_kv_head: int = opt(0, "key/value heads, grouped-query attention (0: as many as n_head)", low=0)
    n_embd: int = opt(128, "width d of the residual stream", low=1)
    block_size: int = opt(128, "longest context T, in tokens", low=1)
    vocab_size: int = opt(0, "rows of the embedding table (0: what the corpus's tokenizer has)", low=0)
    dropout: float = opt(0.0, "dropout on embeddings, attention and block outputs", low=0.0, high=0.9)
    qkv_bias: bool = opt(False, "biases on the q, k and v projections (Qwen2)")
    tie_embeddings: bool = opt(True, "the output head shares the embedding table")
    rope_base: float = opt(10000.0, "base of the rotary frequencies", low=1.0)
    loss_chunks: int = opt(1, "compute the loss in this many slices so that the (tokens, vocabulary) logits "
                           "never exist at once; above 1 the training forward returns no logits", low=1)


@dataclass
class FFNConfig:
    kind: str = opt("moe", "what stands in the feed-forward slot of the sparse layers",
                    choices=["dense", "moe", "peer", "pkm"])
    activation: str = opt("swiglu", "non-linearity (swiglu has a third matrix)",
                          choices=["gelu", "relu", "relu2", "swiglu"])
    d_ff: int = opt(0, "hidden width of one unsplit feed-forward layer or expert "
                       "(0: 4 n_embd, swiglu 8/3 n_embd, to a multiple of 8)", low=0)
    d_dense: int = opt(0, "hidden width of the dense layers of a model with sparse ones (0: d_ff)", low=0)
    moe_every: int = opt(0, "every how many layers is sparse, counted from the end of each group "
                            "(0: every layer for moe, only the middle one for peer and pkm)", low=0)
    moe_layers: list[int] = opt([], "indices of the sparse layers, instead of moe_every")
    n_dense_first: int = opt(0, "this many first layers stay dense (DeepSeekMoE)", low=0)
    n_expert: int = opt(8, "routed experts of a layer, before any granularity split", low=1)
    top_k: int = opt(2, "experts that a token visits, before any granularity split", low=1)
    granularity: int = opt(1, "G: experts of hidden width d_ff/G, G times as many, G times as many visited",
                           low=1)
    d_expert: int = opt(0, "hidden width of one expert (0: d_ff / granularity)", low=0)
    n_frozen: int = opt(0, "the first n_frozen experts of every sparse layer, counted after the granularity "
                           "split, never change in training (lifelong.py expand, btx.py mix --freeze-experts)",
                        low=0)
    frozen_routes: bool = opt(True, "their router rows do not change either (false: the whole router learns)")
    n_shared: int = opt(0, "experts that every token visits, each as wide as a routed one", low=0)
    d_shared: int = opt(0, "hidden width of one shared expert, in place of n_shared of them (Qwen2)", low=0)
    shared_gate: bool = opt(False, "weigh the shared output by sigmoid(x w) (Qwen2)")
    output_norm: bool = opt(False, "a norm on the layer's output (the fine-grained paper; see expert_choice)")
    router: str = opt("topk", "how tokens choose: " + "; ".join(f"{k}: {v}" for k, v in ROUTERS.items()),
                      choices=list(ROUTERS))
    gate_order: str = opt("topk_then_softmax", "gates of topk and gshard-like routers: softmax over the "
                          "chosen logits (Mixtral), or over all of them (Switch, DeepSeekMoE, Qwen2), "
                          "renormalised or not",
                          choices=["topk_then_softmax", "softmax_then_topk", "softmax_then_topk_renorm"])
    balance: str = opt("auto", "what keeps the experts evenly used; auto is the router's own: loss_free for "
                       "sigmoid, importance_load, gshard, none where a loss can change nothing, switch for "
                       "the rest",
                       choices=["auto", "none", "switch", "gshard", "importance_load", "deepseek", "btx",
                                "loss_free"])
    balance_loss: float = opt(0.01, "coefficient of the balance loss (w of importance_load, alpha_1 of "
                              "deepseek, the sequence loss beside loss_free, where 0.0001 is usual)", low=0.0)
    load_loss: float = opt(0.01, "coefficient of the load half of importance_load", low=0.0)
    device_loss: float = opt(0.0, "alpha_2 of deepseek: balance of groups", low=0.0)
    comm_loss: float = opt(0.0, "alpha_3 of deepseek: balance of tokens sent to each group", low=0.0)
    z_loss: float = opt(0.0, "coefficient of the router z-loss (ST-MoE: 0.001)", low=0.0)
    bias_rate: float = opt(0.001, "u of loss_free: step of the selection bias", low=0.0)
    capacity_factor: float = opt(0.0, "slots per expert in training, times k n / E, for which the sequences of "
                                 "a batch compete; later positions are dropped first (0: dropless)", low=0.0)
    eval_capacity_factor: float = opt(0.0, "the same in evaluation (0: dropless)", low=0.0)
    dispatch: str = opt("auto", "how tokens travel to the experts; every choice gives the same numbers",
                        choices=["auto", "loop", "padded", "grouped", "fused"])
    jitter: float = opt(0.01, "switch: router input times U(1-j, 1+j) in training", low=0.0, high=0.99)
    n_groups: int = opt(1, "groups of experts for group-limited selection (DeepSeek-V2, V3)", low=1)
    topk_groups: int = opt(0, "groups that a token may use (0: all)", low=0)
    route_scale: float = opt(1.0, "factor on the gates of topk and sigmoid routers (DeepSeek-V3: 2.5)",
                             low=0.0)
    sinkhorn_iters: int = opt(8, "sinkhorn, base: fixed number of row and column scalings", low=1)
    sinkhorn_tau: float = opt(1.0, "sinkhorn, base: temperature of the plan", low=1e-3)
    hash_table: str = opt("random", "hash: a random table, or one balanced by the corpus's token counts",
                          choices=["random", "balanced"])
    rl_loss: float = opt(0.01, "rl: coefficient of the policy and baseline losses", low=0.0)
    gumbel_rate: float = opt(1e-4, "sample_top1: r of the temperature max(0.5, exp(-r step))", low=0.0)
    n_keys: int = opt(64, "peer, pkm: sub-keys of each half; the layer has N = n_keys^2 experts", low=2)
    peer_heads: int = opt(4, "peer, pkm: retrieval heads h", low=1)
    peer_top_k: int = opt(8, "peer, pkm: experts k that each head retrieves", low=1)
    d_key: int = opt(0, "peer, pkm: width of a query, both halves together (0: n_embd / 2)", low=0)
    query_norm: str = opt("batchnorm", "peer, pkm: norm of the queries",
                          choices=["batchnorm", "layernorm", "none"])
    peer_score: str = opt("softmax", "peer, pkm: gate over the k retrieved of a head",
                          choices=["softmax", "sigmoid"])
    peer_activation: str = opt("gelu", "peer: non-linearity of a single-neuron expert",
                               choices=["gelu", "relu", "silu"])
    peer_path: str = opt("auto", "peer, pkm: how rows are gathered; every choice gives the same numbers",
                         choices=["auto", "readable", "lean", "fused"])

    @property
    def experts(self):
        """Routed experts of a layer after the granularity split: G * n_expert."""
        return self.n_expert * self.granularity

    @property
    def active(self):
        """Routed experts that a token visits after the split: G * top_k (soft: all of them)."""
        return self.experts if self.router == "soft" else self.top_k * self.granularity

    @property
    def expert_width(self):
        """Hidden width of one routed expert."""
        return self.d_expert or self.d_ff // self.granularity


@dataclass
class DataConfig:
    name: str | list[str] = opt("python", "corpus, or list of corpora (each is a domain), by name or path")
    weights: list[float] = opt([], "share of each corpus in a batch (empty: equal); replay of old data: name = "
                                   "[\"new\", \"old\"], weights = [0.9, 0.1]")
    tokenizer: str = opt("byte", "byte, char, bpe, gpt2, or the path of a tokenizer.json")
    vocab_size: int = opt(4096, "size of a bpe vocabulary", low=257)
    seed: int = opt(0, "seed of the order of batches; two runs of one data seed see the same batches", low=0)
    dir: str = opt("", "folder of the prepared corpora (empty: data/prepared)")
    max_tokens: int = opt(0, "use at most this many training tokens of each corpus (0: all)", low=0)


@dataclass
class TrainConfig:
    max_steps: int = opt(1000, "optimizer steps", low=1)
    batch_size: int = opt(32, "sequences per optimizer step, all micro-steps and processes together", low=1)
    grad_accum: int = opt(1, "micro-steps that a batch is cut into, to save memory", low=1)
    lr: float = opt(3e-3, "peak learning rate", low=0.0)
    min_lr: float = opt(0.1, "final learning rate, as a share of lr", low=0.0, high=1.0)
    warmup_steps: int = opt(100, "steps of linear warm-up", low=0)
    schedule: str = opt("cosine", "shape after the warm-up: cosine, warm-up-stable-decay, or constant",
                        choices=["cosine", "wsd", "constant"])
    decay_share: float = opt(0.2, "wsd: share of the steps that the final linear decay takes", low=0.0,
                             high=1.0)
    weight_decay: float = opt(0.1, "AdamW decay of matrices; none on norms, embeddings, router biases, "
                              "tables", low=0.0)
    beta1: float = opt(0.9, "AdamW", low=0.0, high=0.9999)
    beta2: float = opt(0.95, "AdamW", low=0.0, high=0.99999)
    grad_clip: float = opt(1.0, "largest global gradient norm (0: no clipping)", low=0.0)
    seed: int = opt(0, "seed of the initialisation and of every draw in training", low=0, high=2**62)
    eval_every: int = opt(250, "steps between evaluations (0: only at the end)", low=0)
    eval_batches: int = opt(20, "validation batches, always the same ones", low=1)
    log_every: int = opt(1, "steps between rows of log.csv", low=1)
    save_every: int = opt(0, "steps between checkpoints (0: at every evaluation)", low=0)
    keep: str = opt("all", "checkpoints in the run folder: all (last, the one before it, best), best (last "
                    "and best), last", choices=["all", "best", "last"])
    sample_every: int = opt(0, "steps between printed samples (0: only at the end)", low=0)
    sample_tokens: int = opt(200, "length of a printed sample (0: none)", low=0)
    dtype: str = opt("auto", "arithmetic: auto is float32 on CPU and MPS, bfloat16 on CUDA; parameters stay "
                     "float32", choices=["auto", "float32", "bfloat16"])
    device: str = opt("auto", "auto takes cuda, then mps, then cpu", choices=["auto", "cpu", "cuda", "mps"])
    compile: str = opt("auto", "torch.compile: auto is on for CUDA and off elsewhere",
                       choices=["auto", "on", "off"])
    parallel: str = opt("ddp", "with several processes (torchrun): ddp, each has the whole model; fsdp, each has "
                        "a share of parameters, gradients and optimizer state, for what outgrows one GPU",
                        choices=["ddp", "fsdp"])
    init_from: str = opt("", "run folder whose weights, [model] and [ffn] this run starts from")


@dataclass
class LifelongConfig:
    distill: float = opt(0.0, "weight of T^2 KL(p_old || p_new), mean over tokens: learning without forgetting "
                              "(Lifelong-MoE: 1)", low=0.0)
    distill_temperature: float = opt(1.0, "T, by which both models' logits are divided", low=1e-3)
    teacher: str = opt("", "run folder of the old model of distill (empty: the run that train.init_from was "
                           "expanded from, else train.init_from itself)")
    l2: float = opt(0.0, "weight of the squared distance to the old weights, those of the run that "
                         "train.init_from was expanded from, else of itself; new experts are free", low=0.0)
    freeze: str | list[str] = opt([], "patterns of names of parameters that stay as they are, such as embedding* "
                                      "or blocks.?.attention.*; * is any text, ? one letter")
    lora_rank: int = opt(0, "rank r of low-rank adapters W + alpha/r B A on the linear layers of attention and "
                            "dense feed-forward layers; nothing else learns (0: none)", low=0)
    lora_alpha: float = opt(16.0, "alpha, by which the adapters' part is scaled", low=0.0)


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    ffn: FFNConfig = field(default_factory=FFNConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    lifelong: LifelongConfig = field(default_factory=LifelongConfig)
    sources: dict = field(default_factory=dict, repr=False, compare=False)   # "ffn.top_k" -> where it was set

    def set(self, key, value, source):
        """Sets `section.name`; value is TOML data, or text (from a command line) when source starts with
        '--'."""
        section, spec = find_field(key, source)
        value = from_text(value, spec.type, key, source) if source.startswith("--") else value
        setattr(getattr(self, section), spec.name, check_value(value, spec, key, source))
        self.sources[key] = source

    def fail(self, key, why):
        """Raises a ConfigError about a value that is fine by itself but not beside the others."""
        section, name = key.split(".")
        source = self.sources.get(key, "default")
        raise ConfigError(f"{source}: {key} = {show(getattr(getattr(self, section), name))} {why}")

    def to_dict(self):
        return {s: dataclasses.asdict(getattr(self, s)) for s in SECTIONS}

    @classmethod
    def from_dict(cls, tables, source="checkpoint"):
        """Config from nested tables; raises ConfigError for an unknown section or key."""
        config = cls()
        for section, table in tables.items():
            if section not in SECTIONS or not isinstance(table, dict):
                raise ConfigError(f"{source}: [{section}] is no section{nearest(section, SECTIONS)}; "
                                  f"settings belong in [{'], ['.join(SECTIONS)}]")
            for name, value in table.items():
                config.set(f"{section}.{name}", value, source)
        return config

    def to_toml(self):
        lines = []
        for section, table in self.to_dict().items():
            lines += [f"[{section}]", *(f"{name} = {show(value)}" for name, value in table.items()), ""]
        return "\n".join(lines)


SECTIONS = {"model": ModelConfig, "ffn": FFNConfig, "data": DataConfig, "train": TrainConfig,
            "lifelong": LifelongConfig}


def all_fields():
    """Yields (key, dataclass field) for every setting, in file order."""
    for section, cls in SECTIONS.items():
        for spec in dataclasses.fields(cls):
            yield f"{section}.{spec.name}", spec


def find_field(key, source):
    section, _, name = key.partition(".")
    specs = {f.name: f for f in dataclasses.fields(SECTIONS[section])} if section in SECTIONS else {}
    if name not in specs:
        raise ConfigError(f"{source}: unknown setting {key}{nearest(key, dict(all_fields()))}")
    return section, specs[name]


def nearest(word, known):
    """", did you mean X?" for the known name nearest to a misspelt one, else an empty text."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.8)
    section, _, name = word.rpartition(".")
    found = found or [k for k in known if section and k.endswith("." + name)]      # right name, wrong section
    found = found or difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def show(value):
    """A value as TOML writes it."""
    if isinstance(value, list):
        return "[" + ", ".join(show(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)        # TOML's strings, numbers and booleans are JSON's


def type_name(kind):
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
             list[int]: "a list of whole numbers", list[float]: "a list of numbers"}
    return names.get(kind, "a text or a list of texts")


def from_text(text, kind, key, source):
    """Command-line text as the TOML value of a field's type; lists may be written `a,b` or `["a", "b"]`."""
    if kind not in (int, float, bool, str):
        if text.startswith("["):
            return parse_toml(f"value = {text}", source)["value"]
        if kind == str | list[str]:
            return text.split(",") if "," in text else text
        return [from_text(t, kind.__args__[0], key, source) for t in text.split(",") if t]
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{source}: {key} = {text} is not {type_name(kind)}") from None


def check_value(value, spec, key, source):
    """The value, if its type and range fit the field; an int is accepted where a float is meant."""
    kind, meta = spec.type, spec.metadata
    items = value if isinstance(value, list) else [value]
    inner = {list[int]: int, list[float]: float, str | list[str]: str}.get(kind, kind)
    if inner is float:
        items = [float(v) if type(v) is int else v for v in items]
    is_list = isinstance(value, list)
    fits = kind == str | list[str] or is_list == (kind in (list[int], list[float]))
    if not fits or any(type(v) is not inner for v in items):
        raise ConfigError(f"{source}: {key} = {show(value)} is not {type_name(kind)}")
    for v in items:
        if inner is float and not math.isfinite(v):
            raise ConfigError(f"{source}: {key} = {v} is not finite")
        if meta["choices"] and v not in meta["choices"]:
            raise ConfigError(f"{source}: {key} = {show(v)} is not one of {', '.join(meta['choices'])}"
                              f"{nearest(v, meta['choices'])}")
        if meta["low"] is not None and v < meta["low"] or meta["high"] is not None and v > meta["high"]:
            most = f" and at most {meta['high']}" if meta["high"] is not None else ""
            raise ConfigError(f"{source}: {key} = {v} must be at least {meta['low']}{most}")
    return items if is_list else items[0]


def parse_toml(text, source):
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise ConfigError(f"{source}: not valid TOML: {e}") from None


def load_config(path=None, overrides=()):
    """Config of a TOML file and of (key, text) pairs from the command line, every value checked, derived ones
    filled in.

    Raises ConfigError naming the key, the value, the file and the nearest valid name.
    """
    config = Config()
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            known = [p.name for p in sorted(Path(path).parent.glob("*.toml"))]
            raise ConfigError(f"{path}: no such config file{nearest(Path(path).name, known)}") from None
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"{path}: cannot be read as a config: {e}") from None
        config = Config.from_dict(parse_toml(text, path), str(path))
    for key, value in overrides:
        config.set(key, value, f"--{key}")
    config = resolve(config)
    return config if config.train.init_from else validate(config)   # load_init does, once it knows the model


def resolve(config):
    """Fills in the values that follow from others (0 in the file), so that a saved config says what ran."""
    m, f = config.model, config.ffn
    m.n_kv_head = m.n_kv_head or m.n_head
    if not f.d_ff:
        f.d_ff = 8 * math.ceil(m.n_embd * (1 if f.activation == "swiglu" else 1.5) / 3)
    f.d_dense = f.d_dense or f.d_ff
    f.d_key = f.d_key or 2 * (m.n_embd // 4) or 2
    f.topk_groups = f.topk_groups or f.n_groups
    if f.balance == "auto":
        own = dict(sigmoid="loss_free", noisy_topk="importance_load", gshard="gshard", sinkhorn="none",
                   base="none", soft="none")
        f.balance = "none" if f.router in NO_CHOICE else own.get(f.router, "switch")
    if f.balance == "loss_free" and "ffn.balance_loss" not in config.sources:
        f.balance_loss = 0.0                            # balancing without a loss, unless one is asked for
    if not f.moe_every:
        f.moe_every = 1
        if f.kind in ("peer", "pkm") and not f.moe_layers:
            f.moe_layers = [m.n_layer // 2]
    return config


def sparse_layers(config):
    """Indices of the layers whose feed-forward slot holds the kind of [ffn]; all others are dense."""
    f = config.ffn
    if f.kind == "dense":
        return []
    every = [i for i in range(config.model.n_layer) if (i + 1) % f.moe_every == 0]
    return [i for i in (sorted(set(f.moe_layers)) or every) if i >= f.n_dense_first]


def validate(config):
    """The config, if its values fit together; raises ConfigError naming the first key that does not."""
    m, f, d, t, ll = config.model, config.ffn, config.data, config.train, config.lifelong
    checks = [
        (m.n_embd % m.n_head, "model.n_embd", f"cannot be divided by model.n_head = {m.n_head}"),
        (m.n_embd % m.n_head == 0 and m.n_embd // m.n_head % 2, "model.n_embd",
         f"gives heads of odd width {m.n_embd // m.n_head}; rotary positions turn pairs, so make it even"),
        (m.n_head % m.n_kv_head, "model.n_kv_head", f"must divide model.n_head = {m.n_head}"),
        (any(not 0 <= i < m.n_layer for i in f.moe_layers), "ffn.moe_layers",
         f"names a layer outside 0..{m.n_layer - 1}"),
        (f.kind != "dense" and not sparse_layers(config),
         "ffn.n_dense_first" if f.n_dense_first else "ffn.moe_every",
         f"leaves none of the {m.n_layer} layers sparse; for a dense model set ffn.kind = \"dense\""),
        (t.batch_size % t.grad_accum, "train.batch_size",
         f"cannot be cut into train.grad_accum = {t.grad_accum}"),
        (d.weights and (not isinstance(d.name, list) or len(d.weights) != len(d.name)), "data.weights",
         "needs one number for each corpus of data.name"),
        (d.weights and (min(d.weights) < 0 or sum(d.weights) <= 0), "data.weights",
         "must be at least 0, not all 0"),
        (d.name in ("", []) or isinstance(d.name, list) and "" in d.name, "data.name", "names no corpus"),
        (isinstance(d.name, list) and len(set(d.name)) < len(d.name), "data.name", "names a corpus twice"),
        (ll.distill and not (t.init_from or ll.teacher), "lifelong.distill",
         "needs an old model: set train.init_from, or lifelong.teacher"),
        (ll.distill and m.loss_chunks > 1, "lifelong.distill",
         f"needs logits, which model.loss_chunks = {m.loss_chunks} never makes; set that to 1"),
        (ll.l2 and not t.init_from, "lifelong.l2", "needs old weights: set train.init_from"),
        (ll.l2 and ll.lora_rank, "lifelong.l2", "has nothing to hold: with lifelong.lora_rank the old weights "
         "do not move"),
        (ll.lora_rank and not t.init_from, "lifelong.lora_rank", "adapts a trained model: set train.init_from"),
    ]
    if f.kind == "moe":
        checks += moe_checks(config)
    else:
        checks += [(f.n_frozen, "ffn.n_frozen", f"needs experts: ffn.kind = \"{f.kind}\" has none to freeze")]
    if f.kind in ("peer", "pkm"):
        checks += [(f.peer_top_k > f.n_keys, "ffn.peer_top_k", f"is more than ffn.n_keys = {f.n_keys}"),
                   (f.d_key % 2, "ffn.d_key", "must be even: each half queries one table of sub-keys")]
    for wrong, key, why in checks:
        if wrong:
            config.fail(key, why)
    return config


def moe_checks(config):
    """(is wrong, key, why) for the settings of a mixture of experts."""
    f, E, k = config.ffn, config.ffn.experts, config.ffn.active
    return [
        (f.n_frozen > E, "ffn.n_frozen", f"is more than the {E} routed experts"),
        (f.top_k > f.n_expert, "ffn.top_k", f"is more than ffn.n_expert = {f.n_expert}"),
        (f.d_expert and f.granularity > 1, "ffn.d_expert",
         f"and ffn.granularity = {f.granularity} both set the width of an expert; give one of them"),
        (not f.d_expert and f.d_ff % f.granularity, "ffn.granularity", f"does not divide ffn.d_ff = {f.d_ff}"),
        (f.router in ONE_EXPERT and k > 1, "ffn.top_k",
         f"(times ffn.granularity) must be 1 for ffn.router = \"{f.router}\""),
        (f.router == "gshard" and k != 2, "ffn.top_k",
         "(times ffn.granularity) must be 2 for ffn.router = \"gshard\""),
        (f.router == "topk" and k == 1 and f.gate_order != "softmax_then_topk", "ffn.gate_order",
         "makes the only gate of a token 1, so that the router would never learn; use \"softmax_then_topk\""),
        (f.router == "noisy_topk" and k == 1, "ffn.top_k",
         "of 1 makes the gate of noisy_topk constant; use 2 or more"),
        (E % f.n_groups, "ffn.n_groups", f"does not divide the {E} routed experts"),
        (f.topk_groups > f.n_groups, "ffn.topk_groups", f"is more than ffn.n_groups = {f.n_groups}"),
        (f.n_groups > 1 and f.router not in ("topk", "sigmoid"), "ffn.n_groups",
         "works with ffn.router = \"topk\" and \"sigmoid\" only"),
        (f.n_groups > 1 and f.topk_groups * (E // f.n_groups) < k, "ffn.topk_groups",
         f"leaves {f.topk_groups * (E // f.n_groups)} experts to choose {k} from"),
        (f.d_shared and f.n_shared, "ffn.d_shared",
         "and ffn.n_shared both set the shared width; give one of them"),
        (f.shared_gate and not (f.d_shared or f.n_shared), "ffn.shared_gate",
         "needs ffn.d_shared or ffn.n_shared"),
        (f.balance == "loss_free" and f.router != "sigmoid", "ffn.balance", "needs ffn.router = \"sigmoid\""),
        (f.balance == "importance_load" and f.router != "noisy_topk", "ffn.balance",
         "needs ffn.router = \"noisy_topk\": the load estimate comes from its noise"),
        (f.balance != "none" and f.router in NO_CHOICE, "ffn.balance", f"has nothing to act on: ffn.router = "
         f"\"{f.router}\" does not choose by probability; use \"none\""),
        (f.z_loss and f.router in ("hash", "domain"), "ffn.z_loss", "needs a router with logits"),
        (f.capacity_factor and f.router in ("soft", "expert_choice"), "ffn.capacity_factor",
         f"has no meaning for ffn.router = \"{f.router}\""),
        (f.eval_capacity_factor and f.router in ("soft", "expert_choice"), "ffn.eval_capacity_factor",
         f"has no meaning for ffn.router = \"{f.router}\""),
        (f.output_norm and k == 1 and f.router != "expert_choice", "ffn.output_norm",
         "cancels the gate of the only expert, so that the router would never learn; raise ffn.top_k"),
        (f.router == "domain" and (not isinstance(config.data.name, list) or len(config.data.name) != E),
         "data.name", f"must list {E} corpora, one for each expert of ffn.router = \"domain\""),
    ]


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit status 2, like every other error of these programs."""

    def error(self, message):
        sys.exit(fail(message))


def fail(message):
    """Prints `error: message` to stderr; returns the exit status 2. Of a KeyboardInterrupt: `interrupted`, and
    the status 130, as shells report what Ctrl-C ended."""
    interrupted = isinstance(message, KeyboardInterrupt)
    print("\ninterrupted" if interrupted else f"error: {message}", file=sys.stderr)
    return 130 if interrupted else 2


def add_settings(parser, sections=tuple(SECTIONS)):
    """Adds every `--section.key` to a parser, with its default and meaning from the dataclass."""
    for section in sections:
        group = parser.add_argument_group(f"[{section}]")
        for spec in dataclasses.fields(SECTIONS[section]):
            default = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()
            choices = f"; one of {', '.join(spec.metadata['choices'])}" if spec.metadata["choices"] else ""
            text = f"{spec.metadata['help']}{choices} (default: {show(default)})".replace("%", "%%")
            group.add_argument(f"--{section}.{spec.name}", help=text, metavar=spec.name.upper(),
                               default=argparse.SUPPRESS)


def parse(parser, argv=None):
    """(options, overrides): a program's own options, and its `--section.key value` pairs as (key, text).

    Raises ConfigError for an option that does not exist, with the nearest one that does.
    """
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [o for action in parser._actions for o in action.option_strings]
        word = unknown[0].split("=")[0]
        raise ConfigError(f"unknown option {word}{nearest(word, known)}; see --help")
    keys = dict(all_fields())
    overrides = [(k, v) for k, v in vars(options).items() if k in keys]
    return options, overrides
