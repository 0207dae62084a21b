"""The SDXL-shaped nano prior, trained in three stages."""
