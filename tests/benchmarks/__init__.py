"""Side-by-side figures, for people: nothing here passes or fails by a time."""
