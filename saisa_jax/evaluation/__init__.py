"""Measuring a finished model on a benchmark."""
