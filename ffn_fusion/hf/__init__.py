"""The host: the only package that knows transformers, safetensors, tensor names and files of text."""
