"""What fields, axes and numbers of a trace mean: established, never assumed; and checks of it."""
