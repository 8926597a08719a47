"""ProPhy in JAX: physics-aware video diffusion (a physical branch next to a frozen video DiT)."""

__version__ = "0.1.0"
