"""Which data, code and parameters made a model; verification; remote storage."""
