"""A fleet without a network: who holds what, how slow devices are, and how policies fare on it.

Populations and delay models are pure functions of their arguments and a seed. No torch, no broker.
"""
