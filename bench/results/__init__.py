"""What finished runs leave on disk, and the tables made of it."""
