"""Weights in, weights out: the one room that knows how others spell their tensors and configs."""
