"""What every plug-in promises, and the toy on which promises are checked."""
