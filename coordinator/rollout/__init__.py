"""Campaigns: a bundle taken to many devices, in waves, with every device accounted for."""
