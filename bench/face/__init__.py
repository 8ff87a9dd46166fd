"""What a person asks for, in Python as on the command line, which is a skin over this: sweeps and what they left."""
