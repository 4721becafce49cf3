"""Further commands: python -m tools.predict, tools.attention, tools.compare."""
