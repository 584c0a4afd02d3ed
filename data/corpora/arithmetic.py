"""`math`: word problems and arithmetic with worked answers, generated without end from a seed.

    Q: Mia has 14 pens and buys 5 boxes of 8 pens. How many pens does Mia have now?
    A: 5 * 8 = 40
    14 + 40 = 54
    #### 54

Each step of an answer is one true equation, and the number after #### answers the question, as in
GSM8K (Cobbe et al. 2021, 2110.14168), so that one function marks the continuations of a model on
both. Small models learn the form and the small numbers quickly; carrying through long sums stays
hard, so the loss keeps falling as models grow.

A question is validation or training by the hash of its text: no question of one split is ever in
the other.
"""
import random
import re

from data.corpora.corpus import Corpus, split_of

NAMES = ("Ada Ben Chen Dina Emil Fay Goran Hana Ivan Jun Kofi Lena Mia Nils Olga Paul Rosa Sam "
         "Tara Uma Vera Wim Yara Zoe").split()
THINGS = ("apples books coins eggs flowers keys lamps marbles nuts pears pens plums shells stamps "
          "stones tickets").split()
BOXES = "bags boxes crates jars packs rows".split()
PLACES = "bakery farm garage library market museum office school station".split()

# Each kind of problem is a function of a random.Random that returns (question, the equations in
# order).


def say(left, sign, right):
    """One equation as text, with its right side computed: (12, "+", 5) -> "12 + 5 = 17"."""
    value = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[sign]
    return f"{left} {sign} {right} = {value}"


def number(rng, digits=3):
    """1 to `digits` digits, each length equally likely: small numbers are frequent, as they are in
    life."""
    return rng.randrange(1, 10 ** rng.randint(1, digits))


def buying(rng):
    name, thing, box = rng.choice(NAMES), rng.choice(THINGS), rng.choice(BOXES)
    have, boxes, each = number(rng, 2), rng.randint(2, 12), rng.randint(2, 25)
    steps = [say(boxes, "*", each), say(have, "+", boxes * each)]
    return (f"{name} has {have} {thing} and buys {boxes} {box} of {each} {thing}. "
            f"How many {thing} does {name} have now?"), steps


def giving(rng):
    (name, other), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    have = rng.randint(20, 999)
    first, second = rng.randint(1, have // 2), rng.randint(1, have // 2)
    steps = [say(first, "+", second), say(have, "-", first + second)]
    return (f"{name} has {have} {thing}, gives {first} to {other} and loses {second}. "
            f"How many {thing} are left?"), steps


def sharing(rng):
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    friends, each, extra = rng.randint(2, 12), rng.randint(2, 40), rng.randint(1, 30)
    total = friends * each
    if rng.random() < 0.5 and total > extra:
        have, sign, story = total - extra, "+", f"finds {extra} and shares all"
    else:
        have, sign, story = total + extra, "-", f"keeps {extra} and shares the others"
    steps = [say(have, sign, extra), say(total, "/", friends)]
    return (f"{name} has {have} {thing}, {story} equally among {friends} friends. "
            f"How many {thing} does each friend get?"), steps


def shopping(rng):
    name, (first, second) = rng.choice(NAMES), rng.sample(THINGS, 2)
    n, p, m, q = rng.randint(2, 15), rng.randint(1, 12), rng.randint(2, 15), rng.randint(1, 12)
    spent = n * p + m * q
    purse = (spent // 50 + rng.randint(1, 2)) * 50
    steps = [say(n, "*", p), say(m, "*", q), say(n * p, "+", m * q), say(purse, "-", spent)]
    return (f"{name} buys {n} {first} at ${p} each and {m} {second} at ${q} each, and pays with "
            f"${purse}. How many dollars does {name} get back?"), steps


def travelling(rng):
    name, place = rng.choice(NAMES), rng.choice(PLACES)
    speed, hours, rest = rng.randint(3, 120), rng.randint(2, 9), number(rng, 2)
    steps = [say(speed, "*", hours), say(speed * hours, "+", rest)]
    return (f"{name} drives {hours} hours at {speed} km per hour and then {rest} km more to the "
            f"{place}. How many km is that in all?"), steps


def ages(rng):
    name, other = rng.sample(NAMES, 2)
    age, times, years = rng.randint(2, 15), rng.randint(2, 5), rng.randint(1, 20)
    steps = [say(age, "*", times), say(age * times, "+", years)]
    return (f"{name} is {age} years old and {other} is {times} times as old. "
            f"How old will {other} be in {years} years?"), steps


def weekly(rng):
    place, thing = rng.choice(PLACES), rng.choice(THINGS)
    first, more, days = number(rng, 2), rng.randint(1, 20), rng.randint(3, 6)
    counts = [first + more * day for day in range(days)]
    steps, total = [], counts[0]
    for count in counts[1:]:
        steps.append(say(total, "+", count))
        total += count
    return (f"The {place} sells {first} {thing} on the first day and {more} more on each next day. "
            f"How many {thing} does it sell in {days} days?"), steps


def fencing(rng):
    length, width = number(rng, 3), number(rng, 2)
    yard = f"The yard of the {rng.choice(PLACES)} is {length} m long and {width} m wide."
    if rng.random() < 0.5:
        return f"{yard} What is its area?", [say(length, "*", width)]
    steps = [say(length, "+", width), say(length + width, "*", 2)]
    return f"{yard} How long is the fence around it?", steps


def adding(rng):
    """Two to four terms, taken from the left."""
    total = number(rng, 4)
    terms = [(rng.choice("+-"), number(rng, 4)) for _ in range(rng.randint(1, 3))]
    question, steps = f"What is {total}", []
    for sign, term in terms:
        question += f" {sign} {term}"
        steps.append(say(total, sign, term))
        total = total + term if sign == "+" else total - term
    return question + "?", steps


def multiplying(rng):
    """By tens and ones, as on paper: 47 * 36 = 47 * 30 + 47 * 6."""
    a, b = rng.randint(2, 999), rng.randint(11, 99)
    tens, ones = b - b % 10, b % 10
    steps = [say(a, "*", b)]
    if ones:
        steps = [say(a, "*", tens), say(a, "*", ones), say(a * tens, "+", a * ones)]
    return f"What is {a} * {b}?", steps


def dividing(rng):
    b, quotient = rng.randint(2, 99), rng.randint(2, 999)
    left = rng.randrange(b)
    steps = [say(b, "*", quotient), say(b * quotient + left, "-", b * quotient)]
    return f"What is the remainder of {b * quotient + left} divided by {b}?", steps


def solving(rng):
    letter, factor = rng.choice("abknxyz"), rng.randint(2, 20)
    root, add = rng.randint(1, 99), number(rng, 3)
    steps = [say(factor * root + add, "-", add), say(factor * root, "/", factor)]
    return f"Solve {factor} * {letter} + {add} = {factor * root + add}. What is {letter}?", steps


def sequences(rng):
    start, step, length = number(rng, 2), rng.randint(2, 60), rng.randint(3, 6)
    terms = [start + step * i for i in range(length)]
    steps = [say(terms[-1], "-", terms[-2]), say(terms[-1], "+", step)]
    return f"What comes next: {', '.join(map(str, terms))}?", steps


# plain sums twice: they are the alphabet
KINDS = [buying, giving, sharing, shopping, travelling, ages, weekly, fencing,
         adding, adding, multiplying, dividing, solving, sequences]


def problems(seed, split=None):
    """Yields (question, worked answer, final answer) for ever, the same for the same seed: three
    str.

    The worked answer holds one equation per line; the final answer is the number that the last one
    ends with. `split` ("train" or "val") leaves out the questions of the other one.
    """
    rng = random.Random(seed)
    while True:
        question, steps = rng.choice(KINDS)(rng)
        if split is None or split_of(question) == split:
            yield question, "\n".join(steps), steps[-1].rpartition(" = ")[2]


def as_text(question, worked, answer):
    """One problem as it stands in a corpus, math and gsm8k alike; a blank line ends it."""
    return f"Q: {question}\nA: {worked}\n#### {answer}\n\n"


def prompt(question):
    """What a model is given to answer: as_text up to the answer."""
    return f"Q: {question}\nA:"


def final_answer(text):
    """The number after the first ####, as str without thousands separators; None where there is
    none.

    Give it what the model wrote after the prompt; problems that it went on to invent do not count.
    """
    found = re.search(r"####[ \t]*\$?(-?[\d,]*\.?\d+)", text.partition("\nQ:")[0])
    return found.group(1).replace(",", "") if found else None


def documents(split):
    """Other seeds for the two splits, and by split_of no question in common."""
    for problem in problems({"train": 0, "val": 1}[split], split):
        yield as_text(*problem)


def corpus(name="math"):
    about = "generated, seeds 0 and 1"
    return Corpus("math", documents, about, 4_000_000, "problems", generated=True)
