"""Restoration building blocks: torch, diffusers, transformers, OpenCV; never Ray, MLflow or pipelines."""
