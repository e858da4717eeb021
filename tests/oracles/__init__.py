"""Agreement with public packages, and where they are wrong."""
