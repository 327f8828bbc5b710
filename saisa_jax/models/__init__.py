"""The network: NAAViT's mask, the decoder, the vision encoder and the projectors."""
