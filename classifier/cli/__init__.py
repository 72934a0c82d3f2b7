"""The commands of `classifier`."""
