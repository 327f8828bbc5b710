"""A server on one machine: OpenAI's chat completions over continuous batching, and a page to try the model."""
