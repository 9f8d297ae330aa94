"""Many processes that work on one folder: their plan, their shares, and what each has done."""
