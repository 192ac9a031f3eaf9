"""Training the policy that the package ships, on many networks."""
