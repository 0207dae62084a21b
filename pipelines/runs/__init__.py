"""Plans of stages, the engine that runs them, MLflow, the report of a run and the registry of models."""
