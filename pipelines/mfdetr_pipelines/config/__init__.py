"""What every command is told: one documented dataclass each, importable without torch."""
