"""What keeps any long run alive and on record, and what is common to all. Imports no file of the root."""
