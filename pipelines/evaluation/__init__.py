"""Pairs for measuring, scores of restored pictures, and the gate that a student must pass."""
