"""Config files and command lines: TOML, `--section.key value` overrides, the text of --help, and checks.

The settings themselves stand in settings.py. Whatever is wrong with one raises ConfigError, whose message is
one line for people: the key, the value, where it came from, and what to write instead.
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

from settings import NO_CHOICE, ONE_EXPERT, DataConfig, FFNConfig, LifelongConfig, ModelConfig, TrainConfig


class ConfigError(ValueError):
    """A setting that cannot be used; the message names the key, the value, the file and the remedy."""


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
        (ll.l2 and ll.lora_rank, "lifelong.l2", "has nothing to hold: with lifelong.lora_rank the old "
         "weights do not move"),
        (ll.lora_rank and not t.init_from, "lifelong.lora_rank",
         "adapts a trained model: set train.init_from"),
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
        (not f.d_expert and f.d_ff % f.granularity, "ffn.granularity",
         f"does not divide ffn.d_ff = {f.d_ff}"),
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
    """Prints `error: message` to stderr; returns the exit status 2. Of a KeyboardInterrupt: `interrupted`,
    and the status 130, as shells report what Ctrl-C ended."""
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
