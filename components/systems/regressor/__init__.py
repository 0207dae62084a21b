"""Restorers of the community, as spandrel detects and builds them: one network from pictures to pictures."""
