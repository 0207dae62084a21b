"""Measures restored pictures."""

MIN_PICTURES = 6
"""Ours: the fewest pictures that may tell a difference. With fewer, no interval holds its level for skewed values."""
TOO_FEW = "too few to say"
"""The verdict on fewer pictures."""
IDENTITY_PSNR_DB = 80.0
"""The PSNR of equal pictures: that of pyiqa, which adds 1e-8 to the squared error."""
