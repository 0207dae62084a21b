"""Samplers: plain functions over a Denoiser. They know nothing of prompts, guidance or control."""
