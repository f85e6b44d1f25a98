"""Pure arithmetic and data: no files, no network, no transformers."""
