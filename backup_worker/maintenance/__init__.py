"""What is done by the clock, apart from backups: look, deliver, prune, scrub, drill, tell.

`maintain` runs one task after the other; a task that fails is told and does not stop the next one.
"""
