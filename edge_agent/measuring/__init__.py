"""What a segment costs on this device: time and memory, for ``check`` and ``bench``."""
