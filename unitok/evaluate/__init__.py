"""Evaluation: of tokenizers on files, and of decoders on documents."""
