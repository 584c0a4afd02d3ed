"""The tokenizer.json of a published model, if it is byte-pair encoding of bytes, as a Tokenizer
that tiktoken runs.

There a list of merges says which pairs may be joined, and a table gives every token its id.
tiktoken joins any pair that makes a token, and its id is its priority. Both do the same if the ids
are in the order of the merges, and if the merges lead from the bytes of each token to that token:
then no other pair can make it. Both are checked, and whatever else these rules could mean otherwise
is refused.

Special tokens are not interpreted: no text is encoded as them. A chat template is not read.
"""
import regex

from data.binfile import DataError
from data.bpe import PATTERN
from data.foreign import MEGABYTE, read_json
from data.tokenizers import Tokenizer

NAME = "tokenizer.json"
# What the engine of these patterns (Oniguruma) and that of tiktoken do not read alike.
OTHERWISE = regex.compile(r"(?<!\[)\^|\$|\\[hHRXZzAGKkgbB]|\[\[:|&&")


class Refused(ValueError):
    """Why a tokenizer cannot be taken over."""


def characters():
    """{character: byte}: how these files write bytes as text: those that can be seen as themselves,
    the others from U+0100 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    shown = [chr(byte) for byte in seen] + [chr(256 + i) for i in range(len(others))]
    return dict(zip(shown, seen + others))


def want(true, why):
    if not true:
        raise Refused(why)


def pattern_of(rules):
    """The regular expression that cuts a text into words, from the pre_tokenizer."""
    rules = rules or {}
    steps = rules.get("pretokenizers", [rules])
    kinds = [step.get("type") for step in steps]
    want(kinds in (["ByteLevel"], ["Split", "ByteLevel"]),
         f"it cuts words by {' and '.join(map(str, kinds))}")
    want(not steps[-1].get("add_prefix_space", True), "it puts a space before every text")
    if kinds == ["ByteLevel"]:
        want(steps[0].get("use_regex", True), "it does not cut a text into words")
        return PATTERN
    want(not steps[1].get("use_regex", True), "it cuts words by two patterns")
    pattern = steps[0]["pattern"].get("Regex")
    want(pattern and steps[0]["behavior"] == "Isolated" and not steps[0].get("invert"),
         "its words are not what its pattern matches")
    want(not OTHERWISE.search(pattern), f"its pattern has {OTHERWISE.search(pattern)}")
    want(regex.compile(pattern).match("") is None, "its pattern matches nothing at all")
    # what the pattern leaves out is a word too
    return rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def joined(word, merges):
    """The tokens that merges {(a, b): priority} make of a token's bytes."""
    parts = [word[i:i + 1] for i in range(len(word))]
    while len(parts) > 1:
        found = [merges.get(pair, len(merges)) for pair in zip(parts, parts[1:])]
        at = found.index(min(found))
        if found[at] == len(merges):
            break
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts


def check_merges(tokens, pairs, whole_words):
    """Raises Refused unless tiktoken, which takes the ids for priorities, does what the merges say.
    tokens {bytes: id}; pairs: list of (bytes, bytes); whole_words: a word that is a token is taken
    as it is."""
    merges = {pair: i for i, pair in reversed(list(enumerate(pairs)))}
    made = list(dict.fromkeys(a + b for a, b in pairs))
    want(all(token in tokens for token in made), "a merge makes no token of its vocabulary")
    ids = [tokens[token] for token in made]
    want(ids == sorted(ids), "the ids of its tokens are not in the order of its merges")
    for token in made:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        every = whole_words and all(pair in merges for pair in splits if tokens.keys() >= {*pair})
        want(every or joined(token, merges) == [token],
             f"its merges do not lead to the token {token!r}")


def added_tokens(plain, specials, found):
    """Fills {id: text} of the special tokens and of those that are looked for in every text."""
    for token in plain.get("added_tokens") or []:
        (specials if token["special"] else found)[token["id"]] = token["content"]
        odd = [name for name in ("single_word", "lstrip", "rstrip")
               if token.get(name) and not token["special"]]
        want(not odd and token["content"],
             f"its added token {token['content']!r} is {' '.join(odd)}")
    normal = {bool(token.get("normalized")) for token in plain.get("added_tokens") or []
              if not token["special"]}
    want(len(normal) < 2, "it looks for added tokens in two rounds")


def convert(plain, vocab_size):
    """(Tokenizer, [what a reader should know]) of a parsed tokenizer.json. Raises Refused."""
    model, byte_of, notes = plain["model"], characters(), []
    want(model.get("type", "BPE") == "BPE", f"it is {model.get('type')}, not byte-pair encoding")
    want(not model.get("byte_fallback"),
         "it encodes characters, and bytes only where it knows none (byte_fallback)")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        want(not model.get(name), f"it has {name}")
    normalizer = (plain.get("normalizer") or {}).get("type")
    want(normalizer in (None, "NFC"), f"it changes the text first ({normalizer})")
    pattern = pattern_of(plain.get("pre_tokenizer"))
    specials, found = {}, {}
    added_tokens(plain, specials, found)
    # the table, and what merges make of it; a token that no merge makes is never read in a text
    def raw(text):
        return bytes(byte_of[c] for c in text)

    apart = specials | found
    tokens = {raw(text): i for text, i in model["vocab"].items() if i not in apart}
    pairs = [tuple(map(raw, merge.split(" ") if isinstance(merge, str) else merge))
             for merge in model["merges"]]
    want(all(len(pair) == 2 for pair in pairs), "a merge does not have two parts")
    want(all(bytes([byte]) in tokens for byte in range(256)), "not every byte is a token")
    check_merges(tokens, pairs, model.get("ignore_merges", False))
    made = {a + b for a, b in pairs}
    unread = {i for token, i in tokens.items() if len(token) > 1 and token not in made}
    if unread and model.get("ignore_merges"):
        raise Refused("it has whole words that no merge makes")
    table = {i: token for token, i in tokens.items()}
    table |= {i: text.encode() for i, text in apart.items()}
    want(len(table) == len(tokens) + len(apart), "two tokens have one id")
    want(all(type(i) is int and 0 <= i < vocab_size for i in table),
         f"it has ids beyond the {vocab_size} of the model")
    gaps = [i for i in range(max(table) + 1) if i not in table]
    table |= {i: b"<|%d|>" % i for i in gaps}
    if specials:
        notes.append(f"{len(specials)} special tokens are not interpreted: no text is encoded as "
                     "them")
    if normalizer:
        notes.append("text is taken as it is, and not brought into the form NFC first")
    return Tokenizer("imported", [table[i] for i in sorted(table)], pattern, sorted(found),
                     sorted({*specials, *unread, *gaps})), notes


def tokenizer_of(folder, vocab_size):
    """(Tokenizer, notes) of a model's folder; one of numbers alone, and why, where its rules are
    not known here. Raises DataError for a damaged file."""
    if not (folder / NAME).exists():
        why = f"the folder has no {NAME}"
    else:
        plain = read_json(folder, NAME, 256 * MEGABYTE)
        try:
            return convert(plain, vocab_size)
        except Refused as e:
            why = f"{NAME}: {e}"
        except (KeyError, TypeError, AttributeError, ValueError, regex.error) as e:
            raise DataError(f"{folder / NAME}: is no tokenizer ({type(e).__name__}: "
                            f"{str(e)[:200]}); download it again") from None
    return Tokenizer.numbers(vocab_size), [f"text is not read or written, only token ids: {why}"]
