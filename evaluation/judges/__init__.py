"""Judges: models that look at pictures and say what they see. They know nothing of scoring (see contract.py)."""
