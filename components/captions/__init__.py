"""Captioners; all implement `components.types.Captioner`."""
