"""Decode video frames from files and encode frames to files."""
