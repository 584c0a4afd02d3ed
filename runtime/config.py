"""Config files and command lines: TOML, `--section.key value` overrides, the text of --help, and checks.

The settings themselves stand in settings.py, what fits together in the layers (model.check). Whatever is wrong
with one raises ConfigError, whose message is one line for people: the key, the value, where it came from, and
what to write instead.
"""
import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import tomllib
from pathlib import Path

from data.binfile import explain
from runtime.ending import fail
from runtime.fits import refuse
from settings import SECTIONS, Config, ConfigError, show

PATHS = ("train.init_from", "lifelong.teacher", "data.dir")             # in which ~ is the user's folder


# ---- from tables and texts to a Config ----


def set_value(config, key, value, source):
    """Sets `section.name` to a value as TOML or Python has it; source: where it comes from, for messages."""
    section, spec = find_field(key, source)
    value = check_value(value, spec, key, source)
    setattr(getattr(config, section), spec.name, os.path.expanduser(value) if key in PATHS else value)
    config.sources[key] = source


def set_text(config, key, text):
    """Sets `section.name` to what a command line says."""
    source = f"--{key}"
    _, spec = find_field(key, source)
    set_value(config, key, from_text(text, spec.type, key, source), source)


def from_tables(tables, source="checkpoint"):
    """Config of nested tables; raises ConfigError for an unknown section or key."""
    config = Config()
    for section, table in tables.items():
        if section not in SECTIONS or not isinstance(table, dict):
            raise ConfigError(f"{source}: [{section}] is no section{nearest(section, SECTIONS)}; "
                              f"settings belong in [{'], ['.join(SECTIONS)}]")
        for name, value in table.items():
            set_value(config, f"{section}.{name}", value, source)
    return config


def to_toml(config):
    """A Config as the text of a file."""
    lines = []
    for section, table in config.to_dict().items():
        lines += [f"[{section}]", *(f"{name} = {show(value)}" for name, value in table.items()), ""]
    return "\n".join(lines)


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
            return [t.strip() for t in text.split(",")] if "," in text else text
        return [from_text(t, kind.__args__[0], key, source) for t in text.split(",") if t.strip()]
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"{source}: {key} = {brief(text)} is not {type_name(kind)}") from None


def brief(value):
    """A value for a message: a text as it is, another as TOML writes it, and cut where it is long."""
    try:
        text = value if isinstance(value, str) else show(value)
    except ValueError:                                  # of an int: Python writes 4300 digits and no more
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else text[:200] + "..."


def check_value(value, spec, key, source):
    """The value, if its type and range fit the field; an int is accepted where a float is meant."""
    kind, meta = spec.type, spec.metadata
    items = value if isinstance(value, list) else [value]
    inner = {list[int]: int, list[float]: float, str | list[str]: str}.get(kind, kind)
    if inner is float:
        items = [(float(v) if abs(v) < 2**1000 else math.inf) if type(v) is int else v for v in items]
    is_list = isinstance(value, list)
    fits = kind == str | list[str] or is_list == (kind in (list[int], list[float]))
    if not fits or any(type(v) is not inner for v in items):
        raise ConfigError(f"{source}: {key} = {brief(value)} is not {type_name(kind)}")
    for v in items:
        if inner is int and abs(v) >= 2**63:
            raise ConfigError(f"{source}: {key} = {brief(v)} must be below 2^63")
        if inner is str and "\0" in v:
            raise ConfigError(f"{source}: {key} = {brief(show(v))} has a NUL byte")
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
    except (ValueError, RecursionError) as e:           # ValueError: a number of thousands of digits as well
        raise ConfigError(f"{source}: not valid TOML: {e}") from None


def read_config(path=None, overrides=()):
    """Config of a TOML file and of (key, value) pairs, each value checked by itself; a value that is text is
    read like a command line's. Use model.load_config, which also completes it and checks that it fits.

    Raises ConfigError naming the key, the value, the file and the nearest valid name.
    """
    config = Config()
    if path is not None:
        path = os.path.expanduser(path)
        try:
            text = Path(path).read_text(encoding="utf-8-sig")       # an editor may have put a mark in front
        except FileNotFoundError:
            known = [p.name for p in sorted(Path(path).parent.glob("*.toml"))]
            raise ConfigError(f"{path}: no such config file{nearest(Path(path).name, known)}") from None
        except UnicodeDecodeError as e:
            raise ConfigError(f"{path}: is no text in UTF-8, as a config must be: {e}") from None
        except (OSError, ValueError) as e:
            raise ConfigError(explain(e, path, done="read", remedy="give a config file")) from None
        config = from_tables(parse_toml(text, path), str(path))
    for key, value in dict(overrides).items():
        if isinstance(value, str):
            set_text(config, key, value)
        else:
            set_value(config, key, value, f"--{key}")
    return config


def check_names(config, known):
    """Raises ConfigError for a setting that is none of the names known for it, {key: names}."""
    for key, names in known.items():
        if config.get(key) not in names:
            config.fail(key, f"is not one of {', '.join(names)}{nearest(config.get(key), names)}")


def check_run(config):
    """The config, if data, training and what keeps old knowledge fit together; raises ConfigError naming the
    first key that does not."""
    m, d, t, ll = config.model, config.data, config.train, config.lifelong
    return refuse(config, [
        (t.batch_size % t.grad_accum, "train.batch_size",
         f"cannot be cut into train.grad_accum = {t.grad_accum}"),
        (d.weights and (not isinstance(d.name, list) or len(d.weights) != len(d.name)), "data.weights",
         "needs one number for each corpus of data.name"),
        (d.weights and (min(d.weights) < 0 or sum(d.weights) <= 0), "data.weights",
         "must be at least 0, not all 0"),
        (not math.isfinite(sum(d.weights)), "data.weights", "have a sum that is not finite"),
        (not d.names or "" in d.names, "data.name", "names no corpus"),
        (len(set(d.names)) < len(d.names), "data.name", "names a corpus twice"),
        (ll.distill and not (t.init_from or ll.teacher), "lifelong.distill",
         "needs an old model: set train.init_from, or lifelong.teacher"),
        (ll.distill and m.loss_chunks > 1, "lifelong.distill",
         f"needs logits, which model.loss_chunks = {m.loss_chunks} never makes; set that to 1"),
        (ll.l2 and not t.init_from, "lifelong.l2", "needs old weights: set train.init_from"),
        (ll.l2 and ll.lora_rank, "lifelong.l2", "has nothing to hold: with lifelong.lora_rank the old "
         "weights do not move"),
        (ll.lora_rank and not t.init_from, "lifelong.lora_rank",
         "adapts a trained model: set train.init_from"),
    ])


# ---- programs ----


NEGATIVE = re.compile(r"-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|-(inf|nan)$", re.IGNORECASE)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit status 2, like every other error of these programs."""

    def __init__(self, **words):
        super().__init__(**words)
        self._negative_number_matcher = NEGATIVE            # its own does not know -1e-3 for a number

    def error(self, message):
        sys.exit(fail(message))


def add_settings(parser, sections=tuple(SECTIONS), more=None):
    """Adds every `--section.key` to a parser, with its default and meaning from the dataclass, in groups.
    more: {key: text} of what only the layers know of a setting."""
    for section in sections:
        group = parser.add_argument_group(f"[{section}]")
        for spec in dataclasses.fields(SECTIONS[section]):
            meta, key = spec.metadata, f"{section}.{spec.name}"
            if meta["group"]:
                group = parser.add_argument_group(f"[{section}] {meta['group']}")
            default = spec.default if spec.default is not dataclasses.MISSING else spec.default_factory()
            text = meta["help"] + (f": {more[key]}" if more and key in more else "")
            if meta["choices"]:
                text += f"; one of {', '.join(meta['choices'])}"
            group.add_argument(f"--{key}", help=f"{text} (default: {show(default)})".replace("%", "%%"),
                               metavar=spec.name.upper(), default=argparse.SUPPRESS)


def parse(parser, argv=None):
    """(options, overrides): a program's own options, and its `--section.key value` pairs as (key, text).
    Options are shown with _ in their names; - is understood as well.

    Raises ConfigError for an option that does not exist, with the nearest one that does.
    """
    known = {option for action in parser._actions for option in action.option_strings}
    words = [spelled(word, known) for word in (sys.argv[1:] if argv is None else map(str, argv))]
    options, unknown = parser.parse_known_args(words)
    if unknown:
        word = unknown[0].split("=")[0]
        raise ConfigError(f"unknown option {word}{nearest(word, known)}; see --help")
    keys = dict(all_fields())
    return options, [(key, text) for key, text in vars(options).items() if key in keys]


def spelled(word, known):
    """A word of a command line; an option of another spelling as it is known."""
    name, equals, value = word.partition("=")
    other = "--" + name[2:].replace("-", "_")
    return other + equals + value if name.startswith("--") and name not in known and other in known else word
