"""Experiment files: one YAML file per experiment, small diffs over the fragments in defaults/."""
