"""What a terminal shows of generated text: control characters made visible, tokens marked with their experts."""
import codecs
from collections import Counter

from settings import ConfigError

# What a terminal would obey, as visible signs: an untrained byte model writes escape codes too.
CONTROLS = {i: 0x2400 + i for i in range(32)} | {127: 0x2421} | {i: 0xFFFD for i in range(128, 160)}
PLAIN = {i: sign for i, sign in CONTROLS.items() if chr(i) not in "\t\n"}
MARKED = CONTROLS | {ord("\t"): "⇥", ord("\n"): "↵\n"}              # a sign to colour, then the line's end
# Okabe and Ito's eight colours, the nearest of xterm's 256, as backgrounds under black or white text: legible
# on dark and light terminals, and as many as a colour-blind reader can tell apart. The next 8 are underlined.
COLOURS, WHITE_TEXT = (214, 74, 36, 227, 25, 166, 175, 240), (25, 240)
MARKS = 2 * len(COLOURS)


def plain_pieces(steps, tokenizer, prompt, num, table):
    """Yields lists of `num` texts, the prompt and then what each step adds. Bytes that are not yet a whole
    character wait for the rest of it; what never becomes one is U+FFFD. table: for str.translate."""
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(num)]
    yield [prompt.translate(table)] * num
    for step in steps:
        new = [d.decode(tokenizer.decode_bytes([i])) for d, i in zip(decoders, step.ids.tolist())]
        yield [text.translate(table) for text in new]
    yield [d.decode(b"", final=True) for d in decoders]


def pick_layer(text, sparse):
    """The sparse layer that --show_experts names. Raises ConfigError."""
    if not sparse:
        raise ConfigError("--show_experts: every layer of this model is dense, it has no experts to show")
    if text != "last" and not (text.isdecimal() and text in map(str, sparse)):
        raise ConfigError(f"--show_experts {text}: the sparse layers are {', '.join(map(str, sparse))}")
    return sparse[-1] if text == "last" else int(text)


class Marker:
    """Marks tokens with the experts that `layer` sent them to, in colour or as [3]token; counts them."""

    def __init__(self, layer, colour):
        self.layer, self.colour, self.counts, self.n_expert = layer, colour, Counter(), 0

    def pieces(self, steps, tokenizer, prompt_ids):
        """Like plain_pieces. The prompt's tokens are marked too: they are routed like all others, and there
        one knows what to expect. A token's expert is known once it is read, so the last Step shows none."""
        ids = prompt_ids                                                # (B, T) tokens that a step reads
        for step in steps:
            stats = step.stats[self.layer]
            self.n_expert = stats.load.numel()
            read = min(ids.shape[1], stats.top_expert.shape[1])         # below T: a prompt beyond the block
            rows = list(zip(ids.tolist(), stats.top_expert[:, -read:].tolist()))
            yield [tokenizer.decode(row[:-read])
                   + "".join(self.mark(tokenizer.decode_bytes([i]), e) for i, e in zip(row[-read:], experts))
                   for row, experts in rows]
            self.counts.update(e for _, experts in rows for e in experts)
            ids = step.ids.unsqueeze(1)

    def mark(self, token, expert):
        """A token's bytes, marked. White space is made visible; bytes that are no character are \\xNN."""
        text = token.decode("utf-8", "backslashreplace").translate(MARKED)
        if not self.colour:
            return f"[{expert}]{text.replace(' ', '␣')}"
        return "\n".join(line and self.paint(line, expert) for line in text.split("\n"))

    def paint(self, text, expert):
        """Text on its expert's colour. Where experts outnumber the marks, neighbours share one: in PEER those
        of near first sub-keys, in a fine-grained layer the slices of one expert."""
        mark = expert if self.n_expert <= MARKS else expert * MARKS // self.n_expert
        underline, colour = "4;" if mark >= len(COLOURS) else "", COLOURS[mark % len(COLOURS)]
        return f"\x1b[{underline}38;5;{231 if colour in WHITE_TEXT else 16};48;5;{colour}m{text}\x1b[0m"

    def legend(self):
        """Which mark is which expert, and its share of the tokens; of many experts the most frequent ones."""
        total, E, many = self.counts.total(), self.n_expert, self.n_expert > MARKS
        shown = self.counts.most_common(MARKS) if many else [(e, self.counts[e]) for e in range(E)]
        items = [f"{self.paint(f' {e} ', e) if self.colour else f'[{e}]'} {n / total:.0%}" for e, n in shown]
        head = (f"layer {self.layer}, the expert of largest weight: {len(self.counts)} of {E} experts for "
                f"{total} tokens" + (f"; the {len(items)} most frequent" if many else ""))
        return "\n".join([head, *("  ".join(items[i:i + 8]) for i in range(0, len(items), 8))])


def lineage(value):
    """An ancestry as one line: what was done, with what settings, and in brackets to what."""
    if isinstance(value, list):
        return ", ".join(map(lineage, value))
    if not isinstance(value, dict):
        return " ".join(str(value).split())
    own = [f"{k}={lineage(v)}" for k, v in value.items() if k not in ("kind", "parents", "config")]
    parents = [f"[{lineage(value['parents'])}]"] if value.get("parents") else []
    return " ".join([str(value.get("kind", "model")), *own, *parents])
