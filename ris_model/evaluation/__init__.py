"""Evaluation: every estimate on the same scenes beside the bound; figures; a user's own data."""
