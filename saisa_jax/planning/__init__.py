"""What a training step would cost on accelerators that are not here: memory, arithmetic, traffic, time."""
