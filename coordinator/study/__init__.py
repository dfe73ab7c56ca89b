"""Trains for real what allocation policies make of one fleet, and compares them. No broker."""
