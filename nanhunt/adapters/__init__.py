"""Adapters to other tools, one per file: asleep until asked, thin, and gone without a trace."""
