"""Samples, conversations, images, and the pipeline that makes batches of them."""
