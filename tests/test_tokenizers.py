"""Tokenizers: lossless, exact, the same everywhere, and clear about what they cannot do."""
import json
import re
import time

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data import tokenizers
from data.binfile import DataError
from data.bpe import PATTERN, count_words, merge_word, train_bpe
from data.tokenizers import Tokenizer, split_pieces

SAMPLE = ("the cat sat on the mat, the other cat didn't: it's 1234 times 12 o'clock\n\n"
          "def then(self):\n    return self.then(them, there)   \r\n\tnaïve café 😀😀 тест\n") * 3
TRICKY = st.sampled_from("abt he\n\r\t  '!1239é😀\x1c\u2028\u00a0")
TEXT = st.text(alphabet=st.one_of(TRICKY, st.characters(codec="utf-8")))


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.from_bpe(train_bpe(count_words([SAMPLE]), 320))


def words_of(text):
    return count_words([text])


# --- lossless ---


@settings(max_examples=100, deadline=None)
@given(TEXT)
def test_byte_and_bpe_give_back_every_text(bpe, text):
    for tokenizer in (Tokenizer.byte(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.token_lengths()[ids].sum() == len(text.encode())
        assert tokenizer.encode_array(text).tolist() == ids


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8"), min_size=1))
def test_char_gives_back_its_own_alphabet(text):
    tokenizer = Tokenizer.from_chars(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text))
    assert [token.decode() for token in tokenizer.tokens] == sorted(set(text))


def test_partial_characters_decode_to_bytes():
    ids = Tokenizer.byte().encode("é")
    assert Tokenizer.byte().decode_bytes(ids[:1]) == "é".encode()[:1]
    assert Tokenizer.byte().decode(ids[:1]) == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(TEXT, st.integers(1, 9))
def test_pieces_encode_like_the_whole(bpe, text, size):
    pieces = list(split_pieces(text, size))
    assert "".join(pieces) == text
    whole = bpe._encoding.encode_ordinary(text)
    assert [i for piece in pieces for i in bpe._encoding.encode_ordinary(piece)] == whole


# --- the BPE trainer ---


def slow_bpe(words, vocab_size):
    """The definition, with everything counted anew for each merge."""
    tokens, split = [bytes([i]) for i in range(256)], {word: list(word.encode()) for word in words}
    while len(tokens) < vocab_size:
        counts = {}
        for word, ids in split.items():
            for pair in zip(ids, ids[1:]):
                counts[pair] = counts.get(pair, 0) + words[word]
        best = min(counts, key=lambda pair: (-counts[pair], pair), default=None)
        if best is None or counts[best] < 2:
            return tokens
        tokens.append(tokens[best[0]] + tokens[best[1]])
        split = {word: merge_word(ids, best, len(tokens) - 1) for word, ids in split.items()}
    return tokens


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aab bc\n", max_size=200), st.integers(257, 300))
def test_bpe_equals_the_slow_definition(text, vocab_size):
    assert train_bpe(words_of(text), vocab_size) == slow_bpe(words_of(text), vocab_size)


def test_bpe_equals_the_slow_definition_on_prose():
    assert train_bpe(words_of(SAMPLE), 340) == slow_bpe(words_of(SAMPLE), 340)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="aab bc", min_size=1, max_size=100))
def test_tiktoken_applies_the_merges_in_the_order_of_training(text):
    tokens = train_bpe(words_of(text), 300)
    assert len(set(tokens)) == len(tokens)
    expected = []
    for word in re.findall(r" ?[a-c]+|\s+(?!\S)|\s+", text):       # PATTERN, as far as this alphabet goes
        ids = list(word.encode())
        for new in range(256, len(tokens)):
            for pair in set(zip(ids, ids[1:])):
                if tokens[pair[0]] + tokens[pair[1]] == tokens[new]:
                    ids = merge_word(ids, pair, new)
        expected += ids
    assert Tokenizer.from_bpe(tokens).encode(text) == expected


def test_bpe_needs_only_the_counts():
    words = words_of(SAMPLE)
    backwards = dict(reversed(list(words.items())))
    assert train_bpe(words, 330) == train_bpe(backwards, 330)


def test_merge_word():
    assert merge_word([1, 2, 2, 1, 2], (1, 2), 9) == [9, 2, 9]
    assert merge_word([3, 3, 3], (3, 3), 9) == [9, 3]


def test_bpe_shortens_text(bpe):
    assert len(bpe.encode(SAMPLE)) < 0.5 * len(SAMPLE.encode())


def test_bpe_takes_long_runs_quickly(bpe):
    start = time.perf_counter()
    for text in ("a" * 200_000, " " * 200_000, "!\r\n" * 70_000):
        assert bpe.decode(bpe.encode(text)) == text
    assert time.perf_counter() - start < 10


# --- errors, each one line ---


def message(call, *arguments):
    with pytest.raises(DataError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unseen_characters_are_named():
    text = message(Tokenizer.from_chars("abc").encode, "aé😀bz")
    assert "'é' (U+00E9)" in text and "'😀'" in text and "'z'" in text and "byte" in text and "'a'" not in text


def test_broken_unicode_is_refused(bpe):
    for tokenizer in (Tokenizer.byte(), bpe, Tokenizer.from_chars("ab")):
        assert "Unicode" in message(tokenizer.encode, "ab\udc80")


def test_foreign_ids_are_refused(bpe):
    assert "320" in message(bpe.decode, [5, 320])
    assert "-1" in message(bpe.decode, [-1])


# --- keeping ---


def three(bpe):
    return Tokenizer.byte(), Tokenizer.from_chars("héllo\n😀"), bpe


def test_json_round_trip(bpe, tmp_path):
    for tokenizer in three(bpe):
        again = Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        tokenizer.save(tmp_path / "tokenizer.json")
        for other in (again, Tokenizer.load(tmp_path / "tokenizer.json")):
            assert (other.kind, other.tokens, other.name, other.fingerprint) == (
                tokenizer.kind, tokenizer.tokens, tokenizer.name, tokenizer.fingerprint)
            assert other.encode("hllo") == tokenizer.encode("hllo")
    assert len({tokenizer.fingerprint for tokenizer in three(bpe)}) == 3
    assert bpe.name == "bpe320"


def test_any_change_to_the_file_is_noticed(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    text = path.read_text("utf-8")
    changes = [('" other"', '" rehto"'), ('"vocab_size": 320', '"vocab_size": 321'), ('"bpe"', '"byte"'),
               ('"bpe"', '"wordpiece"'), ('"tokens"', '"tockens"')]
    for bad in [text[:-40], "[]", "", *(text.replace(old, new) for old, new in changes)]:
        assert bad != text
        path.write_text(bad, "utf-8")
        reason = message(Tokenizer.load, path)
        assert str(path) in reason and "prepare" in reason
    path.write_bytes(b"\xff\xfe\0")
    assert str(path) in message(Tokenizer.load, path)
    assert "No such file" in message(Tokenizer.load, tmp_path / "nowhere.json")


# --- gpt2 ---


def small_encoding(name):
    ranks = {bytes([i]): i for i in range(256)} | {b" t": 256}
    special = {"<|endoftext|>": 257}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def test_gpt2_travels_with_its_tokens(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", small_encoding)
    tokenizer = Tokenizer.gpt2()
    monkeypatch.setattr(tiktoken, "get_encoding", None)         # nothing may be fetched again
    again = Tokenizer.from_dict(tokenizer.to_dict())
    text = "a tall <|endoftext|> tale"
    assert again.decode(again.encode(text)) == text
    assert 257 not in again.encode(text) and again.decode([257]) == "<|endoftext|>"
    assert again.vocab_size == 258 and again.name == "gpt2"


def test_gpt2_out_of_reach_names_the_remedy(monkeypatch):
    def fail(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    reason = message(Tokenizer.gpt2)
    assert "vocab.bpe" in reason and "encoder.json" in reason and "TIKTOKEN_CACHE_DIR" in reason
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(5))
    start = time.perf_counter()
    assert "no answer" in message(tokenizers.fetch_gpt2, 0.1)
    assert time.perf_counter() - start < 2


def test_token_lengths_are_bytes(bpe):
    assert (Tokenizer.byte().token_lengths() == 1).all()
    assert Tokenizer.from_chars("aé😀").token_lengths().tolist() == [1, 2, 4]
    assert bpe.token_lengths().dtype == np.int32 and len(bpe.token_lengths()) == bpe.vocab_size
