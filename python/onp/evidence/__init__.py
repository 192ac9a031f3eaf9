"""What speaks for a backdoor: first what the batch norms remember, then how far a few steps of
triggers and of squares lead to each class, and where none of them calls one, how far the classes'
margins can be driven and where each class's images go once they are led away. What is called is
probed by every family, and so is a class that somebody names."""

from onp.evidence.found import Evidence
from onp.evidence.norms import measured_shift
from onp.evidence.order import gather

__all__ = ["Evidence", "gather", "measured_shift"]
