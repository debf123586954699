"""Hostile and broken input: commands run in a warm process, and what they must not have done."""
