"""Measurements that one experiment needs and the others do not, named in its file: probes =
["repeats"].

A probe is called as probe(model, batches, config, device, dtype) after the run's evaluation, with
the model in evaluation mode and batches a list of (x (B, T), y, domain (B,), bytes, corpus); it
returns {column: number}.
"""
import dataclasses
import operator
from itertools import islice

import torch
import torch.nn.functional as F

from data.answers import answer_mask, are_answers
from data.batches import EvalBatches
from data.corpora import recall as look_ups
from data.corpora.arithmetic import as_text, final_answer, problems, prompt
from data.prepare import prepared
from grow.hidden_units import hidden_units
from lab.papers.by_layer import by_layer
from lab.papers.inside import can_lose, chance, inside, whole_sequence, without
from routers import top_expert
from runtime.device import precision
from sample import generate


def _routings(model, batches, device, dtype):
    """Runs the batches; yields (layer number, x (B, T), Routing) of every layer that has one, batch
    after batch."""
    for x, _, domain, *_ in batches:
        with precision(device, dtype):
            out = model(x.to(device), domain=domain.to(device))
        for layer, stats in enumerate(out.stats):
            if stats.routing is not None:
                yield layer, x.to(device), stats.routing


@torch.no_grad()
def repeats(model, batches, config, device, dtype):
    """Do neighbouring tokens share their first expert more often than chance (Mixtral 2401.04088,
    table 5)?

    For the first, middle and last sparse layer: repeat_*, the share of neighbours whose expert of
    largest weight is the same, and repeat_excess_*, how far that is above sum_e s_e^2, s_e the
    share of expert e: the chance that two independent tokens meet. repeat_differ_excess_* counts
    only neighbours whose tokens differ, for text has runs; its chance is that of two independent
    tokens that differ.
    """
    # Of each layer: how often token v went to expert e first; pairs of neighbours that share their
    # expert, all pairs, and the same two of neighbours whose tokens differ.
    V, sums = config.model.vocab_size, {}
    for layer, x, routing in _routings(model, batches, device, dtype):
        E = model.blocks[layer].ffn.n_expert
        expert = top_expert(routing, x.shape)                                               # (B, T)
        total = sums.setdefault(layer, [torch.zeros(V, E, dtype=torch.float64), 0, 0, 0, 0])
        total[0] += torch.bincount((x * E + expert).flatten(), minlength=V * E).view(V, E).cpu()
        same, differ = expert[:, 1:] == expert[:, :-1], x[:, 1:] != x[:, :-1]
        for i, n in enumerate((same, torch.ones_like(same), same & differ, differ), 1):
            total[i] += n.sum().item()
    # Observed shares beside chance. meet: two tokens have one expert; alike: they are the same
    # token; both.
    row, found = {}, sorted(sums)
    places = dict(first=0, middle=len(found) // 2, last=-1) if found else {}
    for name, place in places.items():
        counts, same, pairs, same_differ, pairs_differ = sums[found[place]]
        p = counts / counts.sum()                                                           # (V, E)
        meet, alike, both = (q.square().sum().item() for q in (p.sum(0), p.sum(1), p))
        row |= {f"repeat_{name}": same / pairs, f"repeat_excess_{name}": same / pairs - meet,
                f"repeat_differ_excess_{name}":
                    same_differ / pairs_differ - (meet - both) / (1 - alike)}
    return row


@torch.no_grad()
def surgery(model, batches, config, device, dtype):
    """How much the loss rises when experts are taken away (DeepSeekMoE 2401.06066 sec. 4.5), in
    nats a token:

    rise_without_shared   every sparse layer loses its shared expert, and tokens take one more
                          routed one
    rise_without_routed   every sparse layer loses one routed expert, whose tokens take their next
                          best: the mean over all of them
    """
    layers = [model.blocks[i].ffn for i in model.sparse]
    if not layers or not all(map(can_lose, layers)):
        return {}

    def loss():
        total = tokens = 0
        for x, y, domain, *_ in batches:
            with precision(device, dtype):
                total += model(x.to(device), y.to(device),
                               domain=domain.to(device)).loss.item() * y.numel()
            tokens += y.numel()
        return total / tokens

    def loss_without(expert):
        with without(model, expert):
            return loss()

    # Each routed expert in turn.
    whole, E = loss(), layers[0].n_expert
    row = dict(rise_without_routed=sum(map(loss_without, range(E))) / E - whole)
    # The shared experts, with one more choice in their place; then they are put back.
    shared = [layer.shared for layer in layers]
    if None not in shared:
        for layer in layers:
            layer.shared, layer.router.k = None, layer.router.k + 1
        row["rise_without_shared"] = loss() - whole
        for layer, expert in zip(layers, shared):
            layer.shared, layer.router.k = expert, layer.router.k - 1
    return row


@torch.no_grad()
def groups(model, batches, config, device, dtype):
    """Groups of experts (DeepSeek-V2 2405.04434 sec. 2.2): groups_per_token, the most that any
    token uses, and group_load_cv, the coefficient of variation of the groups' loads over all
    batches, mean over layers.
    """
    D, most, loads = config.ffn.n_groups, 0, {}
    if D == 1:
        return {}
    for layer, _, routing in _routings(model, batches, device, dtype):
        # (tokens, k)
        group = routing.by_token()[0] // (model.blocks[layer].ffn.n_expert // D)
        load = torch.bincount(group.flatten(), minlength=D).double().cpu()
        loads[layer] = loads.get(layer, 0) + load
        # used[token, group]: 1 where the token visits an expert of the group.
        used = torch.zeros(len(group), D, device=device).scatter_(1, group, 1.0)
        most = max(most, int(used.sum(1).max()))
    variation = [(load.std(correction=0) / load.mean()).item() for load in loads.values()]
    if not variation:
        return {}
    return dict(groups_per_token=most, group_load_cv=sum(variation) / len(variation))


@torch.no_grad()
def overflow(model, batches, config, device, dtype):
    """overflow: the share of (token, expert) pairs that would find no room if an expert took 1.25
    times the mean load of a batch (Switch 2101.03961 eq. 3), mean over layers and batches. Nothing
    is dropped here."""
    shares = []
    for layer, _, routing in _routings(model, batches, device, dtype):
        E = model.blocks[layer].ffn.n_expert
        load = torch.bincount(routing.expert, minlength=E)
        room = -int(-1.25 * routing.expert.numel() // E)        # rounded up
        shares.append(((load - room).clamp_min(0).sum() / load.sum()).item())
    return dict(overflow=sum(shares) / len(shares)) if shares else {}


@torch.no_grad()
def expert_cosine(model, batches, config, device, dtype):
    """How alike experts are (Qwen2 2407.10671 sec. 2.2.2). The likeness of two experts is the mean,
    over the hidden units of the one, of the cosine to the unit of the other that fits best: the
    order of units means nothing. expert_cosine is that of an expert and the one most like it, mean
    over experts and layers.
    """
    layers, means = [model.blocks[i].ffn for i in model.sparse], []
    for layer in layers:
        # Experts that share their neurons, as rows of one table, have nothing to compare.
        if not hasattr(layer, "experts"):
            return {}
        E, _, w = layer.experts.w_out.shape
        # (E w, 1 or 2, d), (E w, d)
        rows, columns = hidden_units(layer)
        units = F.normalize(torch.cat([rows.flatten(1), columns], 1), dim=1)
        # The cosines of every unit with all; of each the largest in every expert.
        # (E w, E)
        best = (units @ units.T).view(E * w, E, w).amax(2)
        alike = best.view(E, w, E).mean(1).fill_diagonal_(-1)                               # (E, E)
        means.append(alike.amax(1).mean().item())
    return dict(expert_cosine=sum(means) / len(means)) if means else {}


@torch.no_grad()
def logits(model, batches, config, device, dtype):
    """What a z-loss, the mean of (logsumexp z)², acts on (ST-MoE 2202.08906, eq. 5); means over the
    routers' logits z (tokens, E): logit_size, of |z|; logit_max, of each token's largest;
    logit_sum, of logsumexp z; logit_spread, of each token's standard deviation over the experts."""
    found = [z for _, _, routing in _routings(model, batches, device, dtype)
             if (z := routing.logits) is not None]
    sizes = dict(logit_size=torch.abs, logit_max=lambda z: z.amax(1),
                 logit_sum=lambda z: z.logsumexp(1),
                 logit_spread=lambda z: z.std(1, correction=0))
    return {name: sum(size(z).mean().item() for z in found) / len(found)
            for name, size in sizes.items()
            if found}


QUESTIONS = 200             # of math_right: a share of 10 % is then known to 2 %


@torch.no_grad()
def math_right(model, batches, config, device, dtype):
    """The share of new word problems and sums (data/corpora/arithmetic.py) whose final number is
    right, by greedy decoding: a small relative of GSM8K, BTX's measure of mathematics (2403.07816,
    table 1).

    Before every question stand the same worked problems, as many as fill the block up to the room
    for the answer: all prompts are of one length, and text as in training. Problems that are too
    long for that are left out, so only models of one block_size can be compared.
    """
    T = config.model.block_size
    _, tokenizer = prepared(dataclasses.replace(config.data, max_tokens=0), ["math"])
    new = 3 * T // 8                                    # tokens of room for an answer
    # The problems that fit, and their answers.
    asked, answers = [], []
    for problem in islice(problems(2, "val"), 20 * QUESTIONS):
        question, whole = tokenizer.encode(prompt(problem[0])), tokenizer.encode(as_text(*problem))
        fits = len(question) <= T - new and len(whole) - len(question) <= new
        if fits and len(asked) < QUESTIONS:
            asked.append(question)
            answers.append(problem[2])
    if not asked:
        return {}
    # Worked problems before each question, cut so that all prompts have T - new tokens.
    before = tokenizer.encode("".join(as_text(*problem)
                                      for problem in islice(problems(3, "val"), T // 8)))
    # (n, T - new)
    ids = torch.tensor([(before + question)[new - T:] for question in asked], device=device)
    # Greedy answers, and the share whose final number is right.
    with precision(device, dtype):
        written = [step.ids for step in generate(model, ids, new, temperature=0)]
    found = [final_answer(tokenizer.decode(row)) for row in torch.stack(written, 1).tolist()]
    return dict(math_right=sum(map(operator.eq, found, answers)) / len(answers))


@torch.no_grad()
def answers(model, batches, config, device, dtype):
    """Of the answers in validation text of math (data/answers.py), everything before a token being
    given: answer_loss, nats a token, and answer_tokens_right, the share of the tokens that the
    model finds the most likely."""
    (folder,), tokenizer = prepared(dataclasses.replace(config.data, max_tokens=0), ["math"])
    T, mask = config.model.block_size, answer_mask(folder / "val.bin")
    valid = EvalBatches([folder], T, config.train.batch_size, config.train.eval_batches,
                        tokenizer.token_lengths())
    nats = right = tokens = 0
    for (x, y, *_), (_, starts) in zip(valid, valid.plan):
        kept = torch.from_numpy(are_answers(mask, starts, T))
        with precision(device, dtype):
            z = model(x.to(device)).logits.float().cpu()
        nats += F.cross_entropy(z[kept], y[kept], reduction="sum").item()
        right += (z[kept].argmax(-1) == y[kept]).sum().item()
        tokens += int(kept.sum())
    return dict(answer_loss=nats / tokens, answer_tokens_right=right / tokens)


@torch.no_grad()
def recall(model, batches, config, device, dtype):
    """recall_n: the share of answers that are right in new lines of the corpus `recall` with n
    letters, to those letters that the line has asked for before; chance is one of 9. Nothing of a
    model whose context is shorter than a line."""
    row = {}
    if config.model.block_size < 2 * look_ups.LOOK_UPS:
        return row
    for size in look_ups.SIZES:
        # 128 lines that are in no split
        lines = look_ups.lines(2**31 + size, 128, [size])
        ids = torch.from_numpy(lines.astype(int))
        with precision(device, dtype):
            best = model(ids.to(device)).logits.argmax(-1).cpu()
        # after a letter, at every second place, comes its answer
        right = best[:, ::2] == ids[:, 1::2]
        row[f"recall_{size}"] = right[torch.from_numpy(look_ups.known(lines))].float().mean().item()
    return row


PROBES = {"repeats": repeats, "surgery": surgery, "groups": groups, "overflow": overflow,
          "expert_cosine": expert_cosine, "logits": logits, "math_right": math_right,
          "answers": answers, "recall": recall, "inside": inside, "chance": chance,
          "whole_sequence": whole_sequence, "by_layer": by_layer}
