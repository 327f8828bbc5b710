"""vLLM as the engine of a SAISA or NAAViT model: what it reads of pictures is put into the cache of a stock decoder.

A checkpoint is a plain decoder (Llama, Mistral, Qwen2) and an encoder from a picture to keys and values. vLLM, as it
is, serves the first; `front` (with saisa_jax) makes the second, lays it into a `store`, and asks vLLM; `connector`
(in vLLM's process, without saisa_jax) takes it from the store into vLLM's paged cache.
"""
