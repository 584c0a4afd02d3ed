"""From command lines to what programs need: for train.py config, text and checkpoint, for sample.py options."""
import math
import os
import tempfile
from pathlib import Path

from data.prepare import prepared
from runtime import checkpoint, memory, parallel
from runtime.config import Parser, add_settings, check_run, parse
from runtime.device import resolve_device
from runtime.ending import program, quoted
from runtime.given import refuse_switched_off
from settings import ConfigError

ROOT = Path(__file__).parents[1]


def build_parser(more=None):
    """The options of train.py; more: {setting: what only the layers know of it}."""
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
    add_settings(parser, more=more)
    return parser


def open_run(argv, held, load_config, check, more):
    """(config, run folder, Checkpoint to go on from or None, quiet) that a command line asks for; the folder
    stays locked until the ExitStack `held` closes. load_config, check: those of model.py."""
    config, out, saved, quiet = open_parsed(*parse(build_parser(more), argv), held, load_config, check)
    if saved and saved.header["ancestry"]["kind"] == "outer":
        raise ConfigError(f"{out} is a run of several workers; go on with `{program('grow.outer')} --out "
                          f"{quoted(out)} --resume`, or start from it with --train.init_from")
    return config, out, saved, quiet


def open_parsed(options, overrides, held, load_config, check):
    """The same, of a command line that is parsed."""
    given = options.config is not None or options.resume and options.out
    path = options.config if given else str(ROOT / "configs" / "quick.toml")
    if options.out == "":
        raise ConfigError("--out is empty; give a folder")
    out = Path(os.path.expanduser(options.out or Path("runs") / Path(path).stem))
    held.enter_context(checkpoint.Lock(out))
    if options.resume:
        saved = checkpoint.load_last(out)
        changed = load_config(out / "config.toml" if options.config is None else options.config, overrides)
        return check_run(check(checkpoint.resume_config(out, saved, changed))), out, saved, options.quiet
    config = load_config(path, overrides)
    checkpoint.check_free(out, options.overwrite, [config.train.init_from, config.lifelong.teacher])
    return config, out, None, options.quiet


def make_ready(config, saved, quiet, check, build=None):
    """What a run needs before its model is built: (config, Checkpoint to start from or None, folders of the
    corpora, Tokenizer). check(config) completes another run's model (model.check); build(config) makes the
    model (GPT), to see whether it fits into memory. Writes nothing into the run folder."""
    t, device = config.train, resolve_device(config.train.device)
    parallel.check(config, device)
    origin = saved
    with tempfile.TemporaryDirectory() as folder:
        # another run's weights bring their model along, and the tokenizer that it reads with
        if t.init_from and not saved:
            origin = checkpoint.load_plain(t.init_from)
            checkpoint.adopt(config, origin, t.init_from)
            check_run(check(config))
            refuse_switched_off(config)
            if "data.tokenizer" not in config.sources:
                checkpoint.carry_tokenizer(config, checkpoint.tokenizer_of(origin), Path(folder))
        folders, tokenizer = prepared(config.data, quiet=quiet,
                                      checksums=saved.header.get("data") if saved else None)
    checkpoint.check_vocabulary(config, tokenizer, origin)
    if build:
        memory.check(config, device, build)
    return config, origin, folders, tokenizer


# ---- sample.py


def sample_parser(about):
    """The options of sample.py."""
    parser = Parser(prog="sample.py", description=about)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run folder of a trained model")
    for name, default, meta, meaning in [
            ("prompt", "", "TEXT", "text to continue; empty: start on a new line"),
            ("tokens", 300, "N", "tokens to generate"),
            ("temperature", 0.8, "T", "divides the logits; 0: always the likeliest token"),
            ("top_k", 0, "K", "draw among the K likeliest tokens; 0: among all"),
            ("top_p", 1.0, "P", "draw among the fewest tokens that hold P of the probability, after top_k"),
            ("seed", 0, "S", "text number i is drawn with seed S + i"),
            ("num", 1, "N", "texts to generate, as one batch"),
            ("threads", 0, "N", "threads on a CPU; 0: one where steps are small, else torch's number")]:
        parser.add_argument(f"--{name}", metavar=meta, type=type(default), default=default,
                            help=f"{meaning} (default: {default if default != '' else 'empty'})")
    parser.add_argument("--show_experts", metavar="LAYER", nargs="?", const="last",
                        help="mark every token with the expert that this layer, counted from 0, sent it to: "
                             "colours on a terminal, [3]token elsewhere or with NO_COLOR set (default: off; "
                             "without LAYER the last sparse layer)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
                        help="of the weights; auto: as they are stored (default: auto)")
    parser.add_argument("--no_cache", action="store_true",
                        help="read the whole window for every token: slow, the same text (default: off)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                        help="auto takes cuda, then mps, then cpu (default: auto)")
    return parser


def check_sample(o):
    """Raises ConfigError for an option of sample.py outside its range."""
    for fine, name, rule in [
            (o.tokens >= 1, "tokens", "at least 1"), (1 <= o.num < 2**31, "num", "at least 1, below 2^31"),
            (0 <= o.threads <= 1024, "threads", "at least 0 and at most 1024"),
            (0 <= o.temperature < math.inf, "temperature", "at least 0 and finite"),
            (0 <= o.top_k < 2**62, "top_k", "at least 0, below 2^62"),
            (0 < o.top_p <= 1, "top_p", "above 0 and at most 1"),
            (0 <= o.seed < 2**62, "seed", "at least 0 and below 2^62")]:
        if not fine:
            raise ConfigError(f"--{name} {getattr(o, name)} must be {rule}")
