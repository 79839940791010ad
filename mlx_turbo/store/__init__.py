"""Prompt caches that outlive the process, in blocks that conversations share."""
