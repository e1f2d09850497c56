"""Studies: many runs that differ in what a file says, as Optuna trials, with one typed result each.

definition.py   the file: recipe, variants, axes, seeds, tuning; and the cells it spells out
queue.py        cells as trials in a database, so that many workers share them
trial.py        one run in a process of its own: train, evaluate, result
results.py      what is kept of a run
work.py         a worker: takes cells until none is left
"""
