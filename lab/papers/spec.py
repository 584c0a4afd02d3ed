"""An experiment file: what may stand in it, read and checked.

    title, paper, caption, config, seeds, runs, evaluate, probes, speed, tune       see TOP
    [common] [cpu] [gpu]        settings of every arm, of every arm at one size
    [arms."name-{n_keys}"]      an arm: settings, and the words of ARM (lab/papers/arms.py)
    [metrics."pattern-{m}"]     columns computed from other columns, for the arms whose name fits
    [[panel]]                   the parts of the figure (lab/papers/figure.py), and in [labels] and
    [colours]                   what its arms are called and look like
    [claims.ID]                 what the paper says, as an inequality (lab/papers/verdict.py)
"""
import re
from pathlib import Path

from runtime.config import nearest, parse_toml
from settings import SECTIONS, ConfigError, show

SIZES = ("cpu", "gpu")
TOP = {"title": str, "paper": str, "caption": str, "config": str, "seeds": int, "runs": str,
       "evaluate": list,
       # true: of the first seed alone; 3: of the first three
       "probes": list, "speed": (bool, int),
       # settings and the values to choose from, of every arm; {} in an arm: not tuned
       "tune": dict,
       "common": dict, "cpu": dict, "gpu": dict, "arms": dict, "metrics": dict, "panel": list,
       "labels": dict, "colours": dict, "claims": dict}
ARM = {"config": str, "grid": dict, "from": (str, list), "make": str,
       "program": str, "sizes": list, "column": dict,
       "seeds": int, "tune": dict, "cpu": dict, "gpu": dict}
SIZE = {"config": str, "jobs": int, "tune": dict}    # what [cpu] and [gpu] may hold beside settings


def read_experiment(path):
    """The tables of an experiment file, names and types checked. Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        known = [p.name for p in sorted(Path(path).parent.glob("*.toml"))]
        hint = nearest(Path(path).name, known)
        raise ConfigError(f"{path}: no such experiment file{hint}") from None
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: cannot be read as an experiment: {e}") from None
    # The top level, then each size, then each arm.
    spec = parse_toml(text, path)
    check_words(spec, TOP, path)
    check_seeds(spec, path)
    if not spec.get("arms"):
        raise ConfigError(f"{path}: has no arms; each is a table [arms.NAME]")
    for size in SIZES:
        check_words(spec.get(size, {}), SIZE, f"{path}: [{size}]", sections=True)
    check_words(spec.get("common", {}), {}, f"{path}: [common]", sections=True)
    for name, table in spec["arms"].items():
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: arms.{name} = {show(table)} is no table; an arm is "
                              "[arms.NAME]")
        for part, where in ((table, f"[arms.{name}]"),
                            *((table.get(size, {}), f"[arms.{name}.{size}]") for size in SIZES)):
            check_words(part, ARM, f"{path}: {where}", sections=True)
            check_seeds(part, f"{path}: {where}")
    return spec


def check_seeds(table, where):
    """Raises ConfigError for a number of seeds that is none."""
    if table.get("seeds", 1) < 1:
        raise ConfigError(f"{where}: seeds = {table['seeds']} must be at least 1")


def check_words(table, known, where, sections=False):
    """Raises ConfigError for the first key that is neither known nor, if sections, a table of
    settings."""
    allowed = known | (dict.fromkeys(SECTIONS, dict) if sections else {})
    for word, value in table.items():
        if word not in allowed:
            raise ConfigError(f"{where}: unknown key {word}{nearest(word, allowed)}; "
                              f"known are {', '.join(allowed)}")
        if not isinstance(value, allowed[word]) or allowed[word] is int and isinstance(value, bool):
            kinds = {dict: "a table", list: "a list", str: "a text", int: "a whole number",
                     bool: "true or false", (int, float): "a number"}
            given = "a table" if isinstance(value, dict) else show(value)
            raise ConfigError(f"{where}: {word} = {given} is not "
                              f"{kinds.get(allowed[word], 'a text or a list')}")


def flatten(table, prefix=""):
    """Nested tables as {"ffn.n_keys": 16}."""
    flat = {}
    for name, value in table.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def settings_of(table):
    return flatten({name: value for name, value in table.items() if name in SECTIONS})


def fill(text, values, where):
    """Text with its {placeholders} filled in. Raises ConfigError for an unknown one."""
    try:
        return text.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as e:
        name = str(e).strip("'")
        raise ConfigError(f"{where}: {show(text)} has no {name} to fill in{nearest(name, values)}; "
                          f"known are {', '.join(values)}") from None


def plain(value):
    """A setting as text on a command line."""
    if isinstance(value, list) and value and all(isinstance(v, str) and "," not in v
                                                 for v in value):
        return ",".join(value) if len(value) > 1 else show(value)
    return value if isinstance(value, str) else show(value)


def wildcard(pattern):
    """A regular expression of a name in which * stands for anything and {m} for something called
    m."""
    return re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(pattern)).replace(r"\*", ".*")


def fits(name, patterns):
    """Whether a name fits one of the patterns."""
    return any(re.fullmatch(wildcard(pattern), name) for pattern in patterns)
