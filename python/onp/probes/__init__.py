"""What a backdoor looks like from clean data alone: unlearning, and synthesised triggers.

Each trigger family is one file with the same four functions; ``synthesis`` optimises them all in
one batch. A family that matches the attacker's trigger finds a small, fully effective one.
"""
