"""Sources to shards (decision 0004): measure, score, select, write; and negatives, pairs, and the page."""
