"""Before runs: photographs into a store, images into features."""
