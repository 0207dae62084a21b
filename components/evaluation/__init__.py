"""Measures restored pictures."""
