"""Agent Backup: snapshots that can be trusted, and recovery of dead agents from them."""
