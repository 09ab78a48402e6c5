"""Data sets in the layouts that people have on disk, and what is done to their images. Nothing is downloaded."""
