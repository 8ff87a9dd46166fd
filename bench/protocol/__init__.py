"""What a comparison holds equal, and how runs are spelt and named."""
