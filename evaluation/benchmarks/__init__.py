"""One module a benchmark: `prompts(data_dir)`, `plan(prompts)` and a pure `score(records, mode)` without any model."""
