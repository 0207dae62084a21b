"""A residual U-Net that restores pictures in one step: a regression, and a generator of the detail it leaves out."""
