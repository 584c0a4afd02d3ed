"""Byte-pair encoding, trained from scratch (Gage 1994; of words: Sennrich et al. 2016; of bytes:
GPT-2).

Start from the 256 bytes; merge the pair of neighbours that occurs most often into a new token;
repeat. Two ideas make this fast enough in Python. Text repeats its words: each distinct word is
kept once, with its count. A merge changes only the words that hold the pair: the counts of pairs
are corrected there instead of being taken again.
"""
import heapq
from collections import Counter, defaultdict

import regex    # what tiktoken itself depends on; the standard library's re knows no \p{L}

# GPT-2's split into words, over whose borders no token goes. In this order: endings of English
# words; letters, digits or signs, with one space before them; white space, but the last space
# before a word belongs to the word; other white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def count_words(texts, pattern=PATTERN):
    """How often each word of `pattern` occurs in the texts, together: a Counter of str."""
    words, split = Counter(), regex.compile(pattern)
    for text in texts:
        words.update(match.group() for match in split.finditer(text))
    return words


def merge_word(ids, pair, new):
    """`ids` with `pair`, found from the left, replaced by `new`: (1, 2, 2, 1, 2) -> (9, 2, 9)."""
    merged, i = [], 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def train_bpe(word_counts, vocab_size, progress=lambda: None):
    """The tokens of a BPE vocabulary, a list of `vocab_size` bytes: the 256 bytes, then the merges
    in order.

    Of pairs that occur equally often the one with the smaller ids is merged first, so the result
    depends on the counts alone. The list is shorter where no pair occurs twice any more. `progress`
    is called after each merge.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    words = [list(word.encode()) for word in word_counts]
    frequency = list(word_counts.values())
    # of each pair: how often it occurs, and the indices of the words that hold it or once did
    pairs, places = Counter(), defaultdict(set)
    for index, ids in enumerate(words):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += frequency[index]
            places[pair].add(index)
    # the most frequent pair comes first; an entry may be out of date, which is noticed when it
    # comes
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    while len(tokens) < vocab_size and heap:
        stated, pair = heapq.heappop(heap)
        if pairs[pair] != -stated:      # out of date: merges took some, put it back with the rest
            if pairs[pair] > 1:
                heapq.heappush(heap, (-pairs[pair], pair))
            continue
        if pairs[pair] < 2:
            break
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for fresh in apply_merge(pair, new, words, frequency, pairs, places):
            heapq.heappush(heap, (-pairs[fresh], fresh))
        progress()
    return tokens


def apply_merge(pair, new, words, frequency, pairs, places):
    """Merges `pair` in every word that holds it and corrects the counts. Returns the pairs that are
    new: only these can have become more frequent, so only these need a new entry in the heap."""
    created = set()
    for index in places.pop(pair):
        old, count = words[index], frequency[index]
        ids = words[index] = merge_word(old, pair, new)
        for gone in zip(old, old[1:]):
            pairs[gone] -= count
        for kept in zip(ids, ids[1:]):
            pairs[kept] += count
            if new in kept:
                places[kept].add(index)
                created.add(kept)
    return created
