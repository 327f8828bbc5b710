"""Metrics, progress, time and memory of a run; nothing here changes its course."""
