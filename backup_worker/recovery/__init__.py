"""Bring a dead agent back: fence, preserve, select, restore, start, and prove that it lives."""
