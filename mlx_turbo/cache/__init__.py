"""Key-value caches that hold most tokens packed."""
