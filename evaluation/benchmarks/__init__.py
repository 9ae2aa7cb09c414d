"""One module a benchmark; each has a pure function `score(records, mode)` that runs without any model."""
