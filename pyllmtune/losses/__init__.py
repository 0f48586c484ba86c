"""Losses on per-token vectors: configurations, metrics and names for the common ones."""
