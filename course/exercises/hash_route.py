"""A router that learns nothing: a fixed table of token ids.

lecture 2 · difficulty 2 of 5 · importance 3 of 5 · 25 minutes · 4 points

Hash layers (Roller et al. 2106.04426 sec. 3.1) send a token to the expert that a table (V,) names
for its id: whatever the text around it, at any position. There is nothing to learn and nothing to
balance, and it is the control that a learned router has to beat. What matters is the table.

1. `random_table` deals the V ids out at random, the same number to each expert.
2. `balanced_table` looks at a corpus: it takes the ids from the most frequent one down, and gives
   each to the expert that has the fewest tokens so far. A few ids make up most of a text, so that a
   deal that is even in ids is uneven in tokens.
3. `fewest_possible` bounds how even any table can be, by two facts: every token has to go
   somewhere, and an id cannot be cut in two.
4. `hash_route` looks up.
"""
import torch


def random_table(V, E, seed):
    """-> (V,) int64, the expert of each id: V / E ids each, one more for some where that is not
    whole. The same for the same seed; the default generator of torch stays as it is."""
    raise NotImplementedError("yours")


def balanced_table(counts, E):
    """counts (V,) of the ids in a corpus -> (V,) int64, the expert of each id."""
    raise NotImplementedError("yours")


def fewest_possible(counts, E):
    """counts (V,) -> int: the busiest expert has at least so many tokens, whatever the table: the
    larger of two bounds, one from the sum of the counts and one from a single id. (A table may
    have to be less even than that.)"""
    raise NotImplementedError("yours")


def hash_route(token_ids, table):
    """token_ids (B, T), table (V,) -> experts (B T, 1) and gates (B T, 1), float32, each 1."""
    raise NotImplementedError("yours")
