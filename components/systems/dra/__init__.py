"""DRA (Liang et al. 2025, arXiv 2502.20679): light restoration adapters and a LoRA in a frozen diffusion prior."""
