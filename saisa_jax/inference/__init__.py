"""Asking a finished model: prefill, decode, sample."""
