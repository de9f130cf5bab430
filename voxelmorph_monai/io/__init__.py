"""Bytes on disk: which files hold images and tables, read and written whole or not at all."""
