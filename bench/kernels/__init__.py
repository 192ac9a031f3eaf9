"""Our kernels against what users have, in one run."""
