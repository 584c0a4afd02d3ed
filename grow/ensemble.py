"""Branch-Train-Merge (Li et al. 2208.03306): several language models read one text and their predictions are
mixed, more of those that have predicted it well so far.

    p(x_t | x_<t) = sum_j p(D = j | x_<t) p_j(x_t | x_<t)
    p(D = j | x_<t) ∝ p(D = j) prod_{s<t} p_j(x_s | x_<s)

Probabilities are mixed, never logits. The posterior of domain D (DEMix 2108.05036) is a product of many small
numbers, hence log space and float64; the token to be predicted has no say in it.

Axis letters: J models, B sequences, T positions, V vocabulary.
"""
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from grow.parents import (check_settings, check_tokenizers, open_parents,
                          validation)
from model import Output
from runtime.checkpoint import write_text
from runtime.device import as_trained, pick_device
from runtime.terminal import PLAIN
from sample import sample_text
from settings import ConfigError

POSTERIORS = {"product": "the prior times the likelihood of all tokens so far, as in the paper",
              "one_token": "the prior times the likelihood of the last token, as in the released code",
              "uniform": "the prior, whatever was read"}


def log_posterior(likelihood, log_prior, kind="product", top_k=0):
    """Log weights of the models, (J, B, T); at each position the weights sum to 1.

    likelihood (J, B, T): log p_j(x_i | x_<i) of the tokens read, 0 for the first, which nothing predicts;
    log_prior (J,). The weights at position i follow from x_0 .. x_i and are for the prediction of x_{i+1}.
    top_k: only the most probable models stay; of two equal ones the first (0: all).
    """
    evidence = dict(product=likelihood.cumsum(-1), one_token=likelihood, uniform=torch.zeros_like(likelihood))
    log_w = log_prior.view(-1, 1, 1) + evidence[kind]
    if top_k:
        order = log_w.sort(dim=0, descending=True, stable=True).indices
        log_w = log_w.scatter(0, order[top_k:], -torch.inf)
    return log_w.log_softmax(0)


def known_before(log_p):
    """log p(x_{i+1} | x_0 .. x_i) at each i -> log p(x_i | x_<i) at each i, 0 for the first: (..., T)."""
    return F.pad(log_p, (1, 0))[..., :-1]


def token_log_probs(model, x, y):
    """log p(y | x) of each token, (B, T) float64 on the CPU."""
    device = next(model.parameters()).device
    with as_trained(model):
        logits = model(x.to(device)).logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), y.to(device).flatten(), reduction="none")
    return -loss.view_as(y).cpu().double()


@torch.no_grad()
def evaluate(models, batches, corpora, log_prior, kind="product", top_k=0):
    """{corpus: dict} over an EvalBatches of these corpora, every block a text of its own. A dict holds

    loss, bpb   of the mixture, in nats per token and bits per byte
    alone       [J] nats per token of each model by itself
    posterior   [J][T] mean weight of each model at each position
    """
    totals = {}
    for x, y, domain, size in batches:
        log_p = torch.stack([token_log_probs(model, x, y) for model in models])                 # (J, B, T)
        log_w = log_posterior(known_before(log_p), log_prior, kind, top_k)
        mixed = (log_w + log_p).logsumexp(0)                                                    # (B, T)
        new = -mixed.sum(), -log_p.sum((1, 2)), log_w.exp().sum(1), y.numel(), len(y), size
        name = corpora[int(domain[0])]
        totals[name] = [a + b for a, b in zip(totals[name], new)] if name in totals else new
    return {name: dict(loss=float(nats / tokens), bpb=float(nats / size / math.log(2)),
                       alone=(alone / tokens).tolist(), posterior=(weights / rows).tolist())
            for name, (nats, alone, weights, tokens, rows, size) in totals.items()}


class Ensemble(nn.Module):
    """The mixture as one model, for sample.generate: forward(idx (B, T), cache) -> Output, whose logits
    (B, 1, V) are the log-probabilities of what follows. A text starts from the prior; so does what is left of
    a window that has become too long."""

    def __init__(self, models, log_prior, kind="product", top_k=0):
        super().__init__()
        self.models, self.log_prior, self.kind, self.top_k = nn.ModuleList(models), log_prior, kind, top_k
        self.config = min((m.config for m in models), key=lambda c: c.model.block_size)

    def new_cache(self, batch_size=1):
        return EnsembleCache([model.new_cache(batch_size) for model in self.models])

    def forward(self, idx, cache):
        logits = [model(idx, cache=own).logits for model, own in zip(self.models, cache.each)]
        log_p = torch.stack(logits).cpu().double().log_softmax(-1)                              # (J, B, T, V)
        cache.read(idx.cpu(), log_p)
        log_w = log_posterior(cache.likelihood, self.log_prior, self.kind, self.top_k)[:, :, -1:]  # (J, B, 1)
        return Output((log_w + log_p[:, :, -1]).logsumexp(0).unsqueeze(1), None, torch.zeros(()), [])


class EnsembleCache:
    """Each model's KV cache, the likelihood (J, B, S) of the tokens read, and what is expected next."""

    def __init__(self, each):
        self.each, self.likelihood, self.next = each, None, None

    @property
    def length(self):
        return self.each[0].length

    def read(self, idx, log_p):
        """Takes in tokens (B, T) and the predictions made after each of them, (J, B, T, V)."""
        first = self.next is None
        ids = (idx[:, 1:] if first else idx).expand(len(log_p), -1, -1)                  # (J, B, T - 1 or T)
        before = log_p[:, :, :-1] if first else torch.cat([self.next, log_p[:, :, :-1]], 2)
        new = before.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        self.likelihood = F.pad(new, (1, 0)) if first else torch.cat([self.likelihood, new], -1)
        self.next = log_p[:, :, -1:]


# --- the command ---

def as_text(runs, results):
    """The results as a table; the weights are those at the end of a block."""
    names = [f"{what} {j}" for what in ("alone", "weight") for j in range(len(runs))]
    lines = [*(f"model {j} is {run}" for j, run in enumerate(runs)),
             f"{'':<16}{'nats/token':>12}{'bits/byte':>12}" + "".join(f"{name:>10}" for name in names)]
    for name, r in results.items():
        numbers = "".join(f"{v:>10.4f}" for v in [*r["alone"], *(weights[-1] for weights in r["posterior"])])
        lines.append(f"{name:<16}{r['loss']:>12.4f}{r['bpb']:>12.4f}{numbers}")
    return "\n".join(lines)


def check(o):
    """Raises ConfigError for options that make no sense."""
    J = len(o.runs)
    prior_fits = o.prior is None or len(o.prior) == J and min(o.prior) >= 0 and 0 < sum(o.prior) < math.inf
    for fine, text in [
            (o.eval or o.prompt is not None, "give --eval CORPUS, --prompt TEXT, or both"),
            (o.eval or not o.json, "--json holds what --eval measures: give --eval CORPUS"),
            (0 <= o.top_k <= J, f"--top_k {o.top_k} must be at least 0, for all models, and at most {J}"),
            (prior_fits, f"--prior needs a number for each of the {J} runs, none below 0 and not all 0"),
            (o.tokens >= 1, f"--tokens {o.tokens} must be at least 1"),
            (0 <= o.temperature < math.inf, f"--temperature {o.temperature} must be at least 0 and finite")]:
        if not fine:
            raise ConfigError(text)


def run(o, overrides):
    """Measures and samples as asked for. Raises ConfigError, CheckpointError, DataError."""
    check(o)
    parents = open_parents(o.runs, pick_device(o.device))
    check_tokenizers(parents)
    check_settings(parents, "model", names=["vocab_size"])
    models = [p.model for p in parents]
    log_prior = torch.tensor(o.prior or [1.0] * len(models), dtype=torch.float64).log().log_softmax(0)
    if o.eval:
        batches = validation(parents[0], o.eval, min(p.config.model.block_size for p in parents))
        results = evaluate(models, batches, o.eval, log_prior, o.posterior, o.top_k)
        print(as_text(o.runs, results))
        if o.json:
            Path(o.json).parent.mkdir(parents=True, exist_ok=True)
            found = dict(runs=o.runs, kind=o.posterior, top_k=o.top_k, prior=log_prior.exp().tolist())
            write_text(o.json, json.dumps(found | {"corpora": results}, indent=1))
    if o.prompt is not None:
        mixture = Ensemble(models, log_prior, o.posterior, o.top_k).eval()
        text = sample_text(mixture, parents[0].tokenizer, o.prompt, o.tokens, o.temperature, o.seed)
        print(text.translate(PLAIN if sys.stdout.isatty() else {}))


def add_options(parser):
    kinds = "; ".join(f"{kind}: {meaning}" for kind, meaning in POSTERIORS.items())
    parser.add_argument("--eval", nargs="+", metavar="CORPUS", default=[], help="measure the loss on the "
                        "validation batches of these, the ones that training evaluates on")
    parser.add_argument("--posterior", choices=list(POSTERIORS), default="product",
                        help=f"the weight of a model; {kinds} (default: product)")
    parser.add_argument("--top_k", type=int, default=0, metavar="K",
                        help="mix only the K models that are most probable at a token (default: 0, all)")
    parser.add_argument("--prior", type=float, nargs="+", metavar="P",
                        help="p(D = j) for each run, in any unit (default: equal)")
    parser.add_argument("--json", metavar="FILE",
                        help="write what --eval measured, and the mean weights at each position")
    parser.add_argument("--prompt", metavar="TEXT", help="continue this text with the mixture")
    for name, default, meta in [("tokens", 300, "N"), ("temperature", 0.8, "T"), ("seed", 0, "S")]:
        parser.add_argument(f"--{name}", type=type(default), default=default, metavar=meta,
                            help=f"of the continuation (default: {default})")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                        help="auto takes cuda, then mps, then cpu (default: auto)")
