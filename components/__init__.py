"""Restoration building blocks on torch, diffusers, transformers and OpenCV; no Ray, MLflow or pipelines."""
