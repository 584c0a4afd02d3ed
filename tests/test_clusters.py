"""c-BTM: clusters of one size, the corpora that they become, and the weights by distance."""
import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

import train
from data.batches import Batches
from data.binfile import open_bin, read_header
from data.prepare import prepare
from data.tokenizers import Tokenizer
from grow import btx, clusters, ensemble, trigrams
from tiny import model_of

WORDS = dict(code="def f(x): return x + {}  # note\n", prose="all happy families are {} alike. ")


# --- balanced k-means ---


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(0, 30))
@settings(max_examples=40, deadline=None)
def test_sizes_differ_by_at_most_one(seed, k, more):
    distance = np.random.default_rng(seed).random((k + more, k))
    sizes = np.bincount(clusters.assign(distance), minlength=k)
    assert sizes.max() - sizes.min() <= 1 and sizes.sum() == k + more


@given(st.integers(0, 2**31), st.sampled_from([(6, 2), (6, 3), (4, 4), (3, 1)]))
@settings(max_examples=30, deadline=None)
def test_no_balanced_assignment_has_a_smaller_sum(seed, shape):
    N, k = shape
    distance = np.random.default_rng(seed).random(shape)
    least = min(sum(distance[i, j] for i, j in enumerate(order))
                for order in itertools.permutations(list(range(k)) * (N // k)))
    found = distance[np.arange(N), clusters.assign(distance)].sum()
    assert least - 1e-6 <= found <= least + N * 1.1e-3          # the auction's tolerance


def texts(rng, n, size=60):
    """n windows of bytes of two alphabets."""
    return [rng.integers(65 + 10 * (i % 2), 75 + 10 * (i % 2), size).astype(np.uint8)
            for i in range(n)]


@given(st.integers(0, 2**31), st.integers(1, 5))
@settings(max_examples=10, deadline=None)
def test_the_sum_of_distances_never_rises(seed, k):
    rng = np.random.default_rng(seed)
    x, _ = trigrams.vectors(texts(rng, 23))
    cluster, centres, history = clusters.balanced_kmeans(x, k, rng)
    assert all(later < earlier for earlier, later in zip(history, history[1:]))
    full = x.dense(range(x.n))
    for j in range(k):
        np.testing.assert_allclose(centres[j], full[cluster == j].mean(0), atol=1e-12)
    # the sum goes on to fall when each centre becomes the mean
    end = sum(((full[cluster == j] - centres[j])**2).sum() for j in range(k))
    assert end <= history[-1] + 1e-9


def test_vectors_are_tf_idf_of_length_one():
    """Against a dictionary of counts."""
    windows = [np.frombuffer(text, np.uint8) for text in (b"abcabc", b"abcd", b"xy", b"zzzz")]
    x, idf = trigrams.vectors(windows)
    full = x.dense(range(4))
    code = {text: int(trigrams.trigrams(np.frombuffer(text, np.uint8))[0])
            for text in (b"abc", b"bca", b"cab", b"bcd", b"zzz")}
    assert len(set(code.values())) == 5
    rare, common = math.log(5 / 2) + 1, math.log(5 / 3) + 1
    assert idf[code[b"abc"]] == pytest.approx(common) and idf[code[b"zzz"]] == pytest.approx(rare)
    raw = {b"abc": 2 * common, b"bca": rare, b"cab": rare}
    length = math.sqrt(sum(v * v for v in raw.values()))
    for text, value in raw.items():
        assert full[0, code[text]] == pytest.approx(value / length)
    assert np.square(full).sum(1) == pytest.approx([1, 1, 0, 1])
    centres = np.random.default_rng(0).random((3, trigrams.FEATURES))
    far = ((full[:, None] - centres)**2).sum(-1)
    np.testing.assert_allclose(trigrams.distances(x, centres), far)


# --- weights ---


def some_centres(k=3, temperature=0.1, tokens=None, seed=0):
    rng = np.random.default_rng(seed)
    _, idf = trigrams.vectors(texts(rng, 12))
    centres = rng.random((k, trigrams.FEATURES)) / 90
    tokens = tokens or [bytes([i]) for i in range(256)]
    return trigrams.Centres(centres, idf, tokens, temperature, ["?"] * k)


def uniform(k):
    return torch.full((k,), -math.log(k), dtype=torch.float64)


def weights(centres, read, top_k=0):
    return ensemble.log_posterior(None, uniform(len(centres.centres)), centres, top_k, read)


READ = torch.randint(65, 70, (2, 20), generator=torch.Generator().manual_seed(0))


def test_distances_of_prefixes_are_those_of_each_prefix_by_itself():
    """The running sums against vectors made from nothing; tokens of several bytes among them."""
    tokens = [bytes([i]) for i in range(256)]
    tokens[65], tokens[66], tokens[67] = b"abab", b"", b"ab"
    centres = some_centres(tokens=tokens)
    found = -centres.temperature * centres.evidence(READ)
    assert found.shape == (3, 2, 20) and found.dtype == torch.float64
    for b, row in enumerate(READ.tolist()):
        for i in range(20):
            raw = np.frombuffer(b"".join(tokens[t] for t in row[:i + 1]), np.uint8)
            wanted = np.zeros(3)
            if len(raw) > 2:
                x, _ = trigrams.vectors([raw], centres.idf)
                wanted = trigrams.distances(x, centres.centres)[0]
            np.testing.assert_allclose(found[:, b, i], wanted, atol=1e-9)


def test_a_hot_weight_is_uniform_and_a_cold_one_takes_the_nearest():
    hot = weights(some_centres(temperature=1e9), READ).exp()
    torch.testing.assert_close(hot, torch.full_like(hot, 1 / 3), atol=1e-6, rtol=0)
    cold, one = weights(some_centres(temperature=1e-7), READ), weights(some_centres(), READ, top_k=1)
    torch.testing.assert_close(cold.exp()[:, :, 2:], one.exp()[:, :, 2:])       # 2: the first trigram
    nearest = some_centres().evidence(READ).argmax(0)[:, 2:]
    assert torch.equal(one.argmax(0)[:, 2:], nearest)


def test_a_constant_on_all_squared_distances_changes_nothing(monkeypatch):
    before = weights(some_centres(), READ)
    own = trigrams.Centres.prefixes
    monkeypatch.setattr(trigrams.Centres, "prefixes", lambda self, ids: own(self, ids) + 7)
    torch.testing.assert_close(weights(some_centres(), READ), before, atol=1e-9, rtol=0)
    monkeypatch.setattr(trigrams.Centres, "prefixes", lambda self, ids: own(self, ids) * 7)
    assert not torch.allclose(weights(some_centres(), READ), before)


@given(st.integers(0, 19), st.integers(0, 255))
@settings(max_examples=30, deadline=None)
def test_weights_know_the_prefix_only(at, token):
    changed = READ.clone()
    changed[0, at] = token
    before, after = weights(some_centres(), READ), weights(some_centres(), changed)
    assert torch.equal(before[:, 0, :at], after[:, 0, :at]) and torch.equal(before[:, 1], after[:, 1])
    assert before[:, 0, :2].flatten().tolist() == pytest.approx([-math.log(3)] * 6)         # no trigram


@given(st.permutations(range(3)))
@settings(max_examples=6, deadline=None)
def test_clusters_may_change_places(order):
    centres = some_centres()
    moved = centres._replace(centres=centres.centres[list(order)])
    torch.testing.assert_close(weights(moved, READ), weights(centres, READ)[list(order)])


def members(n):
    found = [model_of("dense", seed=seed).eval() for seed in range(n)]
    for model in found:
        model.embedding.weight.data.mul_(20)                            # predictions that differ
    return found


def test_the_mixture_by_distance_is_the_formula_cached_or_not():
    tokens = [bytes([97 + i % 4]) for i in range(32)]
    centres, models = some_centres(tokens=tokens), members(3)
    x = torch.randint(0, 32, (1, 8), generator=torch.Generator().manual_seed(3))
    y = x.roll(-1, 1)
    found = ensemble.evaluate(models, [(x, y, torch.tensor([0]), 8)], ["a"], uniform(3), centres)["a"]
    with torch.no_grad():
        p = torch.stack([model(x).logits.double().softmax(-1) for model in models])[:, 0]   # (3, 8, 32)
        w = torch.from_numpy(np.exp(-centres.prefixes(x[0].tolist()) / 0.1))
        w = w / w.sum(0)
        mixed = (w.unsqueeze(-1) * p).sum(0)                                        # (8, 32)
        nats = -mixed[torch.arange(8), y[0]].log().mean()
        assert found["loss"] == pytest.approx(float(nats), rel=1e-6)
        torch.testing.assert_close(torch.tensor(found["posterior"]).double(), w)
        mixture = ensemble.Ensemble(models, uniform(3), centres).eval()
        cache = mixture.new_cache()
        for start, end in ((0, 3), (3, 4), (4, 8)):
            out = mixture(x[:, start:end], cache).logits
            torch.testing.assert_close(out[0, 0].exp(), mixed[end - 1], atol=1e-6, rtol=1e-5)


def test_equal_members_are_the_member():
    model, x = members(1)[0], READ[:, :8] % 32
    batch = [(x, x.roll(-1, 1), torch.zeros(2, dtype=torch.long), 16)]
    found = ensemble.evaluate([model] * 3, batch, ["a"], uniform(3), some_centres())["a"]
    with torch.no_grad():
        assert found["loss"] == pytest.approx(float(model(x, x.roll(-1, 1)).loss), rel=1e-6)


# --- the program ---


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two corpora as text, and prepared."""
    folder = tmp_path_factory.mktemp("home")
    for name, words in WORDS.items():
        (folder / f"{name}.txt").write_text("".join(words.format(i) for i in range(1400)))
    prepare(sources(folder), out=folder / "prepared", quiet=True)
    return folder


def sources(home):
    return [str(home / f"{name}.txt") for name in WORDS]


def run(home, *more, corpora=None, status=0):
    argv = [*(corpora or sources(home)), "--out", home / "prepared", "--quiet", *more]
    assert clusters.main(list(map(str, argv))) == status


def tokens_of(home, name, part="train"):
    return np.array(open_bin(home / "prepared" / f"{name}-byte" / f"{part}.bin")[0])


@pytest.mark.parametrize("name", WORDS)
def test_one_cluster_is_the_corpus(name, home):
    """The same tokens, and so the same batches."""
    run(home, "--k", 1, "--name", "whole", corpora=[str(home / f"{name}.txt")])
    for part in ("train", "val"):
        assert np.array_equal(tokens_of(home, "whole-0", part), tokens_of(home, name, part))
    one, other = (Batches([home / "prepared" / f"{called}-byte"], [], 16, 8, 3).batch(5)
                  for called in (name, "whole-0"))
    assert all(map(torch.equal, one, other))


def test_clusters_hold_every_window_once_and_find_the_domains(home, tmp_path):
    run(home, "--k", 2, "--json", tmp_path / "row.json")
    for part in ("train", "val"):
        whole = [tokens_of(home, name, part) for name in WORDS]
        made = [tokens_of(home, f"clusters-{j}", part) for j in range(2)]
        cut = [[bytes(one[i:i + 1024]) for one in group for i in range(0, len(one), 1024)]
               for group in (whole, made)]
        if part == "train":
            counts = [math.ceil(len(one) / 1024) for one in made]
            assert abs(counts[0] - counts[1]) <= 1
        assert sum(map(len, whole)) == sum(map(len, made))
        full = [sorted(w for w in windows if len(w) == 1024) for windows in cut]
        # all but what stands behind the short window of a corpus is cut at the same places
        assert len(set(full[0]) & set(full[1])) >= 0.5 * len(set(full[0]))
    row = json.loads((tmp_path / "row.json").read_text())
    assert row["purity"] > 0.9 and row["windows"] == sum(
        math.ceil(len(tokens_of(home, name)) / 1024) for name in WORDS)
    # of each at most so many
    run(home, "--k", 2, "--name", "few", "--windows", 10)
    assert sum(len(tokens_of(home, f"few-{j}")) for j in range(2)) <= 20 * 1024


def test_a_seed_gives_the_same_bits_also_after_a_kill(home, monkeypatch):
    run(home, "--k", 3, "--name", "twin", "--seed", 5)
    wanted = [tokens_of(home, f"twin-{j}") for j in range(3)]
    centres = (home / "prepared" / "twin.npz").read_bytes()
    own, calls = clusters.build, []

    def dies(*words, **more):
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*words, **more)

    monkeypatch.setattr(clusters, "build", dies)
    run(home, "--k", 3, "--name", "twin", "--seed", 6, status=130)
    monkeypatch.undo()
    for j in range(3):                              # whatever is there is whole
        read_header(home / "prepared" / f"twin-{j}-byte" / "val.bin")
    run(home, "--k", 3, "--name", "twin", "--seed", 5)
    assert all(np.array_equal(a, tokens_of(home, f"twin-{j}")) for j, a in enumerate(wanted))
    assert (home / "prepared" / "twin.npz").read_bytes() == centres


@pytest.fixture(scope="module")
def branches(home):
    """A seed, and a branch of it for each of two clusters."""
    run(home, "--k", 2, "--name", "part")
    shape = {"model.n_layer": 1, "model.n_head": 2, "model.n_embd": 16, "model.block_size": 32,
             "ffn.d_ff": 16, "ffn.kind": "dense"}
    (home / "empty.toml").write_text("")
    trained(home, "seed", ",".join(sources(home)), shape)
    for j in range(2):
        trained(home, f"branch-{j}", f"part-{j}", {"train.init_from": home / "seed"})
    return home


def trained(home, out, data, more):
    keys = {"train.batch_size": 4, "train.max_steps": 4, "train.warmup_steps": 2, "train.lr": 0.02,
            "train.eval_every": 0, "train.eval_batches": 2, "train.sample_tokens": 0,
            "train.device": "cpu", "data.name": data, "data.dir": home / "prepared"} | more
    argv = [str(home / "empty.toml"), "--out", str(home / out), "--quiet"]
    assert train.main(argv + [f"--{key}={value}" for key, value in keys.items()]) == 0


def test_branches_of_clusters_are_mixed_by_distance(branches, tmp_path, capsys):
    path = tmp_path / "x.json"
    runs = [str(branches / f"branch-{j}") for j in range(2)]
    words = ["ensemble", *runs, "--eval", *sources(branches), "--json", str(path)]
    by_distance = ["--centres", str(branches / "prepared" / "part.npz")]
    assert btx.main([*words, *by_distance, "--prompt", "all", "--tokens", "9"]) == 0
    found = json.loads(path.read_text())["corpora"]
    # whose cluster is which: at the end of a block the nearer branch has nearly all the weight
    ends = np.array([[weights[-1] for weights in found[name]["posterior"]]
                     for name in sources(branches)])
    assert ends.sum(1) == pytest.approx([1, 1]) and (ends.max(1) > 0.9).all()
    assert ends.argmax(1).tolist() in ([0, 1], [1, 0])
    centres = trigrams.open_centres(by_distance[1], Tokenizer.byte(), 0.1)
    assert centres.centres.shape == (2, trigrams.FEATURES)
    capsys.readouterr()
    for more, said in [
            (["--centres", runs[0]], "branch-0"), (["--centres", str(branches / "seed.txt")], "seed.txt"),
            (["--centres", str(branches / "code.txt")], "holds no centres"),
            ([*by_distance, "--posterior", "uniform"], "--posterior uniform has no effect"),
            ([*by_distance, "--centre_temperature", "0"], "must be above 0"),
            (["--centre_temperature", "1"], "it is read with --centres")]:
        assert btx.main([*words, *more]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    swapped = ["ensemble", *runs[::-1], "--eval", sources(branches)[0], *by_distance]
    assert btx.main(swapped) == 2
    assert "learned cluster 1 and is given as model 0" in capsys.readouterr().err
    assert btx.main(["ensemble", runs[0], "--eval", sources(branches)[0], *by_distance]) == 2
    assert "has 2 centres, not 1" in capsys.readouterr().err


@pytest.mark.parametrize("more, said", [
    (["--k", 0], "--k 0 must be at least 1"), (["--k", "two"], "--k"),
    (["--k", 10000], "fewer than --k 10000"), (["--windows", -1], "--windows -1"),
    (["--seed", -1], "--seed -1"), (["--name", "a/b"], "--name a/b"), (["--name", ""], "--name"),
    (["--name", "markov"], "markov-0 is another corpus"), (["--nmae", "x"], "did you mean --name?"),
    (["--tokenizer", "bytes"], "did you mean byte?")])
def test_mistakes_are_one_line(more, said, home, capsys):
    capsys.readouterr()
    try:
        run(home, *more, status=2)
    except SystemExit as stop:
        assert stop.code == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert clusters.main(["nowhere", "--out", str(home / "prepared")]) == 2
