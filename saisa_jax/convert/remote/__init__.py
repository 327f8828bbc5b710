"""Code that goes out beside the weights of the layout `hf`: transformers runs it, this program never."""
