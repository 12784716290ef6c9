"""What an explanation is."""
