"""Benchmarks of the operators: ``python -m benchmarks token_logprobs``. See ``protocol.py``."""
