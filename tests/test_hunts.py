"""The bug hunts: each answer's test tells the two versions apart, and other tests are told what is wrong with them."""
import ast

import pytest
import torch

from course import hunt
from course.check import examine, judge

BUGS = hunt.BUGS
TITLES = {1: "jitter", 2: "softmax", 3: "count", 4: "bias", 5: "gate", 6: "loss", 7: "evict", 8: "twice", 9: "heads",
          10: "sign"}


@pytest.fixture(autouse=True)
def one_thread():
    """The layers are tiny: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def answer_to(tmp_path, body, n=1):
    """The answer to hunt n with this body of test(layer)."""
    path = tmp_path / "mine.py"
    path.write_text(f"import torch\n\n\ndef test(layer):\n    {body}\n")
    return judge(path, lambda: hunt.check(n, path))


def test_there_are_ten():
    assert sorted(int(p.name) for p in BUGS.iterdir() if p.is_dir()) == list(hunt.NUMBERS) == list(TITLES)


@pytest.mark.parametrize("n", hunt.NUMBERS)
def test_the_reference_test_tells_the_versions_apart(n):
    text = hunt.check(n, BUGS / str(n) / "answer.py")
    assert text.startswith("passes: the right version passes, and with the bug it fails: ")
    answer = hunt.load(BUGS / str(n) / "answer.py", "answer")
    answer.test(hunt.layer(n, fixed=True))
    with pytest.raises(AssertionError):
        answer.test(hunt.layer(n))


@pytest.mark.parametrize("n", hunt.NUMBERS)
def test_a_file_is_small_says_what_it_means_and_its_answer_why(n):
    text = (BUGS / str(n) / "layer.py").read_text("utf-8")
    answer = hunt.load(BUGS / str(n) / "answer.py", "answer")
    assert 40 <= len(text.splitlines()) <= 80
    assert text.count(answer.BUG) == 1 and answer.RIGHT not in text
    assert all(len(line) <= 100 for name in ("layer", "answer")
               for line in (BUGS / str(n) / f"{name}.py").read_text("utf-8").splitlines())
    # nothing of the house is needed to read it, and its demonstration runs
    imported = {a.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for a in node.names}
    assert imported <= {"torch", "torch.nn.functional", "math", "copy"}
    exec(compile(text, "layer.py", "exec"), {"__name__": "__main__", "__doc__": ""})
    why = " ".join(answer.WHY.split())
    assert TITLES[n] in answer.__doc__ and 80 <= len(why.split()) <= 200
    assert "What catches it" in why or "test that catches it" in why


@pytest.mark.parametrize("n", hunt.NUMBERS)
def test_the_stub_is_not_begun(n):
    path = BUGS / str(n) / "mine.py"
    if "raise NotImplementedError" not in path.read_text("utf-8"):
        pytest.skip("somebody is at it")
    assert path.read_text("utf-8") == hunt.stub(n)
    assert examine(f"bugs/{n}").text == "not begun: test"


@pytest.mark.parametrize("body, sentence", [
    ("pass", "your test does not see the bug yet"),
    ("assert False, 'never right'", "the right version fails, too: never right"),
    ("assert layer.SwitchLayer(4, 4, 2).no_such", "the right version fails, too: AttributeError"),
    ("y, _ = layer.SwitchLayer(16, 32, 1, jitter=0.3)(torch.ones(1, 2, 16)); torch.manual_seed(0); "
     "z, _ = layer.SwitchLayer(16, 32, 1, jitter=0.3).eval()(torch.ones(1, 2, 16)); 1 / int(y.equal(z))",
     "with the bug your test ends by ZeroDivisionError"),
    ("y, _ = layer.SwitchLayer(16, 32, 1, jitter=0.3)(torch.ones(1, 2, 16)); torch.manual_seed(0); "
     "z, _ = layer.SwitchLayer(16, 32, 1, jitter=0.3).eval()(torch.ones(1, 2, 16)); assert not y.equal(z)",
     "the wrong way round: it passes with the bug and fails on the right version: y, _ = "),
    ("assert )", "SyntaxError")])
def test_another_test_is_told_what_is_wrong(tmp_path, body, sentence):
    answer = answer_to(tmp_path, body)
    assert not answer.passes and sentence in answer.text
    assert "\n" not in answer.text


def test_a_file_without_a_test_and_a_file_that_is_missing(tmp_path):
    path = tmp_path / "mine.py"
    assert "there is no file" in judge(path, lambda: hunt.check(1, path)).text
    path.write_text("tests = 1\n")
    assert judge(path, lambda: hunt.check(1, path)).text == "mine.py has no function test(layer)"


def test_a_layer_that_was_put_right_must_go_back(tmp_path, monkeypatch):
    """Who repairs layer.py itself has no version with the bug left."""
    copy = tmp_path / "bugs" / "2"
    copy.mkdir(parents=True)
    answer = (BUGS / "2" / "answer.py").read_text("utf-8")
    (copy / "answer.py").write_text(answer)
    fixed = hunt.load(BUGS / "2" / "answer.py", "answer")
    text = (BUGS / "2" / "layer.py").read_text("utf-8")
    (copy / "layer.py").write_text(text.replace(fixed.BUG, fixed.RIGHT))
    monkeypatch.setattr(hunt, "BUGS", tmp_path / "bugs")
    with pytest.raises(hunt.Wrong, match="layer.py was changed; put it back"):
        hunt.check(2, copy / "answer.py")


def test_both_versions_get_the_same_draws(tmp_path):
    """A test that asks for random numbers must not see a difference that is none."""
    same = "assert torch.rand(3).equal(torch.tensor({})), 'other draws'"
    torch.manual_seed(0)
    answer = answer_to(tmp_path, same.format(torch.rand(3).tolist()))
    assert "does not see the bug yet" in answer.text


# ---- the right versions have no second bug: each token by its formula, one after the other ----

def one_switch(layer, x):
    moe = layer.SwitchLayer(16, 8, 4).eval()
    def token(t):
        p = (moe.router.weight @ t).softmax(-1)
        return p.max() * moe.experts[p.argmax()](t)
    return moe(x)[0], token


def two_mixtral(layer, x):
    moe = layer.MixtralLayer(layer.Settings(d=16, width=8, n_expert=5, top_k=2))
    def token(t):
        best, chosen = (moe.router.proj.weight @ t).topk(2)
        return sum(g * moe.experts[e](t) for g, e in zip(best.softmax(-1), chosen))
    return moe(x), token


def three_sampled(layer, x):
    moe = layer.SampledLayer(16, 8, 4).eval()
    def token(t):
        p = (moe.router.weight @ t).softmax(-1)
        return p.max() * ((t @ moe.w_in[p.argmax()]).relu() @ moe.w_out[p.argmax()])
    return moe(x)[0], token


def four_loss_free(layer, x):
    moe = layer.LossFreeLayer(16, 8, 6, 3, bias_rate=0.1)
    for _ in range(3):
        moe.after_step(moe(x)[1])
    def token(t):
        s = (moe.router.weight @ t).sigmoid()
        chosen = (s + moe.bias).argsort(descending=True)[:3]
        return moe.shared(t) + sum(s[e] / s[chosen].sum() * (
            torch.nn.functional.silu(t @ moe.w_in[e]) @ moe.w_out[e]) for e in chosen)
    return moe(x)[0], token


def five_qwen(layer, x):
    moe = layer.QwenLayer(16, 8, 5, 3)
    torch.nn.init.normal_(moe.shared_gate.weight)
    def token(t):
        p = (moe.router.weight @ t).softmax(-1)
        chosen = p.argsort(descending=True)[:3]
        return (moe.shared_gate.weight @ t).sigmoid() * moe.shared(t) + sum(
            p[e] / p[chosen].sum() * moe.experts[e](t) for e in chosen)
    return moe(x), token


def seven_capacity(layer, x):
    moe = layer.CapacityLayer(16, 8, 4, capacity_factor=4.0)
    def token(t):
        p = (moe.router.weight @ t).softmax(-1)
        return p.max() * ((t @ moe.w_in[p.argmax()]).relu() @ moe.w_out[p.argmax()])
    return moe(x)[0], token


def eight_fine_grained(layer, x):
    moe = layer.FineGrained(16, 32, 4, 2, granularity=2)
    def token(t):
        p = (moe.router.weight @ t).softmax(-1)
        chosen = p.argsort(descending=True)[:4]
        return sum(p[e] / p[chosen].sum() * (torch.nn.functional.silu(t @ moe.w_in[e]) @ moe.w_out[e]) for e in chosen)
    return moe(x)[0], token


def nine_peer(layer, x):
    peer = layer.PEERLayer(16, 5, 3, 4, 8)
    def token(t):
        y = 0
        for q in torch.nn.functional.layer_norm((peer.query.weight @ t).view(3, 2, 4), (4,)):
            first, second = (peer.sub_keys[half] @ q[half] for half in (0, 1))
            best, chosen = (first[:, None] + second).flatten().topk(4)
            for g, e in zip(best.softmax(-1), chosen):
                y = y + g * torch.nn.functional.gelu(t @ peer.u.weight[e]) * peer.v.weight[e]
        return y
    return peer(x), token


@pytest.mark.parametrize("n, make", [(1, one_switch), (2, two_mixtral), (3, three_sampled), (4, four_loss_free),
                                     (5, five_qwen), (7, seven_capacity), (8, eight_fine_grained), (9, nine_peer)])
def test_the_right_version_is_its_formula(n, make):
    torch.manual_seed(1)
    x = torch.randn(3, 7, 16)
    with torch.no_grad():
        y, token = make(hunt.layer(n, fixed=True), x)
        wanted = torch.stack([token(t) for t in x.flatten(0, 1)]).view_as(x)
    assert torch.allclose(y, wanted, atol=1e-5)


def test_the_right_capacity_serves_the_first():
    """Two slots an expert: by position, at one position by sequence."""
    moe = hunt.layer(7, fixed=True).CapacityLayer(4, 4, 2)
    expert = torch.tensor([0, 0, 1, 0, 0, 1])                   # two sequences of three positions
    assert moe.queue(torch.rand(6), expert, 3).tolist() == [0, 2, 0, 1, 3, 1]


def test_the_right_report_is_the_cross_entropy_and_training_keeps_its_balance():
    layer = hunt.layer(6, fixed=True)
    model = layer.ByteModel(16, 16, 4, coefficient=0.5)
    idx, targets = torch.randint(256, (2, 2, 8)).unbind(0)
    out = model(idx, targets)
    nats = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
    assert layer.bits_per_byte(model, [(idx, targets)]) == pytest.approx(nats.item() / 0.6931472, rel=1e-5)
    uneven = out.importance.var(correction=0) / out.importance.mean() ** 2
    assert torch.allclose(out.loss, nats + 0.5 * uneven)


def test_the_right_outer_step_learns():
    layer = hunt.layer(10, fixed=True)
    torch.manual_seed(0)
    model, teacher = layer.Mixture(8, 4), layer.Mixture(8, 4)
    x = torch.randn(64, 8)
    y = teacher(x).detach()
    before = (model(x) - y).square().mean().item()
    outer = layer.Outer(model, lr=0.7, momentum=0.5)
    for _ in range(5):
        outer.meet([layer.train(model, [(x, y)] * 5) for _ in range(2)])
    assert (model(x) - y).square().mean().item() < 0.7 * before
