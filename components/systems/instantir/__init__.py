"""InstantIR (arXiv 2410.06551): perceptor, previewer and aggregator around a frozen SDXL-shaped prior."""
