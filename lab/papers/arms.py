"""The arms of an experiment file, and the commands that they stand for.

An arm and a seed are one command and one run folder. Without `from` it is trained from scratch;
with `from` it is trained on from its first parent (train.init_from), which gives [model] and [ffn];
with `make` it is built from its parents by a program, and only evaluated. `program` trains it in
the place of train.py, whose options it takes ("-m grow.outer --workers 4"). A grid makes one arm
for each combination of its values. `seeds` is how many an arm has, where that is not the file's
number; a claim can ask for more (lab/papers/verdict.py).
`tune` is the arm's small grid of settings, the best of which is taken (lab/papers/tuning.py).
Settings are taken in this order: config file, [common], [SIZE], arm, arm's SIZE, grid.
"""
import hashlib
import itertools
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from lab.papers.spec import SIZES, fill, fits, flatten, plain, settings_of
from lab.papers.verdict import more_seeds
from model import load_config, resolve
from runtime.checkpoint import RETRAINABLE
from runtime.config import nearest, parse_toml
from settings import Config, ConfigError, DataConfig, show

ROOT = Path(__file__).parents[2]
# of a run that goes on from another's weights: nothing but defaults
CONTINUE = "configs/continue.toml"
PARENTS = ("model.", "ffn.")            # settings that come with the weights
# A key holds the text of `make`, so a program keeps the word by which the recorded rows know it.
KEYED = {"-m grow.btx": "btx.py", "-m grow.lifelong": "lifelong.py"}


@dataclass
class Arm:
    """One command of an experiment, and its evaluation."""
    name: str
    seed: int
    folder: Path                        # its run folder
    parents: list["Arm"]
    # what runs.csv says of it: grid values, extra columns
    columns: dict = field(default_factory=dict)
    make: str = ""                      # command line without "python"; empty: train.py
    program: str = ""                   # what trains it; empty: train.py
    config: str = ""                    # settings file of a trained arm
    settings: dict = field(default_factory=dict)        # dotted key -> text, as on the command line
    steps: int = 0                      # optimizer steps, 0 if it is only built
    resolved: dict = field(default_factory=dict)        # its settings that are not the defaults
    evaluation: dict = field(default_factory=dict)      # corpora and probes
    data: DataConfig = None             # what a trained arm reads
    lr: float = 0.0                     # of a trained arm
    tuned: bool = False                 # some settings are the best of a grid (tuning.py)
    waits: bool = False                 # for the runs that choose them
    chooses: tuple = ()                 # of such a run: the tuned arm's name, what it tries

    @property
    def label(self):
        return f"{self.name}-{self.seed}"

    @property
    def key(self):
        """Ten hex digits that change with anything that could change what the arm learns."""
        made = self.make.replace(str(self.folder), "OUT")
        for module, word in KEYED.items():
            made = made.replace(module, word)
        what = [self.resolved, made + self.program, [p.key for p in self.parents]]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:10]

    def arguments(self):
        """The program and its arguments, paths from the repository's root."""
        if self.make:
            return shlex.split(self.make)
        return [*self.trainer(), self.config, "--out", str(self.folder), "--quiet",
                *(f"--{key}={text}" for key, text in self.settings.items())]

    def trainer(self):
        """The program that trains it, and the options of that program alone."""
        return shlex.split(self.program or "train.py")

    def resume_arguments(self):
        """The same of a run that was interrupted."""
        return [*self.trainer(), "--out", str(self.folder), "--resume", "--quiet"]

    def evaluate_arguments(self):
        """The same of the evaluation that follows."""
        words = ["-m", "lab.papers.evaluate", str(self.folder)]
        for option, names in self.evaluation.items():
            if names:
                words += [f"--{option}", *names]
        return words

    def speed_arguments(self):
        """The same of some steps alone, which show its speed."""
        return ["-m", "lab.papers.speed", self.config, "--json", str(self.folder / "speed.json"),
                *(f"--{key}={text}" for key, text in self.settings.items())]


def shown(arguments):
    """A command line for people."""
    return shlex.join(["python", *arguments])


def executable(arguments):
    """A command line that runs from any folder."""
    def find(word):
        is_ours = word.endswith((".py", ".toml")) and not Path(word).exists()
        return str(ROOT / word) if is_ours else word

    return [sys.executable, *map(find, arguments)]


class Folders(list):
    """Parents' folders: {from} is all of them, {from[0]} the first."""

    def __format__(self, _):
        return " ".join(map(str, self))


class Draft(NamedTuple):
    """An arm before it is known where it runs and with which seed."""
    words: dict                         # its table, at this size
    settings: dict                      # its own ones, dotted
    values: dict                        # grid key without its section -> value, for {placeholders}
    parents: list                       # names
    tune: dict                          # dotted key -> values to choose from; empty: not tuned


def expand(spec, path, size, seeds=None, runs="runs", chosen=None):
    """The arms of one size, seed after seed, parents before children. seeds: those of every arm;
    None: as many as an arm asks for, or the file. chosen: {name: settings} of the arms that are
    tuned; such an arm without them waits.

    Raises ConfigError: settings that do not exist or do not fit, a parent that does not exist or
    has fewer seeds, a cycle.
    """
    drafts = drafts_of(spec, path, size)
    ordered = in_order({name: draft.parents for name, draft in drafts.items()}, path)
    # An arm for each seed.
    folder, arms, chosen = runs_folder(spec, path, size, runs), {}, chosen or {}
    least = more_seeds(spec, {name: draft.parents for name, draft in drafts.items()}, path)
    wanted = {name: seeds or range(max(draft.words.get("seeds", spec.get("seeds", 3)),
                                       least.get(name, 0)))
              for name, draft in drafts.items()}
    every = sorted({seed for own in wanted.values() for seed in own})
    for seed, name in itertools.product(every, ordered):
        if seed not in wanted[name]:
            continue
        for parent in drafts[name].parents:
            if (parent, seed) not in arms:
                raise ConfigError(f"{path}: arm {name} has a seed {seed} and comes from {parent}, "
                                  f"which has {len(wanted[parent])}; give it as many `seeds`")
        parents = [arms[parent, seed] for parent in drafts[name].parents]
        arm = Arm(name, seed, folder / f"{name}-{seed}", parents)
        arm.tuned = bool(drafts[name].tune)
        arm.waits = arm.tuned and name not in chosen or any(parent.waits for parent in parents)
        draft = with_settings(drafts[name], chosen.get(name, {}))
        arms[name, seed] = build_arm(spec, path, size, arm, draft)
    return list(arms.values())


def runs_folder(spec, path, size, runs="runs"):
    """Where the run folders of an experiment lie."""
    return Path(runs) / spec.get("runs", Path(path).stem) / size


def drafts_of(spec, path, size):
    """{name: Draft}: what the file says of each arm, the seeds apart. Raises ConfigError."""
    drafts = {}
    for pattern, table in spec["arms"].items():
        for name, draft in draft_arms(pattern, table, path, size, tuned(spec, size)):
            if name in drafts:
                raise ConfigError(f"{path}: two arms are called {name}; put every grid key into "
                                  "the name")
            drafts[name] = draft
    return share_columns(drafts)


def tuned(spec, size):
    """The table `tune` of the arms that have none of their own: the size's, else the file's."""
    return spec.get(size, {}).get("tune", spec.get("tune", {}))


def with_settings(draft, settings):
    """A Draft with more settings, {dotted key: value}."""
    return draft._replace(settings=draft.settings | settings)


def share_columns(drafts):
    """The drafts, in which a setting that one arm has in its grid is a value, and so a column of
    runs.csv, of the arms, too, that set it outside of a grid: they stand in one figure."""
    varied = {name for draft in drafts.values() for name in draft.values}
    own = {name: {key.rpartition(".")[2]: value for key, value in draft.settings.items()}
           for name, draft in drafts.items()}
    return {name: draft._replace(values={k: v
                                         for k, v in own[name].items()
                                         if k in varied} | draft.values)
            for name, draft in drafts.items()}


def draft_arms(pattern, table, path, size, tune):
    """(name, Draft) for each combination of an arm's grid. tune: of arms that say nothing of it."""
    words, where = table | table.get(size, {}), f"{path}: [arms.{pattern}]"
    settings = settings_of(table) | settings_of(table.get(size, {}))
    grid = flatten(words.get("grid", {}))
    # What is built and not trained, or goes on from another, takes the file's `tune` for no one.
    free = "make" not in words and "from" not in words
    tune = flatten(words.get("tune", tune if free else {}))
    if size not in words.get("sizes", SIZES):
        return
    if tune and not free:
        raise ConfigError(f"{where}: tune: only an arm that is trained from scratch can be tuned")
    for word, table in dict(grid=grid, tune=tune).items():
        for key, choices in table.items():
            if not isinstance(choices, list) or word == "tune" and not (choices and "." in key):
                raise ConfigError(f"{where}: {word}: {key} = {show(choices)} is not a list of "
                                  "values" + (" of a setting" if word == "tune" else ""))
    # One draft for each combination. A dotted key of the grid is a setting, any other a word to
    # fill in.
    for chosen in itertools.product(*grid.values()):
        chosen = dict(zip(grid, chosen))
        values = {key.rpartition(".")[2]: value for key, value in chosen.items()}
        parents = words.get("from", [])
        if isinstance(parents, str):
            parents = [parents]
        parents = [fill(parent, values, where) for parent in parents]
        own = settings | {key: value for key, value in chosen.items() if "." in key}
        yield fill(pattern, values, where), Draft(words, own, values, parents, tune)


def in_order(parents, path):
    """Names with parents before children, else in file order. Raises ConfigError."""
    for name, needs in parents.items():
        for need in needs:
            if need not in parents:
                raise ConfigError(f"{path}: arm {name} comes from {need}, which does not exist"
                                  f"{nearest(need, parents)}")
    # Again and again the first in file order whose parents are all placed.
    ordered, left = [], dict(parents)
    while left:
        ready = next((name for name, needs in left.items()
                      if all(need in ordered for need in needs)), None)
        if ready is None:
            raise ConfigError(f"{path}: the arms {', '.join(left)} come from one another in a "
                              "circle; an arm's from must lead to an arm without one")
        ordered.append(ready)
        del left[ready]
    return ordered


def build_arm(spec, path, size, arm, draft):
    """The arm with what it is to do; its settings are checked as train.py will check them."""
    where = f"{path}: arm {arm.name}"
    parents = Folders(parent.folder for parent in arm.parents)
    values = draft.values | {"seed": arm.seed, "out": arm.folder, "from": parents}
    arm.columns = draft.values | draft.words.get("column", {})
    arm.evaluation = dict(corpora=spec.get("evaluate", []), probes=spec.get("probes", []))
    # Made by a program of its own: no settings.
    if "make" in draft.words:
        if draft.settings:
            raise ConfigError(f"{where}: is made by a command and takes no settings "
                              f"({', '.join(draft.settings)}); train it in another arm with "
                              f"from = \"{arm.name}\"")
        arm.make = fill(draft.words["make"], values, where)
        return arm
    # Trained: what all arms have, then the seed, the file's common settings, its own.
    arm.program = fill(draft.words.get("program", ""), values, where)
    arm.config, common = common_settings(spec, size, arm, draft, where)
    fixed = {"train.seed": arm.seed, "data.seed": arm.seed, "train.keep": "last",
             "train.sample_tokens": 0}
    arm.settings = {key: plain(fill(value, values, where) if isinstance(value, str) else value)
                    for key, value in (fixed | common | draft.settings).items()}
    try:
        config = load_config(config_path(arm.config, where), arm.settings.items())
    except ConfigError as e:
        raise ConfigError(f"{where}: {e}") from None
    arm.steps, arm.resolved = config.train.max_steps, unusual(config)
    arm.data, arm.lr = config.data, config.train.lr
    return arm


def common_settings(spec, size, arm, draft, where):
    """(config file, settings that the arm shares with the others). An arm with a parent has [model]
    and [ffn] from there, so that it takes only the rest of the others' config file."""
    default = spec.get(size, {}).get("config", spec.get("config", "configs/quick.toml"))
    common = settings_of(spec.get("common", {})) | settings_of(spec.get(size, {}))
    if not arm.parents:
        return draft.words.get("config", default), common
    # An arm with a parent: all but [model] and [ffn], which come with the parent's weights.
    base = settings_of(parse_toml(config_path(default, where).read_text(encoding="utf-8"), default))
    for key in draft.settings:
        if key.startswith(PARENTS) and key not in RETRAINABLE:
            raise ConfigError(f"{where}: {key} comes from {arm.parents[0].name} and cannot be "
                              "changed")
    common = {key: value for key, value in (base | common).items() if not key.startswith(PARENTS)}
    common["train.init_from"] = str(arm.parents[0].folder)
    return draft.words.get("config", CONTINUE), common


def config_path(config, where):
    """A settings file, its path read from the root of the repository. Raises ConfigError if it is
    missing."""
    path = Path(config) if Path(config).exists() else ROOT / config
    if not path.is_file():
        known = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "configs").rglob("*.toml"))]
        raise ConfigError(f"{where}: no config file {config}{nearest(config, known)}")
    return path


def unusual(config):
    """The settings that are not the defaults; so a setting that the code gains later changes
    nothing."""
    defaults = flatten(resolve(Config()).to_dict())
    return {key: value for key, value in flatten(config.to_dict()).items()
            if value != defaults[key] and key not in ("data.dir", "train.init_from")}


def with_ancestors(arms, patterns, path):
    """The arms whose name fits one of the patterns, and all that they come from. Raises
    ConfigError."""
    # The arms that were asked for.
    names = list(dict.fromkeys(arm.name for arm in arms))
    wanted = set()
    for pattern in patterns:
        found = {name for name in names if fits(name, [pattern])}
        if not found:
            raise ConfigError(f"{path}: no arm is called {pattern}{nearest(pattern, names)}; see "
                              "--list")
        wanted |= found
    # Their ancestors: children come after their parents, so that one pass from the end finds all.
    for arm in reversed(arms):
        if arm.name in wanted:
            wanted |= {parent.name for parent in arm.parents}
    return [arm for arm in arms if arm.name in wanted]
