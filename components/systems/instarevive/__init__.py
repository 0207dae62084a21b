"""InstaRevive (arXiv 2504.00508): score distillation of a text-to-image prior into one restoring step."""
