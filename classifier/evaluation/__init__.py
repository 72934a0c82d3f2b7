"""Metrics, and the pictures of an evaluation."""
