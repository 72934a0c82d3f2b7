"""MLflow tracking: the journal, the process that sends it, the store, the model registry."""
