"""Samples, conversations, images, and the pipeline that makes batches of them."""

import os

# transformers is here for its tokenizers alone; it would announce that PyTorch is missing. Read when it is imported.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
