"""Find a fleet that is there already, and write a configuration to start from. Reads only; guesses nothing silently."""
