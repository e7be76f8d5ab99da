"""Before a run: what a study costs, whether this machine can run it, and which results no longer match it."""
