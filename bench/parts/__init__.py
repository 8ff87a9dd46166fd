"""Built-in parts, a file each; found by name through `bench.plugins.registry.PARTS`."""
