"""What is told about a run while it trains: metrics, progress, time, memory; nothing here steers it."""
