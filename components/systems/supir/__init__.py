"""SUPIR (Yu et al., CVPR 2024): an SDXL-sized adaptor over a degradation-robust encoder."""
