"""Models opened for restoration, the batch job that restores a folder, and published weights."""
