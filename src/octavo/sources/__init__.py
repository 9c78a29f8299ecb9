"""From what a user names to a `ModelSource`: start at resolve.py."""
