"""Estimate: fits on the measurements, their bound, scans and references."""
