"""Formats on disk: one file a format, each with its writer and its reader. Never imports a method."""
