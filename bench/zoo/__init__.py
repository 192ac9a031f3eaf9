"""Backdoored and clean networks to measure on: attacks, training, and their records."""
