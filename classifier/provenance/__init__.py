"""Lineage of models, verification by rebuilding, restoring committed results, and remote storage."""
