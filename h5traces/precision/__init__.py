"""Encodings that give up precision for size, each with a bound on what they change."""
