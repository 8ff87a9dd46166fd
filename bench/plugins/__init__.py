"""Plug-ins by the names that people type: where classes are found, what was meant, whose line an error is."""
