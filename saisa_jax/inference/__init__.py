"""Inference with a finished model: prefill, decode, sample."""
