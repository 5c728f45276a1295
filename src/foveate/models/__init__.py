"""What decides: networks and policies."""
