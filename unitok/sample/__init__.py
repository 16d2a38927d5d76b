"""Generation: the loop over tokens, the filters on logits, and files from tokens."""
