"""Priors of our own: the SDXL-shaped one in three stages, the SD3-shaped one in one."""
