"""Tiny configurations and inputs for tests; no test code elsewhere in the package."""
