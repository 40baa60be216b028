"""What a checkpoint hears, measured."""
