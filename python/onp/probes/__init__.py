"""What a backdoor looks like from clean data alone: norm statistics, unlearning, margins, where
images go once they are led away, and triggers.

Each trigger family is one file with the functions of ``families.Family``. ``replay`` learns
triggers that explain what the norms remember; ``synthesis`` those that reach a class, in one batch.
What a trigger reaches and which masks take it out is told by ``contenders`` and ``race``.
"""
