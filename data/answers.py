"""The loss of the answers alone, as data.answers_only asks: for text of questions and answers,
where a model should learn to answer and not to ask.

A corpus of questions (math, gsm8k, or any text in their form) is a row of

    Q: question
    A: answer, of any number of lines
    (an empty line)

Everything behind "A:" up to the next question is answer, the empty line too: a model must learn to
stop. All other targets become IGNORE, which the loss leaves out; their tokens still travel, so that
a balance loss sees them. A corpus of other text keeps all of its targets. The loss is a mean over
the targets that count, in each micro-step and process by itself.
"""
import re

import numpy as np

from data.binfile import open_bin
from data.tokenizers import Tokenizer

IGNORE = -100           # a target that counts for nothing, as in F.cross_entropy
ANSWER = re.compile(rb"\nA:(.*?)(?:(?<=\n\n)(?=Q: )|\Z)", re.DOTALL)


def spans(text):
    """[(begin, end)] of the answers in bytes; none where the text is no row of questions."""
    if not text.startswith(b"Q: "):
        return []
    return [found.span(1) for found in ANSWER.finditer(text)]


def answer_mask(path):
    """(count,) bool: the tokens of a prepared .bin file that begin within an answer; None for a
    corpus that is none of questions."""
    tokens, _ = open_bin(path)
    tokenizer = Tokenizer.load(path.parent / "tokenizer.json")
    found = spans(b"".join(map(tokenizer.tokens.__getitem__, tokens.tolist())))
    if not found:
        return None
    # the byte that each token begins with, and the two tokens between which each answer lies
    lengths = tokenizer.token_lengths()[tokens]
    begins = np.cumsum(lengths) - lengths
    mask = np.zeros(len(tokens), bool)
    for first, last in np.searchsorted(begins, found):
        mask[first:last] = True
    return mask


def are_answers(mask, starts, block_size):
    """(n, T) bool: whether each target of the windows that begin at these tokens is an answer's."""
    return mask[np.add.outer(starts, 1 + np.arange(block_size))]
