"""Tests against a real API server; `control_plane.py` says where it comes from."""
