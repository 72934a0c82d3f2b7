"""From source files to images of one size, and their splits."""
