"""Loops over the ops: beam search."""
