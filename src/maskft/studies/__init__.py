"""Studies: many runs that differ in what a file says, as Optuna trials, with one typed result each.

sections.py     sections of the file: axes, tuning, what is measured, the size of a paper
definition.py   the file: recipe, variants, axes, seeds, tuning; and the cells it spells out
work.py         a worker: takes cells until none is left
queue.py        cells as trials in a database, so that many workers share them
process.py      processes that a worker's trials are made in
trial.py        one trial there: train, evaluate, result
results.py      what is kept of a run
after.py        analyses of finished runs, by name
tune.py         a learning rate for a recipe
toy.py          a tiny base, to see that a study runs
at_scale.py     memory and hours at the size of a paper, planned
"""
