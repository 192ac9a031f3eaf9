"""Training a policy on many networks."""
