"""Where inputs and outputs are: a path of this machine, or a place in a store ("s3://bucket/x")."""
