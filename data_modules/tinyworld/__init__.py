"""TinyWorld, the embedded data set: a small drawn world with captions, ground truth and an exact verifier."""
