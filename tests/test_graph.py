"""Captured steps: the same numbers as uncaptured ones. Here the graphs are stood in for by Replays, which call
the function again and write into the results of the first time; on a card lab.gpu checks the real ones."""
import torch
import pytest

import runtime.graph as graph
import sample
import train
from data.prepare import prepared
from model import GPT, load_config
from runtime.device import COMPILING, go_on_uncaptured, resolve_compile
from runtime.report import TrainingError
from settings import ConfigError
from test_sample import MODELS, ids_of, tiny
from test_train import TINY, corpora, rows, run  # noqa: F401 (a fixture)


class Replay:
    """What a graph does: reads its inputs' memory, writes into its results'."""

    def __init__(self, function, inputs, results):
        self.function, self.inputs, self.results = function, inputs, results

    def replay(self):
        new = self.function(*self.inputs)
        for mine, x in zip(graph.tree_leaves(self.results), graph.tree_leaves(new), strict=True):
            if isinstance(mine, torch.Tensor) and mine is not x:
                mine.copy_(x)


class Replays(graph.Graphs):
    """Graphs of a Trainer without a card."""

    def __init__(self, trainer, failed):
        self.device, self.failed, self.rounds, self.recorded = trainer.device, failed, 0, {}
        self.trainer = trainer

    def aside(self, function, inputs):
        return function(*inputs)

    def record(self, function, inputs):
        # recording computes nothing: what it wrote over is put back
        written = self.written()
        before = [x.detach().clone() for x in written]
        generator = torch.get_rng_state()
        results = function(*inputs)
        with torch.no_grad():
            for x, was in zip(written, before):
                x.copy_(was)
        torch.set_rng_state(generator)
        return Replay(function, inputs, results), inputs, results

    def written(self):
        """All that a micro-step or an update writes in place."""
        parameters = list(self.trainer.model.parameters())
        states = [x for state in self.trainer.optimizer.state.values() for x in state.values()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        return [*parameters, *self.trainer.model.buffers(), *states, *gradients,
                *(x for x in graph.tree_leaves(self.trainer.seen) if x is not None)]


def trainer_of(corpora, **settings):
    config = load_config(None, [(k, str(v)) for k, v in (TINY | settings).items()] + [
        ("data.name", "one"), ("data.dir", str(corpora / "prepared")), ("model.vocab_size", "256")])
    folders, tokenizer = prepared(config.data)
    return train.Trainer(config, folders, tokenizer, torch.device("cpu"))


@pytest.mark.parametrize("settings", [
    {}, {"train.grad_accum": 4}, {"ffn.router": "noisy_topk", "train.grad_accum": 2}, {"ffn.kind": "dense"},
    {"ffn.router": "sigmoid"}, {"ffn.kind": "peer", "ffn.n_keys": 5, "ffn.peer_top_k": 2}], ids=str)
def test_captured_steps_train_the_same_to_the_last_bit(settings, corpora):  # noqa: F811
    plain, captured = trainer_of(corpora, **settings), trainer_of(corpora, **settings)
    failed = []
    captured.graphs = Replays(captured, failed.append)
    for _ in range(6):
        a, b = plain.step(), captured.step()
        assert torch.equal(a["loss"], b["loss"]) and torch.equal(a["grad_norm"], b["grad_norm"])
        for s, t in zip(a["layers"], b["layers"], strict=True):
            assert torch.equal(s.load, t.load)
    assert failed == [] and len(captured.graphs.recorded) == (3 if "train.grad_accum" in settings else 2)


def test_the_numbers_of_a_step_outlive_the_next_one():
    tree = (torch.ones(()), [torch.arange(3.0)], None)
    kept = graph.copied(tree)
    tree[1][0].zero_()
    assert kept[0] == 1 and kept[1][0].tolist() == [0, 1, 2] and kept[2] is None


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", [1, 12, 30])
def test_a_captured_token_is_the_same_token(name, prompt, monkeypatch):
    _, model = tiny(name)
    idx = torch.randint(256, (2, prompt), generator=torch.Generator().manual_seed(prompt))
    want = list(sample.generate(model, idx, 30, generator=sample.seeded(7, 2)))
    monkeypatch.setattr(sample, "captures", lambda model: True)
    monkeypatch.setattr(graph, "Graphs", lambda *_: Eager())
    steps, seen = [], []
    for step in sample.generate(model, idx, 30, generator=sample.seeded(7, 2)):
        steps.append(step)
        seen.append(step.stats[-1].top_expert.tolist())
    assert torch.equal(ids_of(steps), ids_of(want))
    assert seen == [step.stats[-1].top_expert.tolist() for step in want]


class Eager:
    def begin(self):
        pass

    def run(self, name, function, *inputs):
        return function(*inputs)


def test_where_a_step_cannot_be_captured_it_is_said(corpora, tmp_path, capsys):  # noqa: F811
    config = load_config(None, {"train.graph": "on", "model.vocab_size": 16})
    with pytest.raises(ConfigError, match="cpu has none"):
        graph.resolve_graph(config, torch.device("cpu"), "")
    config.train.graph = "auto"
    assert graph.resolve_graph(config, torch.device("cuda"), "")[0]
    on, why = graph.resolve_graph(config, torch.device("cuda"), "ffn.router base")
    assert not on and "base" in why
    run(corpora, tmp_path / "run", status=2, train__graph="on")
    assert "train.graph" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_a_capture_that_fails_is_one_warning_or_an_error(mode, corpora):  # noqa: F811
    plain, captured, said = trainer_of(corpora), trainer_of(corpora), []
    captured.say, captured.config.train.graph = said.append, mode
    captured.graphs = Replays(captured, lambda why: go_on_uncaptured(captured, why))

    def fails(function, inputs):
        function(*inputs)               # as far as it came
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    captured.graphs.record = fails
    for i in range(5):
        if mode == "on" and i == graph.WARM:
            with pytest.raises(TrainingError, match="cannot be captured: operation not permitted"):
                captured.step()
            return
        assert torch.equal(plain.step()["loss"], captured.step()["loss"])
    assert len(said) == 1 and "operation not permitted" in said[0] and "\n" not in said[0]


def test_compiling_has_to_pay_for_itself():
    """auto: a short run is not compiled, a long one is, and the text gives both sums."""
    model = GPT(load_config(None, {"ffn.kind": "dense", "model.vocab_size": 256}))
    config, cuda, cpu = model.config, torch.device("cuda"), torch.device("cpu")
    on, why = resolve_compile(config, cuda, model, 900, True)
    cost = COMPILING["cuda"][0] * config.model.n_layer
    assert not on and f"costs some {cost} s" in why
    assert resolve_compile(config, cuda, model, 10 ** 6, True)[0]
    # uncaptured steps wait for the host: more to save
    enough = next(n for n in range(0, 10 ** 6, 1000) if resolve_compile(config, cuda, model, n, False)[0])
    assert not resolve_compile(config, cuda, model, enough, True)[0]
    # on a CPU the whole run counts, so that a run that goes on computes as before
    config.train.max_steps = 100
    assert not resolve_compile(config, cpu, model, 10 ** 9, False)[0]
    config.train.max_steps = 10 ** 6
    assert resolve_compile(config, cpu, model, 1, False)[0]
    mixture = GPT(load_config(None, {"model.vocab_size": 256, "train.max_steps": 10 ** 6}))
    assert not resolve_compile(mixture.config, cpu, mixture, 10 ** 6, False)[0]
