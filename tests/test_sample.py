"""sample.py: the window, the cache, drawing, streaming, the experts' marks, the command line."""
import os
import sys
from collections import Counter

import pytest
import torch

import sample
from data.binfile import DataError
from data.tokenizers import Tokenizer
from model import GPT, load_config
from runtime import checkpoint, device, terminal

BYTE = Tokenizer.byte()
MODELS = {"dense": {"ffn.kind": "dense"}, "topk": {}, "expert_choice": {"ffn.router": "expert_choice"},
          "capacity": {"ffn.capacity_factor": "0.5", "ffn.eval_capacity_factor": "0.5"},
          "many": {"ffn.n_expert": "40", "ffn.router": "sigmoid"},
          "peer": {"ffn.kind": "peer", "ffn.n_keys": "5", "ffn.peer_top_k": "2", "ffn.peer_path": "readable"},
          "mixed": {"ffn.moe_every": "2", "model.n_layer": "4"}}


def tiny(name="topk", **more):
    """(config, model in evaluation mode): 2 layers, width 16, block 12, bytes; large weights, varied text."""
    settings = {"model.n_layer": "2", "model.n_embd": "16", "model.n_head": "2", "model.block_size": "12",
                "model.vocab_size": "256", "ffn.n_expert": "4",
                "ffn.dispatch": "loop"} | MODELS[name] | more       # no kernels: interpreted ones crawl
    config = load_config(None, settings.items())
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    return config, model


def save_run(folder, name="topk", tokenizer=BYTE, ancestry=None, **more):
    config, model = tiny(name, **{"model.vocab_size": str(tokenizer.vocab_size)} | more)
    header = dict(step=1, config=config.to_dict(), tokenizer=tokenizer.to_dict(), ancestry=ancestry)
    checkpoint.save(folder / "ckpt_best.pt", header, model.state_dict())
    return str(folder)


def ids_of(steps):
    return torch.stack([step.ids for step in steps], 1)


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small cost more to share out than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run"))


def program(capsys, *argv):
    """(exit status, stdout, stderr) of main()."""
    try:
        status = sample.main(list(argv))
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


# --- generation ---

@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", [1, 12, 30])
def test_cache_changes_nothing_within_and_past_the_block(name, prompt):
    _, model = tiny(name)
    idx = torch.randint(256, (2, prompt), generator=torch.Generator().manual_seed(prompt))
    runs = [ids_of(sample.generate(model, idx, 30, generator=sample.seeded(7, 2), cache=cache))
            for cache in (True, False)]
    assert torch.equal(*runs)
    assert runs[0].unique().numel() > 20                            # or equality would say little


def test_window_is_the_last_half_block_once_the_block_is_full():
    _, model = tiny()
    idx = torch.randint(256, (1, 10))
    text, seen = idx, []
    for step in sample.generate(model, idx, 16, temperature=0):
        seen.append(step.stats[0].top_expert.shape[1])
        text = torch.cat([text, step.ids[:, None]], 1)
    # tokens read: the prompt, then one at a time up to 12; the 13th makes the window too long: its last 6
    assert seen == [10, 1, 1, 6, 1, 1, 1, 1, 1, 1, 6, 1, 1, 1, 1, 1]
    expected = model(text[:, 7:13], cache=model.new_cache(1)).logits[:, -1].argmax(-1)
    assert text[0, 13] == expected                                      # drawn from tokens 7 to 12 alone
    steps = sample.generate(model, idx, 16, temperature=0, cache=False)
    assert [step.stats[0].top_expert.shape[1] for step in steps] == [
        10, 11, 12, 6, 7, 8, 9, 10, 11, 12, 6, 7, 8, 9, 10, 11]


def test_expert_choice_generates_in_generation_mode():
    """Neighbours compete for experts in evaluation; in generation a sequence's text must not know them."""
    _, model = tiny("expert_choice")
    idx = torch.randint(256, (4, 6))
    alone, group = model(idx[:1]).logits, model(idx).logits[:1]
    assert not torch.allclose(alone, group)
    texts = ids_of(sample.generate(model, idx, 10, temperature=0))
    assert torch.equal(texts[:1], ids_of(sample.generate(model, idx[:1], 10, temperature=0)))


@pytest.mark.parametrize("name", MODELS)
def test_text_depends_on_its_own_seed_alone(name):
    _, model = tiny(name)
    idx = torch.randint(256, (1, 4))

    def text(seed, num):
        return ids_of(sample.generate(model, idx.repeat(num, 1), 25, generator=sample.seeded(seed, num)))

    three = text(5, 3)
    assert torch.equal(three, text(5, 3))
    for i in range(3):
        assert torch.equal(three[i:i + 1], text(5 + i, 1))
    assert not torch.equal(three[0], three[1])


def test_greedy_takes_the_likeliest_token():
    _, model = tiny()
    idx = torch.randint(256, (2, 3))
    for ids in ids_of(sample.generate(model, idx, 8, temperature=0)).T:
        assert torch.equal(ids, model(idx, cache=model.new_cache(2)).logits[:, -1].argmax(-1))
        idx = torch.cat([idx, ids[:, None]], 1)


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    _, model = tiny()
    idx = torch.zeros(1, 1, dtype=torch.long)
    assert ids_of(sample.generate(model, idx, 40, temperature=5, vocab_size=7)).max() < 7


# --- drawing ---

def test_temperature_and_top_k():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    assert torch.allclose(sample.next_probs(p.log()), p.double(), atol=1e-7)
    squared = p.double() ** 2 / (p.double() ** 2).sum()
    assert torch.allclose(sample.next_probs(p.log(), temperature=0.5), squared, atol=1e-7)
    expected = torch.tensor([[0, 4 / 7, 0, 3 / 7]]).double()
    assert torch.allclose(sample.next_probs(p.log(), top_k=2), expected, atol=1e-7)
    assert torch.allclose(sample.next_probs(p.log(), top_k=9), p.double(), atol=1e-7)
    assert sample.next_probs(p.log(), temperature=0).tolist() == [[0, 1, 0, 0]]
    assert sample.next_probs(p.log(), temperature=1e-310).tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize("top_p, kept", [
    (0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]), (0.91, [0, 1, 2, 3]),
    (1.0, [0, 1, 2, 3])])
def test_top_p_keeps_the_fewest_tokens_that_hold_it(top_p, kept):
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    probs = sample.next_probs(p.log(), top_p=top_p)[0]
    assert probs.nonzero().flatten().tolist() == kept
    assert torch.allclose(probs[kept], (p[0, kept] / p[0, kept].sum()).double(), atol=1e-7)


def test_top_p_counts_what_top_k_left():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])                            # after top_k = 2: 4/7 = 0.57, 3/7
    assert sample.next_probs(p.log(), top_k=2, top_p=0.5)[0].nonzero().flatten().tolist() == [1]
    assert sample.next_probs(p.log(), top_k=2, top_p=0.6)[0].nonzero().flatten().tolist() == [1, 3]


def test_equal_tokens_do_not_slip_past_top_k():
    assert sample.next_probs(torch.zeros(1, 6), top_k=2).tolist() == [[0.5, 0.5, 0, 0, 0, 0]]


def test_draws_follow_the_distribution():
    p = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.0]).double()
    generator = torch.Generator().manual_seed(0)
    counts = Counter(sample.draw(p.repeat(5000, 1), generator).tolist())
    for i in range(5):
        assert abs(counts[i] / 5000 - p[i]) < 4 * (p[i] * (1 - p[i]) / 5000) ** 0.5 + 1e-9


def test_logits_that_are_not_finite_are_an_error():
    with pytest.raises(checkpoint.CheckpointError, match="not finite"):
        sample.next_probs(torch.tensor([[0.0, float("nan")]]))


# --- text ---

def test_sample_text_disturbs_nothing():
    _, model = tiny(**{"model.dropout": "0.5"})
    model.train()
    state = torch.random.get_rng_state()
    text = sample.sample_text(model, BYTE, "def", 20, seed=3)
    assert model.training and torch.equal(state, torch.random.get_rng_state())
    assert text.startswith("def") and text == sample.sample_text(model, BYTE, "def", 20, seed=3)
    assert text != sample.sample_text(model, BYTE, "def", 20, seed=4)


def test_an_empty_prompt_starts_on_a_new_line_or_at_id_0():
    assert sample.encode_prompt(BYTE, "") == [10]
    assert sample.encode_prompt(Tokenizer.from_chars("abc"), "") == [0]
    assert sample.encode_prompt(Tokenizer.from_chars("ab\n"), "") == [0] and "\n" < "a"
    with pytest.raises(DataError, match="'z'"):
        sample.encode_prompt(Tokenizer.from_chars("abc"), "abz")


def plain(said, table={}):
    """The pieces shown of one sequence that says these bytes."""
    steps = [sample.Step(torch.tensor([byte]), []) for byte in said]
    return [piece for (piece,) in terminal.plain_pieces(steps, BYTE, "", 1, table)]


def test_bytes_wait_until_they_are_a_character():
    assert plain("aé😀b".encode()) == ["", "a", "", "é", "", "", "", "😀", "b", ""]
    assert "".join(plain(b"\xc3A\xff\xf0\x9f")) == "\ufffdA\ufffd\ufffd"
    assert plain(b"\xe2") == ["", "", "\ufffd"]                         # nothing is swallowed at the end


def test_a_terminal_is_not_given_escape_codes():
    assert "".join(plain(b"\x1b[2J\r\n\tA\x07", terminal.PLAIN)) == "␛[2J␍\n\tA␇"


# --- experts ---

def test_marks_are_the_experts_of_the_full_forward_pass():
    config, model = tiny()
    marker, idx = terminal.Marker(1, colour=False), torch.tensor([list(b"ab c")])
    steps = list(sample.generate(model, idx, 7, temperature=0))
    said = "".join(p for (p,) in marker.pieces(steps, BYTE, idx))
    text = torch.cat([idx, ids_of(steps)[:, :6]], 1)        # 4 + 6 of the 7: the last was never read
    experts = model(text, cache=model.new_cache(1)).stats[1].top_expert[0].tolist()
    assert said == "".join(marker.mark(bytes([token]), e) for e, token in zip(experts, text[0]))
    assert said.startswith(f"[{experts[0]}]a[{experts[1]}]b[{experts[2]}]␣[{experts[3]}]c[")
    assert marker.counts == Counter(experts)


@pytest.mark.parametrize("cache", [True, False])
def test_marks_past_the_block_are_those_of_the_newest_token(cache):
    """A window that is read again brings older tokens along, which were shown before."""
    _, model = tiny()
    marker, idx = terminal.Marker(1, colour=False), torch.tensor([list(b"ab c")])
    steps = list(sample.generate(model, idx, 20, temperature=0, cache=cache))
    said = "".join(p for (p,) in marker.pieces(steps, BYTE, idx))
    newest = [(int(t.ids), int(step.stats[1].top_expert[0, -1])) for t, step in zip(steps, steps[1:])]
    assert said.endswith("".join(marker.mark(bytes([token]), expert) for token, expert in newest))
    assert marker.counts.total() == 4 + 19


def test_white_space_and_stray_bytes_are_visible():
    plain, colour = terminal.Marker(0, False), terminal.Marker(0, True)
    plain.n_expert = colour.n_expert = 4
    assert [plain.mark(b, 3) for b in (b" the", b"\n", b"\n\n  ", b"\t", b"\xe2", b"\x1b", "é".encode())] == [
        "[3]␣the", "[3]↵\n", "[3]↵\n↵\n␣␣", "[3]⇥", "[3]\\xe2", "[3]␛", "[3]é"]
    on, off = "\x1b[38;5;16;48;5;227m", "\x1b[0m"
    assert colour.mark(b"a b\n", 3) == f"{on}a b↵{off}\n"    # the background ends before the line does
    assert colour.mark(b"\n x", 3) == f"{on}↵{off}\n{on} x{off}"


def contrast(a, b):
    """WCAG contrast of two of xterm's 256 colours."""
    def luminance(i):
        levels = (0, 95, 135, 175, 215, 255)
        rgb = [8 + 10 * (i - 232)] * 3 if i >= 232 else [levels[(i - 16) // n % 6] for n in (36, 6, 1)]
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear))

    hi, lo = sorted((luminance(a), luminance(b)), reverse=True)
    return (hi + 0.05) / (lo + 0.05)


def test_colours_are_legible_and_sixteen_marks_differ():
    for c in terminal.COLOURS:
        assert contrast(c, 231 if c in terminal.WHITE_TEXT else 16) >= 4.5
    marker = terminal.Marker(0, True)
    marker.n_expert = 16
    assert len({marker.paint("x", e) for e in range(16)}) == 16
    marker.n_expert = 2**20                # a million experts: every mark is used
    assert len({marker.paint("x", e) for e in range(0, 2**20, 1000)}) == 16
    assert marker.paint("x", 0) == marker.paint("x", 2**16 - 1) != marker.paint("x", 2**16)


def test_legend():
    marker = terminal.Marker(2, False)
    marker.n_expert, marker.counts = 4, Counter({3: 6, 0: 2})
    head, shares = marker.legend().split("\n")
    assert "layer 2" in head and "2 of 4 experts" in head and "8 tokens" in head
    assert shares == "[0] 25%  [1] 0%  [2] 0%  [3] 75%"
    marker.n_expert, marker.counts = 2**20, Counter({e: e + 1 for e in range(40)})
    head, *shares = marker.legend().split("\n")
    shares = " ".join(shares).split()
    assert "16 most frequent" in head and shares[:2] == ["[39]", "5%"] and len(shares) == 32


# --- the program ---

def test_text_goes_to_stdout_and_the_rest_to_stderr(run_dir, capsys, monkeypatch):
    argv = [run_dir, "--prompt", "def", "--tokens", "20", "--seed"]
    status, out, err = program(capsys, *argv, "2")
    assert status == 0 and out.startswith("def") and "20 tokens in" in err and "tokens/s" in err
    assert out == sample.sample_text(tiny()[1], BYTE, "def", 20, seed=2) + "\n"
    cached, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *a, **k: cached.append(a[7]) or generate(*a, **k))
    assert program(capsys, *argv, "2", "--no-cache")[1] == program(capsys, *argv, "2")[1] == out
    assert cached == [False, True]
    assert program(capsys, *argv, "3")[1] != out


def test_several_texts_each_under_its_number(run_dir, capsys):
    _, out, err = program(capsys, run_dir, "--num", "3", "--tokens", "9", "--seed", "4")
    texts = ["".join(t) for t in out.split("--- ")[1:]]
    assert [t[0] for t in texts] == ["0", "1", "2"] and "27 tokens" in err
    alone = program(capsys, run_dir, "--tokens", "9", "--seed", "6")[1]
    assert out.endswith("--- 2 ---\n" + alone)


def test_show_experts_without_a_terminal(run_dir, capsys):
    _, out, err = program(capsys, run_dir, "--prompt", "ab\n", "--tokens", "5", "--show-experts")
    assert out.count("[") >= 8 + 4 and "\x1b" not in out and "↵\n" in out and "layer 1" in out
    assert "layer 0" in program(capsys, run_dir, "--tokens", "5", "--show-experts", "0")[1]


def test_show_experts_prints_a_prompt_beyond_the_block_unmarked(run_dir, capsys):
    _, out, err = program(capsys, run_dir, "--prompt", "0123456789abcdefg", "--tokens", "3", "--show-experts")
    assert out.startswith("0123456789a[") and err.count("prompt has 17 tokens") == 1 and "last 6" in err


def test_what_is_said_about_the_model(tmp_path, capsys):
    parents = [dict(kind="train", parents=[]), dict(kind="upcycle", n_expert=4, parents=[dict(kind="train")])]
    cases = {"expert_choice": ("expert_choice", {}, None, ["looks across the batch", "own best scores"]),
             "capacity": ("capacity", {}, None, ["eval_capacity_factor = 0.5"]),
             "mixed": ("topk", {}, dict(kind="mix", top_k=2, parents=parents),
                       ["made by: mix top_k=2 [train, upcycle n_expert=4 [train]]"]),
             "plain": ("topk", {}, dict(kind="train", parents=[]), [])}
    for folder, (name, more, ancestry, said) in cases.items():
        (tmp_path / folder).mkdir()
        path = save_run(tmp_path / folder, name, ancestry=ancestry, **more)
        lines = program(capsys, path, "--tokens", "2")[2].splitlines()
        assert len(lines) == (2 if said else 1)
        assert all(words in lines[0] for words in said)


@pytest.mark.parametrize("argv, words", [
    ([], "RUN_DIR"),
    (["RUN", "--top_p", "0"], "--top_p 0.0 must be above 0"), (["RUN", "--top_p", "1.5"], "--top_p 1.5"),
    (["RUN", "--temperature", "-1"], "--temperature"), (["RUN", "--temperature", "nan"], "--temperature nan"),
    (["RUN", "--top_k", "-1"], "--top_k"), (["RUN", "--num", "0"], "--num"),
    (["RUN", "--tokens", "0"], "--tokens"),
    (["RUN", "--tokens", "many"], "--tokens"), (["RUN", "--seed", "-1"], "--seed"),
    (["RUN", "--show-experts", "2"], "--show_experts 2: the sparse layers are 0, 1"),
    (["RUN", "--show-experts", "-1"], "--show_experts"), (["RUN", "--device", "tpu"], "--device"),
    (["RUN", "--temprature", "1"], "did you mean --temp"), (["RUN", "--prompt", "\udcff"], "not valid")])
def test_mistakes_are_one_line_and_status_2(run_dir, capsys, argv, words):
    status, out, err = program(capsys, *(run_dir if a == "RUN" else a for a in argv))
    assert status == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


@pytest.mark.parametrize("argv, words", [
    (["RUN", "--threads", "-1"], "--threads"), ([""], "is empty"), (["RUN", "--top_k", "9" * 30], "--top_k"),
    (["RUN", "--num", "9" * 30], "--num"), (["RUN", "--num", "1000000000"], "of memory, there are"),
    (["RUN", "--seed", "9" * 5000], "--seed"), (["no\x1b[2J"], r"no\x1b[2J: no such run folder"),
    (["a\0b"], r"a\x00b: cannot be read"), (["x" * 300], "name too long")])
def test_values_that_nobody_thought_of_are_one_line(run_dir, capsys, argv, words):
    status, out, err = program(capsys, *(run_dir if a == "RUN" else a for a in argv))
    assert status in (1, 2) and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and "\x1b" not in err and words in err


def test_small_steps_take_one_thread_unless_somebody_says_otherwise(run_dir, capsys, monkeypatch):
    """And training, which may come after it in this process, has the number that it had."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    argv, torchs = [run_dir, "--tokens", "3"], torch.get_num_threads()
    torch.set_num_threads(2)
    assert program(capsys, *argv)[2].endswith(" tokens/s, 1 thread\n") and torch.get_num_threads() == 2
    assert program(capsys, *argv, "--threads", "3")[2].endswith(", 3 threads\n") and torch.get_num_threads() == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert program(capsys, *argv)[2].endswith(", 2 threads\n")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert device.choose_threads(0, device.SMALL, "cpu") == "2 threads"
    assert device.choose_threads(0, 1, "cuda") == "2 threads"
    torch.set_num_threads(torchs)


def test_names_in_an_ancestry_reach_no_terminal_as_control_characters(tmp_path, capsys):
    path = save_run(tmp_path, ancestry=dict(kind="mix", run="a\x1b[2Jb", parents=[dict(kind="train\x07")]))
    _, _, err = program(capsys, path, "--tokens", "2")
    assert "made by: mix run=a␛[2Jb [train␇]" in err


def test_a_folder_without_a_run_is_one_line_and_status_1(capsys):
    status, out, err = program(capsys, "nowhere")
    assert status == 1 and not out and err.startswith("error: nowhere: no such run folder") and err.count("\n") == 1


def test_characters_never_seen_and_dense_models_have_their_errors(tmp_path, capsys):
    path = save_run(tmp_path, "dense", Tokenizer.from_chars("abc"))
    for argv, words in [(["--prompt", "abz"], "'z'"), (["--show-experts"], "dense")]:
        status, _, err = program(capsys, path, *argv)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and words in err
    status, out, _ = program(capsys, path, "--tokens", "30")            # no newline in its alphabet
    assert status == 0 and set(out.strip()) <= set("abc") and len(out) == 31


def test_help_lists_every_option_with_its_default(capsys):
    status, out, _ = program(capsys, "--help")
    options = [a for a in sample.sample_parser("")._actions if a.option_strings and a.dest != "help"]
    assert status == 0 and len(options) == 12
    for action in options:
        assert action.option_strings[0] in out and "(default: " in action.help


def test_a_reader_that_leaves_ends_it_quietly(run_dir, capfd, monkeypatch):
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert sample.main([run_dir, "--tokens", "50"]) == 141
    assert capfd.readouterr().err == ""


def test_ctrl_c_ends_it_quietly_and_text_came_before(run_dir, capsys, monkeypatch):
    generate = sample.generate

    def interrupted(*args):
        for n, step in enumerate(generate(*args)):
            if n == 5:
                raise KeyboardInterrupt
            yield step

    whole = program(capsys, run_dir, "--tokens", "50", "--show-experts")[1]
    monkeypatch.setattr(sample, "generate", interrupted)
    status, out, err = program(capsys, run_dir, "--tokens", "50", "--show-experts")
    assert status == 130 and err == "\ninterrupted\n" and len(out) > 5 * 4 and whole.startswith(out.removesuffix("\n"))


def test_colours_are_for_terminals_without_no_color(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for no_color, term, coloured in [("", "xterm", True), ("1", "xterm", False), ("", "dumb", False)]:
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setenv("TERM", term)
        out = program(capsys, run_dir, "--prompt", "ab", "--tokens", "3", "--show-experts")[1]
        assert ("\x1b[" in out) == coloured and ("[0]" in out) != coloured
