"""What a run looked like: plots and one HTML page."""
