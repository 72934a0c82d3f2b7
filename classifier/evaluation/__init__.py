"""Metrics, pictures and the table of predictions."""
