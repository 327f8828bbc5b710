"""The training loop and its parts: state, optimizer, loss, metrics."""
