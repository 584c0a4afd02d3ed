# %% [markdown]
# # A tour of the repository from Python
#
# Everything that the programs do can be done from Python: train a run, load it, ask it, see where it sends
# each token. This page does it in less than fifty lines, a third of which import and choose folders, in half
# a minute on a laptop, without a network.
#
# It is a program (`python -m course.tour [FOLDER]`), and a notebook (`course/tour.ipynb`, which `python -m
# course.notebook` makes of it). Words that you may not know are in the [glossary](glossary.md).

# %%
import math
import os
import sys
import tempfile
from pathlib import Path

# a notebook starts in course/, and the programs are imported from the folder above it
if not Path("train.py").exists():
    os.chdir("..")
sys.path.insert(0, os.getcwd())

import matplotlib.pyplot as plt                                                         # noqa: E402
import torch                                                                            # noqa: E402

import train                                                                            # noqa: E402
from model import load_model                                                            # noqa: E402
from runtime.checkpoint import has_run                                                  # noqa: E402
from sample import generate, sample_text, seeded                                        # noqa: E402

folder = Path(tempfile.gettempdir()) / "tour"

# %% [script]
# with a folder on the command line the run and the picture go there
from runtime.config import Parser, parse                                                # noqa: E402
from runtime.ending import Ending                                                       # noqa: E402

parser = Parser(prog="python -m course.tour", description="The repository from Python, step by step.")
parser.add_argument("folder", nargs="?", type=Path, default=folder, metavar="FOLDER",
                    help="where the run and the picture go, kept if they are there (default: %(default)s)")
with Ending() as end:
    folder = parse(parser)[0].folder
if end.status:
    sys.exit(end.status)

# %% [markdown]
# ## Train
#
# `train.main` is the program `train.py`: a config, then settings. Here a small [mixture of
# experts](glossary.md#choosing) learns 200 steps of generated arithmetic problems, of which 200,000
# [bytes](glossary.md#text-and-loss) are made at the first start. In each of two layers a token visits two
# of eight [experts](glossary.md#choosing). What a setting means: `python train.py --help`.

# %%
run = folder / "run"
if not has_run(run):
    settings = """--data.name math --data.max_tokens 200000 --model.n_layer 2 --model.n_embd 64
                  --model.block_size 64 --ffn.d_ff 64 --train.max_steps 200 --train.warmup_steps 20
                  --train.eval_batches 5 --quiet"""
    train.main(["configs/quick.toml", "--out", run, "--data.dir", folder / "data", *settings.split()])

# %% [markdown]
# ## Load
#
# A run folder holds the [weights](glossary.md#the-model), the config and the tokenizer. Of all parameters a
# token uses the [active ones](glossary.md#speed) alone.

# %%
model, config, tokenizer, header = load_model(run)
count = model.num_params()
print(f"{config.ffn.router} of {config.ffn.experts} experts; {count.total:,} parameters, {count.active:,} active, "
      f"{model.flops_per_token():,} FLOPs a token; step {header['step']}")

# %% [markdown]
# ## Logits and loss
#
# A model maps ids (B, T) to [logits](glossary.md#text-and-loss) (B, T, V). With targets it gives the loss,
# too, in [nats](glossary.md#text-and-loss) a token. A token is a byte here: nats over ln 2 are [bits a
# byte](glossary.md#text-and-loss).

# %%
text = "Q: What is 12 + 7?\nA: 12 + 7 = 19\n#### 19\n"
ids = torch.tensor([tokenizer.encode(text)])
with torch.no_grad():
    out = model(ids[:, :-1], targets=ids[:, 1:])
nats = out.loss.item()
print(f"logits {tuple(out.logits.shape)}, {nats:.2f} nats a token, {nats / math.log(2):.2f} bits a byte")
for p, i in zip(*out.logits[0, -1].softmax(-1).topk(3)):
    print(f"after the text: {tokenizer.decode([int(i)])!r} with probability {p:.2f}")

# %% [markdown]
# ## Generate
#
# `sample_text` returns a text. `generate` yields token after token, with what every layer did to draw it.

# %%
print(sample_text(model, tokenizer, "Q: ", tokens=120, seed=1))
for step in generate(model, ids[:, :15], tokens=5, temperature=0.8, generator=seeded(0)):
    experts = [stats.top_expert[0, -1].item() for stats in step.stats]
    print(f"{tokenizer.decode(step.ids.tolist())!r} after the experts {experts} of the layers")

# %% [markdown]
# ## Where every token goes
#
# In evaluation each layer tells its whole choice: the experts of each token and their
# [gates](glossary.md#choosing), (N, k) each. The gates of a token sum to 1 with this router.

# %%
for layer, stats in enumerate(out.stats):
    experts, gates = stats.routing.by_token()
    chosen = ", ".join(f"expert {e} with gate {g:.2f}" for e, g in zip(experts[0], gates[0]))
    print(f"layer {layer}: 'Q' goes to {chosen}; the busiest has {stats.load.max() / stats.load.sum():.0%} of all pairs")

# %% [markdown]
# ## See it
#
# A row a layer, a column a byte; the colour is the expert with the largest gate. Look for digits, spaces
# and the inside of words: do they share an expert? `python -m lab.page RUN` shows the same for a long text.

# %%
figure, ax = plt.subplots(figsize=(14, 1.8), layout="constrained")
chosen = torch.stack([stats.top_expert[0] for stats in out.stats])                      # (layers, T)
ax.imshow(chosen.numpy(), cmap="tab10", vmin=0, vmax=9, aspect="auto")
ax.set_xticks(range(len(text) - 1), list(text[:-1].translate({32: "·", 10: "↵"})))
ax.set(yticks=range(len(chosen)), ylabel="layer", title="the expert of each byte")
figure.savefig(folder / "tour.png", dpi=120)
print("the picture is", folder / "tour.png")

# %% [markdown]
# ## Go on
#
# Take another folder in the first cell and change a setting in the second, and compare: `--ffn.router
# hash`, `--ffn.n_expert 32`, `--ffn.balance_loss 0`. A training loop of your own, a router of your own and
# a layer of your own are in the [README](../README.md#change-something). The five [lectures](README.md) say
# what it all means, and `python -m course.check` asks you to write it yourself.
