"""What the experts of a published model go by: its routing of text, without any training.

    python -m lab.papers.published FOLDER --out DIR [--model NAME] [--part I] [--corpora NAME ...]

FOLDER holds a downloaded model (grow/hub.py). It becomes a run once, in a folder of its name beside
DIR; there lie the corpora, too, in the model's own tokens. DIR/evaluation.json has the row of one
part of their validation windows (lab/papers/evaluate.py, with the probe by_layer). In an experiment
the parts stand in the place of seeds: their spread is that of the text, for there is one model.
"""
import json
import sys
from pathlib import Path

from data.bytelevel import tokenizer_of
from data.folders import one_at_a_time
from grow import hub
from lab.papers.evaluate import measured, validation
from model import load_model, sparse_layers
from runtime import checkpoint
from runtime.config import Parser, parse
from runtime.device import resolve_device
from runtime.ending import Ending
from settings import ConfigError

BATCH = 4               # windows at a time


def check_folder(folder, model, context):
    """Raises ConfigError, DataError unless it is a model with experts whose text can be read."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder; download {model or 'a model'} into "
                          "it, for example from huggingface.co: config.json, tokenizer.json and "
                          "all *.safetensors")
    _, _, config = hub.read_config(folder, context)
    if not sparse_layers(config):
        raise ConfigError(f"{folder}: this model has no experts")
    tokenizer, notes = tokenizer_of(folder, config.model.vocab_size)
    if tokenizer.kind == "ids":
        raise ConfigError(f"{folder}: its experts cannot be asked about text: {notes[0]}")


def import_once(folder, run, model, context):
    """Makes the run of a folder; one that is there stays. Raises ConfigError, DataError."""
    with one_at_a_time(run.parent):
        if not checkpoint.has_run(run):
            check_folder(folder, model, context)
            words = ["import", folder, "--out", run, "--block_size", context]
            hub.import_model(hub.build_parser()[0].parse_args([str(word) for word in words]), {})


def part_of(batches, part, parts):
    """Every parts-th batch of each corpus. Raises ConfigError where a corpus has too few."""
    by_corpus = {}
    for batch in batches:
        by_corpus.setdefault(batch[-1], []).append(batch)
    for name, own in by_corpus.items():
        if len(own) < parts:
            raise ConfigError(f"{name}: is too short for {parts} parts; choose a smaller --context")
    return [batch for own in by_corpus.values() for batch in own[part::parts]]


def command(o):
    """Writes the evaluation. Raises ConfigError, DataError, CheckpointError."""
    folder, out = Path(o.folder), Path(o.out)
    run = out.parent / folder.name
    import_once(folder, run, o.model, o.context)
    # weights as they are stored, views of the file
    device = resolve_device("auto")
    loaded = load_model(run, device, dtype=None)
    _, config, tokenizer, header = loaded
    source, context = header["ancestry"].get("source"), config.model.block_size
    if (source, context) != (str(folder.absolute()), o.context):
        raise ConfigError(f"{run}: was made of {source} with a context of {context}; remove it")
    # the model's own tokens, and this part of them
    config.data.dir, config.train.batch_size = str(run / "text"), BATCH
    config.train.eval_batches = o.parts * max(1, o.windows // BATCH)
    batches = part_of(validation(config, o.corpora, [""], tokenizer), o.part, o.parts)
    row = measured(run, loaded, batches, ["by_layer"], device, "float32")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(out / "evaluation.json", json.dumps(row))


def main(argv=None):
    """The program; returns its exit status."""
    parser = Parser(prog="python -m lab.papers.published", description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="FOLDER", help="a downloaded model")
    parser.add_argument("--out", metavar="DIR", required=True)
    parser.add_argument("--model", metavar="NAME", help="what to download where FOLDER is missing")
    parser.add_argument("--corpora", nargs="+", metavar="NAME", default=["python", "docs", "math"],
                        help="(default: python docs math)")
    parser.add_argument("--part", type=int, default=0, metavar="I", help="which (default: 0)")
    parser.add_argument("--parts", type=int, default=3, metavar="N",
                        help="of how many (default: 3)")
    parser.add_argument("--windows", type=int, default=16, metavar="N",
                        help="of each corpus in a part (default: 16)")
    parser.add_argument("--context", type=int, default=512, metavar="T",
                        help="tokens of a window (default: 512)")
    with Ending() as end:
        options, _ = parse(parser, argv)
        if not 0 <= options.part < options.parts:
            raise ConfigError(f"--part {options.part}: choose one of 0 to {options.parts - 1}")
        command(options)
    return end.status


if __name__ == "__main__":
    sys.exit(main())
