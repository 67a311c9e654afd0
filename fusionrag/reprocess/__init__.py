"""Online: which of the reused tokens to run again (probe, select), and running them (recompute, with correct)."""
