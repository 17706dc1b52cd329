"""Is this the answer? Imports no file of the root."""
