"""Studies of SUPIR's networks."""
