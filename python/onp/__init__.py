"""onp: repair backdoored neural networks by optimized neuron pruning."""

__version__ = "0.1.0"
