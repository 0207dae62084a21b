"""The commands of `restoray`: each parses its arguments, calls one function of another room and prints the result."""
