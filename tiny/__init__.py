"""The demo: its model, its task, and how the model was made."""
