"""Branch-Train-Merge (Li et al. 2208.03306): several language models read one text, and their
predictions are mixed. A model that has predicted the text well so far has a large weight.

    p(x_t | x_<t) = sum_j p(D = j | x_<t) p_j(x_t | x_<t)
    p(D = j | x_<t) ∝ p(D = j) prod_{s<t} p_j(x_s | x_<s)

Probabilities are mixed, never logits. The posterior of domain D (DEMix 2108.05036) is a product of
many small numbers, hence log space and float64. It does not depend on the token to be predicted.

Two relatives use the same mixture. c-BTM (2303.14177) weighs a model by how near the text so far is
to the cluster that it learned (grow/clusters.py), not by likelihood. DEMix mixes the experts of one
model, which reads the text once with each of them (Expert).

Axis letters: J models, B sequences, T positions, V vocabulary.
"""
import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from grow.parents import check_settings, check_tokenizers, open_parents, summed, validation
from grow.trigrams import Centres, open_centres
from model import Output
from runtime.checkpoint import write_text
from runtime.device import as_trained, pick_device
from runtime.terminal import PLAIN
from sample import sample_text
from settings import ConfigError

POSTERIORS = {
    "product": "the prior times the likelihood of all tokens so far, as in the paper",
    "one_token": "the prior times the likelihood of the last token, as in the released code",
    "uniform": "the prior, whatever was read"}
TEMPERATURE = 0.1       # of the weights by distance, as in c-BTM


def log_posterior(likelihood, log_prior, kind="product", top_k=0, read=None):
    """Log weights of the models, (J, B, T); at each position the weights sum to 1.

    likelihood (J, B, T): log p_j(x_i | x_<i) of the tokens read, 0 for the first, which nothing
    predicts; log_prior (J,). The weights at position i follow from x_0 .. x_i and are for the
    prediction of x_{i+1}. kind: one of POSTERIORS, or the Centres whose distance to the tokens
    read, `read` (B, T), takes the place of the likelihood. top_k: only the most probable models
    stay; of two equal ones the first (0: all).
    """
    if isinstance(kind, Centres):
        # c-BTM: log p(D = j) - |x - c_j|^2 / T
        evidence = kind.evidence(read)
    else:
        # log p(D = j) + sum_{s<t} log p_j(x_s | x_<s)
        evidence = dict(product=likelihood.cumsum(-1), one_token=likelihood,
                        uniform=torch.zeros_like(likelihood))[kind]
    log_w = log_prior.view(-1, 1, 1) + evidence                                     # (J, B, T)
    # all but the k most probable models get weight 0
    if top_k:
        order = log_w.sort(dim=0, descending=True, stable=True).indices
        log_w = log_w.scatter(0, order[top_k:], -torch.inf)
    # divided by their sum over the models
    return log_w.log_softmax(0)


def known_before(log_p):
    """log p(x_{i+1} | x_0 .. x_i) at each i -> log p(x_i | x_<i) at each i, 0 for the first:
    (..., T)."""
    return F.pad(log_p, (1, 0))[..., :-1]


def token_log_probs(model, x, y):
    """log p(y | x) of each token, (B, T) float64 on the CPU."""
    # in the arithmetic of its own training; the loss in float32
    device = next(model.parameters()).device
    with as_trained(model):
        logits = model(x.to(device)).logits.float()
    loss = F.cross_entropy(logits.flatten(0, 1), y.to(device).flatten(), reduction="none")
    return -loss.view_as(y).cpu().double()


@torch.no_grad()
def evaluate(models, batches, corpora, log_prior, kind="product", top_k=0):
    """{corpus: dict} over an EvalBatches of these corpora, every block a text of its own. A dict
    holds

    loss, bpb   of the mixture, in nats per token and bits per byte
    alone       [J] nats per token of each model by itself
    posterior   [J][T] mean weight of each model at each position
    """
    def measure(x, y, domain):
        log_p = torch.stack([token_log_probs(model, x, y) for model in models])     # (J, B, T)
        # the weights at a position know the tokens before the one that is predicted
        log_w = log_posterior(known_before(log_p), log_prior, kind, top_k, x)
        # log sum_j w_j p_j
        mixed = (log_w + log_p).logsumexp(0)                                        # (B, T)
        return [-mixed.sum(), -log_p.sum((1, 2)), log_w.exp().sum(1), len(y)]

    # sums -> means: over tokens, over bytes, and over the blocks for each position
    found = {}
    for corpus, sums in summed(batches, measure).items():
        nats, alone, weights, rows, tokens, n_bytes = sums
        found[corpora[corpus]] = dict(
            loss=float(nats / tokens), bpb=float(nats / n_bytes / math.log(2)),
            alone=(alone / tokens).tolist(), posterior=(weights / rows).tolist())
    return found


class Expert(nn.Module):
    """One expert of a model with the router "domain", as a model: every sequence has its label."""

    def __init__(self, model, label):
        super().__init__()
        self.model, self.label, self.config = model, label, model.config
        self.new_cache = model.new_cache

    def forward(self, idx, cache=None):
        label = torch.full((len(idx),), self.label, device=idx.device)
        return self.model(idx, cache=cache, domain=label)


def experts_of(parent):
    """[Expert] of a run with the router "domain". Raises ConfigError for another."""
    ffn = parent.config.ffn
    if not parent.is_moe or ffn.router != "domain":
        raise ConfigError(f"--experts: {parent.folder} has no experts that belong to corpora; give "
                          "a run with ffn.router = \"domain\"")
    return [Expert(parent.model, j) for j in range(ffn.experts)]


class Ensemble(nn.Module):
    """The mixture as one model, for sample.generate: forward(idx (B, T), cache) -> Output, whose
    logits (B, 1, V) are the log-probabilities of what follows. A text starts from the prior; so
    does what is left of a window that has become too long."""

    def __init__(self, models, log_prior, kind="product", top_k=0):
        super().__init__()
        self.models, self.log_prior = nn.ModuleList(models), log_prior
        self.kind, self.top_k = kind, top_k
        # of the model that reads the fewest positions
        self.config = min((m.config for m in models), key=lambda config: config.model.block_size)

    def new_cache(self, batch_size=1):
        return EnsembleCache([model.new_cache(batch_size) for model in self.models])

    def forward(self, idx, cache):
        # every model reads the new tokens
        logits = [model(idx, cache=own).logits for model, own in zip(self.models, cache.each)]
        log_p = torch.stack(logits).cpu().double().log_softmax(-1)                  # (J, B, T, V)
        # the likelihood of these tokens, then the weights at the last of them
        cache.read(idx.cpu(), log_p)
        log_w = log_posterior(cache.likelihood, self.log_prior, self.kind, self.top_k, cache.text)
        last = log_w[:, :, -1:]                                                     # (J, B, 1)
        mixed = (last + log_p[:, :, -1]).logsumexp(0)                               # (B, V)
        return Output(mixed.unsqueeze(1), None, torch.zeros(()), [])


class EnsembleCache:
    """Each model's KV cache, the S tokens read (B, S) and their likelihood (J, B, S), and the
    predictions (J, B, 1, V) of the token to come."""

    def __init__(self, each):
        self.each, self.text, self.likelihood, self.next = each, None, None, None

    @property
    def length(self):
        return self.each[0].length

    def read(self, idx, log_p):
        """Takes in tokens (B, T) and the predictions made after each of them, (J, B, T, V)."""
        self.text = idx if self.text is None else torch.cat([self.text, idx], -1)
        # each token with the prediction before it; nothing predicts the first of a text
        before = log_p[:, :, :-1]
        if self.next is None:
            idx = idx[:, 1:]
        else:
            before = torch.cat([self.next, before], 2)
        ids = idx.expand(len(log_p), -1, -1)                                # (J, B, T - 1 or T)
        new = before.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        # behind what was read before; the first token of a text counts 0
        if self.next is None:
            self.likelihood = F.pad(new, (1, 0))
        else:
            self.likelihood = torch.cat([self.likelihood, new], -1)
        self.next = log_p[:, :, -1:]


# --- the command ---


def as_text(models, results):
    """The results as a table; the weights are those at the end of a block. models: what they
    are."""
    names = [f"{what} {j}" for what in ("alone", "weight") for j in range(len(models))]
    lines = [f"model {j} is {model}" for j, model in enumerate(models)]
    lines.append(f"{'':<16}{'nats/token':>12}{'bits/byte':>12}"
                 + "".join(f"{name:>10}" for name in names))
    for corpus, found in results.items():
        last = [weights[-1] for weights in found["posterior"]]
        numbers = "".join(f"{value:>10.4f}" for value in [*found["alone"], *last])
        lines.append(f"{corpus:<16}{found['loss']:>12.4f}{found['bpb']:>12.4f}{numbers}")
    return "\n".join(lines)


def check_options(options, J):
    """Raises ConfigError for options that make no sense for J models."""
    prior, top_k, T = options.prior, options.top_k, options.centre_temperature
    prior_fits = prior is None or (len(prior) == J and min(prior) >= 0
                                   and 0 < sum(prior) < math.inf)
    for fine, text in [
            (options.eval or options.prompt is not None,
             "give --eval CORPUS, --prompt TEXT, or both"),
            (options.eval or not options.json,
             "--json holds what --eval measures: give --eval CORPUS"),
            (0 <= top_k <= J,
             f"--top_k {top_k} must be at least 0, for all models, and at most {J}"),
            (prior_fits,
             f"--prior needs a number for each of the {J} models, none below 0 and not all 0"),
            (options.centres or T is None,
             f"--centre_temperature {T} has no effect: it is read with --centres"),
            (not (options.centres and options.posterior),
             f"--posterior {options.posterior} has no effect beside --centres, which weigh"),
            (T is None or 0 < T < math.inf,
             f"--centre_temperature {T} must be above 0 and finite"),
            (options.tokens >= 1, f"--tokens {options.tokens} must be at least 1"),
            (0 <= options.temperature < math.inf,
             f"--temperature {options.temperature} must be at least 0 and finite")]:
        if not fine:
            raise ConfigError(text)


def members(options, parents):
    """(models, what each is called) of an ensemble: the runs, or the experts of one. Raises
    ConfigError."""
    if not options.experts:
        return [p.model for p in parents], options.runs
    if len(parents) > 1:
        raise ConfigError(f"--experts: give one run, not {len(parents)}")
    models, corpora = experts_of(parents[0]), parents[0].corpora
    return models, [f"{options.runs[0]}, expert of {name}" for name in corpora]


def weigher(options, parents, J):
    """What log_posterior calls kind: the name of a posterior, or Centres, one for each model.
    Raises ConfigError, DataError."""
    if not options.centres:
        return options.posterior or "product"
    centres = open_centres(options.centres, parents[0].tokenizer,
                           options.centre_temperature or TEMPERATURE)
    known = centres.checksums
    if len(known) != J:
        raise ConfigError(f"{options.centres} has {len(known)} centres, not {J}: give a model for "
                          "each cluster")
    # a run that learned another cluster than its place says
    for j, parent in enumerate(parents):
        learned = parent.header.get("data", [])
        if len(learned) == 1 and learned[0] in known and known.index(learned[0]) != j:
            raise ConfigError(f"{parent.folder} learned cluster {known.index(learned[0])} and is "
                              f"given as model {j}; give the runs in the order of their clusters")
    return centres


def command(options, overrides):
    """Measures and samples as asked for. Raises ConfigError, CheckpointError, DataError."""
    parents = open_parents(options.runs, pick_device(options.device))
    models, called = members(options, parents)
    check_options(options, len(models))
    # probabilities of one token can be mixed if all models mean the same by it
    check_tokenizers(parents)
    check_settings(parents, "model", names=["vocab_size"])
    kind = weigher(options, parents, len(models))
    # p(D = j), equal unless given, with sum 1
    prior = torch.tensor(options.prior or [1.0] * len(models), dtype=torch.float64)
    log_prior = prior.log().log_softmax(0)
    # a folder that cannot be made is told before the measuring
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    # the first run's validation batches, in blocks that every model can read
    if options.eval:
        shortest = min(p.config.model.block_size for p in parents)
        batches = validation(parents[0], options.eval, shortest)
        results = evaluate(models, batches, options.eval, log_prior, kind, options.top_k)
        print(as_text(called, results))
        if options.json:
            name = kind if isinstance(kind, str) else f"centres, temperature {kind.temperature}"
            found = dict(runs=options.runs, models=called, kind=name, top_k=options.top_k,
                         prior=log_prior.exp().tolist(), corpora=results)
            write_text(options.json, json.dumps(found, indent=1))
    # the mixture as a model that writes
    if options.prompt is not None:
        mixture = Ensemble(models, log_prior, kind, options.top_k).eval()
        text = sample_text(mixture, parents[0].tokenizer, options.prompt, options.tokens,
                           options.temperature, options.seed)
        # on a terminal without its control characters
        print(text.translate(PLAIN if sys.stdout.isatty() else {}))


def add_options(parser):
    kinds = "; ".join(f"{kind}: {meaning}" for kind, meaning in POSTERIORS.items())
    parser.add_argument("--eval", nargs="+", metavar="CORPUS", default=[],
                        help="measure the loss on the validation batches of these, the ones that "
                        "training evaluates on")
    parser.add_argument("--experts", action="store_true",
                        help="DEMix: the models are the experts of one run with the router domain")
    parser.add_argument("--centres", metavar="FILE",
                        help="c-BTM: the NAME.npz of grow.clusters; run j learned cluster j, and "
                        "weighs by how near the text so far is to its centre")
    parser.add_argument("--centre_temperature", type=float, metavar="T",
                        help="divides the squared distances; small: only the nearest counts "
                        f"(default: {TEMPERATURE})")
    parser.add_argument("--posterior", choices=list(POSTERIORS),
                        help=f"the weight of a model; {kinds} (default: product)")
    parser.add_argument("--top_k", type=int, default=0, metavar="K",
                        help="mix only the K models that are most probable at a token "
                        "(default: 0, all)")
    parser.add_argument("--prior", type=float, nargs="+", metavar="P",
                        help="p(D = j) for each model, in any unit; 0 leaves it out (default: "
                        "equal)")
    parser.add_argument("--json", metavar="FILE",
                        help="write what --eval measured, and the mean weights at each position")
    parser.add_argument("--prompt", metavar="TEXT", help="continue this text with the mixture")
    for name, default, meta in [("tokens", 300, "N"), ("temperature", 0.8, "T"), ("seed", 0, "S")]:
        parser.add_argument(f"--{name}", type=type(default), default=default, metavar=meta,
                            help=f"of the continuation (default: {default})")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                        help="auto takes cuda, then mps, then cpu (default: auto)")
