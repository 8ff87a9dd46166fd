"""An attack on the suite that anyone can repeat: `python -m tests.attack`.

What is tried stands in a module an area, as named recipes; `frame` does each in a process of its own, within limits of
time and memory, and `verdict` says what has held. Beside it: `fuzz`, `kills` and `power`, which take as long as one
likes.
"""
