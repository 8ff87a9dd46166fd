"""Between a process and its machine: files that are whole, files of others, the terminal, the interpreter."""
