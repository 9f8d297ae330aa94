"""Reading: archives, traces and their arrays."""
