"""Samplers: plain functions over a Denoiser, independent of prompts, guidance and control."""
