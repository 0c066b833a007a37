"""Tuning: which numbers are searched, the study that searches them, its pictures."""
