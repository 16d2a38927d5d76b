"""Evaluation: the oracle that reads scenes, the scores, and the report."""
