"""What it costs: measured, and planned."""
