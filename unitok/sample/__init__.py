"""Generation: the next-id loop, the filters on logits, and ids to files."""
