"""The training stream: the order of samples, the row at each position, and the feed of batches to a trainer."""
