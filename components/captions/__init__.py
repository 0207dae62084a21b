"""Captioners: each meets `components.types.Captioner`."""
