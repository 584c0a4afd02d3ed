"""Hunt 5: find the bug in layer.py, and write the test that catches it.

1. Read layer.py. Its docstring says what is meant; one place in the code does something else.
   `python course/bugs/5/layer.py` runs it. Leave the file as it is.
2. Write test(layer). `layer` is the module layer.py, with its bug or without it. Make a layer, run
   it, and assert what must hold, with a message that has the numbers:
       assert change < 1e-5, f"... changed by {change:.3f}"
3. `python -m course.check bugs/5` runs your test on both: it must fail on the one with the bug
   and pass on the right one. Then `--solution bugs/5` shows another test, and why.
"""
import torch


def test(layer):
    raise NotImplementedError("yours")
