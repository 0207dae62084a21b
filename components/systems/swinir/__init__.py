"""SwinIR as DiffBIR trains it: the coarse restorer in front of InstaRevive, and a system by itself."""
