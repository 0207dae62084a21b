"""Losses and the arithmetic of training targets, shared by the systems."""
