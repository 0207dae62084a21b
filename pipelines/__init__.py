"""Ray and MLflow workflows; each module is one workflow and one verb of the `restoray` command."""
