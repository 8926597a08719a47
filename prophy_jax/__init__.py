"""ProPhy in JAX: physics-aware video diffusion (a physical branch next to a frozen video DiT)."""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`load`, imported at its first use: commands that need no JAX import this package too."""
    if name == "load":
        from prophy_jax.library.loading import load

        return load
    if name == "UserError":
        from prophy_jax.run.errors import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
