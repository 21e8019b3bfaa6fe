"""From raw text to shards of packed samples."""
