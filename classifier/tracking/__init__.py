"""What MLflow is told: the journal, the process that sends it, the store, the registry."""
