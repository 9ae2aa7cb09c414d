"""Benchmarks (protocol and scoring) and judges (models that look at images). Nothing here imports training stages."""
