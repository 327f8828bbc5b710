"""Files that hold tensors: safetensors, GGUF, pickles; and the hub that they come from."""
