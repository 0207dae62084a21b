"""Studies of InstantIR's networks."""
