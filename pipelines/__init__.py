"""Workflows on Ray and MLflow, in rooms. CONTRIBUTING.md lists the rooms; tests/test_layering.py checks them."""
