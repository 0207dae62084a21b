"""The restoration service: its HTTP face, its deployments on Ray Serve, and a client."""
