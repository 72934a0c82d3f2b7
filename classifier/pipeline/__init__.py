"""Used by every stage: parameters, paths, atomic outputs, errors, signals, annotations and the image archive."""
