"""Whether archives are what they should be: structure, bytes, contents; and what can be saved."""
