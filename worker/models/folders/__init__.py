"""Families that are read from diffusers folders alone: data in a table, everything else from the folder."""
