"""What keeps any long run alive and on record. Imports no file of the root."""
