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
    # 0, 1, ..., E - 1, 0, 1, ... is an even deal; what is random is the order of the cards. To draw
    # an expert for each id by itself would be even on average alone
    random = torch.Generator().manual_seed(seed)
    return (torch.arange(V) % E)[torch.randperm(V, generator=random)]


def balanced_table(counts, E):
    """counts (V,) of the ids in a corpus -> (V,) int64, the expert of each id."""
    table, load = torch.zeros(len(counts), dtype=torch.long), [0] * E
    # the large ones first: what comes late is small, and fills the gaps that they left
    for token in counts.argsort(descending=True).tolist():
        expert = load.index(min(load))
        table[token] = expert
        # what is to be even is tokens, not ids
        load[expert] += int(counts[token])
    return table


def fewest_possible(counts, E):
    """counts (V,) -> int: the busiest expert has at least so many tokens, whatever the table: the
    larger of two bounds, one from the sum of the counts and one from a single id. (A table may
    have to be less even than that.)"""
    # an even share, rounded up; and the expert of the most frequent id has all of its tokens
    total = int(counts.sum())
    return max(-(-total // E), int(counts.max()))


def hash_route(token_ids, table):
    """token_ids (B, T), table (V,) -> experts (B T, 1) and gates (B T, 1), float32, each 1."""
    # the current id decides. With a gate of 1 the expert alone gets a gradient, and needs no other
    experts = table[token_ids.flatten()].unsqueeze(-1)
    return experts, torch.ones_like(experts, dtype=torch.float32)


# ---- the check ----
from course.check import ask, close, shape  # noqa: E402
from ffn import Context  # noqa: E402
from routers import ROUTERS, hash_table  # noqa: E402
from settings import FFNConfig  # noqa: E402


def a_table(name, table, V, E):
    """Raises Wrong unless this is a table of V experts below E."""
    shape(name, table, (V,))
    ask(table.dtype == torch.long, f"{name} is {table.dtype}: an index is int64")
    ask(0 <= table.min() and table.max() < E, f"{name} names the experts {int(table.min())} to "
        f"{int(table.max())}, not 0 to {E - 1}")


def check(mine):
    for V, E in ((64, 4), (50, 8), (7, 7), (33, 2)):
        random(mine, V, E)
    for seed, (V, E) in enumerate(((40, 4), (100, 8), (12, 5), (6, 8))):
        # a text: the id of rank r occurs about 1 / r as often as the first; ids in random order
        g = torch.Generator().manual_seed(seed)
        counts = (2000 / torch.arange(1, V + 1)).long() * 10 + torch.randint(10, (V,), generator=g)
        balanced(mine, counts[torch.randperm(V, generator=g)], E)
    fewest(mine)
    looks_up(mine)


def random(mine, V, E):
    state = torch.get_rng_state()
    table, again, other = (mine.random_table(V, E, seed) for seed in (3, 3, 4))
    a_table("random_table", table, V, E)
    ask(torch.equal(state, torch.get_rng_state()), "random_table moves the default generator, so "
        "that the weights drawn after it depend on it: draw from a torch.Generator of its own")
    ask(torch.equal(table, again), "random_table(V, E, 3) differs from one call to the next")
    each = table.bincount(minlength=E)
    want = hash_table(V, E, seed=3).bincount(minlength=E).sort().values
    fair = " or ".join(map(str, want.unique().tolist()))
    ask(torch.equal(each.sort().values, want), f"of V = {V} ids the experts get {each.tolist()}: "
        f"an even deal over E = {E} is {fair} each; did you draw each id by itself?")
    ask(not torch.equal(table, other) or V < 10, "random_table is the same for two seeds")
    runs = torch.arange(V)
    for what, plain in (("id mod E", runs % E), ("blocks of neighbouring ids", runs * E // V)):
        ask(not torch.equal(table, plain) or V < 10, f"random_table is {what}: not random, and ids "
            "next to each other are often alike (digits, letters)")


def balanced(mine, counts, E):
    V = len(counts)
    table = mine.balanced_table(counts.clone(), E)
    a_table("balanced_table", table, V, E)

    def loads(t):
        return torch.zeros(E, dtype=torch.long).index_add(0, t, counts)

    got, want = loads(table), loads(hash_table(V, E, counts))
    if torch.equal(got.sort().values, want.sort().values):
        return
    most = (f"the busiest expert has {int(got.max())} of {int(counts.sum())} tokens, not "
            f"{int(want.max())}")
    # from the most frequent id down
    dealt = table[counts.argsort(descending=True)]
    ask(not torch.equal(dealt[:-E], dealt[E:]), f"the ids go to the experts in turn, and {most}: "
        "begin with the most frequent id, and add to the load how often an id occurs, not 1")
    first = dealt[:E]
    ask(len(first.unique()) == len(first), f"two of the {len(first)} most frequent ids share an "
        f"expert, and {most}: begin with the most frequent, each to the least busy expert")

    ask(False, f"{most}: each id goes to the least busy expert, the most frequent id first")


def fewest(mine):
    even = torch.tensor([5, 4, 3, 3, 3])
    space = torch.tensor([90, 4, 3, 2, 1])
    for counts, E, want, why in (
            (even, 3, 6, "18 tokens over 3 experts are 6 each"),
            (even, 4, 5, "18 tokens over 4 experts are 4.5 each, and one of them must have 5"),
            (space, 4, 90, "the most frequent id, a space for instance, occurs 90 times and has "
             "one expert: no table can help"),
            (space, 1, 100, "one expert has all")):
        got = mine.fewest_possible(counts, E)
        ask(got == want, f"fewest_possible({counts.tolist()}, {E}) is {got}, not {want}: {why}")
        table = hash_table(5, E, counts)
        assert torch.zeros(E).index_add(0, table, counts.float()).max() >= want


def looks_up(mine):
    ids, table = torch.tensor([[3, 1, 3, 0, 4], [1, 1, 2, 3, 0]]), hash_table(5, 3, seed=1)
    router = ROUTERS["hash"](FFNConfig(router="hash", n_expert=3, top_k=1), 4, vocab_size=5)
    router.table.copy_(table)
    want, weights = router(torch.randn(10, 4), Context(ids)).by_token()
    experts, gates = mine.hash_route(ids, table)
    shape("the experts of hash_route", experts, (10, 1))
    shape("the gates of hash_route", gates, (10, 1))
    for i, j in ((0, 2), (1, 5), (1, 6), (3, 9)):
        ask(experts[i] == experts[j], f"tokens {i} and {j} have the same id and go to the experts "
            f"{int(experts[i])} and {int(experts[j])}: the id alone decides, not the position")
    ask(torch.equal(experts, want), f"hash_route gives the experts {experts.flatten().tolist()}, "
        f"and the table says {want.flatten().tolist()}")
    ask(gates.dtype == torch.float32, f"the gates are {gates.dtype}, not float32: they weigh what "
        "an expert returns")
    close("the gates", gates, weights, hint="a fixed table has no probability: its gate is 1")


WRONG = [
    ("(torch.arange(V) % E)[torch.randperm(V, generator=random)]",
     "torch.randint(E, (V,), generator=random)", "did you draw each id by itself?"),
    ("(torch.arange(V) % E)[torch.randperm(V, generator=random)]", "torch.arange(V) % E",
     "same for two seeds"),
    ("torch.randperm(V, generator=random)", "torch.randperm(V)", "moves the default generator"),
    ("random = torch.Generator().manual_seed(seed)", "random = torch.manual_seed(seed)",
     "moves the default generator"),
    ("% E)", "// (V // E))", "names the experts"),
    ("load[expert] += int(counts[token])", "load[expert] += 1", "not 1"),
    ("argsort(descending=True)", "argsort()", "begin with the most frequent id"),
    ("expert = load.index(min(load))", "expert = int(token) % E", "share an expert"),
    ("for token in counts.argsort(descending=True).tolist():", "for token in range(len(counts)):",
     "share an expert"),
    ("max(-(-total // E), int(counts.max()))", "-(-total // E)", "no table can help"),
    ("-(-total // E)", "total // E + 1", "are 6 each"),
    ("table[token_ids.flatten()].unsqueeze(-1)",
     "(torch.arange(token_ids.numel()) % (int(table.max()) + 1)).unsqueeze(-1)",
     "the id alone decides"),
    ("torch.ones_like(experts, dtype=torch.float32)", "torch.ones_like(experts)", "not float32"),
    ("torch.ones_like(experts, dtype=torch.float32)",
     "torch.full_like(experts, 1 / (int(table.max()) + 1), dtype=torch.float32)", "its gate is 1"),
]
