"""Data directories, audio formatting, features and token lists."""
