"""Models that say whether a task is done, on the same held-out frames."""
