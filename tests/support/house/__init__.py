"""The house's own checks: its rules, the built wheel, other processors, a toy benchmark."""
