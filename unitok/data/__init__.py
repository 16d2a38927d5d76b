"""Data: files <-> tensors, sources of documents, tokenization, shards, packing, and the built-in scenes."""
