"""From labels to clients: long tails, partitions, and what is set aside."""
