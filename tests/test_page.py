"""lab/page.py: the page holds what the model routes, is small, takes any text, and works in a real browser."""
import base64
import json
import re
import shutil
import subprocess
from html import unescape
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.tokenizers import Tokenizer
from grow.parents import open_parents
from grow.routing import expert_shares
from lab import page
from runtime import checkpoint
from tiny import KINDS, model_of

TEXT = "def f(x):\r\n\treturn </script><b>&amp; 'ä' + \"é😀\" # x\n\n"
CORPORA = {"words": "the cat sat on the mat. " * 60, "numbers": "1 + 2 = 3; 44 - 7 = 37\n" * 60,
           "lines": "\n- \n" * 300, "caps": "SHOUT, LOUDER! " * 80}


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small cost more to share out than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_run(folder, kind, log=None, more=()):
    """A run folder with an untrained model of a kind; log: (steps, text of the loads of step s)."""
    plain = {"ffn.dispatch": "loop", "ffn.peer_path": "readable"}           # interpreted kernels crawl
    model = model_of(kind, plain | {"model.vocab_size": 256} | dict(more)).eval()
    folder.mkdir()
    header = dict(step=1, config=model.config.to_dict(), tokenizer=Tokenizer.byte().to_dict(),
                  ancestry=dict(kind="train", parents=[]))
    checkpoint.save(folder / "ckpt_best.pt", header, model.state_dict())
    if log:
        steps, loads = log
        rows = [f"{step},1.5,{loads(step)}" for step in range(1, steps + 1)]
        (folder / "log.csv").write_text("\r\n".join(["step,loss,expert_load", *rows, ""]), newline="")
    return model


def several(tmp_path, names):
    """Settings of a run on corpora of these names."""
    for name in names:
        (tmp_path / f"{name}.txt").write_text(CORPORA[name])
    return {"data.name": [str(tmp_path / f"{name}.txt") for name in names], "data.dir": str(tmp_path / "prepared"),
            "train.batch_size": 4, "train.eval_batches": 2}


def program(capsys, *argv):
    try:
        status = page.main([str(a) for a in argv])
    except SystemExit as e:
        status = e.code
    return SimpleNamespace(status=status, **capsys.readouterr()._asdict())


def data_of(path):
    """The data in a page, unpacked."""
    text = path.read_text("utf-8")
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    data["at"], data["loss"] = numbers(data["at"]), numbers(data["loss"])
    for layer in data["layers"]:
        layer["experts"] = numbers(layer["experts"]).reshape(len(data["at"]), layer["kept"])
        gates = layer["gates"]
        layer["gates"] = numbers(gates["packed"]).reshape(len(data["at"]), -1) / 255 * gates["top"]
        layer["step"] = gates["top"] / 255
    return data


def numbers(packed):
    width, text = packed.split(":")
    return np.frombuffer(base64.b64decode(text), f"<u{width}").astype(np.int64)


def routed(model, ids, domain=None):
    """Stats of a plain forward pass; where experts choose, as in generation."""
    x = torch.tensor([list(ids)])
    ahead = any(getattr(b.ffn, "router", None) and b.ffn.router.traits.across == "always" for b in model.blocks)
    with torch.no_grad():
        return model(x, cache=model.new_cache() if ahead else None, domain=domain)


# --- what the page holds ---

@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_makes_a_page_of_what_it_routes(kind, tmp_path, capsys):
    model, text = save_run(tmp_path / "run", kind), "a b, 17."
    result = program(capsys, tmp_path / "run", "--prompt", text)
    assert result.status == 0 and result.out.splitlines()[-1] == str(tmp_path / "run" / "page.html")
    data, out = data_of(tmp_path / "run" / "page.html"), routed(model, text.encode())
    assert [layer["layer"] for layer in data["layers"]] == model.sparse == ([] if kind == "dense" else [0, 1])
    assert "".join(data["words"][i][0] for i in data["at"]) == text
    for layer in data["layers"]:
        stats = out.stats[layer["layer"]]
        assert layer["n_expert"] == model.blocks[layer["layer"]].ffn.n_expert
        assert layer["experts"][:, 0].tolist() == stats.top_expert[0].tolist()
        if stats.routing is None:                               # PEER tells the first expert alone
            assert layer["gates"].size == 0 and layer["k"] == 4 and layer["kept"] == 1
            continue
        experts, gates = (t.numpy() for t in stats.routing.by_token())
        assert layer["k"] == layer["kept"] == experts.shape[1]
        for t, row in enumerate(layer["experts"]):
            true = dict(zip(experts[t], gates[t]))
            assert set(row) == set(true)
            # rounded, and what is more than 0 up to the first step
            true = np.maximum([true[e] for e in row], layer["step"])
            assert np.allclose(layer["gates"][t], true, atol=0.51 * layer["step"])
            assert (np.diff(layer["gates"][t]) <= 0).all()
    # a token's loss is that of the logits before it
    nats = -out.logits[0].log_softmax(-1)
    true = [nats[t - 1, byte].item() for t, byte in enumerate(text.encode()) if t]
    assert data["loss"][0] == page.UNKNOWN and np.allclose(data["loss"][1:] / 1000, true, atol=6e-4)


def test_a_long_text_is_read_in_windows_that_overlap_by_half(tmp_path, capsys):
    """Each token is routed as after the tokens of its window alone; windows begin at 0, 6, 12, ... of block 12."""
    model, text = save_run(tmp_path / "run", "topk"), bytes(range(48, 91)).decode()
    assert program(capsys, tmp_path / "run", "--prompt", text).status == 0
    data = data_of(tmp_path / "run" / "page.html")
    assert len(data["at"]) == 43 and data["block"] == 12
    for t in range(43):
        start = 0 if t < 12 else t // 6 * 6 - 6
        out = routed(model, text.encode()[start:t + 1])
        for layer in data["layers"]:
            assert layer["experts"][t, 0] == out.stats[layer["layer"]].top_expert[0, -1]
        if t:
            loss = -out.logits[0, -2].log_softmax(-1)[ord(text[t])].item()
            assert abs(data["loss"][t] / 1000 - loss) < 6e-4


@given(st.integers(1, 200), st.integers(1, 40))
def test_windows_show_every_token_once(n, block):
    shown, longest = [], 0
    for start, new in page.windows(n, block):
        end = min(start + block, n)
        shown += range(start + new, end)
        longest = max(longest, end - start)
        assert start == new == 0 or new >= block // 2
    assert shown == list(range(n)) and longest <= block


def test_of_many_experts_a_page_holds_those_of_the_largest_gates(tmp_path, capsys, monkeypatch):
    model = save_run(tmp_path / "run", "soft")
    monkeypatch.setattr(page, "CHOICES", 2 * 8 * 2 * 3)             # 2 layers, 8 tokens, 2 bytes: 3 choices fit
    assert program(capsys, tmp_path / "run", "--prompt", "a b, 17.").status == 0
    layer = data_of(tmp_path / "run" / "page.html")["layers"][0]
    _, gates = routed(model, b"a b, 17.").stats[0].routing.by_token()
    assert layer["k"] == 4 and layer["kept"] == 3
    assert np.allclose(layer["gates"], gates.sort(-1, descending=True).values[:, :3], atol=0.51 * layer["step"])


def test_a_page_of_2000_tokens_and_8_layers_is_at_most_300_kb(tmp_path, capsys):
    loads = ";".join(" ".join(str(100 + e) for e in range(64)) for _ in range(8))
    more = {"model.n_layer": 8, "model.block_size": 96, "ffn.n_expert": 64, "ffn.top_k": 8, "ffn.dispatch": "padded"}
    save_run(tmp_path / "run", "topk", (500, lambda step: loads), several(tmp_path, CORPORA) | more)
    text = "".join(chr(code) for code in np.random.default_rng(0).integers(32, 700, 1100))
    (tmp_path / "text").write_text(text, "utf-8")
    result = program(capsys, tmp_path / "run", "--text", tmp_path / "text", "--out", tmp_path)
    assert result.status == 0 and result.out.splitlines()[-1] == str(tmp_path / "page.html")
    data = data_of(tmp_path / "page.html")
    assert len(data["at"]) == 2000 and len(data["layers"]) == 8 and "the first of its" in data["source"]
    assert all(layer["kept"] >= 4 and isinstance(layer["map"], dict) for layer in data["layers"])
    assert (tmp_path / "page.html").stat().st_size <= 300_000


def test_the_load_is_that_of_the_log(tmp_path, capsys):
    save_run(tmp_path / "run", "topk", (200, lambda step: f"{step} 0 1 {299 - step};10 10 10 10"))
    assert program(capsys, tmp_path / "run", "--prompt", "abc").status == 0
    load = data_of(tmp_path / "run" / "page.html")["layers"][0]["load"]
    assert len(load["steps"]) == page.STEPS and load["steps"][0][0] == 1 and load["steps"][-1][1] == 200
    share = numbers(load["shares"]["packed"]).reshape(page.STEPS, 4) / 255 * load["shares"]["top"]
    middle = np.mean(load["steps"], 1)
    assert np.allclose(share[:, 0], middle / 300, atol=0.003)
    assert (share[:, 1] == 0).all() and (share[:, 2] > 0).all()     # little is not nothing


@pytest.mark.parametrize("kind, why", [("topk", "was not trained"), ("peer", "16 experts")])
def test_without_logged_loads_the_page_says_why(kind, why, tmp_path, capsys):
    save_run(tmp_path / "run", kind)
    assert program(capsys, tmp_path / "run", "--prompt", "abc").status == 0
    assert why in data_of(tmp_path / "run" / "page.html")["layers"][0]["load"]


def test_maps_and_text_are_of_the_runs_own_validation_text(tmp_path, capsys):
    save_run(tmp_path / "run", "topk", more=several(tmp_path, ["words", "numbers"]))
    assert program(capsys, tmp_path / "run", "--tokens", 100).status == 0
    data = data_of(tmp_path / "run" / "page.html")
    assert [n for _, n in data["pieces"]] == [50, 50]
    assert "".join(data["words"][i][0] for i in data["at"][:50]) in CORPORA["words"]
    parent, = open_parents([tmp_path / "run"])
    shares = expert_shares(parent, parent.corpora)
    for layer in data["layers"]:
        for name, row in zip(parent.corpora, layer["map"]["share"]):
            true = shares[name, layer["layer"]]["top"][layer["map"]["experts"]]
            assert np.allclose(np.array(row) / 1000, true, atol=6e-4)


def test_maps_are_counted_over_so_many_tokens_at_most(tmp_path, monkeypatch):
    save_run(tmp_path / "run", "topk", more=several(tmp_path, ["words", "numbers"]))
    tokens = []
    for most in (page.COUNTED, 36, 1):
        monkeypatch.setattr(page, "COUNTED", most)
        parent, = open_parents([tmp_path / "run"])
        assert list(page.maps_of(parent)) == parent.model.sparse
        train, block = parent.config.train, parent.config.model.block_size
        tokens.append(train.batch_size * train.eval_batches * block)
    assert tokens == [4 * 2 * 12, 36, 12]                       # a window at least


def test_a_router_that_goes_by_the_corpus_knows_it(tmp_path, capsys):
    save_run(tmp_path / "run", "domain", more=several(tmp_path, CORPORA))
    assert program(capsys, tmp_path / "run", "--tokens", 80).status == 0
    data = data_of(tmp_path / "run" / "page.html")
    assert data["layers"][0]["experts"][:, 0].tolist() == np.repeat(range(4), 20).tolist()
    assert data["layers"][0]["map"]["share"] == (1000 * np.eye(4)).tolist()


def test_a_map_shows_the_busiest_of_many_experts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(page, "COLUMNS", 3)
    save_run(tmp_path / "run", "peer", more=several(tmp_path, ["words", "numbers"]))
    assert program(capsys, tmp_path / "run", "--prompt", "abc").status == 0
    shown = data_of(tmp_path / "run" / "page.html")["layers"][0]["map"]
    parent, = open_parents([tmp_path / "run"])
    total = sum(share["top"] for (_, layer), share in expert_shares(parent, parent.corpora).items() if layer == 0)
    assert len(shown["experts"]) == 3 and total[shown["experts"][0]] == total.max()
    assert sorted(total)[-3:] == sorted(total[shown["experts"]])


# --- any text ---

@given(st.text(), st.data())
def test_any_text_in_any_cut_is_spelt_whole(text, data):
    raw, tokens = text.encode(), []
    while raw:
        n = data.draw(st.integers(1, 5))
        tokens, raw = [*tokens, raw[:n]], raw[n:]
    spelt = page.spell(tokens)
    assert "".join(word for word, _ in spelt) == text.translate(page.SIGNS)
    for token, (word, partial) in zip(tokens, spelt):
        assert partial in ("", token.hex(" ").upper())
        assert partial or word == token.decode().translate(page.SIGNS)


def test_bytes_inside_a_character_are_shown_until_it_is_complete():
    assert page.spell([bytes([b]) for b in "a😀\r\n".encode() + b"\xff"]) == [
        ("a", ""), ("", "F0"), ("", "9F"), ("", "98"), ("😀", "80"), ("←", ""), ("↵\n", ""), ("", "FF")]


@pytest.mark.parametrize("token, kind", [(b"a", "letters"), (b"Z", "letters"), (b"7", "digits"), (b"\n ", "spaces"),
                                         (b" the", "letters"), (b"{", "punctuation"), (b"\x00", "other ASCII"),
                                         (b"\xc3", "non-ASCII"), ("é".encode(), "non-ASCII")])
def test_kinds_of_characters(token, kind):
    assert page.KINDS[page.kind_of(token)] == kind


def test_no_text_leaves_its_element(tmp_path, capsys):
    save_run(tmp_path / "run", "topk")
    assert program(capsys, tmp_path / "run", "--prompt", TEXT).status == 0
    whole, empty = (tmp_path / "run" / "page.html").read_text("utf-8"), page.TEMPLATE.read_text("utf-8")
    assert [whole.count(sign) for sign in "<>&"] == [empty.count(sign) for sign in "<>&"]
    data = data_of(tmp_path / "run" / "page.html")
    assert "".join(data["words"][i][0] for i in data["at"]) == TEXT.translate(page.SIGNS)


def test_the_page_asks_nobody_for_anything():
    text = page.TEMPLATE.read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]+\.|\bsrc=|\burl\(|@import|\bfetch\(|<link", text)
    assert "default-src 'none'" in text


# --- refusals ---

def refusals(folder):
    (folder / "empty").write_text("")
    (folder / "binary").write_bytes(b"\xff\xfe\x00")
    (folder / "not a run").mkdir()
    save_run(folder / "run", "topk")
    run = folder / "run"
    return {"no folder": ([folder / "none"], "no such run folder"),
            "no checkpoint": ([folder / "not a run"], "holds no checkpoint"),
            "both": ([run, "--text", folder / "empty", "--prompt", "a"], "not allowed with"),
            "empty prompt": ([run, "--prompt", ""], "--prompt is empty"),
            "empty file": ([run, "--text", folder / "empty"], "empty is empty"),
            "no file": ([run, "--text", folder / "gone"], "cannot be read"),
            "a folder": ([run, "--text", folder], "cannot be read"),
            "binary": ([run, "--text", folder / "binary"], "no text in UTF-8"),
            "no tokens": ([run, "--prompt", "a", "--tokens", 0], "at least 1"),
            "option": ([run, "--txt", "a"], "did you mean --text")}


def test_refusals_are_one_line_and_status_2(tmp_path, capsys):
    for name, (argv, why) in refusals(tmp_path).items():
        result = program(capsys, *argv)
        assert result.status == 2 and why in result.err and result.err.count("\n") == 1, (name, result)
        assert not result.out


def test_help_says_that_nothing_is_generated(capsys):
    result = program(capsys, "--help")
    assert result.status == 0 and "Nothing is generated" in " ".join(result.out.split())


# --- colours ---

def schemes():
    """{scheme: {name: colour}} of the page's palettes."""
    text = page.TEMPLATE.read_text("utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
                   for block in re.findall(r":root \{(.*?)\}", text, re.S))
    return dict(light=light, dark=light | dark)


def luminance(colour):
    """Relative luminance of #rrggbb as WCAG 2 defines it."""
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a, b):
    high, low = sorted([luminance(a), luminance(b)], reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_a_contrast_of_at_least_4_5(scheme):
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    colours = schemes()[scheme]
    pairs = [name for name in colours if f"{name}-text" in colours]
    assert len(pairs) == 2 + 8 + 6
    for name in pairs:
        assert contrast(colours[name], colours[f"{name}-text"]) >= 4.5, name
    # steps from little to much go one way, and are told apart without colour
    steps = [luminance(colours[f"a{i}"]) for i in range(6)]
    assert sorted(steps, reverse=scheme == "light") == steps


# --- in a browser ---

BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome", "chrome"])), None)
browser = pytest.mark.skipif(not BROWSER, reason="no Chromium")
PLAY = """<script>
const found = {};
const key = (name) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: name, bubbles: true}));
const token = i => document.querySelectorAll(".token")[i];
const classes = () => [...document.querySelectorAll(".token")].map(t => t.className).join("|");
const told = () => document.getElementById("told").innerText;
const record = (name, value) => { found[name] = value; };
%s
const shown = Object.assign(document.createElement("pre"), {id: "found", textContent: JSON.stringify(found)});
document.body.replaceChildren(shown);
</script>"""


def play(path, script, *flags):
    """What a script records in the page, and the attributes of its root element."""
    copy = path.with_name("played.html")
    copy.write_text(path.read_text("utf-8") + PLAY % script, "utf-8")
    done = subprocess.run([BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000",
                           f"--user-data-dir={path.parent / 'profile'}", *flags, "--dump-dom", f"file://{copy}"],
                          capture_output=True, text=True, timeout=60)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    root = dict(re.findall(r'data-(\w+)="([^"]*)"', re.search("<html[^>]*>", done.stdout)[0]))
    assert root.get("ready") == "1" and "error" not in root, root
    return json.loads(unescape(found[1]))


@browser
def test_keys_and_switches_work_in_a_browser(tmp_path, capsys):
    save_run(tmp_path / "run", "topk", (30, lambda step: f"{step} 0 1 {99 - step};10 10 10 10"))
    assert program(capsys, tmp_path / "run", "--prompt", TEXT).status == 0
    data = data_of(tmp_path / "run" / "page.html")
    found = play(tmp_path / "run" / "page.html", """
        record("text", [...document.querySelectorAll(".token")].map(t => t.innerText).join(""));
        record("lines", document.getElementById("text").textContent.split("\\n").length);
        record("injected", document.querySelectorAll("#text b").length);
        record("layers", [...document.getElementById("layer").options].map(o => o.textContent));
        record("tab stops", document.querySelectorAll(".token[tabindex='0']").length);
        const before = classes();
        token(0).focus();
        record("first", told());
        key("ArrowRight"); key("ArrowRight"); key("ArrowLeft");
        record("second", [told(), document.activeElement === token(1), token(1).tabIndex, token(0).tabIndex]);
        key("End");
        record("end", document.activeElement.getAttribute("aria-label"));
        key("Home"); key("ArrowLeft");
        record("home", document.activeElement === token(0));
        key("ArrowDown");
        record("down", [document.getElementById("layer").selectedIndex, classes() !== before, told()]);
        const select = document.getElementById("layer");
        select.selectedIndex = 2;
        select.dispatchEvent(new Event("change"));
        record("loss", [classes().includes("e0"), document.getElementById("per-layer").hidden, told()]);
        select.selectedIndex = 0;
        select.dispatchEvent(new Event("change"));
        record("again", classes() === before);
        token(3).dispatchEvent(new MouseEvent("mouseover", {bubbles: true}));
        record("hover", told());
        document.getElementById("numbers").click();
        record("numbers", getComputedStyle(token(0), "::after").content);
        const bars = () => [...document.querySelectorAll(".bar")].map(b => b.innerText.split("\\n")[0]);
        record("late", bars());
        document.getElementById("step").value = 0;
        document.getElementById("step").dispatchEvent(new Event("input"));
        record("early", [bars(), document.getElementById("bars").getAttribute("aria-label")]);
        document.querySelector("[data-expert='2']").click();
        record("alone", [...new Set([...document.querySelectorAll(".token")].map(t => t.className.trim()))].sort());
        record("pressed", document.activeElement.getAttribute("aria-pressed"));
        record("unlabelled", [...document.querySelectorAll("select, input")].filter(e => !e.labels.length).length);
        // a window is never this narrow, but below 40rem
        document.documentElement.style.width = "320px";
        record("width", [matchMedia("(max-width: 40rem)").matches, document.documentElement.clientWidth,
                         document.documentElement.scrollWidth, document.body.scrollWidth]);""", "--window-size=320,700")
    first, second = data["layers"]

    def line(layer, t):
        return ", ".join(f"expert {e} gate {g:.2f}" for e, g in zip(layer["experts"][t], layer["gates"][t]))

    assert found["text"].replace("\n", "").startswith("def f(x):←↵⇥return </script><b>&amp; '")
    assert "C3" in found["text"] and "80😀" in found["text"]
    assert found["lines"] == 1 + TEXT.count("\n") and found["injected"] == 0
    assert found["layers"] == ["layer 0: experts", "layer 1: experts", "loss of each token"]
    assert found["tab stops"] == 1
    assert line(first, 0) in found["first"] and "nothing stands before it" in found["first"]
    assert line(first, 1) in found["second"][0] and found["second"][1:] == [True, 0, -1]
    # nats and the probability agree, of an unlikely token to two digits
    nats = data["loss"][1] / 1000
    percent = float(re.search("probability ([0-9.]+) %", found["second"][0])[1])
    assert f"loss {nats:.2f} nats" in found["second"][0] and percent == pytest.approx(100 * np.exp(-nats), rel=0.06)
    assert found["end"] == "line feed" and found["home"]
    assert found["down"][:2] == [1, True] and line(second, 0) in found["down"][2]
    assert found["loss"][:2] == [False, True] and "expert" not in found["loss"][2].split("\n")[0]
    assert found["again"] and "space" in found["hover"] and line(first, 3) in found["hover"]
    assert found["numbers"] == f'"{first["experts"][0, 0]}"'
    assert found["late"] == ["30 %", "0 %", "1 %", "69 %"] and found["early"][0] == ["1 %", "0 %", "1 %", "98 %"]
    assert found["early"][1].startswith("step 1: expert 0 1 %")
    assert set(found["alone"]) <= {"token", "token e2"} and "token e2" in found["alone"]
    assert found["pressed"] == "true"
    assert found["unlabelled"] == 0 and found["width"][0] and found["width"][3] <= 320, found["width"]


@browser
@pytest.mark.parametrize("kind", ["dense", "peer", "expert_choice"])
def test_other_kinds_draw_themselves_in_the_dark(kind, tmp_path, capsys):
    save_run(tmp_path / "run", kind, more=several(tmp_path, ["words", "numbers"]))
    assert program(capsys, tmp_path / "run", "--tokens", 60).status == 0
    found = play(tmp_path / "run" / "page.html", """
        record("source", document.getElementById("source").innerText);
        record("hidden", document.getElementById("per-layer").hidden);
        record("rows", [...document.querySelectorAll("#map tbody tr")].map(r => r.cells.length));
        record("most", document.querySelector("#experts tbody th")?.innerText);
        record("load", document.getElementById("load-note").textContent);
        record("about", document.getElementById("about").textContent);
        record("page", getComputedStyle(document.body).backgroundColor);
        token(20).focus();
        record("told", told());""", "--force-dark-mode")
    data = data_of(tmp_path / "run" / "page.html")
    assert tuple(map(int, re.findall(r"\d+", found["page"]))) == tuple(bytes.fromhex(schemes()["dark"]["page"][1:]))
    if kind == "dense":
        assert "nothing to route" in found["source"] and found["hidden"] and "expert" not in found["told"]
        return
    assert not found["hidden"] and found["rows"] == [1 + data["layers"][0]["n_expert"]] * 2
    assert f"expert {data['layers'][0]['experts'][20, 0]}" in found["told"]
    if kind == "peer":
        count = np.bincount(data["layers"][0]["experts"][:, 0])
        assert "and 3 more" in found["told"] and "does not hold" in found["load"]
        assert count[int(found["most"])] <= count.max()
    else:
        assert "each token's own best scores" in found["about"]
