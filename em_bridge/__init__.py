"""The bus between an execution manager, its agents and Agent Backup."""
